"""`ambient capture`: what is on the wire of a pod or a node, and whether it is encrypted."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import target_namespace_option, target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.session import EmbeddedMesh

COLOURS = {"TLS": "green", "plaintext": "red"}
UPLINK = "eth0"


@click.command(
    "capture",
    cls=Examples,
    short_help="Capture on a pod's or a node's link: which flows are TLS, which are plaintext.",
    examples=(
        "ambient capture reviews --duration 10",
        "ambient capture --node node-1 -w node-1.pcap         # until Ctrl-C",
        "ambient capture deploy/web --filter tcp --count 100 --packets",
        "ambient capture reviews --interface lo               # within the pod, where the program's own bytes are",
        "ambient capture reviews --duration 5 -o json",
    ),
)
@click.argument("target", metavar="[POD]", required=False)
@click.option("--node", metavar="NODE", help="Capture on the link of this node instead of a pod's.")
@click.option("--interface", default=UPLINK, show_default=True, help="Which interface there.")
@click.option(
    "--filter", "expression", default="", metavar="EXPRESSION", help="Only this: see pcap-filter(7)."
)
@click.option(
    "--duration", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="End after this time."
)
@click.option("--count", type=click.IntRange(1), help="End after so many packets.")
@click.option("--packets", is_flag=True, help="Show each packet, too.")
@click.option(
    "-w", "--write", type=click.Path(path_type=Path, dir_okay=False), help="Write the packets (pcap)."
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Format.")
@target_namespace_option()
@target_options()
def command(
    target: str | None,
    node: str | None,
    interface: str,
    expression: str,
    duration: float | None,
    count: int | None,
    packets: bool,
    write: Path | None,
    output: str,
    namespace: str | None,
    which: Which,
) -> None:
    """Capture on the link of a POD or a node until Ctrl-C, or as told, and say of each TCP connection what it
    carries, by the first bytes of each side: TLS (with the server name and protocols that its client asked for),
    HTTP or other plaintext, or what it begins with. A pod's link shows what leaves it: in the mesh that is tunnels
    (port 15008).

    In a cluster the node's agent captures, which `pods/exec` in namespace istio-system has to be allowed for.
    It costs the mesh nothing but the copy of the packets; a flow that was open before is recognised where it can be.
    """
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.cli.target import Embedded

    if (target is None) == (node is None):
        raise UserError("what shall be captured?", "give a POD, or --node NODE")
    where = which.target()
    words = ["--interface", interface, "--filter", expression]
    if duration is not None:
        words += ["--duration", str(duration)]
    if count is not None:
        words += ["--count", str(count)]
    if packets:
        words.append("--packets")
    if write is not None:
        words += ["--write", str(write.absolute())]
    told: dict[str, dict[str, Any]] = {}

    def show(line: dict[str, Any]) -> None:
        if "error" in line or "done" in line:
            told["error" if "error" in line else "done"] = line
        if output == "json":
            click.echo(json.dumps(line))
        elif "ready" in line:
            click.echo(f"capturing on {interface} of {node or target}", err=True)
        elif "packet" in line:
            click.echo(f"{_clock(line['time'])} {line['packet']}")
        elif "flow" in line:
            click.echo(f"{_clock(line['time'])} {_flow(line['flow'])}")

    if isinstance(where, Embedded):
        mesh = EmbeddedMesh.find(where.state)
        _follow(mesh, _where(mesh, target, node, namespace or mesh.default_namespace) + words, show)
    elif write is not None:
        raise UserError(
            "the packets of a cluster's nodes cannot be written here",
            "leave out -w, or use: kubectl debug node/NODE -it --image=IMAGE -- tcpdump -w -",
        )
    else:
        from ztunnel.cli.kube.capture import follow

        follow(where, target, node, namespace, words, show)
    if "error" in told:
        raise UserError(str(told["error"]["error"]), "see: ambient capture --help")
    if "done" not in told:
        raise UserError("the capture ended before its time", "see: ambient status")
    if output == "text":
        _summary(told["done"], write)


def _where(mesh: "EmbeddedMesh", target: str | None, node: str | None, namespace: str) -> list[str]:
    from ztunnel.embedded.statedir import State

    directory = State(mesh.state).netns
    if node is not None:
        names = {each["name"] for each in mesh.client.status()["nodes"]}
        name = node if node in names else f"node-{node}"
        if name not in names:
            raise UserError(f"there is no node {node!r}", f"the nodes are: {', '.join(sorted(names))}")
        return ["--netns", str(directory / name)]
    pod = mesh.pod(namespace, str(target))
    if not pod.metadata.uid or not (directory / pod.metadata.uid).exists():
        raise UserError(f"pod {pod.namespace}/{pod.name} does not run yet", "see: ambient get pods -A")
    return ["--netns", str(directory / pod.metadata.uid)]


def _follow(mesh: "EmbeddedMesh", words: list[str], show: Callable[[dict[str, Any]], None]) -> None:
    """Run the program that captures and `show` what it says, line by line, until it ends.

    Asked for by the main thread: only there are the signals that would end us passed on to it, so that it ends in
    order and tells its last line.
    """
    from ztunnel.cli.inside import FABRIC, command

    read, write = os.pipe()

    def listen() -> None:
        with os.fdopen(read, "rb") as stream:
            for line in stream:
                with contextlib.suppress(ValueError):
                    show(json.loads(line))

    reader = threading.Thread(target=listen, daemon=True)
    reader.start()
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        mesh.client.exec_on_node(
            FABRIC, command("ztunnel.cli.wire.watch", *words), streams=(nothing, write, 2)
        )
    finally:
        os.close(nothing)
        os.close(write)
        reader.join()


def _clock(seconds: float) -> str:
    return f"{time.strftime('%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}"


def _flow(flow: dict[str, Any]) -> str:
    security = click.style(flow["security"], fg=COLOURS.get(flow["security"]))
    hbone = " HBONE" if flow["hbone"] else ""
    detail = f" ({flow['detail']})" if flow["detail"] else ""
    return f"{flow['client']} -> {flow['server']} {security}{hbone}{detail}"


def _summary(final: dict[str, Any], write: Path | None) -> None:
    from ztunnel.cli.filters import size
    from ztunnel.cli.tables import render

    flows = final["flows"]
    if flows:
        rows = [["CLIENT", "SERVER", "SECURITY", "HBONE", "PACKETS", "SENT", "RECEIVED", "DETAIL"]]
        for flow in flows:
            sent, received = size(flow["bytes_sent"]), size(flow["bytes_recv"])
            hbone = "yes" if flow["hbone"] else "no"
            numbers = [str(flow["packets"]), sent, received]
            rows.append(
                [flow["client"], flow["server"], flow["security"], hbone, *numbers, flow["detail"] or "-"]
            )
        click.echo(f"\n{render(rows)}")
    kinds = {kind: sum(flow["security"] == kind for flow in flows) for kind in ("TLS", "plaintext")}
    click.echo(
        f"\n{final['packets']} packets, {size(final['bytes'])}, {len(flows)} TCP flows: {kinds['TLS']} TLS, "
        f"{kinds['plaintext']} plaintext, {len(flows) - sum(kinds.values())} unknown or without data"
    )
    if final["dropped"]:
        click.echo(f"warning: {final['dropped']} packets came too fast and were lost", err=True)
    if final["forgotten"]:
        click.echo(
            f"warning: {final['forgotten']} flows that were silent for longest are not shown", err=True
        )
    if write is not None:
        click.echo(f"packets are in {write}")
