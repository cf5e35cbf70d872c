"""What the mesh asks of a store of objects, be it a directory of files or a Kubernetes cluster."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, Self, TypeVar

import trio

from ztunnel.store.models import K, Key, Object
from ztunnel.store.problems import Problem

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Objects = list  # in the class, `list` is the method


class Change(NamedTuple):
    """One step of a watch. `obj` is the object as it is now, as it last was if deleted, None if "synced"."""

    op: Literal["added", "modified", "deleted", "synced"]
    obj: Object | None


class Changes(Protocol):
    """An endless iterator over the changes of some kinds: every object as "added", "synced", then each change.

    Intermediate states may be skipped, the last one never is. To be used by one task; `aclose` releases it.
    """

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Change: ...

    async def aclose(self) -> None:
        """Stop watching."""
        ...


class Store(Protocol):
    """Objects are given out as they are kept, immutable; lists are sorted by namespace and name.

    `REMOTE` says whether methods wait for another machine: then they are called in threads (see `called`), and may
    be called by several at once. Otherwise they are called by one thread only, and soon return.
    """

    REMOTE: bool

    @property
    def problems(self) -> list[Problem]:
        """What is wrong now with the objects, or with reaching them."""
        ...

    def report(self, problem: Problem) -> None:
        """Tell whoever made the store of a problem."""
        ...

    def when_problems_change(self, call: Callable[[], None]) -> None:
        """Have `call` called when there are other problems than before."""
        ...

    def list(self, kind: type[K], namespace: str | None = None) -> list[K]:
        """The objects of a kind, of all namespaces or of one, as they are now. Raises StoreError."""
        ...

    def known(self, kind: type[K]) -> _Objects[K]:
        """The objects of a kind as a watch has last told of them, without I/O."""
        ...

    def get(self, kind: type[K], namespace: str, name: str) -> K | None:
        """One object as it is now, None if there is none. Raises StoreError."""
        ...

    def find(self, key: Key) -> Object | None:
        """One object as it is now by its key, None if there is none. Raises StoreError."""
        ...

    def patch(self, kind: type[K], namespace: str, name: str, merge: dict[str, Any], *, uid: str = "") -> K:
        """Change an object by a JSON merge patch (RFC 7386), and return it as it is then.

        With `uid`, only if it is still that very object. Raises NotFound, StoreError.
        """
        ...

    def revise(
        self, kind: type[K], namespace: str, name: str, change: Callable[[K], dict[str, Any]], *, uid: str
    ) -> K:
        """The same with the patch that `change` makes of the object as it is; {}: it stays as it is.

        Nobody else's change comes between: `change` is called again with what that made of the object.
        """
        ...

    def watch(self, *kinds: type[Object]) -> Changes:
        """Every object of the kinds as "added", then "synced", then each change. Needs trio."""
        ...


async def called(store: Store, method: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What a method of the store returns: in a thread if that waits for another machine.

    Cancelled, it is no longer waited for; what it asks for may still be done.
    """
    if store.REMOTE:
        return await trio.to_thread.run_sync(partial(method, *args, **kwargs), abandon_on_cancel=True)
    await trio.lowlevel.checkpoint()
    return method(*args, **kwargs)
