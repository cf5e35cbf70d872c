"""The checks: facts in, outcomes out. Pure; each check is a function below, in the order in which they are shown.

A check that fails says what is wrong with which object, and what to do about it. Where what it needs is not known,
because an earlier check failed, it is skipped.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ztunnel.cli.checks.facts import Facts, NodeFacts, PodFacts
from ztunnel.cli.checks.outcome import CERTIFICATES, PODS, Check, Outcome, Result, ok, skipped, wrong_if

if TYPE_CHECKING:
    from ztunnel.store.problems import Problem

ENOUGH_FILES = 16384
OLDEST_PYTHON = (3, 11)
SKEW = 5.0  # seconds by which clocks may differ
STALE = 30.0  # seconds that a proxy may take to acknowledge what it was sent
CA_URGENT, CA_SOON = 2 * 86400.0, 30 * 86400.0  # seconds that the authority has left
SERVER_URGENT = 86400.0  # seconds that the control plane's own certificate has left
OVERDUE = 300.0  # seconds after which a renewal that has not happened is late


# The machine.


def python(facts: Facts) -> Outcome:
    """The interpreter."""
    if facts.python >= OLDEST_PYTHON:
        return ok()
    return wrong_if(["this is Python " + ".".join(map(str, facts.python))], "install Python 3.11 or newer")


def _step(name: str, remedy: str) -> Callable[[Facts], Outcome]:
    def judge(facts: Facts) -> Outcome:
        error = facts.machine.get(name, facts.machine.get("namespaces", ""))
        if name != "namespaces" and facts.machine.get("namespaces"):
            return skipped("no namespace to try it in")
        return wrong_if([error] if error else [], remedy)

    return judge


def open_files(facts: Facts) -> Outcome:
    """Each proxied connection takes up to four descriptors, the listeners of a pod six."""
    few = facts.open_files != -1 and facts.open_files < ENOUGH_FILES
    return wrong_if(
        [f"{facts.open_files} open files are allowed (hard limit)"] if few else [],
        f"raise it, e.g. with ulimit -Hn {ENOUGH_FILES} as root, or LimitNOFILE= of the service",
        Result.WARNING,
    )


def state_directory(facts: Facts) -> Outcome:
    """Where the mesh keeps its sockets."""
    return wrong_if(
        [facts.state_error] if facts.state_error else [], "give another directory with --state DIR"
    )


def control_port(facts: Facts) -> Outcome:
    """The control plane's."""
    return wrong_if(
        [f"127.0.0.1:15012: {facts.port_error}"] if facts.port_error else [],
        "run the mesh with --xds-port 0, which takes any free port; or end what uses it (ss -tlnp sport = :15012)",
        Result.WARNING,
    )


# The control plane.


def mesh_runs(facts: Facts) -> Outcome:
    """The supervisor answers."""
    return wrong_if([facts.mesh_error] if facts.mesh_error else [], "start it with: ambient up DIR")


def control_ready(facts: Facts) -> Outcome:
    """It runs and accepts connections."""
    if facts.status is None:
        return skipped("the mesh does not run")
    process = facts.status["controlplane"]
    if process["pid"] and process["ready"] and facts.control_state != "T":
        return ok()
    return _process(
        "the control plane", process["pid"], facts.control_state, process["restarts"], "controlplane"
    )


def _process(what: str, pid: int, state: str, restarts: int, log: str) -> Outcome:
    again = f" (restarted {restarts} times)" if restarts else ""
    if state == "T":
        return wrong_if([f"{what} (pid {pid}) is stopped by a signal"], f"let it go on: kill -CONT {pid}")
    if not pid or not state:
        return wrong_if([f"{what} does not run{again}"], f"its log says why: ambient logs mesh/{log}")
    return wrong_if(
        [f"{what} (pid {pid}) runs but is not ready{again}"],
        f"its log says what it waits for: ambient logs mesh/{log}",
    )


def control_answers(facts: Facts) -> Outcome:
    """Its admin page."""
    if facts.status is None:
        return skipped("the mesh does not run")
    return wrong_if(
        [facts.control_error] if facts.control is None else [],
        "see: ambient logs mesh/controlplane; the nodes work on with the state and certificates that they have",
    )


def control_tls(facts: Facts) -> Outcome:
    """A TLS handshake with it, verified with the roots that the nodes have."""
    if facts.kernel is None:
        return skipped("nothing could be asked from inside the mesh")
    tls = facts.kernel["tls"]
    remedy = "see: ambient logs mesh/controlplane; is ca/root-cert.pem in the state directory that of its authority?"
    if "error" in tls:
        return wrong_if([f"127.0.0.1:{(facts.status or {})['controlplane']['port']}: {tls['error']}"], remedy)
    left = tls["not_after"] - facts.now
    return wrong_if(
        [f"its certificate ends in {_span(left)}"] if left < SERVER_URGENT else [],
        "restart the control plane: it takes a new one when it starts",
    )


def authority(facts: Facts) -> Outcome:
    """The signing certificates, root and intermediates."""
    if facts.control is None:
        return skipped("the control plane does not answer")
    left = facts.control["authority"]["not_after"] - facts.now
    remedy = "replace the certificates in ca/ of the state directory; see docs/certificates.md for how"
    troubles = facts.control["authority"].get("problems", [])
    if troubles:
        return wrong_if(
            troubles, "what signed until now goes on; see: ambient ca status, docs/certificates.md"
        )
    if left < CA_URGENT:
        told = f"it ends in {_span(left)}" if left > 0 else f"it ended {_span(-left)} ago"
        return wrong_if([f"{told}: no certificate can outlast it"], remedy)
    return wrong_if([f"it ends in {_span(left)}"] if left < CA_SOON else [], remedy, Result.WARNING)


# The nodes.


def agents(facts: Facts) -> Outcome:
    """The node agents."""
    if facts.status is None:
        return skipped("the mesh does not run")
    wrong = [
        f"{node['name']}: its node agent {'is not ready' if node['agent']['pid'] else 'does not run'}"
        for node in facts.status["nodes"]
        if not node["agent"]["ready"]
    ]
    return wrong_if(wrong, "see: ambient logs mesh/agent-NODE; pods cannot join or leave the mesh meanwhile")


def proxies_answer(facts: Facts) -> Outcome:
    """Every node's admin page."""
    if facts.status is None:
        return skipped("the mesh does not run")
    wrong, remedies = [], []
    for node in facts.nodes:
        if node.dump is None:
            stopped = f" (pid {node.pid} is stopped by a signal)" if node.state == "T" else ""
            wrong.append(f"{node.error}{stopped}")
            remedies.append(f"kill -CONT {node.pid}" if stopped else f"ambient logs mesh/ztunnel-{node.name}")
    return wrong_if(wrong, f"try: {', '.join(remedies)}; its workers serve open connections meanwhile")


def _answering(facts: Facts) -> list[NodeFacts]:
    return [node for node in facts.nodes if node.dump is not None]


def _of_nodes(judge: Callable[[Facts, list[NodeFacts]], Outcome]) -> Callable[[Facts], Outcome]:
    """A check that needs at least one node's page."""

    def judged(facts: Facts) -> Outcome:
        found = _answering(facts)
        return judge(facts, found) if found else skipped("no node's proxy answers")

    return judged


def _ready(facts: Facts, nodes: list[NodeFacts]) -> Outcome:
    wrong = [
        f"{node.name}: {node.dump['ready']}" for node in nodes if node.dump and node.dump["ready"] != "ready"
    ]
    return wrong_if(wrong, "wait with: ambient check --wait 30; else see: ambient logs mesh/ztunnel-NODE")


def _workers(facts: Facts, nodes: list[NodeFacts]) -> Outcome:
    dead, again = [], []
    for node in nodes:
        for worker in node.dump["workers"] if node.dump else ():
            if not worker["pid"]:
                dead.append(f"{node.name}: worker {worker['worker']} does not run")
            elif worker["restarts"]:
                again.append(
                    f"{node.name}: worker {worker['worker']} was restarted {worker['restarts']} times"
                )
    if dead:
        return wrong_if(dead, "see: ambient logs mesh/ztunnel-NODE")
    remedy = "its connections were lost each time; the log says how it ended: ambient logs mesh/ztunnel-NODE"
    return wrong_if(again, remedy, Result.WARNING)


def _synced(facts: Facts, nodes: list[NodeFacts]) -> Outcome:
    wrong = []
    for node in nodes:
        xds = node.dump["xds"] if node.dump else {}
        if not xds["connected"]:
            wrong.append(f"{node.name}: not connected to {xds['address']}: {xds['error'] or 'it is trying'}")
        elif not xds["synced"]:
            wrong.append(f"{node.name}: connected, but has not received the first state yet")
    for client in facts.control["clients"] if facts.control else ():
        for kind, found in client["types"].items():
            late = found["sent_at"] is not None and facts.now - found["sent_at"] > STALE
            if found["rejected"]:
                wrong.append(f"{client['node']}: rejected {kind}: {found['rejected']['error']}")
            elif found["unacknowledged"] and late:
                wrong.append(f"{client['node']}: has not acknowledged {kind} version {found['sent']}")
    return wrong_if(
        wrong, "see: ambient proxy-status; until then the node works on with what it has, which may be old"
    )


def _versions(facts: Facts, nodes: list[NodeFacts]) -> Outcome:
    found = {node.name: node.dump["version"] for node in nodes if node.dump}
    if facts.control is not None:
        found["the control plane"] = facts.control["version"]
    return wrong_if(
        [f"{name} is version {version}, this command {facts.version}" for name, version in found.items()
         if version != facts.version],
        "restart what is older: ambient down, ambient up DIR",
        Result.WARNING,
    )  # fmt: skip


# The pods.


def pods_run(facts: Facts) -> Outcome:
    """Their programs."""
    if facts.status is None:
        return skipped("the mesh does not run")
    wrong = [
        f"{pod.name}: {pod.state or pod.phase or 'Pending'}{': ' + pod.message if pod.message else ', not ready'}"
        for pod in facts.pods
        if pod.phase not in ("Succeeded", "Failed") and not pod.ready and not pod.starting
    ]
    return wrong_if(wrong, "see: ambient get pods -A, ambient logs POD", Result.WARNING)


def pods_joined(facts: Facts) -> Outcome:
    """Whoever shall be in the mesh is, and nobody else."""
    if facts.status is None:
        return skipped("the mesh does not run")
    wrong = []
    for pod in facts.pods:
        if pod.error:
            wrong.append(f"{pod.name}: {pod.error}")
        elif pod.wanted and not pod.joined and not (pod.starting and pod.phase != "Running"):
            wrong.append(f"{pod.name}: shall be in the mesh and is not")
        elif pod.joined and not pod.wanted:
            wrong.append(f"{pod.name}: is in the mesh and shall not be")
    return wrong_if(wrong, "the node agent's log says why: ambient logs mesh/agent-NODE")


def _served(facts: Facts, nodes: list[NodeFacts]) -> Outcome:
    served = {node.name: {pod["uid"] for pod in node.dump["pods"]} for node in nodes if node.dump}
    wrong = [
        f"{pod.name}: the proxy of {pod.node} does not know it"
        for pod in facts.pods
        if pod.joined and pod.node in served and pod.uid not in served[pod.node]
    ]
    remedy = "its traffic fails; see: ambient logs mesh/agent-NODE, ambient logs mesh/ztunnel-NODE"
    return wrong_if(wrong, remedy)


def redirected(facts: Facts) -> Outcome:
    """The rules and routes in the kernel."""
    if facts.kernel is None:
        return skipped(facts.kernel_error or "the mesh does not run")
    wrong = []
    nodes = set()
    for pod in _in_kernel(facts):
        found = facts.kernel["pods"][pod.uid]
        if found.get("error") or found["differences"]:
            nodes.add(pod.node)
            what = found.get("error") or "; ".join(found["differences"][:3])
            wrong.append(f"{pod.name}: {what}")
    pids = {node["name"]: node["agent"]["pid"] for node in (facts.status or {}).get("nodes", ())}
    restart = ", ".join(
        f"kill {pids[name]} (node agent of {name})" for name in sorted(nodes) if pids.get(name)
    )
    return wrong_if(
        wrong,
        f"its traffic may go past the mesh; a node agent that starts puts the rules back: {restart or 'restart it'}",
    )


def _in_kernel(facts: Facts) -> list[PodFacts]:
    known = facts.kernel["pods"] if facts.kernel is not None else {}
    return [pod for pod in facts.pods if pod.joined and pod.uid in known]


def listening(facts: Facts) -> Outcome:
    """The proxy's sockets in the pods."""
    if facts.kernel is None:
        return skipped(facts.kernel_error or "the mesh does not run")
    wrong = []
    for pod in _in_kernel(facts):
        silent = facts.kernel["pods"][pod.uid].get("silent")
        if silent:
            wrong.append(f"{pod.name}: nobody listens on port {', '.join(map(str, silent))}")
    return wrong_if(
        wrong, "its traffic is refused until the proxy of its node serves it: ambient logs mesh/ztunnel-NODE"
    )


# Certificates.


def _certificates(facts: Facts, nodes: list[NodeFacts]) -> Outcome:
    wrong = []
    for node in nodes:
        for one in node.dump["certificates"] if node.dump else ():
            error = f": {one['last_error']}" if one["last_error"] else ""
            if one["not_after"] is None:
                wrong.append(f"{node.name}: {one['identity']}: none yet{error}")
            elif one["not_after"] <= facts.now:
                wrong.append(f"{node.name}: {one['identity']}: expired at {_moment(one['not_after'])}{error}")
            elif one["not_before"] > facts.now + SKEW:
                begins = _moment(one["not_before"])
                wrong.append(
                    f"{node.name}: {one['identity']}: valid only from {begins}: is this node's clock right?"
                )
    return wrong_if(
        wrong,
        "no tunnel opens for these identities; the authority is the control plane: is it reachable from the node "
        "(ambient proxy-status), and what does it say (ambient logs mesh/controlplane)?",
    )


def _renewal(facts: Facts, nodes: list[NodeFacts]) -> Outcome:
    late, urgent = [], False
    for node in nodes:
        for one in node.dump["certificates"] if node.dump else ():
            end, begin, due = one["not_after"], one["not_before"], one["next_fetch"]
            if end is None or end <= facts.now:
                continue  # the check before this one tells
            overdue = due is None or facts.now - due > OVERDUE
            if one["last_error"] or overdue:
                urgent |= end - facts.now < (end - begin) / 4
                why = one["last_error"] or "its renewal is overdue"
                late.append(f"{node.name}: {one['identity']}: ends in {_span(end - facts.now)}: {why}")
    return wrong_if(
        late,
        "the old ones serve until they end; see: ambient logs mesh/controlplane, ambient proxy-status",
        Result.FAILED if urgent else Result.WARNING,
    )


# Objects and clocks.


def objects_taken(facts: Facts) -> Outcome:
    """What the mesh refuses."""
    if facts.status is None:
        return skipped("the mesh does not run")
    wrong = [str(one) for one in _problems(facts) if one.severity == "error"]
    return wrong_if(wrong, "see: ambient analyze")


def objects_used(facts: Facts) -> Outcome:
    """What it does not act on."""
    if facts.status is None:
        return skipped("the mesh does not run")
    wrong = [str(one) for one in _problems(facts) if one.severity == "warning"]
    return wrong_if(wrong, "see: ambient analyze", Result.WARNING)


def _problems(facts: Facts) -> list["Problem"]:
    """What the mesh finds wrong with objects, and what its control plane does."""
    import msgspec

    from ztunnel.store.problems import Problem

    told = facts.control.get("problems", []) if facts.control is not None else []
    return list(dict.fromkeys([*facts.problems, *msgspec.convert(told, list[Problem])]))


def clocks(facts: Facts) -> Outcome:
    """Certificates are valid by the clock of whoever looks."""
    times = {"the control plane": facts.control["time"]} if facts.control is not None else {}
    times |= {node.name: node.dump["time"] for node in _answering(facts) if node.dump and "time" in node.dump}
    if not times:
        return skipped("nothing answers")
    # The answers took up to the time that gathering may take: only what lies outside is a difference.
    wrong = []
    for name, told in times.items():
        if not facts.now - SKEW <= told <= facts.ended + SKEW:
            wrong.append(f"{name}: {_moment(told)}, here it is {_moment(facts.now)}")
    return wrong_if(wrong, "set the clocks by NTP on every machine (timedatectl set-ntp true)")


def _span(seconds: float) -> str:
    from ztunnel.cli.tables import duration

    return duration(seconds)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


ENVIRONMENT, CONTROL, NODES = "environment", "control plane", "nodes"
OBJECTS, CLOCK = "objects", "clock"

CHECKS: tuple[Check, ...] = (
    Check(ENVIRONMENT, "Python is 3.11 or newer", python, pre=True),
    Check(
        ENVIRONMENT,
        "network namespaces can be made",
        _step("namespaces", "run as root, or allow user namespaces for ordinary users"),
        pre=True,
    ),
    Check(
        ENVIRONMENT,
        "the kernel takes the redirection's rules (nftables) and routes",
        _step(
            "rules", "load the modules nf_tables, nft_redir, nft_ct (modprobe), or use a kernel that has them"
        ),
        pre=True,
    ),
    Check(
        ENVIRONMENT,
        "pods can be linked (veth, bridge)",
        _step("links", "load the modules veth and bridge (modprobe), or use a kernel that has them"),
        pre=True,
    ),
    Check(ENVIRONMENT, "enough open files are allowed", open_files, pre=True),
    Check(CONTROL, "the mesh runs", mesh_runs),
    Check(CONTROL, "the control plane runs and is ready", control_ready),
    Check(CONTROL, "the control plane answers", control_answers),
    Check(CONTROL, "the control plane's certificate is one that the nodes trust", control_tls),
    Check(CONTROL, "the certificate authority lasts", authority),
    Check(NODES, "node agents run and are ready", agents),
    Check(NODES, "node proxies answer", proxies_answer),
    Check(NODES, "node proxies are ready", _of_nodes(_ready)),
    Check(NODES, "all workers of the proxies run", _of_nodes(_workers)),
    Check(NODES, "node proxies are in step with the control plane", _of_nodes(_synced)),
    Check(NODES, "all parts are of one version", _of_nodes(_versions)),
    Check(PODS, "pods run and are ready", pods_run),
    Check(PODS, "the pods that shall be in the mesh are in it", pods_joined),
    Check(PODS, "each pod of the mesh is known to its node's proxy", _of_nodes(_served)),
    Check(PODS, "each pod of the mesh is redirected by the kernel", redirected),
    Check(PODS, "the proxy listens in each pod of the mesh", listening),
    Check(CERTIFICATES, "each identity has a valid certificate", _of_nodes(_certificates)),
    Check(CERTIFICATES, "certificates are renewed in time", _of_nodes(_renewal)),
    Check(OBJECTS, "no object is refused", objects_taken),
    Check(OBJECTS, "every object is acted on", objects_used),
    Check(CLOCK, "clocks agree", clocks),
)
PRE_CHECKS: tuple[Check, ...] = (
    *(check for check in CHECKS if check.pre),
    Check(ENVIRONMENT, "the state directory can be used", state_directory, pre=True),
    Check(ENVIRONMENT, "the control plane's port is free", control_port, pre=True),
)


def judge(facts: Facts, *, pre: bool) -> list[tuple[Check, Outcome]]:
    """Every check with its outcome."""
    return [(check, check.judge(facts)) for check in (PRE_CHECKS if pre else CHECKS)]
