"""Connections that a pod opened, redirected to port 15001: find the destination, then a tunnel or plain TCP.

A destination in the mesh is reached through a tunnel or not at all: no error leads to plaintext.
"""

from collections.abc import Callable
from ipaddress import ip_address

from ztunnel.inpod import sockets
from ztunnel.inpod.sockets import Socket, host_port
from ztunnel.mesh.route import Endpoint, Route
from ztunnel.proxy.context import CONNECT_TIMEOUT, WAIT_TIMEOUT, Context, Ending, Pod
from ztunnel.proxy.errors import (
    ConnectFailed,
    ControlUnavailable,
    IdentityMissing,
    ProxyError,
    RouteError,
    TimedOut,
    tcp_error,
)
from ztunnel.proxy.pool import ClientTunnel, Pool
from ztunnel.proxy.relay import WAITING, AppStream, StreamOwner, status_error
from ztunnel.proxy.routes import Way, Ways
from ztunnel.proxy.splice import Splice, SpliceOwner
from ztunnel.telemetry.access import OUTBOUND, ConnectionRecord

ATTEMPTS = 3  # tunnels tried for one connection, where none has carried a byte of it

AskRoute = Callable[[Pod, bytes, bytes, int, Callable[[Route | None], None]], None]
"""ask(pod, key, address, port, answer): look up a route; the answer is None if nobody knows in time."""


class Outbound(Ending, StreamOwner, SpliceOwner):
    """One captured connection, from accept to its end."""

    __slots__ = ("attempts", "outbounds", "relay", "sock", "way")

    def __init__(self, outbounds: "Outbounds", pod: Pod, sock: Socket, record: ConnectionRecord) -> None:
        self.outbounds = outbounds
        self.context = outbounds.context
        self.pod = pod
        self.sock = sock
        self.record = record
        self.way: Way | None = None
        self.relay: AppStream | Splice | None = None
        self.attempts = 0
        self.over_ = False
        pod.connections.add(self)

    @property
    def buffered(self) -> int:
        """Bytes that wait for a slow reader."""
        return self.relay.buffered if self.relay is not None else 0

    def begin(self, ipv4: bool) -> None:
        """Find out where the connection was going, and how it gets there."""
        try:
            key = sockets.original_destination(self.sock, ipv4)
        except OSError:
            self.fail(RouteError(f"port {sockets.OUTBOUND_PORT} takes redirected connections only"))
            return
        ways = self.pod.routes.get(key)
        if ways is not None and not ways.route.error:
            self._go(ways)
            return
        packed, port = sockets.parse_destination(key)
        self.record.dst_addr = host_port(str(ip_address(packed)), port)
        if ways is not None:
            self._go(ways)
        else:
            self.outbounds.ask(self.pod, key, packed, port, self.routed)

    def routed(self, route: Route | None) -> None:
        """The route is known (None: the control process is away)."""
        if self.over_:
            return
        if route is None:
            self.fail(
                ControlUnavailable(
                    f"no route from the control process within {WAIT_TIMEOUT:.0f} s; is it running?"
                )
            )
            return
        self._go(Ways(route))

    def _go(self, ways: Ways) -> None:
        record = self.record
        route = ways.route
        record.dst_service = route.service
        record.service_key = route.service_key
        if route.error:
            self.fail(RouteError(route.error))
            return
        way = self.way = ways.choose(self.context.rng)
        endpoint = way.endpoint
        record.dst_workload = endpoint.workload
        record.dst_namespace = endpoint.namespace
        record.dst_addr = way.address
        if endpoint.workload:
            record.peer = endpoint.address
        if endpoint.hbone:
            record.dst_identity = endpoint.identity
            record.dst_hbone_addr = way.hbone_address
            record.mutual_tls = True
            self._to_tunnel()
        else:
            self._to_plain(endpoint)

    # Into the mesh.

    def _to_tunnel(self) -> None:
        identity = self.pod.identity
        if identity.client is None:
            self.context.connecting.add(self, self.context.reactor.now)
            identity.waiting[self] = self._certified
            return
        self._open()

    def _certified(self) -> None:
        if self.over_:
            return
        self.context.connecting.discard(self)
        self._open()

    def _open(self, fresh: bool = False) -> None:
        way = self.way
        if way is None:
            return
        self.attempts += 1
        try:
            tunnel = self.outbounds.pool.get(self.pod, way.endpoint, fresh)
        except (ConnectFailed, IdentityMissing) as error:
            self.fail(error)
            return
        stream = self.relay
        if not isinstance(stream, AppStream):
            stream = self.relay = AppStream(self.context.reactor, self.sock, self.record, self, WAITING)
        self.context.connecting.add(self, self.context.reactor.now)
        tunnel.open(stream, way.address, self.pod.headers)

    def answered(self, stream: AppStream, status: int) -> None:
        self.context.connecting.discard(self)
        if 200 <= status < 300:
            if stream.tunnel is not None:
                stream.tunnel.served = True
            self.record.established()
            stream.flow()
            return
        peer = stream.tunnel.peer_label() if stream.tunnel is not None else self.record.dst_hbone_addr
        stream.abort(status_error(status, peer))

    def refused(self, stream: AppStream) -> None:
        self._retry(
            stream, ConnectFailed(f"{self.record.dst_hbone_addr}: the peer takes no more streams"), False
        )

    def lost(self, stream: AppStream, error: ProxyError) -> None:
        self._retry(stream, error, True)

    def _retry(self, stream: AppStream, error: ProxyError, fresh: bool) -> None:
        """The tunnel did not serve us; no byte was sent on it, so another may be tried.

        A tunnel that never worked is not tried again: what kept it from working is the news.
        """
        tunnel = stream.tunnel
        if tunnel is not None:
            tunnel.forget(stream)
        stream.tunnel = None
        stream.stream_id = 0
        if self.over_:
            return
        served = tunnel is not None and tunnel.served
        if self.attempts >= ATTEMPTS or (fresh and not served):
            stream.fail(error)
            return
        self._open(fresh=fresh)

    def over(self, stream: AppStream, error: ProxyError | None) -> None:
        self.record.sent += stream.to_peer
        self.record.received += stream.to_app
        self.relay = None  # which knows us: the two would wait for the garbage collector
        self._done(error)

    def connected(self, stream: AppStream) -> None:
        raise AssertionError("an outbound stream's socket is connected from the start")

    def connect_failed(self, stream: AppStream, error: ProxyError) -> None:
        raise AssertionError("an outbound stream's socket is connected from the start")

    # Out of the mesh.

    def _to_plain(self, endpoint: Endpoint) -> None:
        try:
            upstream = sockets.connect(self.pod.netns, endpoint.address, endpoint.port)
        except OSError as error:
            self.fail(tcp_error(self.record.dst_addr, error.errno or 0, error.strerror or str(error)))
            return
        self.relay = Splice(self.context, self.sock, upstream, self.record, self)
        self.context.connecting.add(self, self.context.reactor.now)

    def progress(self) -> None:
        """Count what the connection has moved so far."""
        relay = self.relay
        if isinstance(relay, AppStream):
            self.record.progress(relay.to_peer, relay.to_app)
        elif relay is not None:
            self.record.progress(relay.downstream.taken, relay.upstream.taken)

    def overdue(self) -> None:
        """What this connection waits for did not come: a certificate, the tunnel's peer, or the destination."""
        relay = self.relay
        if relay is None:
            self.fail(IdentityMissing(self.pod.identity.missing))
            return
        what = f"timed out: no answer within {CONNECT_TIMEOUT:.0f} s"
        if isinstance(relay, Splice):
            self.fail(TimedOut(f"{self.record.dst_addr}: {what}; a NetworkPolicy or firewall may block it"))
            return
        tunnel = relay.tunnel
        self.fail(
            TimedOut(
                f"{self.record.dst_hbone_addr}: {what} to the CONNECT for {self.record.dst_addr}; the application "
                "may not take connections, or its node be gone"
            )
        )
        if isinstance(tunnel, ClientTunnel):
            tunnel.retire()  # its peer may be gone without a word: the next connection tries another

    def splice_connected(self, splice: Splice) -> None:
        self.context.connecting.discard(self)
        self.record.established()

    def splice_over(self, splice: Splice, error: ProxyError | None) -> None:
        self.relay = None
        self._done(error)

    # Ends.

    def fail(self, error: ProxyError) -> None:
        """End the connection with a reset, whatever state it is in."""
        if self.relay is not None:
            self.relay.fail(error)
        elif not self.over_:
            self.pod.identity.waiting.pop(self, None)
            sockets.reset(self.sock)
            self._done(error)

    def gone(self) -> None:
        self.outbounds.ended(self.pod)


class Outbounds:
    """Accepts for all pods, and holds what their outbound connections share."""

    def __init__(self, context: Context, pool: Pool, ask: AskRoute, ended: Callable[[Pod], None]) -> None:
        self.context = context
        self.pool = pool
        self.ask = ask
        self.ended = ended

    def accepted(self, pod: Pod, sock: Socket, peer: tuple[str, int]) -> None:
        """A redirected connection of one of the pod's programs."""
        address, source = sockets.peer_name(peer)
        context = self.context
        record = ConnectionRecord(context.logger, context.totals, OUTBOUND, source, pod.counts)
        record.src_workload = pod.name
        record.src_namespace = pod.namespace
        record.src_identity = pod.identity.name
        Outbound(self, pod, sock, record).begin(":" not in address)
