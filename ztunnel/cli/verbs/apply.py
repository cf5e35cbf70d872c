"""`ambient apply`: put objects into the running mesh's directory, or into a cluster."""

from typing import TYPE_CHECKING

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import files_option, namespace_option, target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.store.models import Key


@click.command(
    "apply",
    cls=Examples,
    short_help="Create or change objects from YAML or JSON.",
    examples=(
        "ambient apply -f reviews.yaml",
        "ambient apply -f shop/ -f extra.yaml",
        "kubectl create deployment web --image=web --dry-run=client -o yaml | ambient apply -f -",
    ),
)
@files_option(required=True)
@namespace_option(default=None)
@target_options()
def command(files: tuple[str, ...], namespace: str | None, which: Which) -> int:
    """Create objects, or change those that are there already; returns when the mesh embedded on this machine has taken
    them into its directory, or the cluster's API server has them (server-side apply, fields of others taken over).

    Objects that are wrong are reported and left out, the others are applied; the exit code is 1 then. A cluster takes
    every kind that it serves; policies of the mesh are looked at before it is asked.
    """
    from ztunnel.cli import manifests
    from ztunnel.cli.changes import Pending, has_taken, store_errors, word
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.cli.target import Embedded
    from ztunnel.store.models import to_dict

    target = which.target()
    if not isinstance(target, Embedded):
        from ztunnel.cli.kube import editing

        return 1 if editing.apply(target.api(), manifests.read(files, None, strangers=True), namespace) else 0
    mesh = EmbeddedMesh.find(target.state)
    given = manifests.read(files, namespace)
    failed = manifests.show(given.problems)
    pending = Pending(mesh)
    for _, data, decoded in given.objects:
        key, obj = decoded.key, decoded.obj
        if key is None or not decoded.accepted:
            continue
        with store_errors():
            click.echo(f"{word(key)} {_put(mesh, key, data)}")
        if obj is not None:
            wanted = to_dict(obj)
            pending.add(key, lambda key=key, wanted=wanted: has_taken(mesh, key, wanted))  # type: ignore[misc]
    pending.wait(given.problems)
    return 1 if failed else 0


def _put(mesh: "EmbeddedMesh", key: "Key", data: dict[str, object]) -> str:
    """Write the object; "created", "configured" or "unchanged"."""
    path = mesh.source.file_of(key)
    before = path.read_bytes() if path is not None else None
    after = mesh.source.apply(data).read_bytes()
    if before is None:
        return "created"
    return "unchanged" if after == before else "configured"
