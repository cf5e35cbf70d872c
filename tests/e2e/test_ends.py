"""How connections end: each end's FIN and RST cross at once and as what they are, and nothing is left behind."""

import select
import socket
import struct
import time

import pytest

from tests.e2e.conftest import HTTP_BRIEF, PATHS, Mesh, address
from tests.proxy.meshlab import tcp_sockets
from ztunnel.embedded.testing import LabPod, until

pytestmark = pytest.mark.e2e

on_each_path = pytest.mark.parametrize("path", PATHS)
on_each_family = pytest.mark.parametrize("family", [4, 6])
AT_ONCE = 1.0  # seconds within which an end must cross; a tenth of it is usual


class Pair:
    """A connection between two pods, with both programs' sockets at hand."""

    def __init__(self, client: LabPod, server: LabPod, family: int) -> None:
        kind = socket.AF_INET6 if family == 6 else socket.AF_INET
        with server.listen(0, kind) as listener:
            listener.settimeout(10)
            self.port = listener.getsockname()[1]
            self.client = client.connect(address(server, family), self.port)
            self.server, _ = listener.accept()
        self.server.settimeout(10)

    def __enter__(self) -> "Pair":
        # Bytes both ways, so that the whole path is known to stand.
        self.client.sendall(b"ping")
        assert self.server.recv(4) == b"ping"
        self.server.sendall(b"pong")
        assert self.client.recv(4) == b"pong"
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()

    def ends(self, role: str) -> tuple[socket.socket, socket.socket]:
        """(the one that acts, the other)."""
        return (self.client, self.server) if role == "client" else (self.server, self.client)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def wait_readable(sock: socket.socket) -> None:
    readable, _, _ = select.select([sock], [], [], AT_ONCE)
    assert readable, f"nothing crossed within {AT_ONCE} s"


@on_each_path
@on_each_family
@pytest.mark.parametrize("role", ["client", "server"])
def test_a_reset_arrives_as_a_reset(mesh: Mesh, path: str, family: int, role: str) -> None:
    with Pair(*mesh.path(path), family) as pair:
        acting, other = pair.ends(role)
        reset(acting)
        wait_readable(other)
        with pytest.raises(ConnectionResetError):
            other.recv(1)


@on_each_path
@on_each_family
@pytest.mark.parametrize("role", ["client", "server"])
def test_a_half_close_arrives_as_one(mesh: Mesh, path: str, family: int, role: str) -> None:
    with Pair(*mesh.path(path), family) as pair:
        acting, other = pair.ends(role)
        acting.shutdown(socket.SHUT_WR)
        wait_readable(other)
        assert other.recv(1) == b""
        # The other direction is open as long as its own end wants.
        for _ in range(3):
            other.sendall(b"x" * 100_000)
            received = 0
            while received < 100_000:
                received += len(acting.recv(100_000))
        other.shutdown(socket.SHUT_WR)
        wait_readable(acting)
        assert acting.recv(1) == b""


@on_each_path
def test_data_after_the_servers_close_is_answered_by_a_reset(mesh: Mesh, path: str) -> None:
    """A server that closed for good refuses what comes later; the client must learn of it."""
    with Pair(*mesh.path(path), 4) as pair:
        pair.server.close()
        wait_readable(pair.client)
        assert pair.client.recv(1) == b""
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(50):
                pair.client.sendall(b"more")
                time.sleep(0.02)  # paces the writes; the reset may take any of them


@on_each_path
def test_an_idle_close_reaches_a_keep_alive_client_before_its_next_request(mesh: Mesh, path: str) -> None:
    client, server = mesh.path(path)
    with client.connect(server.ip4, HTTP_BRIEF) as connection:
        for _ in range(2):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        # nginx closes after a second of silence. The client sees it without asking again.
        readable, _, _ = select.select([connection], [], [], 1 + AT_ONCE)
        assert readable
        assert connection.recv(1) == b""


@on_each_path
def test_a_refused_connection_is_reset(mesh: Mesh, path: str) -> None:
    client, server = mesh.path(path)
    with pytest.raises(ConnectionError), client.connect(server.ip4, 9) as connection:  # nothing listens there
        assert connection.recv(1) == b""
        raise AssertionError("the connection ended in order, as if somebody had been there")


@pytest.mark.parametrize("path", ["mesh-to-mesh", "outside-to-mesh"])
def test_a_server_that_is_slow_to_accept_is_waited_for(mesh: Mesh, path: str) -> None:
    """One connection fits into its backlog; the kernel answers the others' SYN only when they repeat it."""
    client, server = mesh.path(path)
    with server.listen(0, backlog=0) as listener:
        listener.settimeout(10)
        port = listener.getsockname()[1]
        clients = [client.connect(server.ip4, port) for _ in range(4)]
        try:
            for number, one in enumerate(clients):
                one.sendall(b"%d" % number)
            heard = set()
            for _ in clients:
                accepted, _ = listener.accept()
                with accepted:
                    accepted.settimeout(10)
                    heard.add(accepted.recv(1))
                    accepted.sendall(b"ok")
            assert heard == {b"0", b"1", b"2", b"3"}
            for one in clients:
                assert one.recv(2) == b"ok"
        finally:
            for one in clients:
                one.close()


@on_each_path
@on_each_family
@pytest.mark.parametrize("role", ["client", "server"])
def test_no_socket_is_left_once_both_ends_are_gone(mesh: Mesh, path: str, family: int, role: str) -> None:
    client, server = mesh.path(path)
    pairs = [Pair(client, server, family).__enter__() for _ in range(20)]
    ports = {pair.port for pair in pairs}
    for number, pair in enumerate(pairs):
        first, second = pair.ends(role)
        if number % 2:
            first.close()
        else:
            first.shutdown(socket.SHUT_WR)
        second.close()
        first.close()

    def left() -> list[object]:
        return [
            one
            for pod in (client, server)
            for one in tcp_sockets(pod)
            if ports & {one.local_port, one.remote_port} and one.state != "TIME_WAIT"
        ]

    until(lambda: not left(), "no socket of these connections is left")


SEND_FOR_EVER = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
while True:
    connection.send(b"x" * 65536)
"""


@on_each_path
def test_a_program_killed_in_mid_transfer_resets_the_other_end(mesh: Mesh, path: str, python: str) -> None:
    client, server = mesh.path(path)
    with server.listen(0) as listener:
        listener.settimeout(10)
        port = listener.getsockname()[1]
        program = client.start([python, "-c", SEND_FOR_EVER, server.ip4, str(port)])
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(10)
        assert connection.recv(1)
        program.kill()
        program.wait()
        with pytest.raises(ConnectionResetError):
            # A kill with unread or unsent data is a reset or a FIN by the kernel's choice; both must end the stream.
            while connection.recv(1 << 20):
                pass
            raise ConnectionResetError


@on_each_path
def test_the_proxies_probe_silent_peers_on_both_sides(mesh: Mesh, path: str) -> None:
    """Every socket of ours has keepalive on, so that an end which vanished without a word is noticed."""
    client, server = mesh.path(path)
    with Pair(client, server, 4) as pair:
        here = pair.client.getsockname()[1]
        of_this_path = {here, pair.port, 15001, 15006, 15008}

        def all_probed() -> bool:
            ours = [
                one
                for pod in (client, server)
                for one in tcp_sockets(pod)
                if one.state == "ESTABLISHED"
                and {one.local_port, one.remote_port} & of_this_path
                # The two programs' own sockets did not ask for keepalive.
                and (one.local_port, one.remote_port) != (here, pair.port)
                and one.local_port != pair.port
            ]
            return len(ours) >= 2 and all(one.keepalive for one in ours)

        # While an acknowledgement is due, the kernel shows the timer of the retransmission instead.
        until(all_probed, "keepalive runs on every socket of the proxies")


def test_a_stalled_reader_holds_no_more_than_its_window(mesh: Mesh) -> None:
    """What one reader leaves unread is bounded, and does not stop another connection of the same tunnel."""
    with Pair(mesh.client, mesh.server, 4) as stalled, Pair(mesh.client, mesh.server, 4) as lively:
        stalled.client.settimeout(1)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 256 << 20:
                sent += stalled.client.send(b"x" * (1 << 20))
        before = time.monotonic()
        lively.client.sendall(b"hello")
        assert lively.server.recv(5) == b"hello"
        assert time.monotonic() - before < AT_ONCE
        # The window is 1 MiB; kernel buffers of four sockets come on top, outside the proxies.
        for node in mesh.lab.nodes.values():
            assert sum(stats.buffered for stats in node.stats()) <= 2 << 20
        received = 0
        stalled.server.settimeout(10)
        while received < sent:
            received += len(stalled.server.recv(1 << 20))
        assert received == sent
