"""The Gateway API's objects that the mesh acts on: Gateways, of which those of one class are waypoints, and classes.

As in `models`, only shape: the names are those of gateway.networking.k8s.io/v1.
"""

from typing import Any, Final

from msgspec import field

from ztunnel.store.models import Condition, LabelSelector, Model, Object

GROUP: Final = "gateway.networking.k8s.io"
WAYPOINT_CLASS: Final = "istio-waypoint"
MESH_CONTROLLER: Final = "istio.io/mesh-controller"


class RouteNamespaces(Model, frozen=True, kw_only=True):
    """`from_` is "Same", "All" or "Selector"; "" is "Same"."""

    from_: str = field(name="from", default="")
    selector: LabelSelector | None = None


class AllowedRoutes(Model, frozen=True, kw_only=True):
    namespaces: RouteNamespaces | None = None


class Listener(Model, frozen=True, kw_only=True):
    name: str = ""
    port: int = 0
    protocol: str = ""
    hostname: str = ""
    allowed_routes: AllowedRoutes | None = None


class LocalReference(Model, frozen=True, kw_only=True):
    group: str = ""
    kind: str = ""
    name: str = ""


class Infrastructure(Model, frozen=True, kw_only=True):
    """What the objects made for the Gateway have in addition."""

    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    parameters_ref: LocalReference | None = None


class GatewaySpec(Model, frozen=True, kw_only=True):
    gateway_class_name: str = ""
    listeners: list[Listener] = field(default_factory=list)
    addresses: list[dict[str, Any]] = field(default_factory=list)
    infrastructure: Infrastructure | None = None


class GatewayStatusAddress(Model, frozen=True, kw_only=True):
    """`type` is "IPAddress" or "Hostname"."""

    value: str = ""
    type: str = "IPAddress"


class GatewayStatus(Model, frozen=True, kw_only=True):
    addresses: list[GatewayStatusAddress] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    listeners: list[dict[str, Any]] = field(default_factory=list)


class Gateway(Object, frozen=True, kw_only=True):
    KIND = "Gateway"
    API_VERSION = "gateway.networking.k8s.io/v1"
    API_VERSIONS = ("gateway.networking.k8s.io/v1beta1",)
    PLURAL = "gateways"
    SHORT = ("gtw",)

    spec: GatewaySpec = GatewaySpec()
    status: GatewayStatus = GatewayStatus()

    @property
    def waypoint(self) -> bool:
        """Whether it is one of the class that this mesh acts on."""
        return self.spec.gateway_class_name == WAYPOINT_CLASS


class GatewayClassSpec(Model, frozen=True, kw_only=True):
    controller_name: str = ""
    description: str = ""


class GatewayClassStatus(Model, frozen=True, kw_only=True):
    conditions: list[Condition] = field(default_factory=list)


class GatewayClass(Object, frozen=True, kw_only=True):
    KIND = "GatewayClass"
    API_VERSION = "gateway.networking.k8s.io/v1"
    API_VERSIONS = ("gateway.networking.k8s.io/v1beta1",)
    PLURAL = "gatewayclasses"
    SHORT = ("gc",)
    NAMESPACED = False

    spec: GatewayClassSpec = GatewayClassSpec()
    status: GatewayClassStatus = GatewayClassStatus()
