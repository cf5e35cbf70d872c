"""What the mesh may cost: for each figure what is required of it, and what is wanted."""

from typing import NamedTuple

from perf.cases import (
    CONNECTIONS,
    GBITS,
    MEMORY_CASE,
    OUTSIDE,
    P50,
    P99,
    PSS,
    RATE,
    Case,
    Measure,
    beside_bulk,
    bulk,
    new_connections,
    requests,
)
from perf.results import Results, Series
from perf.sides import DIRECT, ENVOY, MESH


class Budget(NamedTuple):
    """One limit on one figure of the mesh, as a ratio to another figure, or as it is where `than` is empty.

    `than` is a side (the same figure of it), or a case (the same measure of it on the mesh's own side).
    """

    case: Case
    measure: Measure
    than: str
    required: float
    wanted: float | None

    @property
    def text(self) -> str:
        """What is limited, in words."""
        figure = f"{self.case.name}: {self.measure.name}"
        return f"{figure}, to {self.than}" if self.than else figure

    def limit(self, value: float | None) -> str:
        """A limit in words."""
        if value is None:
            return ""
        return f"{'≥' if self.measure.higher else '≤'} {self.show(value)}"

    def show(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.2f}x" if self.than else f"{value:.1f} {self.measure.name.rpartition(' ')[2]}"

    def values(self, results: Results) -> Series | None:
        """The figure in each round of a run; None where it was not measured."""
        if not self.than:
            return results.series(MESH, self.case.name, self.measure.name)
        if self.than in (ENVOY, DIRECT):
            return results.ratios(MESH, self.than, self.case.name, self.measure.name)
        return results.ratios(MESH, MESH, self.case.name, self.measure.name, self.than)

    def holds(self, value: float, limit: float | None) -> bool | None:
        """Whether a value keeps a limit; None where there is none."""
        if limit is None:
            return None
        return value >= limit if self.measure.higher else value <= limit


class Verdict(NamedTuple):
    """A limit and what a run says to it. `noisy`: the direct rounds of the case differed too much."""

    budget: Budget
    values: Series
    required: bool
    wanted: bool | None
    noisy: bool


def _all() -> tuple[Budget, ...]:
    every = [Budget(requests(number), RATE, ENVOY, 0.8, 1.1) for number in (16, 64)]
    every += [
        Budget(bulk(streams, upload=upload), GBITS, ENVOY, 0.8, 1.2)
        for streams in (1, 4)
        for upload in (True, False)
    ]
    every += [
        Budget(requests(1), P50, ENVOY, 1.6, 0.9),
        Budget(new_connections(16), CONNECTIONS, ENVOY, 0.5, 1.0),
        Budget(MEMORY_CASE, PSS, "", 90, 60),
    ]
    every += [
        Budget(bulk(1, upload=upload, target=OUTSIDE), GBITS, DIRECT, 0.7, None) for upload in (True, False)
    ]
    return (*every, Budget(beside_bulk(4), P99, requests(4).name, 3.0, None))


BUDGETS = _all()


def judge(results: Results) -> list[Verdict]:
    """What a run says to each budget that it has measured."""
    noisy = results.noisy_cases()
    found = []
    for budget in BUDGETS:
        values = budget.values(results)
        if values is not None:
            required, wanted = (budget.holds(values.median, one) for one in (budget.required, budget.wanted))
            found.append(Verdict(budget, values, bool(required), wanted, budget.case.name in noisy))
    return found
