"""Tunnels with application sockets at both ends: what is carried, how it ends, and what is never lost."""

import os
import socket
import struct
import threading

import pytest

from tests.proxy.ends import CLOSED, OPEN, Bench, End
from ztunnel.proxy.errors import BuffersFull, H2Failed, PeerClosed, Reset
from ztunnel.proxy.reactor import IN, RDHUP
from ztunnel.proxy.relay import AppStream
from ztunnel.proxy.tunnel import CLOSING

MIB = 1 << 20


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def both(bench: Bench, **buffers: int) -> tuple[End, End, socket.socket, socket.socket]:
    """Two tunnels and one stream: (client tunnel, server tunnel, client application, server application)."""
    client, server = bench.tunnels(**buffers)
    app = client.connect()
    bench.until(lambda: client.owners[0].statuses == [200])
    return client, server, app, server.apps[0]


def take(bench: Bench, sock: socket.socket, size: int) -> bytes:
    """Turn until so many bytes have come."""
    sock.setblocking(False)
    received = bytearray()

    def all_there() -> bool:
        try:
            received.extend(sock.recv(size - len(received)))
        except BlockingIOError:
            return False
        return len(received) == size

    bench.until(all_there)
    return bytes(received)


def test_bytes_and_half_closes_cross(bench: Bench) -> None:
    client, server, app, other = both(bench)
    app.sendall(b"ping")
    app.shutdown(socket.SHUT_WR)
    assert bench.read_all(other) == b"ping"
    other.setblocking(True)
    other.sendall(b"pong")
    assert client.owners[0].ends == []
    other.shutdown(socket.SHUT_WR)
    assert bench.read_all(app) == b"pong"
    bench.until(lambda: client.owners[0].ends == server.owners[0].ends == [None])
    assert not client.streams
    assert not server.streams
    assert client.state == OPEN
    totals = bench.context.totals
    assert (totals.opened, totals.closed, totals.failed) == (2, 2, 0)


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_reset_crosses_as_one(bench: Bench, role: str) -> None:
    client, server, app, other = both(bench)
    acting, watching = (app, other) if role == "client" else (other, app)
    reset(acting)
    bench.until(lambda: client.owners[0].ends and server.owners[0].ends)
    with pytest.raises(ConnectionResetError):
        watching.recv(1)
    assert all(isinstance(end, Reset) for tunnel in (client, server) for end in tunnel.owners[0].ends)
    assert client.state == server.state == OPEN


def test_a_tunnel_that_goes_away_takes_no_bytes_with_it(bench: Bench) -> None:
    """The last stream ends while most of it waits in the tunnel: the close must not overtake it."""
    client, server, app, other = both(bench, SO_SNDBUF=16 * 1024, SO_RCVBUF=16 * 1024)
    app.shutdown(socket.SHUT_WR)
    assert bench.read_all(other) == b""
    server.go()
    data = os.urandom(600_000)
    other.setblocking(True)
    other.sendall(data)
    other.close()
    assert bench.read_all(app) == data
    bench.until(lambda: client.owners[0].ends == server.owners[0].ends == [None])
    bench.until(lambda: client.state == server.state == CLOSED)
    assert client.ended_with == server.ended_with == [None]


def test_a_peer_that_still_talks_does_not_cost_the_last_bytes(bench: Bench) -> None:
    """Closing a socket with unread bytes in it is a reset, which would take what the peer has not read yet."""
    client, server = bench.tunnels()
    bench.reactor.forget(client.fd)  # it reads later
    client.h2.ping(b"01234567")
    client.flush()  # comes unread to the server's end
    server.sock.setblocking(False)
    server.h2.ping(b"lastword")
    server.close()
    bench.settle()
    client.read()
    assert client.state == CLOSED
    assert client.ended_with == [None]  # an orderly end; a reset would have been an OSError


def test_a_tunnel_whose_peer_never_ends_is_closed_after_a_while(bench: Bench) -> None:
    client, server = bench.tunnels()
    bench.reactor.forget(server.fd)  # it does not react any more
    client.close()
    bench.settle()
    assert client.state == CLOSING
    bench.context.closing.sweep(bench.reactor.now + 60)
    assert client.state == CLOSED
    assert client.ended_with == [None]


def test_the_end_of_a_connection_behind_much_data_is_noticed(bench: Bench) -> None:
    """More than one turn's worth of bytes, and the FIN: the edge that told of it does not come again."""
    client, server = bench.tunnels(SO_SNDBUF=4 * MIB, SO_RCVBUF=4 * MIB)
    for _ in range(6):
        client.connect()
    bench.until(lambda: all(owner.statuses for owner in client.owners))
    bench.reactor.forget(server.fd)  # the server is busy elsewhere while all of this arrives
    for stream_id in client.streams:
        client.h2.send_data(stream_id, bytes(250_000))
    client.flush()
    assert not client.blocked
    client.sock.shutdown(socket.SHUT_WR)
    bench.settle()
    server.on_event(IN | RDHUP)
    bench.until(lambda: server.state == CLOSED)
    assert isinstance(server.ended_with[0], PeerClosed)


def test_a_stream_that_waits_for_window_goes_on_when_it_comes(bench: Bench) -> None:
    _, server, app, other = both(bench)
    other.setblocking(False)
    sent = 0

    def stalled() -> bool:
        nonlocal sent
        try:
            sent += other.send(bytes(65536))
        except BlockingIOError:
            bench.settle()
            return bool(server.starved)
        return False

    bench.until(stalled)
    assert server.buffered == 0
    assert not server.blocked
    other.shutdown(socket.SHUT_WR)
    assert len(bench.read_all(app)) == sent


def test_garbage_ends_the_tunnel_and_resets_its_streams(bench: Bench) -> None:
    client, server, app, _ = both(bench)
    client.engine.write(b"\xff" * 64)
    client.flush()
    bench.until(lambda: server.state == client.state == CLOSED)
    assert isinstance(server.ended_with[0], H2Failed)
    with pytest.raises(ConnectionResetError):
        app.recv(1)


def test_a_stream_ends_once_however_often_it_is_told(bench: Bench) -> None:
    client, _, _, _ = both(bench)
    stream = next(iter(client.streams.values()))
    assert isinstance(stream, AppStream)
    stream.abort(Reset("once"))
    stream.abort(Reset("twice"))
    client.fail(None)
    stream.peer_end()
    stream.peer_response(200)
    assert len(client.owners[0].ends) == 1
    assert stream.record.totals.opened == 2
    bench.until(lambda: stream.record.totals.closed == 2)


def test_over_the_limit_the_connection_that_holds_the_most_is_reset(bench: Bench) -> None:
    """What waits for all slow readers is bounded; who keeps up, or holds less, does not pay for it."""
    client, server, app, _ = both(bench, SO_SNDBUF=16 * 1024, SO_RCVBUF=16 * 1024)
    bench.context.buffers.limit = 300 * 1024  # more than one window, less than two
    stalled, lively = [app], client.connect()
    stalled.append(client.connect())
    bench.until(lambda: all(owner.statuses == [200] for owner in client.owners))
    for sock in stalled:
        sock.setblocking(False)

    def all_sent() -> bool:
        for sock in stalled:
            try:
                sock.send(bytes(16384))
            except (BlockingIOError, ConnectionResetError, BrokenPipeError):
                continue
        return bool(server.owners[0].ends or server.owners[2].ends)

    bench.until(all_sent)
    ends = [end for owner in server.owners for end in owner.ends]
    assert [type(end) for end in ends] == [BuffersFull]
    assert "its limit (BUFFER_LIMIT)" in str(ends[0])
    # What waited for the other may be in its socket by now: the kernel gave it more room meanwhile.
    assert bench.context.buffers.held <= bench.context.buffers.limit
    lively.sendall(b"hello")
    assert take(bench, server.apps[1], 5) == b"hello"
    client.fail(None)
    bench.settle()
    assert (bench.context.buffers.held, len(bench.context.buffers)) == (0, 0)
    assert bench.context.allowance.granted == 0


def test_what_bulk_made_grow_is_given_back(bench: Bench) -> None:
    """The buffers of a tunnel are made anew some seconds after bulk; what comes next is none the worse."""
    client, server, app, other = both(bench)
    data = os.urandom(3 * MIB)
    for _ in range(2):
        sender = threading.Thread(target=app.sendall, args=(data,))
        sender.start()
        assert take(bench, other, len(data)) == data
        sender.join()
        assert [end.grown for end in (client, server)] == [True, True]
        bench.settle()
        bench.context.grown.sweep(bench.reactor.now + 60)
        assert [end.grown for end in (client, server)] == [False, False]
    app.sendall(b"ping")
    assert take(bench, other, 4) == b"ping"


def test_a_stalled_tunnel_reads_no_application(bench: Bench) -> None:
    """What one side does not take is not piled up on the other."""
    client, server, app, _ = both(bench, SO_SNDBUF=16 * 1024, SO_RCVBUF=16 * 1024)
    bench.reactor.forget(server.fd)
    app.setblocking(False)

    def stalled() -> bool:
        try:
            app.send(bytes(65536))
        except BlockingIOError:
            bench.settle()
            return client.blocked
        return False

    bench.until(stalled)
    bench.settle()
    assert client.buffered <= MIB
    assert len(client.waiting) == 1
