"""What is told while an installation goes on: a line a step, and, on a terminal, what is being waited for."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.status import Status


class Progress:
    """Writes to standard error, so that standard output stays for what is asked for. `quiet` writes nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = None
        self._counts: Counter[str] = Counter()
        self._title = ""

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A step: told when it is done, with how many objects were changed how."""
        self._counts.clear()
        self._title = title
        if self._quiet:
            yield
            return
        if not self._console.is_terminal:
            yield
            self._done()
            return
        with self._console.status(title) as self._status:
            try:
                yield
            finally:
                self._status.stop()
                self._status = None
        self._done()

    def _done(self) -> None:
        counts = ", ".join(f"{number} {word}" for word, number in self._counts.items())
        self.say(f"{_tick()} {self._title}{f': {counts}' if counts else ''}")

    def changed(self, what: str, how: str) -> None:
        """An object was "created", "configured", is "unchanged", ..."""
        self._counts[how] += 1
        self.waiting(f"{what} {how}")

    def waiting(self, what: str) -> None:
        """What is being done or waited for just now."""
        if self._status is not None:
            self._status.update(f"{self._title}: {what}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning; it is shown also when quiet."""
        click.echo(f"warning: {text}", err=True)


def _tick() -> str:
    import sys

    try:
        "√".encode(sys.stderr.encoding or "ascii")
    except UnicodeEncodeError:
        return "+"
    return "√"
