"""`ambient demo`: a bookshop in a mesh, measured and proved."""

from pathlib import Path

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import default_state

DURATION = 20.0
DURATION_ONCE = 5.0


@click.command(
    "demo",
    cls=Examples,
    short_help="Run a bookshop in a mesh: numbers, identities, and a proof.",
    examples=(
        "ambient demo",
        "ambient demo --duration 10 -o json",
        "ambient demo --once                 # short, plain text",
        "ambient demo --keep                 # leave it running for ambient exec, status, label...",
    ),
)
@click.option(
    "--duration",
    type=click.FloatRange(min=0.5, max=3600),
    metavar="SECONDS",
    help=f"Time under load [default: {DURATION:g}; {DURATION_ONCE:g} with --once].",
)
@click.option("--nodes", type=click.IntRange(2, 9), default=2, show_default=True, help="Simulated nodes.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="State directory [default: a temporary one; with --keep the usual one].",
)
@click.option("--keep", is_flag=True, help="Leave the mesh running at the end.")
@click.option("--once", is_flag=True, help="No live table: plain text, for scripts and logs.")
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="json: one object on stdout."
)
def command(
    duration: float | None, nodes: int, state: Path | None, keep: bool, once: bool, output: str
) -> int:
    """Start a mesh with a small bookshop in it and put it under load; show who talks to whom and how fast.

    A capture on the link between the nodes then proves the point: a marker that the applications exchange is not
    readable there while they are in the mesh, and is found by the same capture once they have left it. Then, under
    load: STRICT refuses a client outside the mesh, a policy denies a caller by its identity, and all certificates
    are renewed. Exit code 0 only if no request failed, nothing leaked, every connection was mutual TLS and each
    policy had its effect. At its end everything is removed again.
    """
    from ztunnel.cli.demo.run import run

    if keep and state is None:
        state = default_state()
    if duration is None:
        duration = DURATION_ONCE if once else DURATION
    return run(
        duration=duration,
        state=state.absolute() if state else None,
        nodes=nodes,
        keep=keep,
        plain=once,
        output=output,
    )
