"""Connections through the waypoint: a CONNECT that a node's proxy asks for, from the request to its end.

What is asked for is judged by the policies that target the waypoint or the service, with the identity that the peer
has proved; then it leaves in a tunnel to the endpoint's node, under the waypoint's own identity, or in plain TCP where
the endpoint is in no mesh. An endpoint that cannot be reached is another's turn, as long as nothing was sent.
"""

import socket
import time
from collections.abc import Callable
from functools import lru_cache
from ipaddress import ip_address
from os import strerror
from typing import Final, NamedTuple

from waypoint.leg import Leg
from ztunnel import hbone
from ztunnel.hbone import LocalError
from ztunnel.inpod import sockets
from ztunnel.mesh.model import packed_ip
from ztunnel.mesh.route import Route
from ztunnel.proxy.context import CONNECT_TIMEOUT, WAIT_TIMEOUT, Context, Ending, Pod
from ztunnel.proxy.enforcement import Enforcement, Facts, Judged
from ztunnel.proxy.errors import (
    ConnectFailed,
    ControlUnavailable,
    Denied,
    IdentityMissing,
    ProxyError,
    RequestRefused,
    TimedOut,
    tcp_error,
)
from ztunnel.proxy.inbound import LONGEST_AUTHORITY, Inbounds, ServerTunnel, pod_name
from ztunnel.proxy.outbound import AskRoute
from ztunnel.proxy.peers import Questions
from ztunnel.proxy.pool import ClientTunnel, Pool
from ztunnel.proxy.relay import CONNECTING, AppStream, StreamOwner, status_error
from ztunnel.proxy.routes import Way, Ways
from ztunnel.telemetry.access import WAYPOINT, ConnectionRecord
from ztunnel.telemetry.counting import Counts
from ztunnel.telemetry.log import timestamp

ATTEMPTS: Final = 3  # endpoints, or tunnels to one, tried for one connection

BAD_REQUEST: Final = 400
DENIED: Final = 401
UNAVAILABLE: Final = 503


class Subject(NamedTuple):
    """What policies are for, here: a service behind the waypoint, or the waypoint itself."""

    number: int
    namespace: str
    name: str


class Passage(Ending, StreamOwner, Judged):
    """One connection. `inward` is the client's stream; `outward` the one to the endpoint, or `plain` its socket."""

    __slots__ = (
        "address",
        "attempts",
        "inward",
        "opened",
        "outward",
        "passages",
        "plain",
        "port",
        "subject",
        "tried",
        "tunnel",
        "way",
        "ways",
    )

    def __init__(self, passages: "Passages", tunnel: ServerTunnel, stream_id: int) -> None:
        self.passages = passages
        self.context = context = passages.context
        self.tunnel = tunnel
        self.pod = tunnel.pod
        self.record = record = ConnectionRecord(
            context.logger, context.totals, WAYPOINT, tunnel.peer, passages.counts("", "", "")
        )
        record.peer = tunnel.source
        record.src_identity = tunnel.client_name
        record.src_namespace = tunnel.client_namespace
        record.mutual_tls = True
        self.subject = Subject(self.pod.number, self.pod.namespace, self.pod.name)
        self.address = ""
        self.port = 0
        self.ways: Ways | None = None
        self.way: Way | None = None
        self.attempts = 0
        self.tried: set[Way] = set()
        self.over_ = False
        self.opened = False  # the client was answered: bytes flow
        self.plain: AppStream | None = None
        self.outward: Leg | None = None
        self.inward = Leg(self)
        self.inward.bind(tunnel, stream_id)
        self.pod.connections.add(self)

    # Where to.

    def begin(self, event: hbone.ConnectRequested) -> None:
        """Check the request and find out where it goes."""
        record = self.record
        record.dst_addr = event.authority[:LONGEST_AUTHORITY]
        for name, value in event.headers:
            if name == "baggage":
                record.src_workload = pod_name(value) or ""
        self.context.connecting.add(self, self.context.reactor.now)
        if self.pod.identity.server is None:
            self.fail(RequestRefused(UNAVAILABLE, self.pod.identity.missing))
        elif self.tunnel.not_after <= time.time():
            self.fail(
                RequestRefused(
                    DENIED,
                    "the tunnel is older than a certificate of its handshake, which ended at "
                    f"{timestamp(self.tunnel.not_after)}: {self.tunnel.peer_label()} has to open another",
                )
            )
        elif len(self.pod.connections) > self.context.pod_connections:
            limit = self.context.pod_connections
            self.fail(
                RequestRefused(UNAVAILABLE, f"the waypoint holds {limit} connections, POD_CONNECTION_LIMIT")
            )
        else:
            try:
                self.address, self.port = parse_target(event.authority)
            except RequestRefused as error:
                self.fail(error)
                return
            self._route(event.authority)

    def _route(self, authority: str) -> None:
        key = authority.encode()
        ways = self.pod.routes.get(key)
        if ways is not None:
            self._judge(ways)
        else:
            self.passages.ask(self.pod, key, key, 0, self.routed)

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
        self._judge(Ways(route))

    def _judge(self, ways: Ways) -> None:
        route = ways.route
        self.ways = ways
        record = self.record
        record.dst_service = route.service
        record.service_key = route.service_key
        if route.subject:
            namespace, _, name = route.service_key.partition("/")
            self.subject = Subject(route.subject, namespace, name)
        if route.error:
            self.fail(RequestRefused(route.status or UNAVAILABLE, route.error))
        elif not self.passages.enforcement.knows(self.subject.number):
            self.passages.unjudged[self] = None
        else:
            self.go()

    def go(self) -> None:
        """The destination's policies are known: judge, and open the way out."""
        if self.over_ or self.ways is None:
            return
        facts = self.facts()
        if facts is not None:
            judgement = self.passages.enforcement.judge(self.subject, *facts)
            judgement.source_workload = self.record.src_workload
            self.record.dry_run = judgement.rehearsal
            refusal = judgement.refuse()
            if refusal is not None:
                self.fail(refusal)
                return
        self._open()

    def facts(self) -> Facts | None:
        """Who asked for what. A hostname is known by no address: rules about addresses see the unspecified one."""
        if self.ways is None or self.over_:
            return None
        address = self.address if is_address(self.address) else "0.0.0.0"  # noqa: S104 - compared, not bound
        return self.tunnel.client_name, self.tunnel.source, address, self.port

    # The way out.

    def _open(self) -> None:
        """Try an endpoint, not one that was tried if there is another."""
        ways = self.ways
        if ways is None:
            return
        self.attempts += 1
        way = ways.choose(self.context.rng)
        for _ in range(ATTEMPTS):
            if way not in self.tried:
                break
            way = ways.choose(self.context.rng)
        self.way = way
        endpoint = way.endpoint
        record = self.record
        record.dst_workload = endpoint.workload
        record.dst_namespace = endpoint.namespace
        record.dst_addr = way.address
        record.dst_identity = endpoint.identity
        record.dst_hbone_addr = way.hbone_address
        record.counts = self.passages.counts(endpoint.namespace, endpoint.workload, endpoint.identity)
        if endpoint.hbone:
            self._to_tunnel(way)
        else:
            self._to_plain(way)

    def _to_tunnel(self, way: Way, fresh: bool = False) -> None:
        try:
            tunnel = self.passages.pool.get(self.pod, way.endpoint, fresh)
        except (ConnectFailed, IdentityMissing) as error:
            self._elsewhere(error)
            return
        leg = self.outward = Leg(self)
        leg.other, self.inward.other = self.inward, leg
        source = self.tunnel.source
        forwarded = f'for="[{source}]"' if ":" in source else f"for={source}"
        tunnel.open(leg, way.address, (*self.pod.headers, ("forwarded", forwarded)))

    def _to_plain(self, way: Way) -> None:
        endpoint = way.endpoint
        try:
            sock = sockets.connect(self.pod.netns, endpoint.address, endpoint.port)
        except OSError as error:
            self._elsewhere(tcp_error(way.address, error.errno or 0, error.strerror or str(error)))
            return
        self.plain = AppStream(self.context.reactor, sock, self.record, self, CONNECTING)

    def _elsewhere(self, error: ProxyError) -> None:
        """The endpoint did not take the connection, of which nothing was sent: another's turn, if there is one."""
        if self.over_:
            return
        if self.way is not None:
            self.tried.add(self.way)
        ways = self.ways
        if ways is None or self.attempts >= ATTEMPTS or len(self.tried) >= len(ways.route.endpoints):
            self.fail(error)
            return
        self._open()

    # What the streams tell.

    def leg_answered(self, leg: Leg, status: int) -> None:
        """The endpoint's proxy answered."""
        tunnel = leg.tunnel
        if leg is not self.outward or tunnel is None or self.over_:
            return
        if not 200 <= status < 300:
            self._drop_outward(reset=True)
            error = status_error(status, tunnel.peer_label())
            if isinstance(error, Denied):
                self.fail(error)
            else:
                self._elsewhere(error)
            return
        tunnel.served = True
        self.context.connecting.discard(self)
        self.opened = True
        self.record.established()
        self.tunnel.h2.respond(self.inward.stream_id, 200)
        self.context.reactor.dirty.add(self.tunnel)
        self.inward.flow()
        leg.flow()
        self.inward.drain()
        leg.drain()

    def leg_refused(self, leg: Leg) -> None:
        """The endpoint's proxy takes no more streams on this tunnel."""
        if leg is self.outward and self.way is not None:
            self._again(ConnectFailed(f"{self.record.dst_hbone_addr}: the peer takes no more streams"), False)

    def leg_lost(self, leg: Leg, error: ProxyError) -> None:
        """A stream or its tunnel is gone."""
        if leg is self.outward and not self.opened:
            self._again(error, True)
            return
        self.fail(error)

    def _again(self, error: ProxyError, fresh: bool) -> None:
        """Nothing was sent on the way out: once more, over another tunnel or to another endpoint."""
        tunnel = self.outward.tunnel if self.outward is not None else None
        served = tunnel is not None and tunnel.served
        self._drop_outward(reset=False)
        way = self.way
        if self.over_ or way is None:
            return
        if (fresh and not served) or self.attempts >= ATTEMPTS:
            self._elsewhere(error)
            return
        self.attempts += 1
        self._to_tunnel(way, fresh)

    def _drop_outward(self, *, reset: bool) -> None:
        leg, self.outward = self.outward, None
        self.inward.other = None
        if leg is not None:
            leg.other = None
            leg.close(reset)

    def legs_finished(self) -> None:
        """Both directions ended in order."""
        self._end(None)

    # What the plain socket tells: it is then the client's stream itself that it is joined with.

    def connected(self, stream: AppStream) -> None:
        code = stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.connect_failed(stream, tcp_error(self.record.dst_addr, code, strerror(code)))
            return
        self.context.connecting.discard(self)
        self.opened = True
        self.record.established()
        self.inward.hand_over(stream)
        self.tunnel.h2.respond(stream.stream_id, 200)
        self.context.reactor.dirty.add(self.tunnel)
        stream.flow()

    def connect_failed(self, stream: AppStream, error: ProxyError) -> None:
        self.plain = None
        stream.end(error)
        self._elsewhere(error)

    def over(self, stream: AppStream, error: ProxyError | None) -> None:
        if stream is not self.plain:
            return  # an attempt that failed
        self.record.sent += stream.to_app
        self.record.received += stream.to_peer
        self.plain = None
        self._done(error)

    def answered(self, stream: AppStream, status: int) -> None:
        raise AssertionError("a server's stream is not answered")

    def refused(self, stream: AppStream) -> None:
        raise AssertionError("a server's stream is not refused")

    def lost(self, stream: AppStream, error: ProxyError) -> None:
        raise AssertionError("a server's stream does not wait for an answer")

    # Ends.

    def progress(self) -> None:
        """Count what the connection has moved so far."""
        plain, outward = self.plain, self.outward
        if plain is not None:
            self.record.progress(plain.to_app, plain.to_peer)
        elif outward is not None and self.opened:
            self.record.progress(self.inward.received, outward.received)

    def live(self) -> dict[str, object]:
        """For the page of the connections: what has moved so far."""
        plain, outward, record = self.plain, self.outward, self.record
        moved = (record.sent, record.received)
        if plain is not None:
            moved = (plain.to_app, plain.to_peer)
        elif outward is not None:
            moved = (self.inward.received, outward.received)
        return {
            "bytes_sent": moved[0],
            "bytes_recv": moved[1],
            "buffered": self.buffered,
            "seconds": round(record.age, 3),
            "state": "open" if self.opened else "connecting",
        }

    @property
    def buffered(self) -> int:
        """Bytes that wait for a slow reader."""
        legs = (self.inward, self.outward, self.plain)
        return sum(one.buffered for one in legs if one is not None)

    def overdue(self) -> None:
        """What this connection waits for did not come."""
        what = f"timed out: no answer within {CONNECT_TIMEOUT:.0f} s"
        where = self.record.dst_hbone_addr or self.record.dst_addr
        tunnel = self.outward.tunnel if self.outward is not None else None
        self.fail(TimedOut(f"{where}: {what} to the CONNECT for {self.record.dst_addr}"))
        if isinstance(tunnel, ClientTunnel):
            tunnel.retire()  # its peer may be gone without a word: the next connection tries another

    def fail(self, error: ProxyError) -> None:
        """End the connection: with an answer if there was none yet, else with a reset to both ends."""
        if self.over_:
            return
        plain, inward = self.plain, self.inward
        if plain is not None and plain.tunnel is not None:
            plain.abort(error)
            return
        if plain is not None:
            self.plain = None
            plain.end(error)
        tunnel = inward.tunnel
        if tunnel is not None and not self.opened:
            status = error.status if isinstance(error, RequestRefused) else UNAVAILABLE
            try:
                tunnel.h2.respond(
                    inward.stream_id, DENIED if isinstance(error, Denied) else status, end_stream=True
                )
                tunnel.h2.reset_stream(inward.stream_id, 0)  # the answer is complete (RFC 9113, 8.1)
            except LocalError:
                pass  # it is gone
            self.context.reactor.dirty.add(tunnel)
            inward.close(reset=False)
        self._end(error)

    def _end(self, error: ProxyError | None) -> None:
        inward, outward = self.inward, self.outward
        self.record.sent += inward.received
        self.record.received += outward.received if outward is not None else 0
        self._drop_outward(reset=error is not None)
        inward.close(reset=error is not None)
        self.passages.unjudged.pop(self, None)
        self._done(error)

    def gone(self) -> None:
        self.passages.ended(self.pod)


class Passages(Inbounds):
    """Serves the tunnels that come to the waypoint, and holds what their connections share."""

    def __init__(
        self,
        context: Context,
        enforcement: Enforcement,
        ended: Callable[[Pod], None],
        questions: Questions,
        pool: Pool,
        ask: AskRoute,
        counts: Callable[[str, str, str], Counts],
    ) -> None:
        """`counts(namespace, workload, identity)` is where connections to that workload are counted."""
        super().__init__(context, enforcement, ended, questions)
        self.pool = pool
        self.ask = ask
        self.counts = counts
        self.unjudged: dict[Passage, None] = {}
        """Connections to what the policies of are on their way."""

    def serve(self, tunnel: ServerTunnel, event: hbone.ConnectRequested) -> None:
        """A peer asks for a connection."""
        Passage(self, tunnel, event.stream_id).begin(event)

    def policies_changed(self) -> None:
        """Policies that were on their way may be there."""
        for passage in tuple(self.unjudged):
            if self.enforcement.knows(passage.subject.number):
                del self.unjudged[passage]
                self.context.reactor.guard(passage.go)


@lru_cache(maxsize=1024)
def parse_target(authority: str) -> tuple[str, int]:
    """The host and port of an `:authority`: `ip:port`, `[ip]:port` or `hostname:port`. Raises RequestRefused (400)."""
    host, _, digits = authority.rpartition(":")
    port = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 5 else 0
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if not 0 < port < 65536 or not bare or (":" in bare) != bracketed or len(bare) > 253:
        raise RequestRefused(
            BAD_REQUEST, f"CONNECT {authority[:LONGEST_AUTHORITY]!r}: expected ip:port or hostname:port"
        )
    if is_address(bare):
        address = ip_address(bare)
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        if address.is_loopback or address.is_unspecified or address.is_multicast:
            raise RequestRefused(BAD_REQUEST, f"CONNECT {authority}: not an address of a service or a pod")
        return str(address), port
    if bracketed or not all(part and part.replace("-", "").isalnum() for part in bare.rstrip(".").split(".")):
        raise RequestRefused(BAD_REQUEST, f"CONNECT {authority!r}: neither an address nor a hostname")
    return bare.rstrip(".").lower(), port


def is_address(host: str) -> bool:
    """Whether this is an IP address, not a name."""
    try:
        packed_ip(host)
    except (OSError, ValueError):
        return False
    return True
