"""All metrics of a node's daemon, and the pages that show them to Prometheus.

Names and labels are those of Istio's L4 proxy where it has the metric; what only this proxy has begins with `ztunnel_`.
"""

import gzip
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias

import trio

from ztunnel import __version__
from ztunnel.telemetry import labels
from ztunnel.telemetry.meters import COUNTER, Meters, Sample
from ztunnel.telemetry.traffic import Snapshot, TrafficMetrics, samples

PATHS: Final = ("/metrics", "/stats/prometheus")
SMALL: Final = 1024  # bytes that are not worth compressing

Numbers: TypeAlias = tuple[str, str, str, tuple[str, ...], list[Sample]]
"""Of one metric: kind, name, help, names of labels, samples."""


class NodeMetrics:
    """The metrics of this node.

    `traffic` adds up what the workers report; `meters` takes metrics of the control process's other parts.
    """

    def __init__(
        self, traffic: TrafficMetrics, collect: Callable[[], Awaitable[None]], *, rest: float = 1.0
    ) -> None:
        """`collect()` has the workers report now. Between two pages is `rest` times the time that one took to write."""
        self.traffic = traffic
        self.meters = Meters()
        self._collect = collect
        self._writing = trio.Lock()
        self._rest = rest
        self._next = 0.0  # when the next page may be written, on trio's clock
        self.meters.read_gauge("istio_build", "The version that runs", _build, ("component", "tag"))
        self.meters.read_gauge(
            "ztunnel_metric_series", "Sets of labels of the TCP metrics", lambda: [((), len(traffic))]
        )
        self.meters.read_counter(
            "ztunnel_metric_series_overflow",
            "Updates that were counted without workload labels, as there were too many series",
            lambda: [((), traffic.overflowed)],
        )

    async def page(self, accept: str, encodings: str) -> tuple[bytes, str, str]:
        """The metrics now: body, content type and content encoding, as these headers of the request prefer."""
        # One at a time, as the interpreter writes no faster for several, and with pauses: the port is open to the
        # network, and whoever asks without end gets half of a core at most.
        async with self._writing:
            await trio.sleep_until(self._next)
            await self._collect()
            others = [(one.kind, one.name, one.told, one.labels, list(one.samples())) for one in self.meters]
            write = partial(_write, self.traffic.snapshot(), others, accept, encodings)
            began = trio.current_time()
            answer = await trio.to_thread.run_sync(write)
            ended = trio.current_time()
            self._next = ended + self._rest * (ended - began)
        return answer


def _write(snapshot: Snapshot, others: list[Numbers], accept: str, encodings: str) -> tuple[bytes, str, str]:
    from ztunnel.telemetry.exposition import Family, exposition

    families = [Family(COUNTER, name, told, labels.TCP, found) for name, told, found in samples(snapshot)]
    families += [Family(*one) for one in others]
    body, content_type = exposition(families, accept)
    if len(body) > SMALL and _takes_gzip(encodings):
        return gzip.compress(body, 1), content_type, "gzip"
    return body, content_type, ""


def _takes_gzip(encodings: str) -> bool:
    for one in encodings.split(","):
        name, _, parameters = one.partition(";")
        if name.strip().lower() == "gzip":
            return parameters.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _build() -> list[Sample]:
    return [(("ztunnel", __version__), 1)]
