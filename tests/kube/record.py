"""What a lab has started and must end, on disk: whoever finds it after its owner was killed can clean up."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.kube import cgroups
from tests.kube.binaries import cache
from tests.kube.processes import Process, boot

END_LIMIT = 30.0
LOCK_LIMIT = 3.0


class LabInUse(Exception):
    """A lab of this name is up and has an owner; the message says how to get rid of it."""


def labs() -> Path:
    """The folder of all labs of this user."""
    return cache() / "labs"


class Record:
    """A lab's folder, a file `record.json` in it, and a lock on it that an owner holds for as long as it lives.

    A lab without owner (`detached`) stays until somebody takes it down; one whose owner has gone is remains.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = labs() / name
        self._file = self.folder / "record.json"
        self._lock_file = labs() / f"{name}.lock"
        self._lock: int | None = None

    def own(self) -> None:
        """Raises LabInUse when another process owns the lab for longer than a look at it takes."""
        labs().mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + LOCK_LIMIT
        while not self._try_lock():
            if time.monotonic() > end:
                raise LabInUse(
                    f"lab {self.name}: another process has it; end that one, or choose another name"
                )
            time.sleep(0.05)

    def disown(self) -> None:
        """The lock's file goes with the lab's folder."""
        if self._lock is not None:
            if not self.folder.exists():
                self._lock_file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    @property
    def owned(self) -> bool:
        """By this object."""
        return self._lock is not None

    def _try_lock(self) -> bool:
        lock = os.open(self._lock_file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been removed between the two calls: then the lock is one on nothing.
            if os.fstat(lock).st_ino == self._lock_file.stat().st_ino:
                self._lock = lock
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(lock)
        return False

    def create(self, detached: bool) -> None:
        self.folder.mkdir(parents=True)
        self._write({"boot": boot(), "detached": detached, "port": 0, "processes": {}, "cgroups": []})

    @property
    def exists(self) -> bool:
        return self._file.exists()

    @property
    def detached(self) -> bool:
        return bool(self.read()["detached"])

    @property
    def stays(self) -> bool:
        """Whether it is up though nobody owns it. Nothing outlasts a boot of the machine."""
        return self.exists and self.detached and self.read()["boot"] == boot()

    @property
    def port(self) -> int:
        return int(self.read()["port"])

    def read(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self._file.read_text())
        return data

    def set_port(self, port: int) -> None:
        self._write({**self.read(), "port": port})

    def add_process(self, name: str, process: Process) -> None:
        data = self.read()
        data["processes"][name] = process
        self._write(data)

    def add_cgroup(self, name: str) -> None:
        data = self.read()
        data["cgroups"] = sorted({*data["cgroups"], name})
        self._write(data)

    def process(self, name: str) -> Process | None:
        """A process of this boot that was written down under this name, dead or alive."""
        data = self.read()
        found = data["processes"].get(name)
        return Process(*found) if found and data["boot"] == boot() else None

    def clear(self) -> None:
        """End everything that was written down, and remove control groups and folder."""
        if self.exists:
            data = self.read()
            if data["boot"] == boot():
                ended = [Process(*entry) for entry in data["processes"].values()]
                # A cell's keeper ends with the cell, and only once all of the cell has gone.
                for process in ended:
                    for target in process.children() or [process]:
                        target.kill()
                for process in ended:
                    process.wait(END_LIMIT)
            for name in data["cgroups"]:
                cgroups.remove(name)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _write(self, data: dict[str, Any]) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(data))
        new.rename(self._file)


def sweep() -> None:
    """Remove the remains of labs whose owners were killed, or that ran when the machine was switched off."""
    for record in all_records():
        with contextlib.suppress(LabInUse):
            record.own()
            try:
                if not record.stays:
                    record.clear()
            finally:
                record.disown()


def all_records() -> Iterator[Record]:
    for path in sorted(labs().glob("*/")):
        yield Record(path.name)
