"""`ambient analyze`: what is wrong with the objects of the mesh, or with files before they are applied."""

import json
from typing import TYPE_CHECKING

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import files_option, target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.session import Mesh

LEVELS = ("info", "warning", "error")
FOUND = 79  # the exit code of istioctl analyze for issues at or above the threshold
COLOURS = {"error": "red", "warning": "yellow", "info": "blue"}


@click.command(
    "analyze",
    cls=Examples,
    short_help="Say what is wrong with objects: those of the mesh, or files before they are applied.",
    examples=(
        "ambient analyze",
        "ambient analyze policy.yaml                         # as if it were applied to the running mesh",
        "ambient analyze -f shop/ --no-mesh                  # on its own, no mesh needs to run",
        "ambient analyze -n shop --failure-threshold warning -o json",
    ),
)
@click.argument("more", nargs=-1, metavar="[FILE|DIR|-]...")
@files_option(required=False)
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Of all namespaces [the default].")
@click.option(
    "--no-mesh", is_flag=True, help="Only the files given with -f, without the running mesh's objects."
)
@click.option(
    "-n", "--namespace", metavar="NS", help="Only of this namespace; with -f: of the objects that name none."
)
@click.option(
    "--failure-threshold",
    "threshold",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="error",
    show_default=True,
    help="The least level that makes the exit code 79.",
)
@click.option(
    "--output-threshold",
    "least",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    help="The least level that is shown.",
)
@click.option("-o", "--output", type=click.Choice(["log", "json"]), default="log", help="Format.")
@target_options()
def command(
    more: tuple[str, ...],
    files: tuple[str, ...],
    everywhere: bool,
    no_mesh: bool,
    namespace: str | None,
    threshold: str,
    least: str,
    output: str,
    which: Which,
) -> int:
    """Analyze the objects of the running mesh or of the cluster, or those of files as if they were applied to
    it, and list what is wrong: fields that are misspelt or have values that cannot be, references to what does not
    exist, addresses and names that clash, policies that are not, or not wholly, enforced, and what still asks for
    sidecars. Nothing is changed.

    Exit codes as those of `istioctl analyze`: 79 where something of the failure threshold or above was found, 1
    where the analysis itself failed, else 0.
    """
    from ztunnel.cli import manifests
    from ztunnel.cli.analysis import of_files, of_mesh
    from ztunnel.cli.errors import UserError
    from ztunnel.cli.session import find

    files = (*files, *more)
    if everywhere and namespace is not None:
        raise click.UsageError("--namespace and --all-namespaces do not go together")
    if files:
        found = of_files(manifests.read(files, namespace), None if no_mesh else _mesh(which))
    elif no_mesh:
        raise UserError("nothing to analyze", "give files, or leave out --no-mesh")
    else:
        found = of_mesh(find(which))
    if namespace is not None and not files:
        found = [one for one in found if one.namespace in ("", namespace)]
    failed = any(LEVELS.index(one.level) >= LEVELS.index(threshold) for one in found)
    shown = [one for one in found if LEVELS.index(one.level) >= LEVELS.index(least)]
    if output == "json":
        click.echo(json.dumps([one._asdict() for one in shown], indent=2))
    else:
        for one in shown:
            level, rest = str(one).split(" ", 1)
            click.echo(f"{click.style(level, fg=COLOURS[one.level])} {rest}")
        if not shown:
            click.echo(click.style("no issues found", fg="green"))
    return FOUND if failed else 0


def _mesh(which: Which) -> "Mesh | None":
    """The mesh that is meant, if it runs: files can be analyzed without it."""
    from ztunnel.cli.errors import UserError
    from ztunnel.cli.session import find

    try:
        return find(which)
    except UserError:
        if which.kubeconfig is not None or which.context is not None:
            raise
        click.echo("no mesh is running: the files are analyzed on their own", err=True)
        return None
