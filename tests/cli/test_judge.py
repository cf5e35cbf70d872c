"""The checks' judgement: facts in, outcomes out. What no real mesh shows within a test's time is tried here."""

from collections.abc import Callable
from typing import Any

import pytest

from ztunnel.cli.checks.facts import Facts, NodeFacts, PodFacts
from ztunnel.cli.checks.judge import CHECKS, PRE_CHECKS, judge
from ztunnel.cli.checks.outcome import MOST_DETAILS, PODS, Check, Outcome, Result, lasting
from ztunnel.store.problems import Problem

NOW = 1_800_000_000.0
DAY = 86400.0
IDENTITY = "spiffe://cluster.local/ns/default/sa/web"
ADDRESS_TYPE = "type.googleapis.com/istio.workload.Address"


def certificate() -> dict[str, Any]:
    return {
        "identity": IDENTITY, "state": "valid", "not_before": NOW - DAY / 4, "not_after": NOW + DAY * 3 / 4,
        "next_fetch": NOW + DAY / 4, "last_error": "",
    }  # fmt: skip


def node() -> NodeFacts:
    dump = {
        "version": "1", "pid": 20, "time": NOW + 1, "ready": "ready",
        "xds": {"address": "https://127.0.0.1:15012", "connected": True, "synced": True, "error": ""},
        "agent": {"connected": True}, "pods": [{"uid": "u1"}], "certificates": [certificate()],
        "workers": [{"worker": 0, "pid": 21, "restarts": 0}],
    }  # fmt: skip
    return NodeFacts("node-1", dump, "", 20, "S")


def client() -> dict[str, Any]:
    found = {"status": "SYNCED", "sent": "5", "acknowledged": "5", "pending": 0, "unacknowledged": 0,
             "rejected": None, "sent_at": NOW - 100, "answered_at": NOW - 100}  # fmt: skip
    return {"node": "node-1", "since": NOW - 100, "types": {ADDRESS_TYPE: found}}


@pytest.fixture
def facts() -> Facts:
    """Of a mesh in which all is well."""
    process = {"pid": 10, "ready": True, "restarts": 0}
    return Facts(
        now=NOW, ended=NOW + 2, version="1", python=(3, 11, 7), open_files=65536,
        machine={"namespaces": "", "rules": "", "links": ""},
        status={
            "controlplane": process | {"port": 15012},
            "nodes": [{"name": "node-1", "agent": process | {"pid": 30}, "ztunnel": process | {"pid": 20}}],
        },
        control={"version": "1", "time": NOW + 1, "clients": [client()], "authority": {"not_after": NOW + 365 * DAY}},
        control_state="S",
        nodes=[node()],
        pods=[PodFacts("u1", "default/web", "node-1", True, True, "", "Running", True, "")],
        kernel={"pods": {"u1": {"differences": [], "silent": []}}, "tls": {"not_after": NOW + 90 * DAY}},
    )  # fmt: skip


def outcomes(facts: Facts, pre: bool = False) -> dict[str, Outcome]:
    """What is not OK."""
    return {
        check.name: outcome for check, outcome in judge(facts, pre=pre) if outcome.result is not Result.OK
    }


def test_all_is_well(facts: Facts) -> None:
    assert outcomes(facts) == {}
    assert outcomes(facts, pre=True) == {}
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert {check.name for check in PRE_CHECKS if not check.pre} == set()


def dump(facts: Facts) -> dict[str, Any]:
    found = facts.nodes[0].dump
    assert found is not None
    return found


def control(facts: Facts) -> dict[str, Any]:
    assert facts.control is not None
    return facts.control


def synced(facts: Facts) -> dict[str, Any]:
    found: dict[str, Any] = control(facts)["clients"][0]["types"][ADDRESS_TYPE]
    return found


Break = Callable[[Facts], object]
F, W = Result.FAILED, Result.WARNING


@pytest.mark.parametrize(
    ("broken", "name", "result", "detail", "remedy"),
    [
        (
            lambda f: f.machine.update(rules="no nf_tables"),
            "the kernel takes the redirection's rules (nftables) and routes",
            F,
            "no nf_tables",
            "modprobe",
        ),
        (lambda f: setattr(f, "python", (3, 9, 1)), "Python is 3.11 or newer", F, "3.9.1", "install"),
        (lambda f: setattr(f, "open_files", 1024), "enough open files are allowed", W, "1024", "ulimit"),
        (
            lambda f: setattr(f, "control_state", "T"),
            "the control plane runs and is ready",
            F,
            "pid 10",
            "kill -CONT 10",
        ),
        (
            lambda f: f.status["controlplane"].update(pid=0, ready=False, restarts=7),
            "the control plane runs and is ready",
            F,
            "restarted 7 times",
            "ambient logs mesh/controlplane",
        ),
        (
            lambda f: f.kernel.update(tls={"error": "certificate verify failed"}),
            "the control plane's certificate is one that the nodes trust",
            F,
            "verify failed",
            "root-cert.pem",
        ),
        (
            lambda f: f.kernel.update(tls={"not_after": NOW + 3600}),
            "the control plane's certificate is one that the nodes trust",
            F,
            "ends in",
            "restart",
        ),
        (
            lambda f: control(f)["authority"].update(not_after=NOW + DAY),
            "the certificate authority lasts",
            F,
            "24h",
            "ca/",
        ),
        (
            lambda f: control(f)["authority"].update(not_after=NOW - DAY),
            "the certificate authority lasts",
            F,
            "ago",
            "ca/",
        ),
        (
            lambda f: control(f)["authority"].update(not_after=NOW + 20 * DAY),
            "the certificate authority lasts",
            W,
            "20d",
            "ca/",
        ),
        (
            lambda f: f.status["nodes"][0]["agent"].update(ready=False),
            "node agents run and are ready",
            F,
            "node-1",
            "agent-NODE",
        ),
        (
            lambda f: dump(f).update(ready="draining"),
            "node proxies are ready",
            F,
            "node-1: draining",
            "--wait",
        ),
        (
            lambda f: dump(f)["workers"][0].update(pid=0),
            "all workers of the proxies run",
            F,
            "worker 0",
            "ambient logs",
        ),
        (
            lambda f: dump(f)["workers"][0].update(restarts=3),
            "all workers of the proxies run",
            W,
            "3 times",
            "connections",
        ),
        (
            lambda f: dump(f)["xds"].update(connected=False, error="refused"),
            "node proxies are in step with the control plane",
            F,
            "refused",
            "ambient proxy-status",
        ),
        (
            lambda f: dump(f)["xds"].update(synced=False),
            "node proxies are in step with the control plane",
            F,
            "first state",
            "ambient proxy-status",
        ),
        (
            lambda f: synced(f).update(rejected={"names": ["a"], "error": "no such field"}),
            "node proxies are in step with the control plane",
            F,
            "no such field",
            "ambient proxy-status",
        ),
        (
            lambda f: synced(f).update(unacknowledged=1, sent="6"),
            "node proxies are in step with the control plane",
            F,
            "version 6",
            "ambient proxy-status",
        ),
        (
            lambda f: dump(f).update(version="0"),
            "all parts are of one version",
            W,
            "node-1 is version 0",
            "ambient up",
        ),
        (
            lambda f: setattr(f.pods[0], "ready", False),
            "pods run and are ready",
            W,
            "default/web",
            "ambient get pods",
        ),
        (
            lambda f: setattr(f.pods[0], "error", "no such netns"),
            "the pods that shall be in the mesh are in it",
            F,
            "default/web: no such netns",
            "agent",
        ),
        (
            lambda f: setattr(f.pods[0], "joined", False),
            "the pods that shall be in the mesh are in it",
            F,
            "is not",
            "agent",
        ),
        (
            lambda f: setattr(f.pods[0], "wanted", False),
            "the pods that shall be in the mesh are in it",
            F,
            "shall not",
            "agent",
        ),
        (
            lambda f: dump(f).update(pods=[]),
            "each pod of the mesh is known to its node's proxy",
            F,
            "default/web",
            "agent",
        ),
        (
            lambda f: f.kernel["pods"]["u1"].update(differences=["table inet ambient is missing"]),
            "each pod of the mesh is redirected by the kernel",
            F,
            "default/web: table inet ambient is missing",
            "kill 30",
        ),
        (
            lambda f: f.kernel["pods"]["u1"].update(error="EPERM"),
            "each pod of the mesh is redirected by the kernel",
            F,
            "EPERM",
            "kill 30",
        ),
        (
            lambda f: f.kernel["pods"]["u1"].update(silent=[15008]),
            "the proxy listens in each pod of the mesh",
            F,
            "port 15008",
            "ztunnel",
        ),
        (
            lambda f: dump(f)["certificates"][0].update(not_after=None, last_error="CA away"),
            "each identity has a valid certificate",
            F,
            f"{IDENTITY}: none yet: CA away",
            "ambient proxy-status",
        ),
        (
            lambda f: dump(f)["certificates"][0].update(not_after=NOW - 1),
            "each identity has a valid certificate",
            F,
            "expired at 2027-01-15",
            "ambient proxy-status",
        ),
        (
            lambda f: dump(f)["certificates"][0].update(not_before=NOW + 60),
            "each identity has a valid certificate",
            F,
            "clock",
            "ambient",
        ),
        (
            lambda f: dump(f)["certificates"][0].update(last_error="CA away"),
            "certificates are renewed in time",
            W,
            "ends in 18h: CA away",
            "controlplane",
        ),
        (
            lambda f: dump(f)["certificates"][0].update(next_fetch=NOW - 600),
            "certificates are renewed in time",
            W,
            "overdue",
            "controlplane",
        ),
        (
            lambda f: dump(f)["certificates"][0].update(next_fetch=NOW - 600, not_after=NOW + DAY / 20),
            "certificates are renewed in time",
            F,
            "overdue",
            "controlplane",
        ),
        (
            lambda f: f.problems.append(Problem("Service a/b", "f", "wrong", "right")),
            "no object is refused",
            F,
            "Service a/b",
            "analyze",
        ),
        (
            lambda f: f.problems.append(Problem("Job a/b", "f", "not run", "", "warning")),
            "every object is acted on",
            W,
            "Job",
            "analyze",
        ),
        (lambda f: control(f).update(time=NOW - 60), "clocks agree", F, "the control plane", "NTP"),
        (lambda f: dump(f).update(time=NOW + 60), "clocks agree", F, "node-1", "NTP"),
    ],
)
def test_what_is_wrong(
    facts: Facts, broken: Break, name: str, result: Result, detail: str, remedy: str
) -> None:
    broken(facts)
    found = outcomes(facts)
    assert set(found) == {name}
    (one,) = found.values()
    assert one.result is result
    assert any(detail in line for line in one.details), one
    assert remedy in one.remedy


def test_what_the_control_plane_finds_counts_too(facts: Facts) -> None:
    problem = Problem("Service a/b", "", "its address is taken", "give it another", "warning")
    control(facts)["problems"] = [{"object": "Service a/b", "file": "", "message": "its address is taken",
                                   "remedy": "give it another", "severity": "warning"}]  # fmt: skip
    facts.problems.append(problem)
    control(facts)["authority"]["problems"] = ["ca-cert.pem: expired"]
    found = outcomes(facts)
    assert found["every object is acted on"].details == [str(problem)]
    assert found["the certificate authority lasts"].details == ["ca-cert.pem: expired"]


def test_a_response_that_is_under_way_is_no_failure(facts: Facts) -> None:
    synced(facts).update(unacknowledged=1, sent_at=NOW - 1)
    assert outcomes(facts) == {}


def test_without_a_mesh_one_check_fails_and_the_others_are_skipped(facts: Facts) -> None:
    bare = Facts(
        now=NOW, ended=NOW, python=facts.python, open_files=-1, machine=facts.machine, mesh_error="no mesh"
    )
    found = outcomes(bare)
    assert [name for name, one in found.items() if one.result is F] == ["the mesh runs"]
    assert all(one.result in (F, Result.SKIPPED) for one in found.values())
    assert len(found) > 15


def test_a_node_that_is_stopped_is_told_how_to_go_on(facts: Facts) -> None:
    facts.nodes.append(NodeFacts("node-2", None, "node-2: ztunnel-node-2 does not answer", 40, "T"))
    found = outcomes(facts)
    assert set(found) == {"node proxies answer"}
    assert "stopped by a signal" in found["node proxies answer"].details[0]
    assert "kill -CONT 40" in found["node proxies answer"].remedy


def test_of_many_only_some_are_named(facts: Facts) -> None:
    facts.pods = [
        PodFacts(f"u{n}", f"a/p{n}", "node-9", True, False, "", "Running", True, "") for n in range(50)
    ]
    (one,) = outcomes(facts).values()
    assert len(one.details) == MOST_DETAILS + 1
    assert one.details[-1] == "and 40 more"


def test_nothing_is_tried_without_a_namespace(facts: Facts) -> None:
    facts.machine = {"namespaces": "EPERM"}
    found = outcomes(facts, pre=True)
    assert [one.result for one in found.values()] == [F, Result.SKIPPED, Result.SKIPPED]


def test_a_pod_that_is_new_may_take_its_time_until_something_is_wrong_with_it(facts: Facts) -> None:
    pod = facts.pods[0]
    pod.phase, pod.state, pod.ready, pod.joined, pod.starting = (
        "Pending",
        "ContainerCreating",
        False,
        False,
        True,
    )
    assert outcomes(facts) == {}
    pod.phase, pod.state = "Running", "Running"  # its programs run: it must be in the mesh, if not ready yet
    assert list(outcomes(facts)) == ["the pods that shall be in the mesh are in it"]
    pod.phase, pod.state, pod.starting = "Pending", "ImagePullBackOff", False
    found = outcomes(facts)["pods run and are ready"]
    assert found.details == ["default/web: ImagePullBackOff, not ready"]
    pod.starting, pod.error = True, "refused by the kernel"
    assert outcomes(facts)["the pods that shall be in the mesh are in it"].details == [
        "default/web: refused by the kernel"
    ]


MOVING = next(check for check in CHECKS if check.category == PODS)


def one(result: Result, *details: str) -> list[tuple[Check, Outcome]]:
    return [(MOVING, Outcome(result, list(details)))]


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (one(Result.FAILED, "a: x"), one(Result.OK), Outcome()),
        (one(Result.OK), one(Result.WARNING, "a: x"), Outcome()),
        (one(Result.FAILED, "a: x", "b: y"), one(Result.FAILED, "b: y", "c: z"), Outcome(Result.FAILED, ["b: y"])),
        (one(Result.FAILED, "ended 5s ago"), one(Result.FAILED, "ended 6s ago", "b"),
         Outcome(Result.FAILED, ["ended 6s ago"])),
        (one(Result.FAILED, "a: refused"), one(Result.FAILED, "a: in vain"), Outcome(Result.FAILED, ["a: in vain"])),
        (one(Result.WARNING, "a: late"), one(Result.FAILED, "a: late"), Outcome(Result.FAILED, ["a: late"])),
        (one(Result.SKIPPED, "no"), one(Result.FAILED, "a: x"), Outcome(Result.FAILED, ["a: x"])),
        (one(Result.FAILED, "a: x"), one(Result.SKIPPED, "no"), Outcome(Result.FAILED, ["a: x"])),
        (one(Result.SKIPPED, "no"), one(Result.OK), Outcome()),
        (one(Result.SKIPPED, "no"), one(Result.SKIPPED, "no"), Outcome(Result.SKIPPED, ["no"])),
    ],
)  # fmt: skip
def test_only_what_two_looks_find_is_told(
    before: list[tuple[Check, Outcome]], now: list[tuple[Check, Outcome]], told: Outcome
) -> None:
    assert lasting(before, now) == [(MOVING, told)]


def test_what_does_not_come_and_go_is_told_as_it_was_last() -> None:
    process = next(check for check in CHECKS if not check.moves)
    before, now = [(process, Outcome())], [(process, Outcome(Result.FAILED, ["it ends again and again"]))]
    assert lasting(before, now) == now
