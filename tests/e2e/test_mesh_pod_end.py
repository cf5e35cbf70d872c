"""A pod that shuts down: its traffic is carried until its last program has ended, and the other ends are told."""

import json
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.whole import ECHO, WholeMesh, idle, namespace, service, workload

pytestmark = pytest.mark.e2e

# Told to end, it goes on for some seconds: it asks another pod with a new connection each time, and still answers.
LAST = """
import json, signal, socket, sys, threading, time

told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())

def serve():
    with socket.create_server(("::", 9000), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        while True:
            threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()

def echo(connection):
    while data := connection.recv(4096):
        connection.sendall(data)

def ask(address):
    with socket.create_connection((address, 8080), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
        answer = b""
        while data := connection.recv(4096):
            answer += data
        return answer.startswith(b"HTTP/1.1 200")

threading.Thread(target=serve, daemon=True).start()
while not told.wait(0.05):
    pass
answered, failed, end = 0, [], time.monotonic() + 1
while time.monotonic() < end:
    try:
        answered += ask(sys.argv[1])
    except OSError as error:
        failed.append(repr(error))
    time.sleep(0.02)
with open(sys.argv[2], "w") as file:
    json.dump({"answered": answered, "failed": failed}, file)
time.sleep(3)  # whoever looks for the file finds it before the end
"""

POD = """
apiVersion: v1
kind: Pod
metadata: {name: last}
spec:
  nodeName: node-2
  containers:
  - name: c
    command: ["%s", "-I", "-u", "%s", "%s", "%s"]
    ports: [{containerPort: 9000}]
---
"""


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(
        namespace(mode="ambient") + workload("web", node="node-1") + service("web") + idle("client")
    ) as mesh:
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        yield mesh


def stats(mesh: WholeMesh, node: int, name: str) -> int:
    """The sum of a figure of a node's workers."""
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(mesh.state.node(f"node-{node}") / "admin.sock"))
        admin.sendall(b"GET /config_dump?sections=stats HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: admin.recv(1 << 16), b""))
    found: list[dict[str, Any]] = json.loads(answer.partition(b"\r\n\r\n")[2])["stats"]
    return sum(one[name] for one in found)


def test_it_is_in_the_mesh_until_its_last_program_has_ended(mesh: WholeMesh) -> None:
    program, result = mesh.home / "last.py", mesh.temporary / "result.json"
    program.write_text(LAST)
    web = mesh.pod("web").addresses[0]
    mesh.write("last.yaml", POD % (sys.executable, program, web, result))
    mesh.until(lambda: mesh.membership().get("last"), "the pod is in the mesh")
    mesh.until(lambda: any(pod["name"] == "last" and pod["ready"] for pod in mesh.pods()), "it serves")
    client, last = mesh.pod("client"), mesh.pod("last")
    mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
    before = stats(mesh, 1, "tunnels_out")
    talk = mesh.until(lambda: _connected(mesh, client, last.addresses[0]), "its address is known")
    with talk:
        assert stats(mesh, 1, "tunnels_out") > before
        mesh.directory.joinpath("last.yaml").unlink()
        mesh.until(lambda: mesh.pod("last").metadata.deletion_timestamp, "it is being deleted")
        end = time.monotonic() + 30
        while not result.exists():
            assert time.monotonic() < end
            talk.talk()
            with mesh.connect(client, last.addresses[0], ECHO):
                pass
            time.sleep(0.02)
    found = json.loads(result.read_text())
    assert found["failed"] == []
    assert found["answered"]
    mesh.until(lambda: "last" not in mesh.membership(), "it is gone")
    # Nobody waits for a peer that is no more: the tunnels were closed while there was a way to say so.
    mesh.until(lambda: stats(mesh, 1, "tunnels_out") <= before, "no tunnel leads to it", 30)
    inbound = mesh.access_log("node-2", direction="inbound", dst_workload="last")
    assert inbound
    assert all(line["connection_security_policy"] == "mutual_tls" for line in inbound), (
        "none went past the mesh"
    )
    assert mesh.curl("client", "http://web/").startswith("hello web")


def _connected(mesh: WholeMesh, client: Any, address: str) -> Any:
    try:
        talk = mesh.connect(client, address, ECHO)
        talk.talk()
    except OSError:
        return None
    return talk
