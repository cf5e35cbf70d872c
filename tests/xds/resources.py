"""Workloads and services as a control plane sends them, for tests."""

from ipaddress import ip_address

from ztunnel.wire import authorization_pb2, workload_pb2, xds_pb2


def workload(
    name: str, *addresses: str, services: dict[str, dict[int, int]] | None = None, namespace: str = "default"
) -> workload_pb2.Workload:
    """A pod in the mesh; `services` maps service keys to {service port: target port}."""
    return workload_pb2.Workload(
        uid=f"Kubernetes//Pod/{namespace}/{name}",
        name=name,
        namespace=namespace,
        addresses=[ip_address(address).packed for address in addresses],
        tunnel_protocol=workload_pb2.HBONE,
        service_account=name.partition("-")[0],
        services={
            key: workload_pb2.PortList(
                ports=[
                    workload_pb2.Port(service_port=port, target_port=target) for port, target in ports.items()
                ]
            )
            for key, ports in (services or {}).items()
        },
    )


def service(name: str, *vips: str, ports: dict[int, int] | None = None) -> workload_pb2.Service:
    """A Service of namespace default; `ports` is {service port: target port}."""
    return workload_pb2.Service(
        name=name,
        namespace="default",
        hostname=f"{name}.default.svc.cluster.local",
        addresses=[workload_pb2.NetworkAddress(address=ip_address(vip).packed) for vip in vips],
        ports=[
            workload_pb2.Port(service_port=port, target_port=target) for port, target in (ports or {}).items()
        ],
    )


def key(name: str) -> str:
    """The resource name of `service(name)`."""
    return f"default/{name}.default.svc.cluster.local"


def resource(message: workload_pb2.Workload | workload_pb2.Service, version: str = "1") -> xds_pb2.Resource:
    """The resource of a workload or service, under its own name."""
    wrapped = xds_pb2.Resource(version=version)
    if isinstance(message, workload_pb2.Workload):
        wrapped.name = message.uid
        wrapped.resource.Pack(workload_pb2.Address(workload=message))
    else:
        wrapped.name = f"{message.namespace}/{message.hostname}"
        wrapped.resource.Pack(workload_pb2.Address(service=message))
    return wrapped


def policy_resource(message: authorization_pb2.Authorization, version: str = "1") -> xds_pb2.Resource:
    """The resource of a policy, under its own name."""
    wrapped = xds_pb2.Resource(name=f"{message.namespace}/{message.name}", version=version)
    wrapped.resource.Pack(message)
    return wrapped
