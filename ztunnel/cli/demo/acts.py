"""The demo's acts of security, under load: plaintext refused, one caller denied by its identity, certificates renewed.

Each act applies a policy as a user does, tries what it is about with real requests before and after, and takes it
away again. The visitors of the shop go on meanwhile, and none of their requests may fail.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ztunnel.cli.demo.live import Screen
from ztunnel.cli.demo.mesh import DemoMesh
from ztunnel.cli.demo.proof import LineProgram
from ztunnel.cli.errors import UserError
from ztunnel.cli.nodes import nodes

SHOP = "http://productpage:9080/"
RATINGS = "http://ratings:9080/"
VISITORS = "deploy/visitors"
STRANGER = "deploy/stranger"
EFFECT_SECONDS = 20.0  # within which a policy has its effect
TRY_SECONDS = 5.0
TRIES = 3
RENEWAL_SECONDS = 60.0

STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec:
  mtls: {mode: STRICT}
"""

RATINGS_VIEWER = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ratings-viewer, namespace: default}
spec:
  selector:
    matchLabels: {app: ratings}
  action: ALLOW
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/default/sa/bookshop-reviews"]
"""


@dataclass
class Refusal:
    """What a policy did to one caller."""

    allowed_before: bool = False
    refused: bool = False
    error: str = ""  # as the caller's program saw it

    @property
    def holds(self) -> bool:
        """Whether the policy, and nothing else, kept the caller away."""
        return self.allowed_before and self.refused


@dataclass
class Acts:
    """What the acts found."""

    strict: Refusal = field(default_factory=Refusal)
    denied: Refusal = field(default_factory=Refusal)
    certificates: int = 0
    renewed: int = 0
    requests: int = 0
    failures: int = 0

    def shortcomings(self) -> list[str]:
        """What is not as it should be, in words."""
        found = []
        for refusal, who in (
            (self.strict, "the client outside the mesh"),
            (self.denied, "the visitors, whom the policy of ratings does not name,"),
        ):
            if not refusal.allowed_before:
                found.append(f"{who} got no answer even without a policy: {refusal.error}")
            elif not refusal.refused:
                found.append(f"{who} still got answers {EFFECT_SECONDS:.0f} s after the policy was applied")
        if not self.certificates or self.renewed < self.certificates:
            found.append(f"{self.renewed} of {self.certificates} certificates were renewed")
        return found

    def as_json(self) -> dict[str, Any]:
        """For `-o json`."""
        return {
            "strict_refuses_plaintext": self.strict.holds,
            "policy_denies_identity": self.denied.holds,
            "certificates": self.certificates,
            "certificates_renewed": self.renewed,
            "requests_meanwhile": self.requests,
            "failures_meanwhile": self.failures,
        }


class Play:
    """Plays the acts on a running mesh."""

    def __init__(self, mesh: DemoMesh, told: Screen, marker: str) -> None:
        self.mesh = mesh
        self.told = told
        self.marker = marker
        self.acts = Acts()

    def strict(self) -> None:
        """PeerAuthentication STRICT against a client without a certificate."""
        self._refused(self.acts.strict, STRICT, STRANGER, SHOP)
        self.told.step(f"STRICT: the client outside the mesh {_outcome(self.acts.strict)}")

    def denied(self) -> None:
        """AuthorizationPolicy against one identity of the mesh."""
        self._refused(self.acts.denied, RATINGS_VIEWER, VISITORS, RATINGS)
        self.told.step(f"only reviews may read ratings: a visitor who asks them {_outcome(self.acts.denied)}")

    def renewal(self, alive: Callable[[], bool]) -> None:
        """Wait until every certificate that there is now has been renewed; `alive` says whether the load goes on."""
        before = self._certificates()
        self.acts.certificates = len(before)
        end = time.monotonic() + RENEWAL_SECONDS
        while time.monotonic() < end and alive():
            now = self._certificates()
            self.acts.renewed = sum(now.get(key, old) > old for key, old in before.items())
            if self.acts.renewed == len(before):
                break
            self.told.waiting(f"certificates to be renewed ({self.acts.renewed} of {len(before)})")
            time.sleep(0.25)
        self.told.step(f"certificates renewed under load: {self.acts.renewed} of {self.acts.certificates}")

    def _certificates(self) -> dict[tuple[str, str], float]:
        """When each certificate of each node began, in Unix seconds."""
        return {
            (node.name, one["identity"]): one["not_before"]
            for node in nodes(self.mesh.state)
            for one in node.dump("certificates")["certificates"]
        }

    def _refused(self, refusal: Refusal, policy: str, caller: str, url: str) -> None:
        """Try without the policy, and with it until it has its effect."""
        answered, refusal.error = self._try(caller, url)
        refusal.allowed_before = answered == TRIES
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(policy)
            file.flush()
            self.mesh.ambient("apply", "-f", file.name)
            try:
                end = time.monotonic() + EFFECT_SECONDS
                while not refusal.refused and time.monotonic() < end:
                    answered, refusal.error = self._try(caller, url)
                    refusal.refused = answered == 0
            finally:
                self.mesh.ambient("delete", "-f", file.name)

    def _try(self, caller: str, url: str) -> tuple[int, str]:
        """Make some requests, each on a connection of its own: how many were answered, and an error."""
        program = load(self.mesh, caller, url, self.marker, TRY_SECONDS, requests=TRIES, connections=1)
        try:
            report = program.result(TRY_SECONDS + EFFECT_SECONDS)
        finally:
            program.kill()
        return report["requests"] - report["failures"], next(iter(report["errors"]), "")


def load(
    mesh: DemoMesh,
    caller: str,
    url: str,
    marker: str,
    seconds: float,
    *,
    requests: int = 0,
    connections: int = 4,
    per_connection: int = 1,
) -> LineProgram:
    """Start the load generator in the caller's pod. Raises UserError."""
    argv = [*mesh.inside(caller), sys.executable, "-P", "-m", "ztunnel.cli.demo.loadgen", url]
    argv += ["--marker", marker, "--connections", str(connections), "--seconds", f"{seconds:g}"]
    argv += ["--per-connection", str(per_connection), "--requests", str(requests)]
    return LineProgram("load generator", argv)


def play(mesh: DemoMesh, told: Screen, marker: str) -> tuple[Acts, dict[str, Any]]:
    """Play all acts while visitors come and go; what was found, and the visitors' report. Raises UserError."""
    story = Play(mesh, told, marker)
    seconds = RENEWAL_SECONDS + 2 * (EFFECT_SECONDS + 2 * TRY_SECONDS)
    visitors = load(mesh, VISITORS, SHOP, marker, seconds, connections=2, per_connection=5)
    try:
        story.strict()
        story.denied()
        story.renewal(lambda: visitors.running)
        if not visitors.running:
            raise UserError("the visitors left before the acts were over")
        report = visitors.finish(TRY_SECONDS + EFFECT_SECONDS)
    finally:
        visitors.kill()
    story.acts.requests, story.acts.failures = report["requests"], report["failures"]
    return story.acts, report


def _outcome(refusal: Refusal) -> str:
    return f"is refused ({refusal.error})" if refusal.holds else "is NOT refused as it should be"
