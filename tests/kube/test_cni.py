"""The node agent and its CNI plugin on real nodes: other programs' files, who waits for whom, what is repaired."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cni import conflist
from tests.kube import cgroups
from tests.kube.lab import Lab
from tests.kube.sample import JOINED, LIMIT, PORT, WORDS, Sample, ambient, install, sample
from ztunnel.embedded.testing import until

pytestmark = [pytest.mark.kube, pytest.mark.timeout(600)]
SYSTEM = "istio-system"
SPACE = "cni-test"
CONFIG = "/etc/cni/net.d/10-lab.conflist"
PLUGIN = "/opt/cni/bin/ambient-cni"
AGENT = "daemonset/istio-cni-node"

POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  hostNetwork: {host}
  containers:
  - {{name: c, image: "lab.local/tools:test", imagePullPolicy: Never, command: [sleep, infinity]}}
"""


@pytest.fixture(scope="module")
def before(cluster: Lab) -> dict[int, str]:
    """The network configuration of each node as it is without the mesh."""
    return {number: cluster.node(number).run(["cat", CONFIG]) for number in cluster.nodes}


@pytest.fixture(scope="module")
def mesh(cluster: Lab, before: dict[int, str]) -> Iterator[Lab]:
    """The mesh, whose agents look at every pod every two seconds."""
    install(cluster)
    cluster.kubectl("set", "env", AGENT, "-n", SYSTEM, "RECONCILE_INTERVAL=2")
    cluster.wait_rollout("daemonset", "istio-cni-node", SYSTEM)
    yield cluster
    ambient(cluster, "uninstall", "--purge", "-y", code=None)


@pytest.fixture(scope="module")
def app(mesh: Lab) -> Iterator[Sample]:
    """The sample application in a namespace of the mesh."""
    with mesh.namespace(SPACE), sample(mesh, SPACE) as made:
        made.label()
        yield made


def make(lab: Lab, name: str, *, node: str = "node1", namespace: str = SPACE, host: bool = False) -> None:
    lab.kubectl(
        "apply", "-n", namespace, "-f", "-",
        stdin=POD.format(name=name, node=node, host=str(host).lower()),
    )  # fmt: skip


def delete(lab: Lab, *names: str, namespace: str = SPACE) -> None:
    lab.kubectl("delete", "pod", "-n", namespace, "--ignore-not-found", *names, timeout=120)


def pod(lab: Lab, name: str, namespace: str = SPACE) -> dict[str, Any]:
    return dict(json.loads(lab.kubectl("get", "pod", name, "-n", namespace, "-o", "json")))


def running(lab: Lab, name: str, namespace: str = SPACE) -> bool:
    return bool(pod(lab, name, namespace)["status"].get("phase") == "Running")


def in_mesh(lab: Lab, name: str) -> bool:
    return bool(pod(lab, name)["metadata"].get("annotations", {}).get(JOINED) == "enabled")


def events(lab: Lab, name: str, namespace: str = SPACE) -> dict[str, str]:
    """The messages of an object's Events by their reasons."""
    found = json.loads(lab.kubectl("get", "events", "-n", namespace, "-o", "json"))["items"]
    return {one["reason"]: one.get("message", "") for one in found if one["involvedObject"]["name"] == name}


def page(lab: Lab, number: int, port: int, path: str) -> tuple[int, str]:
    """What the agent of a node answers there: the status (0: nothing) and the body."""
    done = lab.node(number).run(
        ["sh", "-c", f"curl -s -m 5 -w '\\n%{{http_code}}' http://127.0.0.1:{port}{path} || true"]
    )
    body, _, status = done.rpartition("\n")
    return int(status or 0), body


def pods(lab: Lab, number: int) -> dict[str, dict[str, Any]]:
    """How the agent of a node says that each pod is."""
    status, body = page(lab, number, 9876, "/pods")
    assert status == 200, body
    return {f"{one['namespace']}/{one['name']}": one for one in json.loads(body)["pods"]}


def metric(lab: Lab, number: int, name: str) -> float:
    _, body = page(lab, number, 15014, "/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in body.splitlines() if line.startswith(name))


def connected(lab: Lab, number: int) -> bool:
    """Whether a ztunnel has come to the agent of a node."""
    return metric(lab, number, "ztunnel_connected") == 1


def put(lab: Lab, number: int, text: str) -> None:
    """Write the network configuration as another program would: in place, not at once."""
    lab.node(number).run(["sh", "-c", f"cat > {CONFIG}"], stdin=text)


def test_the_plugin_follows_the_networks_own_and_their_file_is_as_it_was(
    mesh: Lab, before: dict[int, str]
) -> None:
    for number, text in before.items():
        now = mesh.node(number).run(["cat", CONFIG])
        assert json.loads(now)["plugins"][-1]["type"] == conflist.PLUGIN
        assert conflist.removed(now) == text
        assert mesh.node(number).run(["stat", "-c", "%a", PLUGIN]).strip() == "755"
        assert page(mesh, number, 8000, "/readyz") == (200, "ok\n")
        assert metric(mesh, number, "istio_cni_install_ready") == 1


def test_a_pod_is_in_before_it_starts_and_a_label_takes_it_out_and_in(mesh: Lab, app: Sample) -> None:
    make(mesh, "live")
    until(lambda: running(mesh, "live"), "the pod runs", LIMIT)
    # What it says of itself may come a moment later, the rules do not.
    assert "redir" in rules_of(mesh, 1, "live")
    until(lambda: in_mesh(mesh, "live"), "the pod is marked", LIMIT)
    mesh.kubectl("label", "pod", "live", "-n", SPACE, "istio.io/dataplane-mode=none")
    until(lambda: not in_mesh(mesh, "live"), "the pod is marked no longer", LIMIT)
    until(lambda: rules_of(mesh, 1, "live") == "", "its rules are gone", LIMIT)
    mesh.kubectl("label", "pod", "live", "-n", SPACE, "istio.io/dataplane-mode-")
    until(lambda: in_mesh(mesh, "live") and rules_of(mesh, 1, "live") != "", "it is in again", LIMIT)
    delete(mesh, "live")


def rules_of(lab: Lab, number: int, name: str) -> str:
    """Our table in a pod's network namespace, "" where there is none."""
    pid = lab.pod_pid(SPACE, name)
    done = subprocess.run(
        ["nsenter", "-t", str(pid), "-n", "nft", "list", "tables"], capture_output=True, text=True, check=True
    )
    if "table inet ambient" not in done.stdout:
        return ""
    listed = ["nsenter", "-t", str(pid), "-n", "nft", "list", "table", "inet", "ambient"]
    with suppress(subprocess.CalledProcessError):  # it goes in this very moment
        return subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    return ""


def test_a_pod_on_the_nodes_network_is_told_why_it_stays_outside(mesh: Lab, app: Sample) -> None:
    make(mesh, "hosted", host=True)
    until(lambda: "RedirectionNotSupported" in events(mesh, "hosted"), "an Event says so", LIMIT)
    assert "hostNetwork" in events(mesh, "hosted")["RedirectionNotSupported"]
    until(lambda: running(mesh, "hosted"), "it runs all the same", LIMIT)
    assert not in_mesh(mesh, "hosted")
    assert metric(mesh, 1, "istio_cni_pods_not_supported") == 1
    assert not pods(mesh, 1)[f"{SPACE}/hosted"]["joined"]
    delete(mesh, "hosted")


def test_without_the_agent_pods_wait_and_those_of_the_system_start(mesh: Lab, app: Sample) -> None:
    lives = app.lives()
    nowhere = '{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":"%s"}}}}}'
    mesh.kubectl("patch", AGENT, "-n", SYSTEM, "--type=merge", "-p", nowhere % "true")
    try:
        until(lambda: page(mesh, 1, 8000, "/readyz")[0] == 0, "the agent has ended", LIMIT)
        make(mesh, "waiting")
        make(mesh, "exempt", namespace="kube-system")
        until(lambda: running(mesh, "exempt", "kube-system"), "an exempt pod starts", LIMIT)
        until(lambda: "FailedCreatePodSandBox" in events(mesh, "waiting"), "an Event says what for", LIMIT)
        assert "waits for the mesh" in events(mesh, "waiting")["FailedCreatePodSandBox"]
        assert pod(mesh, "waiting")["status"]["phase"] == "Pending"
        assert WORDS.decode() in app.ask(), "who is in the mesh stays in it"
        # Its own pods must not wait, whatever they ask for.
        mesh.kubectl("delete", "pod", "-n", SYSTEM, "-l", "app=istiod", timeout=120)
        mesh.wait_rollout("deployment", "istiod", SYSTEM)
    finally:
        mesh.kubectl("patch", AGENT, "-n", SYSTEM, "--type=merge", "-p", nowhere.replace('"%s"', "null"))
    until(lambda: in_mesh(mesh, "waiting") and running(mesh, "waiting"), "it starts, in the mesh", LIMIT)
    assert lives <= app.lives()
    delete(mesh, "waiting")
    delete(mesh, "exempt", namespace="kube-system")


def test_a_restart_of_the_agent_is_not_noticed(mesh: Lab, app: Sample) -> None:
    lives = app.lives()

    def restart() -> None:
        mesh.kubectl("rollout", "restart", AGENT, "-n", SYSTEM)
        mesh.wait_rollout("daemonset", "istio-cni-node", SYSTEM)

    run = app.load(restart, kept=True)
    assert run.failures == 0, run.words
    assert lives <= app.lives()
    for number in mesh.nodes:
        until(partial(connected, mesh, number), "ztunnel is back", LIMIT)
        assert metric(mesh, number, "istio_cni_pods_outside_mesh") == 0
        # Nothing was lost, so there is nothing to repair.
        assert metric(mesh, number, "istio_cni_repairs_total") == 0
    assert all(one["joined"] for one in pods(mesh, 2).values() if one["wanted"])


def test_a_file_that_another_program_rewrites_is_repaired(mesh: Lab, before: dict[int, str]) -> None:
    put(mesh, 1, before[1])
    until(lambda: conflist.PLUGIN in mesh.node(1).run(["cat", CONFIG]), "the entry is there again", LIMIT)
    assert metric(mesh, 1, 'istio_cni_repairs_total{what="conflist"}') >= 1
    mesh.node(1).run(["rm", PLUGIN])
    until(
        lambda: "0755" in mesh.node(1).run(["sh", "-c", f"stat -c 0%a {PLUGIN} || true"]),
        "and the plugin",
        LIMIT,
    )


def test_a_file_that_is_not_json_is_told_and_heals(mesh: Lab, before: dict[int, str]) -> None:
    try:
        put(mesh, 2, before[2][:-20])
        until(lambda: page(mesh, 2, 8000, "/readyz")[0] == 503, "the agent is not ready", LIMIT)
        assert f"{CONFIG}: it is not JSON" in page(mesh, 2, 8000, "/readyz")[1]
        assert metric(mesh, 2, "istio_cni_install_ready") == 0

        def told() -> str:
            return events(mesh, "node2", "default").get("CNIInstallFailed", "")

        until(lambda: "it is not JSON" in told(), "an Event on the node says so", LIMIT)
    finally:
        put(mesh, 2, before[2])
    until(lambda: page(mesh, 2, 8000, "/readyz")[0] == 200, "the agent is ready again", LIMIT)
    assert json.loads(mesh.node(2).run(["cat", CONFIG]))["plugins"][-1]["type"] == conflist.PLUGIN


def test_rules_that_somebody_takes_out_come_back_and_are_told_of(mesh: Lab, app: Sample) -> None:
    make(mesh, "robbed")
    until(lambda: in_mesh(mesh, "robbed"), "it is in the mesh", LIMIT)
    target = str(mesh.pod_pid(SPACE, "robbed"))
    subprocess.run(["nsenter", "-t", target, "-n", "nft", "delete", "table", "inet", "ambient"], check=True)
    until(lambda: "redir" in rules_of(mesh, 1, "robbed"), "its rules are back", LIMIT)
    until(lambda: "RedirectionRepaired" in events(mesh, "robbed"), "an Event says so", LIMIT)
    assert metric(mesh, 1, 'istio_cni_repairs_total{what="rules"}') >= 1
    # Those of the node, too.
    mesh.node(1).run(["nft", "delete", "table", "inet", "ambient_host"])
    until(
        lambda: "ambient_host" in mesh.node(1).run(["nft", "list", "tables"]),
        "the node's rules are back",
        LIMIT,
    )
    delete(mesh, "robbed")


def test_pods_that_are_deleted_while_they_join_leave_nothing(mesh: Lab, app: Sample) -> None:
    names = [f"brief-{number}" for number in range(6)]
    for name in names:
        make(mesh, name)
        mesh.kubectl("delete", "pod", name, "-n", SPACE, "--wait=false", "--grace-period=1")
    until(lambda: not any(f"{SPACE}/{name}" in pods(mesh, 1) for name in names), "they are forgotten", LIMIT)
    until(lambda: metric(mesh, 1, "istio_cni_pods_outside_mesh") == 0, "nobody is missed", LIMIT)
    held = mesh.node(1).run(["nft", "list", "set", "inet", "ambient_host", "probed_ipv4"])
    addresses = {each for one in pods(mesh, 1).values() if one["joined"] for each in one["addresses"]}
    listed = held.partition("elements = {")[2].partition("}")[0]
    assert {each.strip() for each in listed.split(",") if each.strip()} == addresses


def own_pod(lab: Lab, number: int, selector: str) -> dict[str, Any]:
    """The mesh's own pod on a node."""
    listed = json.loads(lab.kubectl("get", "pods", "-n", SYSTEM, "-l", selector, "-o", "json"))["items"]
    here = [one for one in listed if one["spec"]["nodeName"] == f"node{number}"]
    (found,) = [one for one in here if "deletionTimestamp" not in one["metadata"]]
    return dict(found)


def processes(lab: Lab, number: int, selector: str) -> list[int]:
    """Those of the mesh's own pod on a node, as the machine counts."""
    uid = own_pod(lab, number, selector)["metadata"]["uid"]
    return list(cgroups.processes(lab.node(number).cgroup, uid))


def redirected(lab: Lab, number: int) -> set[str]:
    """The network namespaces of a node that have our rules, by the names of their files."""
    script = """cd /var/run/netns; for each in *; do
        nsenter --net=$each nft list tables 2>/dev/null | grep -qx "table inet ambient" && echo $each; done; true"""
    return set(lab.node(number).run(["sh", "-c", script]).split())


def test_an_agent_killed_between_rules_and_ztunnel_lets_nobody_out(mesh: Lab, app: Sample) -> None:
    """A ztunnel that does not answer keeps the agent between both; the pod waits until it does again."""

    def agents() -> int:
        """How many there have been."""
        return int(
            own_pod(mesh, 1, "k8s-app=istio-cni-node")["status"]["containerStatuses"][0]["restartCount"]
        )

    before, agent = redirected(mesh, 1), agents()
    stopped = processes(mesh, 1, "app=ztunnel")
    for each in stopped:
        os.kill(each, signal.SIGSTOP)
    try:
        make(mesh, "between")
        until(lambda: redirected(mesh, 1) - before, "its rules are there", LIMIT)
        for each in processes(mesh, 1, "k8s-app=istio-cni-node"):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        until(lambda: agents() > agent, "the agent is gone, and another one started", LIMIT)
        until(lambda: page(mesh, 1, 8000, "/readyz")[0] == 200, "it is ready", LIMIT)
        until(lambda: "FailedCreatePodSandBox" in events(mesh, "between"), "the pod is told to wait", LIMIT)
        assert not pod(mesh, "between")["status"].get("containerStatuses", [{}])[0].get("started")
    finally:
        for each in stopped:
            with suppress(ProcessLookupError):  # its kubelet has started it again
                os.kill(each, signal.SIGCONT)
    until(lambda: running(mesh, "between") and in_mesh(mesh, "between"), "it starts, in the mesh", 2 * LIMIT)
    assert "redir" in rules_of(mesh, 1, "between")
    assert WORDS.decode() in app.run(
        "curl", "-sS", "-m", "20", f"http://{app.address('reviews')}:{PORT}/", app="between"
    )
    until(lambda: metric(mesh, 1, "istio_cni_pods_outside_mesh") == 0, "nobody is outside", LIMIT)
    # Of the sandboxes that were given up nothing is left.
    # Those of earlier tests may go meanwhile; kubelet clears away once a minute.
    until(lambda: len(redirected(mesh, 1) - before) == 1, "one namespace more has rules", 3 * LIMIT)
    assert WORDS.decode() in app.ask(), "who was in the mesh is"
    delete(mesh, "between")


def test_a_pod_whose_sandbox_died_keeps_the_new_one_when_the_old_one_is_cleared_away(
    mesh: Lab, app: Sample
) -> None:
    """The kubelet's garbage collection stops dead sandboxes again: the plugin hears the pod's uid, and no namespace."""

    def sandboxes() -> set[str]:
        """What the runtime has networks for, by its own names: libcni keeps a file of each."""
        listed = mesh.node(1).run(["ls", "/var/lib/cni/results"]).split()
        return {each.split("-")[1] for each in listed if each.startswith("lab-")}

    before = sandboxes()
    make(mesh, "reborn")
    until(lambda: running(mesh, "reborn") and in_mesh(mesh, "reborn"), "it runs, in the mesh", LIMIT)
    (first,) = sandboxes() - before
    uid = pod(mesh, "reborn")["metadata"]["uid"]
    (pause,) = [
        each for each in cgroups.processes(mesh.node(1).cgroup, uid)
        if Path(f"/proc/{each}/cmdline").read_bytes().startswith(b"/pause")
    ]  # fmt: skip
    old = app.address("reborn")
    os.kill(pause, signal.SIGKILL)
    until(lambda: app.address("reborn") != old and running(mesh, "reborn"), "it has another sandbox", LIMIT)
    until(lambda: pods(mesh, 1)[f"{SPACE}/reborn"]["joined"], "that one is in the mesh", LIMIT)
    plugin = json.loads(mesh.node(1).run(["cat", CONFIG]))["plugins"][-1] | {
        "cniVersion": "1.0.0",
        "name": "lab",
    }
    mesh.node(1).run(
        ["env", "CNI_COMMAND=DEL", f"CNI_CONTAINERID={first}", "CNI_NETNS=", "CNI_IFNAME=eth0",
         f"CNI_ARGS=K8S_POD_NAMESPACE={SPACE};K8S_POD_NAME=reborn;K8S_POD_UID={uid}", "CNI_PATH=/opt/cni/bin",
         PLUGIN],
        stdin=json.dumps(plugin),
    )  # fmt: skip
    address = f"http://{app.address('reviews')}:{PORT}/"
    assert WORDS.decode() in app.run("curl", "-sS", "-m", "20", address, app="reborn")
    assert pods(mesh, 1)[f"{SPACE}/reborn"]["joined"]
    assert "RedirectionRepaired" not in events(mesh, "reborn"), "nothing was wrong with it"
    delete(mesh, "reborn")


def test_what_the_mesh_adds_to_a_start_is_little(mesh: Lab, app: Sample) -> None:
    """The mean of five starts, one after the other; perf/README.md has what it is on an idle machine."""
    before = [
        metric(mesh, 1, f"istio_cni_plugin_request_duration_seconds_{each}") for each in ("sum", "count")
    ]
    for number in range(5):
        make(mesh, f"timed-{number}")
        until(partial(running, mesh, f"timed-{number}"), "it runs", LIMIT)
    after = [
        metric(mesh, 1, f"istio_cni_plugin_request_duration_seconds_{each}") for each in ("sum", "count")
    ]
    delete(mesh, *(f"timed-{number}" for number in range(5)))
    assert after[1] - before[1] >= 5
    mean = (after[0] - before[0]) / (after[1] - before[1])
    print(f"the mesh adds {mean * 1000:.0f} ms to the start of a pod")
    assert mean < 2


def test_uninstalled_it_takes_everything_with_it_and_pods_go_on(
    mesh: Lab, app: Sample, before: dict[int, str]
) -> None:
    lives = app.lives()
    ambient(mesh, "uninstall", "--purge", "-y")
    until(app.out_of_mesh, "pods are marked no longer", LIMIT)
    for number, text in before.items():
        assert mesh.node(number).run(["cat", CONFIG]) == text
        assert (
            mesh.node(number)
            .run(["sh", "-c", f"ls {PLUGIN} /var/run/istio-cni/* /var/run/ztunnel/* 2>&1 || true"])
            .count("No such")
            == 3
        )
        assert "ambient" not in mesh.node(number).run(["nft", "list", "tables"])
    for name in ("sleep", "reviews"):
        assert rules_of(mesh, 1, app.pod(name)) == ""
    assert WORDS.decode() in app.ask()
    assert lives <= app.lives()
    make(mesh, "afterwards")
    until(lambda: running(mesh, "afterwards"), "a new pod starts", LIMIT)
    delete(mesh, "afterwards")
