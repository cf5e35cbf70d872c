"""What a mesh consists of: workloads and services, immutable values shaped by the xDS messages they come from.

Rule: plain data, no lookups and no decisions. A mesh may have 100,000 workloads, so the classes are msgspec
structs: fields in fixed slots, built and compared in C, and (`gc=False`: they can't be part of a cycle) unseen
by the garbage collector. Addresses are packed bytes, 4 or 16, network byte order.
"""

from enum import IntEnum
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, NamedTuple

import msgspec

DEFAULT_TRUST_DOMAIN: Final = "cluster.local"
DEFAULT_SERVICE_ACCOUNT: Final = "default"

# The port on which a workload's proxy takes HBONE, unless its gateway address says otherwise.
HBONE_PORT: Final = 15008


class TunnelProtocol(IntEnum):
    """How a workload takes mesh traffic (istio.workload.TunnelProtocol)."""

    NONE = 0
    HBONE = 1
    LEGACY_ISTIO_MTLS = 2


class WorkloadType(IntEnum):
    """What kind of object owns the workload (istio.workload.WorkloadType)."""

    DEPLOYMENT = 0
    CRONJOB = 1
    POD = 2
    JOB = 3


class AppProtocol(IntEnum):
    """What is spoken on a port (istio.workload.AppProtocol)."""

    UNKNOWN = 0
    HTTP11 = 1
    HTTP2 = 2
    GRPC = 3
    TCP = 4
    TLS = 5


class IpFamilies(IntEnum):
    """Which addresses of its endpoints a service wants (istio.workload.IPFamilies)."""

    AUTOMATIC = 0
    IPV4_ONLY = 1
    IPV6_ONLY = 2
    DUAL = 3

    def accepts(self, ip: bytes) -> bool:
        """Whether an endpoint may be reached at the packed address `ip`."""
        if self is IpFamilies.IPV4_ONLY:
            return len(ip) == 4
        if self is IpFamilies.IPV6_ONLY:
            return len(ip) == 16
        return True


class Scope(IntEnum):
    """What source and endpoint have in common to be called close (istio.workload.LoadBalancing.Scope)."""

    REGION = 1
    ZONE = 2
    SUBZONE = 3
    NODE = 4
    CLUSTER = 5
    NETWORK = 6


class BalancingMode(IntEnum):
    """What closeness is worth (istio.workload.LoadBalancing.Mode)."""

    UNSPECIFIED = 0
    STRICT = 1
    FAILOVER = 2
    PASSTHROUGH = 3


class Locality(NamedTuple):
    """Where a workload runs, from wide to narrow; empty where not known."""

    region: str = ""
    zone: str = ""
    subzone: str = ""


class Port(NamedTuple):
    """One port of a service. `target` 0: each workload has its own (the Service names a container port)."""

    service: int
    target: int
    protocol: AppProtocol = AppProtocol.UNKNOWN


class GatewayAddress(NamedTuple):
    """A waypoint or network gateway: by service key "namespace/hostname", or by network and packed address."""

    service: str = ""
    network: str = ""
    ip: bytes = b""
    hbone_port: int = HBONE_PORT

    def __str__(self) -> str:
        return self.service or f"{ip_text(self.ip)} of network {self.network or '(default)'}"


class ApplicationTunnel(NamedTuple):
    """How the tunnel's end hands connections to the application: by PROXY protocol or not, at `port` if not 0."""

    proxy_protocol: bool
    port: int


class LoadBalancing(NamedTuple):
    """A service's preference among its endpoints; `scopes` most significant first."""

    scopes: tuple[Scope, ...] = ()
    mode: BalancingMode = BalancingMode.UNSPECIFIED
    allow_unhealthy: bool = False


class Workload(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Something that has an identity and (mostly) addresses: a pod, a virtual machine, a gateway.

    `uid` is opaque and unique; `services` maps service keys "namespace/hostname" to this workload's own ports
    for it (treat the mapping as frozen: workloads share it); `policies` are keys "namespace/name".
    """

    uid: str
    name: str
    namespace: str
    addresses: tuple[bytes, ...] = ()
    hostname: str = ""
    network: str = ""
    tunnel_protocol: TunnelProtocol = TunnelProtocol.NONE
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    service_account: str = DEFAULT_SERVICE_ACCOUNT
    node: str = ""
    canonical_name: str = ""
    canonical_revision: str = ""
    workload_type: WorkloadType = WorkloadType.DEPLOYMENT
    workload_name: str = ""
    cluster_id: str = ""
    locality: Locality = Locality()
    healthy: bool = True
    host_network: bool = False
    native_tunnel: bool = False
    capacity: int = 1
    services: dict[str, tuple[Port, ...]] = msgspec.field(default_factory=dict)
    policies: tuple[str, ...] = ()
    waypoint: GatewayAddress | None = None
    network_gateway: GatewayAddress | None = None
    application_tunnel: ApplicationTunnel | None = None

    @property
    def identity(self) -> str:
        """The workload's SPIFFE id."""
        return f"spiffe://{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @property
    def hbone(self) -> bool:
        """Whether the workload's proxy takes tunnels."""
        return self.tunnel_protocol is TunnelProtocol.HBONE


class Service(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A name, and mostly virtual IPs, in front of workloads; `vips` are pairs of network and packed address."""

    name: str
    namespace: str
    hostname: str
    vips: tuple[tuple[str, bytes], ...] = ()
    ports: tuple[Port, ...] = ()
    subject_alt_names: tuple[str, ...] = ()
    load_balancing: LoadBalancing = LoadBalancing()
    ip_families: IpFamilies = IpFamilies.AUTOMATIC
    waypoint: GatewayAddress | None = None
    weighted_waypoints: tuple[tuple[GatewayAddress, int], ...] = ()
    canonical: bool = False
    namespace_only: bool = False

    @property
    def key(self) -> str:
        """The resource name, "namespace/hostname"."""
        return f"{self.namespace}/{self.hostname}"


def pod_uid(cluster: str, namespace: str, name: str) -> str:
    """The uid of a pod's workload, which is also its resource name: `CLUSTER//Pod/NS/NAME`."""
    return f"{cluster}//Pod/{namespace}/{name}"


def ip_text(ip: bytes) -> str:
    """A packed address as text. Raises ValueError unless it has 4 or 16 bytes."""
    return inet_ntop(AF_INET if len(ip) == 4 else AF_INET6, ip)


def packed_ip(text: str) -> bytes:
    """The packed address that a text spells; a scope (`%eth0`) is no part of it. Raises OSError."""
    return inet_pton(AF_INET6, text.partition("%")[0]) if ":" in text else inet_pton(AF_INET, text)


def address_tag(network: str, ip: bytes) -> str:
    """The tag of whatever depends on what an address means: "ip:<network>/<address>"."""
    return f"ip:{network}/{ip_text(ip)}"


def service_tag(key: str) -> str:
    """The tag of whatever depends on a service or its endpoints: "svc:<namespace>/<hostname>"."""
    return f"svc:{key}"
