"""What a process tells of itself: true of this very process, and bounded."""

import gc
import threading
import time
from collections import Counter

import pytest
import trio
import trio.testing

from ztunnel.debug import memory, profile, tasks


async def sleeper_of_this_test() -> None:
    await trio.sleep_forever()


async def test_the_tree_of_tasks_says_who_waits_where() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper_of_this_test)
        await trio.testing.wait_all_tasks_blocked()
        found = await tasks.describe()
        nursery.cancel_scope.cancel()
    own = next(one for one in found if one["name"].endswith("sleeper_of_this_test"))
    assert found[0]["depth"] == 0
    assert own["depth"] >= 2
    assert any("test_debug.py:" in place and place.endswith("sleeper_of_this_test") for place in own["where"])
    assert own["where"][-1].startswith("trio/_timeouts.py") or "sleep_forever" in " ".join(own["where"])
    text = tasks.as_text(found)
    assert f"{'  ' * own['depth']}{own['name']}\n" in text
    assert text.count("sleeper_of_this_test") == 2


async def test_many_tasks_are_cut_short_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MOST_TASKS", 10)
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(trio.sleep_forever)
        found = await tasks.describe()
        nursery.cancel_scope.cancel()
    assert len(found) == 11
    assert int(found[-1]["name"].split()[1]) >= 20


class Marked:
    """Something to be counted."""


async def test_memory_counts_what_is_there() -> None:
    kept = [Marked() for _ in range(3 * memory.SLICE)]
    gc.collect()
    report = await memory.describe(objects=200)
    assert 0 < report["bytes"]["pss"] <= report["bytes"]["rss"] <= report["bytes"]["peak"]
    counted = {one["type"]: one["count"] for one in report["objects"]}
    # Objects without references of their own are not the collector's business, unless their class gives them a dict.
    assert counted.get(f"{__name__}.Marked", 0) == len(kept)
    assert "objects" not in await memory.describe()


async def test_tracing_is_off_until_it_is_asked_for() -> None:
    assert (await memory.describe())["tracing"] is False
    try:
        assert (await memory.describe(trace="start"))["tracing"] is True
        kept = [bytearray(1000) for _ in range(1000)]
        shown = await memory.describe(trace="show")
        assert any(
            "test_debug.py" in one["place"] and one["bytes"] >= 1_000_000 for one in shown["allocations"]
        )
        del kept
    finally:
        assert (await memory.describe(trace="stop"))["tracing"] is False
    with pytest.raises(ValueError, match="nonsense"):
        await memory.describe(trace="nonsense")


def busy_function_of_this_test(until: float) -> None:
    while time.monotonic() < until:
        sum(range(1000))


async def test_a_profile_finds_the_function_that_takes_the_time() -> None:
    found: Counter[tuple[str, ...]] = Counter()

    async def watch() -> None:
        found.update(await profile.sample(0.5))
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        while not found:
            await trio.sleep(0)
            busy_function_of_this_test(time.monotonic() + 0.02)
    name = "busy_function_of_this_test"
    seen = sum(count for stack, count in found.items() if any(frame.endswith(name) for frame in stack))
    assert seen > sum(found.values()) / 2 > 0
    text = profile.as_text("here", found)
    assert name in text.splitlines()[2]
    line = next(line for line in profile.collapsed("here", found).splitlines() if name in line)
    stack, _, count = line.rpartition(" ")
    assert stack.startswith("here;")
    assert int(count) > 0
    assert profile.from_list(profile.as_list(found)) == found
    assert not [one for one in threading.enumerate() if one.name == "profiler"]


async def test_one_profile_at_a_time_and_not_for_ever() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(profile.sample, 60)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(profile.BusyError):
            await profile.sample(1)
        nursery.cancel_scope.cancel()
    for wrong in (0, -1, 61, float("nan")):
        with pytest.raises(ValueError, match="seconds"):
            await profile.sample(wrong)
    assert isinstance(await profile.sample(0.01), Counter)


async def test_stacks_beyond_the_limit_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "MOST_STACKS", 0)
    found = await profile.sample(0.1)
    assert set(found) <= {profile.MORE}
