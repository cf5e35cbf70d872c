"""Where a connection that leaves a pod goes: the outbound decision, from the mesh and an original destination.

Rule: pure functions of MeshState. What can't be reached as the mesh says it must (through a waypoint that is there,
in another network) is refused with a reason; plaintext is only ever for what is not in the mesh.
"""

from collections import Counter
from collections.abc import Collection
from math import lcm
from typing import Final, NamedTuple

from ztunnel.mesh.model import (
    HBONE_PORT,
    BalancingMode,
    GatewayAddress,
    LoadBalancing,
    Scope,
    Service,
    Workload,
    address_tag,
    ip_text,
    packed_ip,
    service_tag,
)
from ztunnel.mesh.route import Endpoint, Route
from ztunnel.mesh.state import MeshState

__all__ = ["MESH_PORTS", "Endpoint", "Route", "resolve", "resolve_behind"]

# Outbound capture, inbound plaintext capture, HBONE, DNS capture, SOCKS: a connection to one of them would come
# back to a proxy that sends it there again.
MESH_PORTS: Final = frozenset({15001, 15006, 15008, 15053, 15080})

_MAPPED_IPV4: Final = bytes(10) + b"\xff\xff"

NOT_FOUND: Final = 404
UNAVAILABLE: Final = 503


class _Waypoint(NamedTuple):
    """What a connection has to pass: the gateways with their weights, and what it asks them for (`authority`)."""

    gateways: tuple[tuple[GatewayAddress, int], ...]
    authority: str


class _Found(NamedTuple):
    """Endpoints of a service that can be used, or why there are none; and what that depends on."""

    workloads: tuple[tuple[Workload, bytes, int], ...]
    """Each with the address and the port to use."""
    error: str
    tags: tuple[str, ...]


def resolve(state: MeshState, source: Workload | None, network: str, ip: bytes, port: int) -> Route:
    """Decide where a connection goes that `source` (None if not known) opened to a packed address and a port.

    `network` is the one the source is on, and the state must be complete (XdsClient.synced): of a mesh half known
    the other half looks like the outside. A virtual IP leads to endpoints of its service; a workload's address to
    that workload; any other address (the host network's included) to itself, in plaintext.
    """
    if len(ip) == 16 and ip.startswith(_MAPPED_IPV4):
        # What an IPv6 socket says of an IPv4 peer (RFC 4291, 2.5.5.2).
        ip = ip[12:]
    service = state.service_by_vip(network, ip)
    if service is None:
        return _to_address(state, source, network, ip, port, (address_tag(network, ip),))
    tags = (address_tag(network, ip), service_tag(service.key))
    if service.load_balancing.mode is BalancingMode.PASSTHROUGH:
        return _to_address(state, source, network, ip, port, tags)
    return _to_service(state, service, source, network, ip, port, tags)


def resolve_behind(
    state: MeshState,
    own: str,
    source: Workload | None,
    network: str,
    host: str,
    port: int,
    lately: Collection[str] = (),
) -> Route:
    """Decide where the waypoint whose Service has the key `own` sends a connection to `host` and `port` on to.

    `host` is an address as text or a hostname; `source` is the waypoint's own workload, for closeness; `lately` are
    keys of services that are taken for ones behind it. A refusal's `status` says whether nobody here is of that name
    (404) or nobody there can take it (503).
    """
    ip = _packed(host)
    if ip is None:
        found = state.services_by_hostname(host.lower())
        mine = [one for one in found if one.key in lately or is_behind(state, one, own)]
        if not mine:
            return _not_mine(f"host {host}", own, tuple(service_tag(service.key) for service in found))
        service = mine[0]
        vip = next((address for of, address in service.vips if of == network), b"")
        return _to_endpoints(state, service, source, network, vip, port, (service_tag(service.key),))
    tags: tuple[str, ...] = (address_tag(network, ip),)
    known = state.service_by_vip(network, ip)
    if known is not None:
        tags += (service_tag(known.key),)
        if known.key not in lately and not is_behind(state, known, own):
            return _not_mine(f"Service {known.key}", own, tags, known)
        return _to_endpoints(state, known, source, network, ip, port, tags)
    workload = state.workload_by_address(network, ip)
    if workload is None or not is_behind(state, workload, own):
        where = ip_text(ip) if workload is None else f"workload {workload.namespace}/{workload.name}"
        return _not_mine(where, own, tags)
    if port in MESH_PORTS:
        error = f"workload {workload.namespace}/{workload.name}: port {port} is the mesh's own"
        return _refused(f"{error}: connect to the application's port", tags)._replace(status=NOT_FOUND)
    return Route((_endpoint(workload, ip, port, ""),), "", "", tags)


def is_behind(state: MeshState, target: Service | Workload, own: str) -> bool:
    """Whether the mesh says that the way to a service or workload leads through the waypoint of the key `own`."""
    gateways = [target.waypoint] if target.waypoint is not None else []
    if isinstance(target, Service) and target.waypoint is None:
        gateways = [gateway for gateway, _ in target.weighted_waypoints]
    return any(_names(state, gateway, own) for gateway in gateways)


def waypoints_of(
    state: MeshState, workload: Workload, network: str
) -> tuple[frozenset[str], tuple[str, ...]]:
    """The identities of the waypoints that a workload and its services have, and the tags that this depends on."""
    identities: set[str] = set()
    tags = [address_tag(workload.network, ip) for ip in workload.addresses]
    gateways = [workload.waypoint] if workload.waypoint is not None else []
    for key in workload.services:
        tags.append(service_tag(key))
        behind = state.service(key)
        if behind is not None:
            gateways += [behind.waypoint] if behind.waypoint is not None else []
            gateways += [gateway for gateway, _ in behind.weighted_waypoints]
    for gateway in gateways:
        service, of = _service_of(state, gateway)
        tags += of
        if service is not None:
            identities.update(one.identity for one in state.endpoints(service.key) if one.network == network)
        elif not gateway.service:
            single = state.workload_by_address(gateway.network, gateway.ip)
            if single is not None:
                identities.add(single.identity)
    return frozenset(identities), tuple(tags)


def _to_address(
    state: MeshState, source: Workload | None, network: str, ip: bytes, port: int, tags: tuple[str, ...]
) -> Route:
    address = ip_text(ip)
    workload = state.workload_by_address(network, ip)
    where = address if workload is None else f"workload {workload.namespace}/{workload.name} ({address})"
    if port in MESH_PORTS:
        return _refused(f"{where}: port {port} is the mesh's own: connect to the application's port", tags)
    if workload is None:
        return Route((Endpoint(address, port, False, "", "", "", ""),), "", "", tags)
    if workload.waypoint is not None:
        waypoint = _Waypoint(((workload.waypoint, 1),), _host_port(address, port))
        if not _is_instance(state, source, waypoint):
            return _to_waypoint(state, waypoint, source, network, ip, where, tags, None)
    return Route((_endpoint(workload, ip, port, ""),), "", "", tags)


def _to_service(
    state: MeshState,
    service: Service,
    source: Workload | None,
    network: str,
    ip: bytes,
    port: int,
    tags: tuple[str, ...],
) -> Route:
    where = f"Service {service.key}"
    if service.namespace_only:
        tags += _source_tags(source)
        if source is None or source.namespace != service.namespace:
            of = source.namespace if source else "an unknown source"
            return _refused(f"{where}: is visible in its own namespace only, not to {of}", tags, service)
    gateways = ((service.waypoint, 1),) if service.waypoint else service.weighted_waypoints
    if gateways:
        if _declared(service, port) is None:
            return _refused(_no_port(service, port), tags, service)
        waypoint = _Waypoint(gateways, _host_port(ip_text(ip), port))
        if not _is_instance(state, source, waypoint):
            return _to_waypoint(state, waypoint, source, network, ip, where, tags, service)
    return _to_endpoints(state, service, source, network, ip, port, tags)


def _to_endpoints(
    state: MeshState,
    service: Service,
    source: Workload | None,
    network: str,
    ip: bytes,
    port: int,
    tags: tuple[str, ...],
) -> Route:
    """To the service's endpoints themselves."""
    if _declared(service, port) is None:
        return _refused(_no_port(service, port), tags, service)._replace(status=NOT_FOUND)
    found = _find(state, service, source, network, ip, port, MESH_PORTS)
    tags += found.tags
    if found.error:
        return _refused(f"Service {service.key}: {found.error}", tags, service)
    endpoints = tuple(_endpoint(one, address, own, service.hostname) for one, address, own in found.workloads)
    return Route(endpoints, service.hostname, "", tags, service.key)


def _find(
    state: MeshState,
    service: Service,
    source: Workload | None,
    network: str,
    ip: bytes,
    port: int,
    refused: frozenset[int],
) -> _Found:
    """The best endpoints for a port that the service has; `ip` tells the family that was asked for (empty: any).

    A target port among `refused` cannot be used.
    """
    key = service.key
    target = _declared(service, port) or 0
    balancing = service.load_balancing
    close = balancing.scopes if balancing.mode in (BalancingMode.STRICT, BalancingMode.FAILOVER) else ()
    # Closeness depends on where the source is: its own address is a tag too.
    tags = _source_tags(source) if close else ()
    left_out: Counter[str] = Counter()
    ranked: dict[int, list[tuple[Workload, bytes, int]]] = {}
    for workload in state.endpoints(key):
        own_target = _target_port(workload, key, port, target)
        address = _address(workload, service, ip)
        if reason := _unusable(workload, balancing, network, own_target, address, refused):
            left_out[reason] += 1
            continue
        rank = _closeness(source, workload, close)
        if balancing.mode is BalancingMode.STRICT and rank < len(close):
            left_out["not as close as the Service demands"] += 1
            continue
        ranked.setdefault(rank, []).append((workload, address, own_target))
    if ranked:
        return _Found(tuple(ranked[max(ranked)]), "", tags)
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    remedy = reasons or (
        "it selects no workload that has it: compare the selector with the pods' labels, and a named targetPort "
        "with their containers' ports"
    )
    return _Found((), f"no endpoint for port {port}: {remedy}", tags)


# Waypoints.


def _to_waypoint(
    state: MeshState,
    waypoint: _Waypoint,
    source: Workload | None,
    network: str,
    ip: bytes,
    where: str,
    tags: tuple[str, ...],
    service: Service | None,
) -> Route:
    """Into a tunnel to one of the waypoint's pods, with what was asked for as its authority."""
    shares: list[tuple[int, list[Endpoint]]] = []
    errors: list[str] = []
    for gateway, weight in waypoint.gateways:
        if weight <= 0:
            continue
        endpoints, error, of = _waypoint_endpoints(state, gateway, source, network, ip, waypoint.authority)
        tags += of
        if endpoints:
            shares.append((weight, endpoints))
        else:
            errors.append(error)
    if not shares:
        reason = "; ".join(errors) or "all of its waypoints have weight 0"
        error = (
            f"{where}: its traffic must pass a waypoint: {reason}; refused rather than sent around the waypoint's "
            "policies: see `ambient waypoint status`, or remove the label istio.io/use-waypoint"
        )
        return _refused(error, tags, service)
    hostname, key = (service.hostname, service.key) if service is not None else ("", "")
    return Route(_weighted(shares, hostname), hostname, "", tags, key)


def _waypoint_endpoints(
    state: MeshState,
    gateway: GatewayAddress,
    source: Workload | None,
    network: str,
    ip: bytes,
    authority: str,
) -> tuple[list[Endpoint], str, tuple[str, ...]]:
    """The waypoint's pods to choose from, else what is wrong with it; and the tags that this depends on."""
    service, tags = _service_of(state, gateway)
    found: tuple[tuple[Workload, bytes, int], ...]
    if service is None:
        workload = None if gateway.service else state.workload_by_address(gateway.network, gateway.ip)
        if workload is None:
            return [], f"the waypoint {gateway} is not known", tags
        if workload.network != network:
            return [], f"the waypoint {gateway} is on another network, which this proxy can't reach", tags
        found = ((workload, gateway.ip, gateway.hbone_port),)
    else:
        if _declared(service, gateway.hbone_port) is None:
            return [], f"the waypoint's {_no_port(service, gateway.hbone_port)}", tags
        asked = ip if gateway.service else gateway.ip
        one = _find(state, service, source, network, asked, gateway.hbone_port, frozenset())
        tags += one.tags
        if one.error:
            return [], f"the waypoint's Service {service.key} has {one.error}", tags
        found = one.workloads
    usable = [(workload, address) for workload, address, port in found if port == HBONE_PORT]
    if not usable:
        return [], f"the waypoint {gateway} takes tunnels on another port than {HBONE_PORT}", tags
    return [
        Endpoint(
            ip_text(address), HBONE_PORT, True, workload.identity, workload.name, workload.namespace, "",
            workload.capacity or 1, authority,
        )
        for workload, address in usable
    ], "", tags  # fmt: skip


def _weighted(shares: list[tuple[int, list[Endpoint]]], hostname: str) -> tuple[Endpoint, ...]:
    """The endpoints of several waypoints, each waypoint with its share of the connections."""
    sums = [sum(one.weight for one in endpoints) for _, endpoints in shares]
    whole = lcm(*sums) if len(shares) > 1 else sums[0]
    scaled = []
    for (share, endpoints), total in zip(shares, sums, strict=True):
        factor = share * whole // total if len(shares) > 1 else 1
        scaled += [one._replace(service=hostname, weight=one.weight * factor) for one in endpoints]
    return tuple(scaled)


def _service_of(state: MeshState, gateway: GatewayAddress) -> tuple[Service | None, tuple[str, ...]]:
    """The Service that a gateway is known by, and the tags that this depends on."""
    if gateway.service:
        return state.service(gateway.service), (service_tag(gateway.service),)
    service = state.service_by_vip(gateway.network, gateway.ip)
    tags = (address_tag(gateway.network, gateway.ip),)
    return service, (*tags, service_tag(service.key)) if service is not None else tags


def _names(state: MeshState, gateway: GatewayAddress, own: str) -> bool:
    if gateway.service:
        return gateway.service == own
    service = state.service_by_vip(gateway.network, gateway.ip)
    return service is not None and service.key == own


def _is_instance(state: MeshState, source: Workload | None, waypoint: _Waypoint) -> bool:
    """Whether the source is a pod of the very waypoint: what leaves it has passed it."""
    if source is None:
        return False
    return any(
        _names(state, gateway, key) for gateway, _ in waypoint.gateways for key in source.services
    ) or any(
        not gateway.service and gateway.network == source.network and gateway.ip in source.addresses
        for gateway, _ in waypoint.gateways
    )


def _not_mine(where: str, own: str, tags: tuple[str, ...], service: Service | None = None) -> Route:
    error = f"{where}: is not behind this waypoint ({own})"
    return _refused(error, tags, service)._replace(status=NOT_FOUND)


def _packed(host: str) -> bytes | None:
    try:
        return packed_ip(host)
    except (OSError, ValueError):
        return None


def _host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _declared(service: Service, port: int) -> int | None:
    """The target of a service's port, 0 if each workload has its own; None if there is no such port."""
    return next((declared.target for declared in service.ports if declared.service == port), None)


def _no_port(service: Service, port: int) -> str:
    known = ", ".join(str(declared.service) for declared in service.ports) or "none"
    return f"Service {service.key}: has no port {port} (its ports: {known}): use or add one"


def _target_port(workload: Workload, key: str, port: int, target: int) -> int:
    """The workload's own port for a service's port, which wins, or the service's `target`; 0 if neither says."""
    for own in workload.services[key]:
        if own.service == port and own.target:
            return own.target
    return target


def _address(workload: Workload, service: Service, asked: bytes) -> bytes:
    """The workload's address of the family asked for, if the service allows it and there is one, else any."""
    addresses = [ip for ip in workload.addresses if service.ip_families.accepts(ip)]
    for ip in addresses:
        if len(ip) == len(asked):
            return ip
    return addresses[0] if addresses else b""


def _unusable(
    workload: Workload, balancing: LoadBalancing, network: str, port: int, ip: bytes, refused: frozenset[int]
) -> str:
    """Why a connection can't go to this endpoint of a service, or nothing."""
    if not workload.healthy and not balancing.allow_unhealthy:
        return "not healthy"
    if workload.network != network:
        via = f" behind gateway {workload.network_gateway}" if workload.network_gateway else ""
        return f"on network {workload.network or '(default)'}{via}, out of reach of {network or '(default)'}"
    if not ip:
        return "without an address" + (" of the Service's IP family" if workload.addresses else "")
    if port == 0:
        return "without the port that the Service's targetPort names"
    if port in refused:
        return f"with target port {port}, which is the mesh's own"
    if workload.capacity == 0:
        return "of capacity 0"
    return ""


def _closeness(source: Workload | None, workload: Workload, scopes: tuple[Scope, ...]) -> int:
    """How many of the scopes, from the first on, source and workload share."""
    if source is None:
        return 0
    for rank, scope in enumerate(scopes):
        if _place(source, scope) != _place(workload, scope):
            return rank
    return len(scopes)


def _place(workload: Workload, scope: Scope) -> str:
    match scope:
        case Scope.REGION:
            return workload.locality.region
        case Scope.ZONE:
            return workload.locality.zone
        case Scope.SUBZONE:
            return workload.locality.subzone
        case Scope.NODE:
            return workload.node
        case Scope.CLUSTER:
            return workload.cluster_id
        case Scope.NETWORK:
            return workload.network


def _endpoint(workload: Workload, ip: bytes, port: int, service: str) -> Endpoint:
    return Endpoint(
        ip_text(ip),
        port,
        workload.hbone,
        workload.identity if workload.hbone else "",
        workload.name,
        workload.namespace,
        service,
        # Of a single destination (no service) there is nothing to share.
        workload.capacity if service else 1,
    )


def _source_tags(source: Workload | None) -> tuple[str, ...]:
    return tuple(address_tag(source.network, ip) for ip in source.addresses) if source else ()


def _refused(error: str, tags: tuple[str, ...], service: Service | None = None) -> Route:
    if service is None:
        return Route((), "", error, tags, "", UNAVAILABLE)
    return Route((), service.hostname, error, tags, service.key, UNAVAILABLE)
