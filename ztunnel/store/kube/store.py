"""A Kubernetes cluster as the store: what is watched is kept in memory, what is asked for is asked of the server."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

import msgspec
import trio

from ztunnel.store.kinds import KINDS
from ztunnel.store.kube import decoding
from ztunnel.store.kube.api import Api, ApiError, NoSuchKind
from ztunnel.store.kube.cache import Cache
from ztunnel.store.kube.definitions import Definition, Definitions
from ztunnel.store.kube.reflector import PAGE, Reflector
from ztunnel.store.kube.watch import Watch
from ztunnel.store.models import K, Key, Object, group_of, key_of
from ztunnel.store.problems import NotFound, Problem, StoreError

_CONFLICTS: Final = 8  # how often a change that met another one is tried again
_UNTOLD_PAUSE: Final = 30.0  # seconds between looks for an absent kind where definitions may not be watched

_Objects = list
_Parts = list[tuple[dict[str, Any], str]]  # patches, each with the subresource that it is for


class KubernetesStore:
    """The objects of a cluster, as one user sees them; may be used by several threads.

    Each kind that somebody watches is watched once, whoever follows it. `field_selectors` and `label_selectors` say
    per kind which objects matter here. `on_problem` is called once for each problem when it is first seen, from any
    thread; `problems` lists those of now. Objects of `watch` and `known` are slim (see slim.py), those of `get` and
    `list` whole.
    """

    REMOTE = True

    def __init__(
        self,
        api: Api,
        on_problem: Callable[[Problem], None] | None = None,
        *,
        field_selectors: Mapping[type[Object], str] | None = None,
        label_selectors: Mapping[type[Object], str] | None = None,
        page: int = PAGE,
    ) -> None:
        self.api = api
        self._on_problem = on_problem
        self._selectors: dict[type[Object], dict[str, str]] = {}
        for name, given in (("fieldSelector", field_selectors), ("labelSelector", label_selectors)):
            for kind, selector in (given or {}).items():
                self._selectors.setdefault(kind, {})[name] = selector
        self._page = page
        self._cache = Cache(self.report, self._changed)
        self._when_changed: Callable[[], None] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._lock = threading.Lock()
        self._reflectors: dict[type[Object], tuple[Reflector, int]] = {}  # and how many watches need it
        self._definitions: Definitions | None = None
        self._told_of_definitions = True

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with objects that are watched, or with watching them."""
        return self._cache.problems

    def report(self, problem: Problem) -> None:
        """Tell whoever made the store of a problem."""
        if self._on_problem is not None:
            self._on_problem(problem)

    def when_problems_change(self, call: Callable[[], None]) -> None:
        """Have `call` called when there are other problems than before: in trio's thread, once something is watched."""
        self._when_changed = call

    def known(self, kind: type[K]) -> _Objects[K]:
        """The objects of a kind that is watched, as the server has last told; none of a kind that is not."""
        found = self._cache.objects(kind)
        return [cast(K, found[key]) for key in sorted(found)]

    def list(self, kind: type[K], namespace: str | None = None) -> _Objects[K]:
        """The objects of a kind, of all namespaces or of one, as they are now; none of a kind that is not served.

        Those that cannot be read are left out. Raises ApiError.
        """
        try:
            version = self._version(kind)
        except NoSuchKind:
            return []
        read = decoding.reader(kind, slim=False)
        path = self.api.path(version, kind.KIND, (namespace or "") if kind.NAMESPACED else "")
        query = dict(self._selectors.get(kind, {})) | {"limit": str(self._page)}
        found: dict[Key, Object] = {}
        while True:
            try:
                page = decoding.page(self.api.request("GET", path, query=query))
            except ApiError as error:
                if not error.gone or query.pop("continue", None) is None:
                    raise
                # Reading took longer than the server keeps its history (5 minutes): once more, in one piece.
                found.clear()
                del query["limit"]
                continue
            for item in page.items or ():
                each = read(item)
                if each is not None and each.obj is not None:
                    found[each.key] = each.obj
            if not page.metadata.following:
                return [cast(K, found[key]) for key in sorted(found)]
            query["continue"] = page.metadata.following

    def get(self, kind: type[K], namespace: str, name: str) -> K | None:
        """One object as it is now, None if there is none or its kind is not served. Raises StoreError."""
        try:
            path = self.api.path(self._version(kind), kind.KIND, self._place(kind, namespace), name)
            data = self.api.request("GET", path)
        except ApiError as error:
            if error.not_found:
                return None
            raise
        return self._typed(kind, data)

    def find(self, key: Key) -> Object | None:
        """One object as it is now by its key, None if there is none, or the mesh does not know its kind."""
        kind = KINDS.get(key.kind)
        if kind is None or group_of(kind.API_VERSION) != key.group:
            return None
        return self.get(kind, key.namespace, key.name)

    def patch(self, kind: type[K], namespace: str, name: str, merge: dict[str, Any], *, uid: str = "") -> K:
        """Change an object by a JSON merge patch (RFC 7386), and return it as it is then.

        What is said of its status goes to the status subresource. With `uid`, only if it is still that very object.
        A change that meets another one is tried again. Raises NotFound, StoreError.
        """
        key = key_of(kind, namespace, name)
        answer: dict[str, Any] = {}
        with _missing(key):
            version = self._version(kind)
            for part, subresource in _parts(merge):
                if uid:
                    answer = self._pinned(version, kind, key, part, subresource, uid)
                else:
                    place = self._place(kind, namespace)
                    answer = self.api.patch(version, kind.KIND, place, name, part, subresource)
        return self._typed(kind, msgspec.json.encode(answer))

    def revise(
        self, kind: type[K], namespace: str, name: str, change: Callable[[K], dict[str, Any]], *, uid: str
    ) -> K:
        """Change an object by the JSON merge patch that `change` makes of it as it is ({}: none). Raises as `patch`.

        The patch is of the status, or of the rest, not of both.
        """
        key = key_of(kind, namespace, name)

        def parts(present: dict[str, Any]) -> _Parts:
            made = _parts(change(self._typed(kind, msgspec.json.encode(present))))
            assert len(made) < 2, "a patch of the status and of the rest is none that is done at once"  # noqa: S101
            return made

        with _missing(key):
            answer = self._at_once(self._version(kind), kind, key, parts, uid)
        return self._typed(kind, msgspec.json.encode(answer))

    def watch(self, *kinds: type[Object]) -> Watch:
        """Every object of the kinds (default: all kinds) as "added", then "synced", then each change.

        "synced" waits until each kind has been listed, or is known not to be served. Needs trio.
        """
        wanted = kinds or tuple(KINDS.values())

        def acquire() -> None:
            self._token = trio.lowlevel.current_trio_token()
            self._acquire(wanted)

        return Watch(self._cache, wanted, acquire, lambda: self._release(wanted))

    def close(self) -> None:
        """End every watch's thread, and close the connections."""
        with self._lock:
            reflectors = [reflector for reflector, _ in self._reflectors.values()]
            self._reflectors.clear()
            definitions, self._definitions = self._definitions, None
        for reflector in reflectors:
            reflector.stop()
        if definitions is not None:
            definitions.stop()
        self.api.close()

    def _acquire(self, kinds: tuple[type[Object], ...]) -> None:
        with self._lock:
            for kind in kinds:
                known = self._reflectors.get(kind)
                if known is not None:
                    self._reflectors[kind] = known[0], known[1] + 1
                    continue
                reflector = Reflector(
                    self.api,
                    kind,
                    self._cache,
                    selectors=self._selectors.get(kind),
                    page=self._page,
                    on_listed=self._nudge_all,
                    on_absent=self._await_definitions,
                )
                self._reflectors[kind] = reflector, 1
                reflector.start()

    def _release(self, kinds: tuple[type[Object], ...]) -> None:
        with self._lock:
            for kind in kinds:
                if kind not in self._reflectors:
                    continue
                reflector, count = self._reflectors[kind]
                if count > 1:
                    self._reflectors[kind] = reflector, count - 1
                    continue
                del self._reflectors[kind]
                reflector.stop()
                self._cache.forget(kind)
            idle = None
            if not self._reflectors:
                idle, self._definitions = self._definitions, None
        # Not while the lock is held: its thread may be waiting for that.
        if idle is not None:
            idle.stop()

    def _nudge_all(self) -> None:
        """The server answers: who waits for that need not wait longer."""
        with self._lock:
            for reflector, _ in self._reflectors.values():
                reflector.nudge_if_failing()

    def _await_definitions(self) -> None:
        """Some kind is not served: hear of it when it is."""
        with self._lock:
            if self._definitions is None and self._reflectors:
                self._definitions = Definitions(self.api, self._defined, self._definitions_trouble)
                self._definitions.start()
            self._set_pauses()

    def _defined(self, names: set[str]) -> None:
        with self._lock:
            for kind, (reflector, _) in self._reflectors.items():
                if f"{kind.PLURAL}.{group_of(kind.API_VERSION)}" in names:
                    reflector.nudge(expected=True)

    def _definitions_trouble(self, problem: Problem | None) -> None:
        with self._lock:
            self._told_of_definitions = problem is None
            self._set_pauses()
        self._cache.trouble(Definition, problem)

    def _set_pauses(self) -> None:
        if not self._told_of_definitions:
            for reflector, _ in self._reflectors.values():
                reflector.absent_pause = _UNTOLD_PAUSE

    def _changed(self) -> None:
        call, token = self._when_changed, self._token
        if call is None:
            return
        if token is None:
            call()
            return
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(call, idempotent=True)

    def _version(self, kind: type[Object]) -> str:
        """Under which version the cluster serves a kind. Raises NoSuchKind."""
        for version in (kind.API_VERSION, *kind.API_VERSIONS):
            if self.api.serves(version, kind.KIND):
                return version
        raise NoSuchKind(kind.API_VERSION, kind.KIND)

    def _pinned(
        self, version: str, kind: type[Object], key: Key, merge: dict[str, Any], subresource: str, uid: str
    ) -> dict[str, Any]:
        return self._at_once(version, kind, key, lambda _: [(merge, subresource)], uid)

    def _at_once(
        self,
        version: str,
        kind: type[Object],
        key: Key,
        parts: Callable[[dict[str, Any]], _Parts],
        uid: str,
    ) -> dict[str, Any]:
        """Change that very object by the patch (and its subresource) that is made of it; none: it stays as it is."""
        space = self._place(kind, key.namespace)
        for attempt in range(_CONFLICTS):
            # The status subresource of custom resources does not look at the uid: the resourceVersion stands for it.
            present = self.api.get(version, kind.KIND, space, key.name)
            if present is None:
                raise NotFound(f"{key}: not found; create it first")
            metadata = present["metadata"]
            if metadata["uid"] != uid:
                raise NotFound(f"{key}: another one has its name by now; its uid is {metadata['uid']}")
            made = parts(present)
            if not made:
                return present
            merge, subresource = made[0]
            pinned = {
                **merge,
                "metadata": {**(merge.get("metadata") or {}), "resourceVersion": metadata["resourceVersion"]},
            }
            try:
                return self.api.patch(version, kind.KIND, space, key.name, pinned, subresource)
            except ApiError as error:
                if not error.conflict or attempt == _CONFLICTS - 1:
                    raise
            time.sleep(random.uniform(0, 0.02) * 2**attempt)  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    def _typed(self, kind: type[K], data: bytes) -> K:
        read = decoding.reader(kind, slim=False)(data)
        if read is None or read.obj is None:
            told = "; ".join(map(str, read.problems)) if read is not None else "it has no name"
            raise StoreError(f"{kind.KIND}: cannot be read: {told}")
        return cast(K, read.obj)

    @staticmethod
    def _place(kind: type[Object], namespace: str) -> str:
        return (namespace or "default") if kind.NAMESPACED else ""


def _parts(merge: dict[str, Any]) -> _Parts:
    """A patch as API servers take it: the status goes to its subresource."""
    parts = []
    if rest := {field: value for field, value in merge.items() if field != "status"}:
        parts.append((rest, ""))
    if "status" in merge:
        parts.append(({"status": merge["status"]}, "status"))
    return parts


@contextlib.contextmanager
def _missing(key: Key) -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        if error.not_found:
            raise NotFound(f"{key}: not found; create it first") from None
        raise
