"""What of an installation is in a cluster already: control planes by revision, the nodes' parts, records."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import yaml

from ztunnel.cli.install import render
from ztunnel.cli.install.render import Object
from ztunnel.cli.install.settings import DEFAULT_REVISION, NAMESPACE

if TYPE_CHECKING:
    from ztunnel.store.kube.api import Api

OURS: Final = f"{render.PART_OF}={render.PART}"
_RECORD: Final = "ambient-installation"

Ref = tuple[str, str, str, str]
"""apiVersion, kind, namespace and name of an object."""


def ref_of(obj: Object) -> Ref:
    """What identifies an object."""
    metadata = obj["metadata"]
    return obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"]


def told(ref: Ref) -> str:
    """How people are told of it."""
    _, kind, namespace, name = ref
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


def ours(obj: Object) -> bool:
    """Whether an object in the cluster is of an installation of this mesh, however it was applied.

    A definition that Helm or another's installer has taken over since is theirs.
    """
    labels = obj["metadata"].get("labels") or {}
    if labels.get(render.PART_OF) != render.PART:
        return False
    return labels.get("app.kubernetes.io/managed-by") != "Helm" and "chart" not in labels


@dataclass(frozen=True)
class Record:
    """What a control plane was installed with: its settings, the version of `ambient`, and the objects."""

    revision: str
    spec: dict[str, Any]
    version: str
    objects: tuple[Ref, ...]

    def object(self) -> Object:
        """The ConfigMap that keeps it."""
        lines = "".join(f"{' '.join(part or '-' for part in ref)}\n" for ref in self.objects)
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": _RECORD if self.revision == DEFAULT_REVISION else f"{_RECORD}-{self.revision}",
                "namespace": NAMESPACE,
                "labels": {
                    render.PART_OF: render.PART,
                    render.COMPONENT: "Record",
                    render.REVISION: self.revision,
                },
            },
            "data": {
                "version": self.version,
                "spec": yaml.safe_dump(self.spec, sort_keys=True),
                "objects": lines,
            },
        }

    @classmethod
    def of(cls, config: Object) -> "Record":
        """The record in a ConfigMap; what is not readable in it is empty."""
        data = config.get("data") or {}
        try:
            spec = yaml.safe_load(data.get("spec", ""))
        except yaml.YAMLError:
            spec = None
        objects = []
        for line in data.get("objects", "").splitlines():
            parts = ["" if part == "-" else part for part in line.split(" ")]
            if len(parts) == 4:
                objects.append((parts[0], parts[1], parts[2], parts[3]))
        revision = (config["metadata"].get("labels") or {}).get(render.REVISION, DEFAULT_REVISION)
        return cls(revision, spec if isinstance(spec, dict) else {}, data.get("version", ""), tuple(objects))


@dataclass
class Survey:
    """`planes` are the control planes' Deployments and `records` what they were installed with, by revision.

    `default` is the revision that also serves whoever names none ("" if there is none such); `proxies` and `agents`
    are the nodes' DaemonSets.
    """

    planes: dict[str, Object] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    default: str = ""
    proxies: Object | None = None
    agents: Object | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is installed."""
        return not self.planes and not self.records and self.proxies is None and self.agents is None

    @property
    def node_revision(self) -> str:
        """The revision that the node proxies follow, "" if there are none."""
        if self.proxies is None:
            return ""
        return str((self.proxies["metadata"].get("labels") or {}).get(render.REVISION, DEFAULT_REVISION))

    def newest(self, but: str) -> str:
        """Of the other control planes the default one, else the youngest; "" if there is none."""
        others = {name: plane for name, plane in self.planes.items() if name != but}
        if DEFAULT_REVISION in others:
            return DEFAULT_REVISION
        return max(others, key=lambda name: others[name]["metadata"].get("creationTimestamp", ""), default="")


def survey(api: "Api") -> Survey:
    """Look. Raises ApiError."""
    found = Survey()
    for plane in api.list("apps/v1", "Deployment", NAMESPACE, f"{OURS},app=istiod"):
        found.planes[plane["metadata"]["labels"].get(render.REVISION, DEFAULT_REVISION)] = plane
    for config in api.list("v1", "ConfigMap", NAMESPACE, f"{OURS},{render.COMPONENT}=Record"):
        record = Record.of(config)
        found.records[record.revision] = record
    for daemons in api.list("apps/v1", "DaemonSet", NAMESPACE, OURS):
        if daemons["metadata"]["name"] == "ztunnel":
            found.proxies = daemons
        elif daemons["metadata"]["name"] == "istio-cni-node":
            found.agents = daemons
    kind = ("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration")
    for webhook in api.list(*kind, label_selector=OURS):
        if render.serves_unlabelled(webhook):
            found.default = webhook["metadata"]["labels"].get(render.REVISION, DEFAULT_REVISION)
    if not found.default and DEFAULT_REVISION in found.planes:
        found.default = DEFAULT_REVISION
    return found
