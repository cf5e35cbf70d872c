"""Recorded connections judged twice: by the policies that there are, and by those that there would be."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ztunnel.cli.session import owner
from ztunnel.mesh.model import packed_ip
from ztunnel.mesh.policy import Connection

if TYPE_CHECKING:
    from ztunnel.cli.authz.model import PolicyModel
    from ztunnel.store.models import Pod


class Changed(NamedTuple):
    """Connections of one source to one destination and port that the change is for. Times are seconds of the epoch."""

    source: str
    destination: str
    port: int
    reason: str
    connections: int
    last: float


class Replay(NamedTuple):
    """What a change of policies would do. `connections` were replayed, `kinds` different ones, the last at `latest`.

    `unknown` went to pods that are no more, or could not be read: nothing is said about them.
    """

    cut_off: list[Changed]
    newly_allowed: list[Changed]
    connections: int
    kinds: int
    unknown: int
    latest: float


def replay(
    records: Iterable[Mapping[str, Any]], pods: Iterable["Pod"], before: "PolicyModel", after: "PolicyModel"
) -> Replay:
    """Judge the records (of a node's /debug/connections/recent) under both."""
    known = {(pod.namespace, pod.name): pod for pod in pods}
    changes: dict[bool, dict[tuple[str, str, int, str], list[Any]]] = {False: {}, True: {}}
    connections = kinds = unknown = 0
    latest = 0.0
    for record in records:
        pod = known.get((str(record["dst_namespace"]), str(record["dst_workload"])))
        connection = _connection(record)
        count, last = int(record["count"]), float(record["time"])
        if pod is None or connection is None:
            unknown += count
            continue
        connections, kinds, latest = connections + count, kinds + 1, max(latest, last)
        now, then = before.allowed(pod, connection), after.allowed(pod, connection)
        if now.allowed == then.allowed:
            continue
        key = (
            _source(record),
            f"{pod.namespace}/{owner(pod) or pod.name}",
            connection.port,
            after.reason(then, pod),
        )
        total = changes[then.allowed].setdefault(key, [0, 0.0])
        total[0] += count
        total[1] = max(total[1], last)
    found = {
        allowed: [Changed(*key, *total) for key, total in some.items()] for allowed, some in changes.items()
    }
    for each in found.values():
        each.sort(key=lambda one: (-one.connections, one))
    return Replay(found[False], found[True], connections, kinds, unknown, latest)


def _connection(record: Mapping[str, Any]) -> Connection | None:
    try:
        return Connection.of(
            str(record["src_identity"]),
            packed_ip(str(record["src_addr"])),
            packed_ip(str(record["dst_addr"])),
            int(record["dst_port"]),
        )
    except (ValueError, OSError):
        return None


def _source(record: Mapping[str, Any]) -> str:
    """The identity, or who sends plaintext."""
    if record["src_identity"]:
        return str(record["src_identity"]).removeprefix("spiffe://")
    if record["src_workload"]:
        return f"plaintext, {record['src_namespace']}/{record['src_workload']}"
    return f"plaintext, {record['src_addr']}"
