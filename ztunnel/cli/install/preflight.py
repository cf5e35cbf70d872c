"""Whether a cluster can take the mesh: its version, what we may do in it, its nodes, and who is there already."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ztunnel.cli.checks.outcome import Check, Outcome, Result, ok, skipped, wrong_if
from ztunnel.cli.hints import sidecars
from ztunnel.cli.install import render
from ztunnel.cli.install.render import Object
from ztunnel.cli.install.settings import NAMESPACE, Settings
from ztunnel.cli.install.settings import read as read_settings
from ztunnel.cli.install.survey import ours, ref_of, survey, told
from ztunnel.store.models import Namespace

if TYPE_CHECKING:
    from ztunnel.store.kube.api import Api

LEAST_KUBERNETES: Final = (1, 28)
LEAST_KERNEL: Final = (5, 4)
_VERBS: Final = ("get", "create", "patch", "delete")
_CATEGORY: Final = "kubernetes"


def preflight(api: "Api", settings: Settings | None = None) -> list[tuple[Check, Outcome]]:
    """Every check, and how it went. Nothing is changed. Raises ApiError where the API server cannot be reached."""
    wanted = settings if settings is not None else read_settings()
    version = api.get_json("/version")
    checks: list[tuple[str, Callable[[], Outcome]]] = [
        ("Kubernetes is new enough", lambda: judge_version(version)),
        ("we may create what an installation needs", lambda: _permissions(api, wanted)),
        ("the nodes can run the mesh", lambda: judge_nodes(api.list("v1", "Node"))),
        ("no other installation is in the way", lambda: _others(api, wanted)),
        ("definitions that are there can be used", lambda: _definitions(api, wanted)),
        ("no other mesh has namespaces of its own", lambda: _neighbours(api)),
        ("the primary CNI lets others chain in", lambda: _primary_cni(api)),
    ]
    return [_checked(name, look) for name, look in checks]


def _checked(name: str, look: Callable[[], Outcome]) -> tuple[Check, Outcome]:
    """A check that was made already: what it needs is in the cluster, not among the facts of a mesh."""
    from ztunnel.store.kube.api import ApiError

    try:
        outcome = look()
    except ApiError as error:
        if error.unreachable:
            raise
        outcome = skipped(str(error))
    return Check(_CATEGORY, name, lambda _: outcome, pre=True), outcome


def judge_version(version: dict[str, Any]) -> Outcome:
    """Of the API server."""
    numbers = [re.match(r"\d+", str(version.get(part, ""))) for part in ("major", "minor")]
    found = tuple(int(match[0]) if match else 0 for match in numbers)
    least = ".".join(map(str, LEAST_KUBERNETES))
    wrong = [f"it is {version.get('gitVersion', 'unknown')}"] if found < LEAST_KUBERNETES else []
    return wrong_if(wrong, f"upgrade the cluster to {least} or newer")


def _permissions(api: "Api", wanted: Settings) -> Outcome:
    """Ask for every kind that an installation has objects of (SelfSubjectAccessReview)."""
    kinds = {
        (obj["apiVersion"], obj["kind"], obj["metadata"].get("namespace", ""))
        for obj in render.render(wanted)
        if api.serves(obj["apiVersion"], obj["kind"])
    }
    denied = []
    for api_version, kind, namespace in sorted(kinds):
        group, _, version = api_version.rpartition("/")
        resource = api.resource(api_version, kind).plural
        asked = {"group": group, "version": version, "resource": resource, "namespace": namespace}
        if verbs := [verb for verb in _VERBS if not allowed(api, {**asked, "verb": verb})]:
            where = f" in {namespace}" if namespace else ""
            denied.append(f"{', '.join(verbs)}: {resource}{f'.{group}' if group else ''}{where}")
    return wrong_if(
        denied, "install as a cluster administrator, or have these verbs granted: kubectl auth can-i --list"
    )


def allowed(api: "Api", attributes: dict[str, str]) -> bool:
    """Whether we may do that."""
    import msgspec

    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = api.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=review)
    status = msgspec.json.decode(answer).get("status") or {}
    return bool(status.get("allowed"))


def judge_nodes(nodes: list[Object]) -> Outcome:
    """Of what they tell themselves: system, kernel, whether they are ready."""
    if not nodes:
        return Outcome(Result.WARNING, ["the cluster has no nodes"], "add a node, or nothing will run")
    wrong, unsure = [], []
    for node in nodes:
        name, info = node["metadata"]["name"], (node.get("status") or {}).get("nodeInfo") or {}
        if info.get("operatingSystem", "linux") != "linux":
            unsure.append(f"{name}: {info['operatingSystem']} nodes stay outside the mesh")
            continue
        kernel = re.match(r"(\d+)\.(\d+)", info.get("kernelVersion", ""))
        least = ".".join(map(str, LEAST_KERNEL))
        if kernel and (int(kernel[1]), int(kernel[2])) < LEAST_KERNEL:
            wrong.append(f"{name}: kernel {info['kernelVersion']} is older than {least}")
        conditions = (node.get("status") or {}).get("conditions") or ()
        ready: dict[str, str] = next((each for each in conditions if each["type"] == "Ready"), {})
        if ready.get("status") != "True":
            unsure.append(f"{name}: is not ready: {ready.get('message', 'its kubelet has said nothing')}")
    if wrong:
        return wrong_if(wrong, "upgrade these nodes' kernels: nftables and network namespaces are needed")
    return wrong_if(unsure, "look with: kubectl describe node", Result.WARNING)


def _others(api: "Api", wanted: Settings) -> Outcome:
    """Objects by our names that somebody else has brought."""
    taken = []
    for obj in render.render(wanted):
        if obj["kind"] in ("Namespace", "CustomResourceDefinition"):
            continue
        live = api.get(*ref_of(obj))
        if live is not None and not ours(live):
            taken.append(f"{told(ref_of(obj))} is of another installation")
    return wrong_if(taken, "remove it first, for example with: istioctl uninstall --purge")


def _definitions(api: "Api", wanted: Settings) -> Outcome:
    """Definitions of Istio and the Gateway API that are there already."""
    unusable = []
    for obj in (*render.definitions(render.render(wanted)), *render.gateway_api()):
        live = api.get(*ref_of(obj))
        if live is None or ours(live):
            continue
        served = {version["name"] for version in live["spec"]["versions"] if version.get("served")}
        known = {version["name"] for version in obj["spec"]["versions"]}
        if not served & known:
            unusable.append(f"{told(ref_of(obj))} serves {', '.join(sorted(served))}")
    return wrong_if(unusable, "upgrade these definitions; this version reads v1 and v1beta1", Result.WARNING)


def _neighbours(api: "Api") -> Outcome:
    """Other meshes: pods with sidecars stay as they are, and do not join."""
    import msgspec

    namespaces = [msgspec.convert(obj, Namespace) for obj in api.list("v1", "Namespace")]
    hints = [f"{hint.object}: {hint.message}; {hint.remedy}" for hint in sidecars(namespaces, ())]
    found = survey(api)
    for plane in api.list("apps/v1", "Deployment", label_selector="app=istiod"):
        if plane["metadata"]["namespace"] != NAMESPACE or not (found.planes or ours(plane)):
            hints.append(f"{told(ref_of(plane))}: another Istio runs here")
    for plane in api.list(
        "apps/v1", "Deployment", label_selector="linkerd.io/control-plane-component=destination"
    ):
        hints.append(f"{told(ref_of(plane))}: Linkerd runs here")
    return wrong_if(
        hints, "a pod is never in two meshes: move them one by one (docs/install.md)", Result.WARNING
    )


def _primary_cni(api: "Api") -> Outcome:
    """Cilium by itself removes other plugins, and load-balances before our redirection sees a connection."""
    config = api.get("v1", "ConfigMap", "kube-system", "cilium-config")
    if config is None:
        return ok()
    data = config.get("data") or {}
    wrong = []
    if data.get("cni-exclusive", "true") == "true":
        wrong.append("cilium-config: cni-exclusive is true: Cilium takes our plugin out of the chain")
    replacement = data.get("kube-proxy-replacement", "false") not in ("false", "disabled")
    if replacement and data.get("bpf-lb-sock-hostns-only", "false") != "true":
        wrong.append("cilium-config: socket load balancing in pods hides Services from the mesh")
    return wrong_if(
        wrong, "set Cilium's values cni.exclusive=false and socketLB.hostNamespaceOnly=true", Result.WARNING
    )
