"""What the parts found: tables of figures, and claims with what is required of them; shown and written as JSON."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from perf.machine import describe

Cell = str | float | int


class Figures(NamedTuple):
    """A table: what the rows are of, and in the first column the rows' names."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


class Claim(NamedTuple):
    """Something that must be at most `required` to hold, and is hoped to be at most `wanted`."""

    what: str
    unit: str
    found: float
    required: float
    wanted: float | None = None

    @property
    def holds(self) -> bool:
        """Whether what is required is met."""
        return self.found <= self.required

    @property
    def verdict(self) -> str:
        """In a word."""
        if not self.holds:
            return "MISSED"
        return "met" if self.wanted is None or self.found <= self.wanted else "required met"


class Part(NamedTuple):
    """One part of the run: what was measured, and what is claimed of it."""

    name: str
    figures: list[Figures]
    claims: list[Claim]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share (0 to 1) of the values does not exceed; of at least one value."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(part: Part, console: Console) -> None:
    """Print the tables of a part."""
    console.print()
    for figures in part.figures:
        console.print(_table(figures.title, figures.columns, figures.rows))
    if not part.claims:
        return
    rows: list[tuple[Cell, ...]] = [
        (
            claim.what,
            f"{_text(claim.found)} {claim.unit}".strip(),
            _text(claim.required),
            "" if claim.wanted is None else _text(claim.wanted),
            claim.verdict,
        )
        for claim in part.claims
    ]
    title = f"{part.name}: what is claimed"
    console.print(_table(title, ("claim", "found", "required", "wanted", ""), rows))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def as_json(parts: Sequence[Part]) -> dict[str, object]:
    """Everything, by part."""
    return {
        "machine": describe(),
        "parts": {
            part.name: {
                "figures": {
                    figures.title: [dict(zip(figures.columns, row, strict=True)) for row in figures.rows]
                    for figures in part.figures
                },
                "claims": [claim._asdict() | {"holds": claim.holds} for claim in part.claims],
            }
            for part in parts
        },
    }


def write(directory: Path, parts: Sequence[Part], what: str = "scale") -> Path:
    """Write the JSON file, named for what was measured and the time (UTC); its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{what}-{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H%M%SZ}.json"
    path.write_text(json.dumps(as_json(parts), indent=2) + "\n")
    return path
