"""Watches a mesh from outside while it is soaked: memory and descriptors of its processes, sockets in its namespaces,
certificates, the control plane's revision, and in the end the logs."""

import contextlib
import http.client
import json
import os
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from perf.soaking.claims import Point
from ztunnel.cli.nodes import UnixConnection
from ztunnel.embedded.testmesh import RunningMesh
from ztunnel.inpod import netns
from ztunnel.store.models import Pod

LOOK = 2.0  # seconds between samples of the processes
LOOK_SELDOM = 3  # looks between two at certificates and sockets
ANSWER = 10.0  # seconds that an admin page may take
TICKS = os.sysconf("SC_CLK_TCK")
STATES = {
    "01": "ESTABLISHED", "02": "SYN_SENT", "03": "SYN_RECV", "04": "FIN_WAIT1", "05": "FIN_WAIT2", "06": "TIME_WAIT",
    "07": "CLOSE", "08": "CLOSE_WAIT", "09": "LAST_ACK", "0A": "LISTEN", "0B": "CLOSING", "0C": "NEW_SYN_RECV",
}  # fmt: skip
UNANSWERED = (OSError, http.client.HTTPException, ValueError)
LINGERING = ("CLOSE_WAIT", "FIN_WAIT2")
"""What piles up where one end of a connection is forgotten."""

_JSON_LEVEL = re.compile(rb'"level":"(\w+)"')
_TEXT_LEVEL = re.compile(rb"[\d\-T:.Z]+(?: [\d:,]+)? (\w+)")  # the time is one word or two


class Sizes(NamedTuple):
    """A process's memory in MiB (PSS, and the part of it that is no file's), open descriptors, seconds of CPU."""

    pss: float
    anonymous: float
    descriptors: int
    cpu: float


def sizes(pid: int) -> Sizes:
    """Of a process. Raises OSError if there is none."""
    memory: dict[str, int] = defaultdict(int)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        memory[name] = int(rest.split()[0])
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Sizes(
        memory["Pss"] / 1024,
        (memory["Pss_Anon"] + memory["Pss_Shmem"]) / 1024,
        len(os.listdir(f"/proc/{pid}/fd")),
        (int(stat[11]) + int(stat[12])) / TICKS,
    )


def tcp_states(namespace: Path) -> Counter[str]:
    """How many TCP sockets of a network namespace are in which state."""
    found: Counter[str] = Counter()
    fd = netns.open_path(namespace)
    try:
        with netns.inside(fd):
            for table in ("tcp", "tcp6"):
                lines = Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]
                found.update(STATES[line.split(maxsplit=4)[3]] for line in lines)
    finally:
        os.close(fd)
    return found


def config_dump(mesh: RunningMesh, node: str) -> dict[str, Any]:
    """What a node's proxy knows. Raises OSError, HTTPException, ValueError."""
    with contextlib.closing(UnixConnection(mesh.state.node(node) / "admin.sock", ANSWER)) as connection:
        connection.request("GET", "/config_dump")
        dump: dict[str, Any] = json.loads(connection.getresponse().read())
        return dump


class Watch:
    """Samples from `start` to `stop`, by a thread. Times are seconds since `start`.

    `pods` are the names of those whose certificates and sockets count: the ones that stay.
    """

    def __init__(self, mesh: RunningMesh, pods: Iterable[str]) -> None:
        self.mesh = mesh
        self.nodes = [node["name"] for node in mesh.status()["nodes"]]
        self.processes: dict[str, int] = {}
        self.memory: dict[str, list[Point]] = defaultdict(list)
        self.anonymous: dict[str, list[Point]] = defaultdict(list)
        self.descriptors: dict[str, list[Point]] = defaultdict(list)
        self.lingering: dict[str, list[Point]] = {state: [] for state in LINGERING}
        self.cpu: dict[str, tuple[float, float]] = {}  # seconds at first, and now
        self.renewals: dict[str, set[float]] = defaultdict(set)
        self.certificate_errors: set[str] = set()
        self.revisions: dict[str, tuple[int, int]] = {}  # of each node: at first, and now
        self.errors: list[str] = []
        self._pods = frozenset(pods)
        self._namespaces = self._find_namespaces()
        self._began = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Find the processes and begin. Raises OSError."""
        self.processes = find_processes(self.mesh)
        self._began = time.monotonic()
        self._look(rarely=True)
        self._thread.start()

    def stop(self) -> None:
        """Look a last time and end."""
        self._stop.set()
        self._thread.join()
        self._look(rarely=True)

    def states(self) -> Counter[str]:
        """The TCP sockets of all pods that stay, by state."""
        return sum(map(tcp_states, self._namespaces), Counter())

    def open_connections(self) -> dict[str, int]:
        """Connections that the workers still have, or have not accounted for, by node; -1 where nobody answers."""
        found = {}
        for node in self.nodes:
            try:
                stats = config_dump(self.mesh, node)["stats"]
            except UNANSWERED:
                found[node] = -1
            else:
                found[node] = sum(max(one["connections"], one["opened"] - one["closed"]) for one in stats)
        return found

    def without(self, services: set[str]) -> list[str]:
        """The nodes whose proxies do not know exactly these Services."""
        found = []
        for node in self.nodes:
            try:
                known = {one["name"] for one in config_dump(self.mesh, node)["services"]}
            except UNANSWERED:
                known = set()
            if known != services:
                found.append(node)
        return found

    def restarted(self) -> list[str]:
        """The processes that are not the ones of the beginning."""
        try:
            now = find_processes(self.mesh)
        except UNANSWERED:
            return ["one that does not answer"]
        return [name for name, pid in self.processes.items() if now.get(name) != pid]

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(LOOK):
            number += 1
            self._look(rarely=number % LOOK_SELDOM == 0)

    def _look(self, *, rarely: bool) -> None:
        at = time.monotonic() - self._began
        try:
            for name, pid in self.processes.items():
                found = sizes(pid)
                self.memory[name].append(Point(at, found.pss))
                self.anonymous[name].append(Point(at, found.anonymous))
                self.descriptors[name].append(Point(at, found.descriptors))
                self.cpu[name] = (self.cpu.get(name, (found.cpu, 0))[0], found.cpu)
            if rarely:
                states = self.states()
                for state in LINGERING:
                    self.lingering[state].append(Point(at, states[state]))
                for node in self.nodes:
                    self._take(node, config_dump(self.mesh, node))
        except UNANSWERED as error:
            self.errors.append(f"after {at:.0f} s: {error}")

    def _take(self, node: str, dump: Mapping[str, Any]) -> None:
        revision = int(dump["xds"]["version"] or 0)
        self.revisions[node] = (self.revisions.get(node, (revision, 0))[0], revision)
        for certificate in dump["certificates"]:
            identity = certificate["identity"]
            if identity.rpartition("/")[2] not in self._pods:
                continue
            if certificate["not_after"]:
                self.renewals[f"{identity} on {node}"].add(certificate["not_after"])
            if certificate["state"] != "valid" or certificate["last_error"]:
                self.certificate_errors.add(
                    f"{identity} on {node}: {certificate['state']} {certificate['last_error']}".strip()
                )

    def _find_namespaces(self) -> list[Path]:
        pods = self.mesh.objects().list(Pod)
        return [
            self.mesh.state.netns / pod.metadata.uid
            for pod in pods
            if pod.name in self._pods and not pod.spec.host_network
        ]


def find_processes(mesh: RunningMesh) -> dict[str, int]:
    """The pid of each process of the mesh, by a name for people."""
    status = mesh.status()
    found = {"supervisor": int(status["pid"]), "control plane": int(status["controlplane"]["pid"])}
    for node in status["nodes"]:
        name = node["name"]
        found[f"agent, {name}"] = int(node["agent"]["pid"])
        found[f"ztunnel, {name}"] = int(node["ztunnel"]["pid"])
        for worker in config_dump(mesh, name)["workers"]:
            found[f"worker {worker['worker']}, {name}"] = int(worker["pid"])
    return found


class LogFindings(NamedTuple):
    """What is in the logs of the mesh's processes: lines that tell of a defect, and how often what was warned of."""

    defects: list[str]
    warnings: Counter[str]


def read_logs(directory: Path) -> LogFindings:
    """Look through the logs (those of the pods' programs are not among them)."""
    found = LogFindings([], Counter())
    for path in sorted(directory.glob("*.log")):
        with path.open("rb") as lines:
            for line in lines:
                kind = classify(line)
                if kind == "defect":
                    found.defects.append(f"{path.stem}: {line.decode(errors='replace').strip()}")
                elif kind == "warning":
                    found.warnings[f"{path.stem}: {_message(line)}"] += 1
    return found


def classify(line: bytes) -> str:
    """What a log line tells of: "defect", "warning", or "".

    The access log's errors are connections that failed: aborted and refused ones on purpose, others are counted by the
    clients. Everything else at level error is a defect, and so is a traceback at any level.
    """
    if b"Traceback (most recent call last)" in line or b"internal error" in line:
        return "defect"
    if b'"scope":"access"' in line:
        return ""
    match = _JSON_LEVEL.search(line) if line.startswith(b"{") else _TEXT_LEVEL.match(line)
    level = match[1].lower() if match else b""
    if level in (b"error", b"critical"):
        return "defect"
    return "warning" if level in (b"warn", b"warning") else ""


def _message(line: bytes) -> str:
    """The words of a line without its numbers, so that the same warnings count together."""
    text = line.decode(errors="replace").strip()
    try:
        text = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        text = text.partition(" ")[2]
    return re.sub(r"\d+", "N", text)[:160]
