"""The socket between the control process and a worker: length-prefixed messages in order, descriptors beside them.

Both sides use the same framing: 4 bytes length, 1 byte number of descriptors, the message. Descriptors travel with
the first byte of their message, and wait in a queue until it is decoded.
"""

import array
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec

from ztunnel.proxy.messages import Message

M = TypeVar("M")
HEADER = 5
LARGEST = 64 * 1024 * 1024  # bytes; a route to a service of 100,000 endpoints is a tenth of it
READ = 256 * 1024
TURN = (
    128 * 1024
)  # bytes of messages after which others have their turn: 1 ms of policies, the costliest to decode
MOST_FDS = 16  # descriptors beside one message: far below the kernel's 253


class ChannelClosed(Exception):
    """The other process ended, or broke the framing."""


_encode = msgspec.msgpack.Encoder().encode


class Channel(Generic[M]):
    """One end. Sending never blocks (what the socket does not take waits here); receiving gives whole messages.

    It does no waiting of its own: the worker drives it from its reactor, the control process from trio tasks.
    """

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        """`kind` is the union of messages, M, that may come in."""
        sock.setblocking(False)
        self.sock = sock
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(kind)
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._in = bytearray()
        self._fds: deque[int] = deque()
        self.queued = 0  # bytes that wait to be sent
        self.ended = False  # the other end closed: `receive` has given all there was
        self.more = False  # `receive` has not given all there was

    @property
    def waiting(self) -> bool:
        """Whether something is left to send: call `flush` when the socket is writable."""
        return bool(self._out)

    def send(self, message: Message, fds: Iterable[int] = ()) -> None:
        """Queue and try to send. The descriptors are duplicated: the caller keeps its own.

        Raises ChannelClosed, ValueError for a message beyond LARGEST, OSError where no descriptor can be made.
        """
        body = _encode(message)
        if len(body) > LARGEST:
            raise ValueError(f"{type(message).__name__} of {len(body)} bytes: the limit is {LARGEST}")
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError:
            _close_all(copies)
            raise
        frame = len(body).to_bytes(4, "big") + bytes((len(copies),)) + body
        self._out.append((memoryview(frame), copies))
        self.queued += len(frame)
        self.flush()

    def flush(self) -> bool:
        """Send what waits; True if nothing is left. Raises ChannelClosed."""
        out = self._out
        try:
            while out:
                frame, fds = out[0]
                if fds:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                    sent = self.sock.sendmsg([frame], rights)
                    for fd in fds:
                        os.close(fd)
                    fds.clear()
                else:
                    sent = self.sock.send(frame)
                self.queued -= sent
                if sent < len(frame):
                    out[0] = (frame[sent:], fds)
                    return False
                out.popleft()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                return False  # too many descriptors are under way for one user: once the other end took some
            raise ChannelClosed(str(error)) from None
        return True

    def receive(self) -> list[tuple[M, list[int]]]:
        """The whole messages that are there, each with its descriptors, now the caller's.

        After TURN bytes there may be more, which `more` says: others should have their turn before them. Messages that
        came with the end of the channel are returned, and `ended` is true then; without any it is ChannelClosed.
        """
        messages: list[tuple[M, list[int]]] = []
        self.more = False
        taken = 0
        while True:
            if taken >= TURN:
                self.more = True
                return messages
            try:
                data, ancillary, flags, _ = self.sock.recvmsg(
                    READ, socket.CMSG_SPACE(MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return messages
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._fds.extend(memoryview(payload[: len(payload) // 4 * 4]).cast("i"))
            if flags & socket.MSG_CTRUNC:
                raise ChannelClosed("descriptors were lost: raise the limit of open files (ulimit -n)")
            if not data:
                self.ended = True
                if messages:
                    return messages
                raise ChannelClosed("the other process closed the channel")
            taken += len(data)
            self._in += data
            self._split(messages)

    def _split(self, messages: list[tuple[M, list[int]]]) -> None:
        buffer = self._in
        position = 0
        while len(buffer) - position >= HEADER:
            size = int.from_bytes(buffer[position : position + 4], "big")
            if size > LARGEST:
                raise ChannelClosed(f"a message of {size} bytes is beyond the limit of {LARGEST}")
            end = position + HEADER + size
            if end > len(buffer):
                break
            count = buffer[position + 4]
            if count > len(self._fds):
                raise ChannelClosed(f"a message announces {count} descriptors, {len(self._fds)} came")
            try:
                message = self._decoder.decode(memoryview(buffer)[position + HEADER : end])
            except msgspec.DecodeError as error:
                raise ChannelClosed(f"a message does not decode: {error}") from None
            messages.append((message, [self._fds.popleft() for _ in range(count)]))
            position = end
        if position:
            del buffer[:position]

    def close(self) -> None:
        """Close the socket and every descriptor that was not handed on."""
        for _, fds in self._out:
            _close_all(fds)
        self._out.clear()
        self.queued = 0
        _close_all(self._fds)
        self._fds.clear()
        self.sock.close()


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
