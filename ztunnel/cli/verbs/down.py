"""`ambient down`: stop the mesh and remove what it made."""

from pathlib import Path

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import state_option
from ztunnel.cli.session import not_running


@click.command(
    "down",
    cls=Examples,
    short_help="Stop the mesh and remove what it made.",
    examples=("ambient down", "ambient down --state /tmp/mesh"),
)
@state_option()
def command(state: Path) -> None:
    """Stop the running mesh and wait until its pods, namespaces and processes are gone.

    Where the mesh was killed instead of stopped, what it left is removed.
    """
    from ztunnel.cli.demo.home import forget
    from ztunnel.embedded.client import MeshClient, MeshNotRunning
    from ztunnel.embedded.statedir import KEPT, State, clean

    directory = State(state).read_record().get("dir")
    try:
        MeshClient.connect(state).down()
    except MeshNotRunning as error:
        left = state.is_dir() and any(path.name not in KEPT for path in state.iterdir())
        clean(state)
        if not left:
            raise not_running(state) from error
        click.echo(f"removed what a killed mesh had left on {state}")
    else:
        click.echo(f"the mesh on {state} is down")
    if directory:
        forget(Path(directory))
