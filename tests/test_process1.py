"""Process 1 of a container: what it passes on, whom it starts again, whom it reaps, and how it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
LIMIT = 20.0

HEAD = """
import os, signal, sys, time
from ztunnel import process1

process1.enter()
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole, between those of others

say("started", process1.restarts(), os.environ.get(process1.LAST_END))
"""


class Container:
    """A process namespace whose process 1 is Python, and does as `script` says once it has parted in two."""

    def __init__(self, script: str) -> None:
        words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self.process = subprocess.Popen(
            [*words, sys.executable, "-c", HEAD + script], stdout=subprocess.PIPE, text=True, bufsize=1
        )

        self.limit = threading.Timer(LIMIT, self.process.kill)  # so that no test waits for ever
        self.limit.start()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def pid(self) -> int:
        """Of process 1, as it is known outside."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(until(children.read_text, "it has a process 1").split()[0])

    def end(self, limit: float = LIMIT) -> int:
        return self.process.wait(limit)


def until(condition: Callable[[], str], what: str) -> str:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {LIMIT:.0f} s: {what}")


@pytest.fixture
def container() -> Iterator[Callable[[str], Container]]:
    made: list[Container] = []

    def start(script: str) -> Container:
        made.append(Container(script))
        return made[-1]

    yield start
    for one in made:
        one.limit.cancel()
        with one.process, contextlib.suppress(ProcessLookupError):
            one.process.kill()


@pytest.mark.parametrize("code", [0, 2])
def test_it_ends_with_a_control_process_that_ends_on_purpose(
    container: Callable[[str], Container], code: int
) -> None:
    one = container(f"sys.exit({code})")
    assert one.line() == "started 0 None"
    assert one.end() == code
    assert one.line() == ""


@pytest.mark.parametrize(
    ("death", "told", "code"),
    [("os._exit(7)", "exit code 7", 7), ("os.kill(os.getpid(), 9)", "signal 9", 137)],
)
def test_a_control_process_that_dies_is_started_again_but_not_for_ever(
    container: Callable[[str], Container], death: str, told: str, code: int
) -> None:
    one = container(death)
    assert one.line() == "started 0 None"
    assert [one.line() for _ in range(3)] == [f"started {number} {told}" for number in (1, 2, 3)]
    assert one.end() == code
    assert one.line() == ""


def test_what_the_dead_one_left_behind_lives_on(container: Callable[[str], Container]) -> None:
    """As workers do, until somebody else listens."""
    one = container("""
if process1.restarts() == 0:
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)  # until its parent has died
        while os.getppid() != 1:
            time.sleep(0.01)
        say("worker", os.getppid())
        time.sleep(0.2)
        say("still there")
        os._exit(0)
    os.close(reading)
    os._exit(1)
signal.sigwait({signal.SIGTERM})
""")
    lines = {one.line() for _ in range(4)}
    assert lines == {"started 0 None", "started 1 exit code 1", "worker 1", "still there"}


def test_signals_are_the_control_processs(container: Callable[[str], Container]) -> None:
    one = container("""
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
say("ready")
for _ in range(2):
    say(signal.Signals(signal.sigwait({signal.SIGTERM, signal.SIGINT})).name)
sys.exit(5)
""")
    assert [one.line(), one.line()] == ["started 0 None", "ready"]
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(one.pid(), number)
        assert one.line() == number.name
    # Told to end, it ends, whatever the code.
    assert one.end() == 5
    assert one.line() == ""


def test_a_signal_before_anybody_listens_for_it_ends_it(container: Callable[[str], Container]) -> None:
    """The kernel throws signals away that a process 1 has no handler for."""
    one = container("time.sleep(3600)")
    assert one.line() == "started 0 None"
    os.kill(one.pid(), signal.SIGTERM)
    assert one.end() == 128 + signal.SIGTERM


def test_processes_without_a_parent_are_reaped(container: Callable[[str], Container]) -> None:
    one = container("""
for _ in range(5):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)  # its parent may have ended by now, or not
        os._exit(0)
    os.wait()

def others():
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and int(pid) not in (1, os.getpid())]

while others():
    time.sleep(0.01)
say("alone")
""")
    assert [one.line(), one.line()] == ["started 0 None", "alone"]
    assert one.end() == 0
