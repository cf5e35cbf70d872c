"""What the programs of a cluster's pods have printed, as the nodes' kubelets keep it."""

import sys
from typing import TYPE_CHECKING

from ztunnel.cli.errors import UserError
from ztunnel.cli.kube.mesh import AGENT, CONTROL_PLANE, PROXY, ClusterMesh, serving
from ztunnel.cli.session import container_of

if TYPE_CHECKING:
    from ztunnel.cli.target import Cluster
    from ztunnel.store.models import Pod


def copy(
    cluster: "Cluster",
    namespace: str | None,
    target: str,
    container: str | None,
    *,
    follow: bool,
    tail: int | None,
) -> None:
    """Print a pod's log, and what is added to it if `follow`. Raises UserError, ApiError."""
    mesh = ClusterMesh.find(cluster)
    kind, slash, name = target.partition("/")
    part = slash and kind == "mesh"
    pod = _part(mesh, name) if part else mesh.pod(namespace or mesh.default_namespace, target)
    query = {"container": container_of(pod, container)}
    if follow:
        query["follow"] = "true"
    if tail is not None:
        query["tailLines"] = str(tail)
    path = mesh.api.path("v1", "Pod", pod.namespace, pod.name, "log")
    output = sys.stdout.buffer
    if not follow:
        output.write(mesh.api.request("GET", path, query=query, accept="*/*"))
        output.flush()
        return
    for line in mesh.api.stream(path, query, accept="*/*"):
        output.write(line + b"\n")
        output.flush()


def _part(mesh: ClusterMesh, name: str) -> "Pod":
    """The pod of a part of the mesh: controlplane, ztunnel-NODE, agent-NODE."""
    if name == "controlplane":
        pods = mesh.part(CONTROL_PLANE)
        if not pods:
            raise mesh.not_installed("istiod")
        return serving(pods)
    part, dash, node = name.partition("-")
    label = {"ztunnel": PROXY, "agent": AGENT}.get(part)
    on_node = [pod for pod in mesh.part(label) if pod.spec.node_name == node] if label and dash else []
    if not on_node:
        known = ["controlplane"]
        for word, each in (("agent", AGENT), ("ztunnel", PROXY)):
            known += sorted({f"{word}-{pod.spec.node_name}" for pod in mesh.part(each) if pod.spec.node_name})
        raise UserError(f'the mesh has no part "{name}"', f"it has: {', '.join(known)}")
    return serving(on_node)
