"""How each kind is shown as a table: plain columns that scripts can cut and people can read."""

import datetime
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ztunnel.cli.session import owner

if TYPE_CHECKING:
    from ztunnel.store.models import (
        AuthorizationPolicy,
        Deployment,
        Namespace,
        Node,
        Object,
        PeerAuthentication,
        Pod,
        Service,
        ServiceAccount,
    )

    Policy = AuthorizationPolicy | PeerAuthentication

Column = tuple[str, bool, Callable[[Any], str]]  # heading, only in the wide table, the text for an object
NONE = "<none>"


def render(rows: Iterable[Sequence[str]]) -> str:
    """Rows (the first one holds the headings) as left-aligned columns with three spaces between them."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def table(
    kind: "type[Object]", objects: "Sequence[Any]", *, wide: bool, namespaces: bool, pods: "Sequence[Pod]"
) -> str:
    """The objects of one kind as a table.

    `namespaces` adds the namespace's column; `pods` are the cluster's, for what is counted from them.
    """
    columns = [column for column in _columns(kind, pods) if wide or not column[1]]
    if namespaces and kind.NAMESPACED:
        columns.insert(0, ("NAMESPACE", False, lambda obj: obj.namespace))
    return render(
        [[heading for heading, _, _ in columns], *([text(obj) for _, _, text in columns] for obj in objects)]
    )


def age(obj: "Object") -> str:
    """How long ago the object was made, as kubectl writes it; "-" where that is not known."""
    seconds = seconds_old(obj)
    return "-" if seconds == math.inf else duration(seconds)


def seconds_old(obj: "Object") -> float:
    """How long ago the object was made; infinity where that is not known."""
    try:
        made = datetime.datetime.fromisoformat(obj.metadata.creation_timestamp)
    except ValueError:
        return math.inf
    if made.tzinfo is None:
        made = made.replace(tzinfo=datetime.UTC)
    return (datetime.datetime.now(datetime.UTC) - made).total_seconds()


def duration(seconds: float) -> str:
    """Seconds as "42s", "12m", "5h" or "3d"."""
    whole = max(0, int(seconds))
    for size, letter, limit in ((1, "s", 120), (60, "m", 7200), (3600, "h", 172800)):
        if whole < limit:
            return f"{whole // size}{letter}"
    return f"{whole // 86400}d"


def _columns(kind: "type[Object]", pods: "Sequence[Pod]") -> list[Column]:
    from ztunnel.store.membership import MODE_LABEL, in_mesh

    def name(obj: "Object") -> str:
        return obj.name

    def labels(obj: "Object") -> str:
        return ",".join(f"{key}={value}" for key, value in sorted(obj.metadata.labels.items())) or NONE

    def selected(selector: dict[str, str]) -> str:
        return ",".join(f"{key}={value}" for key, value in sorted(selector.items())) or NONE

    def pod_mesh(pod: "Pod") -> str:
        return "yes" if in_mesh(pod) else "no"

    def pod_addresses(pod: "Pod") -> str:
        return ",".join(pod.addresses) or NONE

    def service_addresses(service: "Service") -> str:
        return "None" if service.headless else ",".join(service.addresses) or NONE

    def service_address(service: "Service") -> str:
        return service_addresses(service).partition(",")[0]

    def service_ports(service: "Service") -> str:
        return ",".join(f"{port.port}/{port.protocol}" for port in service.spec.ports) or NONE

    def own(deployment: "Deployment") -> "list[Pod]":
        return [p for p in pods if p.namespace == deployment.namespace and owner(p) == deployment.name]

    def deployment_ready(deployment: "Deployment") -> str:
        return f"{sum(pod_ready(pod) for pod in own(deployment))}/{deployment.spec.replicas}"

    def namespace_pods(namespace: "Namespace") -> str:
        return str(sum(pod.namespace == namespace.name for pod in pods))

    def node_pods(node: "Node") -> str:
        return str(sum(pod.spec.node_name == node.name for pod in pods))

    def node_address(node: "Node") -> str:
        return ",".join(a.address for a in node.status.addresses if a.type == "InternalIP") or NONE

    def account_pods(account: "ServiceAccount") -> str:
        return str(sum((p.namespace, p.service_account) == (account.namespace, account.name) for p in pods))

    of_kind: dict[str, list[Column]] = {
        "Pod": [
            ("READY", False, _ready),
            ("STATUS", False, pod_status),
            ("RESTARTS", False, lambda pod: str(restarts(pod))),
            ("IP", False, lambda pod: (pod.addresses or [NONE])[0]),
            ("NODE", False, lambda pod: pod.spec.node_name or NONE),
            ("MESH", False, pod_mesh),
            ("SERVICE ACCOUNT", True, lambda pod: pod.service_account),
            ("ADDRESSES", True, pod_addresses),
        ],
        "Service": [
            ("TYPE", False, lambda service: service.spec.type),
            ("CLUSTER-IP", False, service_address),
            ("PORTS", False, service_ports),
            ("ADDRESSES", True, service_addresses),
            ("SELECTOR", True, lambda service: selected(service.spec.selector)),
        ],
        "Deployment": [
            ("READY", False, deployment_ready),
            ("PODS", False, lambda deployment: str(len(own(deployment)))),
            ("SELECTOR", True, lambda deployment: selected(deployment.spec.selector.match_labels)),
        ],
        "Namespace": [
            ("MESH", False, lambda namespace: namespace.metadata.labels.get(MODE_LABEL, "no")),
            ("PODS", False, namespace_pods),
        ],
        "Node": [
            ("ADDRESS", False, node_address),
            ("PODS", False, node_pods),
            ("POD RANGES", True, lambda node: ",".join(node.spec.pod_cidrs) or node.spec.pod_cidr or NONE),
        ],
        "ServiceAccount": [("PODS", False, account_pods)],
        "AuthorizationPolicy": [
            ("ACTION", False, lambda policy: _written(policy, "action") or "ALLOW"),
            ("RULES", False, lambda policy: str(len(_written(policy, "rules") or ()))),
            ("SELECTOR", False, lambda policy: selected(_written(policy, "selector", "matchLabels") or {})),
            ("ENFORCED", False, _accepted),
            ("MESSAGE", True, _condition_message),
        ],
        "PeerAuthentication": [
            ("MODE", False, lambda policy: _written(policy, "mtls", "mode") or "UNSET"),
            ("SELECTOR", False, lambda policy: selected(_written(policy, "selector", "matchLabels") or {})),
            ("ENFORCED", False, _accepted),
            ("MESSAGE", True, _condition_message),
        ],
    }
    return [("NAME", False, name), *of_kind.get(kind.KIND, []), ("AGE", False, age), ("LABELS", True, labels)]


def _written(policy: "Policy", *path: str) -> Any:
    """What stands at a place in a policy's spec, which may be anything; None if there is nothing of use."""
    value: Any = policy.spec
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    if path[-1] == "matchLabels":
        return (
            value
            if isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
            else None
        )
    return value if isinstance(value, list if path[-1] == "rules" else str) else None


def _accepted(policy: "Policy") -> str:
    """Whether it is enforced as it is written: yes, or why not."""
    if policy.metadata.annotations.get("istio.io/dry-run") == "true":
        return "dry run"
    for each in policy.status.conditions:
        if each.type == "ZtunnelAccepted":
            return "yes" if each.status == "True" else each.reason
    return "-"


def _condition_message(policy: "Policy") -> str:
    return (
        next((each.message for each in policy.status.conditions if each.type == "ZtunnelAccepted"), "")
        or NONE
    )


def pod_ready(pod: "Pod") -> bool:
    """Whether all containers of a pod are ready (its condition Ready, or the statuses of the containers)."""
    statuses = pod.status.container_statuses
    return pod.ready or (bool(statuses) and all(status.ready for status in statuses))


def _ready(pod: "Pod") -> str:
    ready = sum(status.ready for status in pod.status.container_statuses)
    if pod.ready and not pod.status.container_statuses:
        ready = len(pod.spec.containers)
    return f"{ready}/{len(pod.spec.containers)}"


def pod_status(pod: "Pod") -> str:
    """The word for a pod's state: why it waits or ended if that is known, else its phase."""
    if pod.metadata.deletion_timestamp:
        return "Terminating"
    for status in pod.status.container_statuses:
        if status.state.waiting is not None and status.state.waiting.reason:
            return status.state.waiting.reason
        if status.state.terminated is not None and status.state.terminated.reason:
            return status.state.terminated.reason
    return pod.status.reason or pod.status.phase or "Pending"


def restarts(pod: "Pod") -> int:
    """How often the pod's programs were started again, all containers together."""
    return sum(status.restart_count for status in pod.status.container_statuses)
