"""The event loop of bytes: who is called, who is not, and that nobody is forgotten."""

import os
import socket
from functools import partial

import pytest
import trio
import trio.testing

from ztunnel.proxy.reactor import IN, STREAM, Deadlines, Flushable, Reactor


class Loop(Reactor):
    """A reactor that keeps what handlers let through."""

    def __init__(self) -> None:
        self.errors: list[tuple[BaseException, object]] = []
        super().__init__(lambda error, handler: self.errors.append((error, handler)))


def pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    one.setblocking(False)
    return one, other


def test_an_event_for_a_closed_socket_does_not_reach_the_one_that_got_its_number() -> None:
    """Both sockets are ready in one batch; the first handler closes the second, and a new one takes its number."""
    loop = Loop()
    pairs = [pair() for _ in range(2)]
    called: list[str] = []
    fresh: list[tuple[socket.socket, socket.socket]] = []

    def handler(mine: int, event: int) -> None:
        other = pairs[1 - mine][0]
        number = other.fileno()
        loop.forget(number)
        other.close()
        made = pair()
        fresh.append(made)
        if made[0].fileno() != number:  # the kernel gives the lowest free number
            os.dup2(made[0].fileno(), number)
        loop.register(number, lambda event: called.append("new"), STREAM)

    for index in range(2):
        loop.register(pairs[index][0].fileno(), partial(handler, index), STREAM)
        pairs[index][1].send(b"x")
    assert loop.turn()
    assert called == []
    assert len(fresh) == 1
    # Its own readiness is told in the next turn.
    loop.turn()
    assert called == ["new"]
    assert loop.errors == []
    loop.close()


def test_a_handlers_exception_is_its_own() -> None:
    loop = Loop()
    ready = [pair() for _ in range(3)]
    called: list[int] = []

    def broken(event: int) -> None:
        raise RuntimeError("a defect")

    for number, (one, other) in enumerate(ready):
        loop.register(one.fileno(), broken if number == 1 else called.append)
        other.send(b"x")
    loop.turn()
    assert len(called) == 2
    assert [str(error) for error, _ in loop.errors] == ["a defect"]
    loop.close()


def test_what_asks_for_another_turn_gets_one_and_no_more() -> None:
    loop = Loop()
    turns: list[int] = []

    def busy() -> None:
        turns.append(len(turns))
        if len(turns) < 3:
            loop.again(busy)

    loop.again(busy)
    for expected in (1, 2, 3, 3):
        loop.turn()
        assert len(turns) == expected
    loop.close()


def test_the_dirty_are_flushed_once_at_the_end_of_a_batch() -> None:
    class Counting(Flushable):
        def __init__(self) -> None:
            self.flushes = 0

        def flush(self) -> None:
            self.flushes += 1

    loop = Loop()
    item = Counting()
    for one, other in (pair(), pair()):
        loop.register(one.fileno(), lambda event: loop.dirty.add(item))
        other.send(b"x")
    loop.turn()
    assert item.flushes == 1
    loop.close()


@pytest.mark.parametrize("way", ["again", "wake"])
async def test_a_task_can_wake_it(nursery: trio.Nursery, way: str) -> None:
    """Nothing is ready, so it sleeps; what another task leaves it must be done at once all the same."""
    loop = Loop()
    nursery.start_soon(loop.run)
    await trio.testing.wait_all_tasks_blocked()
    done = trio.Event()

    class Item(Flushable):
        def flush(self) -> None:
            done.set()

    if way == "again":
        loop.again(done.set)
    else:
        loop.dirty.add(Item())
        loop.again(lambda: None)
    with trio.fail_after(5):
        await done.wait()
    nursery.cancel_scope.cancel()


async def test_other_tasks_get_their_turns_while_it_is_busy(nursery: trio.Nursery) -> None:
    loop = Loop()

    def busy() -> None:
        loop.again(busy)

    loop.again(busy)
    nursery.start_soon(loop.run)
    with trio.fail_after(5):
        for _ in range(20):
            await trio.sleep(0)
    nursery.cancel_scope.cancel()


def test_deadlines_expire_in_order_and_only_when_due() -> None:
    expired: list[str] = []
    deadlines: Deadlines[str] = Deadlines(10, expired.append)
    deadlines.add("a", 0)
    deadlines.add("b", 1)
    deadlines.add("c", 2)
    deadlines.add("a", 3)  # starts again
    deadlines.discard("b")
    deadlines.discard("never added")
    deadlines.sweep(11.9)
    assert expired == []
    deadlines.sweep(12)
    assert expired == ["c"]
    deadlines.sweep(100)
    assert expired == ["c", "a"]


def test_an_expiry_may_add_and_discard_others() -> None:
    deadlines: Deadlines[int]
    seen: list[int] = []

    def expired(item: int) -> None:
        seen.append(item)
        deadlines.discard(item + 1)
        deadlines.add(item + 10, 100)

    deadlines = Deadlines(1, expired)
    for item in (1, 2, 3):
        deadlines.add(item, 0)
    deadlines.sweep(50)
    assert seen == [1, 3]


@pytest.mark.parametrize("spin", [0.0, 0.002])
async def test_sockets_and_tasks_both_get_their_turns(spin: float) -> None:
    """Whether it asks again or sleeps at once: what a task sends is handled, and the task goes on meanwhile."""
    loop = Loop()
    loop.spin = spin
    mine, other = pair()
    received: list[bytes] = []
    loop.register(mine.fileno(), lambda event: received.append(mine.recv(10)) if event & IN else None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        with trio.fail_after(5):
            for number in range(20):
                other.send(b"%d" % number)
                while len(received) <= number:
                    await trio.lowlevel.checkpoint()
            await trio.sleep(0.03)  # longer than it stays in its own set: it sleeps in trio's
            other.send(b"last")
            while received[-1] != b"last":
                await trio.sleep(0)
        nursery.cancel_scope.cancel()
    assert received == [*(b"%d" % number for number in range(20)), b"last"]
    assert loop.errors == []
    loop.close()
    mine.close()
    other.close()
