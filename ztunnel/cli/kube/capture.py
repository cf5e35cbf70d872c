"""`ambient capture` in a cluster: the program that captures runs in the node agent's pod, which may look into pods."""

import contextlib
import json
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from ztunnel.cli.errors import UserError
from ztunnel.cli.kube.mesh import AGENT, SYSTEM, ClusterMesh, serving
from ztunnel.cli.kube.sockets import ENDED, STDERR, STDOUT, Execution

if TYPE_CHECKING:
    from ztunnel.cli.target import Cluster

PROGRAM = ("python", "-P", "-m", "ztunnel.cli.wire.watch", "--until-eof")
MOST_WORDS = 2000  # characters of what a program said to standard error


def follow(
    cluster: "Cluster",
    target: str | None,
    node: str | None,
    namespace: str | None,
    words: Sequence[str],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Capture on the link of a pod or a node, and `show` what the program says until it ends; SIGINT and SIGTERM end it
    in order. Raises UserError, ApiError.
    """
    mesh = ClusterMesh.find(cluster)
    where: list[str] = []
    if node is None:
        pod = mesh.pod(namespace or mesh.default_namespace, str(target))
        if not pod.addresses or pod.status.phase != "Running":
            raise UserError(f"pod {pod.namespace}/{pod.name} does not run", "see: ambient get pods -A")
        if not pod.spec.host_network:
            where = ["--address", pod.addresses[0]]
        node = pod.spec.node_name
    agents = [each for each in mesh.part(AGENT) if each.spec.node_name == node]
    if not agents:
        names = sorted({each.spec.node_name for each in mesh.part(AGENT) if each.spec.node_name})
        raise UserError(
            f"there is no node agent on node {node!r}", f"there is one on: {', '.join(names) or 'no node'}"
        )
    agent = serving(agents)
    execution = Execution(
        mesh.api.access, SYSTEM, agent.name, agent.spec.containers[0].name, [*PROGRAM, *where, *words]
    )

    def stop(_number: int, _frame: FrameType | None) -> None:
        execution.send(b"\n")

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        _read(execution, show)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        execution.close()


def _read(execution: Execution, show: Callable[[dict[str, Any]], None]) -> None:
    pending, complaint = b"", b""
    for channel, data in execution:
        if channel == STDOUT:
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    show(json.loads(line))
        elif channel == STDERR:
            complaint = (complaint + data)[-MOST_WORDS:]
        elif channel == ENDED:
            status = json.loads(data)
            if status.get("status") != "Success" and complaint:
                raise UserError(
                    "the program that captures failed in the node agent's pod", detail=complaint.decode()
                )
