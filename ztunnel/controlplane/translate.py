"""Kubernetes objects into the Workload and Service messages that node proxies read.

Pure functions of their arguments: no I/O, no clock, no memory of earlier calls. What an object says wrongly becomes
a Problem beside the message, never an exception. The shapes follow what Istio's control plane sends in ambient mode.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ztunnel.mesh.model import pod_uid
from ztunnel.store.membership import in_mesh
from ztunnel.store.models import Node, OwnerReference, Pod, Service, ServicePort
from ztunnel.store.problems import Problem
from ztunnel.wire import workload_pb2 as pb

CLUSTER_DOMAIN: Final = "cluster.local"

_FINISHED = frozenset({"Succeeded", "Failed"})
# A CronJob names its Jobs after itself and the scheduled minute (or second) since 1970.
_CRON_JOB_NAME = re.compile(r"(.+)-\d{8,10}")

_APP_PROTOCOLS: Final[dict[str, pb.AppProtocol.ValueType]] = {
    "http": pb.HTTP11,
    "http2": pb.HTTP2,
    "grpc": pb.GRPC,
    "tcp": pb.TCP,
    "tls": pb.TLS,
    "https": pb.TLS,
    # Protocols of TCP that Istio knows by name and carries as plain bytes.
    "mongo": pb.TCP,
    "mysql": pb.TCP,
    "redis": pb.TCP,
    # gRPC-Web is HTTP/1.1 to everything on the way.
    "grpc-web": pb.HTTP11,
    "kubernetes.io/h2c": pb.HTTP2,
    "kubernetes.io/ws": pb.HTTP11,
    "kubernetes.io/wss": pb.TLS,
}
_LOCALITY_PREFERENCE: Final[dict[str, tuple[pb.LoadBalancing.Scope.ValueType, ...]]] = {
    "PreferClose": (pb.LoadBalancing.NETWORK, pb.LoadBalancing.REGION, pb.LoadBalancing.ZONE),
    "PreferSameZone": (pb.LoadBalancing.NETWORK, pb.LoadBalancing.REGION, pb.LoadBalancing.ZONE),
    "PreferSameNode": (
        pb.LoadBalancing.NETWORK,
        pb.LoadBalancing.REGION,
        pb.LoadBalancing.ZONE,
        pb.LoadBalancing.SUBZONE,
        pb.LoadBalancing.NODE,
    ),
}
_TRAFFIC_DISTRIBUTION_ANNOTATION = "networking.istio.io/traffic-distribution"


class Settings(NamedTuple):
    """What the control plane knows besides the objects: the values that every message carries."""

    cluster_id: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    network: str = ""
    root_namespace: str = "istio-system"
    """Where the policies of the whole mesh are."""


def workload_uid(namespace: str, name: str, settings: Settings) -> str:
    """The uid of a pod's workload, which is also its resource name: `CLUSTER//Pod/NS/NAME`."""
    return pod_uid(settings.cluster_id, namespace, name)


def service_hostname(namespace: str, name: str) -> str:
    """The DNS name of a Service: `NAME.NS.svc.cluster.local`."""
    return f"{name}.{namespace}.svc.{CLUSTER_DOMAIN}"


def service_key(namespace: str, name: str) -> str:
    """The resource name of a Service, and how workloads name it: `NS/HOSTNAME`."""
    return f"{namespace}/{service_hostname(namespace, name)}"


def address_key(address: bytes, settings: Settings) -> str:
    """The name by which an address is asked for: `NETWORK/IP`, IP as text. `address` is 4 or 16 bytes."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    return f"{settings.network}/{socket.inet_ntop(family, address)}"


def is_workload(pod: Pod) -> bool:
    """Whether the pod is (still) a destination: it has an address and has not run to its end."""
    return pod.status.phase not in _FINISHED and bool(pod.addresses)


def is_service(service: Service) -> bool:
    """Whether the Service is one that proxies are told of; an ExternalName is only a DNS alias."""
    return service.spec.type != "ExternalName"


def selects(service: Service, pod: Pod) -> bool:
    """Whether the pod is an endpoint of the Service by its labels. No selector selects nothing."""
    selector = service.spec.selector
    if not selector or service.namespace != pod.namespace:
        return False
    labels = pod.metadata.labels
    return all(labels.get(key) == value for key, value in selector.items())


def parse_addresses(obj: Pod | Service) -> tuple[tuple[bytes, ...], list[Problem]]:
    """The object's addresses (4 or 16 bytes each) that a packet can be sent to, and a problem for each that is not."""
    field = "status.podIPs" if isinstance(obj, Pod) else "spec.clusterIPs"
    good: list[bytes] = []
    problems: list[Problem] = []
    for text in obj.addresses:
        try:
            address = _packed(text)
        except ValueError:
            problems.append(
                Problem(
                    obj.ref, "", f"{field}: {text!r} is not an IP address", "write it as 10.0.0.1 or fd00::1"
                )
            )
            continue
        if not _of_a_host(address):
            problems.append(
                Problem(
                    obj.ref, "", f"{field}: {text} is not a host's address", "use one that others can reach"
                )
            )
        elif address not in good:
            good.append(address)
    return tuple(good), problems


def host_address(text: str) -> bytes:
    """The 4 or 16 bytes of an address that a packet can be sent to. Raises ValueError: what is wrong, in words."""
    try:
        address = _packed(text)
    except ValueError:
        raise ValueError("is not an IP address") from None
    if not _of_a_host(address):
        raise ValueError("is not a host's address")
    return address


def _packed(text: str) -> bytes:
    """The 4 or 16 bytes of an address. Raises ValueError."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)  # 20 times as fast
    except (OSError, ValueError):
        return ipaddress.ip_address(text).packed


def _of_a_host(address: bytes) -> bool:
    """Whether it is no address of loopback or multicast, and not the unspecified one."""
    if len(address) == 4:
        return address != bytes(4) and address[0] != 127 and not 224 <= address[0] <= 239
    return address[0] != 0xFF and (address[:15] != bytes(15) or address[15] > 1)


def workload(
    pod: Pod,
    services: Iterable[Service],
    node: Node | None,
    addresses: Sequence[bytes],
    settings: Settings,
    policies: Iterable[str] = (),
    waypoint: pb.GatewayAddress | None = None,
) -> pb.Workload:
    """The Workload of a pod.

    `services` are those that select it, `node` the one it runs on if known, `addresses` those of its addresses that
    it may keep (see `parse_addresses`), `policies` the names of those that select it, `waypoint` stands before it.
    """
    labels = pod.metadata.labels
    owner = owner_name(pod)
    message = pb.Workload(
        uid=workload_uid(pod.namespace, pod.name, settings),
        name=pod.name,
        namespace=pod.namespace,
        addresses=addresses,
        network=settings.network,
        trust_domain=settings.trust_domain,
        service_account=pod.service_account,
        node=pod.spec.node_name,
        canonical_name=labels.get("service.istio.io/canonical-name")
        or labels.get("app.kubernetes.io/name")
        or labels.get("app")
        or owner,
        canonical_revision=labels.get("service.istio.io/canonical-revision")
        or labels.get("app.kubernetes.io/version")
        or labels.get("version")
        or "latest",
        workload_type=pb.POD,
        workload_name=owner,
        status=pb.HEALTHY if is_healthy(pod) else pb.UNHEALTHY,
        cluster_id=settings.cluster_id,
        authorization_policies=policies,
        waypoint=waypoint,
    )
    if pod.spec.host_network:
        message.network_mode = pb.HOST_NETWORK
    elif in_mesh(pod):
        message.tunnel_protocol = pb.HBONE
    set_locality(message, node)
    for service in services:
        ports = workload_ports(pod, service)
        if ports or not service.spec.ports:
            message.services[service_key(service.namespace, service.name)].CopyFrom(pb.PortList(ports=ports))
    return message


def service(
    obj: Service, addresses: Sequence[bytes], settings: Settings, waypoint: pb.GatewayAddress | None = None
) -> tuple[pb.Service, list[Problem]]:
    """The Service message of a Service that `is_service`, with `addresses` as its virtual ones, and its problems.

    `waypoint` stands before it.
    """
    spec = obj.spec
    ports, problems = _tcp_ports(obj)
    message = pb.Service(
        name=obj.name,
        namespace=obj.namespace,
        hostname=service_hostname(obj.namespace, obj.name),
        addresses=[pb.NetworkAddress(network=settings.network, address=address) for address in addresses],
        ports=[
            pb.Port(
                service_port=port.port,
                # A name stands for another number in each pod, so it has none here.
                target_port=0 if isinstance(port.target_port, str) else port.target_port or port.port,
                app_protocol=app_protocol(port),
            )
            for port in ports
        ],
        ip_families=ip_families(obj),
        # A Kubernetes Service is the one that owns its hostname; others (ServiceEntry) may only repeat it.
        canonical=True,
        waypoint=waypoint,
    )
    balancing = load_balancing(obj)
    if balancing is not None:
        message.load_balancing.CopyFrom(balancing)
    if spec.traffic_distribution and spec.traffic_distribution not in _LOCALITY_PREFERENCE:
        problems.append(
            Problem(
                obj.ref,
                "",
                f"spec.trafficDistribution: {spec.traffic_distribution!r} is not known, so endpoints are not preferred",
                f"use one of {', '.join(_LOCALITY_PREFERENCE)}",
                severity="warning",
            )
        )
    return message, problems


def workload_ports(pod: Pod, service: Service) -> list[pb.Port]:
    """The Service's ports with the pod's own target ports; a named port that the pod lacks is left out."""
    ports = []
    for port in _tcp_ports(service)[0]:
        target = _target_port(pod, port)
        if target:
            ports.append(pb.Port(service_port=port.port, target_port=target, app_protocol=app_protocol(port)))
    return ports


def app_protocol(port: ServicePort) -> pb.AppProtocol.ValueType:
    """What is spoken on the port, from `appProtocol`, else from the port name's prefix (`http-web` is http)."""
    text = (port.app_protocol or port.name).lower()
    known = _APP_PROTOCOLS.get(text)
    if known is None and text.startswith("grpc-web"):
        known = pb.HTTP11
    if known is None:
        known = _APP_PROTOCOLS.get(text.partition("-")[0])
    return pb.UNKNOWN if known is None else known


def ip_families(service: Service) -> pb.IPFamilies.ValueType:
    """The families the Service is for, AUTOMATIC where it does not say."""
    families = set(service.spec.ip_families)
    if len(families) == 2:
        return pb.DUAL
    if families == {"IPv4"}:
        return pb.IPV4_ONLY
    return pb.IPV6_ONLY if families == {"IPv6"} else pb.AUTOMATIC


def load_balancing(service: Service) -> pb.LoadBalancing | None:
    """How endpoints are chosen where it is not at random among the healthy: by locality, or the unready too."""
    spec = service.spec
    distribution = (
        service.metadata.annotations.get(_TRAFFIC_DISTRIBUTION_ANNOTATION) or spec.traffic_distribution
    )
    message = pb.LoadBalancing()
    if spec.internal_traffic_policy == "Local":
        message.routing_preference.append(pb.LoadBalancing.NODE)
        message.mode = pb.LoadBalancing.STRICT
    elif distribution in _LOCALITY_PREFERENCE:
        message.routing_preference.extend(_LOCALITY_PREFERENCE[distribution])
        message.mode = pb.LoadBalancing.FAILOVER
    if spec.publish_not_ready_addresses:
        message.health_policy = pb.LoadBalancing.ALLOW_ALL
    return message if message.ByteSize() else None


def locality(node: Node) -> tuple[str, str, str]:
    """Region, zone and subzone of a node, from its well-known labels; "" where there is none."""
    labels = node.metadata.labels
    return (
        labels.get("topology.kubernetes.io/region", ""),
        labels.get("topology.kubernetes.io/zone", ""),
        labels.get("topology.istio.io/subzone", ""),
    )


def set_locality(message: pb.Workload, node: Node | None) -> None:
    """Say where a workload on this node is, if the node says so."""
    if node is not None:
        region, zone, subzone = locality(node)
        if region or zone or subzone:
            message.locality.CopyFrom(pb.Locality(region=region, zone=zone, subzone=subzone))


def is_healthy(pod: Pod) -> bool:
    """Whether new connections may be sent to the pod: it runs, is ready, and is not being deleted.

    Where nobody has written a Ready condition, running containers that are all ready count as one.
    """
    if pod.metadata.deletion_timestamp or pod.status.phase != "Running":
        return False
    if any(condition.type == "Ready" for condition in pod.status.conditions):
        return pod.ready
    return all(container.ready for container in pod.status.container_statuses)


def owner_name(pod: Pod) -> str:
    """The name of what people deployed: the Deployment, StatefulSet, Job, CronJob, else the pod itself."""
    owner = _controller(pod)
    if owner is None:
        return pod.name
    if owner.kind == "ReplicaSet":
        # A ReplicaSet is named after its Deployment and the template's hash, which is also on the pod.
        template_hash = pod.metadata.labels.get("pod-template-hash", "")
        if template_hash and owner.name.endswith(f"-{template_hash}"):
            return owner.name.removesuffix(f"-{template_hash}")
    if owner.kind == "Job" and (cron_job := _CRON_JOB_NAME.fullmatch(owner.name)):
        return cron_job.group(1)
    return owner.name


def _controller(pod: Pod) -> OwnerReference | None:
    return next((owner for owner in pod.metadata.owner_references if owner.controller), None)


def _tcp_ports(service: Service) -> tuple[list[ServicePort], list[Problem]]:
    """The ports that a mesh of TCP tunnels carries, the first of each number, and a problem for each invalid one."""
    ports: dict[int, ServicePort] = {}
    problems = []
    for position, port in enumerate(service.spec.ports):
        target = port.target_port
        if not 1 <= port.port <= 65535:
            field, value = "port", port.port
        elif isinstance(target, int) and not 1 <= target <= 65535:
            field, value = "targetPort", target
        else:
            if port.protocol == "TCP":
                ports.setdefault(port.port, port)
            continue
        problems.append(
            Problem(
                service.ref,
                "",
                f"spec.ports[{position}].{field}: {value} is not a port, so this port is left out",
                "use a number from 1 to 65535",
            )
        )
    return list(ports.values()), problems


def _target_port(pod: Pod, port: ServicePort) -> int:
    """The number of the pod's port behind a service port, 0 if it is named and the pod has none of the name."""
    target = port.target_port
    if not isinstance(target, str):
        return target or port.port
    if target.isdecimal():
        return int(target) if 1 <= int(target) <= 65535 else 0
    sidecars = (each for each in pod.spec.init_containers if each.restart_policy == "Always")
    for container in (*pod.spec.containers, *sidecars):
        for candidate in container.ports:
            if candidate.name == target and candidate.protocol == port.protocol:
                return candidate.container_port
    return 0
