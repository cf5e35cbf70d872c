"""Which names a pod may use for which services, and what it is told."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.mesh.meshes import ip, mesh, pod, service
from ztunnel.dns.names import Found, lookup
from ztunnel.dns.packets import AAAA, HEADER, A
from ztunnel.mesh.model import BalancingMode, IpFamilies, Service
from ztunnel.mesh.state import MeshState

WEB = service("web", "10.96.0.1", "fd00:96::1")
SEARCH = ["default.svc.cluster.local", "svc.cluster.local", "cluster.local"]


def entry(hostname: str, *vips: str, namespace: str = "default", **fields: object) -> Service:
    """A service of another hostname than Kubernetes', as a ServiceEntry makes it."""
    return Service(
        name=hostname, hostname=hostname, namespace=namespace, vips=tuple(("", ip(vip)) for vip in vips),
        **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def told(state: MeshState, name: str, qtype: int = A, namespace: str = "default") -> set[str] | None:
    """The addresses as text, None if the query is passed on."""
    found = lookup(state, namespace, "", name, qtype)
    if found is None:
        return None
    return {".".join(map(str, one)) if len(one) == 4 else one.hex() for one in found.addresses}


@pytest.mark.parametrize(
    "name",
    [
        "web", "web.default", "web.default.svc", "web.default.svc.cluster.local",
        *(f"web.{search}" for search in SEARCH[:1]),
        *(f"web.default.{search}" for search in SEARCH),
        *(f"web.default.svc.{search}" for search in SEARCH),
        *(f"web.default.svc.cluster.local.{search}" for search in SEARCH),
    ],
)  # fmt: skip
def test_every_way_to_name_a_service(name: str) -> None:
    assert told(mesh(WEB), name) == {"10.96.0.1"}


@pytest.mark.parametrize(
    "name",
    [
        "", "other", "other.default.svc.cluster.local", "web.other.svc.cluster.local", "web.default.pod.cluster.local",
        "first.web.default.svc.cluster.local", "_http._tcp.web.default.svc.cluster.local", "cluster.local", "web.com",
        "web.default.svc.cluster.example", "web.default.svc.cluster.local.com", r"web\.default.svc.cluster.local",
        "xweb.default.svc.cluster.local", "web.default.svc.cluster.local.other.svc.cluster.local",
    ],
)  # fmt: skip
def test_other_names_are_not_ours_to_answer(name: str) -> None:
    assert told(mesh(WEB), name) is None


def test_short_names_are_those_of_the_pods_own_namespace() -> None:
    state = mesh(WEB, service("web", "10.96.0.2", namespace="shop"))
    assert told(state, "web.shop.svc.cluster.local", namespace="shop") == {"10.96.0.2"}
    assert told(state, "web", namespace="shop") == {"10.96.0.2"}
    assert told(state, "web.shop", namespace="default") == {"10.96.0.2"}
    assert told(state, "web", namespace="else") is None


def test_where_the_search_domain_begins_and_whose_the_answer_is() -> None:
    state = mesh(WEB, entry("www.example.com", "10.97.0.1"))
    name = "web.default.svc.cluster.local.svc.cluster.local"
    found = lookup(state, "default", "", name, A)
    assert found == Found([ip("10.96.0.1")], HEADER + 30, HEADER + len(name) - len("cluster.local"))
    assert lookup(state, "default", "", "www.example.com", A) == Found([ip("10.97.0.1")], 0, HEADER)


@pytest.mark.parametrize(("qtype", "expected"), [(A, {"10.96.0.9"}), (AAAA, set())])
def test_a_service_without_an_address_of_that_type_exists_all_the_same(
    qtype: int, expected: set[str]
) -> None:
    assert told(mesh(service("old", "10.96.0.9")), "old", qtype) == expected


class TestHeadless:
    def test_all_ready_endpoints_answer(self) -> None:
        state = mesh(
            service("peers", ports={80: 8080}),
            pod("a", "10.0.0.1", "fd00::1", services={"peers": {80: 8080}}),
            pod("b", "10.0.0.2", services={"peers": {80: 8080}}),
            pod("c", "10.0.0.3", services={"peers": {80: 8080}}, healthy=False),
            pod("d", "10.0.0.4", services={"peers": {80: 8080}}, network="far"),
        )
        assert told(state, "peers") == {"10.0.0.1", "10.0.0.2"}
        assert told(state, "peers", AAAA) == {ip("fd00::1").hex()}

    def test_unready_ones_too_where_the_service_says_so(self) -> None:
        state = mesh(
            service("peers", balancing=((), BalancingMode.UNSPECIFIED, True)),
            pod("c", "10.0.0.3", services={"peers": {}}, healthy=False),
        )
        assert told(state, "peers") == {"10.0.0.3"}

    def test_of_one_family_where_the_service_says_so(self) -> None:
        state = mesh(
            service("peers", ip_families=IpFamilies.IPV4_ONLY),
            pod("a", "10.0.0.1", "fd00::1", services={"peers": {}}),
        )
        assert told(state, "peers") == {"10.0.0.1"}
        assert told(state, "peers", AAAA) == set()

    def test_without_endpoints_it_is_for_others_to_say(self) -> None:
        assert told(mesh(service("peers")), "peers") is None

    def test_the_order_is_random(self) -> None:
        endpoints = [pod(f"p{n}", f"10.0.0.{n}", services={"peers": {}}) for n in range(1, 20)]
        state = mesh(service("peers"), *endpoints)
        orders = set()
        for _ in range(20):
            found = lookup(state, "default", "", "peers", A)
            assert found is not None
            orders.add(tuple(found.addresses))
        assert len(orders) > 1


class TestServiceEntries:
    def test_by_its_hostname_also_as_a_resolver_searches_for_it(self) -> None:
        state = mesh(entry("www.example.com", "10.97.0.1", namespace="shop"))
        assert told(state, "www.example.com") == {"10.97.0.1"}
        assert told(state, f"www.example.com.{SEARCH[0]}") == {"10.97.0.1"}

    def test_a_wildcard_covers_what_nothing_narrower_does(self) -> None:
        state = mesh(entry("*.example.com", "10.97.0.2"), entry("www.example.com", "10.97.0.1"))
        assert told(state, "www.example.com") == {"10.97.0.1"}
        assert told(state, "img.example.com") == {"10.97.0.2"}
        assert told(state, "a.b.example.com") == {"10.97.0.2"}
        assert told(state, "example.com") is None
        found = lookup(state, "default", "", f"img.example.com.{SEARCH[0]}", A)
        assert found is not None
        assert found.cut == 0

    def test_without_addresses_the_name_is_the_worlds(self) -> None:
        assert told(mesh(entry("www.example.com")), "www.example.com") is None

    def test_of_several_the_pods_own_then_the_owner_then_the_first(self) -> None:
        one, two = entry("x.io", "10.97.0.1", namespace="a"), entry("x.io", "10.97.0.2", namespace="b")
        owner = entry("x.io", "10.97.0.3", namespace="c", canonical=True)
        assert told(mesh(one, two), "x.io") == {"10.97.0.1"}
        assert told(mesh(one, two, owner), "x.io") == {"10.97.0.3"}
        assert told(mesh(one, two, owner), "x.io", namespace="b") == {"10.97.0.2"}


def test_a_private_service_is_seen_in_its_namespace_only() -> None:
    state = mesh(service("web", "10.96.0.1", namespace="shop", namespace_only=True))
    assert told(state, "web.shop.svc.cluster.local", namespace="shop") == {"10.96.0.1"}
    assert told(state, "web.shop.svc.cluster.local") is None


def test_addresses_of_other_networks_are_not_told() -> None:
    state = mesh(
        Service(name="w", namespace="d", hostname="w.d.svc.cluster.local", vips=(("far", ip("10.9.9.9")),))
    )
    assert told(state, "w.d.svc.cluster.local") == set()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x.io", "Y.io"]), st.booleans()), max_size=30)
)
def test_the_index_of_hostnames_is_what_the_services_are(steps: list[tuple[str, str, bool]]) -> None:
    state = MeshState()
    for number, (namespace, hostname, gone) in enumerate(steps):
        if gone:
            state.remove(f"{namespace}/{hostname}")
        else:
            state.upsert_service(entry(hostname, f"10.0.0.{number}", namespace=namespace))
    for name in ("x.io", "y.io"):
        wanted = {one.key for one in state.services() if one.hostname.lower() == name}
        found = state.services_by_hostname(name)
        assert {one.key for one in found} == wanted
        assert all(state.service(one.key) is one for one in found)
