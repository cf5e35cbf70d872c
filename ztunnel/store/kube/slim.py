"""Objects as they are kept in memory: without what the mesh never reads, and what many share is there once.

Ten thousand pods of a thousand Deployments have a thousand sets of labels, containers and owners.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from msgspec.structs import replace

from ztunnel.store.models import (
    Container,
    ContainerPort,
    ContainerStatus,
    Object,
    ObjectMeta,
    OwnerReference,
    Pod,
    PodCondition,
    PodStatus,
)

_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"  # a second copy of the whole object
_SHARED: Final = 1 << 16  # different sets of labels, containers, ... that are remembered

_one = sys.intern


def slim_of(kind: type[Object]) -> Callable[[Any], Any]:
    """What makes an object of a kind smaller."""
    return _slim_pod if kind is Pod else _slim


def _slim(obj: Object) -> Object:
    metadata = obj.metadata
    if _APPLIED not in metadata.annotations:
        return obj
    return replace(obj, metadata=replace(metadata, annotations=_without_applied(metadata.annotations)))


def _slim_pod(pod: Pod) -> Pod:
    """Keeps who and where the pod is, its containers' and sidecars' names and ports, its phase and readiness."""
    given, spec, status = pod.metadata, pod.spec, pod.status
    metadata = ObjectMeta(
        name=given.name,
        namespace=_one(given.namespace),
        uid=given.uid,
        labels=_texts(frozenset(given.labels.items())),
        annotations=_texts(frozenset(_without_applied(given.annotations).items())),
        owner_references=_owners(tuple(given.owner_references)),
        creation_timestamp=_one(given.creation_timestamp),
        deletion_timestamp=given.deletion_timestamp,
        deletion_grace_period_seconds=given.deletion_grace_period_seconds,
    )
    slim_spec = replace(
        spec,
        containers=_containers(tuple((each.name, tuple(each.ports)) for each in spec.containers)),
        init_containers=_sidecars(
            tuple(
                (each.name, tuple(each.ports))
                for each in spec.init_containers
                if each.restart_policy == "Always" and each.ports
            )
        ),
        node_name=_one(spec.node_name),
        service_account_name=_one(spec.service_account_name),
    )
    slim_status = PodStatus(
        phase=status.phase,
        reason=status.reason,
        pod_ip=status.pod_ip,
        pod_ips=status.pod_ips,
        host_ip=_one(status.host_ip),
        conditions=_conditions(tuple(each.status for each in status.conditions if each.type == "Ready")),
        container_statuses=_statuses(tuple((each.name, each.ready) for each in status.container_statuses)),
    )
    return Pod(metadata=metadata, spec=slim_spec, status=slim_status)


def _without_applied(annotations: dict[str, str]) -> dict[str, str]:
    return {key: text for key, text in annotations.items() if key != _APPLIED}


@lru_cache(_SHARED)
def _texts(items: frozenset[tuple[str, str]]) -> dict[str, str]:
    return {_one(key): _one(text) for key, text in sorted(items)}


@lru_cache(_SHARED)
def _owners(owners: tuple[OwnerReference, ...]) -> list[OwnerReference]:
    return list(owners)


@lru_cache(_SHARED)
def _containers(described: tuple[tuple[str, tuple[ContainerPort, ...]], ...]) -> list[Container]:
    return [Container(name=name, ports=list(ports)) for name, ports in described]


@lru_cache(_SHARED)
def _sidecars(described: tuple[tuple[str, tuple[ContainerPort, ...]], ...]) -> list[Container]:
    return [Container(name=name, ports=list(ports), restart_policy="Always") for name, ports in described]


@lru_cache(_SHARED)
def _conditions(statuses: tuple[Any, ...]) -> list[PodCondition]:
    return [PodCondition(type="Ready", status=status) for status in statuses]


@lru_cache(_SHARED)
def _statuses(described: tuple[tuple[str, bool], ...]) -> list[ContainerStatus]:
    return [ContainerStatus(name=name, ready=ready) for name, ready in described]
