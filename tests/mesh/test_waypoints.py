"""The outbound decision where a waypoint stands on the way, and the waypoint's own."""

from typing import Any

import pytest

from tests.mesh.meshes import ip, key, mesh, pod, service
from ztunnel.mesh.model import (
    BalancingMode,
    GatewayAddress,
    Locality,
    Scope,
    Service,
    TunnelProtocol,
    Workload,
)
from ztunnel.mesh.route import Endpoint
from ztunnel.mesh.routing import resolve, resolve_behind, waypoints_of

WAYPOINT = GatewayAddress(service=key("waypoint"))
BY_ADDRESS = GatewayAddress(ip=ip("10.96.9.9"))
CLIENT = pod("client", "10.0.1.1", node="node-1", locality=Locality("eu", "eu-1", "a"))
HOSTNAME = "web.default.svc.cluster.local"
IDENTITY = "spiffe://cluster.local/ns/default/sa/waypoint"


def instance(name: str = "waypoint-1", address: str = "10.0.9.1", **fields: Any) -> Workload:
    """A pod of the waypoint, which no ztunnel serves."""
    fields = {"service_account": "waypoint", "tunnel_protocol": TunnelProtocol.NONE, **fields}
    return pod(name, address, services={"waypoint": {15008: 15008}}, **fields)


def waypoint(**fields: Any) -> Service:
    """The waypoint's own Service."""
    return service("waypoint", "10.96.9.9", ports={15008: 15008, 15021: 15021}, **fields)


def web(**fields: Any) -> Service:
    """A Service behind it."""
    return service("web", "10.96.0.1", ports={80: 8080}, **({"waypoint": WAYPOINT} | fields))


SERVER = pod("web-1", "10.0.0.1", services={"web": {80: 8080}}, service_account="web")


@pytest.mark.parametrize("gateway", [WAYPOINT, BY_ADDRESS])
def test_a_service_behind_a_waypoint_is_reached_through_it(gateway: GatewayAddress) -> None:
    state = mesh(waypoint(), instance(), web(waypoint=gateway), SERVER)
    route = resolve(state, CLIENT, "", ip("10.96.0.1"), 80)
    assert route.error == ""
    assert route.endpoints == (
        Endpoint("10.0.9.1", 15008, True, IDENTITY, "waypoint-1", "default", HOSTNAME, 1, "10.96.0.1:80"),
    )
    assert (route.service, route.service_key) == (HOSTNAME, key("web"))
    assert f"svc:{key('waypoint')}" in route.tags
    assert f"svc:{key('web')}" in route.tags


def test_a_workload_behind_a_waypoint_is_reached_through_it_by_its_own_address_only() -> None:
    guarded = pod("web-1", "10.0.0.1", "fd00::1", services={"web": {80: 8080}}, waypoint=WAYPOINT)
    state = mesh(waypoint(), instance(), web(waypoint=None), guarded)
    for address, authority in (("10.0.0.1", "10.0.0.1:8080"), ("fd00::1", "[fd00::1]:8080")):
        (endpoint,) = resolve(state, CLIENT, "", ip(address), 8080).endpoints
        assert (endpoint.workload, endpoint.authority) == ("waypoint-1", authority)
    (direct,) = resolve(state, CLIENT, "", ip("10.96.0.1"), 80).endpoints
    assert (direct.workload, direct.authority) == ("web-1", "")


@pytest.mark.parametrize("gateway", [WAYPOINT, BY_ADDRESS])
def test_what_the_waypoint_itself_sends_passes_it_no_more(gateway: GatewayAddress) -> None:
    guarded = pod("web-1", "10.0.0.1", services={"web": {80: 8080}}, waypoint=gateway)
    state = mesh(waypoint(), instance(), web(waypoint=gateway), guarded)
    for address, port in (("10.96.0.1", 80), ("10.0.0.1", 8080)):
        (endpoint,) = resolve(state, instance(), "", ip(address), port).endpoints
        assert (endpoint.workload, endpoint.port, endpoint.authority) == ("web-1", 8080, "")


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([], f"the waypoint {key('waypoint')} is not known"),
        ([waypoint()], "no endpoint for port 15008"),
        ([waypoint(), instance(healthy=False)], "no endpoint for port 15008: 1 not healthy"),
        ([waypoint(), instance(network="other")], "1 on network other, out of reach of (default)"),
        ([service("waypoint", "10.96.9.9", ports={80: 80}), instance()], "has no port 15008"),
        (
            [
                service("waypoint", "10.96.9.9", ports={15008: 9000}),
                pod("w", "10.0.9.1", services={"waypoint": {15008: 9000}}),
            ],
            "takes tunnels on another port than 15008",
        ),
    ],
)
def test_without_its_waypoint_a_destination_is_refused(members: list[Service | Workload], says: str) -> None:
    state = mesh(*members, web(), SERVER)
    route = resolve(state, CLIENT, "", ip("10.96.0.1"), 80)
    assert not route.endpoints
    assert says in route.error
    assert f"Service {key('web')}: its traffic must pass a waypoint" in route.error
    assert "ambient waypoint status" in route.error
    # And is reached as soon as the waypoint is there: the route hangs on what it lacks.
    changed = state.upsert_service(waypoint()) | state.upsert_workload(instance())
    if members:
        changed |= state.upsert_workload(instance("other", "10.0.9.7"))
    assert changed & set(route.tags)


def test_the_closest_of_the_waypoints_pods_is_taken() -> None:
    close = {"balancing": ((Scope.NETWORK, Scope.REGION, Scope.ZONE), BalancingMode.FAILOVER)}
    state = mesh(
        waypoint(**close),
        instance("near", "10.0.9.1", locality=Locality("eu", "eu-1", "b")),
        instance("far", "10.0.9.2", locality=Locality("eu", "eu-2", "b")),
        web(),
        SERVER,
    )
    route = resolve(state, CLIENT, "", ip("10.96.0.1"), 80)
    assert [one.workload for one in route.endpoints] == ["near"]
    assert "ip:/10.0.1.1" in route.tags


def test_several_waypoints_have_their_shares_however_many_pods_each_has() -> None:
    second = service("second", "10.96.9.8", ports={15008: 15008})
    of_second = [
        pod(f"second-{number}", f"10.0.8.{number}", services={"second": {15008: 15008}})
        for number in (1, 2, 3)
    ]
    gone = GatewayAddress(service=key("gone"))
    weighted = (
        (WAYPOINT, 75),
        (GatewayAddress(service=key("second")), 25),
        (gone, 0),
    )
    state = mesh(
        waypoint(), instance(), instance("waypoint-2", "10.0.9.2"), second, *of_second,
        web(waypoint=None, weighted_waypoints=weighted), SERVER,
    )  # fmt: skip
    endpoints = resolve(state, CLIENT, "", ip("10.96.0.1"), 80).endpoints
    total = sum(one.weight for one in endpoints)
    first = [one.weight for one in endpoints if one.workload.startswith("waypoint")]
    assert (len(endpoints), len(first)) == (5, 2)
    assert sum(first) / total == 0.75
    assert len(set(first)) == 1


def test_the_service_has_to_have_the_port() -> None:
    state = mesh(waypoint(), instance(), web(), SERVER)
    assert "has no port 81 (its ports: 80)" in resolve(state, CLIENT, "", ip("10.96.0.1"), 81).error


# What the waypoint does with what comes to it.


@pytest.mark.parametrize("gateway", [WAYPOINT, BY_ADDRESS])
@pytest.mark.parametrize("host", ["10.96.0.1", HOSTNAME, HOSTNAME.upper()])
def test_a_waypoint_sends_on_to_the_services_endpoints(host: str, gateway: GatewayAddress) -> None:
    state = mesh(waypoint(), instance(), web(waypoint=gateway), SERVER)
    route = resolve_behind(state, key("waypoint"), instance(), "", host, 80)
    identity = "spiffe://cluster.local/ns/default/sa/web"
    assert route.endpoints == (Endpoint("10.0.0.1", 8080, True, identity, "web-1", "default", HOSTNAME),)
    assert (route.error, route.status, route.service_key) == ("", 0, key("web"))


def test_a_waypoint_sends_on_to_the_workload_itself() -> None:
    state = mesh(waypoint(), instance(), pod("db", "10.0.0.5", waypoint=WAYPOINT))
    (endpoint,) = resolve_behind(state, key("waypoint"), instance(), "", "10.0.0.5", 5432).endpoints
    assert (endpoint.address, endpoint.port, endpoint.hbone, endpoint.authority) == (
        "10.0.0.5",
        5432,
        True,
        "",
    )


@pytest.mark.parametrize(
    ("host", "port", "status", "says"),
    [
        ("10.96.0.2", 80, 404, "is not behind this waypoint"),
        ("10.0.0.1", 80, 404, "workload default/web-1: is not behind this waypoint"),
        ("192.0.2.1", 80, 404, "192.0.2.1: is not behind this waypoint"),
        ("nobody.example.com", 80, 404, "host nobody.example.com: is not behind this waypoint"),
        ("10.96.0.1", 81, 404, "has no port 81"),
        ("10.0.0.6", 15008, 404, "port 15008 is the mesh's own"),
        ("10.96.0.3", 80, 503, "no endpoint for port 80"),
    ],
)
def test_what_a_waypoint_refuses(host: str, port: int, status: int, says: str) -> None:
    state = mesh(
        waypoint(), instance(), web(), SERVER,
        service("other", "10.96.0.2", ports={80: 80}),
        service("empty", "10.96.0.3", ports={80: 80}, waypoint=WAYPOINT),
        pod("guarded", "10.0.0.6", waypoint=WAYPOINT),
    )  # fmt: skip
    route = resolve_behind(state, key("waypoint"), instance(), "", host, port)
    assert not route.endpoints
    assert route.status == status
    assert says in route.error


def test_whose_word_counts_for_a_pod() -> None:
    """That of its own waypoint and of its services' waypoints, and of nobody else."""
    own = service("own", "10.96.9.7", ports={15008: 15008})
    of_own = pod("own-1", "10.0.7.1", services={"own": {15008: 15008}}, service_account="own")
    other = service("other", "10.96.9.6", ports={15008: 15008})
    of_other = pod("other-1", "10.0.6.1", services={"other": {15008: 15008}}, service_account="other")
    guarded = pod(
        "web-1", "10.0.0.1", services={"web": {80: 8080}}, waypoint=GatewayAddress(service=key("own"))
    )
    state = mesh(waypoint(), instance(), own, of_own, other, of_other, web(), guarded)
    identities, tags = waypoints_of(state, guarded, "")
    assert identities == {IDENTITY, "spiffe://cluster.local/ns/default/sa/own"}
    assert {f"svc:{key('waypoint')}", f"svc:{key('own')}", f"svc:{key('web')}", "ip:/10.0.0.1"} <= set(tags)
    assert waypoints_of(state, SERVER, "")[0] == {IDENTITY}
    assert waypoints_of(state, CLIENT, "") == (frozenset(), ("ip:/10.0.1.1",))
