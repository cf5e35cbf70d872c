"""The sides that are compared: how a case's load gets from the client's pod to the server's, and who carries it."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from perf.cases import BULK, HTTP, OUTSIDE, Lane
from perf.load import BULK_PORT, HTTP_PORT, LoadError
from perf.room import Carried, Room, WrongPathError

DIRECT, MESH, ENVOY = "direct", "mesh", "envoy"
LATE = 10.0  # seconds that a proxy may take to count a connection that has ended


class Side:
    """One way from client to server; a context manager while whose block its proxies run. This one has none."""

    name = DIRECT
    joined = False  # the pods are in the mesh meanwhile

    def __init__(self, room: Room) -> None:
        self.room = room
        self.client, self.server, self.outside = (room.pods[name] for name in ("client", "server", "outside"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""

    def targets(self) -> Mapping[str, str]:
        """Where a program in the client's pod connects to (host:port), for HTTP, BULK and OUTSIDE."""
        return {
            HTTP: f"{self.server.ip}:{HTTP_PORT}",
            BULK: f"{self.server.ip}:{BULK_PORT}",
            OUTSIDE: f"{self.outside.ip}:{BULK_PORT}",
        }

    def proxies(self) -> list[list[int]]:
        """The pids of the proxies' processes: of the client's, and of the server's."""
        return []

    def carried(self) -> Carried | None:
        """How many connections its proxies have carried so far; None where nobody counts."""
        return None

    def lane(self) -> Lane:
        """What a case needs of it."""
        return Lane(self.client, self.targets(), self.proxies())


class Mesh(Side):
    """This project: the pods are in the mesh, and programs connect as they always do."""

    name = MESH
    joined = True

    def proxies(self) -> list[list[int]]:
        return self.room.proxies()

    def carried(self) -> Carried:
        return self.room.carried()


class Turn:
    """One side's turn: `lane` for the cases, and how many connections they say they made."""

    def __init__(self, side: Side, others: Sequence[Side]) -> None:
        self.side = side
        self.lane = side.lane()
        self.made = 0
        self._others = others
        self._answers()
        self._before = {one.name: one.carried() for one in (side, *others)}

    def _answers(self) -> None:
        """Raises LoadError where the server cannot be reached through this side."""
        where = f"{self.side.name}: {self.lane.targets[HTTP]} in the client's pod"
        try:
            answer = self.side.client.get(self.lane.targets[HTTP])
        except OSError as error:
            raise LoadError(f"{where}: {error}") from error
        if b"hello world" not in answer:
            raise LoadError(f"{where} does not lead to the server: {answer[:200]!r}")

    def check(self, *, to_server: bool) -> None:
        """Raises WrongPathError unless its proxies, both where `to_server`, carried all of it, and no others any."""
        end = time.monotonic() + LATE
        while (short := self._short(to_server)) and time.monotonic() < end:
            time.sleep(0.1)
        if short:
            raise WrongPathError(f"{self.side.name}: of {self.made} connections its proxies carried {short}")
        for one in self._others:
            if (used := self._used(one)) and any(used):
                raise WrongPathError(
                    f"{one.name}'s proxies carried {sum(used)} connections that were {self.side.name}'s"
                )

    def _used(self, side: Side) -> Carried | None:
        now, before = side.carried(), self._before[side.name]
        return None if now is None or before is None else now.since(before)

    def _short(self, to_server: bool) -> str:
        """What is missing, "" if nothing is."""
        used = self._used(self.side)
        if used is None or (used.client >= self.made and (used.server >= self.made or not to_server)):
            return ""
        return f"{used.client} at the client's end, {used.server} at the server's"


@contextlib.contextmanager
def turn(side: Side, sides: Sequence[Side], *, to_server: bool) -> Iterator[Turn]:
    """It is this side's turn for the block, at whose end the connections are where they should have been.

    Raises WrongPathError where they are not, LoadError where the server cannot be reached.
    """
    side.room.join(joined=side.joined)
    one = Turn(side, [other for other in sides if other is not side])
    yield one
    one.check(to_server=to_server)
