"""Bulk data through a splice: every byte and each end arrives, whether it is copied or goes through a pipe."""

import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy.ends import LIMIT, Bench
from ztunnel.proxy import pipes
from ztunnel.proxy.buffers import MIB
from ztunnel.proxy.errors import BuffersFull, ProxyError
from ztunnel.proxy.pipes import Pipe, Pipes
from ztunnel.proxy.relay import OVER
from ztunnel.proxy.splice import Splice, SpliceOwner

DATA = random.Random(7).randbytes(24 * MIB)


class Joined(SpliceOwner):
    """A splice with programs' sockets at both ends; remembers how it ended, and the most that waited in pipes."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        ours, self.client = bench.tcp_pair()
        upstream, self.server = bench.tcp_pair()
        self.ends: list[ProxyError | None] = []
        record = bench.context.record("outbound", "app")
        self.splice = Splice(bench.context, ours, upstream, record, self)
        bench.settle()

    def splice_connected(self, splice: Splice) -> None:
        pass

    def splice_over(self, splice: Splice, error: ProxyError | None) -> None:
        self.ends.append(error)

    def send(self, sock: socket.socket, data: bytes) -> threading.Thread:
        """Send all of it and the end, from a thread."""

        def run() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sock.setblocking(True)
        sock.settimeout(LIMIT)
        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Joined]:
    with Bench(tmp_path) as bench:
        made = Joined(bench)
        yield made
        made.splice.finish(None)
        assert bench.context.pipes.lent == 0
        assert bench.context.buffers.held == 0
        assert bench.defects() == []


def through(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what pipes take from now on."""
    sizes: list[int] = []
    fill = Pipe.fill

    def counted(pipe: Pipe, source: int) -> int:
        sizes.append(fill(pipe, source))
        return sizes[-1]

    monkeypatch.setattr(Pipe, "fill", counted)
    return sizes


def test_bulk_goes_through_pipes_and_arrives_as_it_was_sent(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = through(joined, monkeypatch)
    for source, sink in ((joined.client, joined.server), (joined.server, joined.client)):
        sender = joined.send(source, DATA)
        assert joined.bench.read_all(sink) == DATA
        sender.join(LIMIT)
    joined.bench.until(lambda: joined.splice.state == OVER)
    assert joined.ends == [None]
    assert sum(sizes) > len(DATA)  # of two times as much; what came little by little was copied


def test_both_directions_at_once(joined: Joined) -> None:
    other = DATA[::-1]
    senders = [joined.send(joined.client, DATA), joined.send(joined.server, other)]
    found = {joined.client: bytearray(), joined.server: bytearray()}

    def read() -> bool:
        for sock, data in found.items():
            try:
                data += os.read(sock.fileno(), MIB)  # non-blocking, as all with a time limit are
            except BlockingIOError:
                continue
        return joined.splice.state == OVER

    joined.bench.until(read)
    for sender in senders:
        sender.join(LIMIT)
    for sock, data in found.items():
        while piece := sock.recv(MIB):
            data += piece
    assert found[joined.client] == other
    assert found[joined.server] == DATA
    assert joined.ends == [None]


def test_a_reader_that_stops_holds_one_pipe_that_is_counted_and_goes_on_later(joined: Joined) -> None:
    sender = joined.send(joined.client, DATA)
    joined.bench.until(lambda: joined.bench.context.pipes.lent == 1 and joined.splice.buffered)
    joined.bench.settle()
    assert 0 < joined.splice.buffered <= pipes.SIZE
    assert joined.bench.context.buffers.held == joined.splice.buffered
    assert joined.bench.read_all(joined.server) == DATA
    sender.join(LIMIT)


def test_when_too_much_waits_the_connection_is_reset_and_its_pipe_closed(joined: Joined) -> None:
    files = len(os.listdir("/proc/self/fd"))
    joined.bench.context.buffers.limit = 1
    joined.client.setblocking(False)

    def flood() -> bool:
        try:
            joined.client.send(DATA)
        except (BlockingIOError, ConnectionError):
            pass
        return bool(joined.ends)

    joined.bench.until(flood)
    assert isinstance(joined.ends[0], BuffersFull)
    assert len(os.listdir("/proc/self/fd")) <= files - 2 + 2 * pipes.FREE  # two sockets less
    with pytest.raises(ConnectionResetError):
        joined.bench.read_all(joined.server)


def test_a_reset_amid_bulk_is_passed_on(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = through(joined, monkeypatch)
    joined.client.setblocking(False)

    def flood() -> bool:
        try:
            joined.client.send(DATA)
        except BlockingIOError:
            pass
        return bool(sizes)

    joined.bench.until(flood)
    joined.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    joined.server.close()
    joined.bench.until(lambda: joined.ends)
    assert joined.ends[0] is not None
    with pytest.raises(ConnectionError):
        joined.client.send(b"more")
        joined.bench.read_all(joined.client)


@pytest.mark.parametrize("without", ["pipes", "descriptors"])
def test_without_pipes_bytes_are_copied(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    sizes = through(joined, monkeypatch)
    if without == "pipes":
        monkeypatch.setattr(pipes, "MOST", 0)
    else:

        def none(flags: int) -> tuple[int, int]:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(os, "pipe2", none)
    sender = joined.send(joined.client, DATA)
    assert joined.bench.read_all(joined.server) == DATA
    sender.join(LIMIT)
    assert sizes == []


def test_pipes_are_lent_within_bounds_and_used_again() -> None:
    lender = Pipes()
    found = [lender.take() for _ in range(pipes.MOST)]
    taken = [pipe for pipe in found if pipe is not None]
    assert len(taken) == pipes.MOST == lender.lent
    assert lender.take() is None
    first, second, *others = taken
    first.held = 1  # bytes that nobody took: the kernel has them, nobody else may get them
    lender.give(first)
    lender.give(second)
    for fd in (first.reader, first.writer):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert lender.take() is second
    for pipe in (second, *others):
        lender.give(pipe)
    assert lender.lent == 0
    for _ in range(pipes.FREE):
        kept = lender.take()
        assert kept in taken
        if kept is not None:
            kept.close()
