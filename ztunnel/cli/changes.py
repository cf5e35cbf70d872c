"""Changes of the user's directory, and waiting until the running mesh has taken them in.

A script's next command shall see what this one did: so each change is followed until it shows among the mesh's own
objects, or the mesh has said what is wrong with it, or a few seconds have passed.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.errors import UserError

if TYPE_CHECKING:
    from ztunnel.cli.session import EmbeddedMesh
    from ztunnel.store.models import Key
    from ztunnel.store.problems import Problem

PATIENCE_SECONDS = 5.0
STALE_SECONDS = 1.0  # a problem that was known before counts for the new state only after this long
SETTLE_SECONDS = 0.1  # the mesh writes its problems right after its objects
POLL_SECONDS = 0.02


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Errors of the store within the block become the user's: UserError with the same words."""
    from ztunnel.store.problems import StoreError

    try:
        yield
    except StoreError as error:
        raise UserError(str(error)) from error


def word(key: "Key") -> str:
    """How the object is named in the output: "service/reviews"."""
    return f"{key.kind.lower()}/{key.name}"


def contains(whole: Any, part: Any) -> bool:
    """Whether all that `part` says is in `whole`; mappings may have more keys there, lists may not."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            key in whole and contains(whole[key], part[key]) for key in part
        )
    if isinstance(part, list):
        return isinstance(whole, list) and len(whole) == len(part) and all(map(contains, whole, part))
    return bool(whole == part)


def has_taken(mesh: "EmbeddedMesh", key: "Key", wanted: dict[str, Any]) -> bool:
    """Whether the mesh's object has what `wanted` (as `to_dict` gives it) says about metadata and spec."""
    from ztunnel.store.models import to_dict

    known = mesh.objects.find(key)
    if known is None:
        return False
    seen = to_dict(known)
    metadata = wanted.get("metadata", {})
    part = {name: metadata[name] for name in ("labels", "annotations") if name in metadata}
    if seen["metadata"].get("labels", {}) != metadata.get("labels", {}):
        return False
    return contains(seen["metadata"], part) and contains(seen.get("spec", {}), wanted.get("spec", {}))


class Pending:
    """Changes made, each with the test that tells whether the mesh has taken it in."""

    def __init__(self, mesh: "EmbeddedMesh") -> None:
        self.mesh = mesh
        self._before = set(mesh.problems())
        self._waiting: dict[Key, Callable[[], bool]] = {}
        self._keys: list[Key] = []

    def add(self, key: "Key", done: Callable[[], bool]) -> None:
        """Wait for `done()` about the object in `wait`."""
        self._waiting[key] = done
        self._keys.append(key)

    def wait(self, told: "Iterable[Problem]" = ()) -> None:
        """Wait for all, at most PATIENCE_SECONDS; then print the mesh's problems with these objects as warnings,
        those that the user has been `told` of excepted.
        """
        start = unanswered = time.monotonic()
        while True:
            now = time.monotonic()
            with store_errors():
                self._waiting = {key: done for key, done in self._waiting.items() if not done()}
            problems = self.mesh.problems()
            known = {p.object for p in problems if now - start > STALE_SECONDS or p not in self._before}
            if not all(str(key) in known for key in self._waiting):
                unanswered = now
            if now - unanswered > SETTLE_SECONDS or now - start > PATIENCE_SECONDS:
                break
            time.sleep(POLL_SECONDS)
        ours = {str(key) for key in self._keys}
        shown = [problem for problem in problems if problem.object in ours]
        known_already = {(problem.object, problem.message) for problem in told}
        fresh = [problem for problem in shown if (problem.object, problem.message) not in known_already]
        for problem in dict.fromkeys(map(str, fresh)):
            click.echo(f"warning: {problem}", err=True)
        for key in self._waiting:
            if str(key) not in {problem.object for problem in shown}:
                click.echo(
                    f"warning: {key}: the mesh has not taken the change in yet; see: ambient status", err=True
                )
