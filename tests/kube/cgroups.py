"""The control groups of a node, below which its kubelet keeps those of its pods."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def hierarchies() -> list[Path]:
    """One folder with cgroup v2; with v1 one of each controller that is mounted."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [path for path in sorted(ROOT.iterdir()) if path.is_dir() and not path.is_symlink()]


def create(name: str) -> None:
    """Make the group in every hierarchy. A cpuset starts empty with v1, and nothing could run in it."""
    for root in hierarchies():
        group = root / name
        group.mkdir(exist_ok=True)
        for resource in ("cpus", "mems"):
            file = group / f"cpuset.{resource}"
            if root != ROOT and file.exists():
                file.write_text((root / file.name).read_text())
        if root == ROOT:
            wanted = " ".join(f"+{word}" for word in (root / "cgroup.controllers").read_text().split())
            for place in (root, group):
                (place / "cgroup.subtree_control").write_text(wanted)


def remove(name: str, limit: float = 20.0) -> None:
    """Remove the group and all below it. Its processes are dead; the kernel may need a moment to let go of them."""
    end = time.monotonic() + limit
    for root in hierarchies():
        for group in _groups(root, name):
            while True:
                try:
                    group.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.05)


def processes(name: str, part: str) -> Iterator[int]:
    """Ids, as the machine counts, of the processes in groups below `name` whose path contains `part`."""
    for root in hierarchies():
        found = False
        for group in _groups(root, name):
            if part in str(group):
                with contextlib.suppress(FileNotFoundError):
                    for pid in (group / "cgroup.procs").read_text().split():
                        found = True
                        yield int(pid)
        if found:
            return


def _groups(root: Path, name: str) -> Iterator[Path]:
    """The group and those below it, the deepest first."""
    for folder, _, _ in os.walk(root / name, topdown=False):
        yield Path(folder)
