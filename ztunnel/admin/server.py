"""A small HTTP/1.1 server for a process's own pages: admin (loopback or a Unix socket only), readiness, hooks.

Each handler gets the method and the query, and answers at once; bodies of requests are read where the server is
told to.
"""

import logging
import os
import socket
import ssl
import stat
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import TypeAlias
from urllib.parse import parse_qsl, urlsplit

import h11
import trio

logger = logging.getLogger("admin")

IDLE_TIMEOUT = 60.0  # seconds a client may keep a connection without asking anything
ANSWER_TIMEOUT = 30.0  # seconds a client may take to read an answer
MOST_CONNECTIONS = 64  # at once; more are closed: readiness is open to the whole network
LARGEST_HEAD = 16 * 1024  # bytes
HANDSHAKE_TIMEOUT = 10.0  # seconds
_READ = 64 * 1024  # bytes at a time of a body
LEAST_SENT = 64 * 1024  # bytes of an answer in pieces that are sent at once


class AddressError(ValueError):
    """The address to listen on is malformed, not permitted, or taken; the message says what would be right."""


_Stream: TypeAlias = "trio.SocketStream | trio.SSLStream[trio.SocketStream]"
Send = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler answers. A large body may come in pieces, which need not be joined.

    With `stream` there is no body: that function is given a function to send pieces with as they come, until it
    returns, or is cancelled because the client has gone.
    """

    body: bytes | tuple[bytes, ...] = b""
    status: int = 200
    content_type: str = "text/plain; charset=utf-8"
    stream: Callable[[Send], Awaitable[None]] | None = None
    headers: tuple[tuple[str, str], ...] = ()


class Query(dict[str, str]):
    """A request's query; `headers` are the request's, by their names in small letters, `body` what it sent."""

    def __init__(
        self,
        query: Iterable[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> None:
        super().__init__(query)
        self.headers = headers or {}
        self.body = body


Handler = Callable[[str, Query], Awaitable[Answer]]
"""handler(method, query) -> Answer"""


async def serve(
    address: str,
    pages: Mapping[str, Handler],
    *,
    loopback_only: bool,
    tls: ssl.SSLContext | None = None,
    largest_body: int = 0,
    task_status: trio.TaskStatus[str],
) -> None:
    """Serve `pages` (by path) on `unix:PATH`, `IP:PORT` or `[IP]:PORT`, until cancelled; port 0 takes any.

    With `tls` as HTTPS. Bodies of requests are dropped, or with `largest_body` (bytes) given to the handlers; what is
    larger is refused (413). `started` with the address in use. A socket file that nobody listens on any more is
    replaced; ours goes with us. Raises AddressError.
    """
    inode = 0
    if address.startswith("unix:"):
        path = address[5:]
        listener = _unix_listener(path)
        inode = os.lstat(path).st_ino
        told = address
    else:
        path = ""
        listener = _tcp_listener(address, loopback_only)
        host, port = listener.getsockname()[:2]
        told = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        task_status.started(told)
        await trio.serve_listeners(
            partial(_connection, pages, trio.CapacityLimiter(MOST_CONNECTIONS), tls, largest_body),
            [trio.SocketListener(trio.socket.from_stdlib_socket(listener))],
        )
    finally:
        listener.close()
        if path:
            _remove_own(path, inode)


def _unix_listener(path: str) -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AddressError(f"unix:{path}: cannot listen: there is a file that is no socket; remove it")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise AddressError(f"unix:{path}: another process listens there")
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise AddressError(f"unix:{path}: cannot listen: {error.strerror or error}") from None
    listener = socket.socket(socket.AF_UNIX)
    try:
        old = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(old)
        listener.listen(64)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise AddressError(f"unix:{path}: cannot listen: {error.strerror or error}") from None
    return listener


def _tcp_listener(address: str, loopback_only: bool) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        ip = ip_address(host.strip("[]"))
        number = int(port)
    except ValueError:
        raise AddressError(f"{address!r}: expected unix:PATH, IP:PORT or [IP]:PORT") from None
    if loopback_only and not ip.is_loopback:
        raise AddressError(
            f"{address}: the admin pages listen on loopback addresses only, such as 127.0.0.1:{port}"
        )
    listener = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(ip), number))
        listener.listen(64)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        raise AddressError(f"{address}: cannot listen: {error}; is the port in use?") from None
    return listener


def _remove_own(path: str, inode: int) -> None:
    """Remove our socket file, not one that took its place."""
    try:
        if os.lstat(path).st_ino == inode:
            os.unlink(path)
    except OSError:
        pass


async def _connection(
    pages: Mapping[str, Handler],
    limit: trio.CapacityLimiter,
    tls: ssl.SSLContext | None,
    largest_body: int,
    socket_stream: trio.SocketStream,
) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=LARGEST_HEAD)
    stream: _Stream = socket_stream
    try:
        async with socket_stream:
            if limit.available_tokens > 0:
                async with limit:
                    if tls is not None:
                        stream = trio.SSLStream(socket_stream, tls, server_side=True, https_compatible=True)
                        with trio.fail_after(HANDSHAKE_TIMEOUT):
                            await stream.do_handshake()
                    await _converse(http, stream, pages, largest_body)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return  # that client's own matter
    except trio.TooSlowError:
        logger.debug("a client did not end its handshake in time")


async def _converse(
    http: h11.Connection, stream: _Stream, pages: Mapping[str, Handler], largest_body: int
) -> None:
    while True:
        try:
            request, body = await _next_request(http, stream, largest_body)
        except h11.RemoteProtocolError as error:
            await _send(http, stream, b"GET", Answer(f"{error}\n".encode(), error.error_status_hint))
            return
        if request is None:
            return
        await _respond(http, stream, request, body, pages)
        if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
            return
        http.start_next_cycle()


async def _next_request(
    http: h11.Connection, stream: _Stream, largest_body: int
) -> tuple[h11.Request | None, bytes]:
    """The next request with its body; None at the end, or if the client is idle for too long."""
    request = None
    body = bytearray()
    with trio.move_on_after(IDLE_TIMEOUT):
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                if http.they_are_waiting_for_100_continue:
                    await stream.send_all(
                        http.send(h11.InformationalResponse(status_code=100, headers=[])) or b""
                    )
                http.receive_data(
                    bytes(await stream.receive_some(LARGEST_HEAD if request is None else _READ))
                )
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                if largest_body:
                    if len(body) + len(event.data) > largest_body:
                        raise h11.RemoteProtocolError(
                            f"the body is larger than {largest_body} bytes", error_status_hint=413
                        )
                    body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return request, bytes(body)
            elif isinstance(event, h11.ConnectionClosed):
                return None, b""
    return None, b""


async def _respond(
    http: h11.Connection,
    stream: _Stream,
    request: h11.Request,
    body: bytes,
    pages: Mapping[str, Handler],
) -> None:
    answer = await _answer(request, body, pages)
    if answer.stream is not None and request.method != b"HEAD":
        await _send_stream(http, stream, answer, answer.stream)
    else:
        await _send(http, stream, request.method, answer)


async def _answer(request: h11.Request, body: bytes, pages: Mapping[str, Handler]) -> Answer:
    try:
        target = urlsplit(request.target.decode("latin-1"))
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers}
        query = Query(parse_qsl(target.query, keep_blank_values=True), headers, body)
    except ValueError as error:  # such as an unclosed bracket of an IPv6 address
        return Answer(f"{error}\n".encode(), 400)
    handler = pages.get(target.path)
    if handler is None:
        return Answer(b"not found; see / for the list of pages\n", 404)
    try:
        return await handler(request.method.decode(), query)
    except Exception:  # a page that cannot be made must not end the proxy
        logger.exception("internal error: %s cannot be shown", target.path)
        return Answer(b"internal error; see the log\n", 500)


async def _send(http: h11.Connection, stream: _Stream, method: bytes, answer: Answer) -> None:
    if http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    pieces = answer.body if isinstance(answer.body, tuple) else (answer.body,)
    headers = [
        ("content-type", answer.content_type),
        ("content-length", str(sum(map(len, pieces)))),
        ("cache-control", "no-store"),
        *answer.headers,
    ]
    data = http.send(h11.Response(status_code=answer.status, headers=headers)) or b""
    with trio.move_on_after(ANSWER_TIMEOUT) as waited:
        if method != b"HEAD":
            for piece in pieces:
                data += http.send(h11.Data(data=piece)) or b""
                if len(data) >= LEAST_SENT:
                    await stream.send_all(data)
                    data = b""
        await stream.send_all(data + (http.send(h11.EndOfMessage()) or b""))
    if waited.cancelled_caught:
        raise trio.BrokenResourceError("the client does not read")


async def _send_stream(
    http: h11.Connection,
    stream: _Stream,
    answer: Answer,
    produce: Callable[[Send], Awaitable[None]],
) -> None:
    """Send what `produce` makes until it is done or the client goes; the connection is closed after it."""
    headers = [("content-type", answer.content_type), ("cache-control", "no-store"), ("connection", "close")]

    async def send(event: h11.Event) -> None:
        with trio.move_on_after(ANSWER_TIMEOUT) as waited:
            await stream.send_all(http.send(event) or b"")
        if waited.cancelled_caught:
            raise trio.BrokenResourceError("the client does not read")

    async def piece(data: bytes) -> None:
        await send(h11.Data(data=data))

    async def until_gone(scope: trio.CancelScope) -> None:
        try:
            while await stream.receive_some(LARGEST_HEAD):
                pass
        except trio.BrokenResourceError:
            pass
        scope.cancel()

    await send(h11.Response(status_code=answer.status, headers=headers))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_gone, nursery.cancel_scope)
        try:
            await produce(piece)
            await send(h11.EndOfMessage())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client's own matter
        except Exception:  # a page that cannot be made must not end the proxy
            logger.exception("internal error: a page broke off")
        nursery.cancel_scope.cancel()
