"""Services, pods and nodes in a real API server, as if a cluster ran them: pods are bound to nodes that are not."""

import base64
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import msgspec

from ztunnel.store.kube.api import Api, ApiError
from ztunnel.store.kube.store import KubernetesStore
from ztunnel.store.models import Pod

SYSTEM: Final = "istio-system"
NAMESPACES: Final = 10
WRITERS: Final = 8  # threads that make objects at a time
AUDIENCE: Final = "istio-ca"


class Size(NamedTuple):
    """How much of each there is. Pods are shared out among Services and nodes evenly."""

    services: int
    pods: int
    nodes: int


class Place(NamedTuple):
    """One pod: where to find it."""

    namespace: str
    name: str

    @property
    def resource(self) -> str:
        """Its name in xDS."""
        return f"Kubernetes//Pod/{self.namespace}/{self.name}"


def node_name(number: int) -> str:
    return f"node-{number}"


def fill(api: Api, size: Size, *, say: Callable[[str], None]) -> list[Place]:
    """Make everything that is not there; the pods that are ready. Raises ApiError."""
    say(f"{size.nodes} nodes, {NAMESPACES} namespaces")
    for namespace in (SYSTEM, *(f"team-{number}" for number in range(NAMESPACES))):
        _create(api, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        account = {"apiVersion": "v1", "kind": "ServiceAccount"}
        _create(api, {**account, "metadata": {"name": "default", "namespace": namespace}})
    _create(
        api,
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "ztunnel", "namespace": SYSTEM}},
    )
    with ThreadPoolExecutor(WRITERS) as pool:
        _all(pool.submit(_create, api, _node(number)) for number in range(size.nodes))
        _all(pool.submit(_create, api, _proxy(number)) for number in range(size.nodes))
        say(f"{size.services:,} services")
        _all(pool.submit(_create, api, _service(number)) for number in range(size.services))
        say(f"{size.pods:,} pods, each made and then given a status")
        there = {Place(pod.namespace, pod.name): pod.ready for pod in KubernetesStore(api).list(Pod)}
        missing = [number for number in range(size.pods) if _place(number, size) not in there]
        _all(pool.submit(_run, api, number, size) for number in missing)
    places = [_place(number, size) for number in range(size.pods)]
    return [place for place in places if there.get(place, True)]


def tokens(api: Api, nodes: int) -> list[str]:
    """For each node a token of its ztunnel, bound to the pod, as kubelet asks for it."""

    def token(number: int) -> str:
        pod = api.get_json(f"/api/v1/namespaces/{SYSTEM}/pods/ztunnel-{number}")
        bound = {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": f"ztunnel-{number}",
            "uid": pod["metadata"]["uid"],
        }
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": [AUDIENCE], "expirationSeconds": 3600, "boundObjectRef": bound},
        }
        path = f"/api/v1/namespaces/{SYSTEM}/serviceaccounts/ztunnel/token"
        answer: dict[str, Any] = msgspec.json.decode(api.request("POST", path, body=body))
        return str(answer["status"]["token"])

    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(token, range(nodes)))


def root(api: Api) -> str:
    """The root certificate of the control plane that runs, PEM."""
    data = api.get_json(f"/api/v1/namespaces/{SYSTEM}/secrets/istio-ca-secret")["data"]
    return base64.b64decode(data.get("root-cert.pem") or data["ca-cert.pem"]).decode()


def set_ready(api: Api, place: Place, ready: bool) -> None:
    """Have a pod become ready, or no longer."""
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    api.patch("v1", "Pod", place.namespace, place.name, {"status": {"conditions": conditions}}, "status")


def _all(futures: Iterable[Any]) -> None:
    for future in list(futures):
        future.result()


def _create(api: Api, obj: dict[str, Any]) -> None:
    path = api.path(obj["apiVersion"], obj["kind"], obj["metadata"].get("namespace", ""))
    try:
        api.request("POST", path, body=obj)
    except ApiError as error:
        if not error.conflict:
            raise


def _node(number: int) -> dict[str, Any]:
    labels = {
        "kubernetes.io/hostname": node_name(number),
        "topology.kubernetes.io/region": "here",
        "topology.kubernetes.io/zone": f"here-{number % 3}",
    }
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name(number), "labels": labels}}


def _proxy(number: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"ztunnel-{number}", "namespace": SYSTEM, "labels": {"app": "ztunnel"}},
        "spec": {
            "serviceAccountName": "ztunnel",
            "nodeName": node_name(number),
            "automountServiceAccountToken": False,
            "containers": [{"name": "istio-proxy", "image": "ztunnel"}],
        },
    }


def _service(number: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"app-{number}", "namespace": f"team-{number % NAMESPACES}"},
        "spec": {
            "selector": {"app": f"app-{number}"},
            "ports": [
                {"name": "http", "port": 80, "targetPort": "http"},
                {"name": "grpc", "port": 9000, "targetPort": 9000},
            ],
        },
    }


def _place(number: int, size: Size) -> Place:
    service = number % size.services
    return Place(f"team-{service % NAMESPACES}", f"app-{service}-5d9c7b6f4-{number:05}")


def _run(api: Api, number: int, size: Size) -> None:
    """A pod of a Deployment, as large as they are: probes, variables, mounts."""
    place, service = _place(number, size), number % size.services
    app, node = f"app-{service}", node_name(number % size.nodes)
    environment = [
        {"name": f"SETTING_{index}", "value": f"https://backend-{index}.example.org/{app}"}
        for index in range(20)
    ]
    container = {
        "name": "app",
        "image": f"registry.example.org/team/{app}:1.2.3",
        "args": ["--listen=:8080", "--verbose"],
        "env": environment,
        "ports": [{"name": "http", "containerPort": 8080}, {"name": "grpc", "containerPort": 9000}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}},
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
    }
    owner = {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "name": f"{app}-5d9c7b6f4",
        "uid": f"00000000-0000-0000-0000-{service:012}",
        "controller": True,
    }
    _create(
        api,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": place.name,
                "namespace": place.namespace,
                "labels": {"app": app, "version": "v1", "pod-template-hash": "5d9c7b6f4"},
                "annotations": {"ambient.istio.io/redirection": "enabled", "prometheus.io/scrape": "true"},
                "ownerReferences": [owner],
            },
            "spec": {"nodeName": node, "automountServiceAccountToken": False, "containers": [container]},
        },
    )
    address = f"10.{128 + (number >> 16)}.{(number >> 8) & 255}.{number & 255}"
    now = "2026-01-01T00:00:00Z"
    status = {
        "phase": "Running",
        "hostIP": f"192.0.2.{number % size.nodes + 1}",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": now,
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": now}
            for kind in (
                "PodReadyToStartContainers",
                "Initialized",
                "Ready",
                "ContainersReady",
                "PodScheduled",
            )
        ],
        "containerStatuses": [
            {
                "name": "app",
                "image": container["image"],
                "imageID": "registry.example.org/team/app@sha256:" + "0" * 64,
                "containerID": f"containerd://{number:064}",
                "ready": True,
                "restartCount": 0,
                "started": True,
                "state": {"running": {"startedAt": now}},
            }
        ],
    }
    api.patch("v1", "Pod", place.namespace, place.name, {"status": status}, "status")
