"""`ambient label`: set and remove labels, above all the one that brings pods into the mesh."""

from typing import TYPE_CHECKING

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import target_namespace_option, target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.store.models import Object


@click.command(
    "label",
    cls=Examples,
    short_help="Set or remove labels; istio.io/dataplane-mode=ambient joins the mesh.",
    examples=(
        "ambient label namespace default istio.io/dataplane-mode=ambient    # its pods join the mesh",
        "ambient label namespace default istio.io/dataplane-mode-           # and leave it again",
        "ambient label pod legacy istio.io/dataplane-mode=none -n shop",
        "ambient label service reviews tier=backend --overwrite",
    ),
)
@click.argument("kind")
@click.argument("name")
@click.argument("labels", nargs=-1, required=True, metavar="KEY=VALUE|KEY-...")
@click.option("--overwrite", is_flag=True, help="Change labels that have another value.")
@target_namespace_option()
@target_options()
def command(
    kind: str, name: str, labels: tuple[str, ...], overwrite: bool, namespace: str | None, which: Which
) -> None:
    """Set labels (KEY=VALUE) or remove them (KEY-) on an object; returns when the mesh embedded on this machine has
    taken the change in, or the cluster's API server has it. Running programs are not restarted.
    """
    from ztunnel.cli.changes import Pending, store_errors, word
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.cli.target import Embedded
    from ztunnel.cli.verbs.get import kinds_named, not_found

    changes = _parse(labels)
    kinds = kinds_named(kind)
    if len(kinds) != 1:
        raise click.UsageError("give one KIND")
    target = which.target()
    if not isinstance(target, Embedded):
        from ztunnel.cli.kube import editing

        api = target.api()
        (obj,) = editing.of_kind(api, kinds[0], [name], namespace)
        editing.label(api, obj, changes, overwrite=overwrite)
        return
    mesh = EmbeddedMesh.find(target.state)
    namespace = (namespace or mesh.default_namespace) if kinds[0].NAMESPACED else ""
    pending = Pending(mesh)
    with store_errors():
        known = mesh.source.get(kinds[0], namespace, name) or mesh.objects.get(kinds[0], namespace, name)
        if known is None:
            raise not_found(kinds[0], namespace, name)
        _check(known, changes, overwrite)
        before = known.metadata.labels
        after = {key: value for key, value in {**before, **changes}.items() if value is not None}
        for key, value in changes.items():
            if value is None and key not in before:
                click.echo(f'label "{key}" is not there', err=True)
        if after == before:
            click.echo(f"{word(known.key)} not labeled")
            return
        _write(mesh, known, changes, {key: value for key, value in after.items() if value is not None})
    click.echo(f"{word(known.key)} labeled")

    def taken() -> bool:
        seen = mesh.objects.find(known.key)
        return seen is not None and all(
            seen.metadata.labels.get(key) == value for key, value in changes.items()
        )

    pending.add(known.key, taken)
    pending.wait()


def _parse(labels: tuple[str, ...]) -> dict[str, str | None]:
    """The labels to set, None for those to remove."""
    changes: dict[str, str | None] = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not equals and not key.endswith("-"):
            raise click.UsageError(f'"{label}": write KEY=VALUE to set a label, KEY- to remove it')
        changes[key if equals else key[:-1]] = value if equals else None
    return changes


def _check(known: "Object", changes: dict[str, str | None], overwrite: bool) -> None:
    for key, value in changes.items():
        present = known.metadata.labels.get(key)
        if not overwrite and value is not None and present not in (None, value):
            raise UserError(
                f"{known.ref} already has the label {key}={present}", "change it with --overwrite"
            )


def _write(
    mesh: "EmbeddedMesh", known: "Object", changes: dict[str, str | None], after: dict[str, str]
) -> None:
    """Change the object in the user's directory, where one that the mesh implies is written for the first time."""
    import msgspec

    from ztunnel.cli.session import owner
    from ztunnel.store.models import Namespace, ObjectMeta, ServiceAccount

    kind = type(known)
    if mesh.source.file_of(known.key) is not None:
        mesh.source.patch(kind, known.namespace, known.name, {"metadata": {"labels": changes}})
    elif kind in (Namespace, ServiceAccount):
        metadata = ObjectMeta(name=known.name, namespace=known.namespace, labels=after)
        mesh.source.apply(msgspec.structs.replace(known, metadata=metadata))
    elif owner(known):
        raise UserError(
            f"{known.ref} belongs to Deployment {known.namespace}/{owner(known)}",
            "set the label in that Deployment's spec.template.metadata.labels",
        )
    else:
        raise UserError(
            f"{known.ref} is made by the mesh itself, not by a file in {mesh.directory}", "leave it"
        )
