"""A store that is followed while a test does something to its cluster."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import trio

from ztunnel.store.base import Change, Store
from ztunnel.store.models import Object

LIMIT = 90.0  # seconds for what has to come; two busy cores may take most of that


class Following:
    """What a watch has told: every change, and the objects that there are after them."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.objects: dict[str, Object] = {}  # by namespace/name
        self.synced = False
        self._news = trio.Event()

    def take(self, change: Change) -> None:
        self.changes.append(change)
        if change.op == "synced":
            self.synced = True
        elif change.obj is not None:
            name = f"{change.obj.namespace}/{change.obj.name}".lstrip("/")
            if change.op == "deleted":
                del self.objects[name]
            else:
                self.objects[name] = change.obj
        self._news.set()
        self._news = trio.Event()

    async def until(self, true: Callable[[], bool]) -> None:
        """Until something is true of what was told."""
        with trio.fail_after(LIMIT):
            while not true():
                await self._news.wait()

    def names(self, namespace: str) -> set[str]:
        """The objects of a namespace now."""
        return {name.partition("/")[2] for name in self.objects if name.startswith(f"{namespace}/")}

    def deleted(self) -> list[str]:
        return [change.obj.name for change in self.changes if change.op == "deleted" and change.obj]


@asynccontextmanager
async def following(store: Store, *kinds: type[Object], synced: bool = True) -> AsyncIterator[Following]:
    """Follow kinds during the block; with `synced`, it begins when everything has been told once."""
    found = Following()

    async def follow() -> None:
        async with aclosing(store.watch(*kinds)) as changes:
            async for change in changes:
                found.take(change)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        if synced:
            await found.until(lambda: found.synced)
        yield found
        nursery.cancel_scope.cancel()


async def until(true: Callable[[], bool]) -> None:
    """Until something becomes true that nobody tells of."""
    with trio.fail_after(LIMIT):
        while not true():
            await trio.sleep(0.02)
