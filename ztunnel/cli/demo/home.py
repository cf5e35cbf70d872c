"""The temporary directory of one demo: made, marked as the demo's own, and removed, by a later demo if need be.

A demo that is killed cannot remove its directory, and one that keeps its mesh must not: so whoever comes next looks.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from ztunnel.embedded.client import MeshClient, MeshNotRunning
from ztunnel.embedded.statedir import clean

# Unix sockets' names are short of room: a deep TMPDIR would not do.
PLACE = Path("/tmp")  # noqa: S108  made by mkdtemp
PREFIX = "ambient-demo-"
MARK = ".ambient-demo"  # holds the path of the state directory, and a lock while the demo lives


class Home:
    """A new directory `path`, its mesh's state being in `state` (default: within the directory)."""

    def __init__(self, state: Path | None) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=PLACE))
        self.state = state or self.path / "state"
        self._lock = os.open(self.path / MARK, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.write(self._lock, os.fsencode(self.state))

    def remove(self) -> None:
        """Remove the directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def forget(resources: Path) -> None:
    """Remove the home of a demo that was kept, its mesh being down; `resources` is the directory the mesh was of.

    Directories of the user's own are left alone.
    """
    if (resources.parent / MARK).is_file():
        shutil.rmtree(resources.parent, ignore_errors=True)


def sweep() -> None:
    """Remove what demos that were killed have left: the homes whose demo is dead and whose mesh does not run."""
    for mark in PLACE.glob(f"{PREFIX}*/{MARK}"):
        with contextlib.suppress(OSError), mark.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                continue
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            state = Path(os.fsdecode(file.read()))
            if state.is_absolute() and not _running(state):
                if state.parent == mark.parent:
                    clean(state)
                shutil.rmtree(mark.parent, ignore_errors=True)


def _running(state: Path) -> bool:
    try:
        MeshClient.connect(state)
    except MeshNotRunning:
        return False
    return True
