"""Many connections through one node: opened, used, held, used again, closed. Nothing may fail, nothing may stay."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from perf import nginx
from perf.load import HTTP_PORT, LoadError
from perf.pods import Pod, end
from perf.scale import holder
from perf.scale.processes import Snapshot, descriptors, memory, of_daemon, snapshot
from perf.scale.report import Cell, Claim, Figures, Part
from ztunnel.embedded.testmesh import RunningMesh
from ztunnel.store.models import Pod as PodObject

COUNT = 10_000
CLIENTS, SERVERS = 4, 2
FIRST = 8  # connections of each client before anything is measured
SPARE = 1000  # descriptors that processes have besides those of the connections
ROUNDS = 3
NODES = ("node-1", "node-2")
TUNNEL_IDLE = (
    2  # seconds after which a tunnel without streams is closed; the proxy's own setting, 5 minutes as a rule
)
QUIET = 1.0  # seconds in which nothing is given back: that was all
SETTLED = 20.0  # the same, where more is known to come
GROWTH = 5.0  # per cent of memory that the last round may leave beyond what the one before left

RESOURCES = """
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
"""

CLIENT = """
---
apiVersion: v1
kind: Pod
metadata: {{name: client-{number}}}
spec:
  nodeName: node-1
  containers: [{{name: client, command: [sleep, infinity]}}]
"""

SERVER = """
---
apiVersion: v1
kind: Pod
metadata: {{name: server-{number}}}
spec:
  nodeName: node-2
  containers:
    - name: nginx
      command: [nginx, -e, stderr, -p, {root}, -c, {root}/nginx.conf, -g, "pid {root}/nginx-{number}.pid;"]
      ports: [{{containerPort: {port}}}]
"""


class Step(NamedTuple):
    """What all holders did: how many, why others failed, seconds until the last, the slowest holder's waits."""

    done: int
    failed: Counter[str]
    seconds: float
    p50: float
    p99: float


class Round(NamedTuple):
    """One time from nothing to all connections and back."""

    opened: Step
    used: Step
    again: Step
    tracked: int
    held: Snapshot
    after: Snapshot
    returning: float


class Holders:
    """The programs in the clients' pods that hold the connections."""

    def __init__(self, programs: "Sequence[subprocess.Popen[str]]") -> None:
        self._programs = programs

    def tell(self, *words: object) -> Step:
        """Have all of them do something, and wait until they have. Raises OSError where one has ended."""
        line = " ".join(map(str, words)) + "\n"
        began = time.monotonic()
        for program in self._programs:
            assert program.stdin is not None  # noqa: S101  a pipe
            program.stdin.write(line)
            program.stdin.flush()
        reports = [_answer(program) for program in self._programs]
        failed: Counter[str] = Counter()
        for report in reports:
            failed.update(report.get("failed", {}))
        return Step(
            sum(report["done"] for report in reports),
            failed,
            time.monotonic() - began,
            max(report.get("p50_ms", 0.0) for report in reports),
            max(report.get("p99_ms", 0.0) for report in reports),
        )


def _answer(program: "subprocess.Popen[str]") -> dict[str, Any]:
    assert program.stdout is not None  # noqa: S101  a pipe
    line = program.stdout.readline()
    if not line:
        raise OSError(f"a holder of connections ended: {program.communicate()[1]}")
    found: dict[str, Any] = json.loads(line)
    return found


@contextlib.contextmanager
def _holders(clients: Sequence[Pod], servers: Sequence[Pod]) -> Iterator[Holders]:
    """A holder in each client's pod; servers take turns."""
    programs: list[subprocess.Popen[str]] = []
    try:
        for number, client in enumerate(clients):
            target = servers[number % len(servers)].ip
            argv = [sys.executable, "-I", "-S", holder.__file__, target, str(HTTP_PORT)]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            programs.append(client.start(argv, **pipes))
        yield Holders(programs)
    finally:
        for program in programs:
            end(program)


def measure(console: Console, count: int = COUNT) -> Part:
    """Run the part. Raises LoadError, OSError where it cannot be run, AssertionError where the mesh does not start."""
    _check_limits(count)
    mesh = RunningMesh(env={**os.environ, "POOL_UNUSED_RELEASE_TIMEOUT": f"{TUNNEL_IDLE}s"})
    _prepare(mesh, count)
    with console.status(f"{count:,} connections: starting") as status, mesh:
        mesh.wait_pods(mesh=True)
        clients, servers = _pods(mesh, "client"), _pods(mesh, "server")
        with _holders(clients, servers) as holders:
            # What every process needs for its first connections is not what a connection costs.
            holders.tell("open", FIRST)
            holders.tell("close")
            time.sleep(TUNNEL_IDLE)
            start, _ = _settled(mesh, None)
            rounds = []
            for number in range(1, ROUNDS + 1):
                status.update(f"{count:,} connections: round {number} of {ROUNDS}")
                rounds.append(_round(mesh, holders, clients, count, start))
    return _part(count, start, rounds)


def _check_limits(count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + SPARE:
        raise LoadError(
            f"a process may open {hard} files, {count + SPARE} are needed: raise it with ulimit -Hn"
        )


def _prepare(mesh: RunningMesh, count: int) -> None:
    http = f"{nginx.LONG_LIVED} keepalive_timeout 600s;"
    nginx.write(mesh.home, HTTP_PORT, connections=count // SERVERS + SPARE, http=http, pid=False)
    pods = [CLIENT.format(number=number) for number in range(CLIENTS)]
    pods += [SERVER.format(number=number, root=mesh.home, port=HTTP_PORT) for number in range(SERVERS)]
    mesh.write("resources.yaml", RESOURCES + "".join(pods))


def _pods(mesh: RunningMesh, prefix: str) -> list[Pod]:
    return [
        Pod(pod.name, pod.addresses[0], mesh.state.netns / pod.metadata.uid)
        for pod in sorted(mesh.objects().list(PodObject), key=lambda pod: pod.name)
        if pod.name.startswith(prefix)
    ]


def _round(mesh: RunningMesh, holders: Holders, clients: Sequence[Pod], count: int, start: Snapshot) -> Round:
    opened = holders.tell("open", count // CLIENTS)
    used = holders.tell("use")
    held = snapshot(mesh)
    tracked = max(map(_tracked, clients))
    again = holders.tell("use")
    holders.tell("close")
    after, returning = _settled(mesh, start)
    return Round(opened, used, again, tracked, held, after, returning)


def _tracked(pod: Pod) -> int:
    """How many connections the kernel tracks in a pod's namespace."""
    with pod.inside():
        return int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text())


def _settled(mesh: RunningMesh, start: Snapshot | None) -> tuple[Snapshot, float]:
    """Once the daemons have the descriptors of the start, or give none back any more; and the seconds it took."""
    began = time.monotonic()
    least, since = 1 << 30, began
    while True:
        now = snapshot(mesh)
        held = _held(now)
        if start is not None and held <= _held(start):
            return now, time.monotonic() - began
        if held < least:
            least, since = held, time.monotonic()
        if time.monotonic() - since > (QUIET if start is None else SETTLED):
            return now, time.monotonic() - began
        time.sleep(0.1)


def _held(taken: Snapshot) -> int:
    return sum(descriptors(of_daemon(taken, node)) for node in NODES)


def _part(count: int, start: Snapshot, rounds: Sequence[Round]) -> Part:
    times: list[tuple[Cell, ...]] = []
    for number, one in enumerate(rounds, 1):
        steps = {"opened, a request each": one.opened, "used": one.used, "used again": one.again}
        times += [
            (f"round {number}: {name}", step.done, step.seconds, step.done / step.seconds, step.p50, step.p99)
            for name, step in steps.items()
        ]
        times.append((f"round {number}: closed, and everything given back", "", one.returning, "", "", ""))
    return Part(
        "connections",
        [
            Figures(
                f"{count:,} connections through one node",
                ("step", "connections", "seconds", "a second", "p50 ms", "p99 ms"),
                times,
            ),
            _costs(count, start, rounds),
        ],
        _claims(count, start, rounds),
    )


def _costs(count: int, start: Snapshot, rounds: Sequence[Round]) -> Figures:
    first, last = rounds[0], rounds[-1]
    rows: list[tuple[Cell, ...]] = []
    for node in NODES:
        for name, before in of_daemon(start, node).items():
            held = first.held[name]
            rows.append(
                (
                    name,
                    before.memory,
                    held.memory,
                    first.after[name].memory,
                    last.after[name].memory,
                    before.descriptors,
                    held.descriptors,
                    last.after[name].descriptors,
                )
            )
        a_connection = (memory(of_daemon(first.held, node)) - memory(of_daemon(start, node))) * 1024 / count
        rows.append((f"{node}: KiB a connection", "", a_connection, "", "", "", "", ""))
    columns = ("process", "MiB", "held", "closed", "at the end", "fds", "held", "at the end")
    return Figures("what they cost: memory (PSS) and descriptors", columns, rows)


def _claims(count: int, start: Snapshot, rounds: Sequence[Round]) -> list[Claim]:
    last = rounds[-1]
    failed = sum(
        (step.failed for one in rounds for step in (one.opened, one.used, one.again)), Counter[str]()
    )
    reasons = "; ".join(f"{number} x {reason}" for reason, number in failed.items())
    claims = [
        Claim(f"connections that failed{f' ({reasons})' if reasons else ''}", "", failed.total(), 0),
        Claim("connections short of those asked for, held open", "", count - last.again.done, 0),
        Claim("descriptors that are not given back", "", _held(last.after) - _held(start), 0),
    ]
    claims += [
        Claim(
            f"{node}: memory after round {len(rounds)} beyond the round before",
            "%",
            100 * (memory(of_daemon(last.after, node)) / memory(of_daemon(rounds[-2].after, node)) - 1),
            GROWTH,
        )
        for node in NODES
    ]
    claims.append(
        Claim(
            "connections tracked in a client's pod",
            "",
            max(one.tracked for one in rounds),
            int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text()),
        )
    )
    return claims
