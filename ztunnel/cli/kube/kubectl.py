"""What is kubectl's to do, handed over to it: a terminal in a pod."""

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ztunnel.cli.errors import UserError

if TYPE_CHECKING:
    from ztunnel.cli.target import Cluster


def command(cluster: "Cluster", *words: str) -> list[str]:
    """The command line of kubectl for a cluster."""
    argv = ["kubectl"]
    if cluster.kubeconfig is not None:
        argv += ["--kubeconfig", str(cluster.kubeconfig)]
    if cluster.context is not None:
        argv += ["--context", cluster.context]
    return [*argv, *words]


def execute(
    cluster: "Cluster", namespace: str | None, target: str, container: str | None, argv: Sequence[str]
) -> int:
    """Run a program in a pod in place of this process, with this terminal. Raises UserError, ApiError."""
    from ztunnel.cli.kube.mesh import ClusterMesh
    from ztunnel.cli.session import container_of

    kind, slash, name = target.partition("/")
    if slash and kind in ("node", "nodes", "no"):
        raise UserError(
            "a program cannot be run on a node of a cluster from here",
            f"use: {' '.join(command(cluster, 'debug', f'node/{name}', '-it', '--image=IMAGE'))}",
        )
    mesh = ClusterMesh.find(cluster)
    pod = mesh.pod(namespace or mesh.default_namespace, target)
    words = ["exec", "-n", pod.namespace, pod.name, "-c", container_of(pod, container), "-i"]
    if sys.stdin.isatty() and sys.stdout.isatty():
        words.append("-t")
    line = command(cluster, *words, "--", *argv)
    if shutil.which(line[0]) is None:
        raise UserError(
            "kubectl is not installed here, and runs programs in pods", f"install it, then: {' '.join(line)}"
        )
    sys.stdout.flush()
    os.execvp(line[0], line)  # noqa: S606 (it takes this process's place, and its terminal)
