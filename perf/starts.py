"""`python -m perf starts`: what the mesh adds to the start of a pod on Kubernetes, by steps, idle and beside load.

Pods of one namespace of the mesh are started on one node, one after the other. Before and after each the agent is
asked what it has measured: how long its CNI plugin was kept waiting, and how long each step took (docs/cni.md). The
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from cni.counting import STEPS
from perf.machine import refusal
from perf.memory import cluster
from perf.scale.report import Claim, Figures, Part, percentile, show, write
from tests.kube.binaries import BuildError
from tests.kube.cell import CellError
from tests.kube.image import ImageError
from tests.kube.lab import Lab, LabError
from tests.kube.sample import LABEL, ambient, install

RESULTS = Path(__file__).parent / "results"
WIDTH = 120
LIMIT = 120.0
SPACE = "perf-starts"
ALLOWED = 50.0  # ms that the mesh may add
WHOLE = "istio_cni_plugin_request_duration_seconds_sum"
STEP = "istio_cni_plugin_step_duration_seconds_sum"
POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: c, image: "lab.local/tools:test", imagePullPolicy: Never, command: [sleep, infinity]}}
"""

Start = dict[str, float]  # milliseconds by step; "all"


def measure(count: int, *, say: Callable[[str], None] = print) -> Part:
    """Start a cluster, install, start pods. Raises LabError, AssertionError, OSError."""
    with cluster("perf-starts", say) as lab:
        say("ambient install")
        install(lab)
        try:
            with lab.namespace(SPACE, {LABEL: "ambient"}):
                first = starts(lab, 1, "first")
                say(f"{count} pods, one after the other")
                idle = starts(lab, count, "idle")
                say(f"{count} pods beside load")
                with load():
                    busy = starts(lab, count, "busy")
        finally:
            ambient(lab, "uninstall", "--purge", "-y")
    return report(first[0], idle, busy)


def starts(lab: Lab, count: int, name: str) -> list[Start]:
    """What the agent of node 1 has measured of so many pods."""
    found = []
    for number in range(count):
        before = measured(lab)
        lab.kubectl("apply", "-n", SPACE, "-f", "-", stdin=POD.format(name=f"{name}-{number}"))
        lab.kubectl(
            "wait", "pod", f"{name}-{number}", "-n", SPACE, "--for=condition=Ready", f"--timeout={LIMIT:.0f}s",
            timeout=LIMIT + 10,
        )  # fmt: skip
        after = measured(lab)
        found.append({step: (after[step] - before.get(step, 0.0)) * 1000 for step in after})
    return found


def measured(lab: Lab) -> dict[str, float]:
    """The agent's sums on node 1, seconds by step."""
    page = lab.node(1).run(["curl", "-sSf", "-m", "10", "http://127.0.0.1:15014/metrics"])
    found = {}
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        if name == WHOLE:
            found["all"] = float(value)
        elif name.startswith(STEP):
            found[name.partition('step="')[2].partition('"')[0]] = float(value)
    return found


@contextmanager
def load() -> Iterator[None]:
    """One busy process a core."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(1.0)  # for the scheduler to have seen them
        yield
    finally:
        for each in busy:
            each.kill()
            each.wait()


def report(first: Start, idle: Sequence[Start], busy: Sequence[Start]) -> Part:
    """The table, and what is claimed."""
    rows: list[tuple[str | float | int, ...]] = []
    for step in (*STEPS, "all"):
        values: list[float] = [first.get(step, 0.0)]
        for found in (idle, busy):
            taken = [one.get(step, 0.0) for one in found]
            values += [statistics.median(taken), percentile(taken, 0.9)]
        rows.append((step, *(round(value, 1) for value in values)))
    columns = ("ms", "first of its account", "idle, median", "idle, p90", "loaded, median", "loaded, p90")
    figures = Figures(f"what the mesh adds to the start of a pod, {len(idle)} pods each", columns, rows)
    whole = [round(statistics.median(one["all"] for one in found), 1) for found in (idle, busy)]
    claims = [
        Claim("added to the start of a pod, idle", "ms", whole[0], ALLOWED),
        Claim("added to the start of a pod, loaded", "ms", whole[1], ALLOWED),
    ]
    return Part("starts", [figures], claims)


def main(argv: Sequence[str]) -> int:
    """Measure and report; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m perf starts",
        description="What the mesh adds to the start of a pod on Kubernetes.",
        epilog="example:\n  sudo .venv/bin/python -m perf starts --pods 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pods", type=int, default=20, help="pods started idle, and beside load [20]")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON file [perf/results]"
    )
    given = parser.parse_args(argv)
    if given.pods < 1:
        parser.error("--pods must be at least 1")
    if refused := refusal(("containerd", "etcd", "runc")):
        print(f"error: {refused}", file=sys.stderr)
        return 1
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    try:
        part = measure(given.pods, say=lambda words: console.print(words, style="dim"))
    except (AssertionError, LabError, CellError, ImageError, BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(part, console)
    path = write(given.results, [part], "starts")
    console.print(f"all numbers: {path}", soft_wrap=True)
    return 0 if all(claim.holds for claim in part.claims) else 1
