"""Just enough I/O to use the codec over a trio stream, for trials against real peers; and how to start those.

Each connection has a reader task and a writer task, so that neither waits for the other: a peer that stops
reading until we read is no deadlock. Not fast, not for production: the proxy has its own reactor.
"""

import contextlib
import hashlib
import socket
import subprocess
import sysconfig
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import trio

from ztunnel.hbone import (
    Config,
    Connection,
    ConnectionFailed,
    ConnectRequested,
    DataReceived,
    ErrorCode,
    Event,
    ResponseReceived,
    Role,
    StreamEnded,
    StreamReset,
    WindowOpened,
)

ENVOY = Path(sysconfig.get_path("purelib")) / "envoy" / "_bin" / "envoy"
RECORD = 16_384
LIMIT = 60.0  # seconds that any wait may take before the test fails


class Reset(Exception):
    """The peer reset the stream, or the connection is gone."""


class Tunnel:
    """One stream as an application sees it."""

    def __init__(self, driver: "Driver", stream_id: int) -> None:
        self.driver = driver
        self.stream_id = stream_id
        self.authority = ""
        self.status = 0
        self.code: int | None = None
        self.ended = False
        self.pieces: deque[bytes] = deque()
        self.news = trio.Condition()

    async def tell(self) -> None:
        async with self.news:
            self.news.notify_all()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds. Raises Reset."""
        with trio.fail_after(LIMIT):
            async with self.news:
                while not condition():
                    if self.code is not None:
                        raise Reset(self.code)
                    await self.news.wait()

    async def send_all(self, data: bytes) -> None:
        connection = self.driver.connection
        view = memoryview(data)
        while view:
            await self.wait_for(lambda: connection.sendable(self.stream_id) > 0)
            size = min(len(view), connection.sendable(self.stream_id))
            connection.send_data(self.stream_id, view[:size])
            view = view[size:]
            self.driver.wake_writer()
            await trio.lowlevel.checkpoint()

    async def receive_some(self) -> bytes:
        """The next bytes; empty at the end."""
        await self.wait_for(lambda: bool(self.pieces) or self.ended)
        if not self.pieces:
            return b""
        piece = self.pieces.popleft()
        self.driver.connection.acknowledge(self.stream_id, len(piece))
        self.driver.wake_writer()
        return piece

    async def receive_all(self) -> bytes:
        pieces = []
        while piece := await self.receive_some():
            pieces.append(piece)
        return b"".join(pieces)

    def send_eof(self) -> None:
        self.driver.connection.end_stream(self.stream_id)
        self.driver.wake_writer()

    def reset(self, code: int) -> None:
        self.driver.connection.reset_stream(self.stream_id, code)
        self.driver.wake_writer()


class Driver:
    """Moves a connection's bytes over a trio stream; `on_tunnel` handles what clients ask a server for."""

    def __init__(
        self,
        role: Role,
        transport: trio.abc.Stream,
        on_tunnel: Callable[[Tunnel], Awaitable[None]] | None = None,
        config: Config | None = None,
    ) -> None:
        self.connection = Connection(role, config)
        self.transport = transport
        self.on_tunnel = on_tunnel
        self.tunnels: dict[int, Tunnel] = {}
        self.other_events: list[Event] = []
        self.failure: ConnectionFailed | None = None
        self.has_output = trio.Event()
        self.nursery: trio.Nursery | None = None

    def wake_writer(self) -> None:
        self.has_output.set()

    async def open(
        self, authority: str, headers: Sequence[tuple[str, str]] = (), *, end: bool = False
    ) -> Tunnel:
        """Client: open a tunnel and wait for its answer, whatever that is (`status`). `end`: say END_STREAM at once."""
        tunnel = Tunnel(self, self.connection.open_stream(authority, headers))
        self.tunnels[tunnel.stream_id] = tunnel
        if end:
            self.connection.end_stream(tunnel.stream_id)
        self.wake_writer()
        await tunnel.wait_for(lambda: tunnel.status != 0)
        return tunnel

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until the transport ends."""
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            nursery.start_soon(self._write)
            task_status.started()
            try:
                await self._read()
            finally:
                for tunnel in self.tunnels.values():
                    if not tunnel.ended and tunnel.code is None:
                        tunnel.code = -1
                        with trio.CancelScope(shield=True):
                            await tunnel.tell()
            nursery.cancel_scope.cancel()

    async def _write(self) -> None:
        while True:
            data = self.connection.data_to_send()
            if data:
                with contextlib.suppress(trio.BrokenResourceError):
                    await self.transport.send_all(data)
            else:
                self.has_output = trio.Event()
                await self.has_output.wait()

    async def _read(self) -> None:
        while True:
            try:
                data = await self.transport.receive_some(RECORD)
            except trio.BrokenResourceError:
                return
            if not data:
                return
            for event in self.connection.receive(data):
                await self._on_event(event)
            self.wake_writer()

    async def _on_event(self, event: Event) -> None:
        if isinstance(event, ConnectRequested):
            tunnel = self.tunnels[event.stream_id] = Tunnel(self, event.stream_id)
            tunnel.authority = event.authority
            assert self.nursery is not None
            assert self.on_tunnel is not None
            self.nursery.start_soon(self.on_tunnel, tunnel)
        elif isinstance(event, WindowOpened) and event.stream_id == 0:
            for tunnel in self.tunnels.values():
                await tunnel.tell()
        elif isinstance(event, DataReceived | ResponseReceived | StreamEnded | StreamReset | WindowOpened):
            tunnel = self.tunnels[event.stream_id]
            if isinstance(event, DataReceived):
                tunnel.pieces.append(bytes(event.data))
            elif isinstance(event, ResponseReceived):
                tunnel.status = event.status
            elif isinstance(event, StreamEnded):
                tunnel.ended = True
            elif isinstance(event, StreamReset):
                tunnel.code = event.code
            await tunnel.tell()
        else:
            if isinstance(event, ConnectionFailed):
                self.failure = event
            self.other_events.append(event)


@contextlib.asynccontextmanager
async def connect(address: Path | int, config: Config | None = None) -> AsyncIterator[Driver]:
    """A client connection to a Unix socket or a TCP port on loopback."""
    transport: trio.SocketStream
    if isinstance(address, Path):
        transport = await trio.open_unix_socket(str(address))
    else:
        transport = await trio.open_tcp_stream("127.0.0.1", address)
    async with transport, trio.open_nursery() as nursery:
        driver = Driver(Role.CLIENT, transport, config=config)
        await nursery.start(driver.run)
        yield driver
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def serve(
    on_tunnel: Callable[[Tunnel], Awaitable[None]], path: Path | None = None, config: Config | None = None
) -> AsyncIterator[tuple[int, list[Driver]]]:
    """Our server on a Unix socket, or a TCP port on loopback. Yields the port (0) and the connections so far."""
    drivers: list[Driver] = []

    async def on_connection(transport: trio.SocketStream) -> None:
        driver = Driver(Role.SERVER, transport, on_tunnel, config)
        drivers.append(driver)
        async with transport:
            await driver.run()

    async with trio.open_nursery() as nursery:
        if path is None:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port: int = listeners[0].socket.getsockname()[1]
        else:
            sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            await sock.bind(str(path))
            sock.listen(100)
            listeners, port = [trio.SocketListener(sock)], 0
        nursery.start_soon(trio.serve_listeners, on_connection, listeners)
        yield port, drivers
        nursery.cancel_scope.cancel()


async def relay_to_tcp(tunnel: Tunnel) -> None:
    """Answer a CONNECT as a proxy does: to its authority on loopback, half-closes passed on both ways."""
    host, _, port = tunnel.authority.rpartition(":")
    try:
        upstream = await trio.open_tcp_stream(host, int(port))
    except OSError:
        tunnel.driver.connection.respond(tunnel.stream_id, 503, end_stream=True)
        tunnel.driver.wake_writer()
        return
    tunnel.driver.connection.respond(tunnel.stream_id, 200)
    tunnel.driver.wake_writer()

    async def upwards() -> None:
        while piece := await tunnel.receive_some():
            await upstream.send_all(piece)
        await upstream.send_eof()

    try:
        async with upstream, trio.open_nursery() as nursery:
            nursery.start_soon(upwards)
            while piece := await upstream.receive_some(RECORD):
                await tunnel.send_all(piece)
            tunnel.send_eof()
    except* (Reset, trio.BrokenResourceError):
        tunnel.reset(ErrorCode.CONNECT_ERROR)


@contextlib.asynccontextmanager
async def tcp_server(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """A TCP server on loopback. Yields its port."""

    async def one(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                await handler(stream)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, one, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    """Send back what comes, then the end."""
    async for piece in stream:
        await stream.send_all(piece)
    await stream.send_eof()


async def answer_after_the_end(stream: trio.SocketStream) -> None:
    """Read to the end, then answer with the checksum: works only if the half-close crosses."""
    digest = hashlib.sha256()
    async for piece in stream:
        digest.update(piece)
    await stream.send_all(digest.hexdigest().encode())


def goodbye_first(late: list[str]) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """A server that speaks and ends at once, then notes the checksum of what still comes, and closes."""

    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(b"bye")
        await stream.send_eof()
        digest = hashlib.sha256()
        async for piece in stream:
            digest.update(piece)
        late.append(digest.hexdigest())

    return handler


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path is short enough for Unix sockets (108 bytes), which pytest's may not be."""
    with tempfile.TemporaryDirectory(prefix="hbone-") as path:
        yield Path(path)


@contextlib.asynccontextmanager
async def program(argv: Sequence[str], listens: Path, log: Path) -> AsyncIterator[None]:
    """Run a real peer until the block ends. Enters once its Unix socket `listens`; fails with its log if it dies."""
    async with trio.open_nursery() as nursery:
        with log.open("wb") as output:
            run = partial(trio.run_process, list(argv), stdout=output, stderr=subprocess.STDOUT, check=False)
            process: trio.Process = await nursery.start(run)
            try:
                with trio.move_on_after(LIMIT) as waiting:
                    while not await _accepts(listens):
                        if process.returncode is not None:
                            break
                        await trio.sleep(0.02)
                if waiting.cancelled_caught or process.returncode is not None:
                    raise AssertionError(
                        f"{argv[0]} does not listen on {listens}:\n{log.read_text()[-4000:]}"
                    )
                yield
            finally:
                nursery.cancel_scope.cancel()


async def _accepts(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError:
        return False
    await stream.aclose()
    return True
