"""The run: rounds in which the sides take turns every few seconds, so that none has the quieter machine."""

import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from perf.cases import MEMORY_CASE, OUTSIDE, PSS, Case, Group, Lane
from perf.envoy import EnvoyPair
from perf.idle import idle_pss
from perf.load import LoadError
from perf.machine import Ticks, background, cpu_seconds, describe
from perf.peer import Peer
from perf.results import Results, now
from perf.room import Room
from perf.sides import MESH, Mesh, Side, Turn, turn

A_TURN = 2  # cases
WORKERS = 1  # of every proxy
CALM = 0.2  # of one core, over the time of a look: less is a proxy that has nothing left to do
LOOK = 0.1  # seconds
CALMING = 10.0  # seconds that a proxy may go on after a measurement

Say = Callable[[str], None]
"""Called before every measurement with what is measured."""


class Part(NamedTuple):
    """One side's turn in one round."""

    side: Side
    to_server: bool
    cases: Sequence[Case]
    number: int


class Bench:
    """What is asked for: which groups, for how long, beside which peers (name to command)."""

    def __init__(
        self, groups: Sequence[Group], *, memory: bool, rounds: int, seconds: int, peers: Mapping[str, str]
    ) -> None:
        self.groups = groups
        self.memory = memory
        self.rounds = rounds
        self.seconds = seconds
        self.peers = peers

    @property
    def measurements(self) -> int:
        """How many there will be."""
        sides = 3 + len(self.peers)
        return sides * self.rounds * sum(len(group.cases) for group in self.groups) + (
            sides if self.memory else 0
        )

    def run(self, say: Say) -> Results:
        """Measure everything. Raises LoadError where there is nothing to measure, WrongPathError."""
        results = Results(machine=describe(), time=now(), seconds=self.seconds, sides={})
        with Room(workers=WORKERS) as room, self._sides(room) as sides, _ended_in_peace():
            results.sides = {side.name: [{} for _ in range(self.rounds)] for side in sides}
            if self.memory:
                for side in sides:
                    self._idle_memory(side, results, say)
            start = Ticks.now()
            for number in range(self.rounds if self.groups else 0):
                results.background.append(background())
                for index, (group, cases) in enumerate(self._turns()):
                    # The side that goes first changes, so that none always follows the same other one.
                    first = (number + index) % len(sides)
                    for side in (*sides[first:], *sides[:first]):
                        if group.target in side.targets():
                            self._turn(
                                Part(side, group.target != OUTSIDE, cases, number), sides, results, say
                            )
            results.stolen = Ticks.now().stolen_since(start)
        return results

    @contextlib.contextmanager
    def _sides(self, room: Room) -> Iterator[list[Side]]:
        """All sides, their proxies running."""
        with contextlib.ExitStack() as stack:
            files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-")))
            sides = [Side(room), EnvoyPair(room, files), Mesh(room)]
            sides += [Peer(room, files, name, command) for name, command in self.peers.items()]
            for side in sides:
                stack.enter_context(side)
            yield sides

    def _idle_memory(self, side: Side, results: Results, say: Say) -> None:
        say(f"{MEMORY_CASE.name}: {side.name}")
        lane = side.lane()
        if lane.proxies:
            found = idle_pss() if side.name == MESH else lane.largest_pss()
            results.sides[side.name][0][MEMORY_CASE.name] = {PSS.name: found}

    def _turns(self) -> list[tuple[Group, Sequence[Case]]]:
        """What is measured of one side before the next one has its turn: few cases, as the machine's speed drifts."""
        return [
            (group, group.cases[first : first + A_TURN])
            for group in self.groups
            for first in range(0, len(group.cases), A_TURN)
        ]

    def _turn(self, part: "Part", sides: Sequence[Side], results: Results, say: Say) -> None:
        where = f"round {part.number + 1} of {self.rounds}: {part.side.name}"
        with turn(part.side, sides, to_server=part.to_server) as one:
            for case in part.cases:
                say(f"{where}: {case.name}")
                for reasons in (results.repeated, results.failures):
                    try:
                        results.sides[part.side.name][part.number][case.name] = self._measure(case, one)
                        break
                    except LoadError as error:
                        reasons.append(f"{where}: {case.name}: {error}")

    def _measure(self, case: Case, one: Turn) -> dict[str, float]:
        _calm(one.lane)
        processes = [pid for pids in one.lane.proxies for pid in pids]
        before = cpu_seconds(processes)
        outcome = case.run(one.lane, self.seconds)
        used = cpu_seconds(processes) - before
        one.made += outcome.connections
        return outcome.values | (case.cpu_per_work(used, outcome.work) if processes else {})


@contextlib.contextmanager
def _ended_in_peace() -> Iterator[None]:
    """After the block Ctrl-C and SIGTERM do nothing any more: what was started before it is being ended."""
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _calm(lane: Lane) -> None:
    """Wait until the proxies have done what earlier measurements left them, at most CALMING seconds."""
    processes = [pid for pids in lane.proxies for pid in pids]
    end = time.monotonic() + CALMING
    while processes and time.monotonic() < end:
        before = cpu_seconds(processes)
        time.sleep(LOOK)
        if cpu_seconds(processes) - before < CALM * LOOK:
            return
