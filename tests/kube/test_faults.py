"""What a cluster may do to the mesh: the API server away, etcd from a backup, a node without power, and more."""

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kube.asking import Asking
from tests.kube.lab import Lab, LabError
from tests.kube.rest import RestError
from tests.kube.sample import HBONE, LABEL, LIMIT, PORT, WORDS, Sample, ambient, install, ports_seen, sample
from ztunnel.embedded.testing import until

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]
SYSTEM = "istio-system"
AWAY = float(os.environ.get("AMBIENT_AWAY", "30"))  # seconds without API server
DENY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: after-the-backup, namespace: default}
spec:
  selector: {matchLabels: {app: reviews}}
  action: DENY
  rules: [{from: [{source: {namespaces: [default]}}]}]
"""
BLOCKS = 53_000  # addresses in one policy: 1 MB as JSON


@pytest.fixture(scope="module")
def app(cluster: Lab) -> Iterator[Sample]:
    """The mesh and in it, labelled, the sample application."""
    try:
        with sample(cluster, "default") as made:
            install(cluster)
            made.label()
            yield made
            made.unlabel()
    finally:
        ambient(cluster, "uninstall", "--purge", "-y", code=None)


def restarts(lab: Lab) -> dict[str, int]:
    """Of the mesh's own containers, by pod and container."""
    pods = json.loads(lab.kubectl("get", "pods", "-n", SYSTEM, "-o", "json"))["items"]
    return {
        f"{pod['metadata']['name']}/{status['name']}": status["restartCount"]
        for pod in pods
        for status in pod["status"].get("containerStatuses", [])
    }


def newcomer(app: Sample, name: str) -> None:
    """A pod made now on node 1 joins, and reaches the application in a tunnel."""
    spec = {
        "nodeSelector": {"kubernetes.io/hostname": "node1"},
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": "lab.local/tools:test", "command": ["sleep", "infinity"]}],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": spec,
    }
    app.lab.kubectl("apply", "-n", app.namespace, "-f", "-", stdin=json.dumps(pod))
    until(lambda: app.in_mesh(f"app={name}"), f"pod {name} has joined", 2 * LIMIT)
    app.lab.kubectl(
        "wait",
        "pod",
        name,
        "-n",
        app.namespace,
        "--for=condition=Ready",
        f"--timeout={LIMIT}s",
        timeout=LIMIT + 10,
    )
    with app.lab.capture(1) as capture:
        answer = app.run("curl", "-sS", "-m", "20", f"http://{app.address('reviews')}:{PORT}/", app=name)
    assert WORDS.decode() in answer
    assert not capture.seen(WORDS)
    assert ports_seen(capture.frames, HBONE)
    app.lab.kubectl("delete", "pod", name, "-n", app.namespace, "--wait=true", timeout=LIMIT)


def known(lab: Lab) -> str:
    """What the node proxies know of the mesh: their own pages."""
    pods = lab.kubectl(
        "get", "pods", "-n", SYSTEM, "-l", "app=ztunnel", "-o", "jsonpath={.items[*].metadata.name}"
    )
    pages = []
    for pod in pods.split():
        argv = [
            "nsenter",
            "-t",
            str(lab.pod_pid(SYSTEM, pod)),
            "-n",
            "curl",
            "-sSf",
            "localhost:15000/config_dump",
        ]
        pages.append(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    return "\n".join(pages)


def asking(app: Sample) -> Asking:
    return Asking(app.lab, app.namespace, app.pod("sleep"), (app.address("reviews"), PORT), WORDS)


def answered(app: Sample) -> bool:
    try:
        return WORDS.decode() in app.ask("", "-m", "5")
    except LabError:
        return False


def test_without_api_server_traffic_goes_on_and_nothing_restarts(app: Sample) -> None:
    lab = app.lab
    before = restarts(lab)
    with asking(app) as load:
        load.wait(5, LIMIT)
        lab.stop_apiserver()
        try:
            load.go_on(AWAY)
        finally:
            lab.start_apiserver()
        load.wait(5, LIMIT)
    assert load.failures == []
    until(lambda: restarts(lab) == before, "no container of the mesh was started again", LIMIT)
    lab.wait_ready()  # after minutes, kubelets and scheduler themselves take a minute to come back
    newcomer(app, "after-the-api-server")
    assert restarts(lab) == before


def test_etcd_from_a_backup_takes_back_what_came_after_it(app: Sample) -> None:
    """A policy that refuses everything, made after the backup, is gone with it, and its effect is."""
    lab = app.lab
    lab.snapshot_etcd()
    lab.apply(DENY)
    until(lambda: not answered(app), "the policy refuses", LIMIT)
    before = restarts(lab)
    lab.restore_etcd()
    until(lambda: answered(app), "the policy is no more", LIMIT)
    lab.wait_ready()
    newcomer(app, "after-the-backup")
    assert restarts(lab) == before


def test_a_node_without_power_comes_back_with_its_pods_in_the_mesh(app: Sample) -> None:
    """No drain: the pods' namespaces, and all processes, are just gone. None of them ever sends or gets plaintext."""
    lab = app.lab
    old = app.pod("reviews")
    service = lab.kubectl(
        "get", "service", "reviews", "-n", app.namespace, "-o", "jsonpath={.spec.clusterIP}"
    )
    with (
        lab.capture(1) as capture,
        Asking(lab, app.namespace, app.pod("sleep"), (service, 80), WORDS) as load,
    ):
        load.wait(5, LIMIT)
        lab.kill_node(2)
        began = load.now
        lab.start_node(2)
        lab.wait_ready(2)
        until(
            lambda: any(at > began + 5 for at in load.times),
            f"requests are answered again: {load.failures[-1:]}",
            180,
        )
        load.wait(20, LIMIT)
    # A request that was asked just then may have waited all the while, and been answered.
    pause = max(after - before for before, after in itertools.pairwise(sorted(load.times)))
    assert load.failures or pause > 1, "the node was away"
    assert app.pod("reviews") == old, "the pod is the same, its containers are new"
    assert not capture.seen(WORDS)
    assert ports_seen(capture.frames, HBONE)
    until(app.in_mesh, "all pods are in the mesh", LIMIT)
    lab.wait_rollout("daemonset", "ztunnel", SYSTEM)
    lab.wait_rollout("daemonset", "istio-cni-node", SYSTEM)


def test_a_namespace_deleted_whole_leaves_nothing_in_the_mesh(app: Sample) -> None:
    lab = app.lab
    before = restarts(lab)

    for _ in range(2):  # the second has the same names again
        with lab.namespace("short-lived", {LABEL: "ambient"}) as namespace, sample(lab, namespace) as other:
            until(other.in_mesh, "its pods are in the mesh", LIMIT)
            assert WORDS.decode() in other.ask("http://reviews/")
            assert namespace in known(lab)
            lab.kubectl("delete", "namespace", namespace, "--wait=true", timeout=180)
            until(lambda: "short-lived" not in known(lab), "no proxy knows a pod of it", LIMIT)
    assert restarts(lab) == before


def test_a_policy_of_a_megabyte_is_one_like_others(app: Sample) -> None:
    lab = app.lab
    before = restarts(lab)
    blocks = [f"100.{64 + n // 65536}.{n // 256 % 256}.{n % 256}/32" for n in range(BLOCKS)]
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "long", "namespace": app.namespace},
        "spec": {
            "selector": {"matchLabels": {"app": "reviews"}},
            "action": "ALLOW",
            "rules": [{"from": [{"source": {"ipBlocks": blocks}}]}],
        },
    }
    assert len(json.dumps(policy)) > 1 << 20
    path = f"/apis/security.istio.io/v1/namespaces/{app.namespace}/authorizationpolicies"

    def written(*request: Any) -> bool:
        """The API server gives the webhook ten seconds, then refuses: on a crowded machine one asks again."""
        try:
            lab.rest.request(*request)
        except RestError as error:
            if "failed calling webhook" not in str(error):
                raise
            return False
        return True

    until(lambda: written("POST", path, policy), "the policy is there", LIMIT)
    try:
        until(lambda: not answered(app), "nobody of the list is asking", LIMIT)
        here = f"{app.address('sleep')}/32"
        change = [{"op": "replace", "path": "/spec/rules/0/from/0/source/ipBlocks/0", "value": here}]
        patch = ("PATCH", f"{path}/long", change, "application/json-patch+json")
        until(lambda: written(*patch), "the policy is changed", LIMIT)
        until(lambda: answered(app), "the pod is on the list now", LIMIT)
    finally:
        lab.rest.request("DELETE", f"{path}/long")
    until(lambda: answered(app), "the policy is gone", LIMIT)
    assert restarts(lab) == before
