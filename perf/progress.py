"""What the run is doing, said between measurements: nothing is drawn while something is measured."""

from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console


class Progress:
    """A line with what is measured now and the time that is left; on a pipe, a line a step."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._bar = progress.Progress(
            progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(20),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=total)
        self._count = -1

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
            self._bar.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def next(self, what: str) -> None:
        """The last measurement is done, and this one begins."""
        self._count += 1
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._count, description=what, refresh=True)
        else:
            self._console.print(what, soft_wrap=True, highlight=False)
