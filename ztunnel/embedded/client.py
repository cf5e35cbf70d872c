"""A running mesh, asked through its control socket: blocking calls, for the command line and for tests."""

import array
import contextlib
import json
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from ztunnel.store.problems import Problem

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PASSED_ON = ("TERM", "COLUMNS", "LINES", "LANG", "LC_ALL")


class MeshNotRunning(Exception):
    """No mesh answers on the state directory."""


class MeshRequestError(OSError):
    """The mesh could not do what it was asked; the message is its own."""


class MeshClient:
    """One mesh. Each call is a connection of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state

    @classmethod
    def connect(cls, state: Path) -> Self:
        """The mesh that runs on `state`. Raises MeshNotRunning, PermissionError (another user's)."""
        client = cls(state)
        client._open().close()
        return client

    def status(self) -> dict[str, Any]:
        """Processes, pods and problems of now; `problems` are Problem objects."""
        with self._open() as channel:
            _send(channel, {"do": "status"})
            status: dict[str, Any] = _answer(channel)["status"]
        status["problems"] = msgspec.convert(status["problems"], list[Problem])
        return status

    def exec(
        self,
        namespace: str,
        pod: str,
        argv: Sequence[str],
        container: str | None = None,
        *,
        streams: Sequence[int] = (0, 1, 2),
    ) -> int:
        """Run a program in a pod, with this process's streams, and return its exit code (128 + N for a signal N).

        The program has the container's environment. 127 and 126, after a message on the third of `streams`, where
        it cannot be found or executed. SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on to it. Raises
        MeshRequestError where the pod does not run.
        """
        return self._run(
            {"do": "exec", "namespace": namespace, "pod": pod, "container": container, "argv": list(argv)},
            streams,
        )

    def exec_on_node(self, node: str, argv: Sequence[str], *, streams: Sequence[int] = (0, 1, 2)) -> int:
        """Run a program in a node's network namespace ("fabric": the link between them), with every capability."""
        return self._run({"do": "node-exec", "node": node, "argv": list(argv)}, streams)

    def upgrade(self, node: str) -> dict[str, Any]:
        """Replace a node's ztunnel by a new process; returns when that is in place and the old one drains.

        The pids `old` and `new`, and the `seconds` it took. Raises MeshRequestError: the old one serves on then.
        """
        with self._open() as channel:
            _send(channel, {"do": "upgrade", "node": node})
            upgraded: dict[str, Any] = _answer(channel)["upgraded"]
        return upgraded

    def down(self) -> None:
        """Stop the mesh, and return when all that it made has been removed."""
        with self._open() as channel:
            _send(channel, {"do": "down"})
            _answer(channel)
            with contextlib.suppress(ConnectionResetError):
                while channel.recv(4096):
                    pass

    def _open(self) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            channel.connect(str(self.state / "ambient.sock"))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            channel.close()
            raise MeshNotRunning(
                f"no mesh is running on {self.state}; start one with `ambient up DIR`"
            ) from error
        except BaseException:
            channel.close()
            raise
        return channel

    def _run(self, request: dict[str, Any], streams: Sequence[int]) -> int:
        request["env"] = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        with self._open() as channel, _forwarding_signals(channel) as signals:
            _send(channel, request, streams)
            signals.begin()
            answers = _lines(channel, signals.wake)
            for answer in answers:
                if "exit" in answer:
                    return int(answer["exit"])
                if "error" in answer and answer["code"] in (126, 127):
                    os.write(streams[2], f"ambient: {answer['error']}\n".encode())
                    return int(answer["code"])
                if "error" in answer:
                    raise MeshRequestError(answer["error"])
        raise MeshRequestError("the mesh ended while the program ran")


class _Signals:
    """Passes signals on to the program, from the moment on at which the mesh knows of it.

    A handler in Python runs between two instructions: a signal that comes just before a system call that waits would
    be heard of only when that returns. `wake` is readable then.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._early: list[int] | None = []
        self.wake, self._wakes = socket.socketpair()
        self.wake.setblocking(False)
        self._wakes.setblocking(False)

    def install(self) -> Callable[[], None]:
        """Take over the signals; returns what gives them back."""
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        fd = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)

        def restore() -> None:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)

        return restore

    def begin(self) -> None:
        """The request was sent: what came meanwhile may follow it."""
        early, self._early = self._early, None
        for number in early or ():
            self._forward(number, None)

    def _forward(self, number: int, _frame: object) -> None:
        if self._early is not None:
            self._early.append(number)
            return
        with contextlib.suppress(OSError):
            _send(self._channel, {"signal": number})

    def close(self) -> None:
        """End."""
        self.wake.close()
        self._wakes.close()


@contextlib.contextmanager
def _forwarding_signals(channel: socket.socket) -> Iterator[_Signals]:
    """Pass the signals that would end this process on to the program; only the main thread can."""
    signals = _Signals(channel)
    try:
        if threading.current_thread() is not threading.main_thread():
            yield signals
            return
        restore = signals.install()
        try:
            yield signals
        finally:
            restore()
    finally:
        signals.close()


def _send(channel: socket.socket, request: dict[str, Any], fds: Sequence[int] = ()) -> None:
    data = json.dumps(request).encode() + b"\n"
    if fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        data = data[channel.sendmsg([data], rights) :]
    if data:  # to send nothing is an error where the answer has come and the mesh has closed
        channel.sendall(data)


def _lines(channel: socket.socket, wake: socket.socket | None = None) -> Iterator[dict[str, Any]]:
    """The answers. With `wake`, which becomes readable at a signal, its handler runs although nothing comes."""
    buffer = b""
    while True:
        line, newline, rest = buffer.partition(b"\n")
        if newline:
            buffer = rest
            yield json.loads(line)
            continue
        if wake is not None:
            while channel not in select.select([channel, wake], [], [])[0]:
                with contextlib.suppress(BlockingIOError):
                    wake.recv(4096)
        data = channel.recv(65536)
        if not data:
            return
        buffer += data


def _answer(channel: socket.socket) -> dict[str, Any]:
    answer = next(_lines(channel), None)
    if answer is None:
        raise MeshRequestError("the mesh ended without an answer")
    if "error" in answer:
        raise MeshRequestError(answer["error"])
    return answer
