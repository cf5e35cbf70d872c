"""What a person sees while the demo runs: a live table on a terminal, plain lines elsewhere. Drawing only."""

import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol, Self

from ztunnel.cli.demo.accesslog import Traffic


class Screen(Protocol):
    """Where the demo's story is told."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...

    def waiting(self, what: str) -> None:
        """Say what is being waited for; called often."""

    def step(self, text: str) -> None:
        """Say what happens now."""

    def update(self, load: Mapping[str, Any], traffic: Traffic, link: Mapping[str, Any]) -> None:
        """Show the load's last report, the connections so far, and the capture's counts."""


class Silent:
    """For scripts: nothing but the result is printed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing was opened."""

    def waiting(self, what: str) -> None:
        """Nothing."""

    def step(self, text: str) -> None:
        """Nothing."""

    def update(self, load: Mapping[str, Any], traffic: Traffic, link: Mapping[str, Any]) -> None:
        """Nothing."""


class Lines(Silent):
    """For logs and pipes: one line a step."""

    def step(self, text: str) -> None:
        """Print the step."""
        print(f"- {text}", flush=True)


class Live:
    """For a terminal: the steps above, and below them a table that is redrawn with each report."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.text import Text

        self._console = Console()
        self._live = RichLive(
            Text(""), console=self._console, refresh_per_second=8, transient=True, redirect_stderr=False
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def waiting(self, what: str) -> None:
        """Show a spinner beside what is waited for."""
        from rich.spinner import Spinner

        self._live.update(Spinner("dots", text=f" waiting for {what}"))

    def step(self, text: str) -> None:
        """Print the step above the table."""
        from rich.text import Text

        self._live.update(Text(""), refresh=True)
        self._console.print(Text.assemble(("● ", "cyan"), text))

    def update(self, load: Mapping[str, Any], traffic: Traffic, link: Mapping[str, Any]) -> None:
        """Redraw the table."""
        self._live.update(_table(load, traffic, link, self._console.width))


def _table(load: Mapping[str, Any], traffic: Traffic, link: Mapping[str, Any], width: int) -> Any:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    figures = Table(box=box.SIMPLE_HEAD, expand=False)
    for heading in ("req/s", "p50", "p99", "requests", "failed", "connections", "mTLS"):
        figures.add_column(heading, justify="right")
    figures.add_row(
        f"{load.get('requests_per_second', 0):,.0f}",
        f"{load.get('p50_ms', 0):.2f} ms",
        f"{load.get('p99_ms', 0):.2f} ms",
        f"{load.get('requests', 0):,}",
        Text(str(load.get("failures", 0)), style="red" if load.get("failures") else "green"),
        f"{traffic.connections:,}",
        Text(f"{traffic.mtls_percent:g} %", style="green" if traffic.mtls_percent == 100 else "yellow"),
    )
    sightings = link.get("sightings", 0)
    wire = Text.assemble(
        f"  on the link between the nodes: {link.get('packets', 0):,} packets, the marker was readable ",
        (f"{sightings:,} times", "red" if sightings else "green"),
    )
    return Group(figures, wire, identity_table(traffic, width))


def identity_table(traffic: Traffic, width: int) -> Any:
    """A rich table of who talked to whom, by SPIFFE identity, for a terminal of `width` columns.

    Where it would not fit, what all identities have in common is said once, in the heading.
    """
    from rich import box
    from rich.table import Table

    pairs = traffic.identities()
    names = [str(pair[end]) for pair in pairs for end in ("source", "destination")]
    common = ""
    if names and 2 * max(map(len, names)) + len("connections") + 8 > width:
        shared = os.path.commonprefix(names)  # noqa: RUF071 - cut back to a whole part in the next line
        common = shared[: shared.rfind("/") + 1]
    table = Table(box=box.SIMPLE_HEAD, expand=False)
    table.add_column(f"source {common or 'identity'}")
    table.add_column("destination" if common else "destination identity")
    table.add_column("connections", justify="right")
    for pair in pairs:
        cells = [str(pair[end]).removeprefix(common) for end in ("source", "destination")]
        table.add_row(*cells, f"{pair['connections']:,}")
    return table


def screen(*, quiet: bool, plain: bool) -> Screen:
    """The screen for this run: silent, plain lines, or live where standard output is a terminal."""
    if quiet:
        return Silent()
    if plain or not sys.stdout.isatty():
        return Lines()
    return Live()
