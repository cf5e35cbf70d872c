"""Everything at once for half a minute: connections of every kind, joining and leaving, and workers that are killed.
Afterwards nothing is left: no socket, no descriptor, no connection that was counted once only."""

import contextlib
import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.proxy.meshlab import MeshLab, Node, tcp_sockets
from ztunnel.embedded.testing import LabPod, until

pytestmark = [pytest.mark.e2e, pytest.mark.long]
SECONDS = 25.0
CLIENTS = 6


def reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Server:
    """Accepts on a port of a pod, and treats each connection as its client's first byte says."""

    def __init__(self, pod: LabPod) -> None:
        self.listener = pod.listen(0, socket.AF_INET6, backlog=512)
        self.listener.settimeout(0.1)
        self.port: int = self.listener.getsockname()[1]
        self.stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._main = threading.Thread(target=self._accept)
        self._main.start()

    def _accept(self) -> None:
        while not self.stop.is_set():
            try:
                sock, _ = self.listener.accept()
            except TimeoutError:
                continue
            sock.settimeout(10)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            match sock.recv(1):
                case b"e":  # echo to the end
                    while data := sock.recv(65536):
                        sock.sendall(data)
                case b"r":
                    reset(sock)
                case b"h":  # half-close at once, then read to the end
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(65536):
                        pass
                case b"b":  # much, then the end
                    sock.sendall(bytes(300_000))
                case b"s":  # stops reading for a moment
                    select.select([], [], [], 0.2)
                    while sock.recv(65536):
                        pass

    def close(self) -> None:
        self.stop.set()
        self._main.join()
        for thread in self._threads:
            thread.join(15)
        self.listener.close()


def echo(sock: socket.socket) -> None:
    data = os.urandom(random.randrange(1, 200_000))
    sock.sendall(b"e")

    def send() -> None:
        with contextlib.suppress(OSError):  # the receiving side tells of it
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = bytearray()
    try:
        while piece := sock.recv(65536):
            received += piece
    finally:
        sender.join()
    if received != data:
        raise ConnectionError("cut")


def abort(sock: socket.socket) -> None:
    sock.sendall(b"e" + bytes(random.randrange(100_000)))
    reset(sock)


def told(letter: bytes, size: int = 0) -> Callable[[socket.socket], None]:
    def run(sock: socket.socket) -> None:
        sock.sendall(letter + bytes(size))
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass

    return run


def leave_at_once(sock: socket.socket) -> None:
    sock.close()


KINDS: list[Callable[[socket.socket], None]] = [
    echo, echo, abort, told(b"r"), told(b"h", 10_000), told(b"b"), told(b"s", 400_000), leave_at_once,
]  # fmt: skip


class Churn:
    """Clients that open, use and end connections until told to stop."""

    def __init__(self, client: LabPod, server: LabPod, port: int) -> None:
        self.done = self.broken = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._arguments = (client, server, port)
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        client, server, port = self._arguments
        while not self._stop.is_set():
            kind = random.choice(KINDS)
            ok = True
            try:
                with client.connect(random.choice([server.ip4, server.ip6]), port) as sock:
                    kind(sock)
            except (OSError, TimeoutError):
                ok = False
            with self._lock:
                self.done += 1
                self.broken += not ok

    def go_on(self, more: int) -> None:
        """Wait until so many more connections were made and ended, one way or another."""
        goal = self.done + more
        until(lambda: self.done > goal, "connections are made and end", 30)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def kill_a_worker(node: Node, rng: random.Random) -> None:
    victim = rng.choice(node.workers.describe())["pid"]
    os.kill(victim, signal.SIGKILL)
    until(
        lambda: node.workers.alive == 2 and victim not in [one["pid"] for one in node.workers.describe()],
        "another takes its place",
    )


def released(node: Node) -> bool:
    return not node.workers._leaving


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[MeshLab]:
    with MeshLab(tmp_path, workers=2) as made:
        yield made


def settled(lab: MeshLab) -> bool:
    return not any(
        stats.connections or stats.buffered for node in lab.nodes.values() for stats in node.stats()
    )


def nothing_left(lab: MeshLab, pods: list[LabPod], port: int) -> None:
    def left() -> list[object]:
        return [
            one
            for pod in pods
            for one in tcp_sockets(pod)
            if port in (one.local_port, one.remote_port) and one.state not in ("TIME_WAIT", "LISTEN")
        ]

    until(lambda: not left(), "no socket of the connections is left", 20)
    until(lambda: settled(lab), "no worker knows of a connection", 20)
    for node in lab.nodes.values():
        assert node.errors() == []
        for stats in node.stats():
            assert stats.opened == stats.closed


def test_nothing_is_left_of_many_connections(lab: MeshLab) -> None:
    """Without faults from outside: descriptors are as many as before, and all that was begun ended."""
    client, server = lab.pod("client", 1), lab.pod("server", 2)
    lab.join(server)
    lab.join(client)
    service = Server(server)
    try:
        warm = Churn(client, server, service.port)
        until(lambda: warm.done > 20, "some connections are done", 30)
        warm.stop()
        nothing_left(lab, [client, server], service.port)
        workers = [one["pid"] for node in lab.nodes.values() for one in node.workers.describe()]
        tunnels = {
            stats.pid: stats.tunnels_out + stats.tunnels_in for n in lab.nodes.values() for stats in n.stats()
        }
        before = {pid: descriptors(pid) - tunnels[pid] for pid in workers}
        churn = Churn(client, server, service.port)
        end = time.monotonic() + SECONDS / 2
        until(lambda: time.monotonic() > end, "the time is over", SECONDS)
        churn.stop()
    finally:
        service.close()
    nothing_left(lab, [client, server], service.port)
    assert churn.done > 100
    tunnels = {
        stats.pid: stats.tunnels_out + stats.tunnels_in for n in lab.nodes.values() for stats in n.stats()
    }
    assert {pid: descriptors(pid) - tunnels[pid] for pid in workers} == before


def test_nothing_is_left_after_joining_leaving_and_killed_workers(lab: MeshLab) -> None:
    client, server = lab.pod("client", 1), lab.pod("server", 2)
    for pod in (client, server):
        lab.describe(pod, hbone=False)
        lab.join(pod)
    service = Server(server)
    churn = Churn(client, server, service.port)
    rng = random.Random(7)
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            churn.go_on(20)
            node = lab.nodes[rng.choice([1, 2])]
            match rng.randrange(3):
                case 0:
                    lab.leave(client)
                    churn.go_on(5)
                    lab.join(client)
                case 1:
                    lab.leave(server)
                    churn.go_on(5)
                    lab.join(server)
                case 2:
                    kill_a_worker(node, rng)
    finally:
        churn.stop()
        service.close()
    nothing_left(lab, [client, server], service.port)
    # What left is let go of: each worker holds the pods that are there, and nothing else.
    until(
        lambda: all(stats.pods == 1 for node in lab.nodes.values() for stats in node.stats()),
        "the pods that left are forgotten", 20,
    )  # fmt: skip
    for node in lab.nodes.values():
        until(partial(released, node), "the namespaces of pods that left are closed")
        for stats in node.stats():
            # Its channel, standard files, epoll and wake-up descriptors; a namespace and three listeners a pod.
            assert descriptors(stats.pid) - stats.tunnels_in - stats.tunnels_out <= 24
    assert churn.done > 100
