"""`ambient up`: run a mesh of a directory's resources, in the foreground."""

from pathlib import Path

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import state_option


@click.command(
    "up",
    cls=Examples,
    short_help="Run a mesh of the resources in a directory, until Ctrl-C.",
    examples=(
        "ambient up shop/",
        "ambient up shop/ --nodes 3",
        "ambient up shop/ --state /tmp/mesh --xds-port 0    # a second one beside the first",
    ),
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--nodes", type=click.IntRange(1, 200), default=2, show_default=True, help="Simulated nodes.")
@click.option(
    "--xds-port",
    type=click.IntRange(0, 65535),
    default=15012,
    show_default=True,
    help="Loopback port of the control plane (xDS and CA); 0: any free one.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Worker processes of each proxy.",
)
@state_option()
def command(directory: Path, nodes: int, xds_port: int, workers: int, state: Path) -> int:
    """Run a mesh of the Kubernetes resources in DIR/*.yaml: the control plane, and for every node an agent and a
    proxy; pods are network namespaces in which their containers' commands run.

    Changes of the files take effect at once. Ctrl-C stops everything and removes what was made.
    """
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise UserError(
            f"{directory} {problem}", f"make it with: mkdir {directory}, and put resources (YAML) into it"
        )
    from ztunnel.embedded.supervisor import UpConfig, run

    return run(
        UpConfig(dir=directory.absolute(), state=state, nodes=nodes, xds_port=xds_port, workers=workers)
    )
