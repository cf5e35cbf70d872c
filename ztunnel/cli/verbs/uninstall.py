"""`ambient uninstall`: take the mesh, or one of its control planes, out of a Kubernetes cluster."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import kube_options
from ztunnel.cli.verbs.install import DEFAULT_TIMEOUT

if TYPE_CHECKING:
    from ztunnel.cli.install.removal import Removal
    from ztunnel.store.kube.api import Api


@click.command(
    "uninstall",
    cls=Examples,
    short_help="Take the mesh out of a Kubernetes cluster.",
    examples=(
        "ambient uninstall --purge",
        "ambient uninstall --revision 1-23-0    # that control plane only; what it served follows another one",
    ),
)
@click.option(
    "--revision", metavar="NAME", help="Only this control plane; `default` is the one without a name."
)
@click.option(
    "--purge", is_flag=True, help="Everything, definitions (CRDs) and the objects of their kinds too."
)
@click.option("--force", is_flag=True, help="Also a control plane that is still used.")
@click.option(
    "--timeout", default=DEFAULT_TIMEOUT, metavar="DURATION",
    help=f"How long to wait for things to be gone [default: {DEFAULT_TIMEOUT}].",
)  # fmt: skip
@click.option("-y", "--skip-confirmation", "yes", is_flag=True, help="Do not ask.")
@kube_options()
def command(
    revision: str | None,
    purge: bool,
    force: bool,
    timeout: str,
    yes: bool,
    kubeconfig: Path | None,
    context: str | None,
) -> int:
    """Remove one control plane (--revision), or all of the mesh (--purge).

    With --purge every pod leaves the mesh first, without a restart; then nothing is left in the cluster and on its
    nodes: redirection, plugin, workloads, keys, webhooks, definitions, the namespace istio-system. Policies go with
    their definitions; definitions that somebody else has brought stay, and so does a namespace with other things in it.

    Exit code 1 where something is left.
    """
    from ztunnel.cli.install.progress import Progress
    from ztunnel.cli.install.removal import Removal
    from ztunnel.cli.target import Cluster
    from ztunnel.cli.verbs.install import seconds

    if purge == (revision is not None):
        raise click.UsageError("give --revision NAME for one control plane, or --purge for everything")
    target = Cluster(kubeconfig, context)
    api = target.api()
    removal = Removal(api, Progress(), timeout=seconds(timeout))
    try:
        if purge:
            _purge(api, removal, yes=yes)
        else:
            _revision(api, removal, revision or "", yes=yes, force=force, limit=seconds(timeout))
    except KeyboardInterrupt:
        if removal.changes:
            click.echo("\ninterrupted: run the same command again to go on", err=True)
        raise
    for left in removal.left:
        click.echo(f"warning: {left}", err=True)
    return 1 if removal.left else 0


def _purge(api: "Api", removal: "Removal", *, yes: bool) -> None:
    from ztunnel.cli.install import removal as removing
    from ztunnel.cli.verbs.install import confirm

    if not yes:
        pods = removing.members(api)
        objects = ", ".join(f"{number} {kind}" for kind, number in sorted(removing.resources(api).items()))
        lost = f" These objects go with their definitions: {objects}." if objects else ""
        confirm(f"Remove the mesh from {api.server}? {pods} pods leave it, and go on in plaintext.{lost}")
    removal.purge()
    click.echo("Nothing was installed." if not removal.changes else "The mesh is removed.", err=True)


def _revision(api: "Api", removal: "Removal", name: str, *, yes: bool, force: bool, limit: float) -> None:
    from ztunnel.cli.install import revisions
    from ztunnel.cli.verbs.install import confirm

    leaving = revisions.leaving(api, name)
    leaving.check(force=force)
    if not yes:
        then = f" Node proxies then follow {leaving.heir}." if leaving.moves_nodes else ""
        confirm(f"Remove control plane {name} from {api.server}?{then}")
    leaving.hand_over(removal.progress, limit)
    removal.revision(name)
    click.echo(f"Control plane {name} is removed.", err=True)
