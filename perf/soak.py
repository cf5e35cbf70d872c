"""`python -m perf soak`: everything at once for minutes, on a whole mesh; nothing may fail, and nothing may grow."""

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape

from perf.machine import Ticks, describe
from perf.soaking.changes import Changes
from perf.soaking.claims import Verdict
from perf.soaking.ledger import Failure, Ledger
from perf.soaking.report import Outcome, claims, show, write
from perf.soaking.room import SoakRoom
from perf.soaking.watch import Watch, read_logs

RESULTS = Path(__file__).parent / "results"
QUIET_LIMIT = 20.0  # seconds after the load until nothing may be open any more
ARRIVAL_LIMIT = 10.0  # seconds until the last change must have come to every proxy
SPOKEN = 60.0  # seconds between lines where the output is no terminal
WIDTH = 130  # columns, where the output is no terminal
T = TypeVar("T")
EXAMPLE = """example:
  python -m perf soak --minutes 10

Everything is made new, and nothing of it is left: namespaces, processes, files. Ctrl-C ends it early, with a report on
what is known by then. Exit code 1: a claim failed, or it cannot be run here.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Soak and report; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m perf soak",
        description="Requests, bulk transfers, new connections, rotating certificates and a mesh that changes, all at "
        "once: nothing may fail, and no process may grow.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10, help="how long [10]; growth is judged from 3 on")
    parser.add_argument("--load", type=float, default=1.0, help="multiplies the rates of the load [1]")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON file [perf/results]"
    )
    given = parser.parse_args(argv)
    if given.minutes <= 0 or given.load <= 0:
        parser.error("--minutes and --load must be more than 0")
    if refusal := _refusal():
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    stop = threading.Event()
    with _Signals(stop):
        try:
            outcome = soak(given.minutes * 60, given.load, console, stop)
        except (AssertionError, OSError) as error:  # the mesh does not come up
            print(f"error: {error}", file=sys.stderr)
            return 1
    if outcome is None:
        print("ended before the load began", file=sys.stderr)
        return 1
    show(outcome, console)
    console.print(f"all numbers: {write(given.results, outcome)}", soft_wrap=True)
    return int(any(claim.verdict is Verdict.FAILED for claim in claims(outcome)))


def _refusal() -> str:
    """Why it cannot be run here, "" if it can."""
    if os.geteuid() != 0:
        return "the soak needs root: run `sudo .venv/bin/python -m perf soak`"
    if shutil.which("nginx") is None:
        return "nginx is missing; on Debian: apt-get install nginx-light"
    return ""


class _Signals:
    """While it is entered, Ctrl-C and SIGTERM set the event; the second one interrupts."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._received)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.set()


def soak(seconds: float, load: float, console: Console, stop: threading.Event) -> Outcome | None:
    """Run everything, `load` times the usual rates, for so long or until `stop`; None if it came before the load.

    Raises AssertionError and OSError where the mesh does not come up.
    """

    def failed(failure: Failure) -> None:
        console.print(f"[red]failed[/] {escape(str(failure))}", soft_wrap=True)

    ledger = Ledger(failed)
    with console.status("starting") as status, SoakRoom() as room:
        if stop.is_set():
            return None
        say = _Speaker(console, status.update, seconds)
        watch = Watch(room.mesh, room.servers)
        changes = Changes(room, ledger)
        watch.start()
        ticks, began = Ticks.now(), time.monotonic()
        clients = room.start_clients(load, ledger)
        changes.start()
        while (passed := time.monotonic() - began) < seconds and not stop.wait(min(1.0, seconds - passed)):
            say.progress(time.monotonic() - began, ledger, watch, changes)
        passed = min(time.monotonic() - began, seconds)
        status.update("ending")
        busy = Ticks.now().busy_since(ticks)
        watch.stop()
        changes.stop()
        for client in clients:
            client.stop()
        for client in clients:
            client.wait()
        differ = _wait_for(lambda: watch.without(changes.services), ARRIVAL_LIMIT)
        left_open = _wait_for(lambda: {k: v for k, v in watch.open_connections().items() if v}, QUIET_LIMIT)
        left_waiting = _wait_for(lambda: watch.states()["CLOSE_WAIT"], QUIET_LIMIT)
        return Outcome(
            machine=describe(),
            busy=busy,
            seconds=passed,
            wanted_seconds=seconds,
            counts=ledger.counts(),
            total=ledger.total(),
            failures=ledger.failures,
            memory=dict(watch.memory),
            anonymous=dict(watch.anonymous),
            descriptors=dict(watch.descriptors),
            lingering=watch.lingering,
            cpu={name: (now - first) / passed for name, (first, now) in watch.cpu.items()},
            renewals={name: len(seen) - 1 for name, seen in watch.renewals.items()},
            certificate_errors=sorted(watch.certificate_errors),
            written=changes.written,
            change_seconds=changes.seconds,
            visits=changes.visits,
            revisions={node: now - first for node, (first, now) in watch.revisions.items()},
            services_differ=differ,
            left_open=dict.fromkeys(watch.nodes, 0) | left_open,
            left_waiting=left_waiting,
            restarted=watch.restarted(),
            watch_errors=watch.errors,
            logs=read_logs(room.mesh.state.logs),
        )


class _Speaker:
    """Says how far it is: on a terminal every second in one place, elsewhere a line a minute."""

    def __init__(self, console: Console, update: Callable[[str], None], seconds: float) -> None:
        self._console = console
        self._update = update
        self._seconds = seconds
        self._next = SPOKEN

    def progress(self, passed: float, ledger: Ledger, watch: Watch, changes: Changes) -> None:
        """After so many seconds."""
        total = ledger.total()
        renewed = sum(len(seen) - 1 for seen in watch.renewals.values())
        text = (
            f"{passed:.0f} of {self._seconds:.0f} s: {total.done:,} operations, {len(ledger.failures)} failed; "
            f"{renewed} certificates renewed, {changes.written:,} changes; "
            f"{_largest(watch)}"
        )
        self._update(text)
        if not self._console.is_terminal and passed >= self._next:
            self._next += SPOKEN
            self._console.print(text, soft_wrap=True, highlight=False)


def _largest(watch: Watch) -> str:
    memory = {name: points[-1].value for name, points in watch.memory.items() if points}
    return f"{sum(memory.values()):.0f} MiB in {len(memory)} processes"


def _wait_for(bad: Callable[[], T], limit: float) -> T:
    """Until `bad()` finds nothing; what it found last, after `limit` seconds."""
    end = time.monotonic() + limit
    while (found := bad()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


if __name__ == "__main__":
    sys.exit(main())
