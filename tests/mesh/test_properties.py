"""Whatever happens to a mesh, in whatever order: lookups are right, and nobody keeps a stale route."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from tests.mesh.meshes import ip, mesh, pod, service
from ztunnel.mesh.model import (
    BalancingMode,
    GatewayAddress,
    IpFamilies,
    Scope,
    Service,
    TunnelProtocol,
    Workload,
)
from ztunnel.mesh.routing import resolve
from ztunnel.mesh.state import MeshState

# Few names and addresses, so that they collide.
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.96.0.1", "fd00::1", "fd96::1")
NAMES = ("a", "b", "c")
NETWORKS = ("", "east")
PORTS = (80, 8080, 15008)

addresses = st.lists(st.sampled_from(ADDRESSES), max_size=3)
names = st.sampled_from(NAMES)
ports = st.dictionaries(st.sampled_from(PORTS), st.sampled_from((0, *PORTS)), max_size=2)
gateways = st.none() | st.builds(GatewayAddress, service=st.just("default/waypoint"))

workloads = st.builds(
    lambda name, addresses, **fields: pod(name, *addresses, **fields),
    names,
    addresses,
    services=st.dictionaries(names, ports, max_size=2),
    network=st.sampled_from(NETWORKS),
    node=st.sampled_from(("node-1", "node-2")),
    healthy=st.booleans(),
    host_network=st.booleans(),
    tunnel_protocol=st.sampled_from(TunnelProtocol),
    capacity=st.integers(0, 2),
    waypoint=gateways,
)
services = st.builds(
    lambda name, vips, **fields: service(name, *vips, **fields),
    names,
    addresses,
    ports=ports,
    balancing=st.tuples(
        st.lists(st.sampled_from((Scope.NODE, Scope.NETWORK)), max_size=2).map(tuple),
        st.sampled_from(BalancingMode),
        st.booleans(),
    ),
    ip_families=st.sampled_from(IpFamilies),
    waypoint=gateways,
    canonical=st.booleans(),
    namespace_only=st.booleans(),
)
removals = st.sampled_from(
    [pod(name).uid for name in NAMES] + [service(name).key for name in NAMES] + ["not known"]
)
steps = st.lists(workloads | services | removals, max_size=12)


def apply(state: MeshState, step: Workload | Service | str) -> frozenset[str]:
    if isinstance(step, Workload):
        return state.upsert_workload(step)
    if isinstance(step, Service):
        return state.upsert_service(step)
    return state.remove(step)


def remaining(steps: Iterable[Workload | Service | str]) -> dict[str, Workload | Service]:
    """What a mesh holds after these steps, by resource name, in order of arrival."""
    held: dict[str, Workload | Service] = {}
    for step in steps:
        if isinstance(step, str):
            held.pop(step, None)
        else:
            held[step.uid if isinstance(step, Workload) else step.key] = step
    return held


@given(steps)
def test_lookups_agree_with_a_search_of_everything(steps: list[Workload | Service | str]) -> None:
    state = MeshState()
    for step in steps:
        apply(state, step)
    held = remaining(steps)
    pods = [each for each in held.values() if isinstance(each, Workload)]
    known = [each for each in held.values() if isinstance(each, Service)]
    assert list(state.workloads()) == pods
    assert list(state.services()) == known
    for name in NAMES:
        key = service(name).key
        assert {each.uid for each in state.endpoints(key)} == {
            each.uid for each in pods if key in each.services
        }
    for network in NETWORKS:
        for address in map(ip, ADDRESSES):
            owners = [
                each
                for each in pods
                if each.network == network and address in each.addresses and not each.host_network
            ]
            found = state.workload_by_address(network, address)
            assert found in owners if owners else found is None
            if any(each.hbone for each in owners):
                assert found is not None
                assert found.hbone
            claimants = [each for each in known if (network, address) in each.vips]
            holder = state.service_by_vip(network, address)
            assert holder in claimants if claimants else holder is None
            conflict = [each for each in state.conflicts() if (each.network, each.ip) == (network, address)]
            assert len(conflict) == (len(claimants) > 1)


@given(steps, steps)
def test_a_state_depends_on_what_is_held_not_on_what_was(
    earlier: list[Workload | Service | str], later: list[Workload | Service | str]
) -> None:
    """Nothing of what is gone stays behind in an index."""
    state = mesh()
    for step in earlier:
        apply(state, step)
    for name in remaining(earlier):
        state.remove(name)
    assert (state.workload_count, state.service_count) == (0, 0)
    fresh = MeshState()
    for step in later:
        assert apply(state, step) == apply(fresh, step)
    for network in NETWORKS:
        for address in map(ip, ADDRESSES):
            for port in PORTS:
                assert resolve(state, None, network, address, port) == resolve(
                    fresh, None, network, address, port
                )


@given(steps, workloads | services | removals)
def test_a_route_that_changes_is_among_the_tags(
    steps: list[Workload | Service | str], change: Workload | Service | str
) -> None:
    """The workers' caches rely on it: a route whose tags are not named still holds."""
    state = MeshState()
    for step in steps:
        apply(state, step)
    questions = [
        (source, network, ip(address), port)
        for source in (pod("a").uid, pod("b").uid)
        for network in NETWORKS
        for address in ADDRESSES
        for port in PORTS
    ]
    before = {
        question: resolve(state, state.workload_by_uid(question[0]), *question[1:]) for question in questions
    }
    known = {source: state.workload_by_uid(source) for source, *_ in questions}
    tags = apply(state, change)
    for question, old in before.items():
        source, former = state.workload_by_uid(question[0]), known[question[0]]
        if source is None or former is None or not source.addresses or not former.addresses:
            # A source that comes or goes is a pod that comes or goes: its routes go with it. One without an
            # address sends nothing.
            continue
        if resolve(state, source, *question[1:]) != old:
            assert not tags.isdisjoint(old.tags)


@given(steps)
def test_a_mesh_destination_is_never_plaintext_by_mistake(steps: list[Workload | Service | str]) -> None:
    """Every endpoint that takes tunnels gets one, with an identity to expect; no route is empty without a reason."""
    state = MeshState()
    for step in steps:
        apply(state, step)
    for network in NETWORKS:
        for address in map(ip, ADDRESSES):
            for port in PORTS:
                route = resolve(state, None, network, address, port)
                assert bool(route.endpoints) != bool(route.error)
                for endpoint in route.endpoints:
                    assert endpoint.hbone == bool(endpoint.identity)
                    if endpoint.workload:
                        workload = state.workload_by_uid(pod(endpoint.workload).uid)
                        assert workload is not None
                        assert endpoint.hbone == workload.hbone
                        assert workload.network == network
                        assert ip(endpoint.address) in workload.addresses
                    else:
                        owner = state.workload_by_address(network, ip(endpoint.address))
                        assert owner is None
