"""After many connections of all kinds: no socket lingers in a pod, no process of the mesh has grown."""

import contextlib
import json
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.whole import ECHO, HTTP, MARKER, Load, WholeMesh, idle, namespace, service, workload

pytestmark = pytest.mark.e2e

RESOURCES = namespace(mode="ambient") + workload("web", node="node-2") + service("web") + idle("client")
ESTABLISHED, LISTEN, TIME_WAIT = 1, 10, 6
STATES = {2: "SYN_SENT", 3: "SYN_RECV", 4: "FIN_WAIT1", 5: "FIN_WAIT2", 7: "CLOSE", 8: "CLOSE_WAIT",
          9: "LAST_ACK", 11: "CLOSING", 12: "NEW_SYN_RECV"}  # fmt: skip


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(RESOURCES) as mesh:
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        yield mesh


def lingering(mesh: WholeMesh) -> Counter[str]:
    """The sockets of all pods that are neither open at both ends, nor listening, nor in TIME_WAIT, by state."""
    found: Counter[str] = Counter()
    for name in ("client", "web"):
        with mesh.inside(mesh.pod(name)):
            for table in ("tcp", "tcp6"):
                for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
                    state = int(line.split()[3], 16)
                    if state in STATES:
                        found[f"{name} {STATES[state]}"] += 1
    return found


def dump(mesh: WholeMesh, node: int, page: str = "/config_dump") -> tuple[int, bytes]:
    """A page of the node proxy's administration: status and body."""
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(mesh.state.node(f"node-{node}") / "admin.sock"))
        admin.sendall(f"GET {page} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: admin.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def stats(mesh: WholeMesh, node: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dump(mesh, node)[1])["stats"]
    return found


def descriptors(mesh: WholeMesh) -> dict[int, int]:
    """How many descriptors each process of the two proxies has open."""
    status = mesh.status()
    pids = [node["ztunnel"]["pid"] for node in status["nodes"]]
    pids += [one["pid"] for node in (1, 2) for one in stats(mesh, node)]
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in pids}


def many_endings(mesh: WholeMesh) -> None:
    """Connections that end in every way: in order, half-closed, reset, refused, given up."""
    client, web = mesh.pod("client"), mesh.pod("web")
    vip = mesh.service("web").addresses[0]
    with (
        Load(mesh, client, vip, 80) as by_vip,
        Load(mesh, client, web.addresses[0], HTTP) as by_address,
        Load(mesh, client, web.addresses[1], HTTP) as by_address6,
    ):
        for load in (by_vip, by_address, by_address6):
            load.wait(100)
    assert [*by_vip.failures, *by_address.failures, *by_address6.failures] == []
    for number in range(60):
        address = web.addresses[number % 2]
        with contextlib.ExitStack() as stack:
            talk = stack.enter_context(mesh.connect(client, address, ECHO))
            if number % 3 == 0:
                talk.connection.shutdown(socket.SHUT_WR)
                assert talk.connection.recv(1) == b""
            elif number % 3 == 1:
                talk.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                talk.connection.sendall(MARKER.encode() * 1000 + b"\n")  # closed with the answer unread
    for _ in range(20):
        with contextlib.suppress(OSError), mesh.connect(client, web.addresses[0], 9):
            pass


def test_nothing_lingers_and_nothing_grows(mesh: WholeMesh) -> None:
    many_endings(mesh)
    settle(mesh)
    before = descriptors(mesh)
    for _ in range(3):
        many_endings(mesh)
    settle(mesh)
    after = descriptors(mesh)
    print(f"descriptors before {before}, after {after}")
    assert set(after) == set(before), "no process was replaced"
    # A tunnel each way more or less: which worker gets a connection is the kernel's choice.
    assert all(after[pid] <= before[pid] + 8 for pid in before), (before, after)


def settle(mesh: WholeMesh) -> None:
    """Wait until no connection is left, and no socket that waits for the other end."""
    mesh.until(
        lambda: all(one["connections"] == 0 for node in (1, 2) for one in stats(mesh, node)),
        "no connection is open in the proxies",
    )
    mesh.until(lambda: not lingering(mesh), "no socket lingers in a pod")


def test_a_program_that_dies_leaves_no_socket(mesh: WholeMesh) -> None:
    """The server is killed in the middle of conversations; the client's ends hear of it."""
    client, web = mesh.pod("client"), mesh.pod("web")
    talks = [mesh.connect(client, web.addresses[number % 2]) for number in range(10)]
    for talk in talks:
        talk.talk()
    os.kill(mesh.programs()[web.name], 9)
    for talk in talks:
        assert not talk.works()
        talk.connection.close()
    settle(mesh)
    mesh.wait_pods(mesh=True)
    mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "it is started again, and answers")


def test_every_page_of_the_administration(mesh: WholeMesh) -> None:
    path = mesh.state.node("node-1") / "admin.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    status, index = dump(mesh, 1, "/")
    assert status == 200
    for line in index.decode().splitlines():
        page = line.split()[0].partition("?")[0]
        if page == "/debug/tap":  # which goes on for as long as somebody listens
            continue
        assert dump(mesh, 1, page)[0] == (405 if page == "/quitquitquit" else 200), line
    everything = json.loads(dump(mesh, 1)[1])
    assert [pod["name"] for pod in everything["pods"]] == ["client"]
    assert {one["name"] for one in everything["services"]} == {"web"}
    assert "PRIVATE KEY" not in str(everything)
