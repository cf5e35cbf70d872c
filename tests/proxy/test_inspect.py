"""What workers tell of themselves and their connections: bounded, whoever asks, and whoever does not listen."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing

from ztunnel.proxy import inspect, inspections, messages
from ztunnel.proxy.context import Context
from ztunnel.proxy.inspections import Inspections
from ztunnel.telemetry.access import ConnectionRecord
from ztunnel.telemetry.log import Logger


class Room:
    """A worker's context and inspector, and what it sent."""

    def __init__(self) -> None:
        self.context = Context(Logger("off"))
        self.sent: list[messages.Message] = []
        self.queued = 0
        self.inspector = inspect.Inspector(
            self.context, self.sent.append, lambda: self.queued, lambda: iter(())
        )

    def connection(self, error: str | None = None) -> None:
        record = self.context.record("outbound", "10.0.0.1:1")
        record.dst_addr = "10.0.0.2:80"
        record.established()
        record.finish(error)

    def events(self) -> list[dict[str, Any]]:
        lines = b"".join(one.lines for one in self.sent if isinstance(one, messages.Tapped))
        return [json.loads(line) for line in lines.splitlines()]

    def lost(self) -> int:
        return sum(one.lost for one in self.sent if isinstance(one, messages.Tapped))


@pytest.fixture
def room() -> Iterator[Room]:
    made = Room()
    yield made
    made.context.reactor.close()


def test_the_tap_tells_of_begin_and_end_while_it_is_on(room: Room) -> None:
    room.connection()
    room.inspector.tap(True)
    room.connection()
    room.connection("refused")
    assert room.sent == []  # not before the end of the reactor's turn
    room.context.reactor.flush()
    assert len(room.sent) == 1
    assert [one["event"] for one in room.events()] == ["opened", "closed"] * 2
    assert [one.get("error") for one in room.events()] == [None, None, None, "refused"]
    room.inspector.tap(False)
    room.connection()
    room.context.reactor.flush()
    assert len(room.sent) == 1


def test_what_is_too_much_is_counted(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "MOST_EVENTS", 10)
    room.inspector.tap(True)
    for _ in range(20):
        room.connection()
    room.context.reactor.flush()
    assert (len(room.events()), room.lost()) == (10, 30)
    room.queued = inspect.MOST_TAPPED_QUEUED + 1
    room.connection()
    room.context.reactor.flush()
    assert len(room.sent) == 1  # nothing is added to a channel that is full
    room.queued = 0
    room.connection()
    room.context.reactor.flush()
    assert (len(room.events()), room.lost()) == (12, 32)


async def answer(room: Room, what: str, **options: str) -> list[messages.Inspected]:
    room.sent.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(room.inspector.run)
        room.inspector.inspect(messages.Inspect(7, what, options))
        with trio.fail_after(30):
            while not any(isinstance(one, messages.Inspected) and not one.more for one in room.sent):
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    return [one for one in room.sent if isinstance(one, messages.Inspected)]


async def test_questions_that_cannot_be_answered_get_an_error(room: Room) -> None:
    for what, options, told in (
        ("nonsense", {}, "nonsense"),
        ("connections", {"port": "http"}, "port"),
        ("profile", {"seconds": "1000"}, "seconds"),
        ("memory", {"trace": "x"}, "trace"),
    ):
        (one,) = await answer(room, what, **options)
        assert (one.query, one.more) == (7, False)
        assert told in one.error


async def test_too_many_questions_at_once_are_refused(room: Room) -> None:
    for query in range(100):
        room.inspector.inspect(messages.Inspect(query, "tasks", {}))
    refused = [one for one in room.sent if isinstance(one, messages.Inspected)]
    assert 0 < len(refused) < 100
    assert all("too many" in one.error for one in refused)


class Control:
    """The control process's side, with workers that the test plays."""

    def __init__(self, alive: tuple[bool, ...]) -> None:
        self.sent: list[tuple[int, messages.Message]] = []
        self.alive = alive
        self.inspections = Inspections(len(alive), self.send)

    def send(self, worker: int, message: messages.Message) -> bool:
        self.sent.append((worker, message))
        return self.alive[worker]


async def test_every_worker_is_asked_and_each_has_its_own_answer_or_error() -> None:
    control = Control((True, False, True, True))
    answers: list[inspections.Answer] = []

    async def ask() -> None:
        answers.extend(await control.inspections.ask("tasks", patience=0.2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.01)
        query = next(one.query for _, one in control.sent if isinstance(one, messages.Inspect))
        control.inspections.take(0, messages.Inspected(query, b"1", more=True))
        control.inspections.take(0, messages.Inspected(query, b"2", more=True))
        control.inspections.take(0, messages.Inspected(query))
        control.inspections.take(2, messages.Inspected(query + 1, b"9"))  # somebody else's
        control.inspections.left(3)
    assert [one.items for one in answers] == [[1, 2], [], [], []]
    assert [one.error for one in answers] == [
        "", "it does not run", "it did not answer in time", "it ended before it had answered"
    ]  # fmt: skip


async def test_taps_are_switched_on_with_the_first_and_off_with_the_last() -> None:
    control = Control((True, True))
    told = control.sent
    with control.inspections.tap(), control.inspections.tap():
        assert told == [(0, messages.Tap(True)), (1, messages.Tap(True))]
        control.inspections.introduce(1)
        assert told[2:] == [(1, messages.Tap(True))]
    assert told[3:] == [(0, messages.Tap(False)), (1, messages.Tap(False))]
    control.inspections.introduce(0)
    assert len(told) == 5


async def test_a_reader_that_is_too_slow_is_told_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspections, "MOST_WAITING", 2)
    control = Control((True,))
    with control.inspections.tap() as tap, control.inspections.tap() as other:
        for number in range(5):
            control.inspections.take(0, messages.Tapped(b"%d\n%d\n" % (number, number), 1))
        assert await tap.next() == (0, b"0\n0\n", 5 + 3 * 2)
        assert await tap.next() == (0, b"1\n1\n", 0)
        assert (await other.next())[2] == 11


async def test_a_drain_ends_the_taps_after_what_they_were_told(room: Room) -> None:
    control = Control((True,))
    with control.inspections.tap() as tap:
        control.inspections.take(0, messages.Tapped(b"1\n"))
        control.inspections.drain()
        control.inspections.take(0, messages.Tapped(b"2\n"))
        assert (await tap.next())[1] == b"1\n"
        with pytest.raises(trio.EndOfChannel):
            await tap.next()
    assert control.inspections.draining


def test_a_record_without_a_tap_tells_nobody(room: Room) -> None:
    record = ConnectionRecord(room.context.logger, room.context.totals, "inbound", "10.0.0.1:1")
    record.established()
    record.finish()
    assert record.age >= 0
    assert room.sent == []
