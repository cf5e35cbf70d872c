"""Short ways to write the Kubernetes objects that the tests of the control plane are about."""

from typing import Any

from ztunnel.store.membership import REDIRECTION_ANNOTATION, REDIRECTION_ENABLED
from ztunnel.store.models import (
    AuthorizationPolicy,
    Container,
    ContainerPort,
    Node,
    ObjectMeta,
    OwnerReference,
    PeerAuthentication,
    Pod,
    PodCondition,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
)


def pod(
    name: str = "web-1",
    *ips: str,
    namespace: str = "default",
    labels: dict[str, str] | None = None,
    owner: tuple[str, str] | None = None,
    mesh: bool = False,
    ready: bool | None = True,
    phase: Any = "Running",
    node: str = "node-1",
    account: str = "",
    ports: dict[str, int] | None = None,
    host_network: bool = False,
    created: str = "",
    deleted: str = "",
) -> Pod:
    """A pod that runs and is ready; `ready` None leaves the condition out; `ports` are named container ports."""
    conditions = [] if ready is None else [PodCondition(type="Ready", status="True" if ready else "False")]
    return Pod(
        metadata=ObjectMeta(
            name=name,
            namespace=namespace,
            labels=labels or {},
            annotations={REDIRECTION_ANNOTATION: REDIRECTION_ENABLED} if mesh else {},
            owner_references=[
                OwnerReference(api_version="v1", kind=owner[0], name=owner[1], uid="u", controller=True)
            ]
            if owner
            else [],
            creation_timestamp=created,
            deletion_timestamp=deleted,
        ),
        spec=PodSpec(
            node_name=node,
            service_account_name=account,
            host_network=host_network,
            containers=[
                Container(
                    name="main",
                    command=["true"],
                    ports=[
                        ContainerPort(name=name, container_port=port) for name, port in (ports or {}).items()
                    ],
                )
            ],
        ),
        status=PodStatus(
            phase=phase,
            pod_ip=ips[0] if ips else "",
            pod_ips=[PodIP(ip=ip) for ip in ips],
            conditions=conditions,
        ),
    )


def service(
    name: str = "web",
    *ips: str,
    namespace: str = "default",
    selector: dict[str, str] | None = None,
    ports: list[ServicePort] | None = None,
    created: str = "",
    annotations: dict[str, str] | None = None,
    **spec: Any,
) -> Service:
    """A Service with these virtual addresses (none: headless), by default selecting app=NAME on port 80."""
    return Service(
        metadata=ObjectMeta(
            name=name, namespace=namespace, creation_timestamp=created, annotations=annotations or {}
        ),
        spec=ServiceSpec(
            cluster_ip=ips[0] if ips else "None",
            cluster_ips=list(ips),
            selector={"app": name} if selector is None else selector,
            ports=[ServicePort(port=80)] if ports is None else ports,
            **spec,
        ),
    )


def node(name: str = "node-1", **labels: str) -> Node:
    """A node; `region`, `zone` and `subzone` become its well-known labels."""
    known = {
        "region": "topology.kubernetes.io/region",
        "zone": "topology.kubernetes.io/zone",
        "subzone": "topology.istio.io/subzone",
    }
    return Node(metadata=ObjectMeta(name=name, labels={known[key]: value for key, value in labels.items()}))


def authorization(
    name: str, spec: Any, *, namespace: str = "default", created: str = "", dry_run: bool = False
) -> AuthorizationPolicy:
    """An AuthorizationPolicy with this spec, as plain data."""
    annotations = {"istio.io/dry-run": "true"} if dry_run else {}
    metadata = ObjectMeta(name=name, namespace=namespace, creation_timestamp=created, annotations=annotations)
    return AuthorizationPolicy(metadata=metadata, spec=spec)


def peer_authentication(
    name: str, spec: Any, *, namespace: str = "default", created: str = ""
) -> PeerAuthentication:
    """A PeerAuthentication with this spec, as plain data."""
    metadata = ObjectMeta(name=name, namespace=namespace, creation_timestamp=created)
    return PeerAuthentication(metadata=metadata, spec=spec)
