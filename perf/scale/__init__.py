"""`python -m perf scale`: many connections, many pods, a large mesh. Figures, and claims that must hold."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from perf.load import LoadError
from perf.machine import refusal
from perf.scale import connections, model, pods
from perf.scale.report import Part, show, write

RESULTS = Path(__file__).parent.parent / "results"
PARTS: dict[str, Callable[[Console], Part]] = {
    "connections": connections.measure,
    "pods": pods.measure,
    "model": model.measure,
}
WIDTH = 120  # of the tables in a file or a pipe
PROGRAMS = ("nginx", "wrk", "curl")

_EXAMPLE = """parts:
  connections   10,000 connections through one node: opened, used, held, used again, closed
  pods          200 pods on one node: into the mesh, a request through some, and down
  model         100,000 workloads and 10,000 services loaded under traffic; one pod of 10,000 changed

example:
  sudo .venv/bin/python -m perf scale pods
"""


def main(argv: Sequence[str]) -> int:
    """Measure the parts named, all by default; the exit code: 1 where a claim fails or nothing can be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m perf scale",
        description="How the mesh bears many connections, many pods, and a large mesh around it.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all of them, one after another]"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON file [perf/results]"
    )
    given = parser.parse_args(argv)
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if why_not := refusal(PROGRAMS):
        print(f"error: {why_not}", file=sys.stderr)
        return 1
    found = []
    for name in given.parts or PARTS:
        try:
            part = PARTS[name](console)
        except (AssertionError, LoadError, OSError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
        show(part, console)
        found.append(part)
    console.print(f"all numbers: {write(given.results, found)}", soft_wrap=True)
    return 0 if all(claim.holds for part in found for claim in part.claims) else 1
