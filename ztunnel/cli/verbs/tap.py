"""`ambient tap`: connections as they begin and end, from all nodes at once."""

import json
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.filters import end_of, filter_options, make_filter, security, size
from ztunnel.cli.options import target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.nodes import Node

RETRY = 1.0  # seconds until a node whose daemon ended is asked again
ARROWS = {"outbound": "out", "inbound": "in"}


@click.command(
    "tap",
    cls=Examples,
    short_help="Follow connections as they begin and end.",
    examples=(
        "ambient tap                                # everything, until Ctrl-C",
        "ambient tap reviews                        # of one pod or Deployment, either way",
        "ambient tap --namespace shop --to ratings --port 9080",
        "ambient tap --errors -o json               # what fails, a line of JSON each",
        "ambient tap node-1 --direction inbound --for 10",
    ),
)
@click.argument("target", metavar="[POD|NODE]", required=False)
@click.option(
    "-n", "--namespace", metavar="NS", help="Only where either end is in it; POD is looked for there."
)
@filter_options()
@click.option("--max", "most", type=click.IntRange(1), help="End after this many events.")
@click.option(
    "--for", "seconds", type=click.FloatRange(0, min_open=True), help="End after this many seconds."
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Format of a line.")
@target_options()
def command(
    target: str | None,
    namespace: str | None,
    source: str | None,
    destination: str | None,
    port: int | None,
    direction: str | None,
    errors: bool,
    most: int | None,
    seconds: float | None,
    output: str,
    which: Which,
) -> None:
    """Follow the connections of all nodes, one NODE or one POD: a line when a connection is established, and one when
    it ends, with its bytes and, where it failed, the reason.

    A connection within the mesh is seen twice: `out` by the proxy of the client's node, `in` by that of the server's.
    It costs the proxies next to nothing, and nothing when nobody taps. What comes faster than it can be shown is
    left out, and counted.
    """
    from ztunnel.cli.nodes import chosen
    from ztunnel.cli.session import find

    mesh = find(which)
    found, pod = chosen(mesh, target, namespace or mesh.default_namespace)
    wanted = make_filter(pod, namespace, source, destination, port, direction, errors)
    path = "/debug/tap?" + urlencode(wanted.query())
    events: queue.Queue[dict[str, Any] | str] = queue.Queue(maxsize=10_000)
    for node in found:
        threading.Thread(target=_follow, args=(node, path, events.put), daemon=True).start()
    end = time.monotonic() + seconds if seconds is not None else None
    shown = 0
    while most is None or shown < most:
        try:
            left = None if end is None else max(0.0, end - time.monotonic())
            event = events.get(timeout=left)
        except queue.Empty:
            return
        if isinstance(event, str):
            click.echo(event, err=True)
        elif event["event"] == "lost":
            click.echo(
                f"warning: {event['node']}: {event['count']} events came too fast to be shown", err=True
            )
        elif event["event"] == "tapping":
            click.echo(f"tapping {event['node']}", err=True)
        else:
            shown += 1
            click.echo(json.dumps(event) if output == "json" else _line(event))


def _follow(node: "Node", path: str, put: Callable[[dict[str, Any] | str], None]) -> None:
    """Hand on what a node tells, for ever: a daemon that ends is followed by another."""
    from ztunnel.cli.nodes import NodeError

    while True:
        try:
            for line in node.stream(path):
                put(json.loads(line))
            put(f"warning: {node.name}: its daemon ended the tap; trying again")
        except (NodeError, ValueError) as error:
            put(f"warning: {error}; trying again")
        time.sleep(RETRY)


def _line(event: dict[str, Any]) -> str:
    clock = event["time"].partition("T")[2].rstrip("Z")[:12]
    way = ARROWS.get(event.get("direction", ""), "?")
    words = [
        f"{clock} {event['event']:<6} {way:<3} {event['node']} {end_of(event, 'src')} -> {end_of(event, 'dst')}"
    ]
    if event.get("dst.service"):
        words.append(f"service={event['dst.service']}")
    words.append(security(event))
    if event["event"] == "closed":
        words.append(
            f"sent={size(event['bytes_sent'])} received={size(event['bytes_recv'])} {event['seconds']:.3f}s"
        )
    if event.get("error"):
        words.append(f"error={json.dumps(event['error'])}")
    return " ".join(words)
