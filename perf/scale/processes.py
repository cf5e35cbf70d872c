"""What the processes of a running mesh hold and spend: memory, descriptors, processor time."""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from perf.machine import pss_mib
from ztunnel.embedded.testmesh import RunningMesh

TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """One process at one moment: MiB (PSS), open descriptors, seconds of processor time since it began."""

    memory: float
    descriptors: int
    processor: float


Snapshot = dict[str, Usage]
"""By the process's name."""


def usage(pid: int) -> Usage:
    """Look at one process. Raises OSError where it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / TICKS  # utime and stime, proc(5)
    return Usage(pss_mib(pid), len(os.listdir(f"/proc/{pid}/fd")), seconds)


def children(pid: int) -> list[int]:
    """The pids of a process's children, the oldest first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


def daemon(node: dict[str, Any]) -> dict[str, int]:
    """The pids of a node's ztunnel by name: its control process and all that it has started."""
    control = int(node["ztunnel"]["pid"])
    found = {f"{node['name']} ztunnel control": control}
    for pid in descendants(control):
        found[f"{node['name']} ztunnel {_role(pid)}"] = pid
    return found


def descendants(pid: int) -> list[int]:
    """The pids of all that a process has started, and what those have."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def _role(pid: int) -> str:
    """What a process of the proxy is, as it says itself: in its name, or in its command line."""
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    if words[-3:-2] == [b"ztunnel.proxy.worker"]:  # python -m ztunnel.proxy.worker DESCRIPTOR NUMBER
        return f"worker {words[-1].decode()}"
    return name.removeprefix("zt-").removeprefix("ztunnel-").replace("-", " ")


def snapshot(mesh: RunningMesh) -> Snapshot:
    """All processes of the mesh: the supervisor, the control plane, agents, and every process of the proxies."""
    assert mesh.process is not None  # noqa: S101  it runs
    status = mesh.status()
    pids = {"supervisor": mesh.process.pid, "control plane": int(status["controlplane"]["pid"])}
    for node in status["nodes"]:
        pids[f"{node['name']} agent"] = int(node["agent"]["pid"])
        pids |= daemon(node)
    return {name: usage(pid) for name, pid in pids.items()}


def of_daemon(taken: Snapshot, node: str) -> Snapshot:
    """Only the processes of this node's ztunnel."""
    return {name: one for name, one in taken.items() if name.startswith(f"{node} ztunnel ")}


def memory(taken: Snapshot) -> float:
    """MiB of all of them."""
    return sum(one.memory for one in taken.values())


def descriptors(taken: Snapshot) -> int:
    """Open descriptors of all of them."""
    return sum(one.descriptors for one in taken.values())
