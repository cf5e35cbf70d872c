"""What Kubernetes refuses although its shape is right: names, labels, ports, selectors. Pure functions."""

import ipaddress
import re
from collections.abc import Iterable, Iterator

from ztunnel.store import authorization, peerauth
from ztunnel.store.faults import Fault, Path, path_text
from ztunnel.store.gateways import WAYPOINT_CLASS, Gateway
from ztunnel.store.models import (
    AuthorizationPolicy,
    Container,
    Deployment,
    Object,
    ObjectMeta,
    PeerAuthentication,
    Pod,
    PodSpec,
    Service,
)
from ztunnel.store.names import dns_label_fault, label_key_fault, label_value_fault, name_fault

__all__ = ["Fault", "Path", "check", "path_text"]

_PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")


def check(obj: Object) -> Iterator[Fault]:
    """Everything about the object itself that Kubernetes would refuse, in the order of its fields."""
    yield from _metadata(obj.metadata, ("metadata",))
    if remedy := name_fault(type(obj), obj.name):
        yield Fault(("metadata", "name"), f'"{obj.name}" is not a valid name', remedy)
    if obj.NAMESPACED and (remedy := dns_label_fault(obj.namespace)):
        yield Fault(("metadata", "namespace"), f'"{obj.namespace}" is not a valid namespace', remedy)
    match obj:
        case Service():
            yield from _service(obj)
        case Pod():
            yield from _pod(obj.spec, ("spec",))
        case Deployment():
            yield from _deployment(obj)
        case AuthorizationPolicy():
            yield from authorization.read(obj).faults
        case PeerAuthentication():
            yield from peerauth.read(obj).faults
        case Gateway() if not obj.waypoint:
            message = f"{obj.spec.gateway_class_name!r} is not acted on by this version"
            remedy = f"do not rely on it: of Gateways only waypoints are, of class {WAYPOINT_CLASS}"
            yield Fault(("spec", "gatewayClassName"), message, remedy, "warning")
        case _:
            pass


def _metadata(metadata: ObjectMeta, path: Path) -> Iterator[Fault]:
    yield from _labels(metadata.labels, (*path, "labels"))
    for key in metadata.annotations:
        if remedy := label_key_fault(key):
            yield Fault((*path, "annotations", key), "not a valid annotation key", remedy)


def _labels(labels: dict[str, str], path: Path) -> Iterator[Fault]:
    for key, value in labels.items():
        if remedy := label_key_fault(key):
            yield Fault((*path, key), "not a valid label key", remedy)
        if remedy := label_value_fault(value):
            yield Fault((*path, key), f'"{value}" is not a valid label value', remedy)


def _service(service: Service) -> Iterator[Fault]:
    spec = service.spec
    ports: Path = ("spec", "ports")
    if spec.type == "ExternalName":
        if not spec.external_name:
            yield Fault(
                ("spec", "externalName"), "is missing", "give the DNS name that the Service stands for"
            )
    elif not spec.ports and not service.headless:
        yield Fault(ports, "is missing", "list at least one port")
    for index, port in enumerate(spec.ports):
        if not port.name and len(spec.ports) > 1:
            yield Fault((*ports, index, "name"), "is missing", "name each port of a Service with several")
        if port.name and (remedy := dns_label_fault(port.name)):
            yield Fault((*ports, index, "name"), f'"{port.name}" is not a valid port name', remedy)
        if isinstance(port.target_port, str):
            yield from _port_name(port.target_port, (*ports, index, "targetPort"))
    for index in _repeated((port.name or index) for index, port in enumerate(spec.ports)):
        yield Fault(
            (*ports, index, "name"), f'"{spec.ports[index].name}" is used twice', "name it differently"
        )
    for index in _repeated((port.port, port.protocol) for port in spec.ports):
        port = spec.ports[index]
        yield Fault(
            (*ports, index), f"port {port.port}/{port.protocol} is listed twice", "remove one of them"
        )
    yield from _labels(spec.selector, ("spec", "selector"))
    yield from _cluster_ips(service)


def _cluster_ips(service: Service) -> Iterator[Fault]:
    spec = service.spec
    if service.headless:
        if spec.cluster_ips[1:]:
            yield Fault(
                ("spec", "clusterIPs"), '"None" stands with addresses', 'keep either "None" or addresses'
            )
        return
    if spec.cluster_ip and spec.cluster_ips and spec.cluster_ips[0] != spec.cluster_ip:
        yield Fault(
            ("spec", "clusterIPs"), "its first is not clusterIP", "make them the same, or give only one"
        )
    places: list[tuple[Path, str]] = [
        (("spec", "clusterIPs", index), text) for index, text in enumerate(spec.cluster_ips)
    ]
    if spec.cluster_ip:
        places.insert(0, (("spec", "clusterIP"), spec.cluster_ip))
    families = []
    for path, text in places:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            yield Fault(path, f'"{text}" is not an IP address', 'give an address, "None", or leave it out')
            continue
        if address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local:
            yield Fault(
                path, f'"{text}" cannot be a Service\'s address', "give a unicast address, or leave it out"
            )
        if path[-1] != "clusterIP":
            families.append(address.version)
    if len(families) != len(set(families)):
        yield Fault(
            ("spec", "clusterIPs"), "two addresses of one family", "give at most one IPv4 and one IPv6"
        )
    if len(spec.ip_families) != len(set(spec.ip_families)):
        yield Fault(("spec", "ipFamilies"), "names a family twice", "name each family once")


def _pod(spec: PodSpec, path: Path) -> Iterator[Fault]:
    if not spec.containers:
        yield Fault((*path, "containers"), "is missing", "list at least one container with name and command")
    for name, containers in (("containers", spec.containers), ("initContainers", spec.init_containers)):
        for index, container in enumerate(containers):
            yield from _container(container, (*path, name, index))
    everyone = [*spec.containers, *spec.init_containers]
    for index in _repeated(container.name for container in everyone):
        duplicate = everyone[index].name
        yield Fault(
            (*path, "containers"),
            f'two containers are named "{duplicate}"',
            "name each container differently",
        )
    if spec.hostname and (remedy := dns_label_fault(spec.hostname)):
        yield Fault((*path, "hostname"), f'"{spec.hostname}" is not a valid host name', remedy)


def _container(container: Container, path: Path) -> Iterator[Fault]:
    if remedy := dns_label_fault(container.name):
        yield Fault((*path, "name"), f'"{container.name}" is not a valid container name', remedy)
    for index, port in enumerate(container.ports):
        if port.name:
            yield from _port_name(port.name, (*path, "ports", index, "name"))
    for index in _repeated(port.name or index for index, port in enumerate(container.ports)):
        name = container.ports[index].name
        yield Fault((*path, "ports", index, "name"), f'"{name}" is used twice', "name it differently")
    for index, variable in enumerate(container.env):
        if not _ENV_NAME.fullmatch(variable.name):
            yield Fault(
                (*path, "env", index, "name"),
                f'"{variable.name}" is not a valid name of a variable',
                "use letters, digits, '-', '_' and '.', not beginning with a digit",
            )


def _deployment(deployment: Deployment) -> Iterator[Fault]:
    spec = deployment.spec
    if spec.selector.empty:
        yield Fault(
            ("spec", "selector"),
            "is empty",
            "select the template's labels: matchLabels with at least one of them",
        )
    elif not spec.selector.matches(spec.template.metadata.labels):
        yield Fault(
            ("spec", "selector"),
            "does not match the labels of spec.template",
            "make spec.selector.matchLabels and spec.template.metadata.labels agree",
        )
    yield from _metadata(spec.template.metadata, ("spec", "template", "metadata"))
    yield from _pod(spec.template.spec, ("spec", "template", "spec"))
    if spec.template.spec.restart_policy != "Always":
        yield Fault(
            ("spec", "template", "spec", "restartPolicy"),
            f"{spec.template.spec.restart_policy} is not possible in a Deployment",
            "leave it out, or use a Pod",
        )


def _port_name(name: str, path: Path) -> Iterator[Fault]:
    if len(name) > 15 or not _PORT_NAME.fullmatch(name):
        yield Fault(
            path,
            f'"{name}" is not a valid port name',
            "use at most 15 lower case letters, digits and '-', with at least one letter",
        )


def _repeated(values: Iterable[object]) -> Iterator[int]:
    """The indexes of values that were there before."""
    seen = set()
    for index, value in enumerate(values):
        if value in seen:
            yield index
        seen.add(value)
