"""Queries over UDP passed on to the server that the program asked, from the pod's own network.

Each has a socket of its own, so a source port that the kernel draws, and an id that we draw: an answer must come from
the server's address to that port, with that id and the question (RFC 5452). Lost datagrams are sent again after 1 s and
3 s; after 5 s, when programs give up, the query has failed.
"""

import contextlib
import heapq
import math
import secrets
import socket
import time
from collections.abc import Callable

from ztunnel.dns import packets
from ztunnel.dns.counters import Counters
from ztunnel.dns.limits import Limit
from ztunnel.dns.packets import Query
from ztunnel.dns.pod import Address, DnsPod, UpstreamUnknown
from ztunnel.dns.poller import Poller

PAUSES = (1.0, 2.0, 2.0)  # seconds after each attempt
MOST_UNMATCHED = 64  # wrong answers to one query, after which it has failed
Client = tuple[str, int] | tuple[str, int, int, int]


class Pending:
    """One query under way."""

    __slots__ = (
        "attempt",
        "client",
        "number",
        "own",
        "pod",
        "query",
        "repeat_key",
        "sock",
        "source",
        "wrong",
    )

    def __init__(self, pod: DnsPod, own: socket.socket, client: Client, query: Query) -> None:
        self.pod = pod
        self.own = own
        self.client = client
        self.query = query
        self.repeat_key = (own, client, query.data)
        self.number = secrets.token_bytes(2)
        self.attempt = 0
        self.wrong = 0
        self.sock: socket.socket | None = None
        self.source: tuple[str, str, int] | None = None


class Forwarder:
    """Passes queries on and answers back. `servers` are asked where nobody knows whom the program asked."""

    def __init__(
        self,
        poller: Poller,
        counters: Counters,
        limit: Limit,
        servers: Callable[[], list[Address]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._poller = poller
        self._counters = counters
        self._limit = limit
        self._servers = servers
        self._clock = clock
        self._pending: dict[tuple[socket.socket, Client, bytes], Pending] = {}
        self._due: list[tuple[float, int, Pending]] = []
        self._sequence = 0

    @property
    def under_way(self) -> int:
        """Queries without an answer yet."""
        return len(self._pending)

    @property
    def next_due(self) -> float:
        """Seconds until `run_due` has something to do; infinite if nothing is under way."""
        return max(0.0, self._due[0][0] - self._clock()) if self._pending and self._due else math.inf

    def ask(self, pod: DnsPod, own: socket.socket, client: Client, query: Query) -> None:
        """Pass a query on; its answer, or SERVFAIL, goes to the client from our socket `own`."""
        if (own, client, query.data) in self._pending:
            self._counters.faults["repeated"] += 1
            return
        if not self._limit.take(pod.uid):
            self._counters.faults["refused"] += 1
            _send(own, packets.refusal(query, packets.SERVFAIL), client)
            return
        pending = Pending(pod, own, client, query)
        self._pending[pending.repeat_key] = pending
        self._counters.upstream_requests[pod.labels(query.type_name, "udp")] += 1
        try:
            self._open(pending)
            self._attempt(pending)
        except (OSError, UpstreamUnknown):
            self._fail(pending)

    def _open(self, pending: Pending) -> None:
        pod, client = pending.pod, pending.client
        try:
            server = pod.server_of_datagram(pending.own, (client[0], client[1]))
        except UpstreamUnknown:
            servers = self._servers()
            if not servers:
                raise
            server = servers[0]
        sock = pending.sock = pod.socket_to(server, socket.SOCK_DGRAM)
        sock.connect(server)
        address = sock.getsockname()
        pending.source = ("udp", address[0], address[1])
        pod.asking.add(pending.source)
        self._poller.add(sock, lambda: self._receive(pending))

    def _attempt(self, pending: Pending) -> None:
        sock = pending.sock
        if sock is None:
            return
        pause = PAUSES[pending.attempt]
        pending.attempt += 1
        self._sequence += 1
        heapq.heappush(self._due, (self._clock() + pause, self._sequence, pending))
        with contextlib.suppress(BlockingIOError):  # full buffers: as if it was lost
            sock.send(pending.number + pending.query.data[2:])

    def run_due(self) -> None:
        """Send again, or give up, what has waited long enough."""
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            _, _, pending = heapq.heappop(self._due)
            if pending.sock is None:
                continue
            if pending.attempt == len(PAUSES):
                self._fail(pending)
                continue
            try:
                self._attempt(pending)
            except OSError:
                self._fail(pending)
        if not self._pending:
            self._due.clear()

    def _receive(self, pending: Pending) -> None:
        if pending.sock is None:
            return
        try:
            response = pending.sock.recv(packets.MAX_SIZE)
        except BlockingIOError:
            return
        except OSError:  # nobody listens there, or there is no way: the program shall ask its next server
            self._fail(pending)
            return
        if response[:2] != pending.number or not packets.answers(pending.query, response):
            self._counters.faults["unmatched"] += 1
            pending.wrong += 1
            if pending.wrong >= MOST_UNMATCHED:
                self._fail(pending)
            return
        self._end(pending)
        _send(pending.own, pending.query.data[:2] + response[2:], pending.client)

    def _fail(self, pending: Pending) -> None:
        self._end(pending)
        labels = pending.pod.labels(pending.query.type_name, "udp")
        self._counters.upstream_failures[labels] += 1
        _send(pending.own, packets.refusal(pending.query, packets.SERVFAIL), pending.client)

    def _end(self, pending: Pending) -> None:
        del self._pending[pending.repeat_key]
        self._limit.give_back(pending.pod.uid)
        sock, pending.sock = pending.sock, None
        if sock is not None:
            self._poller.remove(sock)
            sock.close()
        if pending.source is not None:
            pending.pod.asking.discard(pending.source)

    def forget(self, pod: DnsPod) -> None:
        """Give up what is under way for a pod that is gone."""
        for pending in [one for one in self._pending.values() if one.pod is pod]:
            self._end(pending)


def _send(own: socket.socket, data: bytes, client: Client) -> None:
    """Answer a client. If that cannot be done now, it is as if the answer was lost."""
    with contextlib.suppress(OSError):
        own.sendto(data, client)
