"""`ambient up`: the machine itself. One process that makes the nodes and runs everything of a mesh on them.

It plays what Kubernetes is to a mesh (resolver, scheduler, kubelet, kube-proxy, DNS) and runs the mesh's own
processes as children, restarted when they end: one control plane, and for every node an agent and a ztunnel.
Only objects in STATE/objects, sockets and the namespaces' files connect them.
"""

import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from ztunnel.embedded import operator, probes, rootless, tokens
from ztunnel.embedded.addresses import DNS_VIP, node_name
from ztunnel.embedded.children import Check, Child, ReplaceError
from ztunnel.embedded.cluster import Cluster
from ztunnel.embedded.console import Console
from ztunnel.embedded.control import ControlSocket, RequestError
from ztunnel.embedded.dns import ClusterDns, Upstream
from ztunnel.embedded.environment import VariableError, environment
from ztunnel.embedded.generations import Generations
from ztunnel.embedded.network import FABRIC, Network, NetworkError
from ztunnel.embedded.runtime import Runtime
from ztunnel.embedded.services import ServiceRules
from ztunnel.embedded.statedir import State, StateError, clean
from ztunnel.embedded.view import View
from ztunnel.inpod import netns
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.kinds import IMPLIED_NAMESPACES
from ztunnel.store.membership import in_mesh
from ztunnel.store.models import Pod
from ztunnel.telemetry.log import leaves

__all__ = ["StateError", "UpConfig", "clean", "run"]

LOOPBACK = "127.0.0.1"
CLUSTER_ID = "Kubernetes"
TRUST_DOMAIN = "cluster.local"
MOST_FILES = (
    65536  # how many descriptors the mesh's processes and pods may have open, where the system lets them
)
DRAIN = "30s"  # a ztunnel that ends, or its workers once it was killed, let connections go on for so long
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpConfig:
    """What `ambient up` was asked for. `xds_port` 0 takes any free port."""

    dir: Path
    state: Path
    nodes: int = 2
    xds_port: int = 15012
    workers: int = 2


def run(config: UpConfig) -> int:
    """Run a mesh until SIGINT or SIGTERM, remove all that it made, and return the exit code."""
    console = Console()
    state = State(config.state)
    try:
        state.create()
        with state.locked():
            state.end_leftovers()
            resolvers = Upstream.open_sockets()
            if rootless.needed():
                rootless.enter()
                console.say("without root: everything lives in a user namespace of its own")
            state.remove_files()
            port = _free_port(config.xds_port)
            _raise_limits()
            _log_to(state.logs / "supervisor.log")
            try:
                trio.run(Supervisor(config, state, console, port, resolvers).run)
            finally:
                state.remove_files()
    except (StateError, rootless.RootlessError, operator.OperatorError) as error:
        return _refuse(str(error))
    except BaseExceptionGroup as group:
        ours, others = group.split(NetworkError)
        if ours is None or others is not None:
            raise
        return _refuse("; ".join(str(error) for error in leaves(ours)))
    return 0


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _free_port(wanted: int) -> int:
    """The port for the control plane, nobody else listening on it now. Raises StateError."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
            probe.listen()
        except OSError as error:
            raise StateError(
                f"port {wanted} of {LOOPBACK}, where the control plane would listen: {error.strerror}; give another "
                "with --xds-port PORT"
            ) from error
        return int(probe.getsockname()[1])


def _log_to(path: Path) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(filename=path, level=logging.INFO, format=form, force=True)


def _raise_limits() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Supervisor:
    """One mesh from its beginning to its end."""

    def __init__(
        self, config: UpConfig, state: State, console: Console, port: int, resolvers: Sequence[socket.socket]
    ) -> None:
        self.config = config
        self.state = state
        self.console = console
        self.port = port
        self.since = time.time()
        self.nodes = [node_name(number) for number in range(1, config.nodes + 1)]
        self.network = Network(state.netns, config.nodes)
        self.view = View()
        self.objects = DirectoryStore(state.objects)
        self.cluster = Cluster(
            DirectoryStore(config.dir),
            self.objects,
            config.nodes,
            problems_file=state.problems,
            on_problems=console.problems,
            graceful=True,
        )
        self.runtime = Runtime(state.path, self.objects, self.view, self.network, self.cluster.report)
        self.rules = ServiceRules(
            self.view, {name: self.network.path(name) for name in self.nodes}, self.cluster.report
        )
        self.control = ControlSocket(state.socket, self.status, self.start_program, self.stop, self.upgrade)
        self.tokens = tokens.NodeTokens(state.tokens, state.path / tokens.KEY_SET, self.nodes)
        self.controlplane = self._controlplane()
        self.agents = {name: self._agent(name) for name in self.nodes}
        self.ztunnels = {name: self._ztunnel(name) for name in self.nodes}
        self._resolvers = resolvers
        self._stop = trio.Event()

    # The children.

    @property
    def children(self) -> list[Child]:
        """The mesh's own processes."""
        return [self.controlplane, *self.agents.values(), *self.ztunnels.values()]

    def _child(
        self,
        name: str,
        module: str,
        arguments: Sequence[str | Path],
        check: Check,
        generations: Generations | None = None,
        **settings: str | Path,
    ) -> Child:
        """With `generations` it can be replaced by a successor, and drains."""
        more: dict[str, Any] = {}
        if generations is not None:
            more = {"drains": True, "settings": generations.settings, "in_place": generations.in_place}
        return Child(
            name,
            [sys.executable, "-P", "-m", module, *map(str, arguments)],
            {**os.environ, **{key: str(value) for key, value in settings.items()}},
            self.state.logs / f"{name}.log",
            check,
            record=self._record_processes,
            report=self.cluster.report,
            **more,
        )

    def _controlplane(self) -> Child:
        state = self.state
        arguments: list[str | Path] = [
            "--store",
            state.objects,
            "--ca-dir",
            state.ca,
            "--token-keys",
            state.path / tokens.KEY_SET,
            "--token-issuer",
            tokens.ISSUER,
        ]
        arguments += ["--listen", f"{LOOPBACK}:{self.port}"]
        arguments += ["--trust-domain", TRUST_DOMAIN, "--cluster-id", CLUSTER_ID]
        arguments += ["--admin", f"unix:{state.control_admin}"]
        return self._child(
            "controlplane",
            "ztunnel.controlplane",
            arguments,
            lambda _: probes.accepts(LOOPBACK, self.port),
            None,
            **operator.settings(self.config.dir),
        )

    def _agent(self, node: str) -> Child:
        zds = self.state.node(node) / "ztunnel.sock"
        arguments: list[str | Path] = ["--node", node, "--store", self.state.objects]
        arguments += ["--netns-dir", self.state.netns, "--zds", zds]
        return self._child(f"agent-{node}", "cni.agent", arguments, lambda _: probes.listens(zds))

    def _ztunnel(self, node: str) -> Child:
        own, root = self.state.node(node), self.state.published / "root-cert.pem"
        address = f"https://{LOOPBACK}:{self.port}"
        generations = Generations(own)
        return self._child(
            f"ztunnel-{node}",
            "ztunnel",
            [],
            generations.ready,
            generations,
            NODE_NAME=node,
            XDS_ADDRESS=address,
            CA_ADDRESS=address,
            XDS_ROOT_CA=root,
            CA_ROOT_CA=root,
            CRL_PATH=self.state.published / "ca-crl.pem",
            AUTH_TOKEN=self.state.tokens / node,
            INPOD_UDS=own / "ztunnel.sock",
            CLUSTER_ID=CLUSTER_ID,
            TRUST_DOMAIN=TRUST_DOMAIN,
            DNS_UPSTREAM=DNS_VIP,
            LOG_FORMAT="json",
            LOG_LEVEL=os.environ.get("LOG_LEVEL", "info"),
            ZTUNNEL_WORKER_THREADS=str(self.config.workers),
            TERMINATION_GRACE_PERIOD=DRAIN,
        )

    def _record_processes(self) -> None:
        present = {child.name: child.process for child in self.children if child.process}
        others = {f"{child.name}, pid {one.pid}": one for child in self.children for one in child.others}
        self.state.write_processes(present | others)

    # Life.

    async def run(self) -> None:
        """Until a signal or `stop`; everything is removed then, whatever happens."""
        self._prepare()
        try:
            # Ended from the inside out: first the pods, then agents and ztunnels, the control plane, what all rely on.
            async with trio.open_nursery() as base:
                base.start_soon(self._receive_signals)
                base.start_soon(self.tokens.run)
                await base.start(self.control.run)
                self.console.say(
                    f"mesh of {self.config.dir}: {len(self.nodes)} nodes, state in {self.state.path}, "
                    f"control plane on {LOOPBACK}:{self.port}"
                )
                await trio.to_thread.run_sync(self.network.start)
                await base.start(self.cluster.run)
                await base.start(self.view.run, self.objects)
                await base.start(self.rules.run)
                nodes = [self.network.path(name) for name in self.nodes]
                await base.start(ClusterDns(self.view, nodes, Upstream(self._resolvers)).run)
                async with trio.open_nursery() as center:
                    center.start_soon(self.controlplane.run)
                    async with trio.open_nursery() as nodes_processes:
                        nodes_processes.start_soon(self._run_node_processes, nodes_processes)
                        async with trio.open_nursery() as pods:
                            pods.start_soon(self.runtime.run)
                            await self._stop.wait()
                            self.console.say("ending")
                            pods.cancel_scope.cancel()
                        nodes_processes.cancel_scope.cancel()
                    center.cancel_scope.cancel()
                base.cancel_scope.cancel()
        finally:
            self.network.stop()
        self.console.say(f"ended; what stays: {self.state.ca}, {self.state.logs}")

    def stop(self) -> None:
        """End the mesh in order."""
        self._stop.set()

    def _prepare(self) -> None:
        self.state.write_record(self.config.dir, self.config.nodes)
        for path in (
            self.state.objects,
            self.state.tokens,
            self.state.logs,
            *map(self.state.node, self.nodes),
        ):
            path.mkdir(mode=0o700, exist_ok=True)
        for namespace in IMPLIED_NAMESPACES:
            # The store reads a new directory at once, and a changed file when it has rested: the first pod would be
            # seen before the label of its namespace that was written just before it.
            (self.state.objects / Pod.KIND / namespace).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.tokens.write()

    async def _receive_signals(self) -> None:
        for number in ENDING:
            # What stands again when the receiver is closed: a second Ctrl-C does not interrupt the cleaning up.
            signal.signal(number, signal.SIG_IGN)
        with trio.open_signal_receiver(*ENDING) as received:
            async for _ in received:
                self.stop()

    async def _run_node_processes(self, nursery: trio.Nursery) -> None:
        with self.console.waiting("starting"):
            await self.controlplane.first_ready.wait()  # it makes the certificate that the others trust
            for child in [*self.agents.values(), *self.ztunnels.values()]:
                nursery.start_soon(child.run)
            for child in self.children:
                await child.first_ready.wait()
        took = time.time() - self.since
        self.console.say(f"up in {took:.1f} s: see it with `ambient status`, end it with Ctrl-C", "green")

    # What the control socket asks.

    def status(self) -> dict[str, Any]:
        """The report of MeshClient.status."""
        pods = sorted(self.view.pods.values(), key=lambda pod: (pod.namespace, pod.name))
        return {
            "state": str(self.state.path),
            "pid": os.getpid(),
            "since": self.since,
            "dir": str(self.config.dir),
            "nodes": [
                {
                    "name": name,
                    "agent": self.agents[name].describe(),
                    "ztunnel": self.ztunnels[name].describe(),
                    "pods": sum(pod.spec.node_name == name for pod in pods),
                }
                for name in self.nodes
            ],
            "controlplane": self.controlplane.describe() | {"port": self.port},
            "services": {"settled": self.rules.settled},
            "pods": [_described(pod) for pod in pods],
            "problems": msgspec.to_builtins(self.cluster.problems),
        }

    async def upgrade(self, node: str) -> dict[str, Any]:
        """Replace a node's ztunnel by a new process of the code that is installed now. Raises RequestError."""
        ztunnel = self.ztunnels.get(node)
        if ztunnel is None:
            raise RequestError(f"there is no node {node!r}; there are {', '.join(self.nodes)}")
        began = time.monotonic()
        try:
            old, new = await ztunnel.replace()
        except ReplaceError as error:
            raise RequestError(str(error)) from error
        return {"node": node, "old": old, "new": new, "seconds": round(time.monotonic() - began, 3)}

    async def start_program(self, request: Mapping[str, Any], fds: list[int]) -> subprocess.Popen[bytes]:
        """Start the program of an exec request. Raises RequestError, OSError."""
        argv = [str(word) for word in request["argv"]]
        asked = {str(key): str(value) for key, value in request.get("env", {}).items()}
        if request["do"] == "node-exec":
            return await trio.to_thread.run_sync(self._start_on_node, str(request["node"]), argv, asked, fds)
        name = f"{request['namespace']}/{request['pod']}"
        runner = self.runtime.runner(request["namespace"], request["pod"])
        if runner is None:
            raise RequestError(f"pod {name} is not running; see `ambient get pods -A`")
        if runner.sandbox is None or not runner.admitted:
            raise RequestError(f"pod {name} is not running yet: {runner.message or 'it is being made'}")
        containers = {container.name: container for container in runner.pod.spec.containers}
        container = containers.get(request.get("container") or next(iter(containers)))
        if container is None:
            raise RequestError(
                f"pod {name} has no container {request['container']!r}; it has {', '.join(containers)}"
            )
        try:
            variables = environment(runner.pod, container, os.environ) | asked
        except VariableError as error:
            raise RequestError(f"pod {name}: {error}") from error
        start = partial(
            runner.sandbox.run_beside, argv, variables, stdin=fds[0], stdout=fds[1], stderr=fds[2]
        )
        return await trio.to_thread.run_sync(start)

    def _start_on_node(
        self, node: str, argv: Sequence[str], asked: Mapping[str, str], fds: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        if node not in (*self.nodes, FABRIC):
            raise RequestError(f"there is no node {node!r}; there are {', '.join([*self.nodes, FABRIC])}")
        namespace = netns.open_path(self.network.path(node))
        try:
            with netns.inside(namespace):  # a child is made in the namespaces of the thread that makes it
                return subprocess.Popen(
                    argv,
                    env={**os.environ, **asked},
                    cwd="/",
                    stdin=fds[0],
                    stdout=fds[1],
                    stderr=fds[2],
                    start_new_session=True,
                )
        finally:
            os.close(namespace)


def _described(pod: Pod) -> dict[str, Any]:
    return {
        "namespace": pod.namespace,
        "name": pod.name,
        "node": pod.spec.node_name,
        "ip": next(iter(pod.addresses), ""),
        "phase": pod.status.phase,
        "ready": pod.ready,
        "restarts": sum(status.restart_count for status in pod.status.container_statuses),
        "mesh": in_mesh(pod),
        "message": pod.status.message,
    }
