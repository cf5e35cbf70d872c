"""Keeps one kind of a cluster in memory: a thread that lists it, and watches it from there; nothing is polled.

What is known resumes by resourceVersion only where the server itself ended a watch in time. After anything else (the
connection broke, the server restarted, history is gone) everything is listed again: a server that was restored to an
older state would otherwise stay silent until its versions pass ours, and never tell of what it has lost.
"""

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import msgspec

from ztunnel.store.kube import decoding
from ztunnel.store.kube.api import Api, ApiError, Stream
from ztunnel.store.kube.discovery import base
from ztunnel.store.kube.errors import Status
from ztunnel.store.models import Key, Object
from ztunnel.store.problems import Problem

logger = logging.getLogger("store.kubernetes")

PAGE: Final = 500  # objects that are asked for at a time
_WATCH: Final = (
    290.0,
    590.0,
)  # seconds after which the server shall end a watch; between them, so that not all do
_SLACK: Final = 5.0  # seconds that a watch may end too early and still count as ended in time
_FIRST_PAUSE: Final = 0.1  # seconds, doubled with each failure
_LONGEST_PAUSE: Final = 10.0
ABSENT_PAUSE: Final = 600.0  # between looks for a kind that is not served: a definition's coming is told of
_PATIENCE: Final = 3  # how often history may be gone, one time after the other, before that is a failure
_EXPECTED: Final = 20  # looks for a kind whose definition has just come, 0.1 to 0.3 seconds apart
_CONFIRM: Final = 2.0  # seconds for which a kind that was served must be missing before it counts as gone
_status = msgspec.json.Decoder(Status)


class Sink(Protocol):
    """Where a reflector puts what it sees: `cache.Cache`, or a part of it."""

    def put(self, obj: Object, problems: tuple[Problem, ...] = ()) -> None:
        """An object is there, or has changed."""
        ...

    def unreadable(self, key: Key, problems: tuple[Problem, ...]) -> None:
        """An object is there that cannot be read."""
        ...

    def drop(self, key: Key) -> None:
        """An object is gone."""
        ...

    def replace(
        self, kind: type[Object], new: dict[Key, Object], faults: dict[Key, tuple[Problem, ...]]
    ) -> None:
        """All objects of the kind."""
        ...

    def trouble(self, kind: type[Object], problem: Problem | None) -> None:
        """The kind cannot be watched just now, or can again."""
        ...


class _Again(Exception):
    """What is known has to be listed anew; no failure."""


class Reflector:
    """One kind, followed from `start` to `stop`. `selectors` are query parameters (fieldSelector, labelSelector).

    `accept` is what lists and watches are asked for as; `absent_pause` how long a kind that is not served is let be.
    `on_listed` is called, in its thread, each time it has listed everything; `on_absent` when the kind is not served.
    """

    def __init__(
        self,
        api: Api,
        kind: type[Object],
        sink: Sink,
        *,
        selectors: dict[str, str] | None = None,
        accept: tuple[str, str] = ("application/json", "application/json"),
        page: int = PAGE,
        on_listed: Callable[[], None] = lambda: None,
        on_absent: Callable[[], None] = lambda: None,
    ) -> None:
        self.kind = kind
        self.absent_pause = ABSENT_PAUSE
        self._api = api
        self._sink = sink
        self._selectors = selectors or {}
        self._accept = accept
        self._page = page
        self._on_listed = on_listed
        self._on_absent = on_absent
        self._read = decoding.reader(kind, slim=True)
        self._path = ""  # under which it is served; "" while that is not known
        self._missing_since = 0.0  # when it was first seen not to be served, though it had been
        self._served = False
        self._absent = False
        self._expected = 0  # how many more times a kind that is said to come is looked for at once
        self._failures = 0
        self._gate = threading.Lock()  # held while something is put into the sink
        self._stopped = threading.Event()
        self._nudged = threading.Event()
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch {kind.KIND}", daemon=True)

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End: nothing more is put into the sink. The thread ends soon after, at the latest with its request."""
        with self._gate:
            self._stopped.set()
        self._nudged.set()
        with self._lock:
            if self._stream is not None:
                self._stream.close()

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end; whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def nudge(self, *, expected: bool = False) -> None:
        """Try again soon, if it waits for something to become possible; `expected`: the kind is about to be served."""
        if expected:
            self._expected = _EXPECTED
        self._nudged.set()

    def nudge_if_failing(self) -> None:
        """The server has just answered somebody else."""
        if self._failures:
            self._nudged.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._nudged.clear()
            pause = 0.0
            try:
                self._follow(self._list())
            except _Again:
                # Not all who watch the same server come at once.
                pause = random.uniform(0, _FIRST_PAUSE)  # noqa: S311
            except ApiError as error:
                if error.not_found:
                    pause = self._missing()
                elif error.gone and self._failures < _PATIENCE:
                    self._failures += 1
                    pause = random.uniform(0, _FIRST_PAUSE)  # noqa: S311
                else:
                    pause = self._failed(error)
            except Exception as error:
                logger.error("watching %s failed", self.kind.KIND, exc_info=error)
                pause = self._failed(ApiError(0, "Bug", f"{type(error).__name__}: {error}"))
            if pause and not self._stopped.is_set() and self._nudged.wait(pause):
                self._stopped.wait(random.uniform(0, _FIRST_PAUSE))  # noqa: S311

    def _list(self) -> str:
        """Everything there is, into the sink; the version it stood at."""
        for attempt in range(2):
            try:
                return self._list_pages(self._page if attempt == 0 else 0)
            except ApiError as error:
                # It took longer than the server keeps its history: in one piece, then.
                if not error.gone or attempt:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _list_pages(self, limit: int) -> str:
        new: dict[Key, Object] = {}
        faults: dict[Key, tuple[Problem, ...]] = {}
        query = dict(self._selectors)
        if limit:
            query["limit"] = str(limit)
        while True:
            page = decoding.page(self._fetch(query))
            for item in page.items or ():
                read = self._read(item)
                if read is None:
                    continue
                if read.obj is not None:
                    new[read.key] = read.obj
                if read.problems:
                    faults[read.key] = read.problems
            if not page.metadata.following:
                break
            query["continue"] = page.metadata.following
            if self._stopped.is_set():
                raise _Again
        self._served, self._missing_since, self._absent, self._expected = True, 0.0, False, 0
        self._put(lambda: self._sink.replace(self.kind, new, faults))
        self._on_listed()
        return page.metadata.resource_version

    def _fetch(self, query: dict[str, str]) -> bytes:
        """A page, from under whichever version the kind is served."""
        if self._path:
            return self._api.request("GET", self._path, query=query, accept=self._accept[0])
        for version in (self.kind.API_VERSION, *self.kind.API_VERSIONS):
            path = f"{base(version)}/{self.kind.PLURAL}"
            try:
                answer = self._api.request("GET", path, query=query, accept=self._accept[0])
            except ApiError as error:
                missing = error
                if not error.not_found:
                    raise
            else:
                self._path = path
                return answer
        raise missing

    def _follow(self, version: str) -> None:
        """Watch from a version on; returns never, but raises _Again or ApiError."""
        while not self._stopped.is_set():
            seconds = random.uniform(*_WATCH)  # noqa: S311
            started = time.monotonic()
            last, bookmark = self._watch(version, seconds)
            lived = time.monotonic() - started
            if lived > _LONGEST_PAUSE:
                self._failures = 0
            if lived < seconds - _SLACK:
                raise (
                    _Again
                    if lived > _LONGEST_PAUSE
                    else ApiError(
                        0,
                        "Ended",
                        f"the watch of {self.kind.KIND} was ended by the server; it is begun again",
                    )
                )
            version = bookmark or (decoding.version_of(last) if last is not None else "") or version
        raise _Again

    def _watch(self, version: str, seconds: float) -> tuple[msgspec.Raw | None, str]:
        """One watch, until the server ends it: the last object it told of, or the version of a later bookmark."""
        query = {
            **self._selectors,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(int(seconds)),
        }
        stream = self._api.stream(self._path, query, silence=seconds + 30, accept=self._accept[1])
        with self._lock:
            if self._stopped.is_set():
                stream.close()
                raise _Again
            self._stream = stream
        last, bookmark = None, ""
        self._put(lambda: self._sink.trouble(self.kind, None))
        try:
            for line in stream:
                try:
                    event = decoding.event(line)
                except msgspec.DecodeError:
                    raise ApiError(
                        0, "Garbled", f"the watch of {self.kind.KIND} sent what is no event"
                    ) from None
                if event.type == "BOOKMARK":
                    last, bookmark = None, decoding.version_of(event.object) or bookmark
                    self._failures = 0
                    continue
                if event.type == "ERROR":
                    self._raise(event.object)
                self._put(partial(self._take, event))
                last, bookmark = event.object, ""
        finally:
            with self._lock:
                self._stream = None
            stream.close()
        if self._stopped.is_set():
            raise _Again
        return last, bookmark

    def _put(self, change: Callable[[], None]) -> None:
        """Change the sink, unless nobody wants that any more."""
        with self._gate:
            if self._stopped.is_set():
                raise _Again
            change()

    def _take(self, event: decoding.Event) -> None:
        if event.type == "DELETED":
            if (key := decoding.key_in(self.kind, event.object)) is not None:
                self._sink.drop(key)
            return
        read = self._read(event.object)
        if read is None:
            return
        if read.obj is not None:
            self._sink.put(read.obj, read.problems)
        else:
            self._sink.unreadable(read.key, read.problems)

    def _raise(self, data: msgspec.Raw) -> None:
        """An error in the middle of a watch that was answered with 200."""
        try:
            status = _status.decode(data)
        except msgspec.DecodeError:
            status = Status()
        raise ApiError(status.code, status.reason, f"the watch of {self.kind.KIND} ended: {status.message}")

    def _failed(self, error: ApiError) -> float:
        """Tell of it; seconds to wait."""
        self._failures += 1
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self._failures, 16))
        if self._failures > 1 or not error.unreachable:
            # A broken connection that is there again at once is no news.
            self._tell(lambda: self._sink.trouble(self.kind, _problem(self.kind, error)))
        return max(error.retry_after, random.uniform(longest / 2, longest))  # noqa: S311

    def _missing(self) -> float:
        """The kind is not served, or no longer. A server that has just started may say so for a moment."""
        now = time.monotonic()
        self._path = ""
        self._missing_since = self._missing_since or now
        if self._served and now - self._missing_since < _CONFIRM:
            return random.uniform(_CONFIRM / 4, _CONFIRM / 2)  # noqa: S311
        if not self._absent:
            logger.info("the cluster has no %s; it is followed once it has", self.kind.KIND)
            self._absent, self._served = True, False
            self._tell(lambda: self._sink.replace(self.kind, {}, {}))
        self._failures = 0
        self._on_absent()
        if self._expected:
            self._expected -= 1
            return random.uniform(0.1, 0.3)  # noqa: S311
        return random.uniform(self.absent_pause / 2, self.absent_pause)  # noqa: S311

    def _tell(self, change: Callable[[], None]) -> None:
        with contextlib.suppress(_Again):
            self._put(change)


def _problem(kind: type[Object], error: ApiError) -> Problem:
    """What cannot be watched, and why."""
    if error.unreachable:
        # One and the same for every kind: it is told once.
        return Problem("", "", error.message, "what is known of the cluster is kept meanwhile", "warning")
    message, _, remedy = error.message.partition("; ")
    return Problem(kind.KIND, "", f"cannot be watched: {message}", remedy or "it is tried again")
