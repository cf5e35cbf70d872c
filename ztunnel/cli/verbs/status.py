"""`ambient status`: whether the mesh and its parts run, and what is wrong with the user's objects."""

import datetime
import json
from typing import Any

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import target_options
from ztunnel.cli.target import Which


@click.command(
    "status",
    cls=Examples,
    short_help="Show the mesh's processes, pods and problems.",
    examples=("ambient status", "ambient status -o json", "ambient status --state /tmp/other"),
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Format.")
@target_options()
def command(output: str, which: Which) -> None:
    """Show which mesh this is, whether the control plane, the node agents and the node proxies run and are ready, which
    pods there are (in a cluster: how many of which namespaces) and whether they are in the mesh, and what is wrong with
    the objects in the mesh's directory.

    \b
    Which mesh, for this verb and the others, in this order:
      --kubeconfig or --context    that cluster
      --state or AMBIENT_STATE     the mesh embedded on this machine, of that state directory
      a mesh runs at the default state directory: that one
      KUBECONFIG or ~/.kube/config: the cluster of its current context
    """
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.cli.target import Embedded

    target = which.target()
    if not isinstance(target, Embedded):
        from ztunnel.cli.kube import status as of_cluster

        found = of_cluster.read(target)
        told = json.dumps(found, indent=2) if output == "json" else of_cluster.text(found, target)
        click.echo(told)
        return
    status = EmbeddedMesh.find(target.state).client.status()
    if output == "json":
        import msgspec

        click.echo(json.dumps(msgspec.to_builtins(status), indent=2, ensure_ascii=False))
        return
    click.echo(_text(status))


def _text(status: dict[str, Any]) -> str:
    from ztunnel.cli.tables import render

    parts = [["COMPONENT", "READY", "PID", "RESTARTS"], _process("controlplane", status["controlplane"])]
    for node in status["nodes"]:
        parts += [_process(f"{part} {node['name']}", node[part]) for part in ("agent", "ztunnel")]
    sections = [_headline(status), render(parts)]
    if status["pods"]:
        rows = [["NAMESPACE", "POD", "NODE", "IP", "STATUS", "RESTARTS", "MESH", "MESSAGE"]]
        for pod in status["pods"]:
            row = [pod["namespace"], pod["name"], pod["node"], pod["ip"], pod["phase"] or "Pending"]
            rows.append(
                [*map(_cell, row), str(pod["restarts"]), "yes" if pod["mesh"] else "no", pod["message"] or ""]
            )
        sections.append(render(rows))
    else:
        sections.append(f"no pods; add resources to {status['dir']}")
    if status["problems"]:
        sections.append(
            "\n".join(["problems:", *(f"  {problem.severity}: {problem}" for problem in status["problems"])])
        )
    return "\n\n".join(sections)


def _headline(status: dict[str, Any]) -> str:
    since = _since(status["since"])
    return f"mesh of {status['dir']}, state {status['state']}, pid {status['pid']}" + (
        f", up {since}" if since else ""
    )


def _since(since: object) -> str:
    """How long ago: `since` is seconds of the epoch or an ISO 8601 time."""
    from ztunnel.cli.tables import duration

    try:
        if isinstance(since, int | float):
            start = datetime.datetime.fromtimestamp(since, datetime.UTC)
        else:
            start = datetime.datetime.fromisoformat(str(since))
    except (ValueError, OverflowError):
        return ""
    if start.tzinfo is None:
        start = start.replace(tzinfo=datetime.UTC)
    return duration((datetime.datetime.now(datetime.UTC) - start).total_seconds())


def _process(name: str, process: dict[str, Any]) -> list[str]:
    return [name, "yes" if process["ready"] else "no", _cell(process["pid"]), str(process["restarts"])]


def _cell(value: object) -> str:
    return str(value) if value else "-"
