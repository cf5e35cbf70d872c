"""The supervisor's control socket: a line of JSON asks, lines of JSON answer; a program's streams come as descriptors.

    {"do": "status"}                          -> {"status": {...}}
    {"do": "down"}                            -> {"ending": true}, and the end of the stream when all is removed
    {"do": "upgrade", "node"}                 -> {"upgraded": {...}} once the node's new ztunnel is in place
    {"do": "exec", "namespace", "pod",        -> {"pid": N}, then {"exit": CODE}
     "container", "argv", "env"}              meanwhile {"signal": N} is passed on to the program
    {"do": "node-exec", "node", "argv", "env"}   the same in a node's namespace
    anything that fails                       -> {"error": "...", "code": N}

With the two execs come three descriptors (SCM_RIGHTS). A program whose client goes away is ended. The socket's mode
(0600, in a directory of mode 0700) says who may ask.
"""

import array
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from ztunnel.embedded.programs import ended

log = logging.getLogger(__name__)

LARGEST_REQUEST = 1 << 20
HANGUP_PATIENCE = 1.0  # seconds between SIGHUP and SIGKILL for a program whose client has gone
NOT_FOUND, NOT_EXECUTABLE = 127, 126

Start = Callable[[Mapping[str, Any], list[int]], Awaitable[subprocess.Popen[bytes]]]


class RequestError(Exception):
    """A request that cannot be met; the message is for the person who asked."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def start_failure(argv: list[str], error: OSError) -> RequestError:
    """Why a program could not be started, with the exit code that shells give it."""
    if isinstance(error, FileNotFoundError):
        return RequestError(f"{argv[0]}: not found in PATH", NOT_FOUND)
    return RequestError(f"{argv[0]}: {error.strerror or error}", NOT_EXECUTABLE)


class ControlSocket:
    """Listens at `path` for clients.

    `status()` gives the report. `start(request, [stdin, stdout, stderr])` starts the program of an exec request and
    raises RequestError. `upgrade(node)` replaces a node's proxy, and says what came of it or raises RequestError.
    `down()` is called when somebody asks for the end; `hold` keeps those clients' connections open until the process
    ends.
    """

    def __init__(
        self,
        path: Path,
        status: Callable[[], object],
        start: Start,
        down: Callable[[], None],
        upgrade: Callable[[str], Awaitable[dict[str, Any]]],
    ) -> None:
        self._path = path
        self._status = status
        self._start = start
        self._down = down
        self._upgrade = upgrade
        self.hold: list[int] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve for ever; started when clients can connect."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        old = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        finally:
            os.umask(old)
        listener.listen(64)
        own = trio.socket.from_stdlib_socket(listener)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    client, _ = await own.accept()
                    nursery.start_soon(self._serve, client)
        finally:
            own.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, client: trio.socket.SocketType) -> None:
        fds: list[int] = []
        with client:
            try:
                await self._answer(client, fds)
            except RequestError as error:
                await _send(client, {"error": str(error), "code": error.code})
            except OSError:
                pass  # the client has gone
            except Exception as error:  # whatever one client does, the mesh goes on
                log.exception("a request failed")
                await _send(client, {"error": f"the mesh could not do that: {error!r}", "code": 1})
            finally:
                _close(fds)

    async def _answer(self, client: trio.socket.SocketType, fds: list[int]) -> None:
        request, rest = await _receive_request(client, fds)
        match request.get("do"):
            case "status":
                await _send(client, {"status": self._status()})
            case "down":
                await _send(client, {"ending": True})
                self.hold.append(os.dup(client.fileno()))
                self._down()
            case "upgrade":
                await _send(client, {"upgraded": await self._upgrade(str(request.get("node")))})
            case "exec" | "node-exec":
                await self._exec(client, request, fds, rest)
            case other:
                raise RequestError(f"unknown request {other!r}: this mesh is of another version")

    async def _exec(
        self, client: trio.socket.SocketType, request: Mapping[str, Any], fds: list[int], rest: bytes
    ) -> None:
        argv = request.get("argv")
        if not isinstance(argv, list) or not argv or len(fds) != 3:
            raise RequestError("a program to run, and its three streams, are needed")
        try:
            process = await self._start(request, fds)
        except OSError as error:
            raise start_failure(argv, error) from error
        _close(fds)
        try:
            async with trio.open_nursery() as nursery:

                async def forward() -> None:
                    await _forward_signals(client, process, rest)
                    nursery.cancel_scope.cancel()  # the client has gone

                await _send(client, {"pid": process.pid})
                nursery.start_soon(forward)
                code = await ended(process)
                await _send(client, {"exit": 128 - code if code < 0 else code})
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await _end(process)


async def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program and its process group, if they have not ended by themselves."""
    if process.poll() is None:
        with trio.move_on_after(HANGUP_PATIENCE):
            _signal_group(process, signal.SIGHUP)
            await ended(process)
        _signal_group(process, signal.SIGKILL)
        await ended(process)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _forward_signals(
    client: trio.socket.SocketType, process: subprocess.Popen[bytes], buffer: bytes
) -> None:
    while True:
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                _signal_group(process, int(json.loads(line)["signal"]))
        try:
            data = await client.recv(4096)
        except OSError:
            return
        if not data:
            return
        buffer += data


async def _receive_request(client: trio.socket.SocketType, fds: list[int]) -> tuple[dict[str, Any], bytes]:
    """The first line and what came after it; descriptors are put into `fds`."""
    buffer = b""
    room = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    while b"\n" not in buffer:
        data, ancillary, _, _ = await client.recvmsg(65536, room)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received = array.array("i")
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
                fds.extend(received)
        if not data:
            raise OSError("gone")
        buffer += data
        if len(buffer) > LARGEST_REQUEST:
            raise RequestError("the request is too large")
    line, _, rest = buffer.partition(b"\n")
    try:
        request = json.loads(line)
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise RequestError("the request is not a JSON object")
    return request, rest


async def _send(client: trio.socket.SocketType, answer: Mapping[str, object]) -> None:
    """A client that has gone needs no answer."""
    data = memoryview(json.dumps(answer).encode() + b"\n")
    with contextlib.suppress(OSError):
        while data:
            data = data[await client.send(data) :]


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
