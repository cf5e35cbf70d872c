"""A worker process of the waypoint: moves the bytes of what passes it, and knows what the control process tells it.

Rule: as for a node's worker, of which it is one with other parts: none of the control process's libraries.
"""

import socket
import sys
from collections.abc import Callable

from waypoint.passage import Passage, Passages
from ztunnel.proxy.context import Context, Pod
from ztunnel.proxy.enforcement import Enforcement
from ztunnel.proxy.worker import Worker, run
from ztunnel.telemetry.log import Logger


class WaypointEnforcement(Enforcement):
    """Policies by what they target: the waypoint, whose number its pod has, or a service behind it."""

    def __init__(self, context: Context, ready: Callable[[Pod], None], changed: Callable[[], None]) -> None:
        """`changed()` is called after each change of the policies."""
        super().__init__(context, ready)
        self._waypoint = context
        self._changed = changed

    def look_again(self, concerned: Callable[[int], bool]) -> None:
        """Judge the open connections again, each by the policies of what it leads to."""
        guard = self._waypoint.reactor.guard
        for pod in tuple(self._waypoint.pods.values()):
            for one in tuple(pod.connections):
                if isinstance(one, Passage) and concerned(one.subject.number):
                    facts = one.facts() if one.opened else None
                    refusal = self.still_allowed(one.subject, facts) if facts is not None else None
                    if refusal is not None:
                        guard(one.fail, refusal)
        self._changed()


class WaypointWorker(Worker):
    """One worker of the waypoint."""

    def make_enforcement(self) -> Enforcement:
        """What judges connections."""
        return WaypointEnforcement(self.context, self._accept_inbound, self._policies_changed)

    def make_inbounds(self) -> Passages:
        """What serves those who come."""
        self.passages = Passages(
            self.context,
            self.enforcement,
            self.connection_ended,
            self.questions,
            self.pool,
            self.ask_route,
            self.reporter.counts_of,
        )
        return self.passages

    def _policies_changed(self) -> None:
        self.passages.policies_changed()


def main() -> None:
    """`python -m waypoint.worker FD NUMBER`: the channel's descriptor and the worker's number."""
    run(socket.socket(fileno=int(sys.argv[1])), Logger.from_environment(worker=sys.argv[2]), WaypointWorker)


if __name__ == "__main__":
    main()
