"""What the parts of a worker share: the reactor, the pods it serves, certificates, routes, limits, accounting."""

import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from OpenSSL import SSL

from ztunnel import hbone
from ztunnel.identity import crl
from ztunnel.inpod import sockets
from ztunnel.proxy.buffers import MIB, Buffers
from ztunnel.proxy.errors import ProxyError
from ztunnel.proxy.peers import Peers
from ztunnel.proxy.pipes import Pipes
from ztunnel.proxy.reactor import Deadlines, Flushable, Reactor
from ztunnel.proxy.routes import RouteCache
from ztunnel.telemetry.access import ConnectionRecord, Totals
from ztunnel.telemetry.counting import Counts
from ztunnel.telemetry.log import Logger, timestamp

CONNECT_TIMEOUT = (
    10.0  # seconds to reach a destination (Istio's default), to finish TLS, to get a certificate
)
WAIT_TIMEOUT = 10.0  # seconds for the control process to say where a destination is
BUFFER_LIMIT = 256 * MIB  # bytes that may wait for all slow readers together
WINDOWS = hbone.Config(initial_window_size=MIB // 4, widest_window=MIB)
"""A stream's window: a quarter of a MiB, 1 MiB for a reader that keeps up (2 Gbit/s, 8 Gbit/s at 1 ms)."""
WIDER_WINDOWS = 64 * MIB  # bytes by which all windows together may exceed their beginning
SHRINK_TIMEOUT = 5.0  # seconds after which a tunnel's buffers that bulk data made grow are given back
CLOSE_TIMEOUT = 5.0  # seconds for a tunnel's peer to answer our end of it with its own


class Failable(Protocol):
    """A connection that can be ended with an error."""

    def __hash__(self) -> int:
        """By identity."""

    def fail(self, error: ProxyError) -> None:
        """End now."""


class Progressing(Failable, Protocol):
    """A connection that is carried."""

    def progress(self) -> None:
        """Count what it has moved so far, if it is known whom it is with."""


class Carrying(Failable, Protocol):
    """A tunnel."""

    @property
    def unsent(self) -> int:
        """Bytes that its socket did not take yet."""


class Timed(Failable, Protocol):
    """A connection that has to reach its next state within CONNECT_TIMEOUT."""

    def overdue(self) -> None:
        """It did not: end it, and say what did not come."""


class Grown(Protocol):
    """A tunnel that has carried bulk data."""

    def __hash__(self) -> int:
        """By identity."""

    def shrink(self) -> None:
        """SHRINK_TIMEOUT has passed since."""


class Closing(Protocol):
    """A tunnel that is on its way out."""

    def __hash__(self) -> int:
        """By identity."""

    def close_overdue(self) -> None:
        """The peer did not do its part within CLOSE_TIMEOUT."""


class Identity:
    """An identity's TLS contexts; there are none before its certificate came, and none after it ended.

    The worker itself looks at the clock: nobody tells it that a certificate ended and no other followed.
    """

    __slots__ = ("_client", "_reason", "_server", "name", "not_after", "roots_pem", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.not_after = 0.0  # Unix seconds
        self.roots_pem = b""  # what peers are verified against
        self.waiting: dict[object, Callable[[], None]] = {}  # who to tell of a certificate
        self._client: SSL.Context | None = None
        self._server: SSL.Context | None = None
        self._reason = "not issued yet"

    def use(
        self, client: SSL.Context, server: SSL.Context, not_after: float, roots_pem: bytes = b""
    ) -> list[Callable[[], None]]:
        """The contexts of a certificate that is valid until `not_after` (Unix seconds); returns whom to tell."""
        self._client, self._server, self.not_after = client, server, not_after
        self.roots_pem = roots_pem
        waiting = list(self.waiting.values())
        self.waiting.clear()
        return waiting

    def forget(self, reason: str) -> None:
        """No certificate any more, for this reason."""
        self._client = self._server = None
        self._reason = reason

    @property
    def client(self) -> SSL.Context | None:
        """What to open tunnels with; None if there is no valid certificate."""
        return self._client if time.time() < self.not_after else None

    @property
    def server(self) -> SSL.Context | None:
        """What to accept tunnels with; None if there is no valid certificate."""
        return self._server if time.time() < self.not_after else None

    @property
    def missing(self) -> str:
        """Why there is no certificate."""
        if self._client is None:
            return f"no certificate for {self.name}: {self._reason}"
        return (
            f"the certificate of {self.name} expired at {timestamp(self.not_after)} and no other followed: "
            "is the certificate authority reachable from this node?"
        )


class Pod:
    """A pod of this node: its namespace, its listeners, its open connections, and the routes it asked for."""

    __slots__ = (
        "_own",
        "accepting",
        "closed",
        "connections",
        "counts",
        "handshakes",
        "headers",
        "identity",
        "listeners",
        "name",
        "namespace",
        "netns",
        "number",
        "peers",
        "routes",
        "siblings",
        "tunnels",
        "uid",
        "waypoints",
    )

    def __init__(
        self,
        number: int,
        uid: str,
        name: str,
        namespace: str,
        identity: Identity,
        netns: int,
        listeners: dict[int, socket.socket],
        siblings: frozenset[int] = frozenset(),
    ) -> None:
        """`listeners` maps each captured port to its socket; they and the descriptor `netns` become the pod's.
        `siblings` are the inodes of all listeners that this proxy's workers have on port 15008 there.

        `number` tells a pod that came back from the one that left, whose last connections may still be open.
        """
        self.number = number
        self.uid = uid
        self.name = name
        self.namespace = namespace
        self.identity = identity
        self.netns = netns
        self.listeners = listeners
        self.siblings = siblings
        self.accepting = True
        self.closed = False
        self.connections: set[Progressing] = set()
        self.tunnels: set[Carrying] = set()
        self.handshakes: dict[
            Failable, float
        ] = {}  # peers that have not finished TLS, and since when; oldest first
        self.routes = RouteCache()
        self.peers = Peers()
        self.counts = Counts()
        # What tells a peer about the source, for its logs and metrics (W3C baggage).
        self.headers = (("baggage", f"k8s.namespace.name={namespace},k8s.pod.name={name}"),)
        self.waypoints: frozenset[str] = frozenset()  # identities that may name the original source
        self._own: set[str] = set()

    def owns(self, address: str) -> bool:
        """Whether `address` is one of the pod's own. Raises OSError.

        Only a yes is remembered: a pod has few addresses, peers can name any number of others, and an IPv6 address
        becomes usable only some time after it was given.
        """
        if address in self._own:
            return True
        own = sockets.is_local(self.netns, address)
        if own:
            self._own.add(address)
        return own

    def close(self) -> None:
        """Close the listeners and the namespace."""
        self.closed = True
        for listener in self.listeners.values():
            listener.close()
        self.listeners.clear()
        if self.netns != sockets.OWN:
            sockets.left(self.netns)
            os.close(self.netns)


class Ending:
    """The end of a captured connection, the same for each kind of them: it happens once, however it came."""

    __slots__ = ("context", "over_", "pod", "record")
    context: "Context"
    pod: Pod
    record: ConnectionRecord
    over_: bool

    def gone(self) -> None:
        """A connection of a pod that is leaving ended: tell whoever waits for the last one."""
        raise NotImplementedError

    def _done(self, error: ProxyError | None) -> None:
        if not self.over_:
            self.over_ = True
            self.context.connecting.discard(self)
            pod = self.pod
            pod.connections.discard(self)
            self.record.finish(error)
            if not pod.accepting:
                self.gone()

    def progress(self) -> None:
        """Count what the connection has moved so far."""
        raise NotImplementedError

    def overdue(self) -> None:
        """The time to connect is over."""
        raise NotImplementedError

    def fail(self, error: ProxyError) -> None:
        """End the connection now."""
        raise NotImplementedError


class _Gathered(Flushable):
    """The lines of the connections that ended in this turn: one write for all of them."""

    __slots__ = ("_logger",)

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def flush(self) -> None:
        self._logger.flush()


class Context:
    """One worker's state, handed to each of its parts."""

    def __init__(self, logger: Logger, buffer_limit: int = BUFFER_LIMIT) -> None:
        """`buffer_limit` is in bytes."""
        self.logger = logger
        self.buffers = Buffers(buffer_limit)
        self.pipes = Pipes()
        self.allowance = hbone.Allowance(WIDER_WINDOWS)
        self.totals = Totals()
        self.reactor = Reactor(self._bug)
        self.pods: dict[int, Pod] = {}  # by number
        self.identities: dict[str, Identity] = {}
        self.rng = random.Random()  # noqa: S311 - chooses endpoints, nothing secret
        self.connecting: Deadlines[Timed] = Deadlines(CONNECT_TIMEOUT, self._too_slow)
        self.closing: Deadlines[Closing] = Deadlines(CLOSE_TIMEOUT, self._still_there)
        self.grown: Deadlines[Grown] = Deadlines(SHRINK_TIMEOUT, self._grown)
        self.trust_domain = ""
        self.revocations: Sequence[crl.List] = ()
        self.pod_connections = sys.maxsize  # the most of one pod
        self.congestion_control = b""  # of tunnels; empty: the host's choice
        self.draining = False
        gathered = _Gathered(logger)
        logger.gather(lambda: self.reactor.dirty.add(gathered))

    def record(self, direction: str, source: str, pod: Pod | None = None) -> ConnectionRecord:
        """The record of a new connection, of this pod; `source` is `address:port`."""
        counts = pod.counts if pod is not None else None
        return ConnectionRecord(self.logger, self.totals, direction, source, counts)

    def identity(self, name: str) -> Identity:
        """The identity of this SPIFFE id, made if it is new."""
        identity = self.identities.get(name)
        if identity is None:
            identity = self.identities[name] = Identity(name)
        return identity

    def _too_slow(self, item: Timed) -> None:
        self.reactor.guard(item.overdue)

    def _grown(self, item: Grown) -> None:
        self.reactor.guard(item.shrink)

    def _still_there(self, item: Closing) -> None:
        self.reactor.guard(item.close_overdue)

    def _bug(self, error: BaseException, source: object) -> None:
        """A handler failed in a way that nobody foresaw: end what it served, keep the worker."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        owner = getattr(source, "__self__", source)
        self.logger.error(
            "proxy",
            "internal error; the connection is closed",
            error=f"{type(error).__name__}: {error}",
            at=f"{where.filename.rsplit('/', 2)[-1]}:{where.lineno}",
            handler=type(owner).__name__,
        )
        splice = getattr(owner, "splice", None)
        failable = splice if splice is not None else owner
        fail = getattr(failable, "fail", None)
        if fail is not None:
            try:
                fail(ProxyError(f"internal error: {error}"))
            except Exception as again:  # it was told; nothing more can be done for it
                self.logger.error("proxy", "closing failed too", error=str(again))
