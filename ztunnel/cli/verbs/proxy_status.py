"""`ambient proxy-status`: which node proxies are connected to the control plane, and how far each of them is."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.nodes import Node

TYPES = {
    "type.googleapis.com/istio.workload.Address": "WORKLOADS",
    "type.googleapis.com/istio.security.Authorization": "POLICIES",
}


@click.command(
    "proxy-status",
    cls=Examples,
    short_help="Show how far each node's proxy is with the control plane's state.",
    examples=("ambient proxy-status", "ambient proxy-status -o json"),
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Format.")
@target_options()
def command(output: str, which: Which) -> int:
    """Show every node proxy and, for each type of resources, whether it has what the control plane has, as the control
    plane sees it:

    \b
    SYNCED         it has acknowledged the latest version
    STALE          something is to be sent to it, or not yet acknowledged
    REJECTED       it refused the last response and keeps what it had; the reason is shown
    NOT SENT       it has asked, and there was nothing to send yet
    NOT CONNECTED  no stream is open: it works on with what it has

    The number is the version (of the running control plane), the time how long ago the proxy acknowledged it.
    Exit code 1 where a node's proxy is not connected, or has rejected something.
    """
    from ztunnel.cli.session import find
    from ztunnel.cli.tables import render

    mesh = find(which)
    names = [node.name for node in mesh.nodes()]
    dump = _merged(mesh.control_planes())
    clients: list[dict[str, Any]] = dump["clients"]
    missing = [name for name in names if name not in {_who(client) for client in clients}]
    rejected = [
        (_who(client), TYPES.get(name, name), found["rejected"])
        for client in clients
        for name, found in client["types"].items()
        if found["rejected"]
    ]
    if output == "json":
        click.echo(json.dumps(dump | {"not_connected": missing}, indent=2))
        return 1 if missing or rejected else 0
    columns = list(TYPES) + sorted({name for client in clients for name in client["types"]} - set(TYPES))
    rows = [["NODE", "CONNECTED", *(TYPES.get(name, name.rpartition(".")[2].upper()) for name in columns)]]
    now = dump.get("time", time.time())
    for client in sorted(clients, key=_who):
        cells = [_cell(client["types"].get(name), now) for name in columns]
        rows.append([_who(client), _ago(now, client["since"]), *cells])
    rows += [[name, "NOT CONNECTED", *("-" for _ in columns)] for name in missing]
    click.echo(render(rows))
    for node, kind, what in rejected:
        click.echo(f"\n{node}: {kind}: rejected {', '.join(what['names'])}: {what['error']}")
    for name in missing:
        click.echo(f"\n{name}: see: ambient check, ambient logs mesh/ztunnel-{name}")
    return 1 if missing or rejected else 0


def _who(client: dict[str, Any]) -> str:
    """The node of a node's proxy; of a waypoint, its pod as POD.NAMESPACE."""
    role, _, rest = str(client.get("id") or "").partition("~")
    pod = rest.split("~")[1:2]
    return pod[0] if role == "waypoint" and pod else str(client["node"])


def _merged(planes: "Sequence[Node]") -> dict[str, Any]:
    """What the processes of the control plane say, as if they were one: a proxy is connected to one of them.

    One that does not answer is warned of, and left out. Raises NodeError where none answers.
    """
    from ztunnel.cli.nodes import NodeError

    merged: dict[str, Any] = {}
    failures = []
    for plane in planes:
        try:
            dump = plane.dump("clients", "types", "version", "time")
        except NodeError as error:
            failures.append(error)
            continue
        if merged:
            merged["clients"] = [*merged["clients"], *dump["clients"]]
        else:
            merged = dump
    if not merged:
        raise failures[0]
    for failure in failures:
        click.echo(f"warning: {failure}", err=True)
    return merged


def _cell(found: dict[str, Any] | None, now: float) -> str:
    if found is None:
        return "-"
    word = found["status"]
    version = found["acknowledged"]
    if word == "STALE":
        waiting = found["pending"] or found["unacknowledged"]
        what = "to send" if found["pending"] else "unacknowledged"
        return f"STALE {version or '-'} ({waiting} {what})"
    if not version:
        return str(word)
    return f"{word} {version} ({_ago(now, found['answered_at'])})"


def _ago(now: float, then: float | None) -> str:
    from ztunnel.cli.tables import duration

    return "-" if then is None else duration(now - then)
