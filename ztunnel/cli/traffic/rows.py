"""Flows added up for a table: by workload, service, namespace, or by pairs of them; filtered and sorted."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ztunnel.cli.errors import UserError
from ztunnel.cli.traffic.scrape import Counts, End, Flow

Key: TypeAlias = tuple[str, ...]

ALIASES = {
    "workload": "workloads", "workloads": "workloads", "deploy": "workloads", "deployment": "workloads",
    "deployments": "workloads", "po": "workloads", "pod": "workloads", "pods": "workloads",
    "svc": "services", "service": "services", "services": "services",
    "ns": "namespaces", "namespace": "namespaces", "namespaces": "namespaces",
}  # fmt: skip
"""The words for what a table is about. A pod is counted under the workload that it belongs to."""


@dataclass
class Row:
    """One line: connections of the time that was looked at, and those that are open now."""

    key: Key
    counts: Counts = field(default_factory=Counts)
    secured: Counts = field(default_factory=Counts)
    open: int = 0

    @property
    def mutual_tls(self) -> float | None:
        """The share of the connections that both ends proved who they are in, 0 to 1; None of none."""
        if self.counts.opened:
            return self.secured.opened / self.counts.opened
        return None

    def describe(self, seconds: float) -> dict[str, Any]:
        """The numbers as plain data. `seconds` is the time looked at, 0 if since the proxies started."""
        counts = self.counts
        found: dict[str, Any] = {
            "connections": counts.opened,
            "closed": counts.closed,
            "failed": counts.failed,
            "failed_by_flag": dict(sorted(counts.flags.items())),
            "success": counts.success,
            "mutual_tls": self.mutual_tls,
            "open": self.open,
            "sent_bytes": counts.sent,
            "received_bytes": counts.received,
        }
        if seconds:
            found |= {
                "connections_per_second": counts.opened / seconds,
                "sent_bytes_per_second": counts.sent / seconds,
                "received_bytes_per_second": counts.received / seconds,
            }
        return found


def kind_of(word: str) -> str:
    """What a table is about, by the word for it. Raises UserError."""
    kind = ALIASES.get(word.lower())
    if kind is None:
        raise UserError(
            f"{word!r} is nothing that traffic is counted for", "use workloads, services or namespaces"
        )
    return kind


def by_destination(kind: str) -> Callable[[Flow], Key | None]:
    """The row (namespace and name) of a flow in a table of this kind: that of whom the connections go to."""

    def workload(flow: Flow) -> Key | None:
        end = flow.destination
        return (end.namespace, end.workload) if end.workload else None

    def service(flow: Flow) -> Key | None:
        return (flow.service_namespace, flow.service) if flow.service else None

    def namespace(flow: Flow) -> Key | None:
        end = flow.destination
        return (end.namespace, end.namespace) if end.namespace else None

    return {"workloads": workload, "services": service, "namespaces": namespace}[kind]


def by_pair(flow: Flow) -> Key:
    """The row of a flow in a table of who talks to whom: source, destination, service."""
    return (str(flow.source), str(flow.destination), flow.service)


def rows(
    found: Mapping[Flow, Counts],
    open_now: Mapping[Flow, int],
    key: Callable[[Flow], Key | None],
    wanted: Callable[[Flow], bool] = lambda flow: True,
) -> list[Row]:
    """The flows that are wanted, added up under their keys (None: left out), in the order of the keys.

    There is a line for whatever is open, or was ever counted, also if nothing happened in the time looked at.
    """
    lines: dict[Key, Row] = {}
    for flow, number in open_now.items():
        place = key(flow) if wanted(flow) else None
        if place is not None:
            lines.setdefault(place, Row(place)).open += max(number, 0)
    for flow, counts in found.items():
        place = key(flow) if wanted(flow) else None
        if place is not None:
            row = lines.setdefault(place, Row(place))
            row.counts.add(counts)
            if flow.secured:
                row.secured.add(counts)
    return [lines[place] for place in sorted(lines)]


SORTS: dict[str, Callable[[Row], Any]] = {
    "connections": lambda row: row.counts.opened,
    "open": lambda row: row.open,
    "failed": lambda row: row.counts.failed,
    "sent": lambda row: row.counts.sent,
    "received": lambda row: row.counts.received,
    "name": lambda row: row.key,
}


def ordered(lines: Iterable[Row], sort: str) -> list[Row]:
    """By a column: the largest first, names from the beginning."""
    if sort == "name":
        return sorted(lines, key=SORTS[sort])
    return sorted(lines, key=lambda row: (-SORTS[sort](row), row.key))


def end_filter(text: str | None) -> Callable[[End], bool]:
    """Whether an end is the one that `text` means: NAME, NAMESPACE/NAME, NAMESPACE/, KIND/NAME, outside; None: any."""
    if not text:
        return lambda end: True
    if text == "outside":
        return lambda end: not end.workload and not end.principal
    where, slash, name = text.partition("/")
    if not slash:
        return lambda end: end.workload == text
    if where.lower() in ALIASES:
        if ALIASES[where.lower()] == "namespaces":
            return lambda end: end.namespace == name
        return lambda end: end.workload == name
    return lambda end: end.namespace == where and name in ("", end.workload)
