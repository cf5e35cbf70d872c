"""Connections to a pod: HBONE tunnels on port 15008, and plaintext that the rules redirected to port 15006.

The application sees the client's own address as its peer in both cases (a transparent socket).
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from OpenSSL import SSL

from ztunnel import hbone
from ztunnel.identity.errors import IdentityError
from ztunnel.identity.spiffe import SpiffeId
from ztunnel.identity.tls import check_peer
from ztunnel.inpod import sockets
from ztunnel.inpod.sockets import Socket, host_port
from ztunnel.proxy.context import CONNECT_TIMEOUT, Context, Ending, Pod
from ztunnel.proxy.enforcement import Enforcement, Facts, Judged
from ztunnel.proxy.errors import (
    Denied,
    IdentityMissing,
    ProxyError,
    RequestRefused,
    RouteError,
    TimedOut,
    TlsFailed,
    tcp_error,
)
from ztunnel.proxy.peers import Questions
from ztunnel.proxy.relay import CONNECTING, FLOWING, AppStream, StreamOwner
from ztunnel.proxy.splice import Splice, SpliceOwner
from ztunnel.proxy.tunnel import HANDSHAKE, OPEN, Tunnel
from ztunnel.telemetry.access import INBOUND, ConnectionRecord
from ztunnel.telemetry.log import timestamp

LONGEST_AUTHORITY = 255  # characters of what a peer asked for that go into the log
LONGEST_NAME = 253  # characters of the name that a peer gives its pod
LONGEST_CACHED = 1024  # characters of a header that is remembered with its meaning


class ServerTunnel(Tunnel):
    """Our end of a tunnel that another proxy opened to one of our pods."""

    __slots__ = (
        "client",
        "client_name",
        "client_namespace",
        "drain_at",
        "inbounds",
        "not_after",
        "peer",
        "pod",
        "source",
    )

    def __init__(
        self,
        inbounds: "Inbounds",
        pod: Pod,
        sock: Socket,
        peer: tuple[str, int],
        tls_context: SSL.Context,
    ) -> None:
        self.inbounds = inbounds
        self.pod = pod
        self.source, self.peer = sockets.peer_name(peer)
        self.client: SpiffeId | None = None
        self.client_name = self.client_namespace = ""  # known once it is `opened`
        # Unix seconds: the end of the first certificate to end, and when the peer is told to make another tunnel.
        self.not_after = self.drain_at = pod.identity.not_after
        super().__init__(inbounds.context, sock, tls_context, hbone.Role.SERVER, HANDSHAKE)
        pod.tunnels.add(self)
        inbounds.tunnels.add(self)
        self.context.connecting.add(self, self.reactor.now)
        pod.handshakes[self] = self.reactor.now

    def peer_label(self) -> str:
        return self.peer if self.client is None else f"{self.peer} ({self.client})"

    def handshaken(self) -> None:
        try:
            peer = check_peer(self.engine.connection, self.inbounds.context.trust_domain, None)
        except IdentityError as error:
            raise TlsFailed(f"{self.peer_label()}: {error}") from None
        now = time.time()
        self.client = peer.identity
        self.not_after = min(self.not_after, peer.not_after)
        self.drain_at = now + (self.not_after - now) * 0.9
        self.client_name = str(self.client)
        self.client_namespace = self.client.namespace

    def opened(self) -> None:
        self.context.connecting.discard(self)
        self.pod.handshakes.pop(self, None)
        if not self.pod.accepting:
            self.drain()

    def overdue(self) -> None:
        """The peer never finished TLS."""
        self.fail(
            TlsFailed(
                f"{self.peer_label()}: TLS handshake timed out: not finished in {CONNECT_TIMEOUT:.0f} s"
            )
        )

    def on_connect_request(self, event: hbone.ConnectRequested) -> None:
        self.served = True
        self.inbounds.serve(self, event)

    def on_stream_gone(self) -> None:
        if self.going:
            self._close_if_over()

    def on_closed(self, error: ProxyError | None) -> None:
        context = self.context
        context.connecting.discard(self)
        self.pod.handshakes.pop(self, None)
        self.pod.tunnels.discard(self)
        self.inbounds.tunnels.discard(self)
        if error is not None and not self.served and not context.draining:
            # No connection was opened in it, so no record says why: refused handshakes are news.
            record = context.record(INBOUND, self.peer, self.pod)
            record.peer = self.source
            record.dst_workload = self.pod.name
            record.dst_namespace = self.pod.namespace
            record.dst_identity = self.pod.identity.name
            record.dst_addr = f":{sockets.INBOUND_HBONE_PORT}"
            if self.client is not None:
                record.src_identity = self.client_name
                record.src_namespace = self.client_namespace
            record.finish(error)
        self.inbounds.ended(self.pod)

    def drain(self) -> None:
        """Tell the peer to open its next streams elsewhere; close once none is left.

        What the peer opened before it knew is served still: the second GOAWAY, which ends that, follows when the
        peer has answered the first, or after CLOSE_TIMEOUT.
        """
        if self.state == OPEN and not self.going:
            self.going = True
            self.h2.go_away(graceful=True)
            self.context.closing.add(self, self.reactor.now)
            self.reactor.dirty.add(self)

    def close_overdue(self) -> None:
        if self.state == OPEN:
            self.h2.go_away()
            self.reactor.dirty.add(self)
            self._close_if_over()
        else:
            super().close_overdue()


class Inbound(Ending, StreamOwner, Judged):
    """One CONNECT that a peer asked for, from the request to its end."""

    __slots__ = ("inbounds", "origin", "stream", "tunnel")

    def __init__(self, inbounds: "Inbounds", tunnel: ServerTunnel) -> None:
        self.inbounds = inbounds
        self.context = inbounds.context
        self.tunnel = tunnel
        self.pod = tunnel.pod
        context = self.context
        pod = tunnel.pod
        record = self.record = ConnectionRecord(
            context.logger, context.totals, INBOUND, tunnel.peer, pod.counts
        )
        record.peer = tunnel.source
        record.src_identity = tunnel.client_name
        record.src_namespace = tunnel.client_namespace
        record.dst_workload = pod.name
        record.dst_namespace = pod.namespace
        record.dst_identity = pod.identity.name
        record.mutual_tls = True
        self.stream: AppStream | None = None
        self.origin = tunnel.source  # whom the application sees
        self.over_ = False
        pod.connections.add(self)

    def begin(self, event: hbone.ConnectRequested) -> None:
        """Check the request and connect to the application."""
        self.record.dst_addr = event.authority[:LONGEST_AUTHORITY]
        if event.headers:
            self._read(event.headers)
        try:
            if self.pod.identity.server is None:
                raise RequestRefused(503, self.pod.identity.missing)
            if self.tunnel.not_after <= time.time():
                raise RequestRefused(
                    401,
                    f"the tunnel is older than a certificate of its handshake, which ended at "
                    f"{timestamp(self.tunnel.not_after)}: {self.tunnel.peer_label()} has to open another",
                )
            if len(self.pod.connections) > self.context.pod_connections:
                raise RequestRefused(
                    503, f"the pod holds {self.context.pod_connections} connections, POD_CONNECTION_LIMIT"
                )
            address, port = parse_authority(event.authority)
            self.record.port = port
            if not self._owns(address):
                raise RequestRefused(
                    400,
                    f"CONNECT {event.authority}: not an address of pod {self.pod.namespace}/{self.pod.name}",
                )
            self.inbounds.questions.name(self.pod, self.record)
            if port in sockets.MESH_PORTS:
                raise RequestRefused(400, f"CONNECT {event.authority}: port {port} is the mesh's own")
            tunnel = self.tunnel
            judgement = self.inbounds.enforcement.judge(
                self.pod, tunnel.client_name, tunnel.source, address, port
            )
            judgement.source_workload = self.record.src_workload
            self.record.dry_run = judgement.rehearsal
            if not judgement.verdict.allowed:
                self._refuse(event.stream_id, 401, judgement.refuse())
                return
            sock, connected = self._connect(address, port)
        except RequestRefused as error:
            self._refuse(event.stream_id, error.status, error)
            return
        context = self.context
        # What a program sends first is an event of the reactor's in either state: there is nothing to read now.
        state = FLOWING if connected else CONNECTING
        stream = self.stream = AppStream(context.reactor, sock, self.record, self, state)
        stream.bind(tunnel, event.stream_id)
        if connected:
            self.record.established()
            tunnel.h2.respond(event.stream_id, 200)
            context.reactor.dirty.add(tunnel)
        else:
            context.connecting.add(self, context.reactor.now)

    def facts(self) -> Facts | None:
        """Who asked for what."""
        if self.stream is None:
            return None
        return self.tunnel.client_name, self.tunnel.source, *parse_authority(self.record.dst_addr)

    def _owns(self, address: str) -> bool:
        try:
            return self.pod.owns(address)
        except OSError as error:
            raise RequestRefused(503, f"{self.record.dst_addr}: {error.strerror or error}") from None

    def _connect(self, address: str, port: int) -> tuple[Socket, bool]:
        """Begin to connect, or be connected already."""
        sock = None
        try:
            sock = sockets.connect(self.pod.netns, address, port, self.origin)
            return sock, sockets.connected(sock, address, port)
        except OSError as error:
            if sock is not None:
                sock.close()
            failed = tcp_error(host_port(address, port), error.errno or 0, error.strerror or str(error))
            raise RequestRefused(503, str(failed)) from None

    def _read(self, headers: hbone.Headers) -> None:
        """Take the peer's word for the name of its pod (W3C baggage): for logs only, never for decisions.

        And a waypoint's of this pod for whom it speaks (RFC 7239): the application sees that address, while policies
        look at the waypoint's.
        """
        for name, value in headers:
            if name == "baggage":
                name_given = pod_name(value)
                if name_given is not None:
                    self.record.src_workload = name_given
            elif name == "forwarded" and self.tunnel.client_name in self.pod.waypoints:
                self.origin = forwarded_for(value) or self.origin

    def progress(self) -> None:
        """Count what the connection has moved so far."""
        stream = self.stream
        if stream is not None:
            self.record.progress(stream.to_app, stream.to_peer)

    def _refuse(self, stream_id: int, status: int, error: ProxyError | None) -> None:
        self._answer_error(stream_id, status)
        self._done(error)

    def _answer_error(self, stream_id: int, status: int) -> None:
        h2 = self.tunnel.h2
        h2.respond(stream_id, status, end_stream=True)
        h2.reset_stream(stream_id, 0)  # NO_ERROR: the answer is complete, send no more (RFC 9113, 8.1)
        self.context.reactor.dirty.add(self.tunnel)

    def connected(self, stream: AppStream) -> None:
        code = stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.connect_failed(stream, tcp_error(self.record.dst_addr, code, os.strerror(code)))
            return
        self.context.connecting.discard(self)
        self.record.established()
        self.tunnel.h2.respond(stream.stream_id, 200)
        self.context.reactor.dirty.add(self.tunnel)
        stream.flow()

    def connect_failed(self, stream: AppStream, error: ProxyError) -> None:
        """The application cannot be reached, or must not be any more: the peer resets its client."""
        self._answer_error(stream.stream_id, 401 if isinstance(error, Denied) else 503)
        stream.end(error)

    def overdue(self) -> None:
        """The application does not answer."""
        self.fail(
            TimedOut(
                f"{self.record.dst_addr}: timed out: no answer from the application in {CONNECT_TIMEOUT:.0f} s"
            )
        )

    def answered(self, stream: AppStream, status: int) -> None:
        raise AssertionError("a server's stream is not answered")

    def refused(self, stream: AppStream) -> None:
        raise AssertionError("a server's stream is not refused")

    def lost(self, stream: AppStream, error: ProxyError) -> None:
        raise AssertionError("a server's stream does not wait for an answer")

    def over(self, stream: AppStream, error: ProxyError | None) -> None:
        self.record.sent += stream.to_app
        self.record.received += stream.to_peer
        self.stream = None  # which knows us: the two would wait for the garbage collector
        self._done(error)

    def fail(self, error: ProxyError) -> None:
        """End the connection now."""
        stream = self.stream
        if stream is None:
            self._done(error)
        elif stream.state == CONNECTING:
            self.connect_failed(stream, error)
        else:
            stream.abort(error)

    @property
    def buffered(self) -> int:
        """Bytes that wait for the application."""
        return self.stream.buffered if self.stream is not None else 0

    def gone(self) -> None:
        self.inbounds.ended(self.pod)


class Plaintext(Ending, SpliceOwner, Judged):
    """One connection from outside the mesh, captured on 15006 and passed on to the application as plain TCP."""

    __slots__ = ("destination", "inbounds", "sock", "source", "splice")

    def __init__(self, inbounds: "Inbounds", pod: Pod, sock: Socket, record: ConnectionRecord) -> None:
        self.inbounds = inbounds
        self.context = inbounds.context
        self.pod = pod
        self.sock = sock
        self.record = record
        self.splice: Splice | None = None
        self.source = ""
        self.destination = ("", 0)
        self.over_ = False
        pod.connections.add(self)

    def begin(self, source: str, ipv4: bool) -> None:
        """Connect to where the client was going."""
        self.source = source
        try:
            packed, port = sockets.parse_destination(sockets.original_destination(self.sock, ipv4))
        except OSError:
            self.fail(RouteError(f"port {sockets.INBOUND_PLAINTEXT_PORT} takes redirected connections only"))
            return
        address = str(ip_address(packed))
        self.record.dst_addr = host_port(address, port)
        self.record.peer = source
        self.record.port = port
        if port in sockets.MESH_PORTS:
            self.fail(RouteError(f"{self.record.dst_addr}: port {port} is the mesh's own"))
            return
        try:
            if not self.pod.owns(address):
                self.fail(
                    RouteError(
                        f"{self.record.dst_addr}: not an address of pod {self.pod.namespace}/{self.pod.name}"
                    )
                )
                return
            self.inbounds.questions.name(self.pod, self.record)
            self.destination = (address, port)
            judgement = self.inbounds.enforcement.judge(self.pod, "", source, address, port)
            self.record.dry_run = judgement.rehearsal
            refusal = judgement.refuse()
            if refusal is not None:
                self.fail(refusal)
                return
            upstream = sockets.connect(self.pod.netns, address, port, source)
        except OSError as error:
            self.fail(tcp_error(self.record.dst_addr, error.errno or 0, error.strerror or str(error)))
            return
        self.splice = Splice(self.context, self.sock, upstream, self.record, self)
        self.context.connecting.add(self, self.context.reactor.now)

    def overdue(self) -> None:
        """The application does not answer."""
        self.fail(
            TimedOut(
                f"{self.record.dst_addr}: timed out: no answer from the application in {CONNECT_TIMEOUT:.0f} s"
            )
        )

    def progress(self) -> None:
        """Count what the connection has moved so far."""
        splice = self.splice
        if splice is not None:
            self.record.progress(splice.downstream.taken, splice.upstream.taken)

    @property
    def buffered(self) -> int:
        """Bytes that wait for a slow reader."""
        return self.splice.buffered if self.splice is not None else 0

    def facts(self) -> Facts | None:
        """Who went where."""
        return ("", self.source, *self.destination) if self.splice is not None else None

    def splice_connected(self, splice: Splice) -> None:
        self.context.connecting.discard(self)
        self.record.established()

    def splice_over(self, splice: Splice, error: ProxyError | None) -> None:
        self.splice = None
        self._done(error)

    def fail(self, error: ProxyError) -> None:
        """End the connection with a reset."""
        if self.splice is not None:
            self.splice.fail(error)
        elif not self.over_:
            sockets.reset(self.sock)
            self._done(error)

    def gone(self) -> None:
        self.inbounds.ended(self.pod)


class Inbounds:
    """Accepts for all pods, and holds what their inbound connections share."""

    def __init__(
        self,
        context: Context,
        enforcement: Enforcement,
        ended: Callable[[Pod], None],
        questions: Questions,
    ) -> None:
        self.context = context
        self.enforcement = enforcement
        self.ended = ended
        self.questions = questions
        self.tunnels: set[ServerTunnel] = set()

    def accepted_hbone(self, pod: Pod, sock: Socket, peer: tuple[str, int]) -> None:
        """A peer's new tunnel."""
        context = pod.identity.server
        if context is None:
            source, name = sockets.peer_name(peer)
            record = self.context.record(INBOUND, name, pod)
            record.peer = source
            record.dst_workload = pod.name
            record.dst_namespace = pod.namespace
            record.dst_identity = pod.identity.name
            sockets.reset(sock)
            record.finish(IdentityMissing(pod.identity.missing))
            return
        ServerTunnel(self, pod, sock, peer, context).on_event(0)

    def accepted_plaintext(self, pod: Pod, sock: Socket, peer: tuple[str, int]) -> None:
        """A client outside the mesh."""
        source, name = sockets.peer_name(peer)
        record = self.context.record(INBOUND, name, pod)
        record.dst_workload = pod.name
        record.dst_namespace = pod.namespace
        record.dst_identity = pod.identity.name
        Plaintext(self, pod, sock, record).begin(source, ":" not in source)

    def serve(self, tunnel: ServerTunnel, event: hbone.ConnectRequested) -> None:
        """A peer asks for a connection."""
        Inbound(self, tunnel).begin(event)

    def drain(self, pod: Pod) -> None:
        """GOAWAY to all peers of the pod."""
        for tunnel in [one for one in self.tunnels if one.pod is pod]:
            tunnel.drain()


@lru_cache(maxsize=1024)
def parse_authority(authority: str) -> tuple[str, int]:
    """The address and port of an `:authority`. Raises RequestRefused (400) unless it is `ip:port` or `[ip]:port`."""
    host, _, digits = authority.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    address: IPv4Address | IPv6Address | None = None
    if digits.isascii() and digits.isdigit() and len(digits) <= 5:
        with contextlib.suppress(ValueError):
            address = IPv6Address(host[1:-1]) if bracketed else IPv4Address(host)
    port = int(digits) if address is not None else 0
    if address is None or not 0 < port < 65536:
        raise RequestRefused(
            400, f"CONNECT {authority[:LONGEST_AUTHORITY]!r}: expected the pod's ip:port, IPv6 in brackets"
        )
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped  # 127.0.0.1 is what it is in this disguise, too
    if (
        address.is_loopback
        or address.is_unspecified
        or address.is_multicast
        or getattr(address, "scope_id", None) is not None
    ):
        raise RequestRefused(400, f"CONNECT {authority}: not an address of a pod")
    return str(address), port


@lru_cache(maxsize=1024)
def forwarded_for(header: str) -> str:
    """The address that a `forwarded` header names first (RFC 7239, 4), "" if it is none of a host."""
    for pair in header.partition(",")[0].split(";"):
        name, _, node = pair.strip().partition("=")
        if name.lower() == "for":
            node = node.strip('"')
            host = node[1:].partition("]")[0] if node.startswith("[") else node
            if host.count(":") == 1:
                host = host.partition(":")[0]
            with contextlib.suppress(ValueError):
                address = ip_address(host)
                if not (address.is_loopback or address.is_unspecified or address.is_multicast):
                    return str(address)
    return ""


def _find_pod_name(baggage: str) -> str | None:
    """The name of the source's pod in a baggage header, None if there is none."""
    found = None
    for item in baggage.split(","):
        key, _, word = item.strip().partition("=")
        if key == "k8s.pod.name":
            found = word[:LONGEST_NAME]
    return found


_pod_name_cached = lru_cache(maxsize=1024)(_find_pod_name)


def pod_name(baggage: str) -> str | None:
    # What is long is not kept, so that what peers send cannot fill the memory.
    return _pod_name_cached(baggage) if len(baggage) <= LONGEST_CACHED else _find_pod_name(baggage)
