"""`python -m perf memory`: what the mesh adds to the memory of a Kubernetes cluster of two nodes, empty and with pods.

Everything is measured twice: the PSS of every process in the pods of istio-system (what the machine would have more of
without it), and the working set of their control groups (what `kubectl top` shows, and limits and evictions go by).
From both measurements follows what a pod in the mesh costs, and so what a cluster of other size would need.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from perf.machine import pss_mb, refusal
from perf.scale.report import Claim, Figures, Part, show, write
from tests.kube import cgroups
from tests.kube.binaries import BuildError
from tests.kube.cell import CellError
from tests.kube.image import ImageError
from tests.kube.lab import Lab, LabError
from tests.kube.sample import JOINED, LABEL, ambient, install

RESULTS = Path(__file__).parent / "results"
WIDTH = 120
SETTLE = 15.0  # seconds in which what start-up and joining have left is given back
LIMIT = 180.0
SYSTEM = "istio-system"
ON_NODES = ("ztunnel", "istio-cni-node")
FEW = 2  # pods: one on each node
GUIDE = 100  # pods of the cluster for which others say 200 to 500 MB
GUIDED = 500.0  # MB that the guide has for such a mesh
WANTED = 200.0  # MB on its nodes

PODS = """
apiVersion: apps/v1
kind: Deployment
metadata: {{name: idle}}
spec:
  replicas: {count}
  selector: {{matchLabels: {{app: idle}}}}
  template:
    metadata: {{labels: {{app: idle}}}}
    spec:
      terminationGracePeriodSeconds: 0
      topologySpreadConstraints:
      - {{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule,
          labelSelector: {{matchLabels: {{app: idle}}}}}}
      containers:
      - {{name: idle, image: lab.local/tools:test, command: [sleep, infinity]}}
"""


class Pod(NamedTuple):
    """One pod of the mesh's own: which workload it is of, its node, and MB (10**6 bytes) of both kinds."""

    workload: str
    node: str
    pss: float
    working_set: float


def measure(count: int, *, say: Callable[[str], None] = print) -> Part:
    """Start a cluster, install, measure, add `count` pods, measure again. Raises LabError, AssertionError, OSError."""
    with cluster("perf-memory", say) as lab:
        say("ambient install")
        install(lab)
        try:
            seen = [look(lab)]
            lab.kubectl("label", "namespace", "default", f"{LABEL}=ambient")
            for number in (FEW, count):
                say(f"{number} pods")
                lab.kubectl("apply", "-n", "default", "-f", "-", stdin=PODS.format(count=number))
                lab.wait_rollout("deployment", "idle", "default", LIMIT)
                _joined(lab, number)
                seen.append(look(lab))
        finally:
            lab.kubectl("delete", "-n", "default", "deployment/idle", "--ignore-not-found")
            lab.kubectl("label", "namespace", "default", f"{LABEL}-")
            ambient(lab, "uninstall", "--purge", "-y")
    empty, few, full = seen
    return report(empty, few, full, count)


@contextmanager
def cluster(name: str, say: Callable[[str], None]) -> Iterator[Lab]:
    """The cluster AMBIENT_LAB, as the tests know it, or one for this measurement, called `name`."""
    there = os.environ.get("AMBIENT_LAB")
    if there:
        yield Lab.attach(there)
        return
    with Lab.up(f"{name}-{os.getpid()}", 2, say=say) as lab:
        yield lab


def _joined(lab: Lab, count: int) -> None:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found = json.loads(lab.kubectl("get", "pods", "-n", "default", "-l", "app=idle", "-o", "json"))[
            "items"
        ]
        if sum(one["metadata"].get("annotations", {}).get(JOINED) == "enabled" for one in found) == count:
            return
        time.sleep(0.5)
    raise AssertionError(f"not all of {count} pods have joined within {LIMIT:.0f} s")


def look(lab: Lab) -> list[Pod]:
    """What the mesh's own pods have now, once they are at rest."""
    time.sleep(SETTLE)
    listed = json.loads(lab.kubectl("get", "pods", "-n", SYSTEM, "-o", "json"))["items"]
    found = []
    for one in listed:
        uid, name = one["metadata"]["uid"], one["metadata"]["name"]
        node = next(each for each in lab.nodes.values() if each.name == one["spec"]["nodeName"])
        pids = set(cgroups.processes(node.cgroup, uid))
        workload = next((each for each in ON_NODES if name.startswith(each)), name.rsplit("-", 2)[0])
        found.append(Pod(workload, node.name, pss_mb(pids), working_set(node.cgroup, uid)))
    return found


def working_set(cgroup: str, uid: str) -> float:
    """MB of a pod's control group without the file pages that nobody used lately, as the kubelet counts it."""
    for root in cgroups.hierarchies():
        for folder, _, files in os.walk(root / cgroup):
            if folder.endswith((uid, uid.replace("-", "_"))):
                usage = next(
                    (one for one in ("memory.current", "memory.usage_in_bytes") if one in files), None
                )
                if usage is None:
                    continue
                stat = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
                inactive = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                return (int((Path(folder) / usage).read_text()) - inactive) / 1e6
    return 0.0


def report(empty: Sequence[Pod], few: Sequence[Pod], full: Sequence[Pod], count: int) -> Part:
    """The tables, and what is claimed.

    A node's first pod loads what serves all pods; what a further one costs is between `few` and `full`.
    """
    workloads = sorted({one.workload for one in full}, key=lambda name: (name not in ON_NODES, name))
    rows: list[tuple[str | float | int, ...]] = []
    nodes = {one.node for one in full}

    def total(pods: Sequence[Pod], names: Sequence[str], kind: str) -> float:
        return sum(float(getattr(one, kind)) for one in pods if one.workload in names)

    for name in workloads:
        number = sum(one.workload == name for one in full)
        values = [
            total(pods, [name], kind) / number for kind in ("pss", "working_set") for pods in (empty, full)
        ]
        rows.append((name, number, *(round(value, 1) for value in values)))
    sums = [total(pods, ON_NODES, kind) for kind in ("pss", "working_set") for pods in (empty, full)]
    rows.append(("on the nodes, together", "", *(round(value, 1) for value in sums)))
    everything = [total(pods, workloads, kind) for kind in ("pss", "working_set") for pods in (empty, full)]
    rows.append(("everything", "", *(round(value, 1) for value in everything)))
    each = max(0.0, (total(full, ON_NODES, "pss") - total(few, ON_NODES, "pss")) / (count - FEW))
    base = (total(full, ON_NODES, "pss") - count * each) / len(nodes)
    plane = total(empty, workloads, "pss") - total(empty, ON_NODES, "pss")
    plane_each = max(0.0, (total(full, workloads, "pss") - total(full, ON_NODES, "pss") - plane) / count)
    projected: list[tuple[str | float | int, ...]] = []
    for size in (2, 3, 5, 10):
        on_nodes = size * base + GUIDE * each
        projected.append((f"{size} nodes", round(on_nodes), round(on_nodes + plane + GUIDE * plane_each)))
    figures = [
        Figures(
            f"MB a pod of the mesh, two nodes, without pods in the mesh and with {count}",
            ("", "pods", "PSS, 0", f"PSS, {count}", "working set, 0", f"working set, {count}"),
            rows,
        ),
        Figures(
            "MB (PSS) on the nodes",
            ("", ""),
            [("a node that has pods", round(base, 1)), ("each pod of it", round(each, 2))],
        ),
        Figures(
            f"MB (PSS) projected for {GUIDE} pods in the mesh", ("", "on the nodes", "everything"), projected
        ),
    ]
    claims = [
        Claim(f"two nodes, {count} pods: on the nodes, working set", "MB", round(sums[3], 1), WANTED),
        Claim(f"two nodes, {count} pods: on the nodes, PSS", "MB", round(sums[1], 1), GUIDED, WANTED),
    ]
    return Part("memory", figures, claims)


def main(argv: Sequence[str]) -> int:
    """Measure and report; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m perf memory",
        description="The memory that the mesh adds to a Kubernetes cluster of two nodes.",
        epilog="example:\n  sudo .venv/bin/python -m perf memory --pods 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pods", type=int, default=20, help="pods that join the mesh [20]")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON file [perf/results]"
    )
    given = parser.parse_args(argv)
    if given.pods <= FEW:
        parser.error(f"--pods must be more than {FEW}")
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
    path = write(given.results, [part], "memory")
    console.print(f"all numbers: {path}", soft_wrap=True)
    return 0 if all(claim.holds for claim in part.claims) else 1
