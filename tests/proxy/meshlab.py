"""A laboratory whose nodes run this project's real workers: pods joined by the real rules, certificates of a throw-away
authority, and the mesh model filled in by the test instead of by xDS. The control plane is tested elsewhere."""

import os
import threading
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import trio

from cni import rules
from tests.telemetry.written import whole_lines
from ztunnel.embedded.testing import Lab, LabPod, until
from ztunnel.identity.ca import Authority
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.testing import workload as certificate
from ztunnel.mesh.model import Port, Service, TunnelProtocol, Workload
from ztunnel.mesh.policy import Authorization
from ztunnel.mesh.routing import resolve, waypoints_of
from ztunnel.mesh.state import MeshState
from ztunnel.proxy import messages
from ztunnel.proxy.trusted import NOBODY, Trust
from ztunnel.proxy.workers import Workers
from ztunnel.telemetry.log import Logger
from ztunnel.telemetry.node import NodeMetrics
from ztunnel.telemetry.traffic import TrafficMetrics

SETTINGS = rules.Settings()


def identity_of(pod: LabPod) -> str:
    """The pod's SPIFFE id."""
    return f"spiffe://cluster.local/ns/{pod.namespace}/sa/{pod.service_account}"


class Node:
    """One node's workers, run by a trio loop in a thread of its own."""

    def __init__(self, lab: "MeshLab", number: int, workers: int) -> None:
        self.lab = lab
        self.log_path = lab.directory / f"ztunnel-node-{number}.log"
        self._log = os.open(self.log_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC)
        logger = Logger("debug", json=True, fd=self._log)
        logger.never_wait()
        self.workers = Workers(workers, logger, self._ask, workload=lab.workload_of, trust=lab.trust_of)
        self.traffic = self.workers.collection.sink = TrafficMetrics(lab.state, "", "Kubernetes", logger)
        self.metrics = NodeMetrics(self.traffic, self.workers.collect)
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._started = threading.Event()
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name=f"node-{number}", daemon=True)

    def start(self) -> None:
        """Start the workers; returns once they run."""
        self._thread.start()
        until(self._started.is_set, "the node's workers run")
        if self._failure:
            raise self._failure[0]

    def _run(self) -> None:
        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            with self._scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.workers.run)
                    self.workers.policies.update({})
                    self._started.set()

        try:
            trio.run(main)
        except BaseException as error:  # shown by the test that waits
            self._failure.append(error)
        finally:
            self._started.set()

    def call(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """Run an async function in the node's loop."""
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def call_sync(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the node's loop."""
        return trio.from_thread.run_sync(function, *arguments, trio_token=self._token)

    def stop(self) -> None:
        """End the loop and the workers."""
        if self._token is not None and self._thread.is_alive():
            self.call_sync(self._scope.cancel)
        self._thread.join(10)
        os.close(self._log)

    def _ask(self, question: messages.AskRoute, answer: Callable[..., None]) -> None:
        answer(resolve(self.lab.state, None, "", question.address, question.port))

    def stats(self) -> list[messages.Stats]:
        """What each worker holds."""
        found: list[messages.Stats] = self.call(self.workers.stats)
        return found

    def scrape(self, accept: str = "") -> str:
        """The metrics, as Prometheus gets them."""
        body, _, _ = self.call(self.metrics.page, accept, "")
        return str(body.decode())

    def access_log(self) -> list[dict[str, Any]]:
        """The finished connections so far."""
        events = [msgspec.json.decode(line) for line in whole_lines(self.log_path) if line.startswith(b"{")]
        return [event for event in events if event.get("scope") == "access"]

    def errors(self) -> list[str]:
        """Lines of the log that tell of defects."""
        return [
            line
            for line in self.log_path.read_text().splitlines()
            if "internal error" in line or "Traceback" in line
        ]


class MeshLab(Lab):
    """A Lab with a mesh: `join` a pod, and its traffic goes through its node's workers."""

    def __init__(self, directory: Path, nodes: int = 2, workers: int = 1) -> None:
        super().__init__(directory, nodes)
        self.directory = directory
        self.authority = Authority.create()
        self.state = MeshState()
        self._workers = workers
        self.nodes: dict[int, Node] = {}
        self.certificates: dict[str, list[WorkloadCertificate]] = {}  # all that were given out, by identity

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            for number in range(1, self.network.nodes + 1):
                self.nodes[number] = Node(self, number, self._workers)
                self.nodes[number].start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, then the rest."""
        for node in self.nodes.values():
            node.stop()
        self.nodes.clear()
        super().close()

    def workload_of(self, namespace: str, name: str) -> Workload | None:
        """The pod of this name as the model has it."""
        return self.state.workload_by_uid(f"Kubernetes//Pod/{namespace}/{name}")

    def trust_of(self, namespace: str, name: str) -> Trust:
        """Which waypoints the pod has."""
        workload = self.workload_of(namespace, name)
        return waypoints_of(self.state, workload, "") if workload is not None else NOBODY

    def change(self, tags: frozenset[str]) -> None:
        """The model changed: tell the workers what to forget."""
        for node in self.nodes.values():
            node.call_sync(node.workers.forget_routes, tags)
            node.call_sync(node.workers.policies.workloads_changed)

    def policies(self, *policies: Authorization, removed: tuple[str, ...] = ()) -> None:
        """Change the policies of the mesh."""
        changes: dict[str, Authorization | None] = {policy.key: policy for policy in policies}
        changes.update(dict.fromkeys(removed))
        for node in self.nodes.values():
            node.call_sync(node.workers.policies.update, changes)
            node.stats()  # answered after what was said before

    def describe(self, pod: LabPod, hbone: bool, services: dict[str, tuple[Port, ...]] | None = None) -> None:
        """Put the pod into the model, in or out of the mesh."""
        self.change(self.state.upsert_workload(self.workload(pod, hbone, services=services or {})))

    def workload(self, pod: LabPod, hbone: bool, **differences: Any) -> Workload:
        """The pod as the model has it; `differences` are other values of its fields."""
        fields: dict[str, Any] = {
            "uid": f"Kubernetes//Pod/{pod.namespace}/{pod.name}",
            "name": pod.name,
            "namespace": pod.namespace,
            "addresses": (ip_address(pod.ip4).packed, ip_address(pod.ip6).packed),
            "tunnel_protocol": TunnelProtocol.HBONE if hbone else TunnelProtocol.NONE,
            "service_account": pod.service_account,
            "node": pod.node_name,
        }
        return Workload(**(fields | differences))

    def service(self, name: str, address: str, *ports: Port) -> None:
        """Put a Service into the model."""
        self.change(
            self.state.upsert_service(
                Service(
                    name=name,
                    namespace="default",
                    hostname=f"{name}.default.svc.cluster.local",
                    vips=(("", ip_address(address).packed),),
                    ports=ports,
                )
            )
        )

    def join(self, pod: LabPod) -> LabPod:
        """Bring the pod into the mesh, in the order for running pods: the proxy first, then the rules."""
        self.join_unknown(pod)
        self.describe(pod, hbone=True)
        return pod

    def join_unknown(self, pod: LabPod) -> None:
        """The same, and nobody tells of the pod."""
        node = self.nodes[pod.node]
        one = self.certify(pod)
        node.call(node.workers.add_pod, pod.uid, pod.name, pod.namespace, one.identity, pod.open())
        namespace = pod.open()
        try:
            rules.apply(namespace, SETTINGS)
        finally:
            os.close(namespace)

    def certify(self, pod: LabPod) -> WorkloadCertificate:
        """Give the pod's proxy a new certificate."""
        one = certificate(self.authority, identity_of(pod))
        self.certificates.setdefault(one.identity, []).append(one)
        node = self.nodes[pod.node]
        node.call_sync(node.workers.use_certificate, one.identity, one.encode())
        return one

    def leave(self, pod: LabPod) -> None:
        """Take the pod out: peers hear of it first, then the rules, then the proxy."""
        self.describe(pod, hbone=False)
        namespace = pod.open()
        try:
            rules.drain(namespace, SETTINGS)
        finally:
            os.close(namespace)
        node = self.nodes[pod.node]
        node.call(node.workers.delete_pod, pod.uid)


class TcpSocket(NamedTuple):
    """A line of the kernel's list of TCP sockets."""

    state: str
    local_port: int
    remote_port: int
    keepalive: bool


_STATES = {
    1: "ESTABLISHED", 2: "SYN_SENT", 3: "SYN_RECV", 4: "FIN_WAIT1", 5: "FIN_WAIT2", 6: "TIME_WAIT",
    7: "CLOSE", 8: "CLOSE_WAIT", 9: "LAST_ACK", 10: "LISTEN", 11: "CLOSING", 12: "NEW_SYN_RECV",
}  # fmt: skip


def tcp_sockets(pod: LabPod) -> list[TcpSocket]:
    """All TCP sockets of the pod's namespace, of both families."""
    found = []
    with pod.inside():
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                local, remote = (int(word.rpartition(":")[2], 16) for word in words[1:3])
                keepalive = words[5].startswith("02:")  # the timer that runs: 2 is the keepalive timer
                found.append(TcpSocket(_STATES[int(words[3], 16)], local, remote, keepalive))
    return found


def wait_listening(pod: LabPod, port: int) -> None:
    """Wait until a program of the pod listens on the port, without connecting to it."""
    until(
        lambda: any(one.state == "LISTEN" and one.local_port == port for one in tcp_sockets(pod)),
        f"a program of {pod.name} listens on {port}",
        20,
    )
