"""Pods are placed once and stay themselves; what cannot run says why."""

from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.embedded.placement import (
    APPLIED_ANNOTATION,
    Placed,
    Setting,
    Wanted,
    from_deployment,
    from_pod,
    key_of_account,
    place,
)
from ztunnel.store.models import (
    Container,
    Deployment,
    DeploymentSpec,
    EnvVar,
    EnvVarSource,
    Key,
    LabelSelector,
    ObjectFieldSelector,
    ObjectMeta,
    Pod,
    PodCondition,
    PodSpec,
    PodStatus,
    PodTemplate,
)

ACCOUNTS = frozenset({key_of_account("default", "default")})
RUNS = PodSpec(containers=[Container(name="c", command=["x"])])


class Machine:
    """Resolves again and again, as the cluster does: what was placed is what is there the next time."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = nodes
        self.pods: dict[Key, Pod] = {}
        self.last: dict[int, int] = {}
        self.born = 0

    def uid(self) -> str:
        self.born += 1
        return f"uid-{self.born}"

    def place(self, *wanted: Wanted, accounts: frozenset[Key] = ACCOUNTS) -> Placed:
        setting = Setting(self.nodes, accounts, f"time-{self.born}", self.uid, self.last)
        placed = place(wanted, self.pods, setting)
        self.pods = {pod.key: pod for pod in placed.pods}
        self.last = placed.last
        return placed

    def __getitem__(self, name: str) -> Pod:
        return self.pods[Key("", "Pod", "default", name)]

    def change(self, name: str, pod: Pod) -> None:
        self.pods[Key("", "Pod", "default", name)] = pod


def pod(name: str, spec: PodSpec = RUNS, **metadata: object) -> Wanted:
    return from_pod(Pod(metadata=ObjectMeta(name=name, namespace="default", **metadata), spec=spec))  # type: ignore[arg-type]


def deployment(replicas: int, spec: PodSpec = RUNS, **labels: str) -> list[Wanted]:
    template = PodTemplate(metadata=ObjectMeta(labels={"app": "web", **labels}), spec=spec)
    return from_deployment(
        Deployment(
            metadata=ObjectMeta(name="web", namespace="default", uid="D"),
            spec=DeploymentSpec(
                replicas=replicas, selector=LabelSelector(match_labels={"app": "web"}), template=template
            ),
        )
    )


def said(placed: Placed) -> list[str]:
    return [f"{finding.key}: {finding.message}; {finding.remedy}" for finding in placed.findings]


def test_a_pod_gets_node_addresses_and_identity() -> None:
    machine = Machine()
    assert machine.place(pod("a", labels={"x": "y"}), pod("b")).findings == []
    a, b = machine["a"], machine["b"]
    assert (a.spec.node_name, b.spec.node_name) == ("node-1", "node-2")
    assert a.addresses == ["10.244.1.2", "fd00:10:244:1::2"]
    assert a.status.pod_ip == "10.244.1.2"
    assert a.status.host_ip == "10.99.0.11"
    assert a.status.phase == "Pending"
    assert a.metadata.uid != b.metadata.uid
    assert a.metadata.labels == {"x": "y"}
    assert a.metadata.creation_timestamp == "time-0"


def test_nothing_changes_when_nothing_changed() -> None:
    machine = Machine()
    first = machine.place(pod("a"), pod("b"), *deployment(3)).pods
    assert machine.place(pod("b"), *deployment(3), pod("a")).pods == first


def test_what_others_wrote_on_a_pod_stays() -> None:
    machine = Machine()
    machine.place(pod("a", annotations={"mine": "1", "gone": "1"}))
    status = msgspec.structs.replace(machine["a"].status, phase="Running")
    annotations = {**machine["a"].metadata.annotations, "ambient.istio.io/redirection": "enabled"}
    metadata = msgspec.structs.replace(machine["a"].metadata, annotations=annotations)
    machine.change("a", msgspec.structs.replace(machine["a"], status=status, metadata=metadata))
    before = machine["a"]
    machine.place(pod("a", labels={"new": "label"}, annotations={"mine": "2"}))
    after = machine["a"]
    assert after.status == status
    assert after.metadata.uid == before.metadata.uid
    assert after.metadata.labels == {"new": "label"}
    rest = {key: value for key, value in after.metadata.annotations.items() if key != APPLIED_ANNOTATION}
    assert rest == {"ambient.istio.io/redirection": "enabled", "mine": "2"}


def test_another_spec_is_another_pod() -> None:
    machine = Machine()
    machine.place(pod("a"))
    before = machine["a"]
    machine.place(pod("a", PodSpec(containers=[Container(name="c", command=["y"])])))
    after = machine["a"]
    assert after.metadata.uid != before.metadata.uid
    assert after.addresses != before.addresses
    assert after.status.phase == "Pending"


def test_a_pod_that_returns_is_another_with_another_address() -> None:
    machine = Machine(nodes=1)
    machine.place(pod("a"))
    before = machine["a"]
    machine.place()
    machine.place(pod("a"))
    assert machine["a"].metadata.uid != before.metadata.uid
    assert machine["a"].addresses != before.addresses


def test_a_deployments_pods_are_named_labelled_and_owned() -> None:
    machine = Machine()
    machine.place(*deployment(3, tier="x"))
    names = sorted(found.name for found in machine.pods.values())
    stem = names[0].removesuffix("-0")
    assert names == [f"{stem}-0", f"{stem}-1", f"{stem}-2"]
    template_hash = stem.removeprefix("web-")
    assert len(template_hash) == 10
    found = machine[names[0]]
    assert found.metadata.labels == {"app": "web", "tier": "x", "pod-template-hash": template_hash}
    (owner,) = found.metadata.owner_references
    assert (owner.kind, owner.name, owner.uid, owner.controller) == ("Deployment", "web", "D", True)


def test_scaling_takes_the_last_and_leaves_the_others() -> None:
    machine = Machine()
    machine.place(*deployment(3))
    before = dict(machine.pods)
    machine.place(*deployment(2))
    assert machine.pods == {key: found for key, found in before.items() if not key.name.endswith("-2")}
    machine.place(*deployment(5))
    assert all(machine.pods[key] == before[key] for key in before if not key.name.endswith("-2"))
    assert len(machine.pods) == 5


def test_a_template_that_changes_replaces_all_pods() -> None:
    machine = Machine()
    machine.place(*deployment(2))
    before = set(machine.pods)
    machine.place(*deployment(2, version="2"))
    assert len(machine.pods) == 2
    assert not before & set(machine.pods)


def test_replicas_are_spread_over_the_nodes() -> None:
    machine = Machine(nodes=3)
    machine.place(
        *(pod(f"p{number}", msgspec.structs.replace(RUNS, node_name="node-1")) for number in range(4))
    )
    machine.place(
        *(pod(f"p{number}", msgspec.structs.replace(RUNS, node_name="node-1")) for number in range(4)),
        *deployment(6),
    )
    nodes = [found.spec.node_name for found in machine.pods.values() if found.name.startswith("web-")]
    assert sorted(nodes) == ["node-1", "node-1", "node-2", "node-2", "node-3", "node-3"]


def test_a_node_that_is_named_is_used() -> None:
    machine = Machine(nodes=3)
    machine.place(pod("a", msgspec.structs.replace(RUNS, node_name="node-3")))
    assert machine["a"].spec.node_name == "node-3"
    assert machine["a"].addresses == ["10.244.3.2", "fd00:10:244:3::2"]


def test_host_network_means_the_nodes_addresses() -> None:
    machine = Machine()
    machine.place(pod("a", msgspec.structs.replace(RUNS, host_network=True)), pod("b"))
    assert machine["a"].addresses == ["10.99.0.11", "fd00:10:99::11"]
    before = machine["a"]
    machine.place(pod("a", msgspec.structs.replace(RUNS, host_network=True)), pod("b"))
    assert machine["a"] == before


def test_pods_of_a_node_that_is_gone_are_placed_again() -> None:
    machine = Machine(nodes=2)
    machine.place(*deployment(4))
    stayed = {key: found for key, found in machine.pods.items() if found.spec.node_name == "node-1"}
    machine.nodes = 1
    machine.place(*deployment(4))
    assert {found.spec.node_name for found in machine.pods.values()} == {"node-1"}
    assert all(machine.pods[key] == stayed[key] for key in stayed)


@pytest.mark.parametrize(
    ("spec", "phase", "reason", "message"),
    [
        (PodSpec(containers=[Container(name="c", image="nginx")]), "Failed", "NoCommand",
         'container "c" has no command; images are not run here: write the program as command: [...]'),
        (PodSpec(containers=[Container(name="c"), Container(name="d", args=["x"])]), "Failed", "NoCommand",
         'containers "c", "d" have no command; images are not run here: write the program as command: [...]'),
        (msgspec.structs.replace(RUNS, node_name="node-9"), "Pending", "NoNode",
         'node "node-9" does not exist; use one of node-1 to node-2, or leave nodeName out'),
        (msgspec.structs.replace(RUNS, service_account_name="cart"), "Pending", "NoServiceAccount",
         'ServiceAccount "cart" not found in namespace default; add a ServiceAccount object of this name'),
    ],
)  # fmt: skip
def test_what_cannot_run_says_why(spec: PodSpec, phase: str, reason: str, message: str) -> None:
    machine = Machine()
    placed = machine.place(pod("a", spec), pod("b"))
    a = machine["a"]
    assert (a.status.phase, a.status.reason, a.status.message) == (phase, reason, message)
    assert a.addresses == []
    assert said(placed) == [f"Pod default/a: {message}"]
    assert machine["b"].addresses
    uid = a.metadata.uid
    machine.place(pod("a", spec), pod("b"))
    assert machine["a"].metadata.uid == uid
    machine.place(pod("a"), pod("b"))
    assert machine["a"].addresses
    assert machine["a"].status.message == ""


def test_a_deployment_that_cannot_run_is_told_once() -> None:
    placed = Machine().place(*deployment(5, PodSpec(containers=[Container(name="c")])))
    assert len(placed.pods) == 5
    assert len(placed.findings) == 1
    assert placed.findings[0].key.kind == "Deployment"


def test_a_service_account_that_goes_leaves_running_pods_and_stops_new_ones() -> None:
    machine = Machine()
    machine.place(*deployment(1))
    (running,) = machine.pods.values()
    placed = machine.place(*deployment(2), accounts=frozenset())
    assert machine.pods[running.key] == running
    assert sorted(found.status.reason for found in placed.pods) == ["", "NoServiceAccount"]
    machine.place(*deployment(2))
    assert all(found.addresses for found in machine.pods.values())


def test_a_full_node_leaves_pods_waiting() -> None:
    machine = Machine(nodes=1)
    placed = machine.place(*deployment(255))
    assert sum(bool(found.addresses) for found in placed.pods) == 253
    waiting = [found for found in placed.pods if not found.addresses]
    assert {found.status.reason for found in waiting} == {"Unschedulable"}
    assert len(placed.findings) == 2
    assert (
        "all 253 addresses of 10.244.1.0/24 are in use; remove pods, or start with more --nodes"
        in said(placed)[0]
    )
    machine.place(*deployment(253))
    assert machine.place(*deployment(253)).findings == []


def test_a_full_node_is_passed_over() -> None:
    machine = Machine(nodes=2)
    pinned = [pod(f"p{number}", msgspec.structs.replace(RUNS, node_name="node-1")) for number in range(253)]
    assert machine.place(*pinned, *deployment(4)).findings == []


def test_what_is_not_as_one_might_think_is_told() -> None:
    env = [
        EnvVar(name="IP", value_from=EnvVarSource(field_ref=ObjectFieldSelector(field_path="status.podIP"))),
        EnvVar(name="KEY", value_from=EnvVarSource(secret_key_ref={"name": "s", "key": "k"})),
    ]
    spec = PodSpec(
        containers=[Container(name="c", command=["x"], env=env)], init_containers=[Container(name="i")]
    )
    placed = Machine().place(pod("a", spec, annotations={"ambient.istio.io/redirection": "enabled"}))
    assert [finding.message for finding in placed.findings] == [
        "initContainers are not run by this version",
        "container c: env KEY: valueFrom is not read by this version",
        "annotation ambient.istio.io/redirection is left out: only the node agent writes it",
    ]
    assert {finding.severity for finding in placed.findings} == {"warning"}
    assert "ambient.istio.io/redirection" not in placed.pods[0].metadata.annotations
    assert placed.pods[0].addresses


def test_a_damaged_state_gives_nobody_an_address_twice() -> None:
    machine = Machine()
    machine.place(pod("a"), pod("b"))
    wrong = msgspec.structs.replace(machine["b"], spec=machine["a"].spec, status=machine["a"].status)
    machine.change("b", wrong)
    machine.change("c", msgspec.structs.replace(machine["a"], status=PodStatus(phase="Running")))
    placed = machine.place(pod("a"), pod("b"), pod("c"))
    addresses = [address for found in placed.pods for address in found.addresses]
    assert len(addresses) == len(set(addresses)) == 6


steps = st.lists(
    st.tuples(
        st.sets(st.sampled_from("abcdef")),
        st.integers(0, 6),
        st.sampled_from(["1", "2"]),
        st.integers(1, 3),
    ),
    max_size=8,
)


@given(steps)
def test_through_any_history_pods_stay_themselves(history: list[tuple[set[str], int, str, int]]) -> None:
    machine = Machine()
    for names, replicas, version, nodes in history:
        machine.nodes = nodes
        before = dict(machine.pods)
        wanted = [*map(pod, sorted(names)), *deployment(replicas, version=version)]
        placed = machine.place(*wanted)
        assert {found.key for found in placed.pods} == {want.key for want in wanted}
        assert placed.findings == []
        _check_addresses(placed.pods)
        for key in before.keys() & machine.pods.keys():
            if before[key].spec.node_name in {f"node-{number}" for number in range(1, nodes + 1)}:
                assert machine.pods[key] == before[key]
            else:
                assert machine.pods[key].metadata.uid != before[key].metadata.uid
        assert machine.place(*wanted).pods == placed.pods


def _check_addresses(pods: Iterable[Pod]) -> None:
    seen = set[str]()
    for found in pods:
        number = found.spec.node_name.removeprefix("node-")
        four, six = found.addresses
        assert four.startswith(f"10.244.{number}.")
        assert six.startswith(f"fd00:10:244:{number}::")
        assert not seen & {four, six}
        seen |= {four, six}


def test_readiness_is_the_runners_to_say() -> None:
    machine = Machine()
    machine.place(pod("a"))
    status = PodStatus(
        phase="Running",
        conditions=[PodCondition(type="Ready", status="True")],
        pod_ips=machine["a"].status.pod_ips,
    )
    machine.change("a", msgspec.structs.replace(machine["a"], status=status))
    assert machine.place(pod("a")).pods[0].ready


def test_a_pod_that_is_being_deleted_keeps_its_addresses_and_its_name_is_another_pods() -> None:
    machine = Machine(1)
    machine.place(pod("a"))
    old = machine["a"]
    going = msgspec.structs.replace(
        old, metadata=msgspec.structs.replace(old.metadata, deletion_timestamp="2026-01-31T12:00:00Z")
    )
    machine.change("a", going)
    machine.last = {}  # as if the range had been gone through once
    machine.place(pod("a"), pod("b"))
    assert machine["a"].metadata.uid != old.metadata.uid
    assert not machine["a"].metadata.deletion_timestamp
    assert not set(old.addresses) & {*machine["a"].addresses, *machine["b"].addresses}
