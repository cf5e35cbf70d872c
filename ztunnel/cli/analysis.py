"""What is wrong with objects, with field and remedy: those of a running mesh, or of files before they are applied."""

import itertools
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ztunnel.cli.manifests import Input
    from ztunnel.cli.session import Mesh
    from ztunnel.store.models import Key, Object
    from ztunnel.store.problems import Problem

LEVELS = ("info", "warning", "error")
ACCEPTED = "ZtunnelAccepted"
INVALID = "Invalid"


class Message(NamedTuple):
    """One thing that is wrong, or worth to know. `object` and `file` may be "", `line` 0, where they are unknown."""

    level: str
    object: str
    file: str
    line: int
    message: str
    remedy: str

    @property
    def namespace(self) -> str:
        """Of the object, "" if it has none."""
        kind, _, name = self.object.partition(" ")
        return name.partition("/")[0] if kind and "/" in name else ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        about = " ".join(word for word in (self.object, place) if word)
        text = f"{self.level.capitalize()} ({about}) " if about else f"{self.level.capitalize()} "
        return text + (f"{self.message}; {self.remedy}" if self.remedy else self.message)


def of_mesh(mesh: "Mesh") -> list[Message]:
    """What is wrong with the objects of a running mesh: as files, with one another, and in what is enforced of them."""
    import msgspec

    from ztunnel.cli.errors import UserError
    from ztunnel.cli.hints import sidecars
    from ztunnel.cli.session import answering
    from ztunnel.store.kinds import KINDS
    from ztunnel.store.models import Namespace, Pod
    from ztunnel.store.problems import Problem

    found = [_message(problem) for problem in mesh.problems()]
    for hint in sidecars(mesh.objects.list(Namespace), mesh.objects.list(Pod)):
        found.append(Message("info", hint.object, "", 0, hint.message, hint.remedy))
    try:
        told = answering(mesh.control_planes(), "problems").get("problems", [])
        found += [_message(msgspec.convert(one, Problem)) for one in told]
    except UserError as error:
        found.append(
            Message("warning", "", "", 0, f"{error.message}: what it finds is missing here", error.remedy)
        )
    known = {one.object for one in found}
    for kind in KINDS.values():
        for obj in mesh.objects.list(kind):
            for condition in getattr(getattr(obj, "status", None), "conditions", ()):
                if condition.type == ACCEPTED and condition.status == "False":
                    found.append(_extent(obj.ref, condition.reason, condition.message, obj.ref in known))
    return _ordered(found)


def of_files(given: "Input", mesh: "Mesh | None", nodes: int = 2) -> list[Message]:
    """What would be wrong if these objects were applied to the mesh, or, without one, were all that there is.

    Of objects that are not given, only what they would cause is told. Nothing is changed.
    """
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.embedded.plan import KINDS
    from ztunnel.store.kinds import KINDS as ALL_KINDS

    base: dict[Key, Object] = {}
    look: Callable[[Mapping[Key, Object], Container[str]], list[Message]]
    if mesh is None or isinstance(mesh, EmbeddedMesh):
        if mesh is not None:
            nodes = len(mesh.client.status()["nodes"])
            base = {obj.key: obj for kind in KINDS for obj in mesh.source.list(kind)}
        look = partial(examine, nodes)
    else:
        base = {obj.key: obj for kind in ALL_KINDS.values() for obj in mesh.objects.list(kind)}
        look = translated
    objects = dict(base)
    places: dict[str, str] = {}
    others: set[str] = set()
    if mesh is not None and not isinstance(mesh, EmbeddedMesh):
        from ztunnel.cli.kube.editing import kubernetes_own

        others = kubernetes_own(given.objects)
    found = [
        _message(problem)
        for problem in given.problems
        if problem.severity == "error" or problem.object not in others
    ]
    for source, _, decoded in given.objects:
        if decoded.obj is not None and decoded.counts:
            objects[decoded.obj.key] = decoded.obj
            places[decoded.obj.ref] = source
    known = {one.object for one in found}
    before = set(look(base, known)) if base else set()
    for one in look(objects, known):
        if one.object in places:
            found.append(one._replace(file=places[one.object]))
        elif one not in before:
            found.append(one)
    return _ordered(found)


def examine(nodes: int, source: "Mapping[Key, Object]", known: Container[str] = ()) -> list[Message]:
    """What the embedded mesh's resolver and its control plane would find wrong with these objects. Pure.

    Of the objects `known` to have faults in their fields, what is enforced nevertheless is only worth to know.
    """
    from ztunnel.embedded.plan import Given, plan

    numbers = itertools.count()
    resolved = plan(
        Given(source, {}, nodes), now="1970-01-01T00:00:00Z", new_uid=lambda: f"uid-{next(numbers)}", last={}
    )
    found = [Message(one.severity, str(one.key), "", 0, one.message, one.remedy) for one in resolved.findings]
    return found + translated(resolved.objects, known)


def translated(objects: "Mapping[Key, Object]", known: Container[str] = ()) -> list[Message]:
    """What the control plane would find wrong with these objects, as they are in a cluster. Pure."""
    from ztunnel.controlplane.registry import Registry
    from ztunnel.controlplane.translate import Settings

    registry = Registry(Settings())
    for obj in objects.values():
        registry.upsert(obj)
    update = registry.flush()
    found = [_message(problem) for problem in update.new_problems]
    for obj, finding in update.findings:
        if not finding.accepted:
            found.append(_extent(obj.ref, finding.reason, finding.message, obj.ref in known))
    return found


def _extent(ref: str, reason: str, message: str, known: bool) -> Message:
    """A policy that is not, or not all, enforced; `known`: the reason has been told, this is what it leads to."""
    level = "info" if known else "error" if reason == INVALID else "warning"
    return Message(level, ref, "", 0, message, "")


def _message(problem: "Problem") -> Message:
    return Message(
        problem.severity, problem.object, problem.file, problem.line, problem.message, problem.remedy
    )


def _ordered(found: Iterable[Message]) -> list[Message]:
    """Each once, the worst first."""
    once = dict.fromkeys(found)
    return sorted(once, key=lambda one: (-LEVELS.index(one.level), one.object, one.file, one.line))
