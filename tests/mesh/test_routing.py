"""The outbound decision."""

import pytest

from tests.mesh.meshes import ip, key, mesh, pod, service
from ztunnel.mesh.model import (
    BalancingMode,
    GatewayAddress,
    IpFamilies,
    Locality,
    Scope,
    TunnelProtocol,
)
from ztunnel.mesh.routing import MESH_PORTS, Endpoint, resolve

WAYPOINT = GatewayAddress(service=key("waypoint"))
CLIENT = pod("client", "10.0.1.1", node="node-1", locality=Locality("eu", "eu-1", "a"))


def test_a_virtual_ip_leads_to_the_services_endpoints() -> None:
    state = mesh(
        service("web", "10.96.0.1", ports={80: 8080}),
        pod("web-1", "10.0.0.1", services={"web": {80: 8080}}, service_account="web"),
        pod("web-2", "10.0.0.2", services={"web": {80: 8080}}, tunnel_protocol=TunnelProtocol.NONE),
    )
    route = resolve(state, CLIENT, "", ip("10.96.0.1"), 80)
    hostname = "web.default.svc.cluster.local"
    identity = "spiffe://cluster.local/ns/default/sa/web"
    assert route.endpoints == (
        Endpoint("10.0.0.1", 8080, True, identity, "web-1", "default", hostname),
        Endpoint("10.0.0.2", 8080, False, "", "web-2", "default", hostname),
    )
    assert route.service == hostname
    assert route.error == ""
    assert set(route.tags) == {"ip:/10.96.0.1", f"svc:{key('web')}"}


def test_every_virtual_ip_of_a_service() -> None:
    state = mesh(
        service("web", "10.96.0.1", "10.96.0.2", "fd96::1", ports={80: 80}),
        pod("web-1", "10.0.0.1", services={"web": {80: 80}}),
    )
    for vip in ("10.96.0.1", "10.96.0.2", "fd96::1"):
        assert [endpoint.address for endpoint in resolve(state, CLIENT, "", ip(vip), 80).endpoints] == [
            "10.0.0.1"
        ]


def test_a_workload_address_leads_to_that_workload() -> None:
    """Headless Services need no more: their names resolve to pods."""
    state = mesh(pod("db-0", "10.0.0.1", "fd00::1", services={"db": {5432: 5432}}, service_account="db"))
    route = resolve(state, CLIENT, "", ip("fd00::1"), 5433)
    identity = "spiffe://cluster.local/ns/default/sa/db"
    assert route.endpoints == (Endpoint("fd00::1", 5433, True, identity, "db-0", "default", ""),)
    assert route.tags == ("ip:/fd00::1",)


def test_an_unhealthy_pod_is_reached_by_its_own_address() -> None:
    state = mesh(pod("web", "10.0.0.1", healthy=False))
    assert resolve(state, CLIENT, "", ip("10.0.0.1"), 80).endpoints[0].hbone


def test_an_unknown_destination_is_itself_in_plaintext() -> None:
    state = mesh(pod("agent", "10.99.0.11", host_network=True), pod("far", "10.0.0.1", network="other"))
    for address in ("93.184.216.34", "2001:db8::1", "10.99.0.11", "10.0.0.1"):
        route = resolve(state, CLIENT, "", ip(address), 443)
        assert route.endpoints == (Endpoint(address, 443, False, "", "", "", ""),)
        assert route.tags == (f"ip:/{address}",)


def test_an_ipv4_address_as_an_ipv6_socket_says_it() -> None:
    state = mesh(pod("web", "10.0.0.1"))
    route = resolve(state, CLIENT, "", ip("::ffff:10.0.0.1"), 80)
    assert route.endpoints[0].address == "10.0.0.1"
    assert route.tags == ("ip:/10.0.0.1",)


@pytest.mark.parametrize("port", sorted(MESH_PORTS))
def test_the_meshs_own_ports_are_refused(port: int) -> None:
    state = mesh(
        pod("web", "10.0.0.1", services={"web": {80: port}}),
        service("web", "10.96.0.1", ports={80: port}),
    )
    direct = resolve(state, CLIENT, "", ip("10.0.0.1"), port)
    assert direct.error == (
        f"workload default/web (10.0.0.1): port {port} is the mesh's own: connect to the application's port"
    )
    assert resolve(state, CLIENT, "", ip("192.0.2.1"), port).error
    by_service = resolve(state, CLIENT, "", ip("10.96.0.1"), 80)
    assert f"1 with target port {port}, which is the mesh's own" in by_service.error
    assert not direct.endpoints
    assert not by_service.endpoints


def test_a_port_that_the_service_lacks() -> None:
    state = mesh(
        service("web", "10.96.0.1", ports={80: 8080, 443: 8443}),
        pod("web", "10.0.0.1", services={"web": {80: 8080}}),
    )
    route = resolve(state, CLIENT, "", ip("10.96.0.1"), 8080)
    assert route.error == f"Service {key('web')}: has no port 8080 (its ports: 80, 443): use or add one"
    assert route.service == "web.default.svc.cluster.local"
    assert not route.endpoints


def test_named_target_ports_are_each_pods_own() -> None:
    state = mesh(
        service("web", "10.96.0.1", ports={80: 0}),
        pod("old", "10.0.0.1", services={"web": {80: 8080}}),
        pod("new", "10.0.0.2", services={"web": {80: 9090}}),
        pod("without", "10.0.0.3", services={"web": {}}),
    )
    route = resolve(state, CLIENT, "", ip("10.96.0.1"), 80)
    assert [(endpoint.address, endpoint.port) for endpoint in route.endpoints] == [
        ("10.0.0.1", 8080), ("10.0.0.2", 9090),
    ]  # fmt: skip


def test_the_pods_own_port_wins_over_the_services() -> None:
    state = mesh(
        service("web", "10.96.0.1", ports={80: 8080}),
        pod("a", "10.0.0.1", services={"web": {80: 9090}}),
        pod("b", "10.0.0.2", services={"web": {}}),
    )
    route = resolve(state, CLIENT, "", ip("10.96.0.1"), 80)
    assert [endpoint.port for endpoint in route.endpoints] == [9090, 8080]


def test_healthy_endpoints_only_unless_the_service_allows_all() -> None:
    endpoints = [
        pod("sick", "10.0.0.1", services={"web": {80: 80}}, healthy=False),
        pod("well", "10.0.0.2", services={"web": {80: 80}}),
    ]
    state = mesh(service("web", "10.96.0.1", ports={80: 80}), *endpoints)
    assert [e.workload for e in resolve(state, CLIENT, "", ip("10.96.0.1"), 80).endpoints] == ["well"]
    state.upsert_service(
        service("web", "10.96.0.1", ports={80: 80}, balancing=((), BalancingMode.UNSPECIFIED, True))
    )
    assert len(resolve(state, CLIENT, "", ip("10.96.0.1"), 80).endpoints) == 2


def test_no_endpoint_says_why() -> None:
    state = mesh(service("web", "10.96.0.1", ports={80: 0}))
    empty = resolve(state, CLIENT, "", ip("10.96.0.1"), 80)
    assert empty.error == (
        f"Service {key('web')}: no endpoint for port 80: it selects no workload that has it: compare the selector "
        "with the pods' labels, and a named targetPort with their containers' ports"
    )
    for number in range(2):
        state.upsert_workload(pod(f"sick-{number}", "10.0.0.1", services={"web": {80: 80}}, healthy=False))
    state.upsert_workload(pod("unnamed", "10.0.0.2", services={"web": {}}))
    state.upsert_workload(pod("far", "10.0.0.3", services={"web": {80: 80}}, network="east"))
    state.upsert_workload(pod("nowhere", services={"web": {80: 80}}))
    state.upsert_workload(pod("drained", "10.0.0.4", services={"web": {80: 80}}, capacity=0))
    assert resolve(state, CLIENT, "", ip("10.96.0.1"), 80).error == (
        f"Service {key('web')}: no endpoint for port 80: 2 not healthy, "
        "1 without the port that the Service's targetPort names, "
        "1 on network east, out of reach of (default), 1 without an address, 1 of capacity 0"
    )


@pytest.mark.parametrize(
    ("families", "asked", "expected"),
    [
        (IpFamilies.AUTOMATIC, "10.96.0.1", {"both": "10.0.0.1", "four": "10.0.0.2", "six": "fd00::3"}),
        (IpFamilies.AUTOMATIC, "fd96::1", {"both": "fd00::1", "four": "10.0.0.2", "six": "fd00::3"}),
        (IpFamilies.DUAL, "fd96::1", {"both": "fd00::1", "four": "10.0.0.2", "six": "fd00::3"}),
        (IpFamilies.IPV4_ONLY, "10.96.0.1", {"both": "10.0.0.1", "four": "10.0.0.2"}),
        (IpFamilies.IPV6_ONLY, "10.96.0.1", {"both": "fd00::1", "six": "fd00::3"}),
    ],
)
def test_addresses_of_the_family_asked_for_else_the_other(
    families: IpFamilies, asked: str, expected: dict[str, str]
) -> None:
    state = mesh(
        service("web", "10.96.0.1", "fd96::1", ports={80: 80}, ip_families=families),
        pod("both", "10.0.0.1", "fd00::1", services={"web": {80: 80}}),
        pod("four", "10.0.0.2", services={"web": {80: 80}}),
        pod("six", "fd00::3", services={"web": {80: 80}}),
    )
    route = resolve(state, CLIENT, "", ip(asked), 80)
    assert {endpoint.workload: endpoint.address for endpoint in route.endpoints} == expected


def test_a_family_that_no_endpoint_has() -> None:
    state = mesh(
        service("web", "fd96::1", ports={80: 80}, ip_families=IpFamilies.IPV6_ONLY),
        pod("four", "10.0.0.2", services={"web": {80: 80}}),
    )
    assert (
        "1 without an address of the Service's IP family"
        in resolve(state, CLIENT, "", ip("fd96::1"), 80).error
    )


PLACES = {
    "same-node": {"node": "node-1", "locality": Locality("eu", "eu-1", "a")},
    "same-zone": {"node": "node-2", "locality": Locality("eu", "eu-1", "b")},
    "same-region": {"node": "node-3", "locality": Locality("eu", "eu-2", "a")},
    # The same names in another region are other places.
    "elsewhere": {"node": "node-1", "locality": Locality("us", "eu-1", "a")},
}
TO_NODE = (Scope.REGION, Scope.ZONE, Scope.NODE)


@pytest.mark.parametrize(
    ("mode", "scopes", "present", "expected"),
    [
        (BalancingMode.FAILOVER, TO_NODE, list(PLACES), ["same-node"]),
        (BalancingMode.FAILOVER, TO_NODE, ["elsewhere", "same-region", "same-zone"], ["same-zone"]),
        (BalancingMode.FAILOVER, TO_NODE, ["elsewhere", "same-region"], ["same-region"]),
        (BalancingMode.FAILOVER, TO_NODE, ["elsewhere"], ["elsewhere"]),
        (BalancingMode.FAILOVER, (Scope.REGION,), list(PLACES), ["same-node", "same-zone", "same-region"]),
        (BalancingMode.STRICT, (Scope.REGION, Scope.ZONE), list(PLACES), ["same-node", "same-zone"]),
        (BalancingMode.STRICT, (Scope.CLUSTER, Scope.NETWORK), list(PLACES), list(PLACES)),
        (BalancingMode.STRICT, (Scope.SUBZONE,), ["same-node", "same-zone"], ["same-node"]),
        (BalancingMode.STRICT, TO_NODE, ["same-zone", "elsewhere"], []),
        (BalancingMode.UNSPECIFIED, TO_NODE, list(PLACES), list(PLACES)),
    ],
)
def test_close_endpoints_come_first(
    mode: BalancingMode, scopes: tuple[Scope, ...], present: list[str], expected: list[str]
) -> None:
    state = mesh(
        service("web", "10.96.0.1", ports={80: 80}, balancing=(scopes, mode)),
        *(
            pod(name, f"10.0.0.{number}", services={"web": {80: 80}}, **PLACES[name])
            for number, name in enumerate(present)
        ),
    )
    route = resolve(state, CLIENT, "", ip("10.96.0.1"), 80)
    assert [endpoint.workload for endpoint in route.endpoints] == expected
    assert bool(route.error) == (not expected)
    # What depends on the source's place is told when the source moves.
    assert ("ip:/10.0.1.1" in route.tags) == (mode is not BalancingMode.UNSPECIFIED)


def test_an_unhealthy_endpoint_nearby_does_not_keep_the_distant_ones_away() -> None:
    state = mesh(
        service("web", "10.96.0.1", ports={80: 80}, balancing=(TO_NODE, BalancingMode.FAILOVER)),
        pod("near", "10.0.0.1", services={"web": {80: 80}}, healthy=False, **PLACES["same-node"]),
        pod("far", "10.0.0.2", services={"web": {80: 80}}, **PLACES["elsewhere"]),
    )
    assert [e.workload for e in resolve(state, CLIENT, "", ip("10.96.0.1"), 80).endpoints] == ["far"]


def test_an_unknown_source_is_close_to_nobody() -> None:
    state = mesh(
        service("any", "10.96.0.1", ports={80: 80}, balancing=(TO_NODE, BalancingMode.FAILOVER)),
        service("near", "10.96.0.2", ports={80: 80}, balancing=(TO_NODE, BalancingMode.STRICT)),
        pod("web", "10.0.0.1", services={"any": {80: 80}, "near": {80: 80}}),
    )
    assert resolve(state, None, "", ip("10.96.0.1"), 80).endpoints
    assert "not as close as the Service demands" in resolve(state, None, "", ip("10.96.0.2"), 80).error


def test_passthrough_goes_where_it_was_sent() -> None:
    state = mesh(
        service("out", "10.96.0.1", "10.0.0.1", ports={80: 80}, balancing=((), BalancingMode.PASSTHROUGH)),
        pod("web", "10.0.0.1", services={"out": {80: 80}}),
    )
    outside = resolve(state, CLIENT, "", ip("10.96.0.1"), 4711)
    assert outside.endpoints == (Endpoint("10.96.0.1", 4711, False, "", "", "", ""),)
    assert set(outside.tags) == {"ip:/10.96.0.1", f"svc:{key('out')}"}
    assert resolve(state, CLIENT, "", ip("10.0.0.1"), 80).endpoints[0].workload == "web"


def test_what_is_behind_a_waypoint_is_not_reached_around_it() -> None:
    state = mesh(
        service("one", "10.96.0.1", ports={80: 80}, waypoint=WAYPOINT),
        service("two", "10.96.0.2", ports={80: 80}, weighted_waypoints=((WAYPOINT, 1),)),
        pod("web", "10.0.0.1", services={"one": {80: 80}, "two": {80: 80}}),
        pod("guarded", "10.0.0.2", waypoint=GatewayAddress(network="net", ip=ip("10.0.9.9"))),
    )
    for address in ("10.96.0.1", "10.96.0.2", "10.0.0.2"):
        route = resolve(state, CLIENT, "", ip(address), 80)
        assert not route.endpoints
        assert "refused rather than sent around the waypoint's policies" in route.error
    assert (
        "workload default/guarded (10.0.0.2): its traffic must pass a waypoint: the waypoint 10.0.9.9 of network net"
        in (resolve(state, CLIENT, "", ip("10.0.0.2"), 80).error)
    )


def test_endpoints_on_another_network_are_left_out() -> None:
    gateway = GatewayAddress(network="east", ip=ip("192.0.2.7"))
    far = pod("far", "10.0.0.1", services={"web": {80: 80}}, network="east", network_gateway=gateway)
    state = mesh(service("web", "10.96.0.1", ports={80: 80}), far)
    assert "1 on network east behind gateway 192.0.2.7 of network east, out of reach of (default)" in (
        resolve(state, CLIENT, "", ip("10.96.0.1"), 80).error
    )
    state.upsert_workload(pod("near", "10.0.0.2", services={"web": {80: 80}}))
    assert [e.workload for e in resolve(state, CLIENT, "", ip("10.96.0.1"), 80).endpoints] == ["near"]


def test_a_service_for_its_own_namespace_only() -> None:
    state = mesh(
        service("web", "10.96.0.1", ports={80: 80}, namespace_only=True),
        pod("web", "10.0.0.1", services={"web": {80: 80}}),
    )
    assert resolve(state, CLIENT, "", ip("10.96.0.1"), 80).endpoints
    stranger = pod("stranger", "10.0.1.2", namespace="other")
    for source in (stranger, None):
        route = resolve(state, source, "", ip("10.96.0.1"), 80)
        assert "visible in its own namespace only" in route.error
        assert not route.endpoints


def test_a_host_network_endpoint_is_reached_in_plaintext_by_its_service() -> None:
    state = mesh(
        service("api", "10.96.0.1", ports={443: 6443}),
        pod(
            "api",
            "10.99.0.11",
            services={"api": {443: 6443}},
            host_network=True,
            tunnel_protocol=TunnelProtocol.NONE,
        ),
    )
    (endpoint,) = resolve(state, CLIENT, "", ip("10.96.0.1"), 443).endpoints
    assert (endpoint.address, endpoint.port, endpoint.hbone) == ("10.99.0.11", 6443, False)


def test_capacities_become_weights() -> None:
    state = mesh(
        service("web", "10.96.0.1", ports={80: 80}),
        pod("big", "10.0.0.1", services={"web": {80: 80}}, capacity=3),
        pod("small", "10.0.0.2", services={"web": {80: 80}}),
    )
    assert [e.weight for e in resolve(state, CLIENT, "", ip("10.96.0.1"), 80).endpoints] == [3, 1]
    assert resolve(state, CLIENT, "", ip("10.0.0.1"), 80).endpoints[0].weight == 1
