"""What users of meshes with sidecars should know when they move here. Pure."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ztunnel.store.models import Namespace, Pod


class Hint(NamedTuple):
    """What was found on which object, and how to go on."""

    object: str
    message: str
    remedy: str


def sidecars(namespaces: "Iterable[Namespace]", pods: "Iterable[Pod]") -> list[Hint]:
    """Namespaces and pods that ask another mesh, or an older way of it, for sidecars."""
    from ztunnel.store.membership import MODE_AMBIENT, MODE_LABEL

    found = []
    for namespace in sorted(namespaces, key=lambda each: each.name):
        labels, annotations = namespace.metadata.labels, namespace.metadata.annotations
        ambient = labels.get(MODE_LABEL) == MODE_AMBIENT
        if labels.get("istio-injection") == "enabled":
            found.append(_hint(namespace, "istio-injection=enabled", "istio-injection", ambient))
        if annotations.get("linkerd.io/inject") in ("enabled", "ingress"):
            annotate = f"kubectl annotate namespace {namespace.name} linkerd.io/inject- && "
            found.append(
                _hint(
                    namespace, f"linkerd.io/inject={annotations['linkerd.io/inject']}", "", ambient, annotate
                )
            )
    for pod in sorted(pods, key=lambda each: (each.namespace, each.name)):
        names = {container.name for container in (*pod.spec.containers, *pod.spec.init_containers)}
        proxy = next((name for name in ("istio-proxy", "linkerd-proxy") if name in names), "")
        if proxy and names != {proxy}:  # alone it is a gateway, or a part of the mesh
            found.append(
                Hint(
                    pod.ref,
                    f"has a sidecar ({proxy}), which carries its traffic",
                    f"once nothing asks for sidecars: kubectl rollout restart deployment -n {pod.namespace}",
                )
            )
    return found


def _hint(namespace: "Namespace", mark: str, label: str, ambient: bool, before: str = "") -> Hint:
    words = [f"{label}-"] if label else []
    if not ambient:
        words.insert(0, "istio.io/dataplane-mode=ambient")
    command = f"kubectl label namespace {namespace.name} {' '.join(words)} && " if words else ""
    message = f"has {mark}, which asks for sidecars: this mesh has none"
    if ambient:
        message += ", and the namespace is in it already"
    return Hint(
        namespace.ref,
        message,
        f"to move its pods: {before}{command}kubectl rollout restart deployment -n {namespace.name}",
    )
