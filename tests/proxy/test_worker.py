"""A worker's reaction to its channel, without a process around it."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ztunnel.config import WorkerSettings
from ztunnel.mesh.route import Route
from ztunnel.proxy import messages
from ztunnel.proxy.channel import Channel
from ztunnel.proxy.worker import Worker
from ztunnel.telemetry.log import Logger


class Room:
    """The worker, the other end of its channel, and its log."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "log"
        self._log = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC)
        ours, theirs = socket.socketpair()
        self.control = Channel[messages.FromWorker](ours, messages.FromWorker)
        channel = Channel[messages.ToWorker](theirs, messages.ToWorker)
        self.worker = Worker(
            channel, Logger("debug", json=True, fd=self._log), WorkerSettings.from_environment({})
        )

    def turn(self) -> None:
        while self.worker.context.reactor.turn():
            pass

    def close(self) -> None:
        self.control.close()
        self.worker.channel.close()
        self.worker.context.reactor.close()
        os.close(self._log)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    made = Room(tmp_path)
    made.turn()
    yield made
    made.close()


def test_a_control_process_that_ends_right_after_a_message_is_missed_at_once(room: Room) -> None:
    """Message and end are one edge: there is no other that would tell."""
    room.control.send(messages.SetLevel("warn"))
    room.control.close()
    room.turn()
    assert room.worker.context.logger.level == "warn"
    assert "the control process is gone" in room.log.read_text()


def test_what_one_message_breaks_does_not_cost_the_next(room: Room) -> None:
    room.control.send(messages.SetLevel("no level"))
    room.control.send(messages.AskStats(7))
    room.turn()
    ((answer, _),) = room.control.receive()
    assert isinstance(answer, messages.Stats)
    assert answer.query == 7
    assert "no level" in room.log.read_text()


def test_an_answer_to_nobodys_question_is_ignored(room: Room) -> None:
    room.control.send(messages.RouteAnswer(99, Route((), "", "x", ())))
    room.control.send(messages.ForgetRoutes())
    room.control.send(messages.DropPod(99))
    room.turn()
    assert room.control.receive() == []
    room.control.send(messages.DeletePod(99))
    room.turn()
    assert room.control.receive() == [(messages.PodLeft(99), []), (messages.PodIdle(99), [])]
    assert "internal error" not in room.log.read_text()


def test_an_unusable_certificate_is_told_and_leaves_none(room: Room) -> None:
    identity = "spiffe://cluster.local/ns/a/sa/b"
    room.control.send(messages.UseCertificate(identity, b"nonsense"))
    room.turn()
    assert "unusable certificate" in room.log.read_text()
    assert room.worker.context.identity(identity).client is None


def test_a_pod_that_comes_while_it_drains_is_not_taken_and_nothing_stays_open(room: Room) -> None:
    room.worker.drain(10)
    before = len(os.listdir("/proc/self/fd"))
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    room.control.send(
        messages.AddPod(1, "u", "web", "default", "spiffe://cluster.local/ns/a/sa/b", (1, 2, 3)),
        [namespace, *(one.fileno() for one in listeners)],
    )
    os.close(namespace)
    for one in listeners:
        one.close()
    room.turn()
    assert room.control.receive() == [(messages.PodAdded(1, "the proxy is shutting down"), [])]
    assert len(os.listdir("/proc/self/fd")) == before
