"""The room that is measured in: a mesh of two nodes with a server pod on one and a client pod on the other.

The same pods and programs are measured in the mesh and out of it; only the label of their namespace changes. How
often the proxies were used is read from their access logs, so that a number can never stand under the wrong heading.
"""

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from cni.rules import Settings, State, state
from perf import nginx
from perf.load import BULK_PORT, HTTP_PORT, LoadError
from perf.pods import Pod
from ztunnel.embedded.statedir import Process, session_members, stat_of
from ztunnel.embedded.testmesh import RunningMesh
from ztunnel.inpod import netns
from ztunnel.store import models

OPEN_FILES = 16384  # for the servers and clients of the pods, which inherit it
QUIET_LOGS = 0.1  # seconds without a new line

NAMESPACE = """
apiVersion: v1
kind: Namespace
metadata: {{name: default, labels: {{istio.io/dataplane-mode: {mode}}}}}
"""

PODS = """
apiVersion: v1
kind: ServiceAccount
metadata: {{name: server}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: client}}
---
apiVersion: v1
kind: Pod
metadata: {{name: server}}
spec:
  nodeName: node-2
  serviceAccountName: server
  containers:
    - name: nginx
      command: [nginx, -e, stderr, -p, {root}, -c, {root}/nginx.conf]
      ports: [{{containerPort: {http}}}]
    - name: iperf3
      command: [iperf3, -s, -p, "{bulk}"]
      ports: [{{containerPort: {bulk}}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: outside, labels: {{istio.io/dataplane-mode: none}}}}
spec:
  nodeName: node-2
  containers:
    - name: iperf3
      command: [iperf3, -s, -p, "{bulk}"]
      ports: [{{containerPort: {bulk}}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: client}}
spec:
  nodeName: node-1
  serviceAccountName: client
  containers: [{{name: client, command: [sleep, infinity]}}]
"""


class WrongPathError(Exception):
    """The proxies were used where they should not have been, or the other way round."""


class Carried(NamedTuple):
    """How many connections the proxies have carried: that of the client's side, and that of the server's."""

    client: int
    server: int

    def since(self, before: "Carried") -> "Carried":
        """What was added."""
        return Carried(self.client - before.client, self.server - before.server)


class AccessLogs:
    """Counts the lines of the node proxies' access logs, each once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {}
        self._counted = Carried(0, 0)

    def carried(self) -> Carried:
        """Outbound lines of any kind, and inbound ones of mutual TLS, since the mesh began."""
        for log in self._directory.glob("ztunnel-*.log"):
            with log.open("rb") as file:
                file.seek(self._read.get(log, 0))
                whole = file.read().rpartition(b"\n")[0]
            self._read[log] = self._read.get(log, 0) + len(whole)
            lines = [line for line in whole.split(b"\n") if b'"scope":"access"' in line]
            outbound = sum(b'"direction":"outbound"' in line for line in lines)
            inbound = sum(b'"mutual_tls"' in line for line in lines if b'"direction":"inbound"' in line)
            self._counted = Carried(self._counted.client + outbound, self._counted.server + inbound)
        return self._counted

    def settled(self) -> Carried:
        """The same once no more lines come."""
        while True:
            before = self.carried()
            time.sleep(QUIET_LOGS)
            if self.carried() == before:
                return before


class Room:
    """The running mesh, its proxies with so many workers each; a context manager, at whose end nothing is left."""

    def __init__(self, workers: int = 2) -> None:
        _raise_open_files()
        self._mesh = RunningMesh(workers=workers)
        self._logs = AccessLogs(self._mesh.state.logs)

    def __enter__(self) -> Self:
        root = self._mesh.home
        http = f"{nginx.LONG_LIVED} keepalive_timeout 1h;"
        nginx.write(root, HTTP_PORT, connections=16000, http=http)
        self._label(joined=False)
        self._mesh.write("pods.yaml", PODS.format(root=root, http=HTTP_PORT, bulk=BULK_PORT))
        self._mesh.__enter__()
        try:
            self._mesh.wait_pods(mesh=False)
            self.pods = {
                pod["name"]: Pod(pod["name"], pod["ip"], self._namespace(pod["name"]))
                for pod in self._mesh.pods()
            }
            self.server = self.pods["server"].ip
        except BaseException:
            self._mesh.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:
            self._mesh.close()
        else:
            self._mesh.__exit__(kind, error, trace)

    def _namespace(self, name: str) -> Path:
        uid = next(pod.metadata.uid for pod in self._mesh.objects().list(models.Pod) if pod.name == name)
        return self._mesh.state.netns / uid

    def _label(self, *, joined: bool) -> None:
        self._mesh.write("namespace.yaml", NAMESPACE.format(mode="ambient" if joined else "none"))

    def run(self, program: str, *arguments: str) -> str:
        """Run a program in the client's pod; its output. Raises LoadError."""
        done = self._mesh.exec("client", program, *arguments)
        if done.code != 0:
            raise LoadError(
                f"{program} ended with code {done.code}: {(done.stderr or done.stdout).strip()[-300:]}"
            )
        return done.stdout

    def join(self, *, joined: bool) -> None:
        """Bring the server's and the client's pod into the mesh, or out of it; returns when the rules are in place."""
        self._label(joined=joined)
        # A pod that leaves is announced first; its redirections end a moment later, and its other rules when its last
        # proxied connection has.
        self._mesh.until(partial(self._is, joined), "the rules are in place")
        self._logs.settled()

    def _is(self, joined: bool) -> bool:
        wanted = State.REDIRECTED if joined else State.ABSENT
        return all(
            pod["mesh"] == joined and self._state(self.pods[pod["name"]]) is wanted
            for pod in self._mesh.pods()
            if pod["name"] != "outside"
        )

    @staticmethod
    def _state(pod: Pod) -> State:
        """What the kernel says of the rules in a pod's namespace."""
        namespace = netns.open_path(pod.netns)
        try:
            return state(
                namespace, Settings(dns_capture=True)
            )  # as an agent has it where nobody says otherwise
        finally:
            os.close(namespace)

    @contextlib.contextmanager
    def side(self, *, joined: bool) -> Iterator[None]:
        """Both pods in the mesh, or out of it, for the block. Raises WrongPathError where they were not."""
        self.join(joined=joined)
        before = self.carried()
        yield
        used = sum(self.carried().since(before))
        if bool(used) != joined:
            raise WrongPathError(
                f"the proxies carried {used} connections {'in' if joined else 'out of'} the mesh"
            )

    def carried(self) -> Carried:
        """How many connections the nodes' proxies have written into their access logs."""
        return self._logs.settled()

    def upgrade(self, node: str) -> None:
        """Replace a node's ztunnel; returns when the new process is in place. Raises MeshRequestError."""
        self._mesh.client.upgrade(node)

    def control_process(self, node: str) -> int:
        """The pid of a node's ztunnel, 0 while it does not run or is not ready."""
        ztunnel = next(each["ztunnel"] for each in self._mesh.status()["nodes"] if each["name"] == node)
        return int(ztunnel["pid"]) if ztunnel["ready"] else 0

    def proxies(self) -> list[list[int]]:
        """The pids of each node's ztunnel: its control process and workers."""
        return node_proxies(self._mesh)


def node_proxies(mesh: RunningMesh) -> list[list[int]]:
    """The pids of each node's ztunnel, its control process and workers, in a mesh."""
    stats = [stat_of(node["ztunnel"]["pid"]) for node in mesh.status()["nodes"]]
    return [session_members([Process(stat.pid, stat.start_time)]) for stat in stats if stat is not None]


def _raise_open_files() -> None:
    """What is started from now on may open as many files as the cases need. Raises LoadError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and hard < OPEN_FILES:
        raise LoadError(
            f"{OPEN_FILES} open files a process are needed, the system allows {hard} (ulimit -Hn)"
        )
    if soft != unlimited and soft < OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
