"""What `ambient up` says while it runs: its progress, and each problem when it appears and when it is gone."""

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Console as RichConsole
from rich.text import Text

from ztunnel.store.problems import Problem


def subject(problem: Problem) -> str:
    """What a problem is about: the name by which people are told that it is gone."""
    return problem.object or problem.file or problem.message


class Console:
    """Lines on standard output, coloured on a terminal and plain elsewhere."""

    def __init__(self) -> None:
        self._out = RichConsole(highlight=False, soft_wrap=True)
        self._known: dict[Problem, None] = {}

    def say(self, text: str, style: str = "") -> None:
        """One line."""
        self._out.print(Text(text, style))
        self._out.file.flush()

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """On a terminal, something moves for as long as the block takes; lines may be said meanwhile."""
        if not self._out.is_terminal:
            yield
            return
        with self._out.status(text):
            yield

    def problems(self, now: Sequence[Problem]) -> None:
        """Say what differs from the last call."""
        for problem in now:
            if problem not in self._known:
                style = "red" if problem.severity == "error" else "yellow"
                self.say(f"{problem.severity}: {problem}", style)
        still = {subject(problem) for problem in now}
        for gone in dict.fromkeys(subject(problem) for problem in self._known):
            if gone not in still:
                self.say(f"resolved: {gone}", "green")
        self._known = dict.fromkeys(now)
