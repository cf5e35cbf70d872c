"""Which pods stand behind which Service: what an endpoint controller decides. Pure; no I/O."""

from collections.abc import Iterable
from typing import NamedTuple

from ztunnel.store.models import Pod, Service, ServicePort


class Backend(NamedTuple):
    """Where a connection may be sent: a pod's address and its own port."""

    address: str
    port: int


class Frontend(NamedTuple):
    """A Service's virtual address and port, and what answers there; no backends means: refuse."""

    address: str
    protocol: str
    port: int
    backends: tuple[Backend, ...]


def selected(service: Service, pods: Iterable[Pod]) -> list[Pod]:
    """The pods that the Service's selector names and that have an address; none for an empty selector."""
    wanted = service.spec.selector
    if not wanted:
        return []
    return [
        pod
        for pod in pods
        if pod.namespace == service.namespace
        and pod.addresses
        and pod.status.phase not in ("Succeeded", "Failed")
        and not pod.metadata.deletion_timestamp
        and all(pod.metadata.labels.get(key) == value for key, value in wanted.items())
    ]


def serving(service: Service, pods: Iterable[Pod]) -> list[Pod]:
    """Those of the selected pods that are ready (or all, with publishNotReadyAddresses)."""
    return [pod for pod in selected(service, pods) if pod.ready or service.spec.publish_not_ready_addresses]


def target_port(port: ServicePort, pod: Pod) -> int | None:
    """The pod's own port that a Service's port leads to; None if it has no port of that name."""
    if isinstance(port.target_port, int):
        return port.target_port
    if port.target_port is None:
        return port.port
    for container in pod.spec.containers:
        for declared in container.ports:
            if declared.name == port.target_port and declared.protocol == port.protocol:
                return declared.container_port
    return None


def same_family(addresses: Iterable[str], address: str) -> list[str]:
    """Those of `addresses` that are of the same IP family as `address`."""
    return [other for other in addresses if (":" in other) == (":" in address)]


def frontends(services: Iterable[Service], pods: Iterable[Pod]) -> list[Frontend]:
    """Every virtual address and port (TCP and UDP) with its backends, sorted."""
    pods = list(pods)
    found = []
    for service in services:
        addresses = service.addresses
        if not addresses:
            continue
        ready = serving(service, pods)
        for port in service.spec.ports:
            if port.protocol not in ("TCP", "UDP"):
                continue
            for address in addresses:
                backends = {
                    Backend(own, target)
                    for pod in ready
                    if (target := target_port(port, pod)) is not None
                    for own in same_family(pod.addresses, address)
                }
                found.append(Frontend(address, port.protocol, port.port, tuple(sorted(backends))))
    return sorted(found)
