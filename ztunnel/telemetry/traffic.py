"""The TCP metrics of a node: what its workers report, added up under the labels that the mesh gives.

Rule: a counter never goes back. Reports are differences, so a worker that dies takes nothing with it but what it had
not told yet; the connections that died with it are counted as closed and failed. Memory is bounded: at MOST series
what would be another one is counted in a series without workloads, and series of workloads that are gone go.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from socket import AF_INET, AF_INET6, inet_pton
from typing import Final, NamedTuple, TypeAlias

from ztunnel.mesh.model import Workload, address_tag, pod_uid
from ztunnel.mesh.state import MeshState
from ztunnel.telemetry.access import OUTBOUND, WAYPOINT
from ztunnel.telemetry.counting import CLOSED, FAILED, NONE, OPENED, RECEIVED, SENT, Key, PodTraffic
from ztunnel.telemetry.labels import (
    MUTUAL_TLS,
    NO_SERVICE,
    NOBODY,
    UNKNOWN,
    Labels,
    Side,
    service_labels,
    service_of_port,
    side,
)
from ztunnel.telemetry.log import Logger
from ztunnel.telemetry.meters import Sample

MOST: Final = 10_000  # series of a node: sets of labels; each is up to 4 lines, and takes about 1.5 KB
RETENTION: Final = 900.0  # seconds for which a series without news outlives its workloads
SWEEP: Final = 300.0  # seconds between looks for such series
RECENT: Final = (
    60.0  # seconds for which the workload that an address had is remembered once the mesh forgot it
)
MOST_RECENT: Final = 10_000
TELL: Final = 60.0  # seconds between log lines about too many series

Conversation: TypeAlias = tuple[str, str, tuple[str, str, str, str, int, bool]]
"""Namespace and name of a pod, and what identifies a series in its worker, but for the flag."""

Snapshot: TypeAlias = list[tuple[Labels, tuple[int, ...]]]
"""All series with their counts, at one moment."""

METRICS: Final = (
    ("istio_tcp_connections_opened", "TCP connections opened", OPENED),
    ("istio_tcp_connections_closed", "TCP connections closed", CLOSED),
    ("istio_tcp_connections_failed", "TCP connections that ended with an error (unstable)", FAILED),
    ("istio_tcp_sent_bytes", "Bytes sent by clients", SENT),
    ("istio_tcp_received_bytes", "Bytes received by clients", RECEIVED),
)
"""Name, help and position in the counts."""


class Peer(NamedTuple):
    """What a worker's log says of a client: its pod, the service that was asked for, and what the answer depends on."""

    workload: str
    namespace: str
    service: str
    tags: tuple[str, ...]


class _Series:
    __slots__ = ("counts", "touched")

    def __init__(self) -> None:
        self.counts = [0, 0, 0, 0, 0]
        self.touched = 0.0


class TrafficMetrics:
    """All TCP series of a node."""

    def __init__(
        self,
        state: MeshState,
        network: str,
        cluster_id: str,
        logger: Logger,
        *,
        most: int = MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`network` and `cluster_id` are this node's; `clock` returns seconds."""
        self._state = state
        self._network = network
        self._cluster = cluster_id
        self._logger = logger
        self._most = most
        self._clock = clock
        self._series: dict[Labels, _Series] = {}
        self._open: dict[int, dict[Conversation, tuple[Labels, int]]] = {}
        self._recent: OrderedDict[bytes, tuple[Workload, float]] = OrderedDict()
        self._swept = clock()
        self._told = -TELL
        #: Updates that had to be counted in a series without workloads.
        self.overflowed = 0

    def __len__(self) -> int:
        return len(self._series)

    @property
    def open_conversations(self) -> int:
        """How many series have connections that are open now."""
        return sum(len(one) for one in self._open.values())

    # Reports.

    def add(self, worker: int, pods: Iterable[PodTraffic]) -> None:
        """What a worker's connections did since its last report."""
        now = self._clock()
        conversations = self._open.setdefault(worker, {})
        for pod in pods:
            own: Workload | None = self._pod(pod.namespace, pod.name)
            for key, counts in pod.counts:
                conversation = (pod.namespace, pod.name, key[:-1])
                held = conversations.get(conversation)
                # What is open keeps its labels: what was opened under some is closed under the same.
                labels = held[0] if held is not None else self._labels(pod, own, key)
                number = counts[OPENED] - counts[CLOSED] + (held[1] if held is not None else 0)
                if number:
                    conversations[conversation] = (labels, number)
                elif held is not None:
                    del conversations[conversation]
                series = self._place(labels._replace(flag=key[-1]))
                series.touched = now
                total = series.counts
                for position, count in enumerate(counts):
                    total[position] += count
        self._sweep(now)

    def left(self, worker: int) -> None:
        """The worker ended: so did its connections."""
        now = self._clock()
        for labels, number in self._open.pop(worker, {}).values():
            if number > 0:
                series = self._place(labels)
                series.touched = now
                series.counts[CLOSED] += number
                series.counts[FAILED] += number

    def _place(self, labels: Labels) -> _Series:
        series = self._series.get(labels)
        if series is None:
            if len(self._series) >= self._most:
                labels = Labels(labels.reporter, NOBODY, NO_SERVICE, NOBODY, labels.flag, labels.security)
                self._overflow()
                series = self._series.get(labels)
                if series is not None:
                    return series
            series = self._series[labels] = _Series()
        return series

    def _overflow(self) -> None:
        self.overflowed += 1
        now = self._clock()
        if now - self._told >= TELL:
            self._told = now
            self._logger.warn(
                "metrics",
                "too many series: connections of further workloads are counted without their labels",
                series=len(self._series),
                limit=self._most,
            )

    # Labels.

    def _labels(self, pod: PodTraffic, own: Workload | None, key: Key) -> Labels:
        direction, address, identity, service_key, port, mutual_tls, _ = key
        us = side(own, pod.identity)
        them = self._side(address, identity)
        security = MUTUAL_TLS if mutual_tls else UNKNOWN
        if direction == OUTBOUND:
            service = service_labels(self._state, service_key)
            return Labels("source", us, service, them, NONE, security)
        if direction == WAYPOINT:
            return Labels("waypoint", them, service_labels(self._state, service_key), us, NONE, security)
        found = service_of_port(self._state, own, port) if own is not None else None
        service = service_labels(self._state, found.key if found is not None else "")
        return Labels("destination", them, service, us, NONE, security)

    def _pod(self, namespace: str, name: str) -> Workload | None:
        return self._state.workload_by_uid(pod_uid(self._cluster, namespace, name))

    def _side(self, address: str, identity: str) -> Side:
        workload = self._workload(address)
        if workload is not None and identity and workload.identity != identity:
            workload = None  # the address is another's by now, or the peer speaks for somebody behind it
        return side(workload, identity)

    def _workload(self, address: str) -> Workload | None:
        """Who has the address, or had it a moment ago: a report may come after its pod has gone."""
        packed = _packed(address)
        if not packed:
            return None
        now = self._clock()
        workload = self._state.workload_by_address(self._network, packed)
        if workload is None:
            old = self._recent.get(packed)
            return old[0] if old is not None and now - old[1] < RECENT else None
        self._recent[packed] = (workload, now)
        self._recent.move_to_end(packed)
        if len(self._recent) > MOST_RECENT:
            self._recent.popitem(last=False)
        return workload

    def peer(self, namespace: str, name: str, address: str, port: int) -> Peer:
        """Who connects from `address` to the `port` of this pod of the node: for the log."""
        packed = _packed(address)
        tags = [address_tag(self._network, packed)] if packed else []
        workload = self._workload(address)
        own = self._pod(namespace, name)
        service = None
        if own is not None:
            # A change of the pod's services, or of what it is, names its addresses.
            tags += [address_tag(own.network, ip) for ip in own.addresses]
            tags += [f"svc:{key}" for key in own.services]
            service = service_of_port(self._state, own, port)
        return Peer(
            workload.name if workload is not None else "",
            workload.namespace if workload is not None else "",
            service.hostname if service is not None else "",
            tuple(tags),
        )

    # What is shown.

    def snapshot(self) -> Snapshot:
        """All numbers now: a copy, which a thread may read while this goes on."""
        self._sweep(self._clock())
        return [(labels, tuple(series.counts)) for labels, series in self._series.items()]

    def _sweep(self, now: float) -> None:
        """Forget the series without news whose workloads are gone, and which have no open connection."""
        if now - self._swept < SWEEP:
            return
        self._swept = now
        while self._recent and now - next(iter(self._recent.values()))[1] >= RECENT:
            self._recent.popitem(last=False)
        old = [labels for labels, series in self._series.items() if now - series.touched >= RETENTION]
        if not old:
            return
        here = {(one.namespace, one.workload_name or one.name) for one in self._state.workloads()}
        here.add((UNKNOWN, UNKNOWN))
        opened = {labels for held in self._open.values() for labels, _ in held.values()}
        for labels in old:
            ends = (labels.source, labels.destination)
            if (
                any((end.namespace, end.workload) not in here for end in ends)
                and labels._replace(flag=NONE) not in opened
            ):
                del self._series[labels]


def samples(snapshot: Snapshot) -> list[tuple[str, str, list[Sample]]]:
    """Name, help and numbers of each metric. For a thread: 30 ms for 10,000 series."""
    found: list[tuple[str, str, list[Sample]]] = [(name, told, []) for name, told, _ in METRICS]
    for labels, counts in snapshot:
        values = labels.values()
        for (_, _, position), (_, _, lines) in zip(METRICS, found, strict=True):
            # Bytes are shown from 0 on, so that the first ones are seen as an increase.
            if counts[position] or (position in (SENT, RECEIVED) and counts[OPENED]):
                lines.append((values, counts[position]))
    return found


def _packed(address: str) -> bytes:
    """An address as the mesh has it; empty for what is none of a workload, such as one with a scope (fe80::1%eth0)."""
    try:
        return inet_pton(AF_INET6 if ":" in address else AF_INET, address)
    except OSError:
        return b""
