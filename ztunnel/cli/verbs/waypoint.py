"""`ambient waypoint`: make, list and remove waypoints: names and defaults are those of istioctl's command."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.app import Examples, ExamplesGroup
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import target_options
from ztunnel.cli.target import Which
from ztunnel.durations import parse as seconds_of

if TYPE_CHECKING:
    from ztunnel.store.kube.api import Api

API_VERSION = "gateway.networking.k8s.io/v1"
CLASS = "istio-waypoint"
WAYPOINT_FOR = "istio.io/waypoint-for"
USE_WAYPOINT = "istio.io/use-waypoint"
REVISION = "istio.io/rev"
TRAFFIC = ("all", "none", "service", "workload")
DEFAULT_NAME = "waypoint"
STEP = 0.25  # seconds between looks while waiting
NOT_READY = 3  # the exit code where something is not programmed

Gateway = dict[str, Any]


@click.group(
    "waypoint",
    cls=ExamplesGroup,
    short_help="Make, list and remove waypoints, which traffic to services passes.",
    examples=(
        "ambient waypoint apply --namespace default --enroll-namespace --wait",
        "ambient waypoint apply --namespace default --name reviews-waypoint --for all",
        "ambient waypoint list -A",
        "ambient waypoint status --namespace default",
        "ambient waypoint delete reviews-waypoint --namespace default",
    ),
)
def command() -> None:
    """A waypoint is a proxy with an identity of its own, before the Services (or Pods) that name it with the label
    istio.io/use-waypoint. It is a Gateway of class istio-waypoint; the mesh runs it."""


def _namespace_option(function: Any) -> Any:
    return click.option(
        "-n", "--namespace", metavar="NAME", help="Namespace [default: the context's, else default]."
    )(function)


def _name_option(function: Any) -> Any:
    return click.option(
        "--name", default=DEFAULT_NAME, show_default=True, metavar="NAME", help="Name of the waypoint."
    )(function)


def _made_of(function: Any) -> Any:
    """What a waypoint is made of."""
    function = click.option("-r", "--revision", metavar="NAME", help="Revision of the mesh that runs it.")(
        function
    )
    return click.option(
        "--for",
        "traffic",
        type=click.Choice(TRAFFIC),
        help="What passes it: connections to services [the default], to pods' own addresses, all or none.",
    )(function)


def _timeout_option(function: Any) -> Any:
    return click.option(
        "--waypoint-timeout", default="90s", show_default=True, metavar="DURATION", help="How long to wait."
    )(function)


@command.command(
    "apply",
    cls=Examples,
    short_help="Make or change a waypoint.",
    examples=(
        "ambient waypoint apply --namespace default --name reviews-waypoint",
        "ambient waypoint apply --namespace default --enroll-namespace --wait",
    ),
)
@_namespace_option
@_name_option
@_made_of
@click.option("--enroll-namespace", is_flag=True, help=f"Label the namespace {USE_WAYPOINT}=NAME.")
@click.option("--overwrite", is_flag=True, help="Enroll although the namespace uses another waypoint.")
@click.option("-w", "--wait", is_flag=True, help="Wait until the waypoint is programmed.")
@_timeout_option
@target_options()
def apply(
    namespace: str | None,
    name: str,
    traffic: str | None,
    revision: str | None,
    enroll_namespace: bool,
    overwrite: bool,
    wait: bool,
    waypoint_timeout: str,
    which: Which,
) -> None:
    """Make a waypoint, or change it. Services use it once they, or their namespace, are labeled with its name.

    Exits with 3 if it was to wait and the waypoint is not programmed in time.
    """
    limit = _seconds(waypoint_timeout)
    api = _api(which)
    namespace = namespace or api.namespace
    gateway = _gateway(namespace, name, traffic, revision)
    space = api.get("v1", "Namespace", "", namespace)
    if space is None:
        raise UserError(f"namespace {namespace} does not exist", f"kubectl create namespace {namespace}")
    labels = (space.get("metadata") or {}).get("labels") or {}
    used = labels.get(USE_WAYPOINT, "")
    if enroll_namespace and used and used != name and not overwrite:
        raise UserError(
            f"namespace {namespace} uses the waypoint {used!r} already", "say --overwrite to replace it"
        )
    if enroll_namespace and labels.get("istio.io/dataplane-mode") != "ambient":
        click.echo(
            f"warning: namespace {namespace} is not in the mesh: ambient label namespace {namespace} "
            "istio.io/dataplane-mode=ambient",
            err=True,
        )
    _served(api)
    existing = api.get(API_VERSION, "Gateway", namespace, gateway["metadata"]["name"])
    if existing is not None and not _is_waypoint(existing):
        raise UserError(
            f"Gateway {namespace}/{name} is there already, of class {_class(existing)}", "give another --name"
        )
    api.apply(gateway)
    click.echo(f"waypoint {namespace}/{name} applied")
    if wait:
        _wait(api, namespace, name, limit)
        click.echo(f"waypoint {namespace}/{name} is ready")
    if enroll_namespace:
        api.patch("v1", "Namespace", "", namespace, {"metadata": {"labels": {USE_WAYPOINT: name}}})
        click.echo(f"namespace {namespace} labeled with {USE_WAYPOINT}={name}")
    elif used != name and existing is None:
        click.echo(
            f"Services use it once they are labeled: ambient label service NAME -n {namespace} {USE_WAYPOINT}={name}; "
            "all of the namespace: --enroll-namespace",
            err=True,
        )


@command.command(
    "generate",
    cls=Examples,
    short_help="Print a waypoint as YAML.",
    examples=("ambient waypoint generate --namespace default --for all | kubectl apply -f -",),
)
@_namespace_option
@_name_option
@_made_of
def generate(namespace: str | None, name: str, traffic: str | None, revision: str | None) -> None:
    """Print what `apply` would make; asks no cluster."""
    import yaml

    gateway = _gateway(namespace or "", name, traffic, revision)
    if not namespace:
        del gateway["metadata"]["namespace"]
    click.echo(yaml.safe_dump(gateway, sort_keys=False), nl=False)


@command.command(
    "list",
    cls=Examples,
    short_help="List waypoints.",
    examples=("ambient waypoint list --namespace default", "ambient waypoint list -A -o json"),
)
@_namespace_option
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="How to print.")
@target_options()
def list_waypoints(namespace: str | None, all_namespaces: bool, output: str, which: Which) -> None:
    """List the waypoints of a namespace, or of all."""
    api = _api(which)
    found = _waypoints(api, "" if all_namespaces else namespace or api.namespace)
    rows = [
        {
            "namespace": _meta(one, "namespace"),
            "name": _meta(one, "name"),
            "revision": _labels(one).get(REVISION, "default"),
            "traffic type": _labels(one).get(WAYPOINT_FOR, "service"),
            "programmed": _condition(one, "Programmed").get("status", "False"),
        }
        for one in found
    ]
    _print(rows, output, namespaces=all_namespaces)


@command.command(
    "status",
    cls=Examples,
    short_help="Show what keeps waypoints from being ready.",
    examples=("ambient waypoint status", "ambient waypoint status --namespace default --wait"),
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_namespace_option
@click.option("-A", "--all-namespaces", is_flag=True, help="Of all namespaces.")
@click.option("-w", "--wait", is_flag=True, help="Wait until all are programmed.")
@_timeout_option
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="How to print.")
@target_options()
def status(
    names: Sequence[str],
    namespace: str | None,
    all_namespaces: bool,
    wait: bool,
    waypoint_timeout: str,
    output: str,
    which: Which,
) -> None:
    """Show the status of waypoints (of all, if none is named): their addresses, and why one is not programmed.

    Exits with 3 if one is not.
    """
    limit = _seconds(waypoint_timeout)
    api = _api(which)
    space = "" if all_namespaces else namespace or api.namespace

    def chosen() -> list[Gateway]:
        return [one for one in _waypoints(api, space) if not names or _meta(one, "name") in names]

    missing = set(names) - {_meta(one, "name") for one in chosen()}
    if missing:
        where = f"namespace {space}" if space else "any namespace"
        raise UserError(
            f"no waypoint {', '.join(sorted(missing))} in {where}", "see ambient waypoint list -A"
        )
    if wait:
        for one in chosen():
            _wait(api, _meta(one, "namespace"), _meta(one, "name"), limit)
    rows = []
    good = True
    for one in chosen():
        condition = _condition(one, "Programmed")
        good = good and condition.get("status") == "True"
        addresses = [each.get("value", "") for each in (one.get("status") or {}).get("addresses") or ()]
        rows.append(
            {
                "namespace": _meta(one, "namespace"),
                "name": _meta(one, "name"),
                "status": condition.get("status", "Unknown"),
                "type": "Programmed",
                "reason": condition.get("reason", "Pending"),
                "address": ",".join(addresses),
                "message": condition.get("message")
                or "nobody has looked at it: does the mesh of its revision run?",
            }
        )
    _print(rows, output, namespaces=all_namespaces)
    if not good:
        raise click.exceptions.Exit(NOT_READY)


@command.command(
    "delete",
    cls=Examples,
    short_help="Remove waypoints.",
    examples=(
        "ambient waypoint delete reviews-waypoint --namespace default",
        "ambient waypoint delete --all --namespace default",
    ),
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_namespace_option
@click.option("--all", "everything", is_flag=True, help="All waypoints of the namespace.")
@click.option("-r", "--revision", metavar="NAME", help="Those of a revision.")
@target_options()
def delete(
    names: Sequence[str], namespace: str | None, everything: bool, revision: str | None, which: Which
) -> None:
    """Remove waypoints: what was made for them goes, too, and what names them is reached without one."""
    if names and (everything or revision):
        raise click.UsageError("give names, or --all or --revision")
    if not names and not (everything or revision):
        raise click.UsageError("give the names of waypoints, or --all or --revision")
    api = _api(which)
    namespace = namespace or api.namespace
    found = {
        _meta(one, "name"): one
        for one in _waypoints(api, namespace)
        if not revision or _labels(one).get(REVISION) == revision
    }
    missing = [name for name in names if name not in found]
    for name in names or sorted(found):
        if name in found and api.delete(API_VERSION, "Gateway", namespace, name):
            click.echo(f"waypoint {namespace}/{name} deleted")
    if missing:
        raise UserError(
            f"no waypoint {', '.join(missing)} in namespace {namespace}", "see ambient waypoint list -A"
        )


def _api(which: Which) -> "Api":
    from ztunnel.cli.target import Embedded

    target = which.target()
    if isinstance(target, Embedded):
        raise UserError(
            f"{target} runs no waypoints: they are pods that a cluster makes",
            "name a cluster with --kubeconfig FILE",
        )
    return target.api()


def _served(api: "Api") -> None:
    if not api.serves(API_VERSION, "Gateway"):
        raise UserError(
            "the cluster has no Gateway API, which waypoints are made with",
            "ambient install brings what waypoints need of it; or install the Gateway API's own release",
        )


def _gateway(namespace: str, name: str, traffic: str | None, revision: str | None) -> Gateway:
    name = name or DEFAULT_NAME
    if name == "none":
        raise UserError('a waypoint cannot be named "none": the label with that value means no waypoint')
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    labels = {key: value for key, value in ((WAYPOINT_FOR, traffic), (REVISION, revision)) if value}
    if labels:
        metadata["labels"] = labels
    return {
        "apiVersion": API_VERSION,
        "kind": "Gateway",
        "metadata": metadata,
        "spec": {
            "gatewayClassName": CLASS,
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    }


def _waypoints(api: "Api", namespace: str) -> list[Gateway]:
    _served(api)
    found = [one for one in api.list(API_VERSION, "Gateway", namespace) if _is_waypoint(one)]
    return sorted(found, key=lambda one: (_meta(one, "namespace"), _meta(one, "name")))


def _wait(api: "Api", namespace: str, name: str, limit: float) -> None:
    """Raises UserError (exit code 3) if it is not programmed in time."""
    end = time.monotonic() + limit
    while True:
        found = api.get(API_VERSION, "Gateway", namespace, name)
        if found is None:
            raise UserError(f"waypoint {namespace}/{name} was deleted meanwhile")
        condition = _condition(found, "Programmed")
        current = condition.get("observedGeneration") == (found["metadata"]).get("generation")
        if condition.get("status") == "True" and current:
            return
        if time.monotonic() >= end:
            why = condition.get("message") or "nobody has looked at it: does the mesh of its revision run?"
            raise UserError(
                f"waypoint {namespace}/{name} is not programmed after {limit:.0f} s: {why}", code=NOT_READY
            )
        time.sleep(STEP)


def _condition(gateway: Gateway, kind: str) -> dict[str, Any]:
    conditions = (gateway.get("status") or {}).get("conditions") or ()
    return next((one for one in conditions if one.get("type") == kind), {})


def _is_waypoint(gateway: Gateway) -> bool:
    return _class(gateway) == CLASS


def _class(gateway: Gateway) -> str:
    return str((gateway.get("spec") or {}).get("gatewayClassName") or "")


def _meta(gateway: Gateway, field: str) -> str:
    return str((gateway.get("metadata") or {}).get(field) or "")


def _labels(gateway: Gateway) -> dict[str, str]:
    return (gateway.get("metadata") or {}).get("labels") or {}


def _print(rows: list[dict[str, str]], output: str, *, namespaces: bool) -> None:
    from ztunnel.cli.tables import render

    if output == "json":
        import json

        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo("No waypoints found.", err=True)
        return
    columns = [key for key in rows[0] if namespaces or key != "namespace"]
    click.echo(render([[key.upper() for key in columns], *([row[key] for key in columns] for row in rows)]))


def _seconds(text: str) -> float:
    try:
        return seconds_of(text)
    except ValueError as error:
        raise click.UsageError(f"--waypoint-timeout: {error}") from None
