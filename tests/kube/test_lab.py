"""The tests' own Kubernetes is what the other tests take it for."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.kube import image, record
from tests.kube.cgroups import hierarchies
from tests.kube.lab import Lab, LabError
from tests.kube.record import LabInUse, Record, sweep
from ztunnel.embedded.testing import until

pytestmark = [pytest.mark.kube, pytest.mark.timeout(600)]

WEB = """
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: web
        image: lab.local/tools:test
        command: [python, -m, http.server, "8080"]
        readinessProbe: {httpGet: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: pods}
spec: {clusterIP: None, selector: {app: web}, ports: [{name: http, port: 8080}]}
"""


def test_pods_of_two_nodes_reach_one_another_by_the_names_of_services(cluster: Lab) -> None:
    with cluster.namespace("lab-names") as namespace:
        cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=WEB)
        cluster.wait_rollout("daemonset", "web", namespace)
        pods = cluster.kubectl(
            "get", "pods", "-n", namespace, "-o", "jsonpath={.items[*].metadata.name}"
        ).split()
        addresses = cluster.kubectl(
            "get", "pods", "-n", namespace, "-o", "jsonpath={.items[*].status.podIP}"
        ).split()
        assert sorted(address.rsplit(".", 1)[0] for address in addresses) == ["10.244.1", "10.244.2"]

        def within(*argv: str) -> str:
            return cluster.execute(namespace, pods[0], argv)

        for way in ("+notcp", "+tcp"):

            def all_found(way: str = way) -> bool:
                return sorted(within("dig", way, "+search", "+short", "pods").split()) == sorted(addresses)

            until(all_found, "the headless Service has both addresses", 60)
            srv = within("dig", way, "+short", f"_http._tcp.pods.{namespace}.svc.cluster.local", "SRV")
            assert {line.split()[2] for line in srv.splitlines()} == {"8080"}
            assert "NXDOMAIN" in within("dig", way, "example.com")
        for url in ("http://web", *(f"http://{address}:8080" for address in addresses)):
            with cluster.capture(1) as capture:
                answers = {within("curl", "-sf", "-m", "10", f"{url}/etc/hostname").strip() for _ in range(8)}
            # The host's name of a pod is its own: whatever answered is one of them, and both do for the Service.
            assert answers <= set(pods)
            crossed = capture.seen(b"GET /etc/hostname") > 0
            assert crossed == (len(answers) > 1 or pods[0] not in answers)


PROOF = """
import importlib.metadata, importlib.util, os
import cni.kubernetes, waypoint.__main__, ztunnel.__main__, ztunnel.cli.app, ztunnel.controlplane.__main__
from cni.plugin.build import BINARY
assert os.access(BINARY, os.X_OK), BINARY
assert os.path.exists(importlib.util.cache_from_source(ztunnel.__main__.__file__))
print("version", importlib.metadata.version("ambient-mesh"), "user", os.getuid())
print("of tests:", [name for name in ("pytest", "mypy", "hypothesis", "tests") if importlib.util.find_spec(name)])
"""


def test_the_image_has_what_runs_and_nothing_of_the_tests(cluster: Lab) -> None:
    """As the manifests run it: not root, a disk that is read-only."""
    security = {"runAsUser": 1337, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": "main",
        "image": image.AMBIENT,
        "command": ["python", "-c", PROOF],
        "securityContext": security,
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "proof"},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container]},
    }
    with cluster.namespace("lab-image") as namespace:
        cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))

        def phase() -> str:
            return cluster.kubectl("get", "pod", "proof", "-n", namespace, "-o", "jsonpath={.status.phase}")

        until(lambda: phase() in ("Succeeded", "Failed"), "the pod has ended", 60)
        said = cluster.kubectl("logs", "proof", "-n", namespace)
        assert phase() == "Succeeded", said
        assert said.splitlines() == ["version 0.1.0 user 1337", "of tests: []"]


def test_a_lab_whose_owner_was_killed_is_cleaned_up_by_the_next() -> None:
    """Also its control groups and its folder; and a lab that has an owner is left alone."""
    name = f"orphan-{os.getpid()}"
    code = (
        "import sys, time\nfrom tests.kube.lab import Lab\n"
        "lab = Lab.up(sys.argv[1], 0)\nlab.start_controllers()\nprint('up', flush=True)\ntime.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        kept = Record(name)
        started = [kept.process(part) for part in ("control", "relay")]
        assert all(process is not None and process.alive for process in started)
        sweep()
        assert all(process is not None and process.alive for process in started)
        with pytest.raises(LabInUse, match="another process has it"):
            Lab.up(name, 0)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    sweep()
    assert not any(process is not None and process.alive for process in started)
    assert not list(record.labs().glob(f"{name}*"))
    assert not [root for root in hierarchies() if list(root.glob(f"*{name}*"))]


def test_what_is_not_up_is_told(apiserver: Lab) -> None:
    assert apiserver.kubectl("get", "namespace", "default", "-o", "name") == "namespace/default\n"
    with pytest.raises(LabError, match=r"not up; `python -m tests\.kube\.lab up --name nowhere` starts it"):
        Lab.attach("nowhere")
    with pytest.raises(LabError, match='namespaces "nowhere" not found'):
        apiserver.kubectl("get", "namespace", "nowhere")
