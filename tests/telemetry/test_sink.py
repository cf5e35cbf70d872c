"""A log that nobody reads, that is full or closed: lines are dropped and counted, and nobody waits."""

import os
import socket

import pytest

from ztunnel.telemetry.log import Logger, parse_levels
from ztunnel.telemetry.sink import Sink

LINE = b"x" * 99 + b"\n"


def read_all(fd: int) -> bytes:
    os.set_blocking(fd, False)
    found = b""
    try:
        while data := os.read(fd, 1 << 20):
            found += data
    except BlockingIOError:
        pass
    return found


def test_a_full_pipe_makes_nobody_wait_and_takes_lines_again_once_it_is_read() -> None:
    read, write = os.pipe()
    sink = Sink(write)
    sink.never_wait()
    for _ in range(2000):
        sink.write(LINE)
    assert os.get_blocking(write)  # others who write to it wait, as before
    assert sink.dropped > 0
    kept = read_all(read)
    assert kept == LINE * (2000 - sink.dropped)
    dropped = sink.dropped
    sink.write(LINE)
    assert read_all(read) == LINE
    assert sink.dropped == dropped
    os.close(read)
    sink.write(LINE)
    assert sink.dropped == dropped + 1


def test_a_line_that_is_longer_than_a_pipe_takes_in_one_piece_is_not_torn() -> None:
    read, write = os.pipe()
    sink = Sink(write)
    sink.never_wait()
    sent = [f"{number}:".encode() + b"y" * 9000 + b"\n" for number in range(40)]
    for line in sent:
        sink.write(line)
    assert sink.dropped > 0
    found = read_all(read)
    sink.write(b"after\n")
    found += read_all(read)
    lines = found.splitlines(keepends=True)
    assert lines[-1] == b"after\n"
    assert set(lines[:-1]) <= set(sent)
    assert len(lines) - 1 + sink.dropped == len(sent)


def test_a_full_socket_makes_nobody_wait() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sink = Sink(ours.fileno())
        sink.never_wait()
        for _ in range(20_000):
            sink.write(LINE)
        assert sink.dropped > 0
        assert ours.getblocking()


def test_a_full_disk_is_no_error() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        sink = Sink(fd)
        sink.never_wait()
        sink.write(LINE * 3)
        assert sink.dropped == 3
    finally:
        os.close(fd)


def test_a_closed_descriptor_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    logger = Logger("info", fd=write)
    logger.never_wait()
    logger.error("x", "into nowhere")
    assert logger.dropped == 1


def test_scopes_have_levels_of_their_own() -> None:
    read, write = os.pipe()
    logger = Logger("info,access:off,xds:debug", fd=write)
    logger.line("error", "access", "connection complete", "")
    logger.debug("xds.client", "heard")
    logger.debug("worker", "unheard")
    logger.info("worker", "heard")
    assert [line.split()[2:] for line in read_all(read).decode().splitlines()] == [
        ["xds.client", "heard"],
        ["worker", "heard"],
    ]
    assert logger.levels == "info,access:off,xds:debug"
    logger.set_level("access:warn")
    assert logger.levels == "info,access:warn,xds:debug"
    assert logger.access_threshold == 30
    logger.set_level("warn")
    assert logger.levels == "warn"


@pytest.mark.parametrize("text", ["", "loud", "info,", ":info", "access:loud", "info;access:off"])
def test_levels_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"level|scope"):
        parse_levels(text)
