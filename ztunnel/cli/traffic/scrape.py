"""The nodes' metrics pages as rows: who talked to whom, and how much, since the proxies started or between two looks.

A connection within the mesh is counted by the proxies of both ends. `Flow`s count it once: as its client's side saw it,
which also knows of what never arrived; as the server's side did where no proxy saw the client's.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ztunnel.cli.errors import UserError

if TYPE_CHECKING:
    from ztunnel.cli.nodes import Node
    from ztunnel.cli.session import Mesh

PREFIX = "istio_tcp_"
KINDS = {
    "istio_tcp_connections_opened_total": "opened",
    "istio_tcp_connections_closed_total": "closed",
    "istio_tcp_connections_failed_total": "failed",
    "istio_tcp_sent_bytes_total": "sent",
    "istio_tcp_received_bytes_total": "received",
}
UNKNOWN = "unknown"


class End(NamedTuple):
    """One end of a connection; what is not known is empty."""

    namespace: str
    workload: str
    principal: str

    def __str__(self) -> str:
        if self.workload:
            return f"{self.namespace}/{self.workload}"
        return self.principal or "outside"


@dataclass
class Counts:
    """Connections and bytes; `flags` counts the failed ones by response flag."""

    opened: int = 0
    closed: int = 0
    failed: int = 0
    sent: int = 0
    received: int = 0
    flags: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Counts") -> None:
        """Add another's numbers."""
        for name in KINDS.values():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for flag, number in other.flags.items():
            self.flags[flag] = self.flags.get(flag, 0) + number

    @property
    def success(self) -> float | None:
        """The share of the connections that ended well, 0 to 1; None if none ended."""
        return (self.closed - self.failed) / self.closed if self.closed else None


class Flow(NamedTuple):
    """Connections of one kind: from whom to whom, through which service, whether secured, and whose proxy saw them."""

    source: End
    destination: End
    service: str
    service_namespace: str
    secured: bool
    reporter: str


Labels = frozenset[tuple[str, str]]


class Page(NamedTuple):
    """One node's numbers at one time (seconds, monotonic), by metric and labels."""

    node: str
    taken: float
    numbers: Mapping[tuple[str, Labels], float]


def read(mesh: "Mesh") -> tuple[list[Page], list[str]]:
    """The metrics of all nodes of a mesh, and what went wrong with those that are missing.

    Raises UserError if there is no mesh, or none of its nodes answers.
    """
    from ztunnel.cli.nodes import NodeError

    def one(node: "Node") -> Page | NodeError:
        try:
            return Page(node.name, time.monotonic(), parse(node.get("/metrics").decode()))
        except NodeError as error:
            return error

    found = mesh.nodes()
    with ThreadPoolExecutor(min(len(found), 16)) as pool:
        answers = list(pool.map(one, found))
    pages = [answer for answer in answers if isinstance(answer, Page)]
    errors = [str(answer) for answer in answers if not isinstance(answer, Page)]
    if not pages:
        raise UserError(errors[0])
    return pages, errors


def parse(page: str) -> dict[tuple[str, Labels], float]:
    """The numbers of the TCP metrics on a page. Raises UserError for what is no page of metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    wanted = "".join(line + "\n" for line in page.splitlines() if line.startswith(PREFIX))
    try:
        families: Iterable[Any] = list(text_string_to_metric_families(wanted))
    except ValueError as error:
        raise UserError(f"a node's metrics cannot be read: {error}") from error
    return {
        (KINDS[sample.name], frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if sample.name in KINDS
    }


def flows(pages: Iterable[Page], before: Sequence[Page] = ()) -> dict[Flow, Counts]:
    """All that was counted, or with `before` what was since then, each connection once.

    A proxy that was replaced meanwhile has begun anew: all it has is new. A node that did not answer then is left out.
    """
    earlier = {page.node: page.numbers for page in before}
    found: dict[Flow, Counts] = {}
    for page in pages:
        if before and page.node not in earlier:
            continue
        old = earlier.get(page.node, {})
        replaced = any(old.get(key, 0) > value for key, value in page.numbers.items())
        for (kind, labels), value in page.numbers.items():
            number = int(value - (0 if replaced else old.get((kind, labels), 0)))
            if not number and before:
                continue
            values = dict(labels)
            counts = found.setdefault(_flow(values), Counts())
            setattr(counts, kind, getattr(counts, kind) + number)
            if kind == "failed":
                flag = values.get("response_flags", "-")
                counts.flags[flag] = counts.flags.get(flag, 0) + number
    return _once(found)


def open_now(pages: Iterable[Page]) -> dict[Flow, int]:
    """How many connections are open."""
    return {flow: counts.opened - counts.closed for flow, counts in flows(pages).items()}


def _once(found: dict[Flow, Counts]) -> dict[Flow, Counts]:
    def conversation(flow: Flow) -> tuple[object, ...]:
        ends = [(end.namespace, end.workload) for end in (flow.source, flow.destination)]
        return (*ends, flow.secured)

    by_clients = {conversation(flow) for flow in found if flow.reporter == "source"}
    return {
        flow: counts
        for flow, counts in found.items()
        if flow.reporter == "source" or conversation(flow) not in by_clients
    }


def _flow(values: Mapping[str, str]) -> Flow:
    def known(name: str) -> str:
        value = values.get(name, UNKNOWN)
        return "" if value == UNKNOWN else value

    def end(side: str) -> End:
        return End(known(f"{side}_workload_namespace"), known(f"{side}_workload"), known(f"{side}_principal"))

    return Flow(
        end("source"),
        end("destination"),
        known("destination_service"),
        known("destination_service_namespace"),
        values.get("connection_security_policy") == "mutual_tls",
        values.get("reporter", ""),
    )
