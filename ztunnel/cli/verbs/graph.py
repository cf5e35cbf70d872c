"""`ambient graph`: who talks to whom, as the nodes' metrics have seen it."""

from functools import partial

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import target_options
from ztunnel.cli.target import Which


@click.command(
    "graph",
    cls=Examples,
    short_help="Show who talks to whom: the topology from the metrics.",
    examples=(
        "ambient graph                              # since the proxies started",
        "ambient graph -n default --format dot        # for Graphviz: pipe it into `dot -Tsvg`",
        "ambient graph --window 5 --format json",
        "ambient graph --plaintext                  # what a STRICT policy would cut off",
    ),
)
@click.option("-n", "--namespace", metavar="NS", help="Only where either end is in it [all].")
@click.option(
    "--plaintext", is_flag=True, help="Only conversations with connections that are not mutual TLS."
)
@click.option(
    "-t", "--window", type=click.FloatRange(0), default=0.0, metavar="SECONDS",
    help="Only what happens in so many seconds from now; 0: all since the proxies started [0].",
)  # fmt: skip
@click.option("--format", "form", type=click.Choice(["text", "dot", "json"]), help="Format [text].")
@click.option("-o", "--output", type=click.Choice(["text", "dot", "json"]), help="The same as --format.")
@target_options()
def command(
    namespace: str | None, plaintext: bool, window: float, form: str | None, output: str | None, which: Which
) -> None:
    """Show each workload and those that it talks to, through which service, how often, and whether in mutual TLS.

    Who has no workload is shown by identity, or as `outside`. In the picture (--format dot) namespaces are boxes, and
    what is not mutual TLS is dashed and red.
    """
    from ztunnel.cli.session import find
    from ztunnel.cli.traffic import graph, rows, scrape, show

    pages, before, seconds = show.Window(partial(scrape.read, find(which)), window).look()

    def wanted(flow: scrape.Flow) -> bool:
        return not namespace or namespace in (flow.source.namespace, flow.destination.namespace)

    lines = rows.rows(scrape.flows(pages, before), scrape.open_now(pages), rows.by_pair, wanted)
    edges = [row for row in lines if row.counts.opened or row.open]
    if plaintext:
        edges = [row for row in edges if row.mutual_tls is not None and row.mutual_tls < 1]
    write = {"text": graph.as_text, "dot": graph.as_dot, "json": graph.as_json}[form or output or "text"]
    text = write(edges, seconds)
    click.echo(text or "no connection has been counted")
