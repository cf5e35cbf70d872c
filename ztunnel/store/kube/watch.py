"""Following kinds of a cluster from trio: what threads have put into the cache, as changes, one after the other."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Self

import trio

from ztunnel.store.base import Change
from ztunnel.store.changes import Told
from ztunnel.store.kube.cache import Cache, Follower, kind_key
from ztunnel.store.models import Object


class Watch(AsyncIterator[Change]):
    """See `store.base.Changes`; made by `KubernetesStore.watch`.

    `acquire` has the kinds brought into the cache, `release` says that they are no longer needed here.
    """

    def __init__(
        self,
        cache: Cache,
        kinds: tuple[type[Object], ...],
        acquire: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        self._cache = cache
        self._kinds = kinds
        self._acquire = acquire
        self._release = release
        self._names = {kind_key(kind) for kind in kinds}
        self._told = Told()
        self._news = trio.Event()
        self._follower: Follower | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise StopAsyncIteration
        if self._follower is None:
            await self._start()
        while not self._told.pending:
            await self._wait()
            self._collect()
        return self._told.pending.popleft()

    async def aclose(self) -> None:
        """Stop watching."""
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        follower, self._follower = self._follower, None
        self._closed = True
        if follower is not None:
            self._cache.unfollow(follower)
            self._release()

    async def _start(self) -> None:
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            # Where trio has ended nobody waits any more.
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._wake, idempotent=True)

        self._follower = Follower(wake)
        self._cache.follow(self._follower)
        self._acquire()
        while not self._cache.synced(self._kinds):
            await self._wait()
        self._cache.taken(self._follower)
        for kind in self._kinds:
            self._told.begin(self._cache.objects(kind))
        self._told.synced()

    async def _wait(self) -> None:
        await self._news.wait()
        self._news = trio.Event()

    def _wake(self) -> None:
        self._news.set()

    def _collect(self) -> None:
        assert self._follower is not None  # noqa: S101
        changed = self._cache.taken(self._follower)
        for key in sorted(key for key in changed if key[:2] in self._names):
            self._told.take(key, changed[key])
