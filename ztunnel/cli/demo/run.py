"""The demo's story: a bookshop in the mesh under load and capture, out of it under the same capture, in again.

Then come the acts of security (`acts`).
"""

import contextlib
import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ztunnel.cli.demo.accesslog import AccessLog, Traffic
from ztunnel.cli.demo.acts import SHOP, VISITORS, Acts, Refusal, load, play
from ztunnel.cli.demo.live import Screen, screen
from ztunnel.cli.demo.mesh import DemoMesh
from ztunnel.cli.demo.proof import LineProgram, LinkCapture
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import default_state

WATCHED_NODE = "node-1"
CONNECTIONS = 4
WARM_UP_REQUESTS = 40
WARM_UP_SECONDS = 20.0
OUTSIDE_SECONDS = 10.0
SETTLE_SECONDS = 5.0
LOAD_GRACE_SECONDS = 15.0


@dataclass
class Result:
    """What the demo measured; `as_json` has the names that scripts read."""

    duration_s: float = 0.0
    nodes: int = 0
    pods: int = 0
    requests: int = 0
    failures: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    requests_per_second: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    inside: Mapping[str, Any] = field(default_factory=dict)
    outside: Mapping[str, Any] = field(default_factory=dict)
    acts: Acts = field(default_factory=Acts)

    @property
    def leaks(self) -> int:
        """How often the marker was readable on the link while all pods were in the mesh."""
        return int(self.inside.get("sightings", 0))

    @property
    def detects(self) -> bool:
        """Whether the same capture found the marker once the pods had left the mesh."""
        return bool(self.outside.get("sightings", 0))

    def shortcomings(self) -> list[str]:
        """What keeps this run from being a success, in words; empty if nothing does."""
        found = []
        if not self.requests:
            found.append("no request was made")
        if self.failures:
            why = "; ".join(f"{count}x {reason}" for reason, count in self.errors.items())
            found.append(f"{self.failures} requests failed: {why}")
        if self.leaks:
            found.append(
                f"the marker was readable on the link {self.leaks} times while the pods were in the mesh"
            )
        if not self.inside.get("packets"):
            found.append("the capture saw no packets while the pods were in the mesh")
        if self.inside.get("dropped"):
            found.append(
                f"the capture missed {self.inside['dropped']} packets, so it cannot vouch for the link"
            )
        if not self.detects:
            found.append("the capture did not find the marker outside the mesh either, so it proves nothing")
        if self.traffic.mtls_percent != 100:
            why = "; ".join(f"{count}x {reason}" for reason, count in self.traffic.errors.items())
            found.append(
                f"{self.traffic.mtls_percent} % of the connections were mutual TLS: {why or 'none seen'}"
            )
        return found + self.acts.shortcomings()

    def as_json(self) -> dict[str, Any]:
        """The result for `-o json`; times in seconds and milliseconds as their names say."""
        return {
            "requests": self.requests,
            "failures": self.failures,
            "errors": self.errors,
            "requests_per_second": self.requests_per_second,
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
            "duration_s": self.duration_s,
            "nodes": self.nodes,
            "pods": self.pods,
            "connections": self.traffic.connections,
            "mtls_percent": self.traffic.mtls_percent,
            "identities": self.traffic.identities(),
            "plaintext_leaks": self.leaks,
            "leak_check_detects": self.detects,
            "packets_captured": self.inside.get("packets", 0),
            "packets_missed": self.inside.get("dropped", 0),
            "ports_inside": sorted(map(int, self.inside.get("ports", {}))),
            "ports_outside": sorted(map(int, self.outside.get("ports", {}))),
            "acts": self.acts.as_json(),
        }


def run(*, duration: float, state: Path | None, nodes: int, keep: bool, plain: bool, output: str) -> int:
    """Run the demo and print its result; returns 0 if everything that it claims held, else 1.

    `duration` is the time under load in seconds, `plain` leaves the live table out, `output` is "text" or "json".
    Raises UserError where the mesh does not come up, and KeyboardInterrupt; in any case nothing stays behind,
    unless `keep` and all went well.
    """
    with _terminated_as_interrupted(), DemoMesh(state, nodes, keep) as mesh:
        with screen(quiet=output == "json", plain=plain) as told:
            story = Story(mesh, told, duration)
            try:
                result = story.tell()
            except UserError as error:
                if not error.detail:
                    error.detail = mesh.explain("controlplane ztunnel join")
                raise
        if output == "json":
            print(json.dumps(result.as_json()), flush=True)
        else:
            _print_summary(result, mesh)
    return 1 if result.shortcomings() else 0


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that it is undone in order."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Story:
    """One run against one mesh: its parts in order, what they found in `result`."""

    def __init__(self, mesh: DemoMesh, told: Screen, duration: float) -> None:
        self.mesh = mesh
        self.told = told
        self.duration = duration
        self.marker = f"AMBIENT-MARKER-{secrets.token_hex(12)}"
        self.result = Result(nodes=mesh.nodes)

    def tell(self) -> Result:
        """Inside the mesh, outside, inside again; then the acts of security."""
        told = self.told
        told.step(
            f"starting a mesh of {self.mesh.nodes} nodes with a bookshop in it (state: {self.mesh.state})"
        )
        status = self.mesh.wait_ready(told.waiting)
        self.result.pods = sum(bool(pod["mesh"]) for pod in status["pods"])
        log = AccessLog(self.mesh.state / "logs")
        self._warm_up(log)
        told.step(f"{self.result.pods} pods run and are in the mesh; visitors for {self.duration:g} s")
        self._inside(log)
        told.step("out of the mesh: ambient label namespace default istio.io/dataplane-mode-")
        self.mesh.label("istio.io/dataplane-mode-")
        self.mesh.wait_pods(False, told.waiting)
        self._outside()
        told.step("into the mesh again: ambient label namespace default istio.io/dataplane-mode=ambient")
        self.mesh.label("istio.io/dataplane-mode=ambient")
        self.mesh.wait_pods(True, told.waiting)
        self._warm_up(log)
        told.step("policies and certificates, while visitors come and go")
        self.result.acts, report = play(self.mesh, told, self.marker)
        self._count_failures(report, " (during the acts)")
        return self.result

    def _warm_up(self, log: AccessLog) -> None:
        """Visit until every connection is mutual TLS: a pod that has just joined is still becoming known."""
        end = time.monotonic() + WARM_UP_SECONDS
        why = ""
        while True:
            self.told.waiting("the pods to know one another")
            log.skip()
            visitors = self._load(5.0, requests=WARM_UP_REQUESTS, per_connection=2)
            try:
                report = visitors.result(5.0 + LOAD_GRACE_SECONDS)
            finally:
                visitors.kill()
            traffic = Traffic()
            self._settle(log, traffic)
            if not report["failures"] and traffic.connections and traffic.mtls_percent == 100:
                return
            why = f"failures: {report['errors']}, not mutual TLS: {traffic.errors or 'no connection seen'}"
            if time.monotonic() > end:
                raise UserError(
                    f"the bookshop did not work in the mesh within {WARM_UP_SECONDS:.0f} s ({why})"
                )

    def _inside(self, log: AccessLog) -> None:
        result = self.result
        log.skip()
        with self._capture() as capture:
            visitors = self._load(self.duration)
            try:
                self._follow(visitors, log, capture)
                report = visitors.result(self.duration + LOAD_GRACE_SECONDS)
            finally:
                visitors.kill()
            self._settle(log, result.traffic)
            result.inside = capture.stop()
        result.requests = report["requests"]
        result.requests_per_second = report["requests_per_second"]
        result.p50_ms, result.p99_ms = report["p50_ms"], report["p99_ms"]
        result.duration_s = report["seconds"]
        self._count_failures(report)

    def _follow(self, visitors: LineProgram, log: AccessLog, capture: LinkCapture) -> None:
        """Show the load's reports until it has ended. Raises UserError where it stalls."""
        end = time.monotonic() + self.duration + LOAD_GRACE_SECONDS
        while visitors.wait_line(1.0):
            if time.monotonic() > end:
                raise UserError(f"the visitors did not end within {self.duration + LOAD_GRACE_SECONDS:.0f} s")
            for entry in log.entries():
                self.result.traffic.add(entry)
            self.told.update(visitors.latest, self.result.traffic, capture.counts)

    def _outside(self) -> None:
        with self._capture() as capture:
            visitors = self._load(OUTSIDE_SECONDS)
            try:
                capture.wait_sighting(OUTSIDE_SECONDS)
                self._count_failures(visitors.finish(LOAD_GRACE_SECONDS), " (outside the mesh)")
            finally:
                visitors.kill()
            self.result.outside = capture.stop()
        found = "readable on the link, as it should be now" if self.result.detects else "NOT found"
        self.told.step(f"the same capture, outside the mesh: the marker is {found}")

    def _count_failures(self, report: Mapping[str, Any], where: str = "") -> None:
        self.result.failures += report["failures"]
        for reason, count in report["errors"].items():
            named = reason + where
            self.result.errors[named] = self.result.errors.get(named, 0) + count

    def _settle(self, log: AccessLog, traffic: Traffic) -> None:
        """Read the logs until the connections of visitors that have left are all in: nothing new for a moment."""
        end = time.monotonic() + SETTLE_SECONDS
        quiet_since = time.monotonic()
        while time.monotonic() < end and (time.monotonic() - quiet_since < 0.3 or not traffic.connections):
            for entry in log.entries():
                traffic.add(entry)
                quiet_since = time.monotonic()
            time.sleep(0.05)

    @contextlib.contextmanager
    def _capture(self) -> Iterator[LinkCapture]:
        capture = LinkCapture(self.mesh.inside(f"node/{WATCHED_NODE}"), self.marker)
        try:
            yield capture
        finally:
            capture.kill()

    def _load(self, seconds: float, *, requests: int = 0, per_connection: int = 50) -> LineProgram:
        return load(
            self.mesh,
            VISITORS,
            SHOP,
            self.marker,
            seconds,
            requests=requests,
            connections=CONNECTIONS,
            per_connection=per_connection,
        )


def _print_summary(result: Result, mesh: DemoMesh) -> None:
    from rich.console import Console

    from ztunnel.cli.demo.live import identity_table

    def ports(counts: Mapping[str, Any]) -> str:
        return ", ".join(map(str, sorted(map(int, counts.get("ports", {}))))) or "none"

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    write: Callable[[str], None] = console.print
    write("")
    write(
        f"[bold]A bookshop in the mesh[/bold]: {result.nodes} nodes, {result.pods} pods, "
        f"{result.duration_s:.1f} s of load"
    )
    write(
        f"  requests     {result.requests:,} ({result.requests_per_second:,.0f}/s), {result.failures} failed, "
        f"p50 {result.p50_ms:.2f} ms, p99 {result.p99_ms:.2f} ms (each makes 2 to 3 more inside the shop)"
    )
    write(f"  connections  {result.traffic.connections:,}, {result.traffic.mtls_percent:g} % mutual TLS")
    console.print(identity_table(result.traffic, console.width))
    write(f"[bold]What the link between the nodes shows[/bold] (captured on {WATCHED_NODE}'s eth0)")
    write(
        f"  in the mesh   {result.inside.get('packets', 0):,} packets, TCP ports {ports(result.inside)}: "
        f"the marker in them was readable {result.leaks} times"
    )
    write(
        f"  out of it     {result.outside.get('packets', 0):,} packets, TCP ports {ports(result.outside)}: "
        f"readable {result.outside.get('sightings', 0)} times"
    )
    acts = result.acts
    write(
        f"[bold]Policies and certificates[/bold] (meanwhile {acts.requests:,} requests of visitors, "
        f"{acts.failures} failed)"
    )
    write(f"  PeerAuthentication STRICT        plaintext from outside the mesh: {_told(acts.strict)}")
    write(f"  AuthorizationPolicy for ratings  visitors, whom it does not name: {_told(acts.denied)}")
    write(f"  certificates                     {acts.renewed} of {acts.certificates} renewed")
    for shortcoming in result.shortcomings():
        write(f"[red]  not as it should be: {shortcoming}[/red]")
    if not result.shortcomings():
        write("[green]  the mesh kept the bookshop's secrets[/green]")
    if mesh.keep:
        where = "" if mesh.state == default_state() else f" --state {mesh.state}"
        write("")
        write("The mesh is left running:")
        write(f"  ambient status{where}")
        write(f"  ambient exec deploy/visitors{where} -- curl -s {SHOP}")
        write(f"  ambient down{where}")


def _told(refusal: Refusal) -> str:
    return f"refused ({refusal.error})" if refusal.holds else "NOT refused"
