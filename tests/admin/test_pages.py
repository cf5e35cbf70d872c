"""The registry of pages and the dump's sections: shown in order, chosen by name, encoded without stalling others."""

import json
from collections.abc import Iterator
from functools import partial

import pytest
import trio

from ztunnel.admin.pages import SLICE, Dump, Pages
from ztunnel.admin.server import Answer, Query


def body(answer: Answer) -> bytes:
    return b"".join(answer.body) if isinstance(answer.body, tuple) else answer.body


async def later() -> Iterator[int]:
    await trio.lowlevel.checkpoint()
    return iter(range(3))


@pytest.mark.parametrize("count", [0, 1, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE])
async def test_a_dump_is_one_object_whatever_its_sections_give(count: int) -> None:
    dump = Dump()
    dump.section("version", lambda: "1.2")
    dump.section("many", lambda: ({"n": number} for number in range(count)))
    dump.section("later", later)
    dump.section("none", lambda: None)
    shown = json.loads(body(await dump.page("GET", Query())))
    assert list(shown) == ["version", "many", "later", "none"]
    assert shown == {
        "version": "1.2", "many": [{"n": number} for number in range(count)], "later": [0, 1, 2], "none": None
    }  # fmt: skip


async def test_sections_can_be_chosen() -> None:
    dump = Dump()
    asked: list[str] = []

    def section(name: str) -> str:
        asked.append(name)
        return name

    for name in ("a", "b", "c"):
        dump.section(name, partial(section, name))
    assert json.loads(body(await dump.page("GET", {"sections": "c,a"}))) == {"c": "c", "a": "a"}
    assert json.loads(body(await dump.page("GET", {"sections": "z,a"}))) == {"a": "a"}
    refused = await dump.page("GET", {"sections": "z"})
    assert refused.status == 404
    assert body(refused) == b"unknown section z; there are: a, b, c\n"
    assert asked == ["c", "a", "a"]


async def test_others_have_their_turn_while_a_large_section_is_encoded() -> None:
    dump = Dump()
    dump.section("many", lambda: ({"n": number} for number in range(50 * SLICE)))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await dump.page("GET", {})
        nursery.cancel_scope.cancel()
    assert turns >= 40


async def test_the_index_lists_every_page_and_no_name_is_taken_twice() -> None:
    async def page(method: str, query: dict[str, str]) -> Answer:
        return Answer(b"shown\n")

    pages = Pages()
    pages.page("/one", page, "the first")
    pages.page("/another", page, "the second")
    assert body(await pages["/"]("GET", Query())) == b"/another  the second\n/one      the first\n"
    assert set(pages) == {"/", "/one", "/another"}
    with pytest.raises(ValueError, match="/one"):
        pages.page("/one", page, "again")
    pages.dump.section("a", lambda: 1)
    with pytest.raises(ValueError, match="'a'"):
        pages.dump.section("a", lambda: 2)
