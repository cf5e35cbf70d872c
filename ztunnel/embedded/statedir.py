"""The state directory of an embedded mesh: its paths, its lock, its record of processes, and cleaning after a kill.

| what | where | after the mesh has ended |
|---|---|---|
| certificate authority | ca/ | stays: the next mesh here has the same roots |
| logs | logs/ | stay |
| everything else | supervisor.json, processes.json, objects/, netns/, node-N/, pods/, tokens/, sockets | removed |
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ztunnel.inpod import netns

KEPT = ("ca", "logs")
LONGEST_SOCKET_PATH = 103  # bytes: sun_path of unix(7) without its final zero
LONGEST_SOCKET_NAME = "node-200/metrics-99.sock"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
KILL_PATIENCE = 5.0  # seconds that killed processes may take to disappear


class StateError(OSError):
    """The state directory cannot be used as asked; the message says why and what to do."""


class Process(NamedTuple):
    """A process that was started as the leader of a session; the time (clock ticks since boot) tells it from others."""

    pid: int
    start_time: int


class _Stat(NamedTuple):
    pid: int
    state: str
    session: int
    start_time: int


class State:
    """The paths below one state directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = path / "ambient.sock"
        self.objects = path / "objects"
        self.netns = path / "netns"
        self.tokens = path / "tokens"
        self.ca = path / "ca"
        self.published = self.ca / "published"  # what the node proxies trust
        self.logs = path / "logs"
        self.problems = path / "problems.json"
        self.record = path / "supervisor.json"
        self.processes = path / "processes.json"
        self.control_admin = path / "control.sock"

    def node(self, name: str) -> Path:
        """Where a node's sockets are."""
        return self.path / name

    def check(self) -> None:
        """Raises StateError where the names of the sockets in it would be too long."""
        longest = len(os.fsencode(self.path)) + 1 + len(LONGEST_SOCKET_NAME)
        if longest > LONGEST_SOCKET_PATH:
            raise StateError(
                f"state directory {self.path}: its sockets' names would be {longest} bytes long, the system allows "
                f"{LONGEST_SOCKET_PATH}; give a shorter one with --state DIR"
            )

    def create(self) -> None:
        """Make the directory (mode 0700). Raises StateError."""
        self.check()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.stat().st_uid not in (os.geteuid(), 0):
                raise StateError(
                    f"state directory {self.path}: belongs to another user; give another with --state DIR"
                )
            self.path.chmod(0o700)
        except OSError as error:
            if isinstance(error, StateError):
                raise
            raise StateError(
                f"state directory {self.path}: {error.strerror}; give another with --state DIR"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who works on the directory. Raises StateError, naming who does."""
        lock = self._lock()
        try:
            yield
        finally:
            # Removed while it is held: whoever opened it meanwhile sees that the name means another file.
            with contextlib.suppress(OSError):
                (self.path / "lock").unlink()
            os.close(lock)

    def _lock(self) -> int:
        path = self.path / "lock"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(fd).st_ino == path.stat().st_ino:
                        return fd
            except BlockingIOError:
                os.close(fd)
                record = self.read_record()
                who = f" (pid {record['pid']}, resources {record['dir']})" if record else ""
                raise StateError(
                    f"a mesh is running on {self.path}{who}; stop it with `ambient down --state {self.path}`, or give "
                    "another directory with --state DIR"
                ) from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def read_record(self) -> dict[str, Any]:
        """supervisor.json, {} where there is none."""
        return _read_json(self.record)

    def write_record(self, directory: Path, nodes: int) -> None:
        """Say who works on this directory."""
        own = stat_of(os.getpid())
        _write_json(
            self.record,
            {
                "pid": os.getpid(),
                "start_time": own.start_time if own else 0,
                "boot_id": boot_id(),
                "user_namespace": os.readlink("/proc/self/ns/user"),
                "since": time.time(),
                "dir": str(directory),
                "nodes": nodes,
            },
        )

    def write_processes(self, processes: Mapping[str, Process]) -> None:
        """Record what has been started, so that it can be ended by somebody else."""
        sessions = {name: list(process) for name, process in processes.items()}
        _write_json(self.processes, {"boot_id": boot_id(), "sessions": sessions})

    # Cleaning. Nobody works on the directory then.

    def leftovers(self) -> list[int]:
        """The pids of processes that a killed mesh has left."""
        found = set(_sessions(_read_json(self.processes)))
        if self.netns.is_dir():
            for path in self.netns.iterdir():
                with contextlib.suppress(OSError):
                    if is_namespace(path):
                        found.update(netns.processes(path))
        record = self.read_record()
        if record.get("boot_id") == boot_id():
            found.update(_rootless_members(record["user_namespace"], self.netns))
        return sorted(found - {os.getpid()})

    def end_leftovers(self) -> None:
        """Kill them, and wait until they are gone (5 s at most)."""
        end = time.monotonic() + KILL_PATIENCE
        while (left := self.leftovers()) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def remove_files(self) -> None:
        """Remove what is not kept: names of namespaces, sockets, tokens, objects."""
        if self.netns.is_dir():
            for path in self.netns.iterdir():
                netns.remove(path)
        for path in self.path.iterdir():
            if path.name in KEPT or path.name == "lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def clean(path: Path) -> None:
    """Remove everything that a mesh which was killed has left, but its CA and logs. Raises StateError if one runs."""
    state = State(path)
    if not path.is_dir():
        return
    with state.locked():
        state.end_leftovers()
        state.remove_files()
    with contextlib.suppress(OSError):
        path.rmdir()  # if there were no logs either


def is_namespace(path: Path) -> bool:
    """Whether a namespace is mounted on the file: its file system is then the kernel's, not that of its directory."""
    return path.stat().st_dev != path.parent.stat().st_dev


def boot_id() -> str:
    """What tells this run of the machine from all others."""
    return BOOT_ID.read_text().strip()


def stat_of(pid: int) -> _Stat | None:
    """What /proc/PID/stat says; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    words = text[text.rindex(")") + 2 :].split()  # the name in parentheses may hold anything
    return _Stat(pid, words[0], int(words[3]), int(words[19]))


def session_members(leaders: Iterable[Process]) -> list[int]:
    """The living processes in the sessions that these processes lead, or led before they died."""
    found = []
    wanted = {leader.pid: leader for leader in leaders}
    for leader in wanted.values():
        present = stat_of(leader.pid)
        if present is not None and present.start_time != leader.start_time:
            wanted = {
                pid: other for pid, other in wanted.items() if pid != leader.pid
            }  # the number is another's now
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or (stat := stat_of(int(entry))) is None or stat.state == "Z":
            continue
        owner = wanted.get(stat.session)
        if owner is not None and stat.start_time >= owner.start_time:
            found.append(stat.pid)
    return found


def _sessions(record: Mapping[str, Any]) -> list[int]:
    if not record or record.get("boot_id") != boot_id():
        return []
    return session_members(Process(*entry) for entry in record["sessions"].values())


def _rootless_members(namespace: str, directory: Path) -> list[int]:
    """Who lives in a mesh that an ordinary user started in a user namespace of their own, which ours is not.

    Such a mesh's network namespaces are mounted where only its own processes see them. Both are asked for: the
    kernel gives the number of a user namespace that has ended to another one.
    """
    found: list[int] = []
    if namespace == os.readlink("/proc/self/ns/user"):
        return found
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{entry}/ns/user") != namespace:
                continue
            for line in Path(f"/proc/{entry}/mounts").read_text().splitlines():
                words = line.split(" ", 3)
                if words[0] == "nsfs" and words[1].startswith(f"{directory}/"):
                    found.append(int(entry))
                    break
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data, indent=2) + "\n")
    new.replace(path)
