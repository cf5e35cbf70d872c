"""A worker's reports for the metrics: what its connections did since the last one, every few seconds or when asked.

Rule: the path of a connection only updates its pod's `Counts`. What is open for longer is looked at here, in slices
between which the reactor has its turns: 0.1 us a connection that has moved nothing.
"""

from collections.abc import Callable, Iterable
from typing import Final

import trio

from ztunnel.proxy import messages
from ztunnel.proxy.context import Context, Pod
from ztunnel.telemetry.counting import Counts, PodTraffic

INTERVAL: Final = 5.0  # seconds between reports
MOST_DESTINATIONS: Final = 4096  # workloads that a waypoint keeps counts of while nothing happens
SLICE: Final = 500  # open connections looked at between two turns of the reactor


class Reporter:
    """Sends a `Traffic` when there is something to tell."""

    def __init__(self, context: Context, send: Callable[[messages.Message], None]) -> None:
        self._context = context
        self._send = send
        self._wake = trio.Event()
        self._queries: list[int] = []
        self._left: list[PodTraffic] = []
        self._destinations: dict[tuple[str, str, str], Counts] = {}
        self._dropped = 0

    def counts(self) -> Counts:
        """The counts of a new pod."""
        return Counts(self.soon)

    def counts_of(self, namespace: str, name: str, identity: str) -> Counts:
        """The counts of a workload elsewhere: a waypoint's connections lead there ("" if they got nowhere)."""
        key = (namespace, name, identity)
        counts = self._destinations.get(key)
        if counts is None:
            counts = self._destinations[key] = Counts(self.soon)
        return counts

    def soon(self) -> None:
        """Report now, not at the next time."""
        self._wake.set()

    def asked(self, message: messages.AskTraffic, fds: Iterable[int]) -> None:
        """The control process wants to know."""
        self._queries.append(message.query)
        self.soon()

    def pod_left(self, pod: Pod) -> None:
        """The pod's last connection ended, and the pod goes: keep what it counted for the next report."""
        self._take(pod, self._left)

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            with trio.move_on_after(INTERVAL):
                await self._wake.wait()
            self._wake = trio.Event()
            await self._look()
            self.report()

    async def _look(self) -> None:
        """Count what the open connections have moved so far."""
        guard = self._context.reactor.guard
        looked = 0
        for pod in list(self._context.pods.values()):
            for connection in list(pod.connections):
                guard(connection.progress)  # a bug in one costs that one
                looked += 1
                if looked % SLICE == 0:
                    await trio.lowlevel.checkpoint()

    def report(self) -> None:
        """Send what has been counted."""
        pods, self._left = self._left, []
        for pod in self._context.pods.values():
            self._take(pod, pods)
        quiet = []
        for key, counts in self._destinations.items():
            if counts:
                pods.append(PodTraffic(*key, counts.take()))
            else:
                quiet.append(key)
        if len(self._destinations) > MOST_DESTINATIONS:
            for key in quiet:
                del self._destinations[key]
        dropped = self._context.logger.dropped
        if pods or self._queries or dropped != self._dropped:
            queries, self._queries = self._queries, []
            self._send(messages.Traffic(queries, pods, dropped - self._dropped))
            self._dropped = dropped

    @staticmethod
    def _take(pod: Pod, into: list[PodTraffic]) -> None:
        if pod.counts:
            into.append(PodTraffic(pod.namespace, pod.name, pod.identity.name, pod.counts.take()))
