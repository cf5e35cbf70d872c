"""The metrics as Prometheus reads them, text or OpenMetrics: the only place that knows its library.

It takes 20 us a line, so a large node's metrics are written by a thread, from a copy of the numbers.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Sample as Line

from ztunnel.telemetry.meters import COUNTER, Sample


class Family(NamedTuple):
    """A metric's name (without `_total`), what it is, and its numbers."""

    kind: str
    name: str
    told: str
    labels: tuple[str, ...]
    samples: Iterable[Sample]


BURST: Final = 100  # lines, about 2 ms
PAUSE: Final = 0.0001  # seconds


class _Paced(list[Line]):
    """A metric's lines, with a short sleep among them.

    The interpreter runs one thread at a time, and lets one that computes go on for 5 ms when another wants to: while
    10,000 series are written the control process answers 1.6 ms late instead of 6.
    """

    def __iter__(self) -> Iterator[Line]:
        for number, line in enumerate(super().__iter__(), start=1):
            yield line
            if number % BURST == 0:
                time.sleep(PAUSE)


class _Families(Collector):
    """Families as a registry wants them."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for one in self._families:
            kind = CounterMetricFamily if one.kind == COUNTER else GaugeMetricFamily
            family = kind(one.name, one.told, labels=one.labels)
            for labels, value in one.samples:
                family.add_metric(labels, value)
            family.samples = _Paced(family.samples)
            yield family


def exposition(families: Iterable[Family], accept: str) -> tuple[bytes, str]:
    """The families in the format that the header `accept` prefers, and its content type."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
