"""What the machine is, and how busy it is with other things: numbers mean little without both."""

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

IDLE_LOOK = 1.0  # seconds of watching while nothing of ours has work
QUIET = 0.10  # of all cores; more than this busy, or stolen by a hypervisor, is a noisy machine


class Ticks(NamedTuple):
    """Clock ticks of all cores since boot, as the first line of /proc/stat has them."""

    total: int
    idle: int
    stolen: int

    @classmethod
    def now(cls) -> "Ticks":
        """Read them."""
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return cls(sum(fields), fields[3] + fields[4], fields[7])

    def busy_since(self, before: "Ticks") -> float:
        """The share of all cores, 0 to 1, that was not idle between the two readings."""
        total = self.total - before.total
        return (total - (self.idle - before.idle)) / total if total else 0.0

    def stolen_since(self, before: "Ticks") -> float:
        """The share that the hypervisor gave to others although there was work."""
        total = self.total - before.total
        return (self.stolen - before.stolen) / total if total else 0.0


def background() -> float:
    """How busy the machine is now, 0 to 1, over a second in which the caller does nothing."""
    before = Ticks.now()
    time.sleep(IDLE_LOOK)
    return Ticks.now().busy_since(before)


def describe() -> dict[str, str | int]:
    """The machine's shape, for the report."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def refusal(programs: Iterable[str]) -> str:
    """Why nothing that needs namespaces and these programs can be measured here, "" if it can."""
    if os.geteuid() != 0:
        return "it needs root, for the network namespaces that it makes"
    missing = [program for program in programs if shutil.which(program) is None]
    return f"missing programs: {', '.join(missing)}" if missing else ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def pss_mib(pid: int) -> float:
    """A process's memory in MiB, pages that several share counted in parts (proc(5), smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def pss_mb(pids: Iterable[int]) -> float:
    """The memory of some processes together in MB (10**6 bytes); those that have ended have none."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += pss_mib(pid)
    return total * 2**20 / 1e6


def cpu_seconds(pids: Iterable[int]) -> float:
    """The processor time, user and system, that processes have used so far (proc(5), stat: utime, stime)."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/stat").read_text()
            words = text[text.rindex(")") + 2 :].split()  # the name in parentheses may hold anything
            ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")
