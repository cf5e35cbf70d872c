"""What `ambient check` asks about: the machine, the mesh's processes, their pages, the kernel. Gathers, never judges.

Everything is asked at once, each with a limit of its own: what does not answer is a fact, too.
"""

import json
import os
import resource
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ztunnel.cli.session import Objects
    from ztunnel.store.models import Pod
    from ztunnel.store.problems import Problem

PATIENCE = 5.0  # seconds for a page
STARTING = 30.0  # seconds in which a pod need not be ready yet
_ON_ITS_WAY = frozenset({"", "Pending", "ContainerCreating", "PodInitializing", "Running"})
MACHINE_PATIENCE = 60.0  # seconds for the machine to be tried out
NODE_SECTIONS = (
    "version",
    "pid",
    "time",
    "ready",
    "xds",
    "agent",
    "pods",
    "certificates",
    "workers",
)


@dataclass
class NodeFacts:
    """One node's proxy: its page's sections, or why it does not answer; `state` is the kernel's letter for it."""

    name: str
    dump: dict[str, Any] | None = None
    error: str = ""
    pid: int = 0
    state: str = ""


@dataclass
class PodFacts:
    """A pod as its object says it is. `wanted`: it shall be in the mesh, `joined`: the node agent says that it is.

    `state` is the word for it, as `kubectl get pods` has it; `starting`: it is new, and nothing is known to keep it
    from running.
    """

    uid: str
    name: str
    node: str
    wanted: bool
    joined: bool
    error: str
    phase: str
    ready: bool
    message: str
    state: str = ""
    starting: bool = False


@dataclass
class Facts:
    """Everything that is judged. Where something could not be had, its `..._error` says why, and it is None."""

    now: float = 0.0  # when gathering began, Unix seconds
    ended: float = 0.0  # when it was over
    version: str = ""
    python: tuple[int, ...] = ()
    machine: dict[str, str] = field(default_factory=dict)
    open_files: int = 0
    state_error: str = ""
    port_error: str = ""
    mesh_error: str = ""
    status: dict[str, Any] | None = None
    control: dict[str, Any] | None = None
    control_error: str = ""
    control_state: str = ""
    nodes: list[NodeFacts] = field(default_factory=list)
    pods: list[PodFacts] = field(default_factory=list)
    kernel: dict[str, Any] | None = None
    kernel_error: str = ""
    problems: list["Problem"] = field(default_factory=list)


def gather(state: Path, *, pre: bool) -> Facts:
    """Ask for everything; with `pre` only what can be known before a mesh runs."""
    import sys

    from ztunnel import __version__

    facts = Facts(now=time.time(), version=__version__, python=sys.version_info[:3])
    facts.open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with ThreadPoolExecutor() as threads:
        waited = [threads.submit(_machine, facts)]
        if pre:
            waited.append(threads.submit(_before, facts, state))
        else:
            _mesh(facts, state, lambda *work: waited.append(threads.submit(*work)))
        for one in waited:
            one.result()
    facts.ended = time.time()
    return facts


def _machine(facts: Facts) -> None:
    from ztunnel.cli.inside import command

    try:
        done = subprocess.run(
            command("ztunnel.cli.checks.machine"), capture_output=True, timeout=MACHINE_PATIENCE, check=True
        )
        facts.machine = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        facts.machine = {"namespaces": f"it could not be tried: {error}"}


def _before(facts: Facts, state: Path) -> None:
    from ztunnel.embedded.statedir import State, StateError

    try:
        State(state).check()
        above = next(path for path in (state, *state.parents) if path.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            facts.state_error = f"{above} cannot be written to; give another directory with --state DIR"
    except StateError as error:
        facts.state_error = str(error)
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", 15012))
    except OSError as error:
        facts.port_error = str(error.strerror or error)


def _mesh(facts: Facts, state: Path, ask: Callable[..., object]) -> None:
    from ztunnel.cli.errors import UserError
    from ztunnel.cli.nodes import control_plane, nodes
    from ztunnel.cli.session import EmbeddedMesh

    try:
        mesh = EmbeddedMesh.find(state)
        facts.status = mesh.client.status()
        found = nodes(state)
    except (UserError, OSError) as error:
        facts.mesh_error = str(error)
        return
    status = facts.status
    facts.problems = status["problems"]
    facts.pods = pod_facts(mesh.objects)
    facts.control_state = process_state(status["controlplane"]["pid"])
    plane = control_plane(state)

    def control() -> None:
        try:
            facts.control = plane.dump(timeout=PATIENCE)
        except UserError as error:
            facts.control_error = error.message

    def kernel() -> None:
        from ztunnel.cli.inside import command, run

        port = status["controlplane"]["port"]
        words = command("ztunnel.cli.checks.kernel", str(state), str(status["pid"]), str(port))
        try:
            done = run(mesh.client, words, timeout=MACHINE_PATIENCE)
            facts.kernel = json.loads(done.stdout)
        except (UserError, OSError, ValueError) as error:
            facts.kernel_error = str(error)
        if facts.kernel is None and not facts.kernel_error:
            facts.kernel_error = "no answer"

    def node(one: NodeFacts, index: int) -> None:
        try:
            one.dump = found[index].dump(*NODE_SECTIONS, timeout=PATIENCE)
        except UserError as error:
            one.error = error.message

    pids = {each["name"]: each["ztunnel"]["pid"] for each in status["nodes"]}
    for index, each in enumerate(found):
        pid = pids.get(each.name, 0)
        facts.nodes.append(NodeFacts(each.name, pid=pid, state=process_state(pid)))
        ask(node, facts.nodes[index], index)
    ask(control)
    ask(kernel)


def pod_facts(objects: "Objects") -> list[PodFacts]:
    """The pods that are not ending."""
    from ztunnel.cli.tables import pod_ready, pod_status, seconds_old
    from ztunnel.store.membership import in_mesh, redirection_error, wants_mesh
    from ztunnel.store.models import Namespace, Pod

    namespaces = {each.name: each for each in objects.list(Namespace)}

    def described(pod: "Pod") -> PodFacts:
        state = pod_status(pod)
        starting = state in _ON_ITS_WAY and not pod.status.message and seconds_old(pod) < STARTING
        return PodFacts(
            uid=pod.metadata.uid,
            name=f"{pod.namespace}/{pod.name}",
            node=pod.spec.node_name,
            wanted=wants_mesh(pod, namespaces.get(pod.namespace))
            and pod.status.phase not in ("Succeeded", "Failed"),
            joined=in_mesh(pod),
            error=redirection_error(pod),
            phase=pod.status.phase,
            ready=pod_ready(pod),
            message=pod.status.message,
            state=state,
            starting=starting,
        )

    return [described(pod) for pod in objects.list(Pod) if not pod.metadata.deletion_timestamp]


def process_state(pid: int) -> str:
    """The kernel's letter for what a process does (proc(5): R, S, D, T stopped, Z), "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if pid else ""
    except OSError:
        return ""
