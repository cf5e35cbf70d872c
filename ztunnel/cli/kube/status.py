"""`ambient status` on a cluster: the mesh's pods, and how many pods of each namespace are in it."""

import datetime
from typing import TYPE_CHECKING, Any

from ztunnel.cli.kube.mesh import AGENT, CONTROL_PLANE, PROXY, SYSTEM, ClusterMesh, part_of
from ztunnel.cli.tables import age, pod_ready, pod_status, render, restarts

if TYPE_CHECKING:
    from ztunnel.cli.target import Cluster
    from ztunnel.store.models import Pod

MOST_PODS = 20  # shown by name where something is wrong with them


def read(cluster: "Cluster") -> dict[str, Any]:
    """The state of the mesh, as plain data. Raises UserError, ApiError."""
    from ztunnel.cli.checks.facts import pod_facts
    from ztunnel.store.membership import MODE_LABEL
    from ztunnel.store.models import Namespace

    mesh = ClusterMesh.find(cluster)
    parts = [
        _described(process, pod)
        for process, label in (("istiod", CONTROL_PLANE), ("agent", AGENT), ("ztunnel", PROXY))
        for pod in mesh.part(label)
    ]
    if not parts:
        raise mesh.not_installed("istiod")
    pods = pod_facts(mesh.objects)
    spaces: list[dict[str, Any]] = []
    for namespace in sorted(mesh.objects.list(Namespace), key=lambda each: each.name):
        own = [pod for pod in pods if pod.name.partition("/")[0] == namespace.name]
        mode = namespace.metadata.labels.get(MODE_LABEL, "")
        if mode or any(pod.joined or pod.wanted for pod in own):
            spaces.append(
                {
                    "name": namespace.name,
                    "mode": mode,
                    "pods": len(own),
                    "mesh": sum(pod.joined for pod in own),
                    "outside": sum(pod.wanted and not pod.joined for pod in own),
                }
            )
    outside = [
        {"pod": pod.name, "node": pod.node, "phase": pod.phase, "message": pod.error or pod.message}
        for pod in pods
        if pod.error or (pod.wanted and not pod.joined)
    ]
    return {
        "server": mesh.api.server,
        "context": cluster.context,
        "kubeconfig": str(cluster.kubeconfig) if cluster.kubeconfig else None,
        "parts": parts,
        "namespaces": spaces,
        "outside": outside,
        "at": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def text(status: dict[str, Any], cluster: "Cluster") -> str:
    """The state for people."""
    rows = [["COMPONENT", "POD", "NODE", "READY", "STATUS", "RESTARTS", "AGE", "IMAGE"]]
    for part in status["parts"]:
        ready = "yes" if part["ready"] else "no"
        rows.append(
            [part["part"], part["pod"], part["node"] or "-", ready, part["status"], str(part["restarts"]), part["age"],
             part["image"]]
        )  # fmt: skip
    sections = [f"mesh of {cluster} at {status['server']}, namespace {SYSTEM}", render(rows)]
    if status["namespaces"]:
        rows = [["NAMESPACE", "MODE", "PODS", "IN THE MESH", "OUTSIDE"]]
        for space in status["namespaces"]:
            numbers = [str(space[name]) for name in ("pods", "mesh", "outside")]
            rows.append([space["name"], space["mode"] or "-", *numbers])
        sections.append(render(rows))
    else:
        sections.append(
            "no namespace is in the mesh; bring one in with: "
            "kubectl label namespace NAME istio.io/dataplane-mode=ambient"
        )
    if status["outside"]:
        rows = [["POD", "NODE", "STATUS", "WHY"]]
        for pod in status["outside"][:MOST_PODS]:
            why = pod["message"] or "its node agent has not said yet"
            rows.append([pod["pod"], pod["node"] or "-", pod["phase"] or "Pending", why])
        more = len(status["outside"]) - MOST_PODS
        sections.append(
            "not as their labels ask:\n" + render(rows) + (f"\nand {more} more" if more > 0 else "")
        )
    return "\n\n".join(sections)


def _described(process: str, pod: "Pod") -> dict[str, Any]:
    part = part_of(process, pod.spec.node_name)
    return {
        "part": part.removeprefix("mesh/"),
        "pod": pod.name,
        "node": pod.spec.node_name,
        "ready": pod_ready(pod),
        "status": pod_status(pod),
        "restarts": restarts(pod),
        "age": age(pod),
        "image": next((container.image for container in pod.spec.containers), ""),
        "revision": pod.metadata.labels.get("istio.io/rev", ""),
    }
