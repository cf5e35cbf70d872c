"""Waypoints in a cluster: what a Gateway becomes, what its status says, and that traffic passes it."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kube.lab import Lab
from ztunnel.cli.app import run as ambient_run
from ztunnel.controlplane.waypoint_objects import Deployment
from ztunnel.controlplane.waypoints import Deployer
from ztunnel.embedded.testing import until
from ztunnel.store.kube.api import Api

pytestmark = [pytest.mark.kube, pytest.mark.timeout(600)]

LIMIT = 60.0
SPACE = "waypoints"
MANIFESTS = Path(__file__).parents[2] / "manifests"
GATEWAY = ("gateway.networking.k8s.io/v1", "Gateway")
SETTINGS = Deployment(
    image="lab.local/ambient:test",
    pull_policy="IfNotPresent",
    xds_address="https://istiod.istio-system.svc:15012",
    revision="default",
    cluster_id="Kubernetes",
    trust_domain="cluster.local",
    network="",
    root_namespace="istio-system",
)


class Running:
    """A deployer, run by a trio loop in a thread of its own."""

    def __init__(self, api: Api, settings: Deployment = SETTINGS) -> None:
        self._deployer = Deployer(api, settings)
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            with self._scope:
                await self._deployer.run()

        trio.run(main)

    def stop(self) -> None:
        until(lambda: self._token is not None, "it runs", LIMIT)
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(LIMIT)


class Space:
    """A namespace of an API server without nodes: what a kubelet would write, the test does."""

    def __init__(self, lab: Lab) -> None:
        self.api = lab.api
        self.lab = lab

    def ambient(self, *words: str, code: int = 0) -> None:
        given = ["waypoint", *words, "--kubeconfig", str(self.lab.kubeconfig)]
        assert ambient_run(given) == code, given

    def get(self, kind: str, name: str = "waypoint", version: str = "v1") -> dict[str, Any]:
        return self.api.get(version, kind, SPACE, name) or {}

    def gateway(self, name: str = "waypoint") -> dict[str, Any]:
        return self.api.get(*GATEWAY, SPACE, name) or {}

    def condition(self, kind: str, name: str = "waypoint") -> dict[str, Any]:
        conditions = (self.gateway(name).get("status") or {}).get("conditions") or []
        return next((one for one in conditions if one["type"] == kind), {})

    def ready(self, replicas: int, name: str = "waypoint") -> None:
        """Be the kubelet of so many of the Deployment's pods, whose status the API server's own controllers sum up."""
        selector = f"gateway.networking.k8s.io/gateway-name={name}"

        def pods() -> list[dict[str, Any]]:
            return self.api.list("v1", "Pod", SPACE, label_selector=selector)

        until(lambda: len(pods()) >= replicas, "the pods are made", LIMIT)
        for number, pod in enumerate(pods()):
            condition = {"type": "Ready", "status": "True" if number < replicas else "False"}
            status = {"phase": "Running", "conditions": [condition]}
            self.api.patch("v1", "Pod", SPACE, pod["metadata"]["name"], {"status": status}, "status")


@pytest.fixture(scope="module")
def space(apiserver: Lab) -> Iterator[Space]:
    apiserver.start_controllers()
    apiserver.kubectl("apply", "-k", str(MANIFESTS / "gateway-api"))
    apiserver.kubectl("create", "namespace", SPACE)
    made = Space(apiserver)

    def served() -> bool:
        made.api.forget(GATEWAY[0])
        return made.api.serves(*GATEWAY)

    until(served, "the Gateway API is served", LIMIT)
    yield made
    apiserver.kubectl("delete", "namespace", SPACE, "--wait=false")


@pytest.fixture
def deployer(space: Space) -> Iterator[Running]:
    running = Running(space.api)
    yield running
    running.stop()
    for one in space.api.list(*GATEWAY, SPACE):
        name = one["metadata"]["name"]
        space.api.delete(*GATEWAY, SPACE, name)
        # No controller of this cluster collects what belonged to it.
        for version, kind in (
            ("apps/v1", "Deployment"), ("v1", "Service"), ("v1", "ServiceAccount"),
            ("autoscaling/v2", "HorizontalPodAutoscaler"), ("policy/v1", "PodDisruptionBudget"),
        ):  # fmt: skip
            space.api.delete(version, kind, SPACE, name)


def test_a_gateway_becomes_a_deployment_and_is_programmed_once_a_pod_is_ready(
    space: Space, deployer: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    space.ambient("apply", "-n", SPACE, "--for", "all")
    until(lambda: space.condition("Programmed"), "the status is written", LIMIT)
    assert space.condition("Accepted")["status"] == "True"
    pending = space.condition("Programmed")
    assert (pending["status"], pending["reason"]) == ("False", "Pending")
    assert "0 of 1 pods are ready" in pending["message"]
    assert not space.gateway()["status"].get("addresses")

    owner = space.gateway()["metadata"]["uid"]
    deployment = space.get("Deployment", version="apps/v1")
    service = space.get("Service")
    for made in (deployment, service, space.get("ServiceAccount")):
        assert [one["uid"] for one in made["metadata"]["ownerReferences"]] == [owner]
        labels = made["metadata"]["labels"]
        assert labels["gateway.networking.k8s.io/gateway-name"] == "waypoint"
        assert labels["gateway.networking.k8s.io/gateway-class-name"] == "istio-waypoint"
    template = deployment["spec"]["template"]
    assert template["metadata"]["labels"]["istio.io/dataplane-mode"] == "none"
    assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    (container,) = template["spec"]["containers"]
    assert (container["image"], container["imagePullPolicy"]) == ("lab.local/ambient:test", "IfNotPresent")
    assert container["command"] == ["python", "-m", "waypoint"]
    assert sorted(one["port"] for one in service["spec"]["ports"]) == [15008, 15021]
    (accepted,) = [
        one["status"]
        for one in space.gateway()["status"]["listeners"][0]["conditions"]
        if one["type"] == "Accepted"
    ]
    assert accepted == "True"

    space.ambient("status", "-n", SPACE, code=3)
    assert "0 of 1 pods are ready" in capsys.readouterr().out
    space.ready(1)
    space.ambient("apply", "-n", SPACE, "--for", "all", "--wait")
    addresses = {one["type"]: one["value"] for one in space.gateway()["status"]["addresses"]}
    assert addresses == {
        "IPAddress": service["spec"]["clusterIP"],
        "Hostname": f"waypoint.{SPACE}.svc.cluster.local",
    }
    generation = space.gateway()["metadata"]["generation"]
    assert space.condition("Programmed")["observedGeneration"] == generation
    capsys.readouterr()
    space.ambient("list", "-n", SPACE, "-o", "json")
    assert json.loads(capsys.readouterr().out) == [
        {
            "namespace": SPACE,
            "name": "waypoint",
            "revision": "default",
            "traffic type": "all",
            "programmed": "True",
        }
    ]
    # Its pods may go: it is not ready then, and is not gone around.
    space.ready(0)
    until(lambda: space.condition("Programmed")["status"] == "False", "it is told", LIMIT)
    assert space.gateway()["status"]["addresses"]


def test_drift_is_repaired_and_what_the_user_scales_is_left(space: Space, deployer: Running) -> None:
    space.ambient("apply", "-n", SPACE)
    until(lambda: space.get("Deployment", version="apps/v1"), "it is deployed", LIMIT)
    api = space.api
    api.patch("apps/v1", "Deployment", SPACE, "waypoint", {"spec": {"replicas": 3}})
    api.delete("v1", "Service", SPACE, "waypoint")
    api.delete("v1", "ServiceAccount", SPACE, "waypoint")
    until(lambda: space.get("Service"), "the Service is made again", LIMIT)
    until(lambda: space.get("ServiceAccount"), "and the account", LIMIT)
    image = {"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "elsewhere/else:1"}
    space.lab.kubectl(
        "patch", "deployment", "waypoint", "-n", SPACE, "--type=json", "-p", json.dumps([image])
    )

    def repaired() -> bool:
        spec = space.get("Deployment", version="apps/v1")["spec"]
        image_now: str = spec["template"]["spec"]["containers"][0]["image"]
        return image_now == "lab.local/ambient:test"

    until(repaired, "the image is put back", LIMIT)
    assert space.get("Deployment", version="apps/v1")["spec"]["replicas"] == 3


def test_parameters_are_laid_over_and_make_an_autoscaler(space: Space, deployer: Running) -> None:
    api = space.api
    parameters = {
        "deployment": "spec:\n  replicas: 4\n  template:\n    spec:\n      containers:\n      - name: istio-proxy\n"
        "        resources:\n          requests:\n            cpu: 222m\n",
        "horizontalPodAutoscaler": "spec:\n  minReplicas: 2\n  maxReplicas: 5\n",
        "podDisruptionBudget": "spec:\n  minAvailable: 1\n",
    }

    def parametrize(data: dict[str, str]) -> None:
        api.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "options", "namespace": SPACE},
                "data": data,
            }
        )
        infrastructure = {
            "labels": {"touched": str(len(data))},
            "parametersRef": {"group": "", "kind": "ConfigMap", "name": "options"},
        }
        api.patch(*GATEWAY, SPACE, "waypoint", {"spec": {"infrastructure": infrastructure}})

    space.ambient("apply", "-n", SPACE)
    parametrize(parameters)
    scaler = until(
        lambda: space.get("HorizontalPodAutoscaler", version="autoscaling/v2"),
        "the autoscaler is made",
        LIMIT,
    )
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 5)
    assert scaler["spec"]["scaleTargetRef"]["name"] == "waypoint"
    until(lambda: space.get("PodDisruptionBudget", version="policy/v1"), "and the budget", LIMIT)

    def requests() -> Any:
        spec = space.get("Deployment", version="apps/v1")["spec"]["template"]["spec"]
        return spec["containers"][0]["resources"]["requests"]

    until(lambda: requests() == {"cpu": "222m", "memory": "128Mi"}, "the request is laid over", LIMIT)
    assert space.get("Deployment", version="apps/v1")["spec"]["replicas"] == 1, "that is the autoscaler's"
    parametrize({"deployment": "spec: ["})
    until(lambda: space.condition("Accepted").get("status") == "False", "it is refused", LIMIT)
    assert (
        "ConfigMap waypoints/options: data.deployment: is not YAML" in space.condition("Accepted")["message"]
    )
    api.patch(*GATEWAY, SPACE, "waypoint", {"spec": {"infrastructure": None}})
    until(
        lambda: not space.get("HorizontalPodAutoscaler", version="autoscaling/v2"),
        "the autoscaler goes",
        LIMIT,
    )
    until(lambda: space.condition("Accepted")["status"] == "True", "it is accepted again", LIMIT)


def test_what_is_wrong_is_told_by_field_and_others_gateways_are_left_alone(
    space: Space, deployer: Running
) -> None:
    def gateway(name: str, class_name: str, protocol: str, **labels: str) -> None:
        space.api.apply(
            {
                "apiVersion": GATEWAY[0],
                "kind": "Gateway",
                "metadata": {"name": name, "namespace": SPACE, "labels": labels},
                "spec": {
                    "gatewayClassName": class_name,
                    "listeners": [{"name": "mesh", "port": 15008, "protocol": protocol}],
                },
            }
        )

    long = "a" * 64
    gateway("plain", "istio-waypoint", "HTTP")
    gateway(long, "istio-waypoint", "HBONE")
    gateway("other", "istio", "HTTP")
    gateway("canary", "istio-waypoint", "HBONE", **{"istio.io/rev": "canary"})
    labels = {"app": "taken"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "c"}]}}
    space.api.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "taken", "namespace": SPACE},
            "spec": {"replicas": 0, "selector": {"matchLabels": labels}, "template": pod},
        }
    )
    gateway("taken", "istio-waypoint", "HBONE")
    until(lambda: space.condition("Accepted", "plain"), "the first is looked at", LIMIT)
    until(lambda: space.condition("Accepted", long), "and the second", LIMIT)
    refused = space.condition("Accepted", "plain")
    assert (refused["status"], refused["reason"]) == ("False", "ListenersNotValid")
    assert (
        "spec.listeners: a waypoint has a listener of protocol HBONE on port 15008 (given: HTTP on 15008)"
        in (refused["message"])
    )
    assert "at most 63" in space.condition("Accepted", long)["message"]
    until(
        lambda: "belongs to somebody else" in str(space.condition("Programmed", "taken")), "it is told", LIMIT
    )
    assert not space.get("ServiceAccount", "taken"), "of what cannot be whole nothing is begun"
    assert "status" not in space.gateway("other")
    assert "status" not in space.gateway("canary")
    assert not space.get("Deployment", "plain", "apps/v1")


def test_the_command_enrolls_and_deletes(
    space: Space, deployer: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    space.ambient("apply", "-n", SPACE, "--name", "reviews-waypoint", "--enroll-namespace")
    told = capsys.readouterr()
    assert f"waypoint {SPACE}/reviews-waypoint applied" in told.out
    assert f"namespace {SPACE} is not in the mesh" in told.err
    labels = (space.api.get("v1", "Namespace", "", SPACE) or {})["metadata"]["labels"]
    assert labels["istio.io/use-waypoint"] == "reviews-waypoint"
    space.ambient("apply", "-n", SPACE, "--name", "second", "--enroll-namespace", code=1)
    assert "say --overwrite to replace it" in capsys.readouterr().err
    assert not space.gateway("second")
    space.ambient("apply", "-n", SPACE, "--name", "none", code=1)
    space.ambient("delete", "nobody", "-n", SPACE, code=1)
    space.ambient("delete", "--all", "-n", SPACE)
    assert f"waypoint {SPACE}/reviews-waypoint deleted" in capsys.readouterr().out
    assert not space.gateway("reviews-waypoint")
    space.ambient("apply", "-n", "nowhere", code=1)
    assert "namespace nowhere does not exist" in capsys.readouterr().err
