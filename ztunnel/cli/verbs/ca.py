"""`ambient ca`: the mesh's certificate authority: who signs, which roots are trusted, and how to change them."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.app import Examples, ExamplesGroup
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.nodes import Node

LOOK = 0.5  # seconds between looks at how far a change is
PHASES = {
    "stable": "stable",
    "distributing": "distributing: both roots are told, the old authority signs",
    "retiring": "retiring: the new authority signs, the old root is trusted still",
}


@click.group(
    "ca",
    cls=ExamplesGroup,
    short_help="Show the mesh's certificate authority, or replace it.",
    examples=("ambient ca status", "ambient ca rotate"),
)
def command() -> None:
    """The mesh's certificate authority.

    Its files are in STATE/ca. An operator's own (ca-cert.pem, ca-key.pem, root-cert.pem, cert-chain.pem, as in Istio's
    secret cacerts, and ca-crl.pem for what is revoked) are put there in place of the generated ones: the control plane
    follows them, and leads the mesh through a change of the root without breaking a connection. In a cluster they are
    the keys of Secret istio-system/cacerts.
    """


@command.command(
    "status",
    cls=Examples,
    short_help="Show who signs, which roots are trusted, what is revoked.",
    examples=("ambient ca status", "ambient ca status -o json"),
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Format.")
@target_options()
def status(output: str, which: Which) -> int:
    """Show the authority that signs, the roots that are trusted, how far a change of them is, and what is revoked.

    Exit code 1 where its files cannot be used, so that what signed before goes on.
    """
    from ztunnel.cli.session import find

    found = _status(find(which).control_planes())
    click.echo(json.dumps(found, indent=2) if output == "json" else _text(found))
    return 1 if found["problems"] else 0


@command.command(
    "roots",
    cls=Examples,
    short_help="Print the roots that proxies trust, as PEM.",
    examples=("ambient ca roots | openssl x509 -noout -text", "ambient ca roots > root-cert.pem"),
)
@target_options()
def roots(which: Which) -> None:
    """Print the root certificates that the mesh's proxies are told to trust, as PEM: what a client outside the mesh
    needs to verify it. In a cluster they are in ConfigMap istio-ca-root-cert of every namespace.
    """
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.cli.target import Embedded
    from ztunnel.embedded.statedir import State

    target = which.target()
    if isinstance(target, Embedded):
        found = (State(EmbeddedMesh.find(target.state).state).published / "root-cert.pem").read_text()
    else:
        from ztunnel.cli.kube.mesh import SYSTEM, ClusterMesh

        mesh = ClusterMesh.find(target)
        item = mesh.api.get("v1", "ConfigMap", SYSTEM, "istio-ca-root-cert")
        if item is None:
            raise mesh.not_installed("istiod")
        found = str(item.get("data", {}).get("root-cert.pem", ""))
    click.echo(found, nl=not found.endswith("\n"))


@command.command(
    "rotate",
    cls=Examples,
    short_help="Replace the generated authority, root and all.",
    examples=("ambient ca rotate", "ambient ca rotate --no-wait"),
)
@click.option(
    "--wait/--no-wait",
    default=None,
    help="Wait until the old root is trusted no more  [default: wait, but not in a cluster].",
)
@click.option("--timeout", type=click.IntRange(min=1), default=600, metavar="SECONDS", help="[default: 600].")
@target_options()
def rotate(wait: bool | None, timeout: int, which: Which) -> int:
    """Replace the authority that the mesh made for itself by a new one. Connections go on all the while.

    Both roots are trusted first; the new authority signs once every certificate in use belongs to a proxy that trusts
    it; the old root goes with the last of its certificates. On one machine that takes half a minute, in a cluster
    twice the longest life of a certificate (MAX_WORKLOAD_CERT_TTL).
    An operator's authority is replaced by putting its successor's files into STATE/ca or, in a cluster, into Secret
    istio-system/cacerts.

    Exit code 1 where it is not over within the time; it goes on by itself.
    """
    from ztunnel.cli.session import find
    from ztunnel.cli.target import Embedded
    from ztunnel.embedded.statedir import State
    from ztunnel.identity.ca_files import renew_root
    from ztunnel.identity.errors import AuthorityError

    target = which.target()
    planes = find(which).control_planes()
    before = _status(planes)
    if before["phase"] != "stable":
        raise UserError(
            f"the authority is being changed already: {_progress(before)}",
            "see how far it is with: ambient ca status",
        )
    if isinstance(target, Embedded):
        wait = wait is not False
        try:
            renew_root(State(target.state).ca, time.time())
        except AuthorityError as error:
            raise UserError(str(error)) from error
        click.echo(
            "a new root and a new intermediate are made; the control plane leads the mesh over to them"
        )
    else:
        from ztunnel.cli.kube.authority import renew_authority
        from ztunnel.durations import told

        renew_authority(target, time.time())
        click.echo("a new authority is made; the control plane leads the mesh over to it")
        life = before["lifetimes"]["most"]
        click.echo(
            f"each of two steps takes {told(life)}, as long as a certificate may live; see: ambient ca status"
        )
    if not wait:
        return 0
    return 0 if _wait(planes, before["signing"]["sha256"], timeout) else 1


def _wait(planes: "Sequence[Node]", old: str, timeout: float) -> bool:
    began = time.monotonic()
    told = ""
    while (passed := time.monotonic() - began) < timeout:
        found = _status(planes)
        if found["problems"]:
            raise UserError("; ".join(found["problems"]))
        now = PHASES[found["phase"]]
        if found["phase"] == "stable":
            if found["signing"]["sha256"] != old:
                click.echo(f"{passed:5.0f} s  over: {found['roots'][0]['sha256'][:16]} is the only root")
                return True
            now = ""  # not seen yet
        if now not in ("", told):
            click.echo(f"{passed:5.0f} s  {now}")
            told = now
        time.sleep(LOOK)
    click.echo(f"not over after {timeout:.0f} s: {_progress(_status(planes))}", err=True)
    return False


def _status(planes: "Sequence[Node]") -> dict[str, Any]:
    from ztunnel.cli.session import answering

    found: dict[str, Any] = answering(planes, "authority")["authority"]
    return found


def _progress(found: dict[str, Any]) -> str:
    return PHASES[found["phase"]] + (f"; {found['waiting']}" if found["waiting"] else "")


def _text(found: dict[str, Any]) -> str:
    from ztunnel.cli.tables import duration, render
    from ztunnel.durations import told

    now = found["at"]

    def row(word: str, one: dict[str, Any]) -> list[str]:
        ends = one["not_after"] - now
        return [
            word,
            one["subject"],
            one["serial"][:16],
            f"in {duration(ends)}" if ends > 0 else "ENDED",
        ]

    rows = [["", "SUBJECT", "SERIAL", "ENDS"], row("signs", found["signing"])]
    if found["wanted"]["sha256"] != found["signing"]["sha256"]:
        rows.append(row("is to sign", found["wanted"]))
    rows += [row("root", one) for one in found["roots"]]
    lifetimes = found["lifetimes"]
    sections = [
        f"state: {_progress(found)}",
        render(rows),
        f"certificates live {told(lifetimes['default'])} by default, {told(lifetimes['most'])} at most",
    ]
    if found["revocations"]:
        table = [["REVOCATION LIST OF", "REVOKED", "NEXT UPDATE"]]
        for one in found["revocations"]:
            end = one["next_update"]
            due = (
                "-"
                if end is None
                else f"in {duration(end - now)}"
                if end > now
                else f"OVERDUE for {duration(now - end)}"
            )
            table.append([one["issuer"], str(one["revoked"]), due])
        sections.append(render(table))
    if found["problems"]:
        sections.append("\n".join(["problems:", *(f"  {one}" for one in found["problems"])]))
    return "\n\n".join(sections)
