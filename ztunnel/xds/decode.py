"""From xDS resources to the model: everything a resource must satisfy is checked here, once.

Rule: a resource that is not understood wholly where it matters for routing or security is refused, with its name
and field; whoever sent it hears of it (NACK), and what was there before stays.
"""

import sys
from collections.abc import Hashable, Iterable
from enum import IntEnum
from typing import Final, TypeVar, cast

from google.protobuf.message import DecodeError as ProtobufError

from ztunnel.mesh import model
from ztunnel.wire import workload_pb2, xds_pb2

ADDRESS_TYPE: Final = "type.googleapis.com/istio.workload.Address"

H = TypeVar("H", bound=Hashable)
E = TypeVar("E", bound=IntEnum)
V = TypeVar("V")

_intern: Final = sys.intern


class DecodeError(Exception):
    """A resource is not what its type says; the message names the object, the field, and what would be right."""


class _FieldError(Exception):
    """What is wrong with a field, before the object's name is put in front."""


def _values(kind: type[E]) -> dict[int, E]:
    return {int(member): member for member in kind}


# Calling an IntEnum costs three times a dict lookup, and each of 100,000 workloads has several.
_TUNNELS: Final = _values(model.TunnelProtocol)
_TYPES: Final = _values(model.WorkloadType)
_PROTOCOLS: Final = _values(model.AppProtocol)
_FAMILIES: Final = _values(model.IpFamilies)
_SCOPES: Final = _values(model.Scope)
_MODES: Final = _values(model.BalancingMode)
_STATUSES: Final[dict[int, bool]] = {workload_pb2.HEALTHY: True, workload_pb2.UNHEALTHY: False}
_NETWORK_MODES: Final[dict[int, bool]] = {workload_pb2.STANDARD: False, workload_pb2.HOST_NETWORK: True}

# After as many distinct values as there are resources, within these bounds, the memory of them starts anew: values of
# workloads long gone must not pile up, and in a small mesh that changes all day they would be most of what is held.
_SHARED_MIN: Final = 256
_SHARED_MAX: Final = 20_000


class Decoder:
    """Decodes resources, and lets equal parts of different workloads be one object.

    The pods of a Deployment differ in uid, name, address and node only: sharing the rest makes a workload of two
    kilobytes one of less than one.
    """

    def __init__(self) -> None:
        # Of each type apart: a Locality equals a plain tuple of three strings.
        self._shared: dict[type, dict[Hashable, Hashable]] = {}
        self._shared_services: dict[Hashable, dict[str, tuple[model.Port, ...]]] = {}
        self._most = _SHARED_MAX

    def expect(self, resources: int) -> None:
        """Say how many resources there are, or will be, in all."""
        self._most = min(max(resources, _SHARED_MIN), _SHARED_MAX)

    def address(self, resource: xds_pb2.Resource) -> model.Workload | model.Service:
        """The workload or service in a resource of ADDRESS_TYPE. Raises DecodeError."""
        name = resource.name
        body = resource.resource
        if body.type_url != ADDRESS_TYPE:
            raise DecodeError(f"{name}: is of type {body.type_url!r}: expected {ADDRESS_TYPE}")
        try:
            message = workload_pb2.Address.FromString(body.value)
        except ProtobufError:
            raise DecodeError(f"{name}: is no istio.workload.Address: its bytes don't parse") from None
        kind = message.WhichOneof("type")
        if kind is None:
            raise DecodeError(f"{name}: is neither a workload nor a service")
        try:
            if kind == "workload":
                workload = self._workload(message.workload)
                _check_name("uid", workload.uid, name)
                return workload
            service = self._service(message.service)
            _check_name("namespace and hostname", service.key, name)
            return service
        except _FieldError as error:
            raise DecodeError(f"{kind.capitalize()} {name}: {error}") from None

    def _workload(self, message: workload_pb2.Workload) -> model.Workload:
        if not message.uid:
            raise _FieldError("uid: is empty")
        return model.Workload(
            uid=message.uid,
            name=message.name,
            namespace=_intern(message.namespace),
            addresses=tuple(map(_ip, message.addresses)),
            hostname=_intern(message.hostname),
            network=_intern(message.network),
            tunnel_protocol=_enum("tunnel_protocol", _TUNNELS, message.tunnel_protocol),
            trust_domain=_intern(message.trust_domain) or model.DEFAULT_TRUST_DOMAIN,
            service_account=_intern(message.service_account) or model.DEFAULT_SERVICE_ACCOUNT,
            node=_intern(message.node),
            canonical_name=_intern(message.canonical_name),
            canonical_revision=_intern(message.canonical_revision),
            # Only a label of metrics.
            workload_type=_TYPES.get(message.workload_type, model.WorkloadType.POD),
            workload_name=_intern(message.workload_name),
            cluster_id=_intern(message.cluster_id),
            locality=self._locality(message.locality) if message.HasField("locality") else _NOWHERE,
            healthy=_enum("status", _STATUSES, message.status),
            host_network=_enum("network_mode", _NETWORK_MODES, message.network_mode),
            native_tunnel=message.native_tunnel,
            capacity=message.capacity.value if message.HasField("capacity") else 1,
            services=self._services(message),
            policies=self._share(tuple(message.authorization_policies)),
            waypoint=self._gateway("waypoint", message.waypoint) if message.HasField("waypoint") else None,
            network_gateway=(
                self._gateway("network_gateway", message.network_gateway)
                if message.HasField("network_gateway")
                else None
            ),
            application_tunnel=(
                self._share(_application_tunnel(message.application_tunnel))
                if message.HasField("application_tunnel")
                else None
            ),
        )

    def _service(self, message: workload_pb2.Service) -> model.Service:
        if not message.namespace or not message.hostname:
            raise _FieldError("namespace, hostname: both are needed")
        balancing = message.load_balancing
        return model.Service(
            name=message.name,
            namespace=_intern(message.namespace),
            hostname=message.hostname,
            vips=tuple((_intern(address.network), _ip(address.address)) for address in message.addresses),
            ports=self._ports(message.ports),
            subject_alt_names=tuple(message.subject_alt_names),
            load_balancing=self._share(
                model.LoadBalancing(
                    scopes=tuple(
                        _enum("load_balancing.routing_preference", _SCOPES, scope)
                        for scope in balancing.routing_preference
                    ),
                    mode=_enum("load_balancing.mode", _MODES, balancing.mode),
                    allow_unhealthy=balancing.health_policy == workload_pb2.LoadBalancing.ALLOW_ALL,
                )
            ),
            ip_families=_enum("ip_families", _FAMILIES, message.ip_families),
            waypoint=self._gateway("waypoint", message.waypoint) if message.HasField("waypoint") else None,
            weighted_waypoints=tuple(
                (self._gateway("weighted_waypoints", weighted.destination), weighted.weight)
                for weighted in message.weighted_waypoints
            ),
            canonical=message.canonical,
            namespace_only=message.visibility != workload_pb2.Service.PUBLIC,
        )

    def _services(self, message: workload_pb2.Workload) -> dict[str, tuple[model.Port, ...]]:
        services = {_intern(key): self._ports(ports.ports) for key, ports in message.services.items()}
        # Two mappings are equal if their items are; the order of a protobuf map is arbitrary.
        identity = frozenset(services.items())
        self._bound(self._shared_services)
        return self._shared_services.setdefault(identity, services)

    def _ports(self, ports: Iterable[workload_pb2.Port]) -> tuple[model.Port, ...]:
        return self._share(
            tuple(
                [
                    model.Port(
                        _port("service_port", port.service_port),
                        _port("target_port", port.target_port),
                        _PROTOCOLS.get(port.app_protocol, model.AppProtocol.UNKNOWN),
                    )
                    for port in ports
                ]
            )
        )

    def _locality(self, message: workload_pb2.Locality) -> model.Locality:
        return self._share(
            model.Locality(_intern(message.region), _intern(message.zone), _intern(message.subzone))
        )

    def _gateway(self, field: str, message: workload_pb2.GatewayAddress) -> model.GatewayAddress:
        port = _port(f"{field}.hbone_mtls_port", message.hbone_mtls_port) or model.HBONE_PORT
        match message.WhichOneof("destination"):
            case "hostname":
                key = f"{message.hostname.namespace}/{message.hostname.hostname}"
                return self._share(model.GatewayAddress(service=key, hbone_port=port))
            case "address":
                ip = _ip(message.address.address)
                return self._share(
                    model.GatewayAddress(network=message.address.network, ip=ip, hbone_port=port)
                )
            case _:
                raise _FieldError(f"{field}: has neither a hostname nor an address")

    def _share(self, value: H) -> H:
        shared = self._shared.setdefault(type(value), {})
        self._bound(shared)
        return cast(H, shared.setdefault(value, value))

    def _bound(self, shared: dict[Hashable, V]) -> None:
        if len(shared) >= self._most:
            shared.clear()


_NOWHERE: Final = model.Locality()


def _check_name(field: str, own: str, resource_name: str) -> None:
    # A removal names the resource only: under another name than its own it would stay for ever.
    if own != resource_name:
        raise _FieldError(f"{field}: say {own!r}, which must be the resource's name")


def _ip(packed: bytes) -> bytes:
    if len(packed) not in (4, 16):
        raise _FieldError(f"addresses: one is {len(packed)} bytes long: an IP address has 4 or 16")
    return packed


def _port(field: str, number: int) -> int:
    if number > 65535:
        raise _FieldError(f"{field}: {number} is no port: the highest is 65535")
    return number


def _enum(field: str, known: dict[int, H], value: int) -> H:
    try:
        return known[value]
    except KeyError:
        raise _FieldError(f"{field}: value {value} is unknown here: a newer proxy may know it") from None


def _application_tunnel(message: workload_pb2.ApplicationTunnel) -> model.ApplicationTunnel:
    return model.ApplicationTunnel(
        proxy_protocol=message.protocol == workload_pb2.ApplicationTunnel.PROXY,
        port=_port("application_tunnel.port", message.port),
    )
