"""Changes of a cluster's objects: what `apply`, `delete` and `label` do there, in the words that kubectl uses."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ztunnel.cli.errors import UserError
from ztunnel.store.kinds import of_a_mesh, settings_of_installation
from ztunnel.store.kube.errors import ApiError, NoSuchKind
from ztunnel.store.models import group_of

if TYPE_CHECKING:
    from ztunnel.cli.manifests import Given, Input
    from ztunnel.store.kube.api import Api
    from ztunnel.store.models import Object
    from ztunnel.store.problems import Problem


class Named(NamedTuple):
    """An object by what the API server needs to know of it; `namespace` is "" for those of the whole cluster."""

    api_version: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        """As kubectl writes it: service/reviews, authorizationpolicy.security.istio.io/viewer."""
        group = group_of(self.api_version)
        return f"{self.kind.lower()}{'.' + group if group else ''}/{self.name}"


def apply(api: "Api", given: "Input", namespace: str | None) -> bool:
    """Apply the objects, server-side, in their order; whether one failed. What is wrong with one stops no other."""
    failed = show(given.problems, given.objects)
    for each in given.objects:
        try:
            obj = named(api, each.data, namespace)
            if _refused(each):
                continue
            before = api.get(*obj)
            after = api.apply(_in_namespace(each.data, obj.namespace))
        except (ApiError, UserError) as error:
            failed = True
            click.echo(f"error: {_placed(each, error)}", err=True)
        else:
            click.echo(f"{obj} {_happened(before, after)}")
    return failed


def delete(api: "Api", objects: "Iterable[Named]", *, ignore_not_found: bool) -> bool:
    """Delete them; whether one failed. Objects go in the background, as kubectl's do with --wait=false."""
    failed = False
    for obj in objects:
        try:
            if api.delete(*obj):
                click.echo(f"{obj} deleted")
            elif not ignore_not_found:
                failed = True
                where = f" in namespace {obj.namespace}" if obj.namespace else ""
                click.echo(f"error: {obj} not found{where}", err=True)
        except ApiError as error:
            failed = True
            click.echo(f"error: {error}", err=True)
    return failed


def in_files(api: "Api", given: "Input", namespace: str | None) -> tuple[list[Named], bool]:
    """The objects of files, the last one first, and whether something in them cannot be understood."""
    failed = show([one for one in given.problems if not one.object], ())
    found = []
    for each in reversed(given.objects):
        try:
            found.append(named(api, each.data, namespace))
        except NoSuchKind:
            continue  # nor can there be an object of it
        except (ApiError, UserError) as error:
            failed = True
            click.echo(f"error: {_placed(each, error)}", err=True)
    return found, failed


def of_kind(api: "Api", kind: "type[Object]", names: Iterable[str], namespace: str | None) -> list[Named]:
    """Objects of one of the mesh's kinds by their names."""
    space = (namespace or api.namespace) if kind.NAMESPACED else ""
    return [Named(served(api, kind), kind.KIND, space, name) for name in names]


def label(api: "Api", obj: Named, changes: "Mapping[str, str | None]", *, overwrite: bool) -> None:
    """Set labels, remove those that are None. Raises UserError, ApiError."""
    found = api.get(*obj)
    if found is None:
        where = f" in namespace {obj.namespace}" if obj.namespace else ""
        raise UserError(f"{obj} not found{where}", f"see: ambient get {obj.kind.lower()} -A")
    labels = found["metadata"].get("labels") or {}
    for key, value in changes.items():
        present = labels.get(key)
        if value is None and present is None:
            click.echo(f'label "{key}" is not there', err=True)
        if not overwrite and value is not None and present not in (None, value):
            raise UserError(f"{obj} already has the label {key}={present}", "change it with --overwrite")
    if all(labels.get(key) == value for key, value in changes.items()):
        click.echo(f"{obj} not labeled")
        return
    api.patch(*obj, {"metadata": {"labels": dict(changes)}})
    click.echo(f"{obj} {'unlabeled' if all(value is None for value in changes.values()) else 'labeled'}")


def named(api: "Api", data: "Mapping[str, Any]", namespace: str | None) -> Named:
    """What an object of a file is. Raises UserError, and ApiError for a kind that the cluster does not know."""
    metadata = data.get("metadata")
    if settings_of_installation(data.get("apiVersion"), data.get("kind")):
        raise UserError(
            "an IstioOperator is no object of a cluster but holds settings",
            "give it to: ambient install -f FILE",
        )
    words = (
        data.get("apiVersion"), data.get("kind"), metadata.get("name") if isinstance(metadata, dict) else None
    )  # fmt: skip
    for word, field in zip(words, ("apiVersion", "kind", "metadata.name"), strict=True):
        if not isinstance(word, str) or not word:
            raise UserError(
                f"an object without {field}", "every object needs apiVersion, kind and metadata.name"
            )
    version, kind, name = map(str, words)
    if not api.resource(version, kind).namespaced:
        return Named(version, kind, "", name)
    own = str((metadata or {}).get("namespace") or "")
    if namespace and own and own != namespace:
        raise UserError(
            f"{kind} {name} is of namespace {own}, not {namespace}", "leave out -n, or namespace in the file"
        )
    return Named(version, kind, own or namespace or api.namespace, name)


def served(api: "Api", kind: "type[Object]") -> str:
    """The apiVersion under which the cluster serves one of the mesh's kinds. Raises NoSuchKind."""
    for version in kind.API_VERSIONS:
        if not api.serves(kind.API_VERSION, kind.KIND) and api.serves(version, kind.KIND):
            return version
    api.resource(kind.API_VERSION, kind.KIND)
    return kind.API_VERSION


def show(problems: "Iterable[Problem]", objects: "Sequence[Given]") -> bool:
    """Tell what the mesh finds wrong; whether it must not be applied.

    Of the mesh's own policies that is an error. Everything else is the API server's to judge: a kind that the mesh
    does not know is none of its business, one that it knows and does not act on is worth a warning.
    """
    own = {str(each.decoded.key) for each in objects if _restricting(each)}
    others = kubernetes_own(objects)
    failed = False
    for problem in dict.fromkeys(problems):
        if problem.severity == "error" and (problem.object in own or not problem.object):
            failed = True
            click.echo(f"error: {problem}", err=True)
        elif problem.severity != "error" and problem.object not in others:
            click.echo(f"warning: {problem}", err=True)
    return failed


def kubernetes_own(objects: "Iterable[Given]") -> set[str]:
    """The objects, as problems name them, that no mesh is expected to act on in a cluster."""
    return {
        str(key) for each in objects if (key := each.decoded.key) is not None and not of_a_mesh(key.group)
    }


def _restricting(each: "Given") -> bool:
    from ztunnel.store.kinds import KINDS

    key = each.decoded.key
    return key is not None and key.kind in KINDS and KINDS[key.kind].RESTRICTS and not _foreign(each)


def _foreign(each: "Given") -> bool:
    from ztunnel.store.kinds import foreign_kind

    return foreign_kind(str(each.data.get("apiVersion")), str(each.data.get("kind"))) is not None


def _refused(each: "Given") -> bool:
    return _restricting(each) and not each.decoded.accepted


def _in_namespace(data: dict[str, Any], namespace: str) -> dict[str, Any]:
    if not namespace:
        return data
    return {**data, "metadata": {**data["metadata"], "namespace": namespace}}


def _happened(before: "Mapping[str, Any] | None", after: "Mapping[str, Any]") -> str:
    if before is None:
        return "created"
    same = before["metadata"].get("resourceVersion") == after["metadata"].get("resourceVersion")
    return "unchanged" if same else "configured"


def _placed(each: "Given", error: Exception) -> str:
    return f"{each.source}: {error}" if each.source != "-" else str(error)
