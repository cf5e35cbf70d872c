"""Which waypoint stands before which Service and Pod: Gateways, their class, and the labels that name them.

Rule: as Istio's control plane decides. The object's own label `istio.io/use-waypoint` counts, else its namespace's;
"none" means none. A waypoint counts once its Gateway has an address, which it has from when the first of its pods was
ready; until then what names it is reached without it, and the object's problem says so. It takes the traffic that
`istio.io/waypoint-for` says (Gateway, else its class; default: services), from the namespaces that its HBONE listener
allows (default: its own).

But nothing goes around policies. What a policy for the waypoint, or for the Service, is to guard is reached by nobody
while there is no waypoint that may enforce it: it is told to be behind one that is not there, which proxies refuse.
"""

from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from typing import Final, NamedTuple

from ztunnel.controlplane.claims import Owner
from ztunnel.controlplane.translate import service_hostname
from ztunnel.store.gateways import Gateway, GatewayClass, RouteNamespaces
from ztunnel.store.models import Namespace, Pod, Service
from ztunnel.store.problems import Problem
from ztunnel.wire import workload_pb2 as pb

USE_WAYPOINT: Final = "istio.io/use-waypoint"
USE_WAYPOINT_NAMESPACE: Final = "istio.io/use-waypoint-namespace"
WAYPOINT_FOR: Final = "istio.io/waypoint-for"
GATEWAY_NAME: Final = "gateway.networking.k8s.io/gateway-name"
MANAGED: Final = "gateway.istio.io/managed"
MANAGED_BY_MESH: Final = "istio.io-mesh-controller"

SERVICE: Final = "service"
WORKLOAD: Final = "workload"
ALL: Final = "all"
NONE: Final = "none"
TRAFFIC: Final = (SERVICE, WORKLOAD, ALL, NONE)

HBONE_PORT: Final = 15008
HBONE_PROTOCOL: Final = "HBONE"
_NOWHERE: Final = "waypoint.invalid"  # of the domain that nobody has (RFC 2606)


class Waypoint(NamedTuple):
    """A Gateway that is a waypoint, as far as others need it."""

    address: tuple[str, str]
    """Type and value of its address; empty while it has none: it was never ready."""
    traffic: str
    namespaces: RouteNamespaces


class Assignment(NamedTuple):
    """The waypoint of an object, if it has one, and what is wrong with what its label says."""

    gateway: pb.GatewayAddress | None = None
    problem: Problem | None = None


class WaypointRegistry:
    """Gateways, their classes, and Namespaces."""

    def __init__(self, network: str, guarded: Callable[[Owner, Owner | None], bool]) -> None:
        """`guarded(waypoint, service)` says whether a policy is for this waypoint, or for this Service behind it."""
        self._network = network
        self._guarded = guarded
        self._waypoints: dict[Owner, Waypoint] = {}
        self._gateways: dict[Owner, Gateway] = {}
        self._classes: dict[str, str] = {}  # the traffic that a class's label says
        self._namespaces: dict[str, Mapping[str, str]] = {}  # their labels

    def change_gateway(self, owner: Owner, new: Gateway | None) -> bool:
        """Take note of a Gateway as it is now (None: gone); whether that may change assignments."""
        if new is None:
            self._gateways.pop(owner, None)
        else:
            self._gateways[owner] = new
        return self._look(owner)

    def change_class(self, name: str, new: GatewayClass | None) -> bool:
        """The same of a GatewayClass."""
        traffic = new.metadata.labels.get(WAYPOINT_FOR, "") if new is not None else ""
        if traffic == self._classes.get(name, ""):
            return False
        self._classes[name] = traffic
        changed = [self._look(owner) for owner in tuple(self._gateways)]
        return any(changed)

    def change_namespace(self, name: str, new: Namespace | None) -> bool:
        """The same of a Namespace; what may change is in it."""
        old = self._namespaces.get(name, {})
        labels = new.metadata.labels if new is not None else {}
        self._namespaces[name] = labels
        named = (USE_WAYPOINT, USE_WAYPOINT_NAMESPACE)
        # Which namespaces a waypoint takes may hang on any label.
        return any(old.get(key) != labels.get(key) for key in named) or (
            old != labels and any(one.namespaces.from_ == "Selector" for one in self._waypoints.values())
        )

    def of_service(self, service: Service) -> Assignment:
        """The waypoint before a Service."""
        if service.metadata.labels.get(MANAGED) == MANAGED_BY_MESH:
            return Assignment()
        return self._of(service, SERVICE)

    def of_pod(self, pod: Pod) -> Assignment:
        """The waypoint before a Pod, for what is sent to its own address."""
        gateway = pod.metadata.labels.get(GATEWAY_NAME, "")
        if gateway and Owner(pod.namespace, gateway) in self._waypoints:
            return Assignment()
        found = self._of(pod, WORKLOAD)
        # A label of the namespace is for its Services too: it is nothing wrong if the waypoint is for them only.
        if found.problem is not None and found.gateway is None and USE_WAYPOINT not in pod.metadata.labels:
            return Assignment()
        return found

    def problems(self, owner: Owner) -> list[Problem]:
        """What is to be said of a Gateway itself."""
        gateway = self._gateways.get(owner)
        if gateway is None or not gateway.waypoint:
            return []
        traffic = gateway.metadata.labels.get(WAYPOINT_FOR, SERVICE)
        if traffic not in TRAFFIC:
            return [
                Problem(
                    gateway.ref,
                    "",
                    f"metadata.labels[{WAYPOINT_FOR}]: {traffic!r} is not known, so nothing is sent to this waypoint",
                    f"use one of {', '.join(TRAFFIC)}",
                )
            ]
        return []

    def _look(self, owner: Owner) -> bool:
        gateway = self._gateways.get(owner)
        old = self._waypoints.pop(owner, None)
        if gateway is not None and gateway.waypoint:
            self._waypoints[owner] = self._read(gateway)
        return old != self._waypoints.get(owner)

    def _read(self, gateway: Gateway) -> Waypoint:
        traffic = gateway.metadata.labels.get(WAYPOINT_FOR) or self._classes.get(
            gateway.spec.gateway_class_name, ""
        )
        allowed = RouteNamespaces()
        for listener in gateway.spec.listeners:
            if listener.port == HBONE_PORT and listener.protocol == HBONE_PROTOCOL:
                if listener.allowed_routes is not None and listener.allowed_routes.namespaces is not None:
                    allowed = listener.allowed_routes.namespaces
                break
        return Waypoint(_address(gateway), traffic or SERVICE, allowed)

    def _of(self, obj: Service | Pod, traffic: str) -> Assignment:
        labels: Mapping[str, str] = obj.metadata.labels
        where = obj.ref
        if USE_WAYPOINT not in labels:
            labels, where = self._namespaces.get(obj.namespace, {}), f"Namespace {obj.namespace}"
        name = labels.get(USE_WAYPOINT, "")
        if not name or name == NONE:
            return Assignment()
        owner = Owner(labels.get(USE_WAYPOINT_NAMESPACE, obj.namespace), name)
        waypoint = self._waypoints.get(owner)

        def wrong(message: str, remedy: str, closed: str = "") -> Assignment:
            """`closed` is the hostname of a waypoint that nobody reaches, "" where traffic may go directly."""
            gateway = _hostname(owner, closed) if closed else None
            meanwhile = (
                "so traffic goes directly"
                if gateway is None
                else "and policies are for it, so connections are refused"
            )
            said = (
                f"label {USE_WAYPOINT}={name} of {where}: waypoint {owner.namespace}/{owner.name} {message}, "
                f"{meanwhile}"
            )
            return Assignment(
                gateway,
                Problem(obj.ref, "", said, remedy, severity="warning" if gateway is None else "error"),
            )

        guarded = self._guarded(owner, Owner(obj.namespace, obj.name) if traffic == SERVICE else None)
        expected = service_hostname(owner.namespace, owner.name) if guarded else ""
        # It is there, and must not be asked.
        never = f"{owner.name}.{owner.namespace}.{_NOWHERE}" if guarded else ""
        if waypoint is None:
            make = f"ambient waypoint apply --namespace {owner.namespace} --name {owner.name}"
            # What it would be for is not known; waypoints mostly are for Services.
            own = traffic == SERVICE or USE_WAYPOINT in obj.metadata.labels
            return wrong("does not exist", f"make it: {make}", expected if own else "")
        if waypoint.traffic not in TRAFFIC:
            known = ", ".join(TRAFFIC)
            message = f"has the label {WAYPOINT_FOR}={waypoint.traffic}, which is not known"
            return wrong(message, f"use one of {known}", never)
        if waypoint.traffic not in (traffic, ALL):
            return wrong(f"is for {waypoint.traffic} traffic", f"label it {WAYPOINT_FOR}={traffic} or {ALL}")
        if not self._allows(owner, waypoint, obj.namespace):
            return wrong(
                f"takes nothing from namespace {obj.namespace}",
                "say so in spec.listeners[].allowedRoutes.namespaces of the Gateway",
                never,
            )
        if not waypoint.address[1]:
            return wrong("is not ready yet", "see `ambient waypoint status`", expected)
        return Assignment(_gateway_address(owner, waypoint, self._network))

    def _allows(self, owner: Owner, waypoint: Waypoint, namespace: str) -> bool:
        match waypoint.namespaces.from_:
            case "All":
                return True
            case "None":
                return False
            case "Selector":
                selector = waypoint.namespaces.selector
                labels = {"kubernetes.io/metadata.name": namespace, **self._namespaces.get(namespace, {})}
                return selector is not None and selector.matches(labels)
            case _:
                return owner.namespace == namespace

    def gateways(self) -> Iterator[Owner]:
        """All Gateways."""
        yield from self._gateways


def _address(gateway: Gateway) -> tuple[str, str]:
    """Its hostname, which outlives its addresses, else the first of these; empty if it has neither."""
    addresses = gateway.status.addresses
    for kind in ("Hostname", "IPAddress"):
        for one in addresses:
            if one.type == kind and one.value and (kind == "Hostname" or _is_address(one.value)):
                return kind, one.value
    return "", ""


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _gateway_address(owner: Owner, waypoint: Waypoint, network: str) -> pb.GatewayAddress | None:
    kind, value = waypoint.address
    if kind == "Hostname":
        return _hostname(owner, value)
    return pb.GatewayAddress(
        address=pb.NetworkAddress(network=network, address=ip_address(value).packed),
        hbone_mtls_port=HBONE_PORT,
    )


def _hostname(owner: Owner, hostname: str) -> pb.GatewayAddress:
    return pb.GatewayAddress(
        hostname=pb.NamespacedHostname(namespace=owner.namespace, hostname=hostname),
        hbone_mtls_port=HBONE_PORT,
    )
