"""What users are promised, from nothing to nothing: install, label, update, strict, waypoint, uninstall."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kube import cgroups
from tests.kube.lab import Lab, LabError
from tests.kube.sample import HBONE, LIMIT, PORT, WORDS, Sample, ambient, install, ports_seen, sample
from ztunnel.embedded.testing import until

pytestmark = [pytest.mark.kube, pytest.mark.timeout(600)]
SYSTEM = "istio-system"
PLACES = "/opt/cni/bin /etc/cni/net.d /var/run/ztunnel /var/run/istio-cni"
FILES = f"find {PLACES} ! -type f -o -exec md5sum {{}} + 2>/dev/null | sort"


@pytest.fixture(scope="module")
def before(cluster: Lab) -> dict[int, tuple[str, str]]:
    """What is on the nodes before anything is installed: files, nftables."""
    return {number: on_node(cluster, number) for number in cluster.nodes}


@pytest.fixture(scope="module")
def app(cluster: Lab, before: dict[int, tuple[str, str]]) -> Iterator[Sample]:
    """The sample application, which is there before the mesh, and after it."""
    with sample(cluster, "default") as made:
        yield made


@pytest.fixture(scope="module")
def mesh(cluster: Lab, app: Sample) -> Iterator[Lab]:
    """The mesh, as `ambient install` brings it."""
    install(cluster)
    yield cluster
    ambient(cluster, "uninstall", "--purge", "-y", code=None)


def on_node(cluster: Lab, number: int) -> tuple[str, str]:
    node = cluster.node(number)
    files = node.run(["sh", "-c", FILES])
    tables = node.run(["nft", "list", "tables"])
    return files, "\n".join(line for line in tables.splitlines() if "kube-proxy" not in line)


def proxy_pods(cluster: Lab) -> dict[str, str]:
    """The names of the node proxies that are not about to end, by node."""
    found = json.loads(cluster.kubectl("get", "pods", "-n", SYSTEM, "-l", "app=ztunnel", "-o", "json"))
    return {
        one["spec"]["nodeName"]: one["metadata"]["name"]
        for one in found["items"]
        if "deletionTimestamp" not in one["metadata"]
    }


def process_1(cluster: Lab, pod: str) -> int:
    """Process 1 of a node proxy's container, as the host counts."""
    uid = cluster.kubectl("get", "pod", pod, "-n", SYSTEM, "-o", "jsonpath={.metadata.uid}")
    for node in cluster.nodes.values():
        for pid in cgroups.processes(node.cgroup, uid):
            if b"process1.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise AssertionError(f"pod {pod} has no process 1 of ours")


def updated(cluster: Lab, old: dict[str, str]) -> bool:
    """Whether each node has one proxy that is not about to end, a new one, and ready."""
    found = json.loads(cluster.kubectl("get", "pods", "-n", SYSTEM, "-l", "app=ztunnel", "-o", "json"))[
        "items"
    ]
    staying = [one for one in found if "deletionTimestamp" not in one["metadata"]]
    return sorted(one["spec"]["nodeName"] for one in staying) == sorted(old) and all(
        one["metadata"]["name"] not in old.values()
        and any(each["type"] == "Ready" and each["status"] == "True" for each in one["status"]["conditions"])
        for one in staying
    )


def ready_proxies(cluster: Lab) -> bool:
    status = json.loads(cluster.kubectl("get", "daemonset", "ztunnel", "-n", SYSTEM, "-o", "json"))["status"]
    return bool(status.get("numberReady") == status.get("desiredNumberScheduled") == 2)


def test_a_label_brings_pods_in_and_out_while_they_run(mesh: Lab, app: Sample) -> None:
    lives = app.lives()
    with mesh.capture(1) as capture:
        assert WORDS.decode() in app.ask()
    assert capture.seen(WORDS), "before the label everybody on the link can read it"
    app.label()
    with mesh.capture(1) as capture:
        for url in ("", "http://reviews/", "http://reviews.default.svc.cluster.local/"):
            for _ in range(4):
                assert WORDS.decode() in app.ask(url)
    assert not capture.seen(WORDS)
    assert ports_seen(capture.frames, HBONE)
    assert not ports_seen(capture.frames, PORT)
    ambient(mesh, "check")
    clients = json.loads(ambient(mesh, "proxy-status", "-o", "json"))["clients"]
    assert {one["node"] for one in clients} == {"node1", "node2"}
    assert {kind["status"] for one in clients for kind in one["types"].values()} == {"SYNCED"}
    assert app.lives() == lives
    app.unlabel()
    with mesh.capture(1) as capture:
        assert WORDS.decode() in app.ask()
    assert capture.seen(WORDS)
    assert ports_seen(capture.frames, PORT)  # (the old tunnel may still be saying goodbye)
    assert app.lives() == lives


@pytest.mark.parametrize("kept", [False, True], ids=["a connection a request", "connections kept"])
def test_a_rolling_update_of_the_proxies_fails_no_request(mesh: Lab, app: Sample, kept: bool) -> None:
    # Longer than the update of a busy machine: connections that outlive the grace period are cut.
    install(mesh, "--set", "values.ztunnel.terminationGracePeriodSeconds=150")
    with app.joined():
        old = proxy_pods(mesh)

        def update() -> None:
            mesh.kubectl("rollout", "restart", "daemonset/ztunnel", "-n", SYSTEM)
            # Not `rollout status`: it counts a node's oldest pod, which may drain for as long as it is given.
            until(lambda: updated(mesh, old), "new proxies are ready, and the old ones told to end", LIMIT)

        run = app.load(update, kept=kept)
        new = proxy_pods(mesh)
        assert set(new) == set(old)
        assert not set(new.values()) & set(old.values())
        assert run.failures == 0, run.words
        assert run.requests > 500


def test_a_control_process_that_dies_costs_no_connection(mesh: Lab, app: Sample) -> None:
    """Its workers serve on; process 1 starts another one, in the same container."""
    with app.joined():

        def kill() -> None:
            for pod in proxy_pods(mesh).values():
                children = mesh.execute(SYSTEM, pod, ["cat", "/proc/1/task/1/children"])
                code = f"import os; os.kill({int(children.split()[0])}, 9)"
                mesh.execute(SYSTEM, pod, ["python", "-c", code])
                until(lambda: ready_proxies(mesh), "the proxies are ready", LIMIT)

        run = app.load(kill, kept=True)
        assert run.failures == 0, run.words
        for pod in proxy_pods(mesh).values():
            assert "the control process died and was started again" in mesh.kubectl("logs", "-n", SYSTEM, pod)
            assert (
                mesh.kubectl(
                    "get",
                    "pod",
                    pod,
                    "-n",
                    SYSTEM,
                    "-o",
                    "jsonpath={.status.containerStatuses[0].restartCount}",
                )
                == "0"
            )


@pytest.mark.parametrize("how", ["deleted", "killed"])
def test_without_a_proxy_nothing_goes_around_it(mesh: Lab, app: Sample, how: str) -> None:
    """Requests fail for the moment between the old and the new one; none of them is ever readable on the link."""
    with app.joined(), mesh.capture(1) as capture:
        pod = proxy_pods(mesh)["node1"]
        stop = threading.Event()
        asked: list[bool] = []

        def ask() -> None:
            while not stop.is_set():
                try:
                    asked.append(WORDS.decode() in app.ask("", "--connect-timeout", "5"))
                except LabError:
                    asked.append(False)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            if how == "deleted":
                mesh.kubectl("delete", "pod", pod, "-n", SYSTEM, "--wait=true", timeout=120)
            else:
                os.kill(process_1(mesh, pod), signal.SIGKILL)
            until(lambda: ready_proxies(mesh), "the proxies are ready", LIMIT)
            count = len(asked)
            until(lambda: len(asked) > count + 3 and all(asked[-3:]), "requests are answered again", LIMIT)
        finally:
            stop.set()
            thread.join()
        assert not capture.seen(WORDS)


JOB = """
apiVersion: batch/v1
kind: Job
metadata: {{name: first-instant}}
spec:
  completions: 50
  parallelism: 10
  backoffLimit: 0
  template:
    metadata: {{labels: {{app: first-instant}}}}
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 0
      containers:
      - name: first
        image: lab.local/tools:test
        command: [curl, -sf, -m, "20", "http://{address}:{port}/first-instant"]
"""
STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
"""


def test_the_first_packet_of_a_pod_goes_through_the_mesh(mesh: Lab, app: Sample) -> None:
    """Fifty pods whose one program connects at once: where plaintext is refused, each is answered."""
    job = JOB.format(address=app.address("reviews"), port=PORT)
    with app.joined():
        mesh.kubectl("apply", "-n", app.namespace, "-f", "-", stdin=STRICT)
        try:
            strict(mesh, app)
            with mesh.capture(2) as capture:
                mesh.kubectl("apply", "-n", app.namespace, "-f", "-", stdin=job)
                mesh.kubectl(
                    "wait", "job/first-instant", "-n", app.namespace, "--for=condition=complete", "--timeout=200s",
                    timeout=210,
                )  # fmt: skip
            status = json.loads(mesh.kubectl("get", "job/first-instant", "-n", app.namespace, "-o", "json"))[
                "status"
            ]
            assert status["succeeded"] == 50
            assert not status.get("failed")
            assert not capture.seen(b"/first-instant")
            assert ports_seen(capture.frames, HBONE)
        finally:
            mesh.kubectl(
                "delete", "job/first-instant", "-n", app.namespace, "--ignore-not-found", timeout=120
            )
            mesh.kubectl("delete", "-n", app.namespace, "-f", "-", stdin=STRICT)


def strict(mesh: Lab, app: Sample) -> None:
    """Wait until the policy holds: a program of the node, which is no pod, gets no answer."""
    address = app.address("reviews")

    def refused() -> bool:
        code = mesh.node(1).run(["sh", "-c", f"curl -s -m 5 -o /dev/null http://{address}:{PORT}/; echo $?"])
        return int(code) != 0

    until(refused, "plaintext is refused", LIMIT)


PROBED = """
apiVersion: v1
kind: Pod
metadata: {name: probed, labels: {app: probed}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: http
    image: lab.local/tools:test
    command: [python, -m, http.server, "7001"]
    readinessProbe: {httpGet: {port: 7001}, periodSeconds: 1}
    livenessProbe: {httpGet: {port: 7001}, periodSeconds: 1, failureThreshold: 2}
  - name: tcp
    image: lab.local/tools:test
    command: [ncat, -lk, "7002"]
    readinessProbe: {tcpSocket: {port: 7002}, periodSeconds: 1}
    livenessProbe: {tcpSocket: {port: 7002}, periodSeconds: 1, failureThreshold: 2}
  - name: grpc
    image: lab.local/ambient:test
    command:
    - python
    - -c
    - |
      import asyncio
      from grpclib.health.service import Health
      from grpclib.server import Server
      async def main():
          server = Server([Health()])
          await server.start("0.0.0.0", 7003)
          await server.wait_closed()
      asyncio.run(main())
    readinessProbe: {grpc: {port: 7003}, periodSeconds: 1}
    livenessProbe: {grpc: {port: 7003}, periodSeconds: 1, failureThreshold: 2, initialDelaySeconds: 5}
  - name: exec
    image: lab.local/tools:test
    command: [sleep, infinity]
    readinessProbe: {exec: {command: ["true"]}, periodSeconds: 1}
    livenessProbe: {exec: {command: ["true"]}, periodSeconds: 1, failureThreshold: 2}
"""


def test_probes_pass_where_plaintext_is_refused(mesh: Lab, app: Sample) -> None:
    """Of a pod that starts in the mesh, and of one that was there before."""
    with app.joined():
        lives = app.lives()
        mesh.kubectl("apply", "-n", app.namespace, "-f", "-", stdin=STRICT + "---" + PROBED)
        try:
            mesh.kubectl(
                "wait",
                "pod/probed",
                "-n",
                app.namespace,
                "--for=condition=Ready",
                "--timeout=90s",
                timeout=100,
            )
            strict(mesh, app)
            since = len(probes(mesh, app))
            until(lambda: len(probes(mesh, app)) > since + 5, "the kubelet goes on asking", LIMIT)
            (pod,) = app.pods("app=probed")
            for status in pod["status"]["containerStatuses"]:
                assert status["ready"], status
                assert status["restartCount"] == 0, status
            assert lives <= app.lives()
            assert all(one["ready"] for each in app.pods() for one in each["status"]["containerStatuses"])
        finally:
            mesh.kubectl("delete", "-n", app.namespace, "-f", "-", stdin=STRICT + "---" + PROBED, timeout=120)


def probes(mesh: Lab, app: Sample) -> list[str]:
    """The requests that the HTTP container has answered."""
    log = mesh.kubectl("logs", "-n", app.namespace, "probed", "-c", "http")
    return [line for line in log.splitlines() if '"GET / HTTP/1.1" 200' in line]


def test_a_waypoint_is_made_by_a_command_and_traffic_passes_it(mesh: Lab, app: Sample) -> None:
    with app.joined():
        ambient(
            mesh,
            "waypoint",
            "apply",
            "--namespace",
            "default",
            "--name",
            "reviews-waypoint",
            "--enroll-namespace",
            "--wait",
        )
        try:
            status = ambient(mesh, "waypoint", "status", "reviews-waypoint", "--namespace", "default")
            assert "Programmed" in status

            def passes() -> bool:
                assert WORDS.decode() in app.ask("http://reviews/")
                return WORDS.decode() in app.ask("http://reviews/") and passed(mesh) > 0

            until(passes, "the waypoint has connections", LIMIT)
        finally:
            ambient(mesh, "waypoint", "delete", "reviews-waypoint", "--namespace", "default")
            mesh.kubectl("label", "namespace", "default", "istio.io/use-waypoint-")


def passed(mesh: Lab) -> int:
    """How many lines of the waypoint's log are about connections."""
    log = mesh.kubectl("logs", "-n", "default", "deployment/reviews-waypoint")
    return log.count("reviews.default.svc.cluster.local")


def test_nothing_is_left_after_an_uninstall(
    mesh: Lab, app: Sample, before: dict[int, tuple[str, str]]
) -> None:
    """In the cluster, on the nodes, in their tables, and in those of pods that were in the mesh, which run on."""
    lives = app.lives()
    app.label()
    ambient(mesh, "uninstall", "--purge", "-y")
    assert app.lives() == lives
    with mesh.capture(1) as capture:
        assert WORDS.decode() in app.ask()
    assert capture.seen(WORDS)
    for number in mesh.nodes:
        assert on_node(mesh, number) == before[number]
    for name in ("reviews", "sleep"):
        with_rules = mesh.node(2 if name == "reviews" else 1)
        pid = mesh.pod_pid(app.namespace, app.pod(name))
        assert mesh_rules(pid) == "", with_rules.name
    kinds = "crd,clusterrole,clusterrolebinding,validatingwebhookconfiguration,mutatingwebhookconfiguration,namespace"
    left = mesh.kubectl("get", kinds, "-o", "name").split()
    ours = [name for name in left if "istio" in name or "ambient" in name or "linkerd" in name]
    assert ours == []
    everywhere = mesh.kubectl(
        "get", "all,configmap,secret,lease,serviceaccount,role,rolebinding", "-A", "-o", "name"
    )
    assert [name for name in everywhere.split() if "istio" in name or "ztunnel" in name] == []
    annotated = [one["metadata"].get("annotations", {}) for one in app.pods()]
    assert [key for each in annotated for key in each if "istio" in key] == []
    mesh.kubectl("label", "namespace", app.namespace, "istio.io/dataplane-mode-")


def mesh_rules(pid: int) -> str:
    """The tables of nftables, and our routing rules, in a process's network namespace."""
    words = [
        "nsenter",
        "-t",
        str(pid),
        "-n",
        "sh",
        "-c",
        "nft list tables; ip rule | grep -w 100; ip -6 rule | grep -w 100; true",
    ]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
