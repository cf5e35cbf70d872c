"""`ambient delete`: take objects out of the running mesh's directory, or out of a cluster."""

from typing import TYPE_CHECKING

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import files_option, namespace_option, target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.cli.target import Cluster
    from ztunnel.store.models import Key


@click.command(
    "delete",
    cls=Examples,
    short_help="Delete objects.",
    examples=(
        "ambient delete -f reviews.yaml",
        "ambient delete service reviews",
        "ambient delete deployment web -n shop --ignore-not-found",
    ),
)
@click.argument("kind", required=False)
@click.argument("names", metavar="[NAME...]", nargs=-1)
@files_option(required=False)
@namespace_option(default=None)
@click.option("--ignore-not-found", is_flag=True, help="Objects that are not there are no error.")
@target_options()
def command(
    kind: str | None,
    names: tuple[str, ...],
    files: tuple[str, ...],
    namespace: str | None,
    ignore_not_found: bool,
    which: Which,
) -> int:
    """Delete the objects that a file names, or those given by KIND and NAME: from the directory of the mesh embedded
    on this machine, when it has noticed; or from a cluster, whose API server clears them away in the background.
    """
    from ztunnel.cli.changes import Pending, store_errors, word
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.cli.target import Embedded

    if bool(files) == bool(kind) or (kind and not names):
        raise click.UsageError("give either -f FILE, or KIND and NAME")
    target = which.target()
    if not isinstance(target, Embedded):
        return _in_cluster(target, kind, names, files, namespace, ignore_not_found)
    if kind:
        keys = _named(kind, names, namespace)
        mesh, failed = EmbeddedMesh.find(target.state), False
    else:
        mesh = EmbeddedMesh.find(target.state)
        keys, failed = _in_files(files, namespace)
    pending = Pending(mesh)
    for key in keys:
        with store_errors():
            deleted = mesh.source.delete_key(key)
        if deleted:
            click.echo(f"{word(key)} deleted")
            pending.add(key, lambda key=key: _gone(mesh, key))  # type: ignore[misc]
        elif not ignore_not_found:
            failed = True
            click.echo(f"error: {_absent(mesh, key)}", err=True)
    pending.wait()
    return 1 if failed else 0


def _in_cluster(
    cluster: "Cluster",
    kind: str | None,
    names: tuple[str, ...],
    files: tuple[str, ...],
    namespace: str | None,
    ignore_not_found: bool,
) -> int:
    from ztunnel.cli import manifests
    from ztunnel.cli.kube import editing
    from ztunnel.cli.verbs.get import kinds_named

    api, failed = cluster.api(), False
    if kind:
        objects = [one for each in kinds_named(kind) for one in editing.of_kind(api, each, names, namespace)]
    else:
        objects, failed = editing.in_files(api, manifests.read(files, None, strangers=True), namespace)
    failed |= editing.delete(api, objects, ignore_not_found=ignore_not_found)
    return 1 if failed else 0


def _named(kind: str, names: tuple[str, ...], namespace: str | None) -> "list[Key]":
    from ztunnel.cli.verbs.get import kinds_named
    from ztunnel.store.models import key_of

    return [key_of(each, namespace or "default", name) for each in kinds_named(kind) for name in names]


def _in_files(files: tuple[str, ...], namespace: str | None) -> "tuple[list[Key], bool]":
    """The keys of the objects in the files, and whether something in them cannot be understood."""
    from ztunnel.cli import manifests

    given = manifests.read(files, namespace)
    failed = manifests.show([problem for problem in given.problems if problem.severity == "error"])
    # In reverse: what came first may be what the rest stands on.
    keys = [each.decoded.key for each in reversed(given.objects) if each.decoded.key is not None]
    return keys, failed


def _gone(mesh: "EmbeddedMesh", key: "Key") -> bool:
    """Whether the object is no more; of what every namespace has by itself, only what was written is gone."""
    known = mesh.objects.find(key)
    return known is None or (key.kind in ("Namespace", "ServiceAccount") and not known.metadata.labels)


def _absent(mesh: "EmbeddedMesh", key: "Key") -> UserError:
    """Why there is nothing to delete: it does not exist, or it is not the user's own."""
    from ztunnel.cli.session import owner

    known = mesh.objects.find(key)
    if known is None:
        return UserError(f"{key} not found in {mesh.directory}", f"see: ambient get {key.kind.lower()} -A")
    if owner(known):
        return UserError(
            f"{key} belongs to Deployment {key.namespace}/{owner(known)}, which would make it again",
            f"delete that: ambient delete deployment {owner(known)} -n {key.namespace}",
        )
    return UserError(f"{key} is made by the mesh itself, not by a file in {mesh.directory}", "leave it")
