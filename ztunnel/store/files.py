"""The files of a store's directory: which count, whether one changed, and writing that is never seen half done."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ztunnel.store.problems import StoreError

SUFFIXES = (".yaml", ".yml", ".json")

# How long to wait for another writer before saying so, in seconds.
_LOCK_PATIENCE = 10.0
# Two writes within one tick of the kernel's clock leave the same times on the file (jiffies, 1-10 ms).
_TICK_NS = 20_000_000
# Entries of a directory that are looked at in one step of a scan: 1 to 2 ms.
_STEP = 200


class Signature(NamedTuple):
    """What changes when a file does, as far as stat(2) shows it."""

    mtime_ns: int
    ctime_ns: int
    size: int
    inode: int
    device: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "Signature":
        return cls(stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino, stat.st_dev)

    def settled(self, now_ns: int) -> bool:
        """Whether the file was last changed long enough before `now_ns` for the next change to show."""
        return max(self.mtime_ns, self.ctime_ns) < now_ns - _TICK_NS


class Tree(NamedTuple):
    """What a directory tree holds: the files that count, and every directory in which they may appear."""

    files: dict[Path, Signature]
    directories: list[Path]


def counts(name: str) -> bool:
    """Whether a file of this name is read: YAML and JSON, but no hidden files and editors' copies."""
    return name.endswith(SUFFIXES) and not name.startswith((".", "#", "~"))


def scan(root: Path, tree: Tree) -> Iterator[None]:
    """Put what is below `root` into an empty `tree`, some files a step: a large tree need not stop everything else.

    Links are followed, hidden directories left out. Raises OSError if `root` is gone.
    """
    seen = set[tuple[int, int]]()
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        try:
            stat = os.stat(directory)
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            entries = os.scandir(directory)
        except OSError:
            if directory == root:
                raise
            continue
        tree.directories.append(directory)
        with entries:
            for number, entry in enumerate(entries):
                if number % _STEP == 0:
                    yield
                if entry.name.startswith("."):
                    continue
                try:
                    if entry.is_dir():
                        waiting.append(directory / entry.name)
                    elif counts(entry.name) and entry.is_file():
                        tree.files[directory / entry.name] = Signature.of(entry.stat())
                except OSError:  # gone meanwhile, or a link that leads nowhere
                    continue


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep other writers of the directory out (flock on the directory itself: nothing is left behind).

    Raises StoreError if another process keeps it for too long, or the directory is missing.
    """
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{root}: {error.strerror}; create the directory, or name another") from error
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{root}: another process has been changing it for {_LOCK_PATIENCE:.0f} s; "
                        "find it with `fuser` and end it"
                    ) from None
                time.sleep(0.001)
        yield
    finally:
        os.close(fd)


def write(path: Path, data: bytes, *, durable: bool) -> None:
    """Replace a file's contents at once: readers see the old or the new. Mode is kept, links are followed.

    `durable` waits until the data is on the disk. Raises StoreError naming the file.
    """
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(fd, _mode(target))
                if durable:
                    os.fsync(fd)
            os.rename(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written: {error.strerror}; check permissions and space"
        ) from error


def _mode(target: Path) -> int:
    try:
        return os.stat(target).st_mode & 0o7777
    except FileNotFoundError:
        return 0o644


def read(path: Path) -> tuple[bytes, Signature]:
    """A file's bytes and its signature, of one and the same state. Raises OSError."""
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        return file.read(), Signature.of(stat)
