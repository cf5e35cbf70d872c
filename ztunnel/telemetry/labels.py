"""The labels of the TCP metrics, and how they follow from the mesh: those of Istio's L4 proxy, in its order.

Rule: names, no counting. What is not known is `unknown`. A principal is what a certificate has proved, or the own
pod's; that of a peer that has shown none is unknown even if the mesh knows whose address it is.
"""

from typing import Final, NamedTuple

from ztunnel.mesh.model import Service, Workload
from ztunnel.mesh.state import MeshState

UNKNOWN: Final = "unknown"
MUTUAL_TLS: Final = "mutual_tls"

_SIDE: Final = (
    "workload",
    "canonical_service",
    "canonical_revision",
    "workload_namespace",
    "principal",
    "app",
    "version",
    "cluster",
)
SOURCE: Final = tuple(f"source_{name}" for name in _SIDE)
DESTINATION: Final = tuple(f"destination_{name}" for name in _SIDE)
SERVICE: Final = ("destination_service", "destination_service_namespace", "destination_service_name")
TCP: Final = (
    "reporter",
    *SOURCE,
    *SERVICE,
    *DESTINATION,
    "request_protocol",
    "response_flags",
    "connection_security_policy",
)
"""The names of the labels of all `istio_tcp_*` metrics."""


class Side(NamedTuple):
    """One end of a connection: the values of SOURCE or DESTINATION."""

    workload: str = UNKNOWN
    canonical_service: str = UNKNOWN
    canonical_revision: str = UNKNOWN
    namespace: str = UNKNOWN
    principal: str = UNKNOWN
    app: str = UNKNOWN
    version: str = UNKNOWN
    cluster: str = UNKNOWN


class ServiceLabels(NamedTuple):
    """The values of SERVICE."""

    hostname: str = UNKNOWN
    namespace: str = UNKNOWN
    name: str = UNKNOWN


class Labels(NamedTuple):
    """The labels of a connection; the response flag may be another when it ends."""

    reporter: str  # source, destination or waypoint
    source: Side
    service: ServiceLabels
    destination: Side
    flag: str
    security: str

    def values(self) -> tuple[str, ...]:
        """The values of TCP, in its order."""
        return (
            self.reporter,
            *self.source,
            *self.service,
            *self.destination,
            "tcp",
            self.flag,
            self.security,
        )


NOBODY: Final = Side()
NO_SERVICE: Final = ServiceLabels()


def side(workload: Workload | None, identity: str = "") -> Side:
    """The labels of a workload whose `identity` was proved ("": was not); of an unknown one, what the identity says."""
    principal = identity or UNKNOWN
    if workload is None:
        _, found, rest = identity.partition("/ns/")
        namespace = rest.split("/", 1)[0] if found else ""
        return Side(namespace=namespace or UNKNOWN, principal=principal) if identity else NOBODY
    name, revision = workload.canonical_name or UNKNOWN, workload.canonical_revision or UNKNOWN
    return Side(
        workload.workload_name or workload.name or UNKNOWN,
        name,
        revision,
        workload.namespace or UNKNOWN,
        principal,
        name,
        revision,
        workload.cluster_id or UNKNOWN,
    )


def service_labels(state: MeshState, key: str) -> ServiceLabels:
    """The labels of the service "namespace/hostname", which may be known no more; "" is none."""
    if not key:
        return NO_SERVICE
    namespace, _, hostname = key.partition("/")
    service = state.service(key)
    return ServiceLabels(hostname, namespace, service.name if service is not None else hostname.split(".")[0])


def service_of_port(state: MeshState, workload: Workload, port: int) -> Service | None:
    """The service through which a workload's own `port` is reached; the first one of several.

    On the server's side nobody says which one the client asked for: it is told by the port, as Istio does.
    """
    for key, own in workload.services.items():
        service = state.service(key)
        if service is None:
            continue
        targets = {declared.service: declared.target for declared in service.ports}
        targets |= {pair.service: pair.target for pair in own if pair.target}
        if port in targets.values():
            return service
    return None
