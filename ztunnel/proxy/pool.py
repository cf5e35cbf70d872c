"""The tunnels to other nodes' proxies: one a (pod, destination identity, destination address), shared by the pod's
connections, more of them when one has as many streams as it may.

The pod is part of the key, not only its identity: a tunnel's own source address is what the destination's
application sees as its peer.
"""

import time
from collections.abc import Callable

from OpenSSL import SSL

from ztunnel import hbone
from ztunnel.identity.errors import IdentityError
from ztunnel.identity.tls import check_peer
from ztunnel.inpod import sockets
from ztunnel.inpod.sockets import host_port
from ztunnel.mesh.route import Endpoint
from ztunnel.proxy.context import CONNECT_TIMEOUT, Context, Pod
from ztunnel.proxy.errors import (
    Blocked,
    ConnectFailed,
    IdentityMissing,
    PeerClosed,
    ProxyError,
    TimedOut,
    TlsFailed,
)
from ztunnel.proxy.reactor import Deadlines
from ztunnel.proxy.relay import Carried
from ztunnel.proxy.tunnel import CONNECTING, OPEN, Tunnel

Key = tuple[int, str, str]  # the pod's number, the destination's identity, its address
Headers = tuple[tuple[str, str], ...]


class ClientTunnel(Tunnel):
    """Our end of a tunnel that we opened."""

    __slots__ = (
        "address",
        "credentials",
        "expected",
        "fresh_until",
        "key",
        "limit",
        "not_after",
        "pending",
        "pod",
        "pool",
        "usable",
    )

    def __init__(
        self, pool: "Pool", key: Key, pod: Pod, address: str, tls_context: SSL.Context, limit: int
    ) -> None:
        """Begin to connect. Raises OSError."""
        self.pool = pool
        self.key = key
        self.pod = pod
        self.address = address
        self.expected = key[1]
        self.limit = limit
        self.credentials = tls_context
        # Unix seconds: the end of the first certificate to end, and when new streams go over a new tunnel.
        self.not_after = self.fresh_until = pod.identity.not_after
        self.pending: dict[Carried, tuple[str, Headers]] = {}  # opened once TLS is up
        self.usable = True  # takes new streams
        sock = sockets.connect(pod.netns, address, sockets.INBOUND_HBONE_PORT)
        super().__init__(pool.context, sock, tls_context, hbone.Role.CLIENT, CONNECTING)
        pod.tunnels.add(self)
        pool.context.connecting.add(self, pool.context.reactor.now)

    def peer_label(self) -> str:
        return f"{host_port(self.address, sockets.INBOUND_HBONE_PORT)} ({self.expected})"

    @property
    def load(self) -> int:
        """Streams open or asked for."""
        return len(self.streams) + len(self.pending)

    def open(self, stream: Carried, authority: str, headers: Headers) -> None:
        """Ask the peer for a stream to `authority`; the stream's owner hears the answer."""
        self.pool.idle.discard(self)
        if self.state == OPEN:
            self._open(stream, authority, headers)
        else:
            stream.tunnel = self
            self.pending[stream] = (authority, headers)

    def _open(self, stream: Carried, authority: str, headers: Headers) -> None:
        try:
            stream_id = self.h2.open_stream(authority, headers)
        except hbone.CannotOpen:
            # The peer takes fewer than we hoped: this one needs another tunnel.
            self.limit = min(self.limit, len(self.streams))
            stream.tunnel = None
            stream.refused()
            return
        stream.bind(self, stream_id)
        self.reactor.dirty.add(self)

    def forget(self, stream: Carried) -> None:
        if self.pending.pop(stream, None) is None:
            super().forget(stream)
        elif self.state == OPEN:
            self.on_stream_gone()

    def handshaken(self) -> None:
        try:
            peer = check_peer(self.engine.connection, self.pool.context.trust_domain, (self.expected,))
        except IdentityError as error:
            raise TlsFailed(f"{self.peer_label()}: {error}") from None
        now = time.time()
        self.not_after = min(self.not_after, peer.not_after)
        self.fresh_until = now + (self.not_after - now) / 2

    def opened(self) -> None:
        self.context.connecting.discard(self)
        while self.pending and self.state == OPEN:
            stream = next(iter(self.pending))
            authority, headers = self.pending.pop(stream)
            self._open(stream, authority, headers)
        self.on_stream_gone()

    def overdue(self) -> None:
        """The peer's node does not answer."""
        kind = Blocked if self.state == CONNECTING else TimedOut
        self.fail(
            kind(
                f"{self.peer_label()}: no answer within {CONNECT_TIMEOUT:.0f} s; a NetworkPolicy or firewall may "
                f"block port {sockets.INBOUND_HBONE_PORT} between the nodes"
            )
        )

    def on_connect_request(self, event: hbone.ConnectRequested) -> None:
        # The codec refuses requests of a server; nothing can come here.
        self.fail(ProxyError("a server asked for a stream"))

    def on_settings(self, max_streams: int) -> None:
        self.limit = min(self.pool.max_streams, max_streams)

    def on_goaway(self) -> None:
        self.retire()

    def retire(self) -> None:
        """Carry what is open to its end, and no more."""
        self.usable = False
        self.pool.remove(self)
        if not self.load:
            self.close()

    def on_stream_gone(self) -> None:
        if not self.streams and not self.pending and self.state == OPEN:
            if self.usable and self.pod.accepting:
                self.pool.idle.add(self, self.reactor.now)
            else:
                self.retire()

    def on_closed(self, error: ProxyError | None) -> None:
        self.usable = False
        self.context.connecting.discard(self)
        self.pool.remove(self)
        self.pod.tunnels.discard(self)
        pending = list(self.pending)
        self.pending.clear()
        for stream in pending:
            stream.tunnel_failed(error or PeerClosed(f"the tunnel with {self.peer_label()} was closed"))
        self.pool.ended(self.pod)


class Pool:
    """Finds or makes the tunnel for a connection."""

    def __init__(
        self,
        context: Context,
        ended: Callable[[Pod], None],
        max_streams: int = 100,
        idle_seconds: float = 300.0,
    ) -> None:
        """At most `max_streams` streams a tunnel; one without streams is closed after `idle_seconds`.

        `ended(pod)` is told of each tunnel that ended.
        """
        self.context = context
        self.ended = ended
        self.max_streams = max_streams
        self.idle: Deadlines[ClientTunnel] = Deadlines(idle_seconds, self._unused)
        self._tunnels: dict[Key, list[ClientTunnel]] = {}

    def __len__(self) -> int:
        return sum(len(tunnels) for tunnels in self._tunnels.values())

    def _unused(self, tunnel: ClientTunnel) -> None:
        self.context.reactor.guard(tunnel.retire)

    def get(self, pod: Pod, endpoint: Endpoint, fresh: bool = False) -> ClientTunnel:
        """A tunnel of `pod` to the endpoint with room for one more stream.

        With `fresh` one that is only being made: another of the same peer's has just been found dead. Raises
        ConnectFailed, IdentityMissing.
        """
        client = pod.identity.client
        if client is None:
            raise IdentityMissing(pod.identity.missing)
        key = (pod.number, endpoint.identity, endpoint.address)
        now = time.time()
        for tunnel in tuple(self._tunnels.get(key, ())):
            if tunnel.credentials is not client or tunnel.fresh_until <= now:
                tunnel.retire()  # one of its certificates was renewed since, or should have been
            elif len(tunnel.streams) + len(tunnel.pending) < tunnel.limit and not (
                fresh and tunnel.state == OPEN
            ):
                return tunnel
        try:
            tunnel = ClientTunnel(self, key, pod, endpoint.address, client, self.max_streams)
        except OSError as error:
            label = host_port(endpoint.address, sockets.INBOUND_HBONE_PORT)
            raise ConnectFailed(f"{label}: {error.strerror}") from None
        self._tunnels.setdefault(key, []).append(tunnel)
        return tunnel

    def remove(self, tunnel: ClientTunnel) -> None:
        """Give no more streams to this tunnel."""
        self.idle.discard(tunnel)
        tunnels = self._tunnels.get(tunnel.key)
        if tunnels is not None and tunnel in tunnels:
            tunnels.remove(tunnel)
            if not tunnels:
                del self._tunnels[tunnel.key]

    def release(self, pod: Pod | None = None) -> None:
        """Give no more streams to the tunnels of `pod` (all if None); each closes with its last stream."""
        for key, tunnels in list(self._tunnels.items()):
            if pod is None or key[0] == pod.number:
                for tunnel in list(tunnels):
                    tunnel.retire()
