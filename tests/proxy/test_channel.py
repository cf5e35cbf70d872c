"""The socket between control process and worker: order, sizes, descriptors, and its end."""

import os
import socket
from collections.abc import Iterator

import pytest

from ztunnel.mesh.route import Endpoint, Route
from ztunnel.proxy import messages
from ztunnel.proxy.channel import LARGEST, READ, TURN, Channel, ChannelClosed

Pair = tuple["Channel[messages.FromWorker]", "Channel[messages.ToWorker]"]


@pytest.fixture
def ends() -> Iterator[Pair]:
    """(control process's, worker's)"""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    made = (
        Channel[messages.FromWorker](ours, messages.FromWorker),
        Channel[messages.ToWorker](theirs, messages.ToWorker),
    )
    yield made
    for end in made:
        end.close()


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_messages_arrive_in_order(ends: Pair) -> None:
    control, worker = ends
    for number in range(100):
        control.send(messages.AskStats(number))
    received = worker.receive()
    while not control.flush():
        received += worker.receive()
    received += worker.receive()
    assert [message for message, _ in received] == [messages.AskStats(n) for n in range(100)]
    worker.send(messages.PodIdle(7))
    assert control.receive() == [(messages.PodIdle(7), [])]
    assert control.receive() == []


def test_a_large_message_crosses_a_small_socket_buffer(ends: Pair) -> None:
    control, worker = ends
    endpoint = Endpoint("10.0.0.1", 80, True, "spiffe://cluster.local/ns/a/sa/b", "w", "a", "x" * 200)
    route = Route((endpoint,) * 40_000, "svc", "", ("t",))
    control.send(messages.RouteAnswer(1, route))
    control.send(messages.AskStats(2))
    assert control.queued > 10_000_000
    received = []
    while not control.flush():
        received += worker.receive()
    received += worker.receive()
    assert [message for message, _ in received] == [messages.RouteAnswer(1, route), messages.AskStats(2)]
    assert control.queued == 0
    assert not control.waiting


def test_descriptors_stay_with_their_message(ends: Pair) -> None:
    """Also where the message before them is still on its way, and where the sender closes his own at once."""
    control, worker = ends
    filler = Route((), "s" * 100_000, "", ())
    paths = []
    for number in range(5):
        control.send(messages.RouteAnswer(number, filler))
        read, write = os.pipe()
        paths.append(os.readlink(f"/proc/self/fd/{read}"))
        control.send(messages.AddPod(number, "u", "n", "ns", "id", (1, 2)), [read, write])
        os.close(read)
        os.close(write)
    received = []
    while not control.flush():
        received += worker.receive()
    received += worker.receive()
    assert len(received) == 10
    for number, (message, fds) in enumerate(received[1::2]):
        assert isinstance(message, messages.AddPod)
        assert message.pod == number
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in fds] == [paths[number]] * 2
        assert not any(os.get_inheritable(fd) for fd in fds)
        for fd in fds:
            os.close(fd)
    assert all(fds == [] for _, fds in received[::2])


def test_nothing_is_left_open_by_what_was_not_sent_or_not_taken() -> None:
    before = open_files()
    ours, theirs = socket.socketpair()
    control = Channel[messages.FromWorker](ours, messages.FromWorker)
    worker = Channel[messages.ToWorker](theirs, messages.ToWorker)
    filler = Route((), "s" * 1_000_000, "", ())
    with open(os.devnull) as null:
        control.send(messages.AddPod(1, "u", "n", "ns", "id", ()), [null.fileno()])
        control.send(messages.RouteAnswer(1, filler))
        control.send(messages.AddPod(2, "u", "n", "ns", "id", ()), [null.fileno()])
        with pytest.raises(OSError, match="Bad file descriptor"):
            control.send(messages.AddPod(3, "u", "n", "ns", "id", ()), [null.fileno(), 10_000])
    (message, fds), *_ = worker.receive()
    assert message == messages.AddPod(1, "u", "n", "ns", "id", ())
    for fd in fds:
        os.close(fd)
    control.close()
    worker.close()
    assert open_files() == before


def test_the_end_is_told_with_the_last_messages(ends: Pair) -> None:
    """An edge-triggered reader is not woken again for it."""
    control, worker = ends
    control.send(messages.AskStats(1))
    control.sock.close()
    assert [message for message, _ in worker.receive()] == [messages.AskStats(1)]
    assert worker.ended
    with pytest.raises(ChannelClosed, match="closed the channel"):
        worker.receive()


def test_sending_to_a_process_that_ended(ends: Pair) -> None:
    control, worker = ends
    worker.sock.close()
    with pytest.raises(ChannelClosed):
        control.send(messages.AskStats(1))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff\xff\xff\xff\x00", "beyond the limit"),
        (b"\x00\x00\x00\x03\x00abc", "does not decode"),
        (b"\x00\x00\x00\x01\x05\x90", "announces 5 descriptors"),
    ],
)
def test_broken_framing_ends_the_channel(ends: Pair, data: bytes, why: str) -> None:
    control, worker = ends
    control.sock.send(data)
    with pytest.raises(ChannelClosed, match=why):
        worker.receive()


def test_a_message_beyond_the_limit_is_not_sent(ends: Pair) -> None:
    control, _ = ends
    with pytest.raises(ValueError, match=str(LARGEST)):
        control.send(messages.UseCertificate("x", bytes(LARGEST)))
    assert not control.waiting


def test_a_flood_of_messages_is_received_in_turns(ends: Pair) -> None:
    control, worker = ends
    control.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 1024 * 1024)
    sent = [f"{number}" + "x" * 10_000 for number in range(200)]
    for tag in sent:
        control.send(messages.ForgetRoutes((tag,)))
    received: list[str] = []
    while len(received) < len(sent):
        got = [
            message.tags[0] for message, _ in worker.receive() if isinstance(message, messages.ForgetRoutes)
        ]
        assert sum(map(len, got)) <= TURN + READ
        received += got
        control.flush()
    assert received == sent
    assert worker.receive() == []
    assert not worker.more
