"""`ambient top`: who talks to whom now, the busiest first, drawn again every two seconds."""

import json
import shutil
import sys
import time
from functools import partial

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import target_options
from ztunnel.cli.target import Which


@click.command(
    "top",
    cls=Examples,
    short_help="Show who talks to whom now, the busiest first.",
    examples=(
        "ambient top                                # until Ctrl-C",
        "ambient top --sort failed -n shop",
        "ambient top deploy/reviews --interval 1",
        "ambient top --times 1 -o json",
    ),
)
@click.argument("workload", metavar="[WORKLOAD]", required=False)
@click.option("-n", "--namespace", metavar="NS", help="Only where either end is in it [all].")
@click.option(
    "--from", "source", metavar="WORKLOAD", help="Only connections from it: NAME, NS/NAME, NS/ or outside."
)
@click.option("--to", "destination", metavar="WORKLOAD", help="Only connections to it.")
@click.option(
    "--sort", type=click.Choice(["connections", "open", "failed", "sent", "received", "name"]),
    default="connections", help="Column to sort by [connections].",
)  # fmt: skip
@click.option(
    "--interval", type=click.FloatRange(0.2), default=2.0, metavar="SECONDS", help="Between two looks [2]."
)
@click.option("--times", type=click.IntRange(1), help="End after so many looks.")
@click.option("--all", "everything", is_flag=True, help="Also those between whom nothing happens.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Format.")
@target_options()
def command(
    workload: str | None,
    namespace: str | None,
    source: str | None,
    destination: str | None,
    sort: str,
    interval: float,
    times: int | None,
    everything: bool,
    output: str,
    which: Which,
) -> None:
    """Show between which workloads connections are made, open, fail, and carry bytes, over the whole mesh or from and
    to one WORKLOAD (NAME, NS/NAME or deploy/NAME), the busiest first. With `-o json` each look is a line.
    """
    from ztunnel.cli.session import find
    from ztunnel.cli.tables import render
    from ztunnel.cli.traffic import rows, scrape, show

    sends = rows.end_filter(source)
    takes = rows.end_filter(destination)
    either = rows.end_filter(workload)

    def wanted(flow: scrape.Flow) -> bool:
        spaces = (flow.source.namespace, flow.destination.namespace)
        return (
            sends(flow.source)
            and takes(flow.destination)
            and (either(flow.source) or either(flow.destination))
            and (not namespace or namespace in spaces)
        )

    looking = show.Window(partial(scrape.read, find(which)), interval)
    screen = output == "table" and sys.stdout.isatty()

    def draw() -> str:
        pages, before, seconds = looking.look()
        lines = rows.ordered(
            rows.rows(scrape.flows(pages, before), scrape.open_now(pages), rows.by_pair, wanted), sort
        )
        if not everything:
            lines = [row for row in lines if row.open or row.counts != scrape.Counts()]
        if output == "json":
            told = [
                dict(zip(("source", "destination", "service"), row.key, strict=True)) | row.describe(seconds)
                for row in lines
            ]
            return json.dumps({"time": time.time(), "seconds": seconds, "rows": told})
        table = [["SOURCE", "DESTINATION", "SERVICE", *show.headings(seconds)]]
        table += [[*(cell or "-" for cell in row.key), *show.cells(row, seconds)] for row in lines]
        text = render(table)
        if screen:
            text = "\n".join(text.splitlines()[: shutil.get_terminal_size().lines - 2])
        summary = f"conversations: {len(lines)}, nodes: {len(pages)}"
        return f"{time.strftime('%H:%M:%S')}  {summary}\n{text}"

    show.repeat(draw, times=times, screen=screen)
