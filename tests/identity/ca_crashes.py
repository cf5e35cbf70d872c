"""A program for test_ca_files.py: kills the making of an authority at every point, and looks at every mode.

`python -m tests.identity.ca_crashes DIRECTORY [AGE [rotate]]` forks a child that makes the authority (or, with AGE
in seconds, starts again that much later on a finished one, or replaces its root then) and dies by SIGKILL before
its Nth system call that changes a file; then the authority is loaded as the next start would, and has to work. N
grows until the child gets through. Prints as JSON how many points there were. A process of its own, because
forking is only safe without threads, and audit hooks cannot be removed.
"""

import itertools
import json
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ztunnel.identity import ca_files, testing
from ztunnel.identity.ca import Authority

CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.chmod"}


def check_modes(directory: Path) -> None:
    """Nobody else may ever get at the directory, nor at a key, not even while it is being written."""
    if not directory.exists():
        return
    if stat.S_IMODE(directory.stat().st_mode) != 0o700:
        raise AssertionError(f"{directory}: {directory.stat().st_mode:o}")
    for file in directory.iterdir():
        mode = stat.S_IMODE(file.stat().st_mode)
        if "key" in file.name and mode != 0o600:
            raise AssertionError(f"{file}: {mode:o}")


def step_before_changes(step: Callable[[str], None]) -> None:
    """Call `step` before everything that changes a file from now on; can't be undone in this process."""
    sync = os.fsync

    def synced(fd: Any) -> None:  # os.fsync tells no audit hook
        step("fsync")
        sync(fd)

    os.fsync = synced

    def hook(event: str, _arguments: tuple[Any, ...]) -> None:
        if event in CHANGES:
            step(event)

    sys.addaudithook(hook)


def start(directory: Path, now: float, dies_before: int, *, rotate: bool) -> int:
    """The exit status (os.waitstatus_to_exitcode) of a child that makes or loads the authority."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = dies_before

    def step(_event: str) -> None:
        nonlocal left
        check_modes(directory)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    os.umask(0)  # nothing but the program's own modes protects the files
    step_before_changes(step)
    try:
        if rotate:
            ca_files.renew_root(directory, now)
        else:
            Authority.load_or_create(directory, now=lambda: now)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def main(base: Path, age: float, *, rotate: bool) -> int:
    now = time.time()
    template = base / "template"
    if age:
        Authority.load_or_create(template, now=lambda: now)
    for point in itertools.count():
        directory = base / str(point)
        if age:
            shutil.copytree(template, directory)
        status = start(directory, now + age, point, rotate=rotate)
        if status not in (0, -signal.SIGKILL):
            return 1
        check_modes(directory)
        before = {file.name: file.read_bytes() for file in directory.iterdir()} if directory.exists() else {}
        authority = Authority.load_or_create(directory, now=lambda: now + age)
        check_modes(directory)
        names = sorted(file.name for file in directory.iterdir())
        if names != ["ca-cert.pem", "ca-key.pem", "root-cert.pem", "root-key.pem"]:
            raise AssertionError(f"killed before step {point}: {names}")
        for name in () if rotate else ("root-cert.pem", "root-key.pem", "ca-key.pem"):
            if name in before and (directory / name).read_bytes() != before[name]:
                raise AssertionError(f"killed before step {point}: {name} was replaced")
        if not age or rotate:
            testing.workload(authority)
        if status == 0:
            if (
                rotate
                and (directory / "root-key.pem").read_bytes() == (template / "root-key.pem").read_bytes()
            ):
                raise AssertionError("the root was not replaced")
            print(json.dumps({"points": point}))
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(
        main(
            Path(sys.argv[1]),
            float(sys.argv[2]) if len(sys.argv) > 2 else 0.0,
            rotate="rotate" in sys.argv[3:],
        )
    )
