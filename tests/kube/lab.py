"""A Kubernetes of the tests' own: etcd, API server and up to two nodes, several side by side on one machine.

Everything of a lab is in namespaces of its own ("cells": one for the control plane, one a node) and in one folder
below the cache; on the host there is only a relay, which listens on 127.0.0.1 for the API. `python -m tests.kube.lab`
is for people: up, down, list, kubectl, image.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.kube import binaries, cgroups, image
from tests.kube.capture import Capture
from tests.kube.cell import Cell, CellError
from tests.kube.controlplane import ADDRESS, DNS_SERVICE, PORT, ControlPlane, write_pki
from tests.kube.node import Node
from tests.kube.processes import Process
from tests.kube.record import LabInUse, Record, sweep
from tests.kube.rest import Rest, RestError

if TYPE_CHECKING:
    from ztunnel.store.kube.api import Api

READY_LIMIT = 300.0
NAME_LIMIT = 40
CONTROL = "control"


class LabError(Exception):
    """The lab or what a test asked of it failed; the message says what."""


class Lab:
    """A running lab. `Lab.up` makes one, `Lab.attach` finds one that is up; `down` (or the block's end) ends it."""

    def __init__(self, record: Record, programs: Path, init: Path) -> None:
        self.name = record.name
        self.folder = record.folder
        self.programs = programs
        self.kubeconfig = record.folder / "admin.conf"
        self._record = record
        self._recording = threading.Lock()
        self._relay: subprocess.Popen[bytes] | None = None
        self._init = init
        self.control = ControlPlane(
            Cell(CONTROL, self.folder / CONTROL, init), self.folder, programs, record.port
        )
        self.nodes: dict[int, Node] = {}

    @classmethod
    def up(
        cls,
        name: str,
        nodes: int = 2,
        *,
        detached: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> Self:
        """Start a lab. With nodes the project's images are imported, and DNS answers.

        `detached`: it outlives this process. Raises LabError, CellError, ImageError, BuildError, LabInUse.
        """
        if os.geteuid() != 0:
            raise LabError(
                "a Kubernetes of one's own needs root: namespaces, mounts and control groups are made"
            )
        if not name.replace("-", "").isalnum() or len(name) > NAME_LIMIT:
            raise LabError(f"lab {name!r}: a name has letters, digits and -, at most {NAME_LIMIT}")
        programs = binaries.kubernetes()
        init = image.init_program(binaries.cache())
        sweep()
        record = Record(name)
        record.own()
        if record.exists:
            record.disown()
            raise LabInUse(f"lab {name}: already up; `python -m tests.kube.lab down --name {name}` ends it")
        record.create(detached)
        with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
            record.set_port(listener.getsockname()[1])
            lab = cls(record, programs, init)
            try:
                lab._start(listener, nodes, say)
            except BaseException:
                lab.down()
                raise
        return lab

    @classmethod
    def attach(cls, name: str) -> Self:
        """A lab that was started detached. Raises LabError when there is none."""
        record = Record(name)
        if not record.exists:
            raise LabError(f"lab {name}: not up; `python -m tests.kube.lab up --name {name}` starts it")
        lab = cls(record, binaries.kubernetes(), image.init_program(binaries.cache()))
        keeper = record.process(CONTROL)
        if keeper is not None:
            lab.control.cell.adopt(keeper)
        for number in (1, 2):
            keeper = record.process(f"node{number}")
            if keeper is not None:
                lab._node(number).cell.adopt(keeper)
        return lab

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # For tests -------------------------------------------------------------------------------------------------

    @cached_property
    def api(self) -> "Api":
        """The project's own client, as administrator."""
        from ztunnel.store.kube.api import Api

        return Api.from_kubeconfig(self.kubeconfig, None)

    @property
    def rest(self) -> Rest:
        """Plain requests, as administrator."""
        return self.control.rest

    def node(self, number: int) -> Node:
        """Node 1 or 2."""
        return self.nodes[number]

    def kubectl(self, *arguments: str | Path, stdin: str = "", timeout: float = 60) -> str:
        """What kubectl writes to stdout. Raises LabError with what it writes to stderr when it fails."""
        try:
            done = subprocess.run(
                self.kubectl_command(*arguments), input=stdin, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"kubectl {' '.join(map(str, arguments))}: no end after {timeout} s") from error
        if done.returncode != 0:
            raise LabError(
                f"kubectl {' '.join(map(str, arguments))}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def kubectl_command(self, *arguments: str | Path) -> list[str]:
        """The arguments of a process of one's own: a port-forward, a watch."""
        cache = self.folder / "kubectl"
        program = self.programs / "kubectl"
        return [str(program), f"--kubeconfig={self.kubeconfig}", f"--cache-dir={cache}", *map(str, arguments)]

    def apply(self, manifest: str) -> None:
        """Create or change the objects of a YAML text."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=manifest)

    @contextmanager
    def namespace(self, name: str, labels: Mapping[str, str] | None = None) -> Iterator[str]:
        """A namespace for the block; at its end it is deleted with all that is in it, and gone when the block is."""
        metadata = {"name": name, "labels": dict(labels or {})}
        self.rest.request("POST", "/api/v1/namespaces", {"metadata": metadata})
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=true", "--ignore-not-found", timeout=180)

    def wait_rollout(self, kind: str, name: str, namespace: str, seconds: float = 180) -> None:
        """Until all pods of a Deployment or DaemonSet are new and ready. Raises LabError with what its pods say."""
        limit = f"--timeout={seconds}s"
        try:
            self.kubectl("rollout", "status", f"{kind}/{name}", "-n", namespace, limit, timeout=seconds + 10)
        except LabError as error:
            pods = self.kubectl("get", "pods", "-n", namespace, "-o", "wide")
            states = self.kubectl(
                "get",
                "pods",
                "-n",
                namespace,
                "-o",
                "jsonpath={range .items[*]}{.metadata.name} {.status}{'\\n'}{end}",
            )
            events = self.kubectl("get", "events", "-n", namespace, "--sort-by=.lastTimestamp")
            raise LabError("\n".join([str(error), pods, states, *events.splitlines()[-30:]])) from error

    def execute(
        self, namespace: str, pod: str, argv: Sequence[str], *, container: str = "", timeout: float = 60
    ) -> str:
        """Run a program in a pod (`deploy/NAME` is a pod too) through the API server; what it wrote to stdout."""
        where = ["-n", namespace, pod, *(["-c", container] if container else [])]
        return self.kubectl("exec", *where, "--", *argv, timeout=timeout)

    def pod_pid(self, namespace: str, pod: str) -> int:
        """A process of the pod, as the host counts: its namespaces are in /proc/PID/ns."""
        uid = self.kubectl("get", "pod", pod, "-n", namespace, "-o", "jsonpath={.metadata.uid}")
        for node in self.nodes.values():
            for pid in cgroups.processes(node.cgroup, uid):
                return pid
        raise LabError(f"pod {namespace}/{pod}: no process of it on any node")

    def import_image(self, archive: Path) -> None:
        """A docker archive's images, on every node."""
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(node.import_images, archive) for node in self.nodes.values()]:
                done.result()

    def capture(self, node: int = 1) -> Capture:
        """All frames on a node's link to the other during the block."""
        return Capture(self.node(node).cell.pid, "eth0")

    def stop_apiserver(self) -> None:
        self.control.stop_apiserver()

    def start_apiserver(self) -> None:
        self.control.start_apiserver()

    def start_controllers(self) -> None:
        """The controller manager, in a lab without nodes: default service accounts, endpoints, ends of namespaces."""
        self.control.start_controllers()

    def snapshot_etcd(self, name: str = "snapshot") -> None:
        self.control.snapshot(name)

    def restore_etcd(self, name: str = "snapshot") -> None:
        """Go back to it. Kubernetes' own parts start anew then, the nodes' too: they go on watching from a version
        that is yet to come, miss all that is written till then, and call pods unready that are ready.
        """
        self.control.restore(name)
        for node in self.nodes.values():
            if node.cell.running:
                node.restart_kubernetes()

    def kill_node(self, number: int) -> None:
        """A power cut. The Services are then reached through another node, as far as there is one."""
        self.node(number).kill()
        for node in self.nodes.values():
            if node.cell.running:
                node.route_services()

    def start_node(self, number: int) -> None:
        """Switch a killed node on again, with the disk that it had. It is not yet Ready on return."""
        node = self.node(number)
        node.start(lambda process: self._write_down(node.name, process), sorted(self.nodes))
        node.start_kubernetes()

    def wait_ready(self, *numbers: int, seconds: float = READY_LIMIT) -> None:
        """Until the API server calls these nodes Ready (all, when none is named)."""
        wanted = {self.node(number).name for number in numbers or self.nodes}
        end = time.monotonic() + seconds
        while True:
            missing = wanted - set(self._ready())
            if not missing:
                return
            if time.monotonic() > end:
                words = "\n".join(
                    self.nodes[int(name[-1])].cell.last_words("kubelet") for name in sorted(missing)
                )
                raise LabError(
                    f"lab {self.name}: not ready after {seconds} s: {', '.join(sorted(missing))}\n{words}"
                )
            time.sleep(0.1)

    # Up and down -----------------------------------------------------------------------------------------------

    def down(self) -> None:
        """End everything, as a power cut would, and remove every trace."""
        if not self._record.owned:
            self._record.own()
        try:
            self._record.clear()
            if self._relay is not None:
                self._relay.wait()
            for cell in (self.control.cell, *(node.cell for node in self.nodes.values())):
                cell.kill()
        finally:
            self._record.disown()

    def _start(self, listener: socket.socket, nodes: int, say: Callable[[str], None]) -> None:
        write_pki(self.folder, self._record.port)
        cell = self.control.cell
        cell.start(lambda process: self._write_down(CONTROL, process))
        self.control.start_network()
        self.control.start_etcd()
        self._start_relay(listener)
        with ThreadPoolExecutor() as pool:
            say("API server")
            machines = [pool.submit(self._start_machine, number) for number in range(1, nodes + 1)]
            images = pool.submit(image.build) if nodes else None
            self.control.start_apiserver()
            if nodes:
                self.control.start_controllers()
                self.control.start_scheduler()
                self._start_dns()
            say("nodes" if nodes else "up")
            for machine in machines:
                machine.result()
            for node in self.nodes.values():
                node.start_kubernetes()
            if images is not None:
                say("images")
                self.import_image(images.result().path)
        if nodes:
            self.wait_ready()
            self._wait_dns()
        if self._record.detached:
            self._record.disown()

    def _start_machine(self, number: int) -> None:
        node = self._node(number)
        with self._recording:
            self._record.add_cgroup(node.cgroup)
        node.start(lambda process: self._write_down(node.name, process), (1, 2))

    def _node(self, number: int) -> Node:
        folder, pki = self.folder / f"node{number}", self.folder / "pki"
        node = Node(number, self.name, folder, pki, self.programs, self._init, self.control.cell)
        self.nodes[number] = node
        return node

    def _write_down(self, name: str, process: Process) -> None:
        with self._recording:
            self._record.add_process(name, process)

    def _start_relay(self, listener: socket.socket) -> None:
        namespace = f"/proc/{self.control.cell.pid}/ns/net"
        relay = str(Path(__file__).with_name("relay.py"))
        with (self.folder / "relay.log").open("wb") as log:
            self._relay = subprocess.Popen(
                [sys.executable, "-I", relay, str(listener.fileno()), namespace, ADDRESS, str(PORT)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[listener.fileno()], start_new_session=True,
            )  # fmt: skip
        assert self._relay.stdin is not None
        self._write_down("relay", Process.of(self._relay.pid))
        self._relay.stdin.write(b"go\n")
        self._relay.stdin.close()

    def _start_dns(self) -> None:
        """kube-dns as pods know it: a Service, whose one endpoint is the tests' resolver on the bridge."""
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "tests.kube.dns", ADDRESS, str(self.folder / "pki"), str(PORT)]
        self.control.cell.spawn("dns", command, PYTHONPATH=str(root))
        ports = [
            {"name": "dns", "protocol": "UDP", "port": 53},
            {"name": "dns-tcp", "protocol": "TCP", "port": 53},
        ]
        metadata = {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}
        service = {"apiVersion": "v1", "kind": "Service", "metadata": metadata}
        self.rest.apply(
            "/api/v1/namespaces/kube-system/services/kube-dns",
            {**service, "spec": {"clusterIP": DNS_SERVICE, "ports": ports}},
        )
        self.rest.apply(
            "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices/kube-dns-lab",
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": "kube-dns-lab",
                    "namespace": "kube-system",
                    "labels": {
                        "kubernetes.io/service-name": "kube-dns",
                        "endpointslice.kubernetes.io/managed-by": "lab",
                    },
                },
                "addressType": "IPv4",
                "endpoints": [{"addresses": [ADDRESS], "conditions": {"ready": True}}],
                "ports": ports,
            },
        )

    def _wait_dns(self) -> None:
        """Until a node resolves a Service's name through kube-proxy."""
        wanted = "kubernetes.default.svc.cluster.local"
        command = ["dig", "+short", "+time=1", "+tries=1", f"@{DNS_SERVICE}", wanted]
        for node in self.nodes.values():
            end = time.monotonic() + READY_LIMIT
            while True:
                try:
                    if node.run(command).startswith("10.96."):
                        break
                except CellError:
                    pass
                if time.monotonic() > end:
                    raise LabError(
                        f"lab {self.name}: no DNS on {node.name}: {self.control.cell.last_words('dns')}"
                    )
                time.sleep(0.1)

    def _ready(self) -> Iterator[str]:
        try:
            listed = self.rest.request("GET", "/api/v1/nodes")["items"]
        except (OSError, RestError):
            return
        for node in listed:
            conditions = node.get("status", {}).get("conditions", [])
            if any(one["type"] == "Ready" and one["status"] == "True" for one in conditions):
                yield node["metadata"]["name"]


if __name__ == "__main__":
    from tests.kube.command import main

    sys.exit(main())
