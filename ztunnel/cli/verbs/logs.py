"""`ambient logs`: what a pod's programs have printed."""

import contextlib
import sys
import time
from pathlib import Path

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import container_option, target_namespace_option, target_options
from ztunnel.cli.target import Which

CHUNK = 64 * 1024
POLL = 0.2  # seconds between looks at a log that is followed


@click.command(
    "logs",
    cls=Examples,
    short_help="Print what a pod's programs wrote.",
    examples=(
        "ambient logs deploy/reviews-v2",
        "ambient logs ratings --tail 20 -f",
        "ambient logs web -n shop -c sidecar",
        "ambient logs mesh/ztunnel-node-1    # the mesh's own: ztunnel-NODE, agent-NODE, controlplane",
    ),
)
@click.argument("target", metavar="POD|deploy/NAME|mesh/PART")
@target_namespace_option()
@container_option()
@click.option("-f", "--follow", is_flag=True, help="Go on printing what is added, until Ctrl-C.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@target_options()
def command(
    target: str, namespace: str | None, container: str | None, follow: bool, tail: int | None, which: Which
) -> None:
    """Print the standard output and standard error of a pod's container, as far as it is kept.

    POD may be the beginning of a pod's name where only one begins so. mesh/PART prints the log of one of the mesh's
    own processes: mesh/controlplane, mesh/ztunnel-node-1, mesh/agent-node-1; in a cluster, of its pods on that node.
    """
    from ztunnel.cli.session import EmbeddedMesh, container_of
    from ztunnel.cli.target import Embedded

    where = which.target()
    if not isinstance(where, Embedded):
        from ztunnel.cli.kube.logs import copy

        copy(where, namespace, target, container, follow=follow, tail=tail)
        return
    state = where.state
    mesh = EmbeddedMesh.find(state)
    kind, slash, name = target.partition("/")
    if slash and kind == "mesh":
        parts = {path.stem: path for path in (state / "logs").glob("*.log")}
        if name not in parts:
            raise UserError(
                f'the mesh has no part "{name}"', f"it has: {', '.join(sorted(parts)) or 'no logs yet'}"
            )
        path = parts[name]
    else:
        pod = mesh.pod(namespace or mesh.default_namespace, target)
        chosen = container_of(pod, container)
        path = state / "logs" / "pods" / f"{pod.namespace}_{pod.name}_{chosen}.log"
        if not path.exists() and not follow:
            message = pod.status.message or f"it is {pod.status.phase or 'Pending'}"
            raise UserError(f"pod {pod.name} has printed nothing yet: {message}", "see: ambient status")
    _copy(path, tail, follow)


def _copy(path: Path, tail: int | None, follow: bool) -> None:
    """Write the file (its last `tail` lines) to standard output, and what is added to it if `follow`."""
    output = sys.stdout.buffer
    position = _start_of_tail(path, tail)
    while True:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if file.seek(0, 2) < position:
                position = 0  # it was made anew
            file.seek(position)
            while data := file.read(CHUNK):
                output.write(data)
                position += len(data)
        output.flush()
        if not follow:
            return
        time.sleep(POLL)


def _start_of_tail(path: Path, tail: int | None) -> int:
    if tail is None or not path.exists():
        return 0
    data = path.read_bytes()
    position = len(data)
    if data.endswith(b"\n") and tail:
        position -= 1
    for _ in range(tail):
        position = data.rfind(b"\n", 0, position)
        if position < 0:
            return 0
    return position + 1 if tail else position
