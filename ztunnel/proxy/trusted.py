"""The control process's side of forwarded connections: whose word for the original source counts, for each pod.

Rule: only a pod's own waypoints, and those of the services that it serves, may say for whom they speak. The
application then sees that address as its peer. Policies look at what the waypoint's certificate proves.
"""

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from ztunnel.proxy import messages

Trust: TypeAlias = tuple[frozenset[str], tuple[str, ...]]
"""Identities of waypoints, and the tags whose change may make others of them (none: not known yet)."""

NOBODY: Final[Trust] = (frozenset(), ())


class TrustedWaypoints:
    """What the workers were told of each pod's waypoints."""

    def __init__(self, send: Callable[[messages.Message], object], find: Callable[[str, str], Trust]) -> None:
        """`send` reaches every worker that runs; `find(namespace, name)` is what the mesh says of a pod."""
        self._send = send
        self._find = find
        self._pods: dict[int, tuple[str, str]] = {}
        self._trust: dict[int, Trust] = {}
        self._tagged: dict[str, set[int]] = {}
        self._unknown: set[int] = set()

    def add(self, number: int, namespace: str, name: str) -> None:
        """A pod that the workers have just been given."""
        self._pods[number] = (namespace, name)
        self._look(number)

    def remove(self, number: int) -> None:
        """The pod is gone."""
        self._pods.pop(number, None)
        self._unknown.discard(number)
        self._forget_tags(number)
        self._trust.pop(number, None)

    def changed(self, tags: Iterable[str]) -> None:
        """The mesh changed."""
        concerned = set(self._unknown)
        if self._tagged:
            for tag in tags:
                concerned |= self._tagged.get(tag, set())
        for number in concerned:
            self._look(number)

    def introduce(self, number: int) -> messages.PodWaypoints | None:
        """What a new worker must be told with a pod."""
        identities, _ = self._trust.get(number, NOBODY)
        return messages.PodWaypoints(number, tuple(sorted(identities))) if identities else None

    def _look(self, number: int) -> None:
        old, _ = self._trust.get(number, NOBODY)
        self._forget_tags(number)
        found = self._trust[number] = self._find(*self._pods[number])
        identities, tags = found
        (self._unknown.discard if tags else self._unknown.add)(number)
        for tag in tags:
            self._tagged.setdefault(tag, set()).add(number)
        if identities != old:
            self._send(messages.PodWaypoints(number, tuple(sorted(identities))))

    def _forget_tags(self, number: int) -> None:
        for tag in self._trust.get(number, NOBODY)[1]:
            numbers = self._tagged.get(tag)
            if numbers is not None:
                numbers.discard(number)
                if not numbers:
                    del self._tagged[tag]
