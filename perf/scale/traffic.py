"""Traffic while other things happen: wrk for a second, again and again, and what each second was like."""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from perf.load import LoadError, Wrk, wrk
from perf.pods import Pod

CONNECTIONS = 16
CHUNK = 1.0  # seconds


class Chunk(NamedTuple):
    """One run of wrk, from and until when (seconds of the epoch)."""

    began: float
    ended: float
    found: Wrk


class Traffic:
    """The runs so far, and what failed in others."""

    def __init__(self, client: Pod, target: str) -> None:
        """`target` is host:port."""
        self.chunks: list[Chunk] = []
        self.failures: list[str] = []
        self._client = client
        self._target = target
        self._end = threading.Event()

    @contextmanager
    def flowing(self) -> Iterator["Traffic"]:
        """Run it beside the block."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            self._end.set()
            thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            began = time.time()
            try:
                found = wrk(self._client.run, self._target, CONNECTIONS, CHUNK)
            except LoadError as error:
                self.failures.append(str(error))
            else:
                self.chunks.append(Chunk(began, time.time(), found))

    def between(self, began: float, ended: float) -> list[Wrk]:
        """What was found in the runs that lie at least half in that time."""
        return [
            chunk.found
            for chunk in self.chunks
            if min(chunk.ended, ended) - max(chunk.began, began) > (chunk.ended - chunk.began) / 2
        ]


class Weather(NamedTuple):
    """Of several runs: the middle of their rates and p50, the middle and the worst of their p99 (microseconds)."""

    seconds: int
    rate: float
    p50: float
    p99: float
    worst_p99: float

    @classmethod
    def of(cls, found: Sequence[Wrk]) -> "Weather":
        """Of at least one run. Raises LoadError where there is none."""
        if not found:
            raise LoadError("no traffic was measured meanwhile")
        p99 = [one.p99 for one in found]
        return cls(
            len(found),
            statistics.median(one.rate for one in found),
            statistics.median(one.p50 for one in found),
            statistics.median(p99),
            max(p99),
        )
