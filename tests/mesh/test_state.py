"""The indexes of the mesh's state."""

import tracemalloc

from tests.mesh.meshes import ip, key, mesh, pod, service
from ztunnel.mesh.model import Port, Service, TunnelProtocol, Workload
from ztunnel.mesh.state import MeshState


def test_a_workload_is_found_by_uid_and_every_address() -> None:
    web = pod("web", "10.0.0.1", "fd00::1", network="net")
    state = MeshState()
    assert state.upsert_workload(web) == {"ip:net/10.0.0.1", "ip:net/fd00::1"}
    assert state.workload_by_uid(web.uid) is web
    assert state.workload_by_address("net", ip("10.0.0.1")) is web
    assert state.workload_by_address("net", ip("fd00::1")) is web
    # An address means something within its network only.
    assert state.workload_by_address("", ip("10.0.0.1")) is None
    assert state.workload_count == 1


def test_a_changed_workload_leaves_no_trace_of_its_former_self() -> None:
    state = mesh(pod("web", "10.0.0.1", services={"a": {80: 1}, "b": {80: 1}}))
    tags = state.upsert_workload(pod("web", "10.0.0.2", services={"b": {80: 2}, "c": {80: 1}}))
    assert tags == {
        "ip:/10.0.0.1", "ip:/10.0.0.2", f"svc:{key('a')}", f"svc:{key('b')}", f"svc:{key('c')}",
    }  # fmt: skip
    assert state.workload_by_address("", ip("10.0.0.1")) is None
    assert not state.endpoints(key("a"))
    (endpoint,) = state.endpoints(key("b"))
    assert endpoint.services[key("b")] == (Port(80, 2),)
    assert state.remove(endpoint.uid) == {"ip:/10.0.0.2", f"svc:{key('b')}", f"svc:{key('c')}"}
    assert state.workload_count == 0
    assert state.workload_by_address("", ip("10.0.0.2")) is None
    assert not state.endpoints(key("b"))


def test_the_same_again_changes_nothing() -> None:
    state = mesh(pod("web", "10.0.0.1"), service("web", "10.96.0.1"))
    assert not state.upsert_workload(pod("web", "10.0.0.1"))
    assert not state.upsert_service(service("web", "10.96.0.1"))
    assert not state.remove("not-known")


def test_endpoints_may_come_before_their_service() -> None:
    state = mesh(pod("web-1", "10.0.0.1", services={"web": {80: 8080}}))
    assert state.service(key("web")) is None
    assert [workload.name for workload in state.endpoints(key("web"))] == ["web-1"]
    assert state.upsert_service(service("web", "10.96.0.1")) == {f"svc:{key('web')}", "ip:/10.96.0.1"}
    assert state.remove(key("web")) == {f"svc:{key('web')}", "ip:/10.96.0.1"}
    assert [workload.name for workload in state.endpoints(key("web"))] == ["web-1"]


def test_a_changed_endpoint_keeps_its_place() -> None:
    state = mesh(*(pod(f"web-{n}", services={"web": {80: 1}}) for n in range(3)))
    state.upsert_workload(pod("web-1", services={"web": {80: 1}}, healthy=False))
    assert [workload.name for workload in state.endpoints(key("web"))] == ["web-0", "web-1", "web-2"]


def test_an_address_of_the_host_network_is_nobodys() -> None:
    state = mesh(
        pod("agent", "10.99.0.11", host_network=True), pod("agent-2", "10.99.0.11", host_network=True)
    )
    assert state.workload_by_address("", ip("10.99.0.11")) is None
    state.remove("Kubernetes//Pod/default/agent")
    assert state.workload_count == 1


def test_an_address_that_passes_to_another_pod() -> None:
    old = pod("old", "10.0.0.1")
    new = pod("new", "10.0.0.1")
    state = mesh(old, new)
    assert state.workload_by_address("", ip("10.0.0.1")) is new
    state.remove(old.uid)
    assert state.workload_by_address("", ip("10.0.0.1")) is new
    state.remove(new.uid)
    assert state.workload_by_address("", ip("10.0.0.1")) is None


def test_a_pod_owns_its_address_whatever_else_claims_it() -> None:
    true = pod("pod", "10.0.0.1", tunnel_protocol=TunnelProtocol.NONE)
    entry = pod("entry", "10.0.0.1", uid="Kubernetes/networking.istio.io/ServiceEntry/x/y/10.0.0.1")
    for state in (mesh(true, entry), mesh(entry, true)):
        assert state.workload_by_address("", ip("10.0.0.1")) is true
        # Of two pods the one in the mesh: plaintext to it must not come from a mistake.
        joined = pod("joined", "10.0.0.1")
        state.upsert_workload(joined)
        assert state.workload_by_address("", ip("10.0.0.1")) is joined
        state.remove(joined.uid)
        assert state.workload_by_address("", ip("10.0.0.1")) is true


def test_two_services_that_claim_one_address() -> None:
    first = service("first", "10.96.0.1", "10.96.0.2")
    second = service("second", "10.96.0.1")
    state = mesh(first, second)
    assert state.service_by_vip("", ip("10.96.0.1")) is first
    (conflict,) = state.conflicts()
    assert (conflict.network, conflict.ip) == ("", ip("10.96.0.1"))
    assert (conflict.holder, conflict.others) == (key("first"), (key("second"),))
    assert str(conflict) == (
        f"Service {key('first')}: addresses: 10.96.0.1 is also claimed by {key('second')}; connections go to "
        f"{key('first')}: give each Service an address of its own"
    )
    # A change of the holder does not lose it the address, nor does one of the other gain it.
    first = service("first", "10.96.0.1", ports={80: 80})
    state.upsert_service(first)
    state.upsert_service(service("second", "10.96.0.1", ports={80: 80}))
    assert state.service_by_vip("", ip("10.96.0.1")) is first
    # Giving it up does, and whoever depends on the address is told.
    assert "ip:/10.96.0.1" in state.upsert_service(service("first"))
    held = state.service_by_vip("", ip("10.96.0.1"))
    assert held is not None
    assert held.name == "second"
    assert not state.conflicts()


def test_a_canonical_service_comes_before_others() -> None:
    entry = service("entry", "10.96.0.1")
    true = service("true", "10.96.0.1", canonical=True)
    for state in (mesh(entry, true), mesh(true, entry)):
        assert state.service_by_vip("", ip("10.96.0.1")) is true
        assert state.conflicts()[0].holder == key("true")


def test_three_services_and_removal_in_any_order() -> None:
    members = [service(name, "10.96.0.1") for name in ("a", "b", "c")]
    for gone in range(3):
        state = mesh(*members)
        state.remove(members[gone].key)
        rest = [member for member in members if member is not members[gone]]
        assert state.service_by_vip("", ip("10.96.0.1")) is rest[0]
        assert state.conflicts()[0].others == (rest[1].key,)


def test_one_address_named_twice_by_one_owner() -> None:
    state = mesh(pod("web", "10.0.0.1", "10.0.0.1"), service("web", "10.96.0.1", "10.96.0.1"))
    assert not state.conflicts()
    state.upsert_workload(pod("web", "10.0.0.1", "10.0.0.1", healthy=False))
    state.upsert_service(service("web", "10.96.0.1", "10.96.0.1", canonical=True))
    assert not state.conflicts()
    state.remove("Kubernetes//Pod/default/web")
    state.remove(key("web"))
    assert state.workload_by_address("", ip("10.0.0.1")) is None
    assert state.service_by_vip("", ip("10.96.0.1")) is None


def test_a_workload_is_small() -> None:
    """With everything shareable shared, as the decoder does. A loose bound: 100,000 must fit in 150 MB."""
    count = 2000
    services: dict[str, tuple[Port, ...]] = {key("web"): (Port(80, 8080),)}
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        state = MeshState()
        for number in range(count):
            name = f"web-7d9f8b6c5d-{number:05}"
            state.upsert_workload(
                Workload(
                    uid=f"Kubernetes//Pod/default/{name}",
                    name=name,
                    namespace="default",
                    addresses=(ip(f"10.1.{number >> 8}.{number & 255}"), ip(f"fd00::{number:x}")),
                    services=services,
                )
            )
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used / count < 1200


def test_services_are_values() -> None:
    assert service("a", "10.96.0.1") == service("a", "10.96.0.1")
    assert isinstance(service("a"), Service)
    assert service("a").key == key("a")
    assert pod("a", trust_domain="td", service_account="sa").identity == "spiffe://td/ns/default/sa/sa"


def test_the_nodes_own_workloads_are_found_by_name() -> None:
    state = MeshState("node-1")
    state.upsert_workload(pod("web", "10.0.0.1", node="node-1", policies=("default/p",)))
    state.upsert_workload(pod("far", "10.0.0.2", node="node-2"))
    state.upsert_workload(pod("nowhere", "10.0.0.3"))
    found = state.local_workload("default", "web")
    assert found is not None
    assert found.policies == ("default/p",)
    assert state.local_workload("default", "far") is None
    assert state.local_workload("default", "nowhere") is None
    before = state.local_changes
    state.upsert_workload(pod("far", "10.0.0.9", node="node-2"))
    state.upsert_workload(pod("web", "10.0.0.1", node="node-1", policies=("default/p",)))
    assert state.local_changes == before
    # It moves away, under another uid first: the new one counts, and the old one's end changes nothing.
    state.upsert_workload(pod("web", "10.0.0.4", node="node-1", uid="Kubernetes//v1/Pod/default/web"))
    state.remove("Kubernetes//Pod/default/web")
    found = state.local_workload("default", "web")
    assert found is not None
    assert found.uid == "Kubernetes//v1/Pod/default/web"
    assert state.local_changes > before
    state.upsert_workload(pod("web", "10.0.0.4", node="node-2", uid="Kubernetes//v1/Pod/default/web"))
    assert state.local_workload("default", "web") is None


def test_a_state_that_nobody_asks_for_names_keeps_none() -> None:
    state = mesh(pod("web", "10.0.0.1", node="node-1"), pod("lost", "10.0.0.2"))
    assert state.local_workload("default", "web") is None
    assert state.local_changes == 0
