"""Workers that are forks of the control process: what they share with it, what they do not have of it, how they end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT = 20.0

# Forks in a process of its own: this one has pytest's threads, and what hundreds of tests have left in its memory.
CONTROL = """
import json, os, signal, sys
import trio
from ztunnel.proxy import prefork
from ztunnel.proxy.workers import Workers
from ztunnel.telemetry.log import Logger

def say(**values):
    print(json.dumps(values), flush=True)

def refuse(question, answer):
    pass

"""

SERVE = """
async def main():
    workers = Workers(2, Logger("info"), refuse, forked, workload=refuse)
    async with trio.open_nursery() as nursery:
        await nursery.start(workers.run)
        while True:
            say(pids=[one["pid"] for one in workers.describe()], answers=len(await workers.stats()))
            if not await trio.to_thread.run_sync(sys.stdin.readline):
                break
        nursery.cancel_scope.cancel()
    say(children=children())

def children():
    try:
        return [os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
    except ChildProcessError:
        return []

forked = prefork.fork_workers(2, Logger("info"))
trio.run(main)
"""


class Control:
    """A control process that runs `script`, and says lines of JSON."""

    def __init__(self, script: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROL + script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.line()

    def close(self) -> None:
        with self.process, contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def control() -> Iterator[Callable[[str], Control]]:
    made: list[Control] = []

    def start(script: str) -> Control:
        made.append(Control(script))
        return made[-1]

    yield start
    for one in made:
        one.close()


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {LIMIT:.0f} s: {what}")


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def open_files(pid: int) -> set[str]:
    """What a process has open, but for what all kinds of processes have: files by name, sockets by number."""
    found = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return {name for name in found if not name.startswith("anon_inode:") and name != os.devnull}


def private(pid: int) -> int:
    """KiB that no other process has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def test_they_serve_and_are_replaced_when_killed(control: Callable[[str], Control]) -> None:
    one = control(SERVE)
    first = one.line()
    until(lambda: one.ask()["answers"] == 2, "both answer")
    names = [Path(f"/proc/{pid}/comm").read_text() for pid in first["pids"]]
    assert names == ["zt-worker-0\n", "zt-worker-1\n"]
    for pid in first["pids"]:
        os.kill(pid, signal.SIGKILL)
    # Reaped, too: none is left as a zombie.
    until(lambda: all(map(gone, first["pids"])), "the killed ones are gone")
    until(lambda: one.ask()["answers"] == 2, "two others answer")
    second = one.ask()
    assert not set(first["pids"]) & set(second["pids"])


def test_they_share_the_memory_of_what_they_import(control: Callable[[str], Control]) -> None:
    one = control(SERVE)
    pids = one.line()["pids"]
    until(lambda: one.ask()["answers"] == 2, "both answer")
    forked = private(pids[0])
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: one.ask()["answers"] == 2, "another is there, executed")
    executed = private(one.ask()["pids"][0])
    assert forked < executed / 2, f"forked {forked} KiB, executed {executed} KiB"


def test_nothing_that_was_open_is_open_in_them(control: Callable[[str], Control], tmp_path: Path) -> None:
    """A fork has all descriptors, close-on-exec or not: also the other workers' channels."""
    script = f"""
file = open({str(tmp_path / "secret")!r}, "w")
os.set_inheritable(file.fileno(), True)
forked = prefork.fork_workers(3, Logger("info"))
say(pids=[process.pid for process, _ in forked])
sys.stdin.read()
"""
    one = control(script)
    pids = one.line()["pids"]
    until(lambda: all(Path(f"/proc/{pid}/comm").read_text().startswith("zt-") for pid in pids), "they run")
    # Standard output and error, which it has in common with all of them.
    assert one.process.stdout is not None
    common = {os.readlink(f"/proc/{one.process.pid}/fd/{fd}") for fd in (1, 2)}
    ours = open_files(one.process.pid) - common
    assert str(tmp_path / "secret") in ours
    for pid in pids:
        assert not ours & open_files(pid)
    channels = [open_files(pid) - common for pid in pids]
    assert all(channels)
    assert not channels[0] & channels[1]
    assert not channels[1] & channels[2]


def test_they_end_with_a_control_process_that_never_served(control: Callable[[str], Control]) -> None:
    script = """
forked = prefork.fork_workers(2, Logger("info"))
say(pids=[process.pid for process, _ in forked])
sys.stdin.readline()
"""
    one = control(script)
    pids = one.line()["pids"]
    one.process.kill()
    until(lambda: all(map(gone, pids)), "they are gone")


def test_all_are_reaped_when_the_control_process_stops_serving(control: Callable[[str], Control]) -> None:
    one = control(SERVE)
    pids = one.line()["pids"]
    assert one.process.stdin is not None
    one.process.stdin.close()
    assert one.line() == {"children": []}
    assert all(map(gone, pids))
    assert one.process.wait(LIMIT) == 0


def test_a_fork_that_fails_leaves_none(control: Callable[[str], Control]) -> None:
    script = """
fork, made = os.fork, []

def fails():
    if made:
        raise BlockingIOError(11, "no more processes")
    made.append(fork())
    return made[0]

os.fork = fails
try:
    prefork.fork_workers(2, Logger("info"))
except OSError as error:
    say(error=error.strerror, pids=made)
sys.stdin.read()
"""
    told = control(script).line()
    assert told["error"] == "no more processes"
    assert all(map(gone, told["pids"]))


def test_two_forks_draw_different_random_numbers_for_tls(control: Callable[[str], Control]) -> None:
    """Were they the same, so would be the keys of their connections."""
    script = """
from OpenSSL import SSL

def client_random():
    connection = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
    connection.set_connect_state()
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        hello = connection.bio_read(4096)
    return hello[11:43].hex()  # behind the headers of record and message, and the version: RFC 8446, 4.1.2

before = client_random()  # so that the generator is seeded when it is forked
for _ in range(2):
    if os.fork() == 0:
        say(random=client_random())
        os._exit(0)
    os.wait()
say(random=before)
say(random=client_random())
"""
    one = control(script)
    drawn = [one.line()["random"] for _ in range(4)]
    assert all(len(random) == 64 for random in drawn)
    assert len(set(drawn)) == 4


def test_the_daemons_workers_have_none_of_the_control_processs_libraries(tmp_path: Path) -> None:
    settings = {
        "XDS_ADDRESS": "https://127.0.0.1:1",
        "INPOD_UDS": str(tmp_path / "zds.sock"),
        "ADMIN_ADDR": f"unix:{tmp_path}/admin.sock",
        "READINESS_ADDR": f"unix:{tmp_path}/ready.sock",
        "METRICS_ADDR": f"unix:{tmp_path}/metrics.sock",
    }
    with (tmp_path / "log").open("wb") as log:
        daemon = subprocess.Popen([sys.executable, "-m", "ztunnel"], env=settings, stderr=log)
    try:
        until((tmp_path / "ready.sock").exists, "the daemon runs")
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        assert len(children) == 2
        library = "google/_upb"
        assert library in Path(f"/proc/{daemon.pid}/maps").read_text()
        for pid in children:
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert library not in maps
            assert "cryptography" in maps
    finally:
        daemon.terminate()
        assert daemon.wait(LIMIT) == 0
    assert all(map(gone, map(int, children)))
