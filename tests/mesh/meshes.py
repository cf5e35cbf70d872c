"""Workloads, services and whole meshes for tests, made short."""

from ipaddress import ip_address
from typing import Any

from ztunnel.mesh.model import LoadBalancing, Port, Service, TunnelProtocol, Workload
from ztunnel.mesh.state import MeshState


def ip(text: str) -> bytes:
    """A packed address."""
    return ip_address(text).packed


def key(name: str, namespace: str = "default") -> str:
    """The key of `service(name)`."""
    return f"{namespace}/{name}.{namespace}.svc.cluster.local"


def pod(
    name: str, *addresses: str, services: dict[str, dict[int, int]] | None = None, **fields: Any
) -> Workload:
    """A pod in the mesh; `services` maps names to {service port: target port}."""
    namespace = fields.setdefault("namespace", "default")
    fields.setdefault("uid", f"Kubernetes//Pod/{namespace}/{name}")
    fields.setdefault("tunnel_protocol", TunnelProtocol.HBONE)
    return Workload(
        name=name,
        addresses=tuple(map(ip, addresses)),
        services={
            key(service, namespace): tuple(Port(port, target) for port, target in ports.items())
            for service, ports in (services or {}).items()
        },
        **fields,
    )


def service(name: str, *vips: str, ports: dict[int, int] | None = None, **fields: Any) -> Service:
    """A Service; `ports` is {service port: target port}, `balancing` the arguments of its LoadBalancing."""
    namespace = fields.setdefault("namespace", "default")
    if "balancing" in fields:
        fields["load_balancing"] = LoadBalancing(*fields.pop("balancing"))
    return Service(
        name=name,
        hostname=f"{name}.{namespace}.svc.cluster.local",
        vips=tuple(("", ip(vip)) for vip in vips),
        ports=tuple(Port(port, target) for port, target in (ports or {}).items()),
        **fields,
    )


def mesh(*members: Workload | Service) -> MeshState:
    """A state of these members, in this order."""
    state = MeshState()
    for member in members:
        if isinstance(member, Workload):
            state.upsert_workload(member)
        else:
            state.upsert_service(member)
    return state
