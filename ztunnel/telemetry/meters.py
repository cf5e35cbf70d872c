"""Counters and gauges of the control process: plain numbers that its parts count up, read when somebody scrapes.

Rule: cheap to have and to count. The library that writes them for Prometheus is loaded with the first scrape.

    requests = meters.counter("istio_dns_requests", "DNS requests received (unstable)", labels.SOURCE)
    requests.add(*side(workload))
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeAlias

COUNTER: Final = "counter"
GAUGE: Final = "gauge"

Sample: TypeAlias = tuple[tuple[str, ...], float]
"""The values of the labels, in the order of their names, and the number."""

MOST: Final = 2000
"""Sets of labels of one meter; what would be one more is counted with all of them `unknown`."""


class Meter:
    """One metric: numbers by the values of its labels. `name` is without `_total`."""

    def __init__(self, kind: str, name: str, told: str, labels: tuple[str, ...]) -> None:
        self.kind = kind
        self.name = name
        self.told = told
        self.labels = labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, *labels: str, amount: float = 1) -> None:
        """Add to the number with these values of the labels."""
        self._values[self._place(labels)] = self._values.get(self._place(labels), 0) + amount

    def set(self, *labels: str, value: float) -> None:
        """Set a gauge."""
        self._values[self._place(labels)] = value

    def _place(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(labels) != len(self.labels):
            raise ValueError(f"{self.name}: {len(labels)} values for {len(self.labels)} labels")
        if labels in self._values or len(self._values) < MOST:
            return labels
        return ("unknown",) * len(labels)

    def samples(self) -> Iterable[Sample]:
        """What is counted now."""
        return list(self._values.items())


class ReadMeter(Meter):
    """A metric that is counted elsewhere and read when somebody asks."""

    def __init__(
        self,
        kind: str,
        name: str,
        told: str,
        labels: tuple[str, ...],
        read: Callable[[], Iterable[Sample]],
    ) -> None:
        super().__init__(kind, name, told, labels)
        self._read = read

    def samples(self) -> Iterable[Sample]:
        return list(self._read())


class Meters:
    """The metrics of a process, by name."""

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}

    def __iter__(self) -> Iterator[Meter]:
        return iter(tuple(self._meters.values()))

    def _add(self, meter: Meter) -> Meter:
        if meter.name in self._meters:
            raise ValueError(f"there is a metric {meter.name} already")
        self._meters[meter.name] = meter
        return meter

    def counter(self, name: str, told: str, labels: tuple[str, ...] = ()) -> Meter:
        """A new counter; `name` without `_total`. Raises ValueError if there is one of this name."""
        return self._add(Meter(COUNTER, name, told, labels))

    def gauge(self, name: str, told: str, labels: tuple[str, ...] = ()) -> Meter:
        """A new gauge. Raises ValueError if there is one of this name."""
        return self._add(Meter(GAUGE, name, told, labels))

    def read_counter(
        self, name: str, told: str, read: Callable[[], Iterable[Sample]], labels: tuple[str, ...] = ()
    ) -> None:
        """A counter whose numbers `read()` returns, which never go back. Raises ValueError as `counter` does."""
        self._add(ReadMeter(COUNTER, name, told, labels, read))

    def read_gauge(
        self, name: str, told: str, read: Callable[[], Iterable[Sample]], labels: tuple[str, ...] = ()
    ) -> None:
        """A gauge whose numbers `read()` returns. Raises ValueError as `gauge` does."""
        self._add(ReadMeter(GAUGE, name, told, labels, read))
