"""`ambient upgrade`: bring a running mesh to this version, without losing a connection."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import target_options
from ztunnel.cli.target import Cluster, Embedded, Which
from ztunnel.cli.verbs.install import settings_options

if TYPE_CHECKING:
    from ztunnel.cli.install.settings import Settings


@click.command(
    "upgrade",
    cls=Examples,
    short_help="Bring a running mesh to this version, losing no connection.",
    examples=(
        "ambient upgrade",
        "ambient upgrade --node node-1          # embedded: this node's proxy only",
        "ambient upgrade --set tag=0.2.0 -y     # in a cluster",
        "ambient upgrade -o json",
    ),
)
@click.option(
    "--node",
    "wanted",
    multiple=True,
    metavar="NODE",
    help="Embedded: only this node; may be given again [default: all].",
)
@settings_options()
@target_options()
def command(
    wanted: tuple[str, ...],
    files: tuple[str, ...],
    sets: tuple[str, ...],
    revision: str | None,
    dry_run: bool,
    output: str,
    wait: bool,
    timeout: str,
    yes: bool,
    which: Which,
) -> None:
    """Replace what runs by what is installed on this machine now.

    In a cluster: the installation is applied again in this version, with the settings that it was made with and those
    given here: first the control plane, then node agents, then node proxies, each after the one before is ready.

    On this machine: the nodes' proxies (ztunnel) are replaced, one after another, by new processes.

    A new proxy starts beside the old one and takes the new connections once it is ready. The old one finishes those
    that are open, for 30 s at most (TERMINATION_GRACE_PERIOD). Where a new one does not become ready, the old one
    serves on, no other node is touched, and the exit code is 1.
    """
    target = which.target()
    if isinstance(target, Embedded):
        others = {
            "-f": files,
            "--set": sets,
            "--revision": revision,
            "--dry-run": dry_run,
            "--no-wait": not wait,
        }
        given = [option for option, value in others.items() if value]
        if given or output == "yaml":
            option = given[0] if given else "-o yaml"
            raise click.UsageError(f"{option} is for clusters; this acts on {target}")
        _embedded(target.state, wanted, output)
    elif wanted:
        raise click.UsageError(f"--node is for a mesh on this machine; this acts on {target}")
    else:
        _cluster(target, files, sets, revision, dry_run, output, wait, timeout, yes)


def _cluster(
    target: Cluster,
    files: tuple[str, ...],
    sets: tuple[str, ...],
    revision: str | None,
    dry_run: bool,
    output: str,
    wait: bool,
    timeout: str,
    yes: bool,
) -> None:
    from ztunnel import __version__
    from ztunnel.cli.verbs.install import bring, confirm, described, rendered, where

    settings, before = _settings(target, files, sets, revision)
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)
    if output == "yaml":
        click.echo(rendered(settings), nl=False)
        return
    if not dry_run and not yes:
        confirm(
            f"Upgrade the mesh in {where(target)} from {before} to {__version__} ({described(settings)})?"
        )
    changes = bring(target, settings, dry_run=dry_run, wait=wait, timeout=timeout, output=output)
    if output == "table" and not dry_run:
        same = all(change.how in ("unchanged", "kept") for change in changes)
        done = f"is {__version__} already" if same else f"went from {before} to {__version__}"
        click.echo(f"The mesh {done}.", err=True)


def _settings(
    target: Cluster, files: tuple[str, ...], sets: tuple[str, ...], revision: str | None
) -> "tuple[Settings, str]":
    """The settings that an installation was made with, and what was given; and its version. Raises UserError."""
    from ztunnel.cli.install import settings, survey

    found = survey.survey(target.api())
    name = revision or settings.DEFAULT_REVISION
    if revision is None and name not in found.records and len(found.records) == 1:
        name = next(iter(found.records))
    record = found.records.get(name)
    if record is None:
        have = ", ".join(found.records)
        raise UserError(
            f"there is no installation {name!r} in {target}" if have else f"nothing is installed in {target}",
            f"installed are: {have}; give one with --revision"
            if have
            else "install it with: ambient install",
        )
    named = None if name == settings.DEFAULT_REVISION else name
    return settings.read(files, sets, revision=named, before=record.spec), record.version


def _embedded(state: Path, wanted: tuple[str, ...], output: str) -> None:
    from ztunnel.cli.nodes import node, nodes
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.cli.tables import render
    from ztunnel.embedded.client import MeshRequestError

    client = EmbeddedMesh.find(state).client
    chosen = [node(state, name) for name in wanted] or nodes(state)
    done: list[dict[str, Any]] = []
    failure: MeshRequestError | None = None
    for name in dict.fromkeys(each.name for each in chosen):
        try:
            done.append(client.upgrade(name))
        except MeshRequestError as error:
            failure = error
            break
    if output == "json":
        click.echo(json.dumps(done, indent=2))
    elif done:
        rows = [["NODE", "OLD PID", "NEW PID", "READY IN"]]
        rows += [[one["node"], str(one["old"]), str(one["new"]), f"{one['seconds']:.1f} s"] for one in done]
        click.echo(render(rows))
    if failure is not None:
        raise UserError(str(failure))
