"""The mesh's own processes: what counts as ready, and one that takes another's place."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from ztunnel.embedded.children import Child, ReplaceError
from ztunnel.embedded.statedir import stat_of
from ztunnel.store.problems import Problem

LIMIT = 30.0

# Says which generation it is, and that it was told to end, in the file of its name.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
own = Path(sys.argv[1]) / os.environ["GENERATION"]
signal.signal(signal.SIGTERM, lambda *_: (own.write_text("draining"), time.sleep(float(sys.argv[2])), os._exit(0)))
own.write_text("ready")
while True:
    signal.pause()
"""


class Parts:
    """A child that runs PROGRAM, and what was heard of it."""

    def __init__(self, directory: Path, drains: float = 0.0) -> None:
        self.directory = directory
        self.problems: list[Problem | None] = []
        self.counts: list[int] = []
        self.failing: Exception | None = None
        self.asked = 0
        self.never: set[int] = set()
        self.child = Child(
            "part",
            [sys.executable, "-c", PROGRAM, str(directory), str(drains)],
            {},
            directory / "log",
            self.check,
            record=lambda: None,
            report=lambda name, problem: self.problems.append(problem),
            drains=True,
            settings=lambda generation: {"GENERATION": str(generation)},
            in_place=self.counts.append,
        )

    async def check(self, generation: int) -> bool:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if self.failing is not None:
            raise self.failing
        return generation not in self.never and self.says(generation) == "ready"

    def says(self, generation: int) -> str:
        own = self.directory / str(generation)
        return own.read_text() if own.exists() else ""


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


async def until(condition: Callable[[], object], what: str) -> None:
    with trio.move_on_after(LIMIT):
        while not condition():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"not within {LIMIT:.0f} s: {what}")


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError("reset"), trio.BrokenResourceError("reset")],
    ids=lambda error: type(error).__name__,
)
async def test_one_that_resets_the_question_is_not_ready_and_is_asked_again(
    parts: Parts, nursery: trio.Nursery, error: Exception
) -> None:
    """As it does when it is killed while it answers."""
    parts.failing = error
    nursery.start_soon(parts.child.run)
    await until(lambda: parts.asked > 3, "it is asked again and again")
    assert not parts.child.ready
    parts.failing = None
    await until(lambda: parts.child.ready, "it is ready")
    parts.failing = error
    asked = parts.asked
    await until(lambda: not parts.child.ready, "it is not ready any more")
    assert parts.asked > asked
    assert parts.child.restarts == 0
    nursery.cancel_scope.cancel()


async def test_a_successor_takes_the_place_once_it_is_ready(tmp_path: Path, nursery: trio.Nursery) -> None:
    parts = Parts(tmp_path, drains=60)
    child = parts.child
    nursery.start_soon(child.run)
    await child.first_ready.wait()
    first = child.pid
    old, new = await child.replace()
    assert (old, parts.says(1)) == (first, "ready")
    await until(lambda: child.pid == new and child.ready, "the new one counts")
    await until(lambda: parts.says(0) == "draining", "the old one is told")
    assert child.describe()["others"] == [old]
    assert parts.counts == [0, 1]
    assert child.restarts == 0
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await until(lambda: stat_of(old) is None and stat_of(new) is None, "both are ended with the mesh")


@pytest.mark.parametrize("how", ["never ready", "ends"])
async def test_without_a_successor_that_is_ready_nothing_changes(
    parts: Parts, nursery: trio.Nursery, how: str
) -> None:
    child = parts.child
    nursery.start_soon(child.run)
    await child.first_ready.wait()
    first = child.pid
    parts.never = {1}
    if how == "never ready":
        with pytest.raises(ReplaceError, match="was not ready within 1 s; the old one serves on"):
            await child.replace(1)
    else:

        async def kill() -> None:
            await until(lambda: parts.says(1) == "ready", "it runs")
            os.kill(child.others[0].pid, signal.SIGKILL)

        nursery.start_soon(kill)
        with pytest.raises(ReplaceError, match="was ended by SIGKILL; the old one serves on"):
            await child.replace()
    assert (child.pid, child.others, parts.counts) == (first, [], [0])
    parts.never = set()
    _, new = await child.replace()
    assert new != first
    nursery.cancel_scope.cancel()


async def test_only_one_at_a_time(parts: Parts, nursery: trio.Nursery) -> None:
    child = parts.child
    with pytest.raises(ReplaceError, match="does not run yet"):
        await child.replace()
    nursery.start_soon(child.run)
    await child.first_ready.wait()
    parts.never = {1}
    refused: list[ReplaceError] = []

    async def other() -> None:
        await until(lambda: child.others, "the first one is under way")
        try:
            await child.replace()
        except ReplaceError as error:
            refused.append(error)
        parts.never = set()

    nursery.start_soon(other)
    await child.replace()
    assert "is being replaced already" in str(refused[0])
    nursery.cancel_scope.cancel()
