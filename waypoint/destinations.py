"""Where the waypoint sends on to: the workers' questions, answered from the mesh by its control process.

Rule: only to what the mesh says is behind this very waypoint. News reach nodes and waypoints one after the other, so
that a node may already send what the waypoint has yet to hear of, or still send what it stands before no more: the
first waits PATIENCE, the second is served for GRACE.
"""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from ztunnel.mesh.model import Workload
from ztunnel.mesh.route import Route
from ztunnel.mesh.routing import NOT_FOUND, is_behind, resolve_behind
from ztunnel.mesh.state import MeshState
from ztunnel.proxy import messages

PATIENCE: Final = 2.0  # seconds that a destination may take to become known
GRACE: Final = 10.0  # seconds that one is served which is behind the waypoint no more
MOST_WAITING: Final = 1000  # questions for what is not known; further ones are answered at once

Answer = Callable[..., None]


class _Waiting(NamedTuple):
    until: float
    question: messages.AskRoute
    answer: Answer


class Destinations:
    """Answers `AskRoute`, whose address is an authority."""

    def __init__(
        self,
        state: MeshState,
        own: str,
        network: str,
        source: Callable[[], Workload | None],
        subject: Callable[[str], int],
        clock: Callable[[], float],
    ) -> None:
        """`own` is the key of the waypoint's Service, `source()` its own workload; `subject(service key)` the number
        that policies of a service are told under, by the time the function returns; `clock` gives seconds."""
        self._state = state
        self._own = own
        self._network = network
        self._source = source
        self._subject = subject
        self._clock = clock
        self._waiting: list[_Waiting] = []
        self._served: set[str] = set()  # keys of services that were behind the waypoint
        self._leaving: dict[str, float] = {}  # those that are no more, and until when they are served

    def answer(self, question: messages.AskRoute, answer: Answer) -> None:
        """Answer now, or when it is known."""
        route, remember = self._resolve(question)
        if route.status == NOT_FOUND and len(self._waiting) < MOST_WAITING:
            self._waiting.append(_Waiting(self._clock() + PATIENCE, question, answer))
            return
        answer(route, remember)

    def changed(self, tags: Iterable[str]) -> None:
        """The mesh changed."""
        if self._served:
            for tag in tags:
                key = tag.removeprefix("svc:")
                if key in self._served:
                    self._look(key)
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            route, remember = self._resolve(one.question)
            if route.status == NOT_FOUND:
                self._waiting.append(one)
            else:
                one.answer(route, remember)

    def sweep(self) -> None:
        """To be called a few times a second: nobody waits for longer than PATIENCE."""
        now = self._clock()
        due = [one for one in self._waiting if one.until <= now]
        if due:
            self._waiting = [one for one in self._waiting if one.until > now]
            for one in due:
                route, remember = self._resolve(one.question)
                one.answer(route, remember)
        for key in [key for key, until in self._leaving.items() if until <= now]:
            del self._leaving[key]
            self._served.discard(key)

    def _look(self, key: str) -> None:
        service = self._state.service(key)
        if service is not None and is_behind(self._state, service, self._own):
            self._leaving.pop(key, None)
        else:
            self._leaving.setdefault(key, self._clock() + GRACE)

    def _resolve(self, question: messages.AskRoute) -> tuple[Route, bool]:
        """The route, and whether it may be remembered."""
        host, _, port = question.address.decode().rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        leaving = self._leaving
        route = resolve_behind(
            self._state, self._own, self._source(), self._network, host, int(port), leaving.keys()
        )
        key = route.service_key
        if route.status != NOT_FOUND and key:
            if key not in leaving:
                self._served.add(key)
            route = route._replace(subject=self._subject(key))
        return route, bool(route.tags) and key not in leaving
