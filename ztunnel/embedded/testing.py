"""A laboratory for tests: nodes and pods as network namespaces with programs in them, without a supervisor.

    with Lab(tmp_path, nodes=2) as lab:
        server, client = lab.pod("server", node=2), lab.pod("client", node=1)
        server.start([sys.executable, "-m", "http.server", "8080", "--bind", "::"])
        server.wait_port(8080)
        assert client.check(["curl", "-s", f"http://{server.ip4}:8080/"]).returncode == 0

Whatever happens in the block, at its end no program, namespace or interface of it is left.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ztunnel.embedded.addresses import node_address4, node_address6, node_name, pod_range4, pod_range6
from ztunnel.embedded.network import FABRIC, Network
from ztunnel.inpod import netns

DEADLINE = 10.0


def until(condition: Callable[[], Any], what: str, limit: float = DEADLINE, step: float = 0.02) -> Any:
    """Wait until `condition()` is true and return what it returned; AssertionError after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not so after {limit} s")
        time.sleep(step)


def _apart(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a thread of its own.

    pyroute2 uses asyncio inside, which trio-asyncio, once some test has imported it, forbids in a trio task.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(function, *arguments).result()


class LabSpace:
    """A network namespace of the laboratory, and the programs started in it."""

    def __init__(self, name: str, path: Path, ip4: str, ip6: str) -> None:
        self.name = name
        self.path = path
        self.ip4 = ip4
        self.ip6 = ip6
        self._programs: list[subprocess.Popen[Any]] = []

    def open(self) -> int:
        """A descriptor of the namespace, which the caller closes."""
        return netns.open_path(self.path)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is in the namespace for the block (no await inside)."""
        namespace = self.open()
        try:
            with netns.inside(namespace):
                yield
        finally:
            os.close(namespace)

    def start(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in the namespace, in a session of its own; `options` are those of Popen."""
        options.setdefault("start_new_session", True)
        with self.inside():  # a child is made in the namespaces of the thread that makes it
            program = subprocess.Popen([str(word) for word in argv], **options)
        self._programs.append(program)
        return program

    def check(
        self, argv: Sequence[str | Path], timeout: float = 30, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the namespace to its end; its output is captured as text unless `options` differ."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        data = options.pop("input", None)
        if data is not None:
            options["stdin"] = subprocess.PIPE
        program = self.start(argv, **options)
        try:
            out, err = program.communicate(data, timeout=timeout)
        except subprocess.TimeoutExpired:
            self._kill(program)
            out, err = program.communicate()
            raise AssertionError(
                f"{argv} in {self.name} still ran after {timeout} s: {out!r} {err!r}"
            ) from None
        self._programs.remove(program)
        return subprocess.CompletedProcess(program.args, program.returncode, out, err)

    def new_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A socket of this namespace, usable from anywhere."""
        with self.inside():
            return socket.socket(family, kind, protocol)

    def connect(self, address: str, port: int, timeout: float = DEADLINE) -> socket.socket:
        """A TCP connection from this namespace (blocking socket with `timeout` seconds)."""
        connection = self.new_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        connection.settimeout(timeout)
        try:
            connection.connect((address, port))
        except BaseException:
            connection.close()
            raise
        return connection

    def listen(self, port: int = 0, family: int = socket.AF_INET, backlog: int = 128) -> socket.socket:
        """A listening TCP socket on every address of this namespace (blocking)."""
        listener = self.new_socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))  # noqa: S104  a pod's own
        listener.listen(backlog)
        return listener

    def wait_port(self, port: int, limit: float = DEADLINE, address: str = "127.0.0.1") -> None:
        """Wait until something in the namespace accepts connections on the port."""

        def accepts() -> bool:
            with contextlib.suppress(OSError), self.connect(address, port, timeout=1):
                return True
            return False

        until(accepts, f"port {port} of {self.name} accepts", limit)

    def processes(self) -> list[int]:
        """The pids of what runs in the namespace."""
        return netns.processes(self.path)

    def close(self) -> None:
        """End the programs, also those they started themselves."""
        for program in self._programs:
            self._kill(program)
            for stream in (program.stdin, program.stdout, program.stderr):
                if stream:
                    stream.close()
        self._programs.clear()
        if self.path.exists():
            for pid in self.processes():
                if pid != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _kill(program: subprocess.Popen[Any]) -> None:
        if program.poll() is None:
            program.kill()
        program.wait()


class LabPod(LabSpace):
    """A pod: its addresses, its namespace and what the mesh calls it."""

    def __init__(
        self, name: str, path: Path, ip4: str, ip6: str, node: int, namespace: str, service_account: str
    ) -> None:
        super().__init__(name, path, ip4, ip6)
        self.uid = path.name
        self.node = node
        self.node_name = node_name(node)
        self.namespace = namespace
        self.service_account = service_account


class Lab:
    """Nodes joined by the fabric; `directory` takes the files that name the namespaces."""

    def __init__(self, directory: Path, nodes: int = 2) -> None:
        self.network = Network(directory / "netns", nodes)
        self.pods: list[LabPod] = []
        self._spaces: list[LabSpace] = []
        self._hosts = dict.fromkeys(range(1, nodes + 1), 1)

    def __enter__(self) -> Self:
        try:
            _apart(self.network.start)
        except BaseException:
            _apart(self.network.stop)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every program and remove every namespace."""
        for space in self._spaces:
            space.close()
        _apart(self.network.stop)

    def pod(
        self, name: str, node: int = 1, namespace: str = "default", service_account: str = "default"
    ) -> LabPod:
        """A new pod on the node of that number, with the next free addresses of its range."""
        self._hosts[node] += 1
        ip4, ip6 = str(pod_range4(node)[self._hosts[node]]), str(pod_range6(node)[self._hosts[node]])
        uid = f"{namespace}-{name}-uid"
        _apart(self.network.attach, uid, node_name(node), [ip4, ip6])
        pod = LabPod(name, self.network.path(uid), ip4, ip6, node, namespace, service_account)
        self.pods.append(pod)
        self._spaces.append(pod)
        return pod

    def remove(self, pod: LabPod) -> None:
        """End the pod's programs and take it away."""
        pod.close()
        _apart(self.network.detach, pod.uid, pod.node_name)
        self.pods.remove(pod)
        self._spaces.remove(pod)

    def node(self, number: int) -> LabSpace:
        """A node's own namespace: `eth0` towards the others, `cni0` towards its pods."""
        return self._space(node_name(number), str(node_address4(number).ip), str(node_address6(number).ip))

    def fabric(self) -> LabSpace:
        """The namespace of the link between the nodes, whose ports are named like the nodes: capture there."""
        return self._space(FABRIC, "", "")

    def _space(self, name: str, ip4: str, ip6: str) -> LabSpace:
        space = LabSpace(name, self.network.path(name), ip4, ip6)
        self._spaces.append(space)
        return space
