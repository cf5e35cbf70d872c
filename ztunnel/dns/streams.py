"""DNS over TCP (RFC 7766): a program's connection, and beside it one to the server that it asked.

Queries of the mesh are answered here. All others go to the server as they are, and what it says comes back as it is,
in its order and in as many messages as it likes: zone transfers and updates pass, too.
"""

import contextlib
import socket
from collections.abc import AsyncGenerator, Callable

import trio

from ztunnel.dns import packets
from ztunnel.dns.counters import Counters
from ztunnel.dns.limits import Limit
from ztunnel.dns.packets import Query
from ztunnel.dns.pod import Address, DnsPod, UpstreamUnknown

IDLE = 10.0  # seconds of silence, nothing being awaited, after which a connection is closed
TIMEOUT = 5.0  # seconds in which the server must have taken the connection, and answered a query
LOOK = 1.0  # seconds between looks at the clock
MOST_OUTSTANDING = 100  # queries of one connection that wait for the server
READ = 65536

Answerer = Callable[[DnsPod, Query, int], bytes | None]
_BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


async def messages(stream: trio.abc.ReceiveStream) -> AsyncGenerator[bytes, None]:
    """The messages of a stream, each of which has its length (2 bytes) before it, until its end."""
    buffer = bytearray()
    while True:
        while len(buffer) >= 2 and len(buffer) >= (end := 2 + int.from_bytes(buffer[:2], "big")):
            message = bytes(buffer[2:end])
            del buffer[:end]
            yield message
        data = await stream.receive_some(READ)
        if not data:
            return
        buffer += data


def framed(message: bytes) -> bytes:
    """The message with its length before it."""
    return len(message).to_bytes(2, "big") + message


class Streams:
    """Serves connections. `servers` are asked where nobody knows whom the program asked."""

    def __init__(
        self,
        answer: Answerer,
        counters: Counters,
        connections: Limit,
        queries: Limit,
        servers: Callable[[], list[Address]],
    ) -> None:
        self.answer = answer
        self.counters = counters
        self.queries = queries
        self.servers = servers
        self._connections = connections

    @property
    def open(self) -> int:
        """Connections of programs."""
        return self._connections.taken

    async def serve(self, pod: DnsPod, connection: socket.socket) -> None:
        """Serve an accepted connection to its end."""
        if not self._connections.take(pod.uid):
            self.counters.faults["refused"] += 1
            connection.close()
            return
        try:
            await _Conversation(self, pod, connection).run()
        finally:
            self._connections.give_back(pod.uid)


class _Conversation:
    def __init__(self, streams: Streams, pod: DnsPod, connection: socket.socket) -> None:
        self._streams = streams
        self._pod = pod
        self._connection = connection
        self._client = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        self._upstream: trio.SocketStream | None = None
        self._source: tuple[str, str, int] | None = None
        self._outstanding: dict[bytes, tuple[float, Query]] = {}  # by id: since when
        self._writing = trio.Lock()
        self._active = trio.current_time()

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, nursery.cancel_scope)
                with contextlib.suppress(*_BROKEN):
                    await self._listen(nursery)
                    # The program has ended its side; answers that are awaited still go to it.
                    while self._outstanding:
                        await trio.sleep(LOOK / 10)
                nursery.cancel_scope.cancel()
        finally:
            self._close_upstream()
            for _, query in list(self._outstanding.values()):
                self._failed(query)
            self._connection.close()

    async def _watch(self, scope: trio.CancelScope) -> None:
        while True:
            await trio.sleep(LOOK)
            now = trio.current_time()
            if any(now - since > TIMEOUT for since, _ in self._outstanding.values()):
                with trio.move_on_after(TIMEOUT) as said:
                    await self._give_up()
                if said.cancelled_caught:  # the program does not read its answers
                    scope.cancel()
            elif not self._outstanding and now - self._active > IDLE:
                scope.cancel()

    async def _listen(self, nursery: trio.Nursery) -> None:
        peer = self._connection.getpeername()
        faults, pod = self._streams.counters.faults, self._pod
        async with contextlib.aclosing(messages(self._client)) as received:
            async for data in received:
                self._active = trio.current_time()
                if ("tcp", peer[0], peer[1]) in pod.asking:
                    faults["looping"] += 1
                    return
                try:
                    query = packets.parse(data)
                except packets.NotAQuery:
                    faults["malformed"] += 1
                    return
                except packets.FormatError:
                    faults["malformed"] += 1
                    await self._say(packets.format_error(data))
                    continue
                self._streams.counters.requests[pod.labels(query.type_name, "tcp")] += 1
                reply = self._streams.answer(pod, query, packets.MAX_SIZE)
                if reply is not None:
                    await self._say(reply)
                else:
                    await self._ask(query, nursery)

    async def _say(self, message: bytes) -> None:
        async with self._writing:
            await self._client.send_all(framed(message))

    async def _ask(self, query: Query, nursery: trio.Nursery) -> None:
        """Pass a query on."""
        number, streams = query.data[:2], self._streams
        if (
            number in self._outstanding
            or len(self._outstanding) >= MOST_OUTSTANDING
            or not streams.queries.take(self._pod.uid)
        ):
            streams.counters.faults["refused"] += 1
            await self._say(packets.refusal(query, packets.SERVFAIL))
            return
        self._outstanding[number] = (trio.current_time(), query)
        streams.counters.upstream_requests[self._pod.labels(query.type_name, "tcp")] += 1
        try:
            if self._upstream is None:
                self._upstream = await self._connect()
                nursery.start_soon(self._relay, self._upstream)
            await self._upstream.send_all(framed(query.data))
        except (*_BROKEN, UpstreamUnknown, trio.TooSlowError):
            await self._give_up()

    async def _connect(self) -> trio.SocketStream:
        pod = self._pod
        try:
            server = pod.server_of_connection(self._connection)
        except UpstreamUnknown:
            servers = self._streams.servers()
            if not servers:
                raise
            server = servers[0]
        sock = trio.socket.from_stdlib_socket(pod.socket_to(server, socket.SOCK_STREAM))
        try:
            with trio.fail_after(TIMEOUT):
                await sock.connect(server)
            address = sock.getsockname()
        except BaseException:
            sock.close()
            raise
        self._source = ("tcp", address[0], address[1])
        pod.asking.add(self._source)
        return trio.SocketStream(sock)

    async def _relay(self, upstream: trio.SocketStream) -> None:
        """Bring the server's messages to the program until either ends."""
        try:
            async with contextlib.aclosing(messages(upstream)) as received:
                async for response in received:
                    self._active = trio.current_time()
                    awaited = self._outstanding.get(response[:2])
                    if awaited is not None:
                        del self._outstanding[response[:2]]
                        self._streams.queries.give_back(self._pod.uid)
                    await self._say(response)
        except _BROKEN:
            pass
        if self._upstream is upstream:
            await self._give_up()

    async def _give_up(self) -> None:
        """The server is lost: answer what waits for it with SERVFAIL. The next query connects again."""
        self._close_upstream()
        waiting = list(self._outstanding.values())
        for _, query in waiting:
            self._failed(query)
        with contextlib.suppress(*_BROKEN):
            for _, query in waiting:
                await self._say(packets.refusal(query, packets.SERVFAIL))

    def _failed(self, query: Query) -> None:
        del self._outstanding[query.data[:2]]
        self._streams.queries.give_back(self._pod.uid)
        self._streams.counters.upstream_failures[self._pod.labels(query.type_name, "tcp")] += 1

    def _close_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.socket.close()
        if self._source is not None:
            self._pod.asking.discard(self._source)
            self._source = None
