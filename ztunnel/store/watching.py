"""Following a store: first everything there is, then every change, as long as somebody asks for the next."""

from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Self

import trio

from ztunnel.store.base import Change
from ztunnel.store.changes import Told
from ztunnel.store.models import Key, Object, group_of
from ztunnel.store.notify import Notifier
from ztunnel.store.problems import Problem

if TYPE_CHECKING:
    from ztunnel.store.directory import DirectoryStore

# How often the whole tree is looked at although nothing was notified (links to elsewhere, network file systems):
# seconds, stretched so that looking costs at most a fiftieth of the time.
_LOOK_AGAIN = 1.0
# Pause between two steps of such a look, each of 1 to 2 ms.
_PACE = 0.01
_SHARE = 50
# How long after its last change a file may still be being written, where no event tells that it was closed.
_WRITING = 0.1
# While the directory is missing, or the kernel gives no more watches.
_LOOK_OFTEN = 0.2


class Watch(AsyncIterator[Change]):
    """An endless iterator over the changes of some kinds; made by `DirectoryStore.watch`.

    Intermediate states may be skipped, the last one never is. Every watch in a process shares the store's memory
    of the files, so that a change is read once. To be used by one task; `aclose` (or its end) releases it.
    """

    def __init__(self, store: "DirectoryStore", kinds: tuple[type[Object], ...]) -> None:
        self._store = store
        self._kinds = {(group_of(kind.API_VERSION), kind.KIND): kind for kind in kinds}
        self._told = Told()
        self._dirty: set[Key] | None = None
        self._notifier: Notifier | None = None
        self._next_look = 0.0
        self._steps: Generator[None, None, set[Path]] | None = (
            None  # of a look at everything that is under way
        )
        self._young = set[Path]()  # files that somebody may be writing, to be read at `_rested`
        self._rested = 0.0
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise StopAsyncIteration
        if self._dirty is None:
            await self._start()
        while not self._told.pending:
            await self._wait()
            self._collect()
        return self._told.pending.popleft()

    async def aclose(self) -> None:
        """Stop watching and release what the kernel holds for it."""
        self._release()

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        self._closed = True
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        if self._notifier is not None:
            self._notifier.close()
            self._notifier = None
        if self._dirty is not None:
            self._store.index.unfollow(self._dirty)
            self._dirty = None

    async def _start(self) -> None:
        index = self._store.index
        self._dirty = index.follow()
        try:
            self._notifier = Notifier()
        except OSError as error:
            self._without_notifier(error)
        await self._look()
        self._dirty.clear()
        for kind in self._kinds.values():
            self._told.begin(index.of_kind(kind))
        self._told.synced()

    async def _wait(self) -> None:
        index = self._store.index
        if self._notifier is None or not index.directories:
            await trio.sleep(max(_LOOK_OFTEN, index.cost * _SHARE))
            await self._look()
            return
        now = trio.current_time()
        until = self._next_look if self._steps is None else now + _PACE
        if self._young:
            until = min(until, self._rested)
        paths = await self._notifier.wait(max(0.0, until - now))
        if paths:
            index.refresh_files(sorted(paths))
        if self._young and trio.current_time() >= self._rested:
            self._young = index.refresh_rested(self._young, _WRITING)
            self._rested = trio.current_time() + _WRITING
        if paths is None and not self._notifier.idle:
            await self._look()
        elif self._steps is not None:
            await self._look_on(self._steps)
        elif trio.current_time() >= self._next_look:
            self._steps = index.looking(_WRITING)

    async def _look_on(self, steps: Iterator[None]) -> None:
        """One step of a look at everything, for which no change that is notified waits."""
        try:
            next(steps)
        except StopIteration as end:
            if self._looked(end.value):
                await self._look()

    async def _look(self) -> None:
        """Look at everything now, and again after watching a new directory, which may have filled before."""
        again = True
        while again:
            with closing(self._store.index.looking(_WRITING)) as steps:
                while True:
                    try:
                        next(steps)
                    except StopIteration as end:
                        again = self._looked(end.value)
                        break
                    await trio.lowlevel.checkpoint()

    def _looked(self, young: set[Path]) -> bool:
        """Prepare what comes after a look, which left the `young` files for later; True if another must follow."""
        self._steps = None
        now = trio.current_time()
        self._next_look = now + max(_LOOK_AGAIN, self._store.index.cost * _SHARE)
        if young - self._young:
            self._rested = now + _WRITING
            self._young |= young
        try:
            return (
                self._notifier is not None and sum(map(self._notifier.add, self._store.index.directories)) > 0
            )
        except OSError as error:
            self._without_notifier(error)
            return False

    def _without_notifier(self, error: OSError) -> None:
        if self._notifier is not None:
            self._notifier.close()
            self._notifier = None
        self._store.report(
            Problem(
                "",
                str(self._store.path),
                f"changes are seen late, the kernel gives no watches ({error.strerror})",
                "raise fs.inotify.max_user_instances and fs.inotify.max_user_watches with sysctl",
                "warning",
            )
        )

    def _collect(self) -> None:
        assert self._dirty is not None  # noqa: S101
        dirty = sorted(key for key in self._dirty if key[:2] in self._kinds)
        self._dirty.clear()
        for key in dirty:
            self._told.take(key, self._store.index.get(key))
