"""Peers that want to take what others need: memory, places, time. Each has an end, and nobody else notices.

The limits are low here, so that a test reaches them; the node under attack is node 2, with a second pod on it.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import HTTP, Mesh, start_nginx
from tests.e2e.hostile import HBONE_PORT, HboneClient, Refused, half_open
from tests.hbone.peer import (
    CONNECT,
    END_HEADERS,
    SETTINGS_ACK,
    block,
    data,
    frame,
    headers,
    ping,
    rst,
    settings,
)
from tests.proxy.meshlab import identity_of, tcp_sockets
from ztunnel.embedded.testing import LabPod, until
from ztunnel.identity.testing import workload
from ztunnel.identity.tls import mesh_context

pytestmark = pytest.mark.e2e

CONNECTIONS, HANDSHAKES, WORKERS = 200, 50, 2
MIB = 1 << 20
MOST = (
    48 * MIB
)  # bytes by which a worker may grow while it is attacked: libraries' and buffers' first use is in it
FLOOD = 32 * MIB  # bytes of a flood that must not be needed to end it
# SYNs to a port. Three of the four ports tried end at one listener a worker: together less than its backlog (4096).
# Beyond that the kernel answers with SYN cookies, and takes the last packet of a connection that has ended for the
# answer to one: what that opens ends only with keepalive, and is nothing of ours (`test_half_open_connections` looks).
HALF_OPEN = 2000
FEW = {"POD_CONNECTION_LIMIT": str(CONNECTIONS), "POD_HANDSHAKE_LIMIT": str(HANDSHAKES)}


@pytest.fixture(scope="module")
def low_limits() -> Iterator[None]:
    """What the workers of this module read when they start."""
    before = {name: os.environ.get(name) for name in FEW}
    os.environ.update(FEW)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def mesh(low_limits: None, mesh: Mesh) -> Mesh:
    """The usual one, with low limits."""
    return mesh


@pytest.fixture(scope="module")
def neighbour(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> LabPod:
    """Another pod on the attacked node, which must not notice."""
    pod = mesh.lab.pod("neighbour", 2, service_account="neighbour")
    start_nginx(pod, tmp_path_factory.mktemp("neighbour"))
    return mesh.lab.join(pod)


@pytest.fixture(autouse=True)
def bounded(mesh: Mesh, neighbour: LabPod) -> Iterator[None]:
    """Whatever a test does: the workers stay the same, do not grow, and hold nothing of it for long."""
    served(mesh, neighbour)
    served(mesh, mesh.server)
    node = mesh.lab.nodes[2]
    before = {one.pid: rss(one.pid) for one in node.stats()}
    yield
    after = {one.pid: rss(one.pid) for one in node.stats()}
    assert after.keys() == before.keys(), "no worker has ended"
    grown = {pid: after[pid] - before[pid] for pid in after}
    assert max(grown.values()) < MOST, grown
    until(lambda: sum(one.connections for one in node.stats()) == 0, "no connection is left", 30)
    served(mesh, mesh.server)
    served(mesh, neighbour)


def rss(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cookies(pod: LabPod) -> int:
    """SYN cookies that the kernel has sent for listeners of the pod."""
    with pod.inside():
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    names, values = (line.split()[1:] for line in lines[:2])
    return int(dict(zip(names, values, strict=True))["SyncookiesSent"])


def served(mesh: Mesh, pod: LabPod, patience: float = 30) -> None:
    """A request of the pod in the mesh on the other node is answered."""
    done = mesh.client.check(["curl", "-sS", "-m", f"{patience:g}", f"http://{pod.ip4}:{HTTP}/"])
    assert done.stdout == "hello world\n", done.stderr


def errors(mesh: Mesh) -> list[str]:
    return [event["error"] for event in mesh.lab.nodes[2].access_log() if "error" in event]


def peer(mesh: Mesh) -> HboneClient:
    """A client with a good certificate, whose handshake is done."""
    context = mesh_context(workload(mesh.lab.authority, identity_of(mesh.client)))
    client = HboneClient(mesh.outside_client, mesh.server.ip4, context)
    client.start()
    return client


# Before TLS.


def test_slow_handshakes(mesh: Mesh, neighbour: LabPod) -> None:
    """Who sends TLS byte by byte has a place only while nobody else wants it."""
    before = len(errors(mesh))
    node = mesh.lab.nodes[2]
    idle = sum(one.tunnels_in for one in node.stats())
    with contextlib.ExitStack() as stack:
        for _ in range(4 * WORKERS * HANDSHAKES):
            sock = stack.enter_context(mesh.outside_client.connect(mesh.server.ip4, HBONE_PORT, timeout=30))
            sock.sendall(b"\x16\x03\x01")
        held = sum(one.tunnels_in for one in node.stats())
        assert held <= idle + WORKERS * HANDSHAKES
        served(mesh, neighbour)
        # A peer of the attacked pod that has no tunnel yet waits for a place, and gets one.
        with peer(mesh) as client:
            assert client.connect(f"{mesh.server.ip4}:{HTTP}") == 200
    told = errors(mesh)[before:]
    assert any("while others wait" in error for error in told)
    until(lambda: sum(one.tunnels_in for one in node.stats()) <= idle + 1, "nothing of them is left", 30)


@pytest.mark.parametrize("port", [HBONE_PORT, 15006, 15001, HTTP])
def test_half_open_connections(mesh: Mesh, neighbour: LabPod, port: int) -> None:
    """They are the kernel's; nothing of ours grows, and others get in."""
    node = mesh.lab.nodes[2]
    until(lambda: sum(one.connections for one in node.stats()) == 0, "nothing is open", 30)
    before = sorted((one.pid, one.connections, one.tunnels_in) for one in node.stats())
    half_open(mesh.outside_client, mesh.server.ip4, port, HALF_OPEN)
    assert any(one.state in ("SYN_RECV", "NEW_SYN_RECV") for one in tcp_sockets(mesh.server)), (
        "they are there"
    )
    assert cookies(mesh.server) == 0, "the flood is larger than the backlog"
    assert sorted((one.pid, one.connections, one.tunnels_in) for one in node.stats()) == before
    served(mesh, neighbour)
    served(mesh, mesh.server)
    with peer(mesh) as client:
        assert client.connect(f"{mesh.server.ip4}:{HTTP}") == 200


@pytest.mark.parametrize("port", [15001, 15006])
def test_many_connections_to_a_capture_port(mesh: Mesh, neighbour: LabPod, port: int) -> None:
    before = len(errors(mesh))
    count = 500
    for _ in range(count):
        with contextlib.suppress(ConnectionError), mesh.outside_client.connect(mesh.server.ip4, port) as sock:
            sock.sendall(b"hello")
            assert sock.recv(1) == b""
    served(mesh, neighbour)
    until(lambda: len(errors(mesh)) >= before + count, "each is in the log", 30)


def test_more_connections_than_a_pod_may_have(mesh: Mesh, neighbour: LabPod) -> None:
    """The others wait in the kernel, and have their turn when some have ended."""
    node = mesh.lab.nodes[2]
    most = WORKERS * CONNECTIONS
    with contextlib.ExitStack() as stack:
        first = [
            stack.enter_context(mesh.outside_client.connect(mesh.server.ip4, HTTP, timeout=30))
            for _ in range(most + 200)
        ]
        until(lambda: sum(one.connections for one in node.stats()) >= most / 2, "many are served")
        assert sum(one.connections for one in node.stats()) <= most
        served(mesh, neighbour)
        for sock in first[:most]:
            sock.close()
        for sock in first[most:]:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        for sock in first[most:]:
            assert sock.recv(12) == b"HTTP/1.1 200"
    log = mesh.lab.nodes[2].log_path.read_text()
    assert "POD_CONNECTION_LIMIT" in log


# In a tunnel.

BIG = block([("x", "y" * 8000)])
REQUEST = block(CONNECT)


def numbered(*parts: str) -> Iterator[bytes]:
    """Frames of one stream after another."""
    for number in range(3, 2**31, 2):
        for part in parts:
            yield {
                "open": headers(number, CONNECT),
                "reset": rst(number),
                "more than fits": frame(1, END_HEADERS, number, REQUEST + 8 * BIG),
                "begun": frame(1, 0, number, REQUEST),
                "stranger": headers(number, [(":method", "CONNECT"), (":authority", "10.255.255.1:80")]),
            }[part]


def again(*frames: bytes) -> Iterator[bytes]:
    while True:
        yield from frames


def continuations() -> Iterator[bytes]:
    yield frame(1, 0, 3, REQUEST)
    while True:
        yield frame(9, 0, 3, BIG)


FLOODS = {
    "PING": lambda: again(ping()),
    "SETTINGS": lambda: again(settings((4, 65_535))),
    "SETTINGS ACK": lambda: again(SETTINGS_ACK),
    "empty DATA": lambda: again(data(1)),
    "rapid reset": lambda: numbered("open", "reset"),
    "100k streams": lambda: numbered("open"),
    "refused streams": lambda: numbered("stranger"),
    "headers that never end": continuations,
    "headers within headers": lambda: numbered("begun"),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_floods_of_frames(mesh: Mesh, neighbour: LabPod, flood: Callable[[], Iterator[bytes]]) -> None:
    """The connection ends soon, and with a word about why in the log where it carried a stream."""
    with peer(mesh) as client:
        assert client.connect(f"{mesh.server.ip4}:{HTTP}") == 200
        sent, gathered = 0, bytearray()
        with pytest.raises(Refused):
            for part in flood():
                gathered += part
                if len(gathered) > 16_000:
                    client.send(bytes(gathered))
                    sent += len(gathered)
                    gathered.clear()
                    assert sent < FLOOD, "it goes on and on"
    served(mesh, neighbour)


def test_requests_with_huge_headers(mesh: Mesh, neighbour: LabPod) -> None:
    """They are answered with an error, or end the connection; none of them is kept."""
    with peer(mesh) as client, contextlib.suppress(Refused):
        for number in range(1, 2001, 2):
            client.send(frame(1, END_HEADERS, number, REQUEST + 8 * BIG))
    with peer(mesh) as client:
        assert client.connect(f"{mesh.server.ip4}:{HTTP}") == 200


def test_slow_readers(mesh: Mesh, neighbour: LabPod) -> None:
    """Who opens streams and reads nothing makes the sender wait, not the proxy grow."""
    streams, sent = 100, 0
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(mesh.server.listen(0))
        listener.settimeout(30)
        client = stack.enter_context(peer(mesh))
        applications: list[socket.socket] = []
        for _ in range(streams):
            assert client.connect(f"{mesh.server.ip4}:{listener.getsockname()[1]}") == 200
            applications.append(stack.enter_context(listener.accept()[0]))
        for one in applications:
            one.setblocking(False)
        still = time.monotonic()
        while time.monotonic() - still < 1:  # until nothing moves for a second
            moved = 0
            for one in applications:
                with contextlib.suppress(BlockingIOError):
                    moved += one.send(bytes(65536))
            sent += moved
            if moved:
                still = time.monotonic()
            assert sent < 1 << 30, "it takes all there is"
            time.sleep(0.005)
        served(mesh, neighbour)
        buffered = sum(one.buffered for one in mesh.lab.nodes[2].stats())
        assert buffered < 2 * MIB
