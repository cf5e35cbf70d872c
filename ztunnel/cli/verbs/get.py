"""`ambient get`: the mesh's objects as a table, JSON or YAML."""

import json
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import target_namespace_option, target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.session import Mesh
    from ztunnel.store.models import Object, Pod


def kinds_named(words: str) -> "list[type[Object]]":
    """The kinds that `words` (one, or several with commas) name. Raises click.UsageError for unknown ones."""
    from ztunnel.store.kinds import kind_named, kind_words

    kinds = []
    for word in words.split(","):
        kind = kind_named(word.strip())
        if kind is None:
            raise click.UsageError(
                f'unknown kind "{word.strip()}"; known kinds are {", ".join(kind_words())}; '
                "for others of a cluster there is kubectl"
            )
        kinds.append(kind)
    return kinds


def not_found(kind: "type[Object]", namespace: str, name: str) -> UserError:
    """The error for an object that is not there."""
    where = f" -n {namespace}" if kind.NAMESPACED else ""
    full = f"{namespace}/{name}" if kind.NAMESPACED else name
    return UserError(f"{kind.KIND} {full} not found", f"see: ambient get {kind.PLURAL}{where}")


@click.command(
    "get",
    cls=Examples,
    short_help="Show objects: pods, services, deployments, namespaces, nodes...",
    examples=(
        "ambient get pods",
        "ambient get services,deployments -A -o wide",
        "ambient get pods -l app=reviews,version!=v1",
        "ambient get service reviews -o json",
    ),
)
@click.argument("kind", metavar="KIND[,KIND...]")
@click.argument("name", required=False)
@target_namespace_option()
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Of all namespaces.")
@click.option(
    "-l", "--selector", metavar="LABELS", help="Only those with these labels, e.g. app=web,tier!=db."
)
@click.option(
    "-o", "--output", type=click.Choice(["table", "wide", "json", "yaml"]), default="table", help="Format."
)
@target_options()
def command(
    kind: str,
    name: str | None,
    namespace: str | None,
    everywhere: bool,
    selector: str | None,
    output: str,
    which: Which,
) -> None:
    """Show objects as the mesh has them, or the cluster: with addresses, status and all that was filled in.

    KIND is such as pods, services, deployments, serviceaccounts, namespaces or nodes, also in the singular, and
    with kubectl's short names (po, svc, deploy, sa, ns, no): those that the mesh acts on. For others of a cluster
    there is kubectl.
    """
    from ztunnel.cli import selectors
    from ztunnel.cli.session import find
    from ztunnel.cli.tables import table

    kinds = kinds_named(kind)
    if name is not None and (len(kinds) > 1 or everywhere or selector):
        raise click.UsageError("a NAME goes with one KIND and one namespace, without a selector")
    wanted = selectors.parse(selector) if selector else None
    mesh = find(which)
    namespace = namespace or mesh.default_namespace
    objects = mesh.objects
    found: list[tuple[type[Object], list[Object]]] = []
    for each in kinds:
        if name is not None:
            obj = objects.get(each, namespace if each.NAMESPACED else "", name)
            if obj is None:
                raise not_found(each, namespace, name)
            found.append((each, [obj]))
        else:
            listed = objects.list(each, namespace if each.NAMESPACED and not everywhere else None)
            chosen = [obj for obj in listed if wanted is None or wanted.matches(obj.metadata.labels)]
            found.append((each, sorted(chosen, key=lambda obj: (obj.namespace, obj.name))))
    if output in ("json", "yaml"):
        items = [mesh.data(obj) for _, listed in found for obj in listed]
        _write(items[0] if name is not None else {"apiVersion": "v1", "kind": "List", "items": items}, output)
        return
    pods = _counted(mesh, kinds, None if everywhere else namespace)
    texts = [
        table(each, listed, wide=output == "wide", namespaces=everywhere, pods=pods)
        for each, listed in found
        if listed
    ]
    if texts:
        click.echo("\n\n".join(texts))
    else:
        where = "in any namespace" if everywhere else f"in namespace {namespace}"
        scope = where if any(each.NAMESPACED for each in kinds) else "in the mesh"
        click.echo(f"no {', '.join(each.PLURAL for each in kinds)} {scope}", err=True)


def _counted(mesh: "Mesh", kinds: "list[type[Object]]", namespace: str | None) -> "list[Pod]":
    """The pods that tables of these kinds count; none, with a warning, where they may not be read."""
    from ztunnel.store.models import Pod
    from ztunnel.store.problems import StoreError

    counting = [kind for kind in kinds if kind.KIND in ("Deployment", "ServiceAccount", "Namespace", "Node")]
    if not counting:
        return []
    try:
        return mesh.objects.list(Pod, namespace if all(kind.NAMESPACED for kind in counting) else None)
    except StoreError as error:
        click.echo(f"warning: pods are not counted: {error}", err=True)
        return []


def _write(data: Any, output: str) -> None:
    if output == "json":
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        from ztunnel.store.documents import dump

        click.echo(dump(data), nl=False)
