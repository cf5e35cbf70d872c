"""One client's subscription to one resource type: the server's half of the incremental xDS protocol.

Requests and changes in, encoded responses out; no sockets, no clock, no logging. Section names below are those of
Envoy's "xDS REST and gRPC protocol" document.

A subscription remembers which resources the client has yet to be told of, never what it was told: however slow the
client, what waits for it is a set of names, and what it gets is the latest state of each.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from ztunnel.controlplane.resources import Changes, Entry, ResourceSet
from ztunnel.wire.xds_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse

WILDCARD: Final = "*"

# Ends the system_version_info of a response that others of the same state follow, so that a client which knows this
# can tell when it has everything. To other clients the field is an opaque text.
MORE_FOLLOWS: Final = "+"

# gRPC clients refuse messages over 4 MiB unless told otherwise; half leaves the client's loop room to breathe.
MAX_RESPONSE_BYTES: Final = 2 * 1024 * 1024
# A client that has this many responses to acknowledge gets no more until it has caught up.
MAX_UNACKNOWLEDGED: Final = 8


class Response(NamedTuple):
    """One response: `message` is the serialized DeltaDiscoveryResponse, the rest says what is in it."""

    message: bytes
    nonce: str
    sent: tuple[str, ...]
    removed: tuple[str, ...]


class Rejection(NamedTuple):
    """A client's NACK: it keeps what it had of these resources. They are sent again when they change."""

    nonce: str
    names: tuple[str, ...]
    message: str


class Standing(NamedTuple):
    """How far a client is. Versions are those that the server gave its states; "" before the first.

    `pending` resources are to be sent, `unacknowledged` responses have not been answered. `rejected` is the client's
    last NACK, None once it has taken a later response.
    """

    sent: str
    acknowledged: str
    pending: int
    unacknowledged: int
    rejected: Rejection | None

    @property
    def word(self) -> str:
        """SYNCED, REJECTED, STALE (something is under way), or NOT SENT."""
        if self.rejected is not None:
            return "REJECTED"
        if self.pending or self.unacknowledged:
            return "STALE"
        return "SYNCED" if self.acknowledged else "NOT SENT"


class Subscription:
    """What one client wants of one type, and what it is still owed."""

    def __init__(self, resources: ResourceSet) -> None:
        self._resources = resources
        self._started = False
        self._owed = False  # a response is due, even an empty one
        self._wildcard = False
        self._asked: set[str] = set()  # names subscribed to
        self._wanted: set[str] = set()  # the resources they stand for; unused while wildcard
        self._pending: dict[str, None] = {}  # resources whose latest state is to be sent
        self._missing: dict[str, None] = {}  # names asked for that don't exist, to be said so
        self._unacknowledged: dict[str, tuple[str, ...]] = {}  # nonce -> resources
        self._versions: dict[str, str] = {}  # nonce -> version, of the same
        self._sent = self._acknowledged = ""
        self._rejected: Rejection | None = None

    @property
    def type_url(self) -> str:
        return self._resources.type_url

    @property
    def wildcard(self) -> bool:
        """Whether the client wants every resource of the type."""
        return self._wildcard

    @property
    def standing(self) -> Standing:
        """How far the client is."""
        pending = len(self._pending) + len(self._missing)
        return Standing(self._sent, self._acknowledged, pending, len(self._unacknowledged), self._rejected)

    @property
    def idle(self) -> bool:
        """Whether the client has been sent everything (it may not have acknowledged it yet)."""
        return not (self._owed or self._pending or self._missing)

    def request(self, request: DeltaDiscoveryRequest) -> Rejection | None:
        """Take a request of this type: an acknowledgement, a change of the subscription, or both at once.

        Returns the rejection if it is a NACK.
        """
        rejection = None
        # A nonce of another stream (the first request after a reconnect may carry one) means nothing here.
        if request.response_nonce in self._unacknowledged:
            version = self._versions[request.response_nonce]
            names = self._acknowledge(request.response_nonce)
            if request.HasField("error_detail"):
                rejection = Rejection(request.response_nonce, names, request.error_detail.message)
            else:
                self._acknowledged = version
            self._rejected = rejection
        subscribe, unsubscribe = request.resource_names_subscribe, request.resource_names_unsubscribe
        if not self._started:
            self._start(subscribe, unsubscribe, dict(request.initial_resource_versions))
        elif subscribe or unsubscribe:
            self._subscribe(subscribe)
            self._unsubscribe(unsubscribe)
        return rejection

    def changed(self, changes: Changes) -> None:
        """Take note that resources changed."""
        if not self._started:
            return
        if self._wildcard:
            self._pending.update(dict.fromkeys(changes))
            return
        if any(
            not (names.isdisjoint(self._asked) and names.isdisjoint(self._wanted))
            for names in changes.values()
        ):
            before = self._wanted
            self._wanted = self._find(self._asked)
            self._pending.update(dict.fromkeys(before - self._wanted))
            self._pending.update(
                dict.fromkeys(name for name in self._wanted if name in changes or name not in before)
            )

    @property
    def grows(self) -> bool:
        """Whether the client has yet to be sent a resource, rather than told only what is gone."""
        return any(self._current(name) is not None for name in self._pending)

    def next_response(
        self, nonce: str, limit: int = MAX_RESPONSE_BYTES, *, removals: bool = True
    ) -> Response | None:
        """The next response to send, of about `limit` bytes at most, with this nonce; None if there is none now.

        Without `removals` it leaves for later what is gone.
        """
        if self.idle or len(self._unacknowledged) >= MAX_UNACKNOWLEDGED:
            return None
        if not (removals or self._owed or self.grows):
            return None
        encoded: list[bytes] = []
        sent: list[str] = []
        removed: list[str] = []
        size = 0
        for name in self._pending:
            current = self._current(name)
            if current is None and not removals:
                continue
            size += len(name) + 8 if current is None else len(current.encoded)
            if size > limit and (sent or removed):
                break
            if current is None:
                removed.append(name)
            else:
                sent.append(name)
                encoded.append(current.encoded)
        for name in (*sent, *removed):
            del self._pending[name]
        # Asked for before it existed, existing by now: then it is among the pending ones.
        removed.extend(name for name in self._missing if not self._resources.find(name))
        self._missing.clear()
        self._owed = False
        self._unacknowledged[nonce] = (*sent, *removed)
        self._sent = self._versions[nonce] = str(self._resources.revision)
        head = DeltaDiscoveryResponse(
            type_url=self.type_url,
            nonce=nonce,
            system_version_info=f"{self._resources.revision}{MORE_FOLLOWS if self._pending else ''}",
            removed_resources=removed,
        )
        return Response(b"".join((head.SerializeToString(), *encoded)), nonce, tuple(sent), tuple(removed))

    def _start(self, subscribe: Iterable[str], unsubscribe: Iterable[str], held: dict[str, str]) -> None:
        """The first request of the type on the stream: "How the client specifies what resources to return".

        `held` is what the client kept from an earlier stream, name to version.
        """
        self._started = self._owed = True
        subscribe, unsubscribe = set(subscribe), set(unsubscribe)
        # No names at all is the older way to ask for everything. Asking for and giving up the wildcard in one
        # request is how a client says that it will ask for names later.
        self._wildcard = WILDCARD in subscribe - unsubscribe or not (subscribe or unsubscribe)
        explicit = subscribe - unsubscribe - {WILDCARD}
        # Clients that ask for names don't repeat them on reconnect: they list what they hold.
        self._asked = explicit if self._wildcard else explicit | (held.keys() - unsubscribe)
        names: Iterable[str] = self._resources
        if not self._wildcard:
            names = self._wanted = self._find(self._asked)
        for name in names:
            current = self._resources.get(name)
            if current is not None and held.get(name) != current.version:
                self._pending[name] = None
        self._pending.update(dict.fromkeys(name for name in held if self._current(name) is None))
        self._missing.update(dict.fromkeys(name for name in explicit if not self._resources.find(name)))

    def _subscribe(self, names: Iterable[str]) -> None:
        for name in names:
            if name == WILDCARD:
                self._wildcard = True
                self._pending.update(dict.fromkeys(self._resources))
                continue
            self._asked.add(name)
            found = self._resources.find(name)
            self._wanted |= found
            # "the server must send the resource even if it thinks that the client has it".
            self._pending.update(dict.fromkeys(found))
            if not found:
                self._missing[name] = None

    def _unsubscribe(self, names: Iterable[str]) -> None:
        given_up = set(names)
        if not given_up:
            return
        if WILDCARD in given_up:
            self._wildcard = False
        before = self._find(self._asked)
        self._asked -= given_up
        self._wanted = self._find(self._asked)
        for name in given_up:
            self._missing.pop(name, None)
        if self._wildcard:
            # It must be told again of what it still gets by the wildcard, for it has forgotten that.
            self._pending.update(dict.fromkeys(before - self._wanted))
        else:
            # The client forgets these by itself; it is owed what it still asks for, and what is gone.
            for name in [
                name for name in self._pending if name in self._resources and name not in self._wanted
            ]:
                del self._pending[name]

    def _acknowledge(self, nonce: str) -> tuple[str, ...]:
        """Drop this response and those before it, which the client must have read; returns its resources."""
        for earlier in tuple(self._unacknowledged):
            names = self._unacknowledged.pop(earlier)
            del self._versions[earlier]
            if earlier == nonce:
                return names
        raise KeyError(nonce)

    def _find(self, asked: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for name in asked:
            found |= self._resources.find(name)
        return found

    def _current(self, name: str) -> Entry | None:
        return self._resources.get(name) if self._wildcard or name in self._wanted else None
