"""EndpointSlice (discovery.k8s.io): addresses behind a Service that its selector does not give."""

from typing import ClassVar, Final, Literal

from msgspec import field

from ztunnel.store.models import Model, Object, PortNumber, Protocol

SERVICE_LABEL: Final = "kubernetes.io/service-name"
MANAGED_BY_LABEL: Final = "endpointslice.kubernetes.io/managed-by"
OF_SELECTORS: Final = "endpointslice-controller.k8s.io"
"""Who makes the slices of Services with selectors: they hold nothing that the pods do not say better."""


class EndpointConditions(Model, frozen=True, kw_only=True):
    """`ready` None counts as true, as Kubernetes says."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class EndpointTarget(Model, frozen=True, kw_only=True):
    """The object that an endpoint stands for, mostly a Pod."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class Endpoint(Model, frozen=True, kw_only=True):
    addresses: list[str] = field(default_factory=list)
    conditions: EndpointConditions = EndpointConditions()
    target_ref: EndpointTarget | None = None
    node_name: str = ""
    hostname: str = ""
    zone: str = ""

    @property
    def ready(self) -> bool:
        """Whether new connections may be sent to it."""
        return self.conditions.ready is not False


class EndpointPort(Model, frozen=True, kw_only=True):
    """`name` is that of the Service's port, `port` the endpoints' own; None: every port."""

    name: str = ""
    port: PortNumber | None = None
    protocol: Protocol = "TCP"
    app_protocol: str = ""


class EndpointSlice(Object, frozen=True, kw_only=True):
    KIND = "EndpointSlice"
    API_VERSION = "discovery.k8s.io/v1"
    PLURAL = "endpointslices"
    SHORT: ClassVar[tuple[str, ...]] = ()

    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: list[Endpoint] = field(default_factory=list)
    ports: list[EndpointPort] = field(default_factory=list)

    @property
    def service(self) -> str:
        """The name of the Service that it belongs to, "" if it belongs to none."""
        return self.metadata.labels.get(SERVICE_LABEL, "")
