"""The pages of a process and what its dump consists of: two registries that each part fills with its own.

A part adds a section to the dump, or a page of its own, where the process is put together; nothing here knows what
they show. Rule: whatever is shown is public to the operator of the node. No key and no token is ever in a section.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import trio

from ztunnel.admin.server import Answer, Handler

JSON = "application/json"
SLICE = 200  # items of a section that are encoded before other tasks get their turn: about 1 ms

Section = Callable[[], Any]
"""section() -> what msgspec encodes, an iterator of such items (shown as a list), or an awaitable of either."""


class Dump:
    """The page /config_dump: one JSON object with a member a section, in the order in which they were added.

    A section that has many items returns an iterator, which is encoded slice by slice: a mesh of 100,000 workloads
    takes a second to show, and nothing else waits for it. The iterator is used across checkpoints, so it must walk
    over a copy (`tuple(...)`) of what may change meanwhile.
    """

    def __init__(self) -> None:
        self._sections: dict[str, Section] = {}

    def section(self, name: str, make: Section) -> None:
        """Add a section. Raises ValueError if there is one of this name."""
        if name in self._sections:
            raise ValueError(f"the dump has a section {name!r} already")
        self._sections[name] = make

    @property
    def names(self) -> tuple[str, ...]:
        """The sections."""
        return tuple(self._sections)

    async def page(self, method: str, query: dict[str, str]) -> Answer:
        """The whole dump, or with `?sections=A,B` those of them that there are: a client may be newer than we."""
        wanted = [name for name in query.get("sections", "").split(",") if name] or list(self._sections)
        known = [name for name in wanted if name in self._sections]
        if not known:
            told = f"unknown section {', '.join(wanted)}; there are: {', '.join(self._sections)}\n"
            return Answer(told.encode(), 404)
        pieces = [b"{"]
        for name in known:
            if len(pieces) > 1:
                pieces.append(b",")
            pieces.append(msgspec.json.encode(name) + b":")
            value = self._sections[name]()
            if inspect.isawaitable(value):
                value = await value
            await encoded_list(value, pieces)
        pieces.append(b"}\n")
        return Answer(tuple(pieces), content_type=JSON)


async def encoded_list(value: Any, pieces: list[bytes]) -> None:
    """Add the value as JSON; an iterator as a list of its items, slice by slice."""
    if not isinstance(value, Iterator):
        pieces.append(msgspec.json.encode(value))
        return
    pieces.append(b"[")
    items: list[Any] = []
    first = True
    for item in value:
        items.append(item)
        if len(items) == SLICE:
            pieces.append((b"" if first else b",") + msgspec.json.encode(items)[1:-1])
            first = False
            items.clear()
            await trio.lowlevel.checkpoint()
    if items:
        pieces.append((b"" if first else b",") + msgspec.json.encode(items)[1:-1])
    pieces.append(b"]")


class Pages(Mapping[str, Handler]):
    """Pages by path, with a line of help each; `/` lists them."""

    def __init__(self) -> None:
        self._pages: dict[str, Handler] = {"/": self._index}
        self._help: dict[str, str] = {}
        self.dump = Dump()

    def __getitem__(self, path: str) -> Handler:
        return self._pages[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pages)

    def __len__(self) -> int:
        return len(self._pages)

    def page(self, path: str, handler: Handler, told: str) -> None:
        """Add a page; `told` says in a line what it shows. Raises ValueError if there is one at this path."""
        if path in self._pages:
            raise ValueError(f"there is a page {path} already")
        self._pages[path] = handler
        self._help[path] = told

    async def _index(self, method: str, query: dict[str, str]) -> Answer:
        width = max(map(len, self._help), default=0)
        lines = (f"{path:<{width}}  {told}\n" for path, told in sorted(self._help.items()))
        return Answer("".join(lines).encode())


def only(method: str, wanted: str, why: str) -> Answer | None:
    """The refusal of a request whose method is another than `wanted`; None if it is right."""
    return None if method == wanted else Answer(f"use {wanted} to {why}\n".encode(), 405)


def json_answer(value: object) -> Answer:
    """A page of JSON. For large ones see Dump."""
    return Answer(msgspec.json.encode(value) + b"\n", content_type=JSON)
