"""What the cluster shall consist of: the user's objects, resolved with regard to what was before. Pure; no I/O.

Namespaces and `default` service accounts that exist by themselves are added, Deployments become pods, pods get nodes
and addresses, Services get virtual addresses. There is no Service for the cluster's DNS (10.96.0.10): the node
itself answers there, and a Service without endpoints would be refused by the mesh.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from ztunnel.embedded import placement, vips
from ztunnel.embedded.addresses import node_address4, node_address6, node_name, pod_range4, pod_range6
from ztunnel.embedded.endpoints import target_port
from ztunnel.embedded.findings import Finding
from ztunnel.embedded.policies import unprotecting
from ztunnel.store.endpointslice import EndpointSlice
from ztunnel.store.gateways import Gateway
from ztunnel.store.kinds import IMPLIED_NAMESPACES
from ztunnel.store.models import (
    AuthorizationPolicy,
    Deployment,
    DeploymentStatus,
    K,
    Key,
    Namespace,
    Node,
    NodeAddress,
    NodeSpec,
    NodeStatus,
    Object,
    ObjectMeta,
    PeerAuthentication,
    Pod,
    PolicyStatus,
    Service,
    ServiceAccount,
)

KINDS: tuple[type[Object], ...] = (
    Namespace,
    PeerAuthentication,
    AuthorizationPolicy,
    ServiceAccount,
    Node,
    Deployment,
    Service,
    EndpointSlice,
    Pod,
    Gateway,
)
"""The kinds that are resolved; Pods after what they depend on, so that whoever follows finds it."""


class Plan(NamedTuple):
    """The cluster as it shall be. `last` is handed to the next plan (see `PodAddresses.last`)."""

    objects: dict[Key, Object]
    findings: list[Finding]
    last: dict[int, int]


class Given(NamedTuple):
    """What there is: the user's objects, and the resolved ones of before."""

    source: Mapping[Key, Object]
    current: Mapping[Key, Object]
    nodes: int


def plan(given: Given, *, now: str, new_uid: Callable[[], str], last: Mapping[int, int]) -> Plan:
    """Resolve the user's objects. `now` (RFC 3339) and `new_uid` are for objects that are new."""
    findings: list[Finding] = []
    namespaces = _namespaces(given.source)
    source = {}
    for key, obj in given.source.items():
        if key.namespace and key.namespace not in namespaces:
            message = f'namespace "{key.namespace}" not found'
            findings.append(Finding(key, message, "add a Namespace object of this name"))
        else:
            source[key] = obj
    objects: list[Object] = list(namespaces.values())
    objects += _accounts(source, namespaces)
    nodes, strange = _nodes(source, given.nodes)
    objects += nodes
    findings += strange
    objects += [obj for obj in source.values() if isinstance(obj, PeerAuthentication | AuthorizationPolicy)]
    objects = [_identified(obj, given.current.get(obj.key), now, new_uid) for obj in objects]
    objects = [_with_status(obj, given.current.get(obj.key)) for obj in objects]

    findings += [
        Finding(
            key,
            "waypoints are not run by the embedded mesh: traffic goes without them",
            "use a Kubernetes cluster",
        )
        for key, obj in source.items()
        if isinstance(obj, Gateway) and obj.waypoint
    ]
    deployments = [
        _identified(obj, given.current.get(obj.key), now, new_uid)
        for obj in source.values()
        if isinstance(obj, Deployment)
    ]
    setting = placement.Setting(
        given.nodes,
        frozenset(obj.key for obj in objects if isinstance(obj, ServiceAccount)),
        now,
        new_uid,
        last,
    )
    wanted = {want.key: want for deployment in deployments for want in placement.from_deployment(deployment)}
    for obj in source.values():
        if isinstance(obj, Pod):
            wanted[obj.key] = placement.from_pod(obj)
    current_pods = {key: obj for key, obj in given.current.items() if isinstance(obj, Pod)}
    placed = placement.place(wanted.values(), current_pods, setting)
    findings += placed.findings

    services, refused = vips.resolve(
        (obj for obj in source.values() if isinstance(obj, Service)),
        {key: obj for key, obj in given.current.items() if isinstance(obj, Service)},
    )
    findings += refused
    findings += _useless(services, placed.pods)
    findings += unprotecting(source.values(), placed.pods, namespaces)
    objects += [
        _identified(obj, given.current.get(obj.key), now, new_uid)
        for obj in source.values()
        if isinstance(obj, EndpointSlice)
    ]
    objects += [_identified(service, given.current.get(service.key), now, new_uid) for service in services]
    objects += [_counted(deployment, placed.pods) for deployment in deployments]
    objects += placed.pods
    return Plan({obj.key: obj for obj in objects}, findings, placed.last)


def _namespaces(source: Mapping[Key, Object]) -> dict[str, Namespace]:
    found = {name: Namespace(metadata=ObjectMeta(name=name)) for name in IMPLIED_NAMESPACES}
    return found | {obj.name: obj for obj in source.values() if isinstance(obj, Namespace)}


def _accounts(source: Mapping[Key, Object], namespaces: Iterable[str]) -> list[ServiceAccount]:
    implied = [ServiceAccount(metadata=ObjectMeta(name="default", namespace=name)) for name in namespaces]
    found = {account.key: account for account in implied}
    return list(
        (found | {obj.key: obj for obj in source.values() if isinstance(obj, ServiceAccount)}).values()
    )


def _nodes(source: Mapping[Key, Object], count: int) -> tuple[list[Node], list[Finding]]:
    """The simulated nodes, with the labels and annotations that the user's Node objects of their names add."""
    given = {obj.name: obj for obj in source.values() if isinstance(obj, Node)}
    nodes = []
    for number in range(1, count + 1):
        name = node_name(number)
        own = given.pop(name, Node(metadata=ObjectMeta(name=name)))
        four, six = node_address4(number).ip, node_address6(number).ip
        ranges = [str(pod_range4(number)), str(pod_range6(number))]
        nodes.append(
            Node(
                metadata=ObjectMeta(
                    name=name,
                    labels={
                        "kubernetes.io/hostname": name,
                        "kubernetes.io/os": "linux",
                        **own.metadata.labels,
                    },
                    annotations=own.metadata.annotations,
                ),
                spec=NodeSpec(pod_cidr=ranges[0], pod_cidrs=ranges),
                status=NodeStatus(
                    addresses=[
                        NodeAddress(type="InternalIP", address=str(four)),
                        NodeAddress(type="InternalIP", address=str(six)),
                        NodeAddress(type="Hostname", address=name),
                    ]
                ),
            )
        )
    remedy = f"start with --nodes {count + 1} or more, or remove it"
    return nodes, [Finding(node.key, "there is no such node", remedy) for node in given.values()]


def _identified(obj: K, before: Object | None, now: str, new_uid: Callable[[], str]) -> K:
    """The object with the uid and birth that it had before, or new ones; what users write there does not count."""
    metadata = msgspec.structs.replace(
        obj.metadata,
        uid=before.metadata.uid if before is not None else new_uid(),
        creation_timestamp=before.metadata.creation_timestamp if before is not None else now,
    )
    return msgspec.structs.replace(obj, metadata=metadata)


def _with_status(obj: Object, before: Object | None) -> Object:
    """A policy with the status that the control plane has written on it, and nothing that users write there."""
    if not isinstance(obj, AuthorizationPolicy | PeerAuthentication):
        return obj
    status = before.status if isinstance(before, type(obj)) else PolicyStatus()
    return msgspec.structs.replace(obj, status=status)


def _counted(deployment: Deployment, pods: Iterable[Pod]) -> Deployment:
    own = [
        pod
        for pod in pods
        if pod.namespace == deployment.namespace
        and any(owner.uid == deployment.metadata.uid for owner in pod.metadata.owner_references)
    ]
    ready = sum(pod.ready for pod in own)
    status = DeploymentStatus(replicas=len(own), updated_replicas=len(own), ready_replicas=ready)
    return msgspec.structs.replace(deployment, status=status)


def _useless(services: Iterable[Service], pods: Iterable[Pod]) -> list[Finding]:
    """Services that lead nowhere, and ports that no selected pod has."""
    by_namespace: dict[str, list[Pod]] = defaultdict(list)
    for pod in pods:
        by_namespace[pod.namespace].append(pod)
    findings = []
    for service in services:
        selector = service.spec.selector
        if service.spec.type == "ExternalName":
            continue
        if not selector:
            message, remedy = "has no selector, so it leads nowhere", "add spec.selector with labels of pods"
            findings.append(Finding(service.key, message, remedy, "warning"))
            continue
        selected = [
            pod for pod in by_namespace[service.namespace] if selector.items() <= pod.metadata.labels.items()
        ]
        if not selected:
            labels = ",".join(f"{key}={value}" for key, value in selector.items())
            message = f"spec.selector ({labels}) selects no pod of namespace {service.namespace}"
            findings.append(
                Finding(service.key, message, "make it match the labels of the pods meant", "warning")
            )
        for port in service.spec.ports if selected else []:
            if all(target_port(port, pod) is None for pod in selected):
                message = f'targetPort "{port.target_port}": no selected pod has a {port.protocol} port of this name'
                remedy = "name a container's port so, or give a number"
                findings.append(Finding(service.key, message, remedy, "warning"))
    return findings
