"""Taking an installation out of a cluster again, in the order in which nothing is left behind.

Node agents go first and take their pods out of the mesh while everything else still works; then the node proxies, the
control plane, and what it wrote; last the definitions and the namespace.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from ztunnel.cli.install import render
from ztunnel.cli.install.render import Object
from ztunnel.cli.install.settings import NAMESPACE
from ztunnel.cli.install.survey import OURS, Ref, ours, ref_of, told
from ztunnel.cli.install.waiting import Deadline, until
from ztunnel.store.gateways import MESH_CONTROLLER, WAYPOINT_CLASS

if TYPE_CHECKING:
    from ztunnel.cli.install.progress import Progress
    from ztunnel.store.kube.api import Api

REDIRECTION: Final = "ambient.istio.io/redirection"
_EVERYWHERE: Final = ("istio-ca-root-cert", "istio-ca-crl")
_KEYS: Final = ("istio-ca-secret", "istio-ca-state")
"""Secrets of the mesh's own authority; `cacerts` is the user's."""
_DEFINITION: Final = ("apiextensions.k8s.io/v1", "CustomResourceDefinition")
_GATEWAY: Final = "gateway.networking.k8s.io/v1"

# Kinds that an installation has objects of, in the order in which they go. Agents are first: see above.
_ORDER: Final = [
    ("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration"),
    ("apps/v1", "DaemonSet"),
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("policy/v1", "PodDisruptionBudget"),
    ("apps/v1", "Deployment"),
    ("v1", "Service"),
    ("v1", "ConfigMap"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
    ("rbac.authorization.k8s.io/v1", "ClusterRole"),
    ("v1", "ServiceAccount"),
]
_WORKLOADS: Final = ("DaemonSet", "Deployment")


def in_order(refs: Iterable[Ref]) -> list[Ref]:
    """Objects in the order in which they go."""
    kinds = [kind for _, kind in _ORDER]
    return sorted(
        refs, key=lambda ref: (kinds.index(ref[1]) if ref[1] in kinds else len(kinds), ref[3] == "ztunnel")
    )


def remove(api: "Api", ref: Ref, deadline: Deadline, progress: "Progress") -> bool:
    """Delete one object of ours, a workload together with its pods; whether there was one."""
    live = api.get(*ref)
    if live is None or not ours(live):
        return False
    workload = ref[1] in _WORKLOADS
    # Foreground: the workload is seen to be going while its pods end, which is what agents leave their nodes clean for.
    api.delete(*ref, propagation="Foreground" if workload else "Background")
    if workload:
        selector = ",".join(
            f"{key}={value}" for key, value in live["spec"]["selector"]["matchLabels"].items()
        )

        def look() -> str:
            pods = len(api.list("v1", "Pod", ref[2], selector))
            if pods:
                return f"{told(ref)}: {pods} pods are ending"
            return f"{told(ref)}: is ending" if api.get(*ref) is not None else ""

        if missing := until(look, deadline, progress):
            progress.warn(f"{missing} still; look with: kubectl get pods -n {ref[2]} -o wide")
    return True


class Removal:
    """One uninstallation; `changes` says what was deleted, `left` what could not be."""

    def __init__(self, api: "Api", progress: "Progress", *, timeout: float = 300.0) -> None:
        self.api = api
        self.progress = progress
        self.deadline = Deadline(timeout)
        self.changes: list[Ref] = []
        self.left: list[str] = []

    def revision(self, name: str) -> None:
        """Remove one control plane; what the nodes have stays."""
        label = f"{OURS},{render.REVISION}={name}"
        with self.progress.step(f"Control plane (revision {name})"):
            for api_version, kind in _ORDER:
                for obj in self._listed(api_version, kind, label):
                    if obj["metadata"]["labels"].get(render.COMPONENT) in ("Pilot", "Record"):
                        self._delete(ref_of(obj))
            self._delete(("coordination.k8s.io/v1", "Lease", NAMESPACE, lease_of(name)), whose=True)

    def purge(self) -> None:
        """Remove all of it, and whatever it has written anywhere."""
        with self.progress.step("Webhooks"):
            self._all("ValidatingWebhookConfiguration")
        self.nodes()
        with self.progress.step("Waypoints"):
            self._waypoints()
        with self.progress.step("Control planes"):
            for _, kind in _ORDER[2:]:
                self._all(kind)
            self._written()
        with self.progress.step("Definitions"):
            for obj in self.api.list(*_DEFINITION, label_selector=OURS):
                if ours(obj):
                    self._delete(ref_of(obj))
            self._gone(*_DEFINITION)
        with self.progress.step("Namespace"):
            self._namespace()

    def nodes(self) -> None:
        """Take every pod out of the mesh, then remove the nodes' parts."""
        with self.progress.step("Node agents and proxies"):
            for ref in in_order(map(ref_of, self._listed("apps/v1", "DaemonSet", OURS))):
                self._delete(ref)
            self._marks()

    # Parts.

    def _delete(self, ref: Ref, *, whose: bool = False) -> None:
        """Delete an object of ours; with `whose` one that is known to be, label or not."""
        done = self.api.delete(*ref) if whose else remove(self.api, ref, self.deadline, self.progress)
        if done:
            self.changes.append(ref)
            self.progress.changed(told(ref), "deleted")

    def _listed(self, api_version: str, kind: str, label: str) -> list[Object]:
        # Waypoints have the label of what they are part of, too; they belong to their Gateways.
        namespaced = self.api.resource(api_version, kind).namespaced
        return self.api.list(api_version, kind, NAMESPACE if namespaced else "", label)

    def _all(self, kind: str) -> None:
        api_version = next(version for version, name in _ORDER if name == kind)
        for obj in self._listed(api_version, kind, OURS):
            self._delete(ref_of(obj))

    def _waypoints(self) -> None:
        """Gateways that only this mesh could serve. Their Deployments and Services go with them."""
        if not self.api.serves(_GATEWAY, "Gateway"):
            return
        for obj in self.api.list(_GATEWAY, "Gateway"):
            if obj["spec"].get("gatewayClassName") == WAYPOINT_CLASS:
                self._delete(ref_of(obj), whose=True)
        made = self.api.get(_GATEWAY, "GatewayClass", "", WAYPOINT_CLASS)
        if made is not None and made["spec"].get("controllerName") == MESH_CONTROLLER:
            self._delete(ref_of(made), whose=True)

    def _written(self) -> None:
        """What the control planes have written: keys, leases, the root certificate in every namespace."""
        for lease in self.api.list("coordination.k8s.io/v1", "Lease", NAMESPACE):
            if is_lease(lease["metadata"]["name"]):
                self._delete(ref_of(lease), whose=True)
        for name in _KEYS:
            self._delete(("v1", "Secret", NAMESPACE, name), whose=True)
        path = self.api.path("v1", "ConfigMap")
        for name in _EVERYWHERE:
            found = self.api.get_json(path, fieldSelector=f"metadata.name={name}")
            for item in found.get("items") or ():
                self._delete(("v1", "ConfigMap", item["metadata"]["namespace"], name), whose=True)

    def _marks(self) -> None:
        """The annotation of pods that an agent did not take out: a node that is not there, an agent that was killed."""
        for pod in self.api.list("v1", "Pod"):
            metadata = pod["metadata"]
            if REDIRECTION not in (metadata.get("annotations") or {}):
                continue
            what = f"Pod {metadata['namespace']}/{metadata['name']}"
            self.api.patch(
                "v1",
                "Pod",
                metadata["namespace"],
                metadata["name"],
                {"metadata": {"annotations": {REDIRECTION: None}}},
            )
            node = pod["spec"].get("nodeName", "")
            if (pod.get("status") or {}).get("phase") in ("Running", "Pending"):
                self.left.append(
                    f"{what} on node {node}: its agent did not take it out of the mesh, so that its connections may "
                    "still be redirected to a proxy that is gone; delete the pod, and its owner makes a new one"
                )

    def _gone(self, api_version: str, kind: str) -> None:
        """Wait until those of ours are no longer there."""

        def look() -> str:
            left = [
                told(ref_of(obj))
                for obj in self.api.list(api_version, kind, label_selector=OURS)
                if ours(obj)
            ]
            return f"{left[0]}: is ending" if left else ""

        if missing := until(look, self.deadline, self.progress):
            self.left.append(
                f"{missing} still; an object of it may have a finalizer: kubectl get crd -o yaml"
            )

    def _namespace(self) -> None:
        ref = ("v1", "Namespace", "", NAMESPACE)
        live = self.api.get(*ref)
        if live is None:
            return
        if not ours(live):
            self.progress.say(f"  {told(ref)} stays: it was there before")
            return
        if others := self._others():
            self.progress.say(
                f"  {told(ref)} stays: {', '.join(others)} in it {'is' if len(others) == 1 else 'are'} not ours"
            )
            return
        self._delete(ref)

        def look() -> str:
            return f"{told(ref)}: is ending" if self.api.get(*ref) is not None else ""

        if missing := until(look, self.deadline, self.progress):
            self.left.append(
                f"{missing} still; what keeps it is in: kubectl get namespace {NAMESPACE} -o yaml"
            )

    def _others(self) -> list[str]:
        """What somebody else has put into the mesh's namespace: a user's own authority (cacerts), another program."""
        found = []
        for api_version, kind in (
            ("v1", "Secret"), ("v1", "ConfigMap"), ("apps/v1", "Deployment"), ("apps/v1", "DaemonSet"),
            ("apps/v1", "StatefulSet"), ("v1", "Pod"), ("v1", "PersistentVolumeClaim"), ("v1", "Service"),
        ):  # fmt: skip
            for obj in self.api.list(api_version, kind, NAMESPACE):
                ignored = obj["metadata"]["name"] in ("kube-root-ca.crt", *_EVERYWHERE) or obj.get(
                    "type"
                ) == ("kubernetes.io/service-account-token")
                if not ignored and not ours(obj) and not obj["metadata"].get("deletionTimestamp"):
                    found.append(told(ref_of(obj)))
        return found


def lease_of(revision: str) -> str:
    """The Lease of a control plane's writer."""
    return "istio-leader" if revision == "default" else f"istio-leader-{revision}"


def is_lease(name: str) -> bool:
    """Whether a Lease is that of some control plane's writer."""
    return name == "istio-leader" or name.startswith("istio-leader-")


def resources(api: "Api") -> Counter[str]:
    """How many objects there are of each kind whose definition is ours: they go with it."""
    found: Counter[str] = Counter()
    for definition in api.list(*_DEFINITION, label_selector=OURS):
        if ours(definition):
            spec: dict[str, Any] = definition["spec"]
            version = next(each["name"] for each in spec["versions"] if each.get("storage"))
            number = len(api.list(f"{spec['group']}/{version}", spec["names"]["kind"]))
            if number:
                found[spec["names"]["kind"]] += number
    return found


def members(api: "Api") -> int:
    """How many pods are in the mesh."""
    return sum(REDIRECTION in (pod["metadata"].get("annotations") or {}) for pod in api.list("v1", "Pod"))
