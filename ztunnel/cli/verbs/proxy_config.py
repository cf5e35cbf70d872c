"""`ambient proxy-config`: what a node's proxy knows and holds, in the manner of `istioctl ztunnel-config`."""

import json
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import target_namespace_option, target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.nodes import Node
    from ztunnel.store.models import Pod

Row = dict[str, Any]
WHAT = ("workloads", "services", "policies", "certificates", "connections", "all")
SINGULAR = {"workload": "workloads", "service": "services", "svc": "services", "policy": "policies", "pol": "policies",
            "certificate": "certificates", "cert": "certificates", "certs": "certificates",
            "connection": "connections"}  # fmt: skip


class What(click.Choice[str]):
    """The plurals, and the singulars that people type as well."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The plural."""
        from ztunnel.cli import habits

        word = SINGULAR.get(str(value), str(value))
        if word not in self.choices and (told := habits.of_part(word, self.choices)):
            self.fail(f"{word!r} is not one of {', '.join(self.choices)}; {told}", param, ctx)
        return super().convert(word, param, ctx)


@click.command(
    "proxy-config",
    cls=Examples,
    short_help="Show what a node's proxy knows: workloads, services, policies, certificates, connections.",
    examples=(
        "ambient proxy-config workloads                  # of every node",
        "ambient proxy-config services node-1",
        "ambient proxy-config certificates reviews -o json",
        "ambient proxy-config connections deploy/web -n shop",
        "ambient proxy-config all node-2                 # everything, as JSON",
    ),
)
@click.argument("what", type=What(WHAT), metavar="|".join(WHAT))
@click.argument("target", metavar="[NODE|POD]", required=False)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Format.")
@target_namespace_option()
@target_options()
def command(what: str, target: str | None, output: str, namespace: str | None, which: Which) -> int:
    """Show what the proxies of all nodes, of one NODE, or of the node of a POD know of the mesh and hold.

    With a POD, certificates and connections are only its own. `all` is JSON: the whole dump of each proxy and its
    connections. Private keys are never shown, nor do they leave the proxy.

    Exit code 1 where a node's proxy does not answer; the others are shown all the same.
    """
    from ztunnel.cli.nodes import NodeError, chosen
    from ztunnel.cli.session import find

    mesh = find(which)
    found, pod = chosen(mesh, target, namespace or mesh.default_namespace)
    shown: list[Node] = []
    rows: list[Row] = []
    whole: dict[str, Any] = {}
    failures: list[NodeError] = []
    for node in found:
        try:
            if what == "all":
                whole[node.name] = node.dump() | {"connections": _connections(node, pod)}
            else:
                rows += [{"proxy": node.name} | one for one in _rows(what, node, pod)]
        except NodeError as error:
            failures.append(error)
        else:
            shown.append(node)
    if failures and not shown:
        raise failures[0]
    for failure in failures:
        click.echo(f"warning: {failure}", err=True)
    if what == "all":
        click.echo(json.dumps(whole, indent=2))
    elif output == "json":
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo(_table(what, rows, several=len(found) > 1))
    return 1 if failures else 0


def _rows(what: str, node: "Node", pod: "Pod | None") -> Iterable[Row]:
    if what == "connections":
        return _connections(node, pod)
    rows: list[Row] = node.dump(what)[what]
    if what == "certificates" and pod is not None:
        (owned,) = [one for one in node.dump("pods")["pods"] if one["uid"] == pod.metadata.uid] or [None]
        if owned is None:
            raise UserError(
                f"pod {pod.namespace}/{pod.name} is not served by the proxy of {node.name}",
                "it is not in the mesh; see: ambient status",
            )
        return [one for one in rows if one["identity"] == owned["identity"]]
    return rows


def _connections(node: "Node", pod: "Pod | None") -> list[Row]:
    query = urlencode({"pod": f"{pod.namespace}/{pod.name}"}) if pod is not None else ""
    answer = node.json(f"/debug/connections?{query}")
    for worker, error in answer.get("errors", {}).items():
        click.echo(f"warning: {node.name}: {worker}: {error}", err=True)
    for worker in answer["limited"]:
        click.echo(f"warning: {node.name}: {worker} has more connections than are shown", err=True)
    rows: list[Row] = answer["connections"]
    return rows


def _table(what: str, rows: list[Row], *, several: bool) -> str:
    from ztunnel.cli.tables import render

    if not rows:
        return f"no {what}"
    columns = dict(_columns(what))
    if several:
        columns = {"PROXY": lambda row: row["proxy"], **columns}
    shown = sorted([text(row) for text in columns.values()] for row in rows)
    return render([list(columns), *shown])


def _columns(what: str) -> dict[str, Callable[[Row], str]]:
    from ztunnel.cli.filters import end_of, security, size
    from ztunnel.cli.tables import duration

    def of(name: str) -> Callable[[Row], str]:
        return lambda row: str(row.get(name) or "-")

    def listed(name: str) -> Callable[[Row], str]:
        return lambda row: ",".join(map(str, row.get(name) or ())) or "-"

    def when(name: str) -> Callable[[Row], str]:
        return lambda row: _moment(row.get(name))

    if what == "workloads":
        return {
            "NAMESPACE": of("namespace"),
            "WORKLOAD": of("name"),
            "ADDRESS": listed("addresses"),
            "NODE": of("node"),
            "WAYPOINT": of("waypoint"),
            "PROTOCOL": lambda row: "TCP" if row["protocol"] == "NONE" else row["protocol"],
            "HEALTHY": lambda row: "yes" if row["healthy"] else "no",
        }
    if what == "services":
        return {
            "NAMESPACE": of("namespace"),
            "SERVICE": of("name"),
            "VIP": listed("addresses"),
            "PORTS": listed("ports"),
            "WAYPOINT": of("waypoint"),
            "ENDPOINTS": lambda row: f"{row['healthy_endpoints']}/{row['endpoints']}",
        }
    if what == "policies":
        return {
            "NAMESPACE": of("namespace"),
            "POLICY": of("name"),
            "ACTION": of("action"),
            "SCOPE": of("scope"),
            "RULES": lambda row: str(_count(row.get("rules"))),
            "DRY RUN": lambda row: "yes" if row.get("dry_run") else "no",
            "PROBLEM": of("problem"),
        }
    if what == "certificates":
        return {
            "IDENTITY": of("identity"),
            "STATUS": of("state"),
            "SERIAL": lambda row: str(row.get("serial") or "-")[:16],
            "NOT BEFORE": when("not_before"),
            "NOT AFTER": when("not_after"),
            "RENEWAL": lambda row: _until(row.get("next_fetch")),
            "LAST ERROR": of("last_error"),
        }
    return {
        "DIRECTION": of("direction"),
        "FROM": lambda row: end_of(row, "src"),
        "TO": lambda row: end_of(row, "dst"),
        "SECURITY": security,
        "SENT": lambda row: size(row["bytes_sent"]),
        "RECEIVED": lambda row: size(row["bytes_recv"]),
        "AGE": lambda row: duration(row["seconds"]),
        "STATE": of("state"),
    }


def _count(rules: Any) -> int:
    return rules if isinstance(rules, int) else len(rules or ())


def _moment(seconds: float | None) -> str:
    return "-" if not seconds else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _until(seconds: float | None) -> str:
    from ztunnel.cli.tables import duration

    return "-" if not seconds else f"in {duration(seconds - time.time())}"
