"""Processes that outlive the one that started them: known by process id and start time, ended without doubt."""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple, Self

BOOT = Path("/proc/sys/kernel/random/boot_id")


class Process(NamedTuple):
    """A process of this boot of the machine. The start time tells it from a later one with the same id."""

    pid: int
    started: str  # clock ticks after boot, field 22 of /proc/PID/stat

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process that has this id now. Raises ProcessLookupError when there is none."""
        fields = _stat(pid)
        if fields is None:
            raise ProcessLookupError(f"process {pid}: not there")
        return cls(pid, fields[19])

    @property
    def alive(self) -> bool:
        """False also for a zombie: all that it had is gone."""
        fields = _stat(self.pid)
        return fields is not None and fields[19] == self.started and fields[0] not in "ZX"

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal if the process is still there."""
        if self.alive:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds; reaps it when it is a child of this process."""
        end = time.monotonic() + seconds
        while self.alive:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        try:
            os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pass
        return True

    def children(self) -> list["Process"]:
        """What it has started itself and has not reaped."""
        found = []
        try:
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                for pid in (task / "children").read_text().split():
                    child = _stat(int(pid))
                    if child is not None:
                        found.append(Process(int(pid), child[19]))
        except (FileNotFoundError, ProcessLookupError):
            pass
        return found


def boot() -> str:
    """What tells this boot of the machine from others."""
    return BOOT.read_text().strip()


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may itself hold blanks and brackets: state first."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
