"""Many pods on one node: how long each takes into the mesh, what it costs every process, and the end of it all."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import trio
from rich.console import Console

from perf import nginx
from perf.scale.processes import Snapshot, descriptors, memory, of_daemon, snapshot
from perf.scale.report import Cell, Claim, Figures, Part, percentile
from ztunnel.embedded.testmesh import RunningMesh
from ztunnel.store.membership import in_mesh
from ztunnel.store.models import Pod

COUNT = 200
SINGLE = 10  # pods added one by one to those
SAMPLE = 20  # requests from one pod to another
NODE = "node-1"
PORT = 8080
LIMIT = 90.0  # seconds that all of the pods may take for one step
LETTING_GO = 10.0  # seconds that the daemon may take to give back descriptors
ENDING = 60.0  # seconds that `down` may take

NAMESPACE = """
apiVersion: v1
kind: Namespace
metadata: {{name: default, labels: {{istio.io/dataplane-mode: {mode}}}}}
"""

WEB = """
apiVersion: v1
kind: Service
metadata: {{name: web}}
spec: {{selector: {{app: web}}, ports: [{{port: 80, targetPort: {port}}}]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web}}
spec:
  replicas: {count}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      nodeName: {node}
      containers:
        - name: nginx
          command: [nginx, -e, stderr, -p, {root}, -c, {root}/nginx.conf]
          ports: [{{containerPort: {port}}}]
"""


class Moments(NamedTuple):
    """When (time.monotonic) a pod's object was first seen, in the mesh, and ready; 0 for what has not been."""

    appeared: float
    joined: float = 0.0
    ready: float = 0.0


class Observer:
    """Follows the cluster's pods in a thread of its own, as any client of the store may."""

    def __init__(self, mesh: RunningMesh) -> None:
        self.moments: dict[str, Moments] = {}
        self._store = mesh.objects()
        self._end: Callable[[], None] = lambda: None
        self._follows = threading.Event()

    @contextmanager
    def following(self) -> Iterator["Observer"]:
        """Follow for the block."""
        thread = threading.Thread(target=trio.run, args=(self._follow,))
        thread.start()
        self._follows.wait()
        try:
            yield self
        finally:
            self._end()
            thread.join()

    async def _follow(self) -> None:
        token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as scope:
            self._end = partial(token.run_sync_soon, scope.cancel)
            self._follows.set()
            async for change in self._store.watch(Pod):
                if isinstance(change.obj, Pod) and change.op in ("added", "modified"):
                    self._see(change.obj, time.monotonic())

    def _see(self, pod: Pod, now: float) -> None:
        known = self.moments.get(pod.name, Moments(now))
        if in_mesh(pod) and not known.joined:
            known = known._replace(joined=now)
        if pod.ready and not known.ready:
            known = known._replace(ready=now)
        self.moments[pod.name] = known


def measure(console: Console, count: int = COUNT) -> Part:
    """Run the part. Raises AssertionError where a step takes longer than any user would wait."""
    mesh = RunningMesh(nodes=1)
    root = mesh.home
    hello = 'location / { return 200 "from $hostname\\n"; }'
    nginx.write(root, PORT, process=nginx.SINGLE, connections=64, http="", server=hello, backlog=0)
    _label(mesh, "ambient")
    with console.status(f"{count} pods: starting") as status, mesh:
        start = snapshot(mesh)
        with Observer(mesh).following() as observer:
            status.update(f"{count} pods: all at once")
            began = time.monotonic()
            _replicas(mesh, count)
            _wait(mesh, count)
            together = time.monotonic() - began
            held = snapshot(mesh)
            waits = [one.joined - one.appeared for one in observer.moments.values()]
            status.update(f"{count} pods: one more, and one more")
            single = [_one_more(mesh, observer, count + number) for number in range(1, SINGLE + 1)]
        status.update(f"{count} pods: all out of the mesh, and in again")
        before = _descriptors(mesh)
        leaving = _timed(mesh, lambda: _label(mesh, "none"), joined=False)
        joining = _timed(mesh, lambda: _label(mesh, "ambient"), joined=True)
        more = _descriptors_beyond(mesh, before)
        status.update(f"{count} pods: requests through some of them")
        failed = _requests(mesh)
        status.update(f"{count} pods: down")
        began = time.monotonic()
        code = mesh.stop(limit=ENDING)
        down = time.monotonic() - began
        left = sum(1 for _ in mesh.state.netns.iterdir()) if mesh.state.netns.exists() else 0
    times: list[tuple[Cell, ...]] = [
        (f"{count} at once, each until it is in the mesh", *_spread(waits)),
        (f"{count} at once, all in the mesh and ready", "", "", together),
        ("one more, until it is in the mesh and ready", *_spread(single)),
        (f"all {count + SINGLE}, running, out of the mesh", "", "", leaving),
        (f"all {count + SINGLE}, running, into the mesh again", "", "", joining),
        ("down", "", "", down),
    ]
    return Part(
        "pods",
        [
            Figures(f"{count} pods on one node: seconds", ("what", "p50", "p99", "all"), times),
            _costs(start, held, count),
        ],
        [
            Claim(f"requests that failed, of {SAMPLE} from pod to pod", "", failed, 0),
            Claim("exit code of the mesh, and namespaces that it left", "", abs(code) + left, 0),
            Claim(
                "memory that a pod costs the daemon (PSS)", "KiB", _memory_per_pod(start, held, count), 100
            ),
            Claim("descriptors of the daemon that leaving and joining left over", "", more, 0),
        ],
    )


def _label(mesh: RunningMesh, mode: str) -> None:
    mesh.write("namespace.yaml", NAMESPACE.format(mode=mode))


def _replicas(mesh: RunningMesh, count: int) -> None:
    mesh.write("web.yaml", WEB.format(count=count, node=NODE, root=mesh.home, port=PORT))


def _wait(mesh: RunningMesh, count: int, *, joined: bool = True) -> None:
    """Until there are so many pods, all ready, and in the mesh or out of it."""

    def settled() -> bool:
        pods = mesh.objects().list(Pod)
        return len(pods) == count and all(pod.ready and in_mesh(pod) is joined for pod in pods)

    mesh.until(settled, f"{count} pods are ready and {'in' if joined else 'out of'} the mesh", LIMIT)


def _timed(mesh: RunningMesh, change: Callable[[], None], *, joined: bool) -> float:
    began = time.monotonic()
    change()
    _wait(mesh, len(mesh.objects().list(Pod)), joined=joined)
    return time.monotonic() - began


def _one_more(mesh: RunningMesh, observer: Observer, count: int) -> float:
    """Seconds from the changed Deployment to its new pod being ready, and in the mesh."""
    before = set(observer.moments)
    began = time.monotonic()
    _replicas(mesh, count)

    def done() -> float:
        fresh = [one for name, one in observer.moments.items() if name not in before]
        return fresh[0].ready if fresh and fresh[0].joined and fresh[0].ready else 0.0

    return float(mesh.until(done, "one more pod is ready", LIMIT)) - began


def _requests(mesh: RunningMesh) -> int:
    """Requests from pods to others, both taken at random; how many failed."""
    pods = {pod["name"]: pod["ip"] for pod in mesh.pods()}
    choice = random.Random(1)  # noqa: S311  a sample, no secret
    failed = 0
    for _ in range(SAMPLE):
        source, target = choice.sample(sorted(pods), 2)
        done = mesh.exec(source, "curl", "-s", "--max-time", "5", f"http://{pods[target]}:{PORT}/")
        failed += done.stdout != f"from {target}\n"
    return failed


def _spread(values: list[float]) -> tuple[float, float, float]:
    return percentile(values, 0.5), percentile(values, 0.99), max(values)


def _costs(start: Snapshot, held: Snapshot, count: int) -> Figures:
    rows: list[tuple[Cell, ...]] = []
    for name, now in held.items():
        before = start[name]
        rows.append(
            (
                name,
                before.memory,
                now.memory,
                (now.memory - before.memory) * 1024 / count,
                before.descriptors,
                now.descriptors,
                (now.descriptors - before.descriptors) / count,
                (now.processor - before.processor) * 1000 / count,
            )
        )
    columns = (
        "process",
        "MiB empty",
        f"MiB with {count}",
        "KiB a pod",
        "fds empty",
        f"fds with {count}",
        "fds a pod",
        "CPU ms a pod",
    )
    return Figures("what they cost", columns, rows)


def _memory_per_pod(start: Snapshot, held: Snapshot, count: int) -> float:
    """KiB of all of the daemon's processes."""
    return (memory(of_daemon(held, NODE)) - memory(of_daemon(start, NODE))) * 1024 / count


def _descriptors(mesh: RunningMesh) -> int:
    return descriptors(of_daemon(snapshot(mesh), NODE))


def _descriptors_beyond(mesh: RunningMesh, before: int) -> int:
    """How many more the daemon has than before, once it has given back what it lets go of a moment later."""
    last = time.monotonic() + LETTING_GO
    while (more := _descriptors(mesh) - before) > 0 and time.monotonic() < last:
        time.sleep(0.2)
    return more
