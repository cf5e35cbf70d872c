"""The agent's end of the CNI plugin's socket: questions in, answers out. What they mean is decided elsewhere.

The framing is described where the plugin asks (plugin/ambient-cni.c, `ask`).
"""

import ipaddress
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from cni.zds import listen, unlink_own

log = logging.getLogger(__name__)

TRY_LATER: Final = 11
"""The specification's error code after which the kubelet asks again."""
UNDECODABLE: Final = 6

MOST_QUESTION = 9 << 20  # bytes
PATIENCE = 5.0  # seconds in which a question must have come
MOST_AT_ONCE = 256
_QUESTION = struct.Struct("!I")
_ANSWER = struct.Struct("!II")


class BadQuestion(Exception):
    """What came is no question; the message says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """What the runtime wants of the plugin: its environment, and the configuration with the result so far."""

    environment: dict[str, str]
    config: dict[str, Any]

    @property
    def command(self) -> str:
        """ADD or DEL."""
        return self.environment.get("CNI_COMMAND", "")

    @property
    def sandbox(self) -> str:
        """What the runtime calls the pod's sandbox; a pod may have several, one after the other."""
        return self.environment.get("CNI_CONTAINERID", "")

    @property
    def namespace_file(self) -> str:
        """The network namespace, as the host names it; "" where it is gone."""
        return self.environment.get("CNI_NETNS", "")

    def argument(self, name: str) -> str:
        """One of CNI_ARGS, "" if it is not there."""
        for part in self.environment.get("CNI_ARGS", "").split(";"):
            key, _, value = part.partition("=")
            if key == name:
                return value
        return ""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses that the plugins before gave the pod; what is none is left out."""
        previous = self.config.get("prevResult")
        found = previous.get("ips", ()) if isinstance(previous, dict) else ()
        addresses = []
        for each in found if isinstance(found, list) else ():
            try:
                addresses.append(str(ipaddress.ip_interface(str(each["address"])).ip))
            except (ValueError, TypeError, KeyError) as problem:
                log.warning("the CNI plugin's question: prevResult.ips: %r is no address: %s", each, problem)
        return tuple(addresses)


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` 0 and no body: the result so far stands. Status 1: the body is an error of the specification."""

    status: int = 0
    body: bytes = b""


def error(question: Question, code: int, message: str, details: str = "") -> Answer:
    """An error that the runtime shows, in the pod's events too."""
    told = {
        "cniVersion": question.config.get("cniVersion", "1.0.0"),
        "code": code,
        "msg": f"ambient-cni: {message}",
        "details": details,
    }
    return Answer(1, msgspec.json.encode(told))


def parse(data: bytes) -> Question:
    """Raises BadQuestion."""
    head, separator, rest = data.partition(b"\0\0")
    if not separator:
        # Without any environment there is one zero byte.
        raise BadQuestion("its environment does not end")
    environment = {}
    for entry in head.split(b"\0"):
        key, _, value = entry.decode(errors="replace").partition("=")
        environment[key] = value
    try:
        config = msgspec.json.decode(rest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise BadQuestion(f"its configuration is not JSON: {problem}") from None
    if not isinstance(config, dict):
        raise BadQuestion("its configuration is no JSON object")
    return Question(environment, config)


class PluginServer:
    """Answers the plugins of a node. `handle` must not raise, and must end in bounded time."""

    def __init__(self, path: Path, handle: Callable[[Question], Awaitable[Answer]]) -> None:
        self.listening = False
        self._path = path
        self._handle = handle

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then the socket is removed. Raises ZdsError where the path cannot be listened on."""
        with listen(self._path, socket.SOCK_STREAM) as listener:
            inode = self._path.stat().st_ino
            limit = trio.CapacityLimiter(MOST_AT_ONCE)
            try:
                async with trio.open_nursery() as nursery:
                    self.listening = True
                    task_status.started()
                    while True:
                        try:
                            accepted, _ = await listener.accept()
                        except OSError as problem:
                            log.warning("%s: accept: %s", self._path, problem)
                            await trio.sleep(0.1)
                            continue
                        nursery.start_soon(self._serve, accepted, limit)
            finally:
                self.listening = False
                unlink_own(self._path, inode)

    async def _serve(self, accepted: trio.socket.SocketType, limit: trio.CapacityLimiter) -> None:
        async with limit:
            stream = trio.SocketStream(accepted)
            async with stream:
                try:
                    with trio.fail_after(PATIENCE):
                        question = parse(await _question(stream))
                except BadQuestion as problem:
                    log.warning("the CNI plugin's question: %s", problem)
                    answer = error(Question({}, {}), UNDECODABLE, f"the question cannot be read: {problem}")
                except (trio.TooSlowError, trio.BrokenResourceError):
                    return
                else:
                    answer = await self._handle(question)
                try:
                    await stream.send_all(_ANSWER.pack(answer.status, len(answer.body)) + answer.body)
                except trio.BrokenResourceError:
                    log.debug("a CNI plugin has not waited for its answer")


async def _question(stream: trio.SocketStream) -> bytes:
    (length,) = _QUESTION.unpack(await _exactly(stream, _QUESTION.size))
    if length > MOST_QUESTION:
        raise BadQuestion(f"it has {length} bytes, more than {MOST_QUESTION}")
    return await _exactly(stream, length)


async def _exactly(stream: trio.SocketStream, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = await stream.receive_some(min(65536, length - len(parts)))
        if not part:
            raise BadQuestion("it ends early")
        parts += part
    return bytes(parts)
