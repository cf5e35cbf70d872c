"""From Deployments and Pods to pods with a node, addresses and an identity that stay while they live. Pure; no I/O.

A pod that cannot run is an object all the same, without addresses, whose status says why.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec

from ztunnel.embedded.addresses import node_address4, node_address6, node_name, node_number
from ztunnel.embedded.findings import Finding
from ztunnel.embedded.ipam import Exhausted, PodAddresses
from ztunnel.store.membership import REDIRECTION_ANNOTATION
from ztunnel.store.models import (
    Deployment,
    Key,
    ObjectMeta,
    OwnerReference,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    PodTemplate,
    key_of,
)

APPLIED_ANNOTATION = "embedded.ambient/applied"
"""On each resolved pod: which spec and which annotations came from the user, so that others' are left alone."""

TEMPLATE_HASH_LABEL = "pod-template-hash"


class Wanted(NamedTuple):
    """A pod that the user wants, before anybody thought of where: `source` is the object that says so."""

    source: Key
    metadata: ObjectMeta
    spec: PodSpec

    @property
    def key(self) -> Key:
        return key_of(Pod, self.metadata.namespace, self.metadata.name)


class Setting(NamedTuple):
    """What placing depends on besides the pods themselves. `now` is RFC 3339, `last` as of `PodAddresses.last`."""

    nodes: int
    accounts: frozenset[Key]
    now: str
    new_uid: Callable[[], str]
    last: Mapping[int, int]


class Placed(NamedTuple):
    """The pods as they shall be, what is wrong, and the last address number given out per node."""

    pods: list[Pod]
    findings: list[Finding]
    last: dict[int, int]


def from_deployment(deployment: Deployment) -> list[Wanted]:
    """The pods of a Deployment: NAME-HASH-0, NAME-HASH-1, ...; the hash changes with the template."""
    template = deployment.spec.template
    template_hash = _template_hash(template)
    metadata = ObjectMeta(
        namespace=deployment.namespace,
        labels={**template.metadata.labels, TEMPLATE_HASH_LABEL: template_hash},
        annotations=template.metadata.annotations,
        owner_references=[
            OwnerReference(
                api_version=deployment.API_VERSION,
                kind=deployment.KIND,
                name=deployment.name,
                uid=deployment.metadata.uid,
                controller=True,
            )
        ],
    )
    return [
        Wanted(
            deployment.key,
            msgspec.structs.replace(metadata, name=f"{deployment.name}-{template_hash}-{index}"),
            template.spec,
        )
        for index in range(deployment.spec.replicas)
    ]


def from_pod(pod: Pod) -> Wanted:
    """A Pod that the user wrote."""
    metadata = ObjectMeta(
        name=pod.name,
        namespace=pod.namespace,
        labels=pod.metadata.labels,
        annotations=pod.metadata.annotations,
    )
    return Wanted(pod.key, metadata, pod.spec)


def place(wanted: Iterable[Wanted], current: Mapping[Key, Pod], setting: Setting) -> Placed:
    """Every wanted pod with its node and addresses, or with the reason why not.

    A pod keeps uid, node and addresses while its spec is the same and its node exists; with another spec it is
    another pod of the same name. One that is being deleted keeps its addresses, and nothing else.
    """
    pools = {
        number: PodAddresses(number, setting.last.get(number, 0)) for number in range(1, setting.nodes + 1)
    }
    for pod in current.values():
        if pod.metadata.deletion_timestamp:
            _keep_addresses(pod, pools)
    pods: dict[Key, Pod] = {}
    waiting: list[Wanted] = []
    findings: dict[tuple[Key, str], Finding] = {}
    load: Counter[str] = Counter()
    spread: Counter[tuple[Key, str]] = Counter()

    def settle(want: Wanted, pod: Pod) -> None:
        pods[want.key] = pod
        if pod.spec.node_name:
            load[pod.spec.node_name] += 1
            spread[want.source, pod.spec.node_name] += 1

    for want in sorted(wanted, key=lambda want: want.key):
        before = current.get(want.key)
        for finding in _remarks(want, setting):
            findings.setdefault((finding.key, finding.message), finding)
        if before is not None and _lives_on(want, before, pools):
            settle(want, _updated(want, before))
        else:
            waiting.append(want)
    for want in waiting:
        before = current.get(want.key)
        reason = _obstacle(want, setting)
        if reason is None:
            node = want.spec.node_name or _best_node(want.source, pools, load, spread)
            try:
                settle(want, _started(want, node, pools[node_number(node)], setting))
                continue
            except Exhausted as error:
                reason = _Obstacle("Unschedulable", str(error), "remove pods, or start with more --nodes")
        finding = Finding(want.source, f"{want.key.name}: {reason.message}", reason.remedy)
        if want.source == want.key or reason.of_template:
            finding = Finding(want.source, reason.message, reason.remedy)
        findings.setdefault((finding.key, finding.message), finding)
        settle(want, _halted(want, reason, before, setting))
    return Placed(
        [pods[key] for key in sorted(pods)],
        list(findings.values()),
        {number: pool.last for number, pool in pools.items()},
    )


class _Obstacle(NamedTuple):
    """Why a pod cannot run. `of_template`: the same for all pods of a Deployment."""

    reason: str
    message: str
    remedy: str
    phase: Literal["Pending", "Failed"] = "Pending"
    of_template: bool = False


def _obstacle(want: Wanted, setting: Setting) -> _Obstacle | None:
    bare = [container.name for container in want.spec.containers if not container.command]
    if bare:
        names = ", ".join(f'"{name}"' for name in bare)
        return _Obstacle(
            "NoCommand",
            f"container {names} has no command" if len(bare) == 1 else f"containers {names} have no command",
            "images are not run here: write the program as command: [...]",
            "Failed",
            of_template=True,
        )
    account = want.spec.service_account_name or "default"
    if key_of_account(want.key.namespace, account) not in setting.accounts:
        return _Obstacle(
            "NoServiceAccount",
            f'ServiceAccount "{account}" not found in namespace {want.key.namespace}',
            "add a ServiceAccount object of this name",
            of_template=True,
        )
    node = want.spec.node_name
    if node and node not in {node_name(number) for number in range(1, setting.nodes + 1)}:
        nodes = "node-1" if setting.nodes == 1 else f"node-1 to node-{setting.nodes}"
        return _Obstacle(
            "NoNode",
            f'node "{node}" does not exist',
            f"use one of {nodes}, or leave nodeName out",
            of_template=True,
        )
    return None


def key_of_account(namespace: str, name: str) -> Key:
    """The key of a ServiceAccount."""
    return Key("", "ServiceAccount", namespace, name)


def _remarks(want: Wanted, setting: Setting) -> Iterable[Finding]:
    """What does not keep the pod from running, but is not as the user thinks."""
    if want.spec.init_containers:
        message = "initContainers are not run by this version"
        yield Finding(want.source, message, "do their work in the container's command", "warning")
    for container in want.spec.containers:
        for variable in container.env:
            origin = variable.value_from
            if origin is not None and origin.field_ref is None:
                message = (
                    f"container {container.name}: env {variable.name}: valueFrom is not read by this version"
                )
                yield Finding(want.source, message, "write its value, or a fieldRef", "warning")
    if REDIRECTION_ANNOTATION in want.metadata.annotations:
        message = f"annotation {REDIRECTION_ANNOTATION} is left out: only the node agent writes it"
        yield Finding(want.source, message, "remove it; label the namespace or pod instead", "warning")


def _lives_on(want: Wanted, before: Pod, pools: Mapping[int, PodAddresses]) -> bool:
    """Whether the pod from before is the wanted one and can stay; its addresses are marked as in use then."""
    if before.metadata.deletion_timestamp or _applied(before).spec != _spec_hash(want.spec):
        return False
    return bool(before.metadata.uid) and _keep_addresses(before, pools)


def _keep_addresses(pod: Pod, pools: Mapping[int, PodAddresses]) -> bool:
    """Mark the addresses of a pod from before as in use; False where they cannot be its own."""
    try:
        pool = pools.get(node_number(pod.spec.node_name))
    except ValueError:
        return False
    return pool is not None and (pod.spec.host_network or pool.keep(pod.addresses))


def _best_node(
    source: Key, pools: Mapping[int, PodAddresses], load: Counter[str], spread: Counter[tuple[Key, str]]
) -> str:
    """Where there is room, the fewest pods of the same origin are, then the fewest pods, then the first."""
    names = {node_name(number): pool for number, pool in pools.items()}
    return min(
        names, key=lambda name: (names[name].full, spread[source, name], load[name], node_number(name))
    )


def _started(want: Wanted, node: str, pool: PodAddresses, setting: Setting) -> Pod:
    number = node_number(node)
    host = [str(node_address4(number).ip), str(node_address6(number).ip)]
    addresses = host if want.spec.host_network else pool.take()
    status = PodStatus(
        phase="Pending",
        pod_ip=addresses[0],
        pod_ips=[PodIP(ip=address) for address in addresses],
        host_ip=host[0],
    )
    metadata = msgspec.structs.replace(
        want.metadata,
        uid=setting.new_uid(),
        creation_timestamp=setting.now,
        annotations=_annotations(want, {}),
    )
    return Pod(metadata=metadata, spec=msgspec.structs.replace(want.spec, node_name=node), status=status)


def _halted(want: Wanted, obstacle: _Obstacle, before: Pod | None, setting: Setting) -> Pod:
    """The pod that waits, or has failed; it stays the same object while the reason does."""
    status = PodStatus(
        phase=obstacle.phase, reason=obstacle.reason, message=f"{obstacle.message}; {obstacle.remedy}"
    )
    same = before is not None and not before.addresses and _applied(before).spec == _spec_hash(want.spec)
    metadata = msgspec.structs.replace(
        want.metadata,
        uid=before.metadata.uid if before is not None and same else setting.new_uid(),
        creation_timestamp=before.metadata.creation_timestamp if before is not None and same else setting.now,
        annotations=_annotations(want, {}),
    )
    return Pod(metadata=metadata, spec=want.spec, status=status)


def _updated(want: Wanted, before: Pod) -> Pod:
    """The running pod with the user's labels and annotations of now; the rest of it belongs to others."""
    ours = _applied(before).annotations
    others = {key: value for key, value in before.metadata.annotations.items() if key not in ours}
    metadata = msgspec.structs.replace(
        want.metadata,
        uid=before.metadata.uid,
        creation_timestamp=before.metadata.creation_timestamp,
        deletion_timestamp=before.metadata.deletion_timestamp,
        annotations=_annotations(want, others),
    )
    spec = msgspec.structs.replace(want.spec, node_name=before.spec.node_name)
    return Pod(metadata=metadata, spec=spec, status=before.status)


def _annotations(want: Wanted, others: Mapping[str, str]) -> dict[str, str]:
    theirs = {key: value for key, value in want.metadata.annotations.items() if key != REDIRECTION_ANNOTATION}
    applied = _Applied(_spec_hash(want.spec), tuple(sorted(theirs)))
    return {**others, **theirs, APPLIED_ANNOTATION: msgspec.json.encode(applied).decode()}


class _Applied(msgspec.Struct, frozen=True):
    """What APPLIED_ANNOTATION holds."""

    spec: str = ""
    annotations: tuple[str, ...] = ()


def _applied(pod: Pod) -> _Applied:
    try:
        return msgspec.json.decode(pod.metadata.annotations.get(APPLIED_ANNOTATION, "{}"), type=_Applied)
    except msgspec.DecodeError:
        return _Applied()


def _spec_hash(spec: PodSpec) -> str:
    return hashlib.sha256(msgspec.json.encode(spec, order="deterministic")).hexdigest()[:16]


def _template_hash(template: PodTemplate) -> str:
    """Ten characters as Kubernetes' own hashes look, of all that the template says about its pods."""
    text = msgspec.json.encode(
        [template.metadata.labels, template.metadata.annotations, template.spec], order="deterministic"
    )
    alphabet = "bcdfghjklmnpqrstvwxz2456789"
    number = int.from_bytes(hashlib.sha256(text).digest()[:8])
    characters = []
    for _ in range(10):
        number, rest = divmod(number, len(alphabet))
        characters.append(alphabet[rest])
    return "".join(characters)
