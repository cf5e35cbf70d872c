"""`ambient stat`: connections, success, bytes and the share of mutual TLS, for each workload, service or namespace."""

import json
import sys
import time
from functools import partial

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import target_namespace_option, target_options
from ztunnel.cli.target import Which


@click.command(
    "stat",
    cls=Examples,
    short_help="Show rates, success, bytes and mutual TLS of workloads and services.",
    examples=(
        "ambient stat                               # of each workload, over two seconds",
        "ambient stat services -A",
        "ambient stat deploy/reviews --from productpage",
        "ambient stat --window 0                    # sums since the proxies started",
        "ambient stat namespaces --watch",
        "ambient stat -A -o json",
    ),
)
@click.argument("resource", metavar="[WORKLOADS|SERVICES|NAMESPACES|KIND/NAME]", default="workloads")
@target_namespace_option()
@click.option("-A", "--all-namespaces", is_flag=True, help="All namespaces.")
@click.option(
    "--from", "source", metavar="WORKLOAD", help="Only connections from it: NAME, NS/NAME, NS/ or outside."
)
@click.option("--to", "destination", metavar="WORKLOAD", help="Only connections to it.")
@click.option(
    "-t", "--window", type=click.FloatRange(0), default=2.0, metavar="SECONDS",
    help="How long to look [2]; 0: all since the proxies started.",
)  # fmt: skip
@click.option("-w", "--watch", is_flag=True, help="Again and again, until Ctrl-C.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Format.")
@target_options()
def command(
    resource: str,
    namespace: str | None,
    all_namespaces: bool,
    source: str | None,
    destination: str | None,
    window: float,
    watch: bool,
    output: str,
    which: Which,
) -> None:
    """Show for each workload, service or namespace the connections that go to it: how many a second, how many of those
    that ended did so without an error, how many are open, the bytes that its clients sent and received, and the share
    of connections in which both ends proved who they are.

    The numbers are those of the nodes' metrics; a connection that two nodes see is counted once. A connection that is
    open counts, with its bytes, after five seconds at the latest.
    """
    from ztunnel.cli.session import find
    from ztunnel.cli.tables import render
    from ztunnel.cli.traffic import rows, scrape, show

    word, slash, name = resource.partition("/")
    kind = rows.kind_of(word)
    if slash and not name:
        raise UserError(f"{resource}: the name is missing", f"write {word}/NAME, or {word} for all")
    place = rows.by_destination(kind)
    mesh = find(which)
    space = namespace or mesh.default_namespace
    sends = rows.end_filter(source)
    takes = rows.end_filter(destination)

    def row_of(flow: scrape.Flow) -> rows.Key | None:
        key = place(flow)
        if key is None or not (all_namespaces or kind == "namespaces" or key[0] == space):
            return None
        return key if not name or name in (key[1], key[1].split(".")[0]) else None

    looking = show.Window(partial(scrape.read, mesh), window)

    def draw() -> str:
        pages, before, seconds = looking.look()
        lines = rows.rows(
            scrape.flows(pages, before),
            scrape.open_now(pages),
            row_of,
            lambda flow: sends(flow.source) and takes(flow.destination),
        )
        if output == "json":
            told = [{"namespace": row.key[0], "name": row.key[1], **row.describe(seconds)} for row in lines]
            return json.dumps(
                {"kind": kind, "time": time.time(), "seconds": seconds, "rows": told},
                indent=None if watch else 2,
            )
        if not lines:
            where = "" if all_namespaces or kind == "namespaces" else f" in namespace {space} (all: -A)"
            return f"no connection to {name or kind}{where} has been counted"
        spaces = all_namespaces and kind != "namespaces"
        table = [[*(["NAMESPACE"] if spaces else []), "NAME", *show.headings(seconds)]]
        for row in lines:
            table.append([*([row.key[0]] if spaces else []), row.key[1], *show.cells(row, seconds)])
        return render(table)

    terminal = watch and output == "table" and sys.stdout.isatty()
    show.repeat(draw, times=None if watch else 1, screen=terminal)
