"""A large mesh: 100,000 workloads and 10,000 services loaded while traffic runs, and one pod of 10,000 that changes.

The source is the project's own control plane, a process that follows a directory with a file for each object. It is
killed once the files are there; its successor reads them, the node's proxy connects again and gets them all at once.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from perf import nginx
from perf.load import HTTP_PORT, LoadError
from perf.machine import pss_mib
from perf.pods import Pod, end
from perf.scale import objects, prober
from perf.scale.processes import Snapshot, memory, of_daemon, snapshot
from perf.scale.report import Cell, Claim, Figures, Part, percentile
from perf.scale.traffic import CONNECTIONS, Traffic, Weather
from ztunnel.embedded.testmesh import RunningMesh
from ztunnel.store.models import Pod as PodObject
from ztunnel.store.models import Service

PODS, SERVICES = 100_000, 10_000
FEW_PODS, FEW_SERVICES = 10_000, 1_000  # of those, for the changes
CHANGES = 100
CALM = 5.0  # seconds of traffic before and after
LOAD_LIMIT = 90.0  # seconds until the proxy must have it all
CHANGE_LIMIT = 5.0
NODE = "node-1"
CONTROL = f"{NODE} ztunnel control"
REPOSITORY = Path(__file__).parents[2]

LOAD_SECONDS = (30.0, 5.0)  # required and wanted
LOAD_MEMORY = (400.0, 150.0)  # MiB, PSS of the control process
CHANGE_SECONDS = (0.500, 0.050)  # p99

RESOURCES = """
apiVersion: v1
kind: Namespace
metadata: {{name: default, labels: {{istio.io/dataplane-mode: ambient}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: changing}}
spec: {{selector: {{app: changing}}, ports: [{{port: {port}}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: client}}
spec: {{containers: [{{name: client, command: [sleep, infinity]}}]}}
"""

SERVER = """
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  containers:
    - name: nginx
      command: [nginx, -e, stderr, -p, {root}, -c, {root}/nginx.conf]
      ports: [{{containerPort: {port}}}]
"""

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")


class Log:
    """What a process of the mesh writes into its log from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size

    def find(self, words: str) -> tuple[float, str] | None:
        """The first line with these words: when it was written (seconds of the epoch), and the line."""
        with self._path.open("rb") as log:
            log.seek(self._offset)
            for raw in log:
                line = raw.decode()
                if words in line and line.endswith("\n") and (found := _TIME.search(line)):
                    return datetime.fromisoformat(found[0]).timestamp(), line
        return None


class Loaded(NamedTuple):
    """How the load went; moments in seconds of the epoch, memory in MiB."""

    killed: float
    serving: float  # the control plane has read its objects
    connected: float  # the proxy asks for them
    applied: float  # the proxy has them all
    peak: dict[str, float]
    after: Snapshot


def measure(console: Console, pods: int = PODS, services: int = SERVICES) -> Part:
    """Run the part. Raises LoadError where a program fails, AssertionError where something takes too long."""
    mesh = _mesh()
    store, model = mesh.home / "store", mesh.home / "model"
    for folder in (store, model):
        folder.mkdir()
    (store / "mesh").symlink_to(mesh.state.objects)
    with console.status("a large mesh: writing its objects") as status, mesh:
        objects.write(model / "few", FEW_PODS, FEW_SERVICES)
        objects.write(model / "rest", pods - FEW_PODS, services - FEW_SERVICES, first=FEW_PODS)
        mesh.wait_pods(mesh=True)
        client, server, changing = (_pod(mesh, name) for name in ("client", "server", "changing"))
        start = snapshot(mesh)
        with Traffic(client, f"{server.ip}:{HTTP_PORT}").flowing() as traffic:
            status.update("a large mesh: traffic before it")
            began = time.time()
            time.sleep(CALM)
            status.update("a large mesh: it is loaded")
            for name in ("few", "rest"):
                (store / name).symlink_to(model / name)
            loaded = _load(mesh, pods + services)
            status.update("a large mesh: traffic with it")
            time.sleep(CALM)
            ended = time.time()
        status.update(f"a large mesh: less of it, and {CHANGES} changes of one pod")
        (store / "rest").unlink()
        _load(mesh, FEW_PODS + FEW_SERVICES)
        changes = _changes(mesh, client, changing)
    weather = {
        "before": Weather.of(traffic.between(began, loaded.killed)),
        "the control plane reads": Weather.of(traffic.between(loaded.killed, loaded.connected)),
        "the proxy loads": Weather.of(traffic.between(loaded.connected, loaded.applied)),
        "after": Weather.of(traffic.between(loaded.applied, ended)),
    }
    return Part(
        "model",
        [_traffic_figures(weather), _memory_figures(start, loaded), _time_figures(loaded, changes)],
        _claims(traffic, loaded, changes),
    )


def _mesh() -> RunningMesh:
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    mesh = RunningMesh(nodes=1, env={**os.environ, "PYTHONPATH": path})
    mesh.argv = [sys.executable, "-P", "-m", "perf.scale.up"]
    mesh.argv += [mesh.directory, mesh.state.path, "1", mesh.home / "store"]
    nginx.write(mesh.home, HTTP_PORT, process=nginx.SINGLE)
    servers = (SERVER.format(name=name, root=mesh.home, port=HTTP_PORT) for name in ("server", "changing"))
    mesh.write("resources.yaml", RESOURCES.format(port=HTTP_PORT) + "".join(servers))
    return mesh


def _pod(mesh: RunningMesh, name: str) -> Pod:
    found = mesh.objects().get(PodObject, "default", name)
    assert found is not None  # noqa: S101  it is ready
    return Pod(name, found.addresses[0], mesh.state.netns / found.metadata.uid)


def _load(mesh: RunningMesh, resources: int) -> Loaded:
    """Replace the control plane by one that reads what is there now, and wait until the node's proxy has it."""
    plane, proxy = Log(mesh.state.logs / "controlplane.log"), Log(mesh.state.logs / f"ztunnel-{NODE}.log")
    control = int(mesh.status()["nodes"][0]["ztunnel"]["pid"])
    killed = time.time()
    os.kill(int(mesh.status()["controlplane"]["pid"]), signal.SIGKILL)
    with _peaks({CONTROL: control}) as peaks:
        applied, line = mesh.until(lambda: proxy.find("xDS state complete"), "the proxy has all", LOAD_LIMIT)
    count = re.search(r"complete: (\d+) resources", line)
    if count is None or int(count[1]) < resources:
        raise LoadError(f"the proxy was to get {resources} resources: {line.strip()}")
    serving, connected = plane.find("listening"), plane.find("client connected")
    assert serving is not None and connected is not None  # noqa: S101, PT018  else the proxy had nothing
    time.sleep(1)
    return Loaded(killed, serving[0], connected[0], applied, peaks, snapshot(mesh))


@contextmanager
def _peaks(pids: dict[str, int]) -> Iterator[dict[str, float]]:
    """The most memory that each of the processes has during the block, looked at five times a second."""
    found = dict.fromkeys(pids, 0.0)
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for name, pid in pids.items():
                found[name] = max(found[name], pss_mib(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _changes(mesh: RunningMesh, client: Pod, changing: Pod) -> list[float]:
    """Take the only endpoint of a Service out and in again; seconds until new connections go the other way."""
    store = mesh.objects()
    service = store.get(Service, "default", "changing")
    assert service is not None  # noqa: S101  its pod is ready
    program = client.start(
        [sys.executable, "-I", "-S", prober.__file__, service.addresses[0], str(HTTP_PORT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    waits = []
    choice = random.Random(1)  # noqa: S311  pauses, no secret
    try:
        _outcome(program, "up")
        for number in range(CHANGES):
            ready = number % 2 == 1
            time.sleep(choice.uniform(0.05, 0.15))
            condition = {"type": "Ready", "status": "True" if ready else "False"}
            began = time.monotonic()
            store.patch(PodObject, "default", changing.name, {"status": {"conditions": [condition]}})
            waits.append(_outcome(program, "up" if ready else "down") - began)
    finally:
        end(program)
    return waits


def _outcome(program: "subprocess.Popen[str]", wanted: str) -> float:
    """When the prober saw the outcome change to that. Raises LoadError where it says anything else, or nothing."""
    assert program.stdout is not None  # noqa: S101  a pipe
    timer = threading.Timer(CHANGE_LIMIT, program.kill)
    timer.start()
    line = program.stdout.readline()
    timer.cancel()
    word, _, moment = line.partition(" ")
    if word != wanted:
        raise LoadError(
            f"the changed pod was to be {wanted} within {CHANGE_LIMIT:g} s: {line or 'nothing came'}"
        )
    return float(moment)


def _traffic_figures(weather: dict[str, Weather]) -> Figures:
    rows: list[tuple[Cell, ...]] = [
        (name, one.seconds, one.rate, one.p50, one.p99, one.worst_p99) for name, one in weather.items()
    ]
    columns = ("while", "seconds", "requests/s", "p50 us", "p99 us", "worst second's p99 us")
    return Figures(f"traffic through the node, {CONNECTIONS} connections", columns, rows)


def _memory_figures(start: Snapshot, loaded: Loaded) -> Figures:
    rows: list[tuple[Cell, ...]] = [
        (name, before.memory, loaded.peak.get(name, ""), loaded.after[name].memory)
        for name, before in start.items()
    ]
    before, after = (memory(of_daemon(taken, NODE)) for taken in (start, loaded.after))
    rows.append((f"{NODE} ztunnel, all of it", before, "", after))
    return Figures("memory (PSS, MiB)", ("process", "before", "peak", "after"), rows)


def _time_figures(loaded: Loaded, changes: list[float]) -> Figures:
    rows: list[tuple[Cell, ...]] = [
        ("the control plane starts and reads its objects", loaded.serving - loaded.killed),
        ("the proxy connects", loaded.connected - loaded.serving),
        ("the proxy has everything", loaded.applied - loaded.connected),
        (
            f"a pod of {FEW_PODS:,} changes, until new connections go the other way, p50",
            percentile(changes, 0.5),
        ),
        ("the same, p99", percentile(changes, 0.99)),
    ]
    return Figures("seconds", ("what", "seconds"), rows)


def _claims(traffic: Traffic, loaded: Loaded, changes: list[float]) -> list[Claim]:
    control = loaded.after[CONTROL].memory
    failures = f" ({traffic.failures[0]})" if traffic.failures else ""
    return [
        Claim(f"seconds of traffic with failed requests{failures}", "", len(traffic.failures), 0),
        Claim("time until the proxy has everything", "s", loaded.applied - loaded.connected, *LOAD_SECONDS),
        Claim("memory of the proxy's control process with it (PSS)", "MiB", control, *LOAD_MEMORY),
        Claim("the same at its peak", "MiB", loaded.peak[CONTROL], LOAD_MEMORY[0]),
        Claim(f"one pod of {FEW_PODS:,} changes, p99", "s", percentile(changes, 0.99), *CHANGE_SECONDS),
    ]
