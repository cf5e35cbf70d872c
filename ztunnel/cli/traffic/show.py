"""Numbers as people read them in a table, and tables that are drawn again and again."""

import sys
import time
from collections.abc import Callable, Sequence

import click

from ztunnel.cli.traffic.rows import Row
from ztunnel.cli.traffic.scrape import Page

HEADINGS = ("SUCCESS", "OPEN", "SENT", "RECEIVED", "MTLS")


def rate(value: float) -> str:
    """A number a second: 0.2/s, 12.3/s, 4,321/s."""
    return f"{value:,.0f}/s" if value >= 100 or value == 0 else f"{value:.1f}/s"


def size(value: float) -> str:
    """Bytes: 512B, 1.5KiB, 20MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f}{unit}" if unit == "B" or value >= 100 else f"{value:.1f}{unit}"


def percent(share: float | None) -> str:
    """A share of 1; never 100 % of what is not all."""
    if share is None:
        return "-"
    shown = f"{share * 100:.2f}"
    if share < 1 and shown == "100.00":
        shown = "99.99"
    return f"{shown}%"


def headings(seconds: float) -> list[str]:
    """The columns of numbers: rates, or with `seconds` 0 sums since the proxies started."""
    if not seconds:
        return ["CONNECTIONS", *HEADINGS]
    return ["CONN", *HEADINGS]


def cells(row: Row, seconds: float) -> list[str]:
    """A row's numbers, under `headings`."""
    counts = row.counts
    middle = [percent(counts.success), str(row.open)]
    if not seconds:
        return [
            f"{counts.opened:,}",
            *middle,
            size(counts.sent),
            size(counts.received),
            percent(row.mutual_tls),
        ]
    return [
        rate(counts.opened / seconds),
        *middle,
        f"{size(counts.sent / seconds)}/s",
        f"{size(counts.received / seconds)}/s",
        percent(row.mutual_tls),
    ]


def repeat(draw: Callable[[], str], *, times: int | None, screen: bool) -> None:
    """Draw `times` (None: until Ctrl-C), on a terminal in the same place, elsewhere one after the other.

    `draw` takes its time itself. On a `screen` the text may be longer than it: what does not fit is left out.
    """
    if not screen:
        drawn = 0
        while times is None or drawn < times:
            if drawn:
                click.echo()
            click.echo(draw())
            sys.stdout.flush()
            drawn += 1
        return
    from rich.live import Live
    from rich.text import Text

    with Live(Text("reading the nodes' metrics ..."), auto_refresh=False, screen=times is None) as live:
        drawn = 0
        while times is None or drawn < times:
            live.update(Text(draw(), no_wrap=True, overflow="crop"), refresh=True)
            drawn += 1


class Window:
    """The nodes' numbers now and some seconds ago, again and again."""

    def __init__(self, read: Callable[[], tuple[list[Page], list[str]]], seconds: float) -> None:
        """`read` is scrape.read; errors are told once each, on standard error."""
        self._read = read
        self._seconds = seconds
        self._last: Sequence[Page] = ()
        self._told: set[str] = set()

    def look(self) -> tuple[list[Page], Sequence[Page], float]:
        """The numbers, those before, and the seconds between; without `seconds` nothing is before."""
        if not self._seconds:
            return self._pages(), (), 0.0
        if not self._last:
            self._last = self._pages()
        time.sleep(self._seconds)
        before, pages = self._last, self._pages()
        self._last = pages
        began = {page.node: page.taken for page in before}
        spans = [page.taken - began[page.node] for page in pages if page.node in began]
        return pages, before, max(sum(spans) / len(spans) if spans else self._seconds, 1e-3)

    def _pages(self) -> list[Page]:
        pages, errors = self._read()
        for error in errors:
            if error not in self._told:
                self._told.add(error)
                click.echo(f"warning: {error}", err=True)
        return pages
