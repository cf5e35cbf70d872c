"""The control process's side of the workers' reports: asks for them, and passes them on to whoever adds them up."""

from collections.abc import Callable, Iterable
from typing import Final, Protocol

import trio

from ztunnel.proxy import messages
from ztunnel.telemetry.counting import PodTraffic

PATIENCE: Final = 1.0  # seconds that a worker may take to report
FRESH: Final = 0.1  # seconds in which another scrape gets what the last one collected


class TrafficSink(Protocol):
    """Who adds the reports up. `worker` is its number; after `left` another process has it."""

    def add(self, worker: int, pods: Iterable[PodTraffic]) -> None:
        """What a worker's connections did since its last report."""

    def left(self, worker: int) -> None:
        """The worker ended, and its connections with it."""

    def peer(
        self, namespace: str, name: str, address: str, port: int
    ) -> tuple[str, str, str, tuple[str, ...]]:
        """The client at `address` of this pod's `port`: its pod, the namespace, the service asked for, and tags."""


class Collection:
    """Collects the workers' reports. `sink` may be set before the workers run; without one nothing is kept."""

    def __init__(self) -> None:
        self.sink: TrafficSink | None = None
        self._query = 0
        self._waiting: dict[int, set[int]] = {}  # the workers whose answer to a query has not come
        self._answered = trio.Event()
        self._under_way: trio.Event | None = None
        self._collected = -FRESH
        #: Log lines that workers could not write.
        self.dropped = 0

    def name_peer(self, question: messages.AskPeer) -> messages.PeerAnswer:
        """The answer of the sink; without one, that nothing is known."""
        if self.sink is None:
            return messages.PeerAnswer(question.query, "", "", "", ())
        found = self.sink.peer(question.pod_namespace, question.pod_name, question.address, question.port)
        return messages.PeerAnswer(question.query, *found)

    def received(self, worker: int, report: messages.Traffic) -> None:
        """A report came."""
        if self.sink is not None:
            self.sink.add(worker, report.pods)
        self.dropped += report.dropped
        for query in report.queries:
            self._waiting.get(query, set()).discard(worker)
        self._look()

    def left(self, worker: int) -> None:
        """The worker ended: nobody needs to wait for it."""
        if self.sink is not None:
            self.sink.left(worker)
        for workers in self._waiting.values():
            workers.discard(worker)
        self._look()

    def _look(self) -> None:
        self._answered.set()
        self._answered = trio.Event()

    async def collect(self, ask: Callable[[messages.Message], list[int]]) -> None:
        """Have all workers report; `ask` sends a message to them and returns their numbers.

        Who comes while others wait gets what they get: a scraper that asks again and again keeps no worker busy.
        """
        if self._under_way is not None:
            await self._under_way.wait()
            return
        if trio.current_time() - self._collected < FRESH:
            await trio.lowlevel.checkpoint()
            return
        self._under_way = trio.Event()
        self._query += 1
        query = self._query
        waiting = self._waiting[query] = set()
        try:
            waiting.update(ask(messages.AskTraffic(query)))
            with trio.move_on_after(PATIENCE):
                while waiting:
                    await self._answered.wait()
        finally:
            del self._waiting[query]
            self._collected = trio.current_time()
            self._under_way.set()
            self._under_way = None
