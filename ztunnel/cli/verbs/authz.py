"""`ambient authz`: what policies mean for a connection, and what a policy would do that is not applied yet."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.app import Examples, ExamplesGroup
from ztunnel.cli.authz.ends import FROM, TO
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import Decorator, files_option, target_namespace_option, target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.authz.ends import Caller, Destination
    from ztunnel.cli.authz.model import Explanation
    from ztunnel.cli.authz.replay import Changed, Replay
    from ztunnel.cli.session import Mesh
    from ztunnel.store.models import Key, Object

WRONG_INPUT = 2


@click.group(
    "authz",
    cls=ExamplesGroup,
    short_help="Ask what policies do: to a connection, or to recent traffic.",
    examples=(
        "ambient authz explain --from client --to web --port 8080",
        "ambient authz check -f policy.yaml",
    ),
)
def command() -> None:
    """Ask what AuthorizationPolicies and PeerAuthentications do, without making a connection."""


def output_option() -> Decorator:
    """`-o table|json`."""
    return click.option(
        "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Format."
    )


@command.command(
    "explain",
    cls=Examples,
    short_help="Say whether a connection would be allowed, and which policy and rule decide.",
    examples=(
        "ambient authz explain --from client --to web --port 8080",
        "ambient authz explain --from deploy/productpage --to svc/reviews --port 9080 -n shop",
        "ambient authz explain --from cluster.local/ns/other/sa/job --to web --port 80 -o json",
        "ambient authz explain --from 192.0.2.7 --to web --port 80        # plaintext, from outside the mesh",
        "ambient authz explain -f policy.yaml --from client --to web --port 80   # as if it were applied",
    ),
)
@click.option(
    "--from", "source", required=True, metavar="WHO", help=f"{FROM}. NS/POD names one of another namespace."
)
@click.option(
    "--to", "target", required=True, metavar="WHAT", help=f"{TO}. NS/NAME is one of another namespace."
)
@click.option(
    "--port", required=True, type=click.IntRange(1, 65535), help="The pod's port, or the Service's."
)
@click.option("--from-ip", "address", metavar="ADDRESS", help="The caller's address, instead of its own.")
@files_option(required=False)
@target_namespace_option()
@output_option()
@target_options()
def explain(
    source: str,
    target: str,
    port: int,
    address: str | None,
    files: tuple[str, ...],
    namespace: str | None,
    output: str,
    which: Which,
) -> int:
    """Say what would become of a connection by the policies as they are applied now: which policies are looked at,
    which one and which rule of it decide, and what dry-run policies would do if they were enforced.

    Exit code 0 if the connection is allowed (to a Service: to all of its pods), 1 if it is denied, 2 where the question
    cannot be answered.
    """
    from ztunnel.cli.authz import ends
    from ztunnel.cli.authz.model import PolicyModel
    from ztunnel.cli.session import find

    try:
        mesh = find(which)
        namespace = namespace or mesh.default_namespace
        objects, _ = _with_given(_applied(mesh), files, namespace)
        model = PolicyModel(objects.values())
        caller = ends.caller(mesh, namespace, source, address)
        found = [
            (each, _explained(model, caller, each))
            for each in ends.destinations(mesh, namespace, target, port)
        ]
    except UserError as error:
        error.code = WRONG_INPUT
        raise
    if output == "json":
        click.echo(json.dumps([_as_json(caller, *each) for each in found], indent=2, ensure_ascii=False))
    else:
        click.echo("\n\n".join(_as_text(caller, *each) for each in found))
    return 0 if all(explanation.allowed for _, explanation in found) else 1


def _explained(model: Any, caller: "Caller", destination: "Destination") -> "Explanation":
    from ztunnel.cli.authz.model import Explanation
    from ztunnel.mesh.model import packed_ip
    from ztunnel.mesh.policy import Connection
    from ztunnel.store.membership import in_mesh

    pod = destination.pod
    if not pod.addresses:
        raise UserError(f"{pod.ref} has no address yet", "see: ambient get pods")
    if not destination.port:
        return Explanation(
            False, "the Service's target port is a name that the pod has no port of", "", "", "", ()
        )
    if not in_mesh(pod):
        # Not "denied": whatever the policies say, nobody is there to say it.
        return Explanation(True, "the pod is not in the mesh: no policy is enforced for it", "", "", "", ())
    to = pod.addresses[0]
    if destination.direct and to in caller.addresses:
        return Explanation(True, "what a pod sends to its own address does not leave it", "", "", "", ())
    connection = Connection.of(
        caller.identity, packed_ip(caller.address_like(to)), packed_ip(to), destination.port
    )
    explanation: Explanation = model.explain(pod, connection)
    return explanation


def _as_text(caller: "Caller", destination: "Destination", explanation: "Explanation") -> str:
    from ztunnel.cli.tables import render

    pod = destination.pod
    word, colour = ("allowed", "green") if explanation.allowed else ("denied", "red")
    where = "" if caller.anywhere else f" at {caller.address_like(pod.addresses[0])}"
    lines = [
        f"{click.style(word, fg=colour)}: {explanation.reason.removeprefix(f'{word} ')}",
        f"  from  {caller.told}{where}",
        f"  to    pod {pod.namespace}/{pod.name}, {pod.addresses[0]} port {destination.port or '?'}",
    ]
    if explanation.rehearsed:
        lines.append(f"  with the dry-run policies enforced it would be: {explanation.rehearsed}")
    if caller.anywhere:
        lines.append("  the caller's address is not known: give --from-ip where policies look at it")
    if explanation.policies:
        rows = [["POLICY", "ACTION", "SCOPE", "RULE", "EFFECT"]]
        for each in explanation.policies:
            effect = f"{each.effect} (decides)" if each.decides else each.effect
            rows.append([each.object, each.action, each.scope, each.rule or "-", effect])
        lines += ["", render(rows)]
    return "\n".join(lines)


def _as_json(caller: "Caller", destination: "Destination", explanation: "Explanation") -> dict[str, Any]:
    pod = destination.pod
    return {
        "allowed": explanation.allowed,
        "reason": explanation.reason,
        "policy": explanation.policy,
        "rule": explanation.rule,
        "dryRun": explanation.rehearsed,
        "from": {
            "identity": caller.identity,
            "address": "" if caller.anywhere else caller.address_like(pod.addresses[0]),
        },
        "to": {
            "namespace": pod.namespace,
            "pod": pod.name,
            "address": pod.addresses[0],
            "port": destination.port,
        },
        "policies": [each._asdict() for each in explanation.policies],
    }


@command.command(
    "check",
    cls=Examples,
    short_help="Replay recent connections against policies that are not applied yet.",
    examples=(
        "ambient authz check -f policy.yaml && ambient apply -f policy.yaml",
        "ambient authz check -f policies/ -o json",
        "ambient authz check -f policy.yaml --enforce     # a dry-run policy, as if it were enforced",
        "ambient authz check --delete AuthorizationPolicy/web-viewer -n shop",
    ),
)
@files_option(required=False)
@click.option(
    "--delete",
    "deleted",
    multiple=True,
    metavar="KIND/NAME",
    help="As if this policy were deleted; several times.",
)
@click.option("--enforce", is_flag=True, help="Take the given policies' dry-run annotation away.")
@target_namespace_option()
@output_option()
@target_options()
def check(
    files: tuple[str, ...],
    deleted: tuple[str, ...],
    enforce: bool,
    namespace: str | None,
    output: str,
    which: Which,
) -> int:
    """Replay the connections that the nodes' proxies have seen lately (up to some thousand different ones each) against
    the policies as they would be with the given ones applied, and list those that would be cut off and those that would
    be newly allowed, by source identity, destination and port. Nothing is applied.

    Exit code 0 if nothing would be cut off, 1 if something would, 2 where that cannot be told.
    """
    from ztunnel.cli.authz.model import PolicyModel
    from ztunnel.cli.authz.replay import replay
    from ztunnel.cli.session import find
    from ztunnel.store.models import Pod

    if not files and not deleted:
        raise click.UsageError("give policies with -f FILE, or --delete KIND/NAME")
    try:
        mesh = find(which)
        namespace = namespace or mesh.default_namespace
        applied = _applied(mesh)
        proposed, told = _with_given(applied, files, namespace, enforce=enforce)
        told += _without(proposed, deleted, namespace)
        records, silent = _recorded(mesh)
    except UserError as error:
        error.code = WRONG_INPUT
        raise
    result = replay(
        records, mesh.objects.list(Pod), PolicyModel(applied.values()), PolicyModel(proposed.values())
    )
    if output == "json":
        click.echo(json.dumps(_replay_json(result, told, silent), indent=2, ensure_ascii=False))
    else:
        click.echo(_replay_text(result, told))
    if result.cut_off:
        return 1
    return WRONG_INPUT if silent else 0


def _applied(mesh: "Mesh") -> "dict[Key, Object]":
    from ztunnel.store.models import AuthorizationPolicy, PeerAuthentication

    kinds: tuple[type[Object], ...] = (PeerAuthentication, AuthorizationPolicy)
    return {obj.key: obj for kind in kinds for obj in mesh.objects.list(kind)}


def _with_given(
    applied: "dict[Key, Object]", files: Sequence[str], namespace: str, *, enforce: bool = False
) -> "tuple[dict[Key, Object], list[str]]":
    """The policies with those of the files in their places, and what they are. Raises UserError if any has errors."""
    import msgspec

    from ztunnel.cli import manifests
    from ztunnel.store.authorization import DRY_RUN_ANNOTATION
    from ztunnel.store.models import AuthorizationPolicy, PeerAuthentication

    proposed, told = dict(applied), list[str]()
    if not files:
        return proposed, told
    given = manifests.read(files, namespace)
    if manifests.show(given.problems):
        raise UserError("the files have errors", "correct them first; `ambient apply` would refuse them")
    for _, _, decoded in given.objects:
        obj = decoded.obj
        if not isinstance(obj, AuthorizationPolicy | PeerAuthentication):
            continue
        before = applied.get(obj.key)
        # Age decides between PeerAuthentications, and a change does not make one younger.
        made = before.metadata.creation_timestamp if before is not None else ""
        annotations = obj.metadata.annotations
        if enforce:
            annotations = {key: text for key, text in annotations.items() if key != DRY_RUN_ANNOTATION}
        metadata = msgspec.structs.replace(obj.metadata, creation_timestamp=made, annotations=annotations)
        now = proposed[obj.key] = msgspec.structs.replace(obj, metadata=metadata)
        told.append(f"{obj.ref} ({_difference(before, now)})")
    if not told:
        raise UserError("no AuthorizationPolicy or PeerAuthentication in the files", "give at least one")
    return proposed, told


def _difference(before: "Object | None", now: "Object") -> str:
    from ztunnel.store.authorization import DRY_RUN_ANNOTATION
    from ztunnel.store.models import to_dict

    if before is None:
        return "new"
    said = [
        (to_dict(each).get("spec"), each.metadata.annotations.get(DRY_RUN_ANNOTATION))
        for each in (before, now)
    ]
    return "unchanged" if said[0] == said[1] else "changed"


def _without(proposed: "dict[Key, Object]", deleted: Sequence[str], namespace: str) -> list[str]:
    """Take out the policies that are named KIND/NAME; what they are."""
    from ztunnel.store.kinds import kind_named
    from ztunnel.store.models import key_of

    told = []
    for word in deleted:
        kind_word, slash, name = word.partition("/")
        kind = kind_named(kind_word)
        if not slash or kind is None or not kind.RESTRICTS:
            raise UserError(
                f"--delete {word}: is no policy", "write AuthorizationPolicy/NAME or PeerAuthentication/NAME"
            )
        key = key_of(kind, namespace, name)
        if proposed.pop(key, None) is None:
            raise UserError(f"{key} not found", f"see: ambient get {kind.PLURAL} -n {namespace}")
        told.append(f"{key} (deleted)")
    return told


def _recorded(mesh: "Mesh") -> tuple[list[dict[str, Any]], list[str]]:
    """What all nodes remember, and the names of nodes that did not tell, or not all; these are warned of."""
    from ztunnel.cli.nodes import NodeError

    records: list[dict[str, Any]] = []
    silent = []
    for node in mesh.nodes():
        try:
            page = node.json("/debug/connections/recent")
        except NodeError as error:
            click.echo(f"warning: {error}; its connections are not replayed", err=True)
            silent.append(node.name)
            continue
        records += page["recent"]
        for worker, problem in page.get("errors", {}).items():
            click.echo(
                f"warning: {node.name}, {worker}: {problem}; its connections are not replayed", err=True
            )
            silent.append(f"{node.name}/{worker}")
    return records, silent


def _replay_text(result: "Replay", told: Sequence[str]) -> str:
    from ztunnel.cli.tables import duration

    last = f"; the last was {duration(time.time() - result.latest)} ago" if result.kinds else ""
    gone = f"; {result.unknown} more left out, their pods are gone" if result.unknown else ""
    lines = [
        f"with {', '.join(told)}:",
        f"{result.connections} remembered connections ({result.kinds} different) were replayed{last}{gone}",
    ]
    for changes, heading, colour in (
        (result.cut_off, "would be cut off", "red"),
        (result.newly_allowed, "would be newly allowed", "yellow"),
    ):
        if changes:
            lines += ["", click.style(heading, fg=colour), _table(changes)]
    if not result.cut_off:
        lines += [
            "",
            "nothing would be cut off" if result.kinds else "no connection is known: nothing can be said",
        ]
    return "\n".join(lines)


def _table(changes: "Sequence[Changed]") -> str:
    from ztunnel.cli.tables import duration, render

    rows = [["SOURCE", "DESTINATION", "PORT", "CONNECTIONS", "LAST", "WHY"]]
    for each in changes:
        last = duration(time.time() - each.last)
        rows.append([each.source, each.destination, str(each.port), str(each.connections), last, each.reason])
    return render(rows)


def _replay_json(result: "Replay", told: Sequence[str], silent: Sequence[str]) -> dict[str, Any]:
    return {
        "with": list(told),
        "connections": result.connections,
        "different": result.kinds,
        "unknown": result.unknown,
        "latest": result.latest,
        "notReplayed": list(silent),
        "cutOff": [each._asdict() for each in result.cut_off],
        "newlyAllowed": [each._asdict() for each in result.newly_allowed],
    }
