"""A whole mesh as users have it: the `ambient` command with a directory and a state, from start to nothing left.

What a test learns of it, it learns from outside: the command's output, programs in pods, the kernel's tables.
"""

import contextlib
import errno
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from tests.telemetry.written import whole_lines
from ztunnel.embedded.testing import until
from ztunnel.embedded.testmesh import RunningMesh
from ztunnel.inpod import netns
from ztunnel.store.models import Pod, Service

AMBIENT = Path(sys.executable).with_name("ambient")
MODE = "istio.io/dataplane-mode"
MARKER = "the-words-that-only-the-two-programs-know"
HTTP, ECHO = 8080, 9000
ETH_P_ALL = 3
SO_RCVBUFFORCE = 33

# What runs in the pods: HTTP that says who answers whom (and from which process), and lines that come back.
PROGRAM = """
import http.server, os, socket, socketserver, threading

class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        peer = self.client_address[0].removeprefix("::ffff:")
        words = [os.environ.get("WORD", "hello"), os.environ["POD_NAME"], peer, str(os.getpid()), "%(marker)s"]
        body = (" ".join(words) + "\\n").encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass

class Lines(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)

class HttpServer(http.server.ThreadingHTTPServer):
    address_family, request_queue_size = socket.AF_INET6, 1024

class LineServer(socketserver.ThreadingTCPServer):
    address_family, request_queue_size, allow_reuse_address, daemon_threads = socket.AF_INET6, 1024, True, True

threading.Thread(target=LineServer(("::", %(echo)d), Lines).serve_forever, daemon=True).start()
HttpServer(("::", %(http)d), Page).serve_forever()
"""
TRACEBACK = 60  # lines of a log that are shown from one on


class WholeMesh(RunningMesh):
    """`ambient up DIR --state S --xds-port 0` and the other verbs on it; at the end of the block nothing is left.

    `pods` is YAML in which PROGRAM stands for the words of a command that runs the program above.
    """

    def __init__(self, pods: str = "", **options: Any) -> None:
        super().__init__("", **options)
        program = self.home / "program.py"
        program.write_text(PROGRAM % {"marker": MARKER, "echo": ECHO, "http": HTTP})
        program.chmod(0o644)
        self.temporary = self.home / "t"
        self.temporary.mkdir(mode=0o777)
        self.temporary.chmod(0o777)
        self.env = {**(self.env or os.environ), "TMPDIR": str(self.temporary), "LOG_LEVEL": "info"}
        prefix = list(options.get("prefix", ()))
        nodes, port = options.get("nodes", 2), options.get("xds_port", 0)
        self.argv = [*prefix, AMBIENT, "up", self.directory, "--state", self.state.path]
        self.argv += ["--nodes", str(nodes), "--xds-port", str(port)]
        self.resources(pods)

    def resources(self, pods: str, name: str = "resources.yaml") -> None:
        """Replace a file of the mesh's directory at once."""
        words = f'"{sys.executable}", "-I", "-u", "{self.home / "program.py"}"'
        self.write(name, pods.replace("PROGRAM", words))

    def ambient(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Another verb of the command ("get", "ca status"), on this mesh, run to its end."""
        verb, *rest = words
        return subprocess.run(
            [*self._prefix(), AMBIENT, *verb.split(), "--state", self.state.path, *rest],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=self.env,
        )

    def _prefix(self) -> list[str]:
        return [str(word) for word in self.argv[: self.argv.index(AMBIENT)]]

    def ok(self, *words: str) -> str:
        """The same, which must succeed; its output."""
        done = self.ambient(*words)
        assert done.returncode == 0, (done.args, done.stdout, done.stderr)
        return done.stdout

    def curl(self, pod: str, url: str, *words: str) -> str:
        """What `ambient exec POD -- curl URL` prints; it must succeed."""
        return self.ok("exec", pod, *words, "--", "curl", "-sS", "--max-time", "10", url).strip()

    def curl_code(self, pod: str, url: str) -> int:
        """curl's exit code in the pod, by the control socket (no process of its own for the command)."""
        return self.exec(pod, "curl", "-s", "-o", "/dev/null", "--max-time", "3", url).code

    def pod(self, prefix: str, namespace: str = "default") -> Pod:
        """The pod whose name begins so (the first of several)."""
        found = [pod for pod in self.objects().list(Pod, namespace) if pod.name.startswith(prefix)]
        assert found, f"no pod {prefix} in {namespace}"
        return min(found, key=lambda pod: pod.name)

    def service(self, name: str, namespace: str = "default") -> Service:
        """The Service with its addresses."""
        found = self.objects().get(Service, namespace, name)
        assert found is not None
        return found

    def membership(self) -> dict[str, bool]:
        """Which pods are in the mesh."""
        return {pod["name"]: pod["mesh"] for pod in self.status()["pods"]}

    def wait_membership(self, **wanted: bool) -> None:
        """Until the pods whose names begin so (underscores for dashes) are in the mesh, or out of it."""

        def settled() -> bool:
            now = self.membership()
            for prefix, is_wanted in wanted.items():
                found = {now[name] for name in now if name.startswith(prefix.replace("_", "-"))}
                if found != {is_wanted}:
                    return False
            return True

        self.until(settled, f"membership {wanted}")

    def programs(self) -> dict[str, int]:
        """The pid of every pod's own program, by the name of the pod."""
        found = {}
        for pod in self.objects().list(Pod):
            network = self.state.netns / pod.metadata.uid
            for pid in netns.processes(network) if network.exists() else []:
                if _environment(pid).get("POD_NAME") == pod.name:
                    found[pod.name] = pid
        return found

    def access_log(self, node: str, **wanted: object) -> list[dict[str, Any]]:
        """The finished connections in a node's log that have these values; src_workload is src.workload and so on."""
        found = []
        for line in whole_lines(self.state.logs / f"ztunnel-{node}.log"):
            with contextlib.suppress(msgspec.DecodeError):
                entry = msgspec.json.decode(line)
                if isinstance(entry, dict) and entry.get("scope") == "access":
                    found.append(entry)
        names = {name: re.sub("^(src|dst)_", r"\1.", name) for name in wanted}
        return [e for e in found if all(e.get(names[name]) == value for name, value in wanted.items())]

    @contextlib.contextmanager
    def inside(self, pod: Pod | str) -> Iterator[None]:
        """The calling thread is in the network of a pod, or of a node, for the block."""
        name = pod if isinstance(pod, str) else pod.metadata.uid
        namespace = netns.open_path(self.state.netns / name)
        try:
            with netns.inside(namespace):
                yield
        finally:
            os.close(namespace)

    def connect(self, pod: Pod, address: str, port: int = ECHO) -> "Conversation":
        """A connection from the pod to the line server of another."""
        with self.inside(pod):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(10)
        connection.connect((address, port))
        return Conversation(connection)

    # What a mesh may leave behind.

    def traces(self) -> "Traces":
        """What exists of this mesh now, to be looked for later."""
        spaces = {
            os.stat(path).st_ino for path in self.state.netns.iterdir() if path.stat().st_dev != self._device
        }
        pids = {self.status()["pid"], *self.state.leftovers()}
        return Traces(self.home, self.state.path, spaces, pids)

    @property
    def _device(self) -> int:
        return self.state.path.stat().st_dev

    def close(self) -> None:
        """End the mesh and check that nothing of it is left."""
        before: Traces | None = None
        defects = self.defects()
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(OSError):
                before = self.traces()
        try:
            super().close()
        finally:
            (before or Traces(self.home, self.state.path, set(), set())).check_gone(files=False)
        assert not defects, "\n".join(defects)

    def defects(self) -> list[str]:
        """Lines of the processes' logs, and of `ambient up`'s own output, that tell of what nobody foresaw."""
        signs = ("internal error", "Traceback", "never awaited", "Warning:")
        found = []
        for log in (self.out, *sorted(self.state.logs.glob("*.log"))):
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            told = 0
            for number, line in enumerate(lines):
                if number >= told and any(sign in line for sign in signs):
                    told = number + (TRACEBACK if "Traceback" in line else 1)
                    found += [f"{log.name}: {each}" for each in lines[number:told]]
        return found


class Traces:
    """By what a mesh can be recognized after it has ended: its directories, namespaces and processes."""

    def __init__(self, home: Path, state: Path, spaces: set[int], pids: set[int]) -> None:
        self.home = home
        self.state = state
        self.spaces = spaces
        self.started = {pid: _start_time(pid) for pid in pids}

    def found(self) -> list[str]:
        """What still exists of it, in words."""
        left = []
        names = {f"net:[{inode}]" for inode in self.spaces}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if pid == os.getpid():
                continue
            with contextlib.suppress(OSError):
                if self._belongs(pid, names):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    left.append(f"process {pid} {command}")
        left += [f"process {pid}" for pid in self.running()]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        left += [f"mount {line}" for line in mounts if str(self.home) in line]
        sockets = Path("/proc/net/unix").read_text().splitlines()
        left += [f"socket {line}" for line in sockets if str(self.home) in line]
        return left

    def running(self) -> list[int]:
        """Its processes of then which run still."""
        return [pid for pid, began in self.started.items() if began and _start_time(pid) == began]

    def _belongs(self, pid: int, names: set[str]) -> bool:
        process = Path(f"/proc/{pid}")
        if os.readlink(process / "ns/net") in names:
            return True
        state = os.fsencode(self.state)
        if state in (process / "cmdline").read_bytes() or state in (process / "environ").read_bytes():
            return True
        return any(os.readlink(fd) in names for fd in (process / "fd").iterdir())

    def files(self) -> list[str]:
        """Files that an ended mesh shall not have left: all but its CA and its logs."""
        own = [path for path in self.state.iterdir() if path.name not in ("ca", "logs")]
        return [str(path) for path in (*own, *(self.home / "t").iterdir())]

    def check_gone(self, *, files: bool = True) -> None:
        """Fails, saying what is left, if anything is. What was killed may take a moment to disappear."""
        end = time.monotonic() + 20
        while (left := self.found()) and time.monotonic() < end:
            time.sleep(0.02)
        assert not left, "\n".join(left)
        if files:
            assert not self.files(), self.files()


def _environment(pid: int) -> Mapping[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def _start_time(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    words = text[text.rindex(")") + 2 :].split()
    return "" if words[0] == "Z" else words[19]


def alive(pid: int) -> bool:
    """Whether the process runs."""
    return _start_time(pid) != ""


class Conversation:
    """A connection to a line server: usable as long as lines come back."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._count = 0

    def __enter__(self) -> Self:
        self.talk()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def talk(self) -> None:
        """A line there and back. Raises OSError, AssertionError."""
        self._count += 1
        line = f"{MARKER} {self._count}\n".encode()
        self.connection.sendall(line)
        answer = b""
        while not answer.endswith(b"\n"):
            data = self.connection.recv(4096)
            if not data:
                raise ConnectionResetError("the connection was closed")
            answer += data
        assert answer == line

    def works(self) -> bool:
        """Whether it does."""
        try:
            self.talk()
        except OSError:
            return False
        return True


class Load:
    """Short requests from one pod's network, one after the other in each of a few threads, for the block.

    `failures` holds (seconds since the start, what happened), `times` when the others were answered. A request fails
    after `timeout` seconds without an answer.
    """

    def __init__(
        self, mesh: WholeMesh, pod: Pod, address: str, port: int, threads: int = 2, timeout: float = 10
    ) -> None:
        self.failures: list[tuple[float, str]] = []
        self.times: list[float] = []
        self.began = time.monotonic()
        self._stop = threading.Event()
        self._address = (address, port)
        self._timeout = timeout
        self._space = netns.open_path(mesh.state.netns / pod.metadata.uid)
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        os.close(self._space)

    def _run(self) -> None:
        netns.setns(self._space)  # this thread ends there
        while not self._stop.is_set():
            try:
                self._one()
                self.times.append(time.monotonic() - self.began)
            except OSError as error:
                self.failures.append((time.monotonic() - self.began, repr(error)))
                self._stop.wait(0.002)

    def _one(self) -> None:
        with socket.create_connection(self._address, timeout=self._timeout) as connection:
            request = f"GET /{MARKER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            answer = b""
            while data := connection.recv(65536):
                answer += data
            if not answer.startswith(b"HTTP/1.1 200") or MARKER.encode() not in answer:
                raise ConnectionResetError(f"cut off: {answer!r}")

    def wait(self, count: int, limit: float = 20) -> None:
        """Until so many more were answered."""
        target = len(self.times) + count
        until(lambda: len(self.times) >= target, f"{count} requests more are answered", limit)


class LinkWatch:
    """All frames of a node's uplink during the block: how many, and those in which the marker is readable."""

    def __init__(self, mesh: WholeMesh, node: str) -> None:
        with mesh.inside(node):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self._socket.bind(("eth0", ETH_P_ALL))
        self._socket.settimeout(0.1)
        self.frames = 0
        self.sightings: list[bytes] = []
        self._end = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = True
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        buffer = bytearray(1 << 18)
        while True:
            try:
                size = self._socket.recv_into(buffer)
            except TimeoutError:
                if self._end:
                    return
                continue
            except OSError as error:
                if (
                    error.errno == errno.ENETDOWN
                ):  # the link ended with its mesh: there is nothing left to see
                    return
                raise
            self.frames += 1
            if MARKER.encode() in memoryview(buffer)[:size].tobytes():
                self.sightings.append(bytes(buffer[:size]))


def workload(
    name: str,
    *,
    node: str = "",
    replicas: int = 1,
    labels: str = "",
    program: str = "PROGRAM",
    word: str = "hello",
) -> str:
    """A Deployment of the program above, label app=NAME."""
    place = f"nodeName: {node}" if node else ""
    return f"""
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}{labels}}}}}
    spec:
      terminationGracePeriodSeconds: 1
      {place}
      containers:
      - name: main
        command: [{program}]
        env: [{{name: WORD, value: {word}}}]
        ports: [{{name: web, containerPort: {HTTP}}}, {{name: lines, containerPort: {ECHO}}}]
---
"""


def service(name: str, *, app: str = "", port: int = 80, target: str = "web", extra: str = "") -> str:
    """A Service of it, whose target port is a name."""
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  selector: {{app: {app or name}}}
  ports: [{{name: http, port: {port}, targetPort: {target}}}]
  {extra}
---
"""


def idle(name: str, *, node: str = "node-1", namespace: str = "default", labels: str = "") -> str:
    """A Pod in which nothing happens, to run programs in."""
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}{labels}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers: [{{name: main, command: [sleep, infinity]}}]
---
"""


def namespace(name: str = "default", mode: str = "") -> str:
    """A Namespace, in the mesh if `mode` is ambient."""
    labels = f", labels: {{{MODE}: {mode}}}" if mode else ""
    return f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}{labels}}}\n---\n"


def took(change: Callable[[], object], so: Callable[[], object], what: str, limit: float = 20) -> float:
    """Make a change and wait until it is so; the seconds that it took, which are printed too."""
    began = time.monotonic()
    change()
    until(so, what, limit)
    seconds = time.monotonic() - began
    print(f"{what}: {seconds:.2f} s")
    return seconds


__all__: Sequence[str] = [
    "AMBIENT", "ECHO", "HTTP", "MARKER", "MODE", "Conversation", "LinkWatch", "Load", "Traces", "WholeMesh",
    "alive", "idle", "namespace", "service", "took", "until", "workload",
]  # fmt: skip
