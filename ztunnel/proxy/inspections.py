"""The control process's side of the debug pages: asks all workers, gathers answers, spreads what the tap tells."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from ztunnel.proxy import messages

ANSWER = 10.0  # seconds for a worker to answer
MOST_TAPS = 16  # at once
MOST_WAITING = 256  # messages of the tap that wait for one reader; further ones are counted

Send = Callable[[int, messages.Message], bool]
"""send(worker, message) -> whether that worker runs"""


@dataclass
class Answer:
    """One worker's answer: `items` as it gave them, or the reason why there are none, or not all, in `error`."""

    worker: int
    items: list[Any] = field(default_factory=list)
    error: str = "it did not answer in time"
    done: trio.Event = field(default_factory=trio.Event)


class Tap:
    """One reader of the tap: lines of JSON as the workers wrote them, and how many it missed."""

    def __init__(self) -> None:
        self._in, self._out = trio.open_memory_channel[tuple[int, bytes]](MOST_WAITING)
        self._lost = 0

    def put(self, worker: int, lines: bytes, lost: int) -> None:
        """Take what a worker told; never waits."""
        self._lost += lost
        try:
            self._in.send_nowait((worker, lines))
        except (trio.WouldBlock, trio.ClosedResourceError):
            self._lost += lines.count(b"\n")

    def close(self) -> None:
        """Nothing comes any more."""
        self._in.close()

    async def next(self) -> tuple[int, bytes, int]:
        """Worker, lines, and how many events were lost since the last call. Raises trio.EndOfChannel."""
        worker, lines = await self._out.receive()
        lost, self._lost = self._lost, 0
        return worker, lines, lost


class Inspections:
    """Questions under way, and taps."""

    def __init__(self, count: int, send: Send) -> None:
        self._count = count
        self._send = send
        self._query = 0
        self._asked: dict[tuple[int, int], Answer] = {}  # by worker and query
        self._taps: set[Tap] = set()
        self.draining = False

    async def ask(
        self, what: str, options: dict[str, str] | None = None, patience: float = ANSWER
    ) -> list[Answer]:
        """What each worker says; one that does not run or answer within `patience` seconds has an error."""
        self._query += 1
        query = self._query
        answers = [Answer(worker) for worker in range(self._count)]
        try:
            for answer in answers:
                self._asked[answer.worker, query] = answer
                if not self._send(answer.worker, messages.Inspect(query, what, options or {})):
                    answer.error = "it does not run"
                    answer.done.set()
            with trio.move_on_after(patience):
                for answer in answers:
                    await answer.done.wait()
        finally:
            for worker in range(self._count):
                self._asked.pop((worker, query), None)
        return answers

    def drain(self) -> None:
        """New connections are the next daemon's: whoever taps shall ask that one."""
        self.draining = True
        for tap in self._taps:
            tap.close()

    @property
    def full(self) -> bool:
        """Whether no more taps are possible."""
        return len(self._taps) >= MOST_TAPS

    @contextlib.contextmanager
    def tap(self) -> Iterator[Tap]:
        """A tap on all workers, for as long as the block lasts."""
        tap = Tap()
        if not self._taps:
            self._tell(True)
        self._taps.add(tap)
        try:
            yield tap
        finally:
            self._taps.discard(tap)
            if not self._taps:
                self._tell(False)

    def _tell(self, on: bool) -> None:
        for worker in range(self._count):
            self._send(worker, messages.Tap(on))

    def introduce(self, worker: int) -> None:
        """A new worker is there: it must be told of the tap."""
        if self._taps:
            self._send(worker, messages.Tap(True))

    def left(self, worker: int) -> None:
        """A worker is gone, and so are its answers."""
        for (asked, _), answer in self._asked.items():
            if asked == worker and not answer.done.is_set():
                answer.error = "it ended before it had answered"
                answer.done.set()

    def take(self, worker: int, message: messages.Inspected | messages.Tapped) -> None:
        """What a worker said."""
        if isinstance(message, messages.Tapped):
            for tap in self._taps:
                tap.put(worker, message.lines, message.lost)
            return
        answer = self._asked.get((worker, message.query))
        if answer is None:
            return
        if message.body:
            answer.items.append(msgspec.json.decode(message.body))
        if not message.more:
            answer.error = message.error
            answer.done.set()
