"""A page of metrics as a test reads it: parsed by Prometheus's own parser, found and added up by labels."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text


class Found(NamedTuple):
    """A line."""

    name: str
    labels: dict[str, str]
    value: float


class Scraped:
    """All lines of a page. Raises ValueError for a page that the parser does not take."""

    def __init__(self, page: str, *, open_metrics: bool = False) -> None:
        parse: Callable[[str], Iterable[Metric]] = openmetrics if open_metrics else text
        self.lines = [
            Found(sample.name, dict(sample.labels), sample.value)
            for family in parse(page)
            for sample in family.samples
        ]

    def find(self, name: str, **labels: str) -> list[Found]:
        """The lines of a metric with these labels."""
        return [
            one
            for one in self.lines
            if one.name == name and all(one.labels.get(key) == value for key, value in labels.items())
        ]

    def sum(self, name: str, **labels: str) -> float:
        """What they add up to."""
        return sum(one.value for one in self.find(name, **labels))
