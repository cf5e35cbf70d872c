"""`ambient install`: bring the mesh into a Kubernetes cluster."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import kube_options

if TYPE_CHECKING:
    from ztunnel.cli.install.installer import Change
    from ztunnel.cli.install.settings import Settings
    from ztunnel.cli.target import Cluster

DEFAULT_TIMEOUT = "5m"


def settings_options() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What install and upgrade share: -f, --set, --revision, --dry-run, -o, --wait, --timeout, -y."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(
            (
                click.option(
                    "-f", "--filename", "files", multiple=True, metavar="FILE|-",
                    help="File with IstioOperators; may be given again, later ones go over earlier ones.",
                ),
                click.option(
                    "--set", "sets", multiple=True, metavar="PATH=VALUE",
                    help="One setting, over those of files, e.g. values.pilot.env.NAME=value; may be given again.",
                ),
                click.option("--revision", metavar="NAME", help="A control plane beside the default one."),
                click.option("--dry-run", is_flag=True, help="Change nothing: say what would be changed."),
                click.option(
                    "-o", "--output", type=click.Choice(["table", "yaml", "json"]), default="table",
                    help="yaml: write the objects and ask no cluster; json: what became of each object.",
                ),
                click.option("--wait/--no-wait", default=True, help="Wait until all of it works [default: wait]."),
                click.option(
                    "--timeout", default=DEFAULT_TIMEOUT, metavar="DURATION",
                    help=f"How long to wait at most [default: {DEFAULT_TIMEOUT}].",
                ),
                click.option("-y", "--skip-confirmation", "yes", is_flag=True, help="Do not ask."),
            )
        ):  # fmt: skip
            function = option(function)
        return function

    return decorate


@click.command(
    "install",
    cls=Examples,
    short_help="Bring the mesh into a Kubernetes cluster, or change it.",
    examples=(
        "ambient install -y",
        "ambient install --profile demo --set hub=registry.example/mesh --set tag=0.1.0",
        "ambient install -f mesh.yaml --dry-run",
        "ambient install --revision 1-24-0      # a second control plane, beside the one that is there",
        "ambient install -o yaml                 # the objects, without a cluster",
    ),
)
@click.option("--profile", metavar="NAME", help="ambient, demo or minimal [default: ambient].")
@settings_options()
@kube_options()
def command(
    profile: str | None,
    files: tuple[str, ...],
    sets: tuple[str, ...],
    revision: str | None,
    dry_run: bool,
    output: str,
    wait: bool,
    timeout: str,
    yes: bool,
    kubeconfig: Path | None,
    context: str | None,
) -> None:
    """Install the control plane (istiod), the node agents (istio-cni-node) and the node proxies (ztunnel) in namespace
    istio-system. Pods join when their namespace is labelled:

    \b
    kubectl label namespace default istio.io/dataplane-mode=ambient

    It may be run again at any time: what is as it should be stays as it is, what has changed is changed. Definitions
    (CRDs) of Istio and of the Gateway API that are in the cluster already are used, and never changed.
    """
    from ztunnel.cli.install import settings
    from ztunnel.cli.target import Cluster

    wanted = settings.read(files, sets, profile=profile, revision=revision)
    for warning in wanted.warnings:
        click.echo(f"warning: {warning}", err=True)
    if output == "yaml":
        click.echo(rendered(wanted), nl=False)
        return
    target = Cluster(kubeconfig, context)
    if not dry_run and not yes:
        confirm(f"Install the mesh ({described(wanted)}) in {where(target)}?")
    changes = bring(target, wanted, dry_run=dry_run, wait=wait, timeout=timeout, output=output)
    if output == "table" and not dry_run and wanted.enabled("ztunnel"):
        told(changes, wait=wait)


def rendered(wanted: "Settings") -> str:
    """The objects of an installation as YAML."""
    from ztunnel.cli.install import render

    return render.to_yaml(render.render(wanted))


def described(wanted: "Settings") -> str:
    """A few words on what is to be installed."""
    words = [f"profile {wanted.profile}"]
    if wanted.revision != "default":
        words.append(f"revision {wanted.revision}")
    return ", ".join([*words, f"image {wanted.image('pilot')}"])


def where(target: "Cluster") -> str:
    """The cluster, and its address, which is what tells two of them apart."""
    return f"{target} at {target.api().server}"


def confirm(question: str) -> None:
    """Ask; nothing happens unless the answer is yes. Raises UserError where nobody can answer, Abort for a no."""
    from ztunnel.cli.errors import UserError

    if not sys.stdin.isatty():
        raise UserError("nobody is there to confirm this", "give -y to go on without being asked")
    click.confirm(question, abort=True, err=True)


def seconds(timeout: str) -> float:
    """A duration given as an option. Raises BadParameter."""
    from ztunnel import durations

    try:
        return durations.parse(timeout)
    except ValueError as error:
        raise click.BadParameter(f"--timeout: {error}") from None


def bring(
    target: "Cluster", wanted: "Settings", *, dry_run: bool, wait: bool, timeout: str, output: str
) -> "list[Change]":
    """Install, with progress; what became of each object, which is written too where asked for."""
    from ztunnel.cli.install.installer import Installer
    from ztunnel.cli.install.progress import Progress

    limit = seconds(timeout)
    progress = Progress(quiet=dry_run)
    installer = Installer(target.api(), wanted, progress, wait=wait, timeout=limit, dry_run=dry_run)
    try:
        changes = installer.run()
    except KeyboardInterrupt:
        if installer.changes:
            click.echo(
                "\ninterrupted: what was done so far stays; run the same command again to go on"
                + (", or remove it with: ambient uninstall --purge" if installer.first else ""),
                err=True,
            )
        raise
    write(changes, output, dry_run=dry_run)
    return changes


def write(changes: "list[Change]", output: str, *, dry_run: bool) -> None:
    """What became of each object: as JSON, or, of a dry run, as a table."""
    from ztunnel.cli.install import survey
    from ztunnel.cli.tables import render

    if output == "json":
        keys = ("apiVersion", "kind", "namespace", "name")
        listed = [{**dict(zip(keys, ref, strict=True)), "change": how} for ref, how in changes]
        click.echo(json.dumps({"dryRun": dry_run, "objects": listed}, indent=2))
    elif dry_run:
        click.echo(render([["OBJECT", "CHANGE"], *([survey.told(ref), how] for ref, how in changes)]))


def told(changes: "list[Change]", *, wait: bool) -> None:
    """The last words on a terminal: what to do next."""
    if all(change.how in ("unchanged", "kept") for change in changes):
        click.echo("Nothing was changed: the mesh is installed as asked for.", err=True)
    elif wait:
        click.echo(
            "The mesh is installed. A namespace joins with: "
            "kubectl label namespace default istio.io/dataplane-mode=ambient",
            err=True,
        )
    else:
        click.echo("Applied, not waited for. Look with: ambient check --wait 60", err=True)
