"""`ambient check` on a cluster: what is asked there, and the checks that only a cluster has. The others are judge.py's.

What may not be read for want of rights is a fact, too: it is told, and what needs it is skipped.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ztunnel.cli.checks import judge
from ztunnel.cli.checks.facts import NODE_SECTIONS, PATIENCE, Facts, NodeFacts, pod_facts
from ztunnel.cli.checks.outcome import PODS, Check, Outcome, Result, skipped, wrong_if
from ztunnel.cli.errors import UserError
from ztunnel.cli.hints import Hint, sidecars
from ztunnel.cli.kube.mesh import SYSTEM, ClusterMesh
from ztunnel.store.kube.errors import ApiError

if TYPE_CHECKING:
    from ztunnel.cli.nodes import Node
    from ztunnel.cli.target import Cluster

T = TypeVar("T")

CLUSTER = "cluster"
ROOT = "istio-ca-root-cert"
KINDS = (("security.istio.io/v1", "AuthorizationPolicy"), ("security.istio.io/v1", "PeerAuthentication"))
DAEMON_SETS = {"ztunnel": "node proxies", "istio-cni-node": "node agents"}
AT_ONCE = 16  # processes asked at the same time


@dataclass
class ClusterFacts(Facts):
    """What is known of a cluster. None, or nothing: it could not be asked for, and `denied` or an error says why."""

    server: str = ""
    server_error: str = ""
    server_version: str = ""
    denied: list[str] = field(default_factory=list)
    missing_kinds: list[str] = field(default_factory=list)
    planes: dict[str, tuple[int, int]] | None = None
    """Deployments of the control plane: how many replicas there shall be, and are ready."""
    daemons: dict[str, tuple[int, int]] | None = None
    """DaemonSets: on how many nodes there shall be a pod, and one is ready."""
    silent_planes: list[str] = field(default_factory=list)
    agents: list[NodeFacts] = field(default_factory=list)
    rootless: list[str] | None = None
    """Namespaces without the root certificate, or with another one."""
    hints: list[Hint] = field(default_factory=list)


def gather(cluster: "Cluster") -> ClusterFacts:
    """Ask the cluster for everything."""
    from ztunnel import __version__

    facts = ClusterFacts(now=time.time(), version=__version__)
    try:
        mesh = ClusterMesh.find(cluster)
        facts.server = mesh.api.server
        facts.server_version = str(mesh.api.get_json("/version").get("gitVersion", ""))
    except ApiError as error:
        facts.server_error = str(error)
        facts.ended = time.time()
        return facts
    ask = _Asking(facts)
    facts.missing_kinds = ask.anything(
        lambda: [f"{kind} ({version})" for version, kind in KINDS if not mesh.api.serves(version, kind)], []
    )
    facts.planes = ask.anything(lambda: _deployments(mesh), None)
    facts.daemons = ask.anything(lambda: _daemon_sets(mesh), None)
    facts.rootless = ask.anything(lambda: _rootless(mesh), None)
    ask.anything(lambda: _objects(facts, mesh), None)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        planes = pool.submit(_control_planes, facts, ask, mesh)
        for found, section in ((ask.nodes(mesh.nodes), facts.nodes), (ask.nodes(mesh.agents), facts.agents)):
            asked = [NodeFacts(node.name) for node in found]
            section += asked
            page = _proxy_page if section is facts.nodes else _agent_page
            for one, node in zip(asked, found, strict=True):
                pool.submit(page, one, node)
        planes.result()
    if facts.planes or facts.daemons:
        facts.status = {"nodes": []}  # it runs, more or less: the checks are to look
    facts.ended = time.time()
    return facts


class _Asking:
    """Asks, and keeps what was denied."""

    def __init__(self, facts: ClusterFacts) -> None:
        self._facts = facts

    def anything(self, question: "Callable[[], T]", otherwise: T) -> T:
        """The answer, or `otherwise` where it is not given."""
        try:
            return question()
        except ApiError as error:
            self._facts.denied.append(str(error))
        return otherwise

    def nodes(self, question: "Callable[[], list[Node]]") -> "list[Node]":
        """The processes, none where there are none."""
        try:
            return self.anything(question, [])
        except UserError:
            return []  # not installed: the checks of what is installed tell


def _deployments(mesh: ClusterMesh) -> dict[str, tuple[int, int]]:
    found = mesh.api.list("apps/v1", "Deployment", SYSTEM, label_selector="app=istiod")
    return {
        item["metadata"]["name"]: (
            int(item.get("spec", {}).get("replicas", 1)), int(item.get("status", {}).get("readyReplicas", 0))
        )
        for item in found
    }  # fmt: skip


def _daemon_sets(mesh: ClusterMesh) -> dict[str, tuple[int, int]]:
    found = {}
    for name in DAEMON_SETS:
        item = mesh.api.get("apps/v1", "DaemonSet", SYSTEM, name)
        if item is not None:
            status = item.get("status", {})
            found[name] = (int(status.get("desiredNumberScheduled", 0)), int(status.get("numberReady", 0)))
    return found


def _rootless(mesh: ClusterMesh) -> list[str]:
    from ztunnel.store.models import Namespace

    path = mesh.api.path("v1", "ConfigMap")
    listed = mesh.api.get_json(path, fieldSelector=f"metadata.name={ROOT}").get("items", [])
    roots = {item["metadata"]["namespace"]: item.get("data", {}).get("root-cert.pem", "") for item in listed}
    own = roots.get(SYSTEM)
    if own is None:
        return [SYSTEM]
    wrong = []
    for namespace in mesh.objects.list(Namespace):
        if namespace.metadata.deletion_timestamp:
            continue
        if roots.get(namespace.name) != own:
            wrong.append(namespace.name)
    return wrong


def _objects(facts: ClusterFacts, mesh: ClusterMesh) -> None:
    from ztunnel.store.models import Namespace, Pod

    pods = pod_facts(mesh.objects)
    facts.pods = [pod for pod in pods if pod.wanted or pod.joined or pod.error]
    facts.problems = mesh.problems()
    facts.hints = sidecars(mesh.objects.list(Namespace), mesh.objects.list(Pod))


def _control_planes(facts: ClusterFacts, ask: _Asking, mesh: ClusterMesh) -> None:
    for plane in ask.nodes(mesh.control_planes):
        try:
            dump = plane.dump(timeout=PATIENCE)
        except UserError as error:
            facts.silent_planes.append(str(error))
            facts.control_error = facts.control_error or error.message
            continue
        if facts.control is None:
            facts.control = dump
        else:
            facts.control["clients"] = [*facts.control["clients"], *dump["clients"]]


def _proxy_page(one: NodeFacts, node: "Node") -> None:
    try:
        one.dump = node.dump(*NODE_SECTIONS, timeout=PATIENCE)
    except UserError as error:
        one.error = error.message


def _agent_page(one: NodeFacts, node: "Node") -> None:
    try:
        one.dump = node.json("/pods", timeout=PATIENCE)
    except UserError as error:
        one.error = error.message


# The checks.


def _of_cluster(look: Callable[[ClusterFacts], Outcome]) -> Callable[[Facts], Outcome]:
    def looked(facts: Facts) -> Outcome:
        assert isinstance(facts, ClusterFacts)  # noqa: S101 (which of the two lists is judged is decided by its kind)
        return (
            look(facts)
            if not facts.server_error or look is _server
            else skipped("the API server does not answer")
        )

    return looked


def _server(facts: ClusterFacts) -> Outcome:
    return wrong_if(
        [facts.server_error] if facts.server_error else [],
        "choose another cluster with --context or --kubeconfig; see: kubectl cluster-info",
    )


def _allowed(facts: ClusterFacts) -> Outcome:
    return wrong_if(
        dict.fromkeys(facts.denied), "what could not be asked for is not checked; see docs/debugging.md for the rights",
        Result.WARNING,
    )  # fmt: skip


def _kinds(facts: ClusterFacts) -> Outcome:
    return wrong_if(
        [f"the cluster does not serve {kind}" for kind in facts.missing_kinds],
        "policies cannot be written; install the definitions with: ambient install",
    )


def _installed(facts: ClusterFacts) -> Outcome:
    if facts.planes is None:
        return skipped("Deployments may not be read")
    wrong = [
        f"Deployment {SYSTEM}/{name}: {ready} of {wanted} replicas are ready"
        for name, (wanted, ready) in facts.planes.items()
        if ready < wanted or not wanted
    ]
    if not facts.planes:
        wrong = [f"there is no Deployment {SYSTEM}/istiod"]
        return wrong_if(wrong, "install the mesh with: ambient install")
    return wrong_if(wrong, f"see: kubectl -n {SYSTEM} get pods -l app=istiod, ambient logs mesh/controlplane")


def _planes(facts: ClusterFacts) -> Outcome:
    if not facts.planes:
        return skipped("there is no control plane")
    return wrong_if(
        facts.silent_planes, "the nodes work on with the state and certificates that they have; see: "
        "ambient logs mesh/controlplane",
    )  # fmt: skip


def _roots(facts: ClusterFacts) -> Outcome:
    if facts.rootless is None:
        return skipped("ConfigMaps may not be read")
    if not facts.planes:
        return skipped("there is no control plane")
    return wrong_if(
        [f"namespace {name} has not the root certificate (ConfigMap {ROOT})" for name in facts.rootless],
        "the control plane puts it there; see: ambient logs mesh/controlplane",
    )


def _daemons(name: str) -> Callable[[ClusterFacts], Outcome]:
    def look(facts: ClusterFacts) -> Outcome:
        if facts.daemons is None:
            return skipped("DaemonSets may not be read")
        if name not in facts.daemons:
            return wrong_if(
                [f"there is no DaemonSet {SYSTEM}/{name}"], "install the mesh with: ambient install"
            )
        wanted, ready = facts.daemons[name]
        wrong = [f"DaemonSet {SYSTEM}/{name}: {ready} of {wanted} pods are ready"] if ready < wanted else []
        return wrong_if(wrong, f"see: kubectl -n {SYSTEM} rollout status daemonset/{name}, ambient status")

    return look


def _agents(facts: ClusterFacts) -> Outcome:
    if not facts.agents:
        return skipped("there is no node agent")
    wrong = [agent.error for agent in facts.agents if agent.error]
    for agent in facts.agents:
        wrong += [f"{agent.name}: {problem}" for problem in _said(agent, "problems")]
        if agent.dump is not None and not agent.dump.get("ztunnels"):
            wrong.append(f"{agent.name}: no node proxy is connected to its agent")
    return wrong_if(wrong, "pods cannot join or leave the mesh meanwhile; see: ambient logs mesh/agent-NODE")


def _kernel(facts: ClusterFacts) -> Outcome:
    answering = [agent for agent in facts.agents if agent.dump is not None]
    if not answering:
        return skipped("no node agent answers")
    wrong = [
        f"{pod['namespace']}/{pod['name']} on {agent.name}: {pod['problem']}"
        for agent in answering
        for pod in _said(agent, "pods")
        if pod["wanted"] and not pod["joined"] and pod["problem"]  # none: it has not begun, or has ended
    ]
    return wrong_if(
        wrong,
        "its traffic goes past the mesh; see: kubectl describe pod, ambient logs mesh/agent-NODE",
        Result.FAILED,
    )


def _said(agent: NodeFacts, what: str) -> Sequence[Any]:
    return agent.dump.get(what, ()) if agent.dump is not None else ()


def _moves(facts: ClusterFacts) -> Outcome:
    wrong = [f"{hint.object} {hint.message}; {hint.remedy}" for hint in facts.hints]
    return wrong_if(
        wrong, "sidecars and this mesh do not go together; docs/install.md says how to move", Result.WARNING
    )


def _same(name: str, remedy: str = "") -> Check:
    """A check that a mesh on one machine has as well."""
    (check,) = [each for each in judge.CHECKS if each.name == name]
    if not remedy:
        return check

    def look(facts: Facts) -> Outcome:
        outcome = check.judge(facts)
        return Outcome(outcome.result, outcome.details, remedy) if outcome.remedy else outcome

    return Check(check.category, check.name, look)


def _own(category: str, name: str, look: Callable[[ClusterFacts], Outcome]) -> Check:
    return Check(category, name, _of_cluster(look))


CHECKS: tuple[Check, ...] = (
    _own(CLUSTER, "the API server answers", _server),
    _own(CLUSTER, "everything may be asked for", _allowed),
    _own(CLUSTER, "the mesh's kinds are served", _kinds),
    _own(judge.CONTROL, "the control plane runs and is ready", _installed),
    _own(judge.CONTROL, "the control plane answers", _planes),
    _same("the certificate authority lasts", "see: ambient ca status, docs/certificates.md"),
    _own(judge.CONTROL, "every namespace has the root certificate", _roots),
    _own(judge.NODES, "node agents run and are ready", _daemons("istio-cni-node")),
    _own(judge.NODES, "node agents have nothing to complain of", _agents),
    _own(judge.NODES, "node proxies run and are ready", _daemons("ztunnel")),
    _same(
        "node proxies answer",
        "see: ambient logs mesh/ztunnel-NODE; its workers serve open connections meanwhile",
    ),
    _same("node proxies are ready"),
    _same("all workers of the proxies run"),
    _same("node proxies are in step with the control plane"),
    _same(
        "all parts are of one version",
        "upgrade what is older: ambient upgrade; or use the command of that version",
    ),
    _same("pods run and are ready", "see: kubectl get pods -A, kubectl describe pod"),
    _same("the pods that shall be in the mesh are in it"),
    _own(PODS, "the kernel redirects each pod that shall be in the mesh", _kernel),
    _same("each pod of the mesh is known to its node's proxy"),
    _own(PODS, "nothing asks for sidecars any more", _moves),
    _same("each identity has a valid certificate"),
    _same("certificates are renewed in time"),
    _same("no object is refused"),
    _same("every object is acted on"),
    _same("clocks agree"),
)


def judged(facts: ClusterFacts) -> "list[tuple[Check, Outcome]]":
    """Every check of a cluster with its outcome."""
    return [(check, check.judge(facts)) for check in CHECKS]
