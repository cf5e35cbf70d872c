"""HTTP/1.1 with keep-alive for the demo's programs: just enough of it, and quick; standard library only."""

import contextlib
import socket
from typing import BinaryIO, NamedTuple

LONGEST_LINE = 8192  # bytes; a longer one is an error
MOST_HEADERS = 100


class HttpError(Exception):
    """The peer sent what is not HTTP/1.1 as spoken here, or left in the middle of a message."""


class Message(NamedTuple):
    """A request or an answer: its first line, its header fields (lower-case names) and its body."""

    start: str
    headers: dict[str, str]
    body: bytes

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection stays open after this message."""
        return self.headers.get("connection", "").lower() != "close"


def read_message(stream: BinaryIO) -> Message | None:
    """The next message of a connection; None where the peer closed between messages.

    Bodies come with Content-Length or not at all. Raises HttpError, and OSError where the connection broke.
    """
    start = _line(stream)
    if start is None:
        return None
    headers: dict[str, str] = {}
    while line := _line(stream):
        name, colon, value = line.partition(":")
        if not colon or len(headers) == MOST_HEADERS:
            raise HttpError(f"bad header field {line[:80]!r}")
        headers[name.strip().lower()] = value.strip()
    if line is None:
        raise HttpError("connection ended inside a message's head")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or "transfer-encoding" in headers:
        raise HttpError("only bodies with a Content-Length are understood")
    body = stream.read(int(length))
    if len(body) < int(length):
        raise HttpError("connection ended inside a message's body")
    return Message(start, headers, body)


def _line(stream: BinaryIO) -> str | None:
    line = stream.readline(LONGEST_LINE)
    if not line:
        return None
    if not line.endswith(b"\n"):
        raise HttpError("a line is cut short or too long")
    return line.rstrip(b"\r\n").decode("latin-1")


def encode(start: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """A message as bytes, Content-Length included where there is a body or the message is an answer."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    length = f"Content-Length: {len(body)}\r\n" if body or start.startswith("HTTP/") else ""
    return f"{start}\r\n{fields}{length}\r\n".encode("latin-1") + body


class Client:
    """One keep-alive connection to one server, opened at the first request and again after it was closed."""

    def __init__(self, host: str, port: int, timeout: float = 10.0) -> None:
        self.host = host
        self.port = port
        self.timeout = timeout
        self._socket: socket.socket | None = None
        self._stream: BinaryIO | None = None

    def get(self, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        """GET `path`; returns status and body. Raises OSError or HttpError.

        A server may close a connection that was idle just as the request leaves; a GET is then sent once more,
        on a new one (RFC 9110, 9.2.2).
        """
        request = encode(f"GET {path} HTTP/1.1", {"Host": f"{self.host}:{self.port}", **headers})
        reused = self._socket is not None
        try:
            answer = self._ask(request)
        except (ConnectionResetError, BrokenPipeError):
            self.close()
            if not reused:
                raise
            answer = None
        except BaseException:
            self.close()
            raise
        if answer is None and reused:
            self.close()
            answer = self._ask(request)
        if answer is None:
            self.close()
            raise HttpError(f"{self.host}:{self.port} closed the connection without an answer")
        if not answer.keeps_alive:
            self.close()
        status = answer.start.split(" ", 2)[1:2]
        if not status or not status[0].isdecimal():
            self.close()
            raise HttpError(f"bad status line {answer.start[:80]!r}")
        return int(status[0]), answer.body

    def _ask(self, request: bytes) -> Message | None:
        if self._socket is None or self._stream is None:
            self._socket = socket.create_connection((self.host, self.port), self.timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._stream = self._socket.makefile("rb")
        self._socket.sendall(request)
        return read_message(self._stream)

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        with contextlib.suppress(OSError):
            if self._stream is not None:
                self._stream.close()
            if self._socket is not None:
                self._socket.close()
        self._socket = self._stream = None
