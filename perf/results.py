"""What a run has found: every round's numbers, their medians and spreads, ratios, and whether they can be trusted."""

import datetime
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from perf.cases import GROUPS, MEMORY_CASE, Case, Measure

NOISY_SPREAD = 0.30  # of the median, between the best and the worst round


class Series(NamedTuple):
    """What the rounds gave for one measure of one case on one side."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Between the largest and the smallest, as a share of the median."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0


Rounds = list[dict[str, dict[str, float]]]
"""One entry a round: by name of case, by name of measure. What could not be measured is not in it."""


class Results(msgspec.Struct, kw_only=True):
    """A whole run. `background` is how busy the machine was by itself, 0 to 1, before each round.

    `failures` are the measurements that could not be made, `repeated` those that were made again after a failure, one
    sentence each.
    """

    machine: dict[str, str | int]
    time: str
    seconds: float
    sides: dict[str, Rounds]
    background: list[float] = msgspec.field(default_factory=list)
    stolen: float = 0.0
    failures: list[str] = msgspec.field(default_factory=list)
    repeated: list[str] = msgspec.field(default_factory=list)

    def values(self, side: str, case: str, measure: str) -> list[float | None]:
        """One measure of one case in each round of a side; None where it was not measured."""
        return [one.get(case, {}).get(measure) for one in self.sides.get(side, [])]

    def series(self, side: str, case: str, measure: str) -> Series | None:
        """The same without the rounds in which it was not measured; None if it never was."""
        values = tuple(value for value in self.values(side, case, measure) if value is not None)
        return Series(values) if values else None

    def ratios(self, side: str, other: str, case: str, measure: str, than: str = "") -> Series | None:
        """What a side is to another one in each round that both have; None if there is none.

        With `than`, the other side's value is that of another case.
        """
        pairs = zip(self.values(side, case, measure), self.values(other, than or case, measure), strict=False)
        found = tuple(mine / theirs for mine, theirs in pairs if mine is not None and theirs)
        return Series(found) if found else None

    def ratio(self, side: str, other: str, case: str, measure: str) -> float | None:
        """The median of `ratios`."""
        found = self.ratios(side, other, case, measure)
        return None if found is None else found.median

    def cases(self) -> list[Case]:
        """Those that were measured, in the order in which they are shown."""
        every = [case for group in GROUPS for case in group.cases] + [MEMORY_CASE]
        names = {name for rounds in self.sides.values() for one in rounds for name in one}
        return [case for case in every if case.name in names]

    def measures(self, case: Case) -> list[Measure]:
        """Those of a case that at least one side has."""
        return [
            measure
            for measure in case.all_measures
            if any(self.series(side, case.name, measure.name) for side in self.sides)
        ]

    def noisy_cases(self) -> dict[str, float]:
        """The cases whose direct rounds differ too much, with by how much of their median."""
        found = {}
        for case in self.cases():
            series = self.series("direct", case.name, case.measures[0].name)
            if series is not None and series.spread > NOISY_SPREAD:
                found[case.name] = series.spread
        return found

    def noise(self, quiet: float) -> list[str]:
        """Why these numbers should not be trusted, one sentence each; none if they can be."""
        reasons = []
        if self.background and max(self.background) > quiet:
            reasons.append(f"other programs took up to {max(self.background):.0%} of the cores")
        if self.stolen > quiet:
            reasons.append(f"the hypervisor took {self.stolen:.0%} of the cores away")
        reasons += [f"the direct rounds of {n} differ by {s:.0%}" for n, s in self.noisy_cases().items()]
        return reasons


def now() -> str:
    """The time (UTC) as files are named for it."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H%M%SZ}"


def as_json(results: Results, noise: list[str]) -> dict[str, Any]:
    """All numbers: what `load` reads, and for other readers the medians, ratios and what speaks against them."""
    cases = []
    for case in results.cases():
        for measure in results.measures(case):
            entry: dict[str, Any] = {
                "case": case.name,
                "measure": measure.name,
                "higher_is_better": measure.higher,
            }
            for side in results.sides:
                if (series := results.series(side, case.name, measure.name)) is not None:
                    entry[side] = {
                        "median": series.median,
                        "spread": series.spread,
                        "to_envoy": results.ratio(side, "envoy", case.name, measure.name),
                        "to_direct": results.ratio(side, "direct", case.name, measure.name),
                    }
            cases.append(entry)
    return {"noise": noise, "cases": cases, "run": msgspec.to_builtins(results)}


def write(directory: Path, results: Results, noise: list[str]) -> Path:
    """Write the JSON file, named for the run's time; its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{results.time}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(as_json(results, noise)), indent=2) + b"\n")
    return path


def load(path: Path) -> Results:
    """A run that was written. Raises OSError, ValueError."""
    try:
        return msgspec.convert(msgspec.json.decode(path.read_bytes())["run"], Results)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the results of a run: {error}") from error
