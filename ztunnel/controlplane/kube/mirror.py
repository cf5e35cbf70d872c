"""A few objects of the API server, kept up to date by a watch: for kinds that the store does not hold.

Nothing is polled: after a list the changes come by themselves. What was read stays while the server is away.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import trio

from ztunnel.store.kube.api import Api
from ztunnel.store.kube.errors import ApiError
from ztunnel.store.kube.stream import Stream

logger = logging.getLogger("controlplane.kube")

Name = tuple[str, str]
"""Namespace and name."""

FIRST_PAUSE: Final = 0.2  # seconds until it is tried again, then twice as long each time
LONGEST_PAUSE: Final = 15.0
WATCH_SECONDS: Final = 300  # after which the server ends a watch, and another is begun where it ended
SOON: Final = 5.0  # seconds: a watch that ends within them is begun again only after a pause
_SILENCE: Final = WATCH_SECONDS + 60.0
_PAGE: Final = "500"


class _Listing(msgspec.Struct):
    metadata: dict[str, Any] = {}
    items: list[dict[str, Any]] | None = None


_list = msgspec.json.Decoder(_Listing)


class Mirror:
    """The objects at a path that a query selects."""

    def __init__(
        self,
        api: Api,
        path: str,
        query: Mapping[str, str],
        what: str,
        changed: Callable[[frozenset[Name]], None],
    ) -> None:
        """`changed` is called, in trio's thread, with the names of objects that came, changed or went.

        It is called once more after each list, with all names. `what` is for the log.
        """
        self.objects: dict[Name, dict[str, Any]] = {}
        self.synced = False
        self.problem = ""
        self._api = api
        self._path = path
        self._query = dict(query)
        self._what = what
        self._changed = changed
        self._stream: Stream | None = None
        self._stopped = False

    async def run(self) -> None:
        """Follow until cancelled."""
        pause = FIRST_PAUSE
        limiter = trio.CapacityLimiter(1)
        self._stopped = False
        try:
            while True:
                try:
                    # Abandoned when cancelled: the stream is closed then, which ends the thread.
                    await trio.to_thread.run_sync(self._follow, abandon_on_cancel=True, limiter=limiter)
                    pause = FIRST_PAUSE
                except ApiError as error:
                    if not self.problem and not error.gone:
                        logger.warning("cannot read %s; what is known stays in force: %s", self._what, error)
                    self.problem = str(error)
                    if error.gone:
                        pause = FIRST_PAUSE
                    await trio.sleep(pause * random.uniform(1.0, 1.5))  # noqa: S311 (not all at once)
                    pause = min(pause * 2, LONGEST_PAUSE)
        finally:
            self._stopped = True
            if self._stream is not None:
                self._stream.close()

    # In a thread.

    def _follow(self) -> None:
        """List, then watch until something breaks. Raises ApiError."""
        items: list[dict[str, Any]] = []
        query = {**self._query, "limit": _PAGE}
        while True:
            try:
                listing = _list.decode(self._api.request("GET", self._path, query=query))
            except msgspec.DecodeError:
                raise ApiError(0, "Garbled", f"{self._path}: the answer is no list of objects") from None
            items += listing.items or []
            metadata = listing.metadata
            if not metadata.get("continue"):
                break
            query["continue"] = metadata["continue"]
        version = str(metadata.get("resourceVersion", ""))
        trio.from_thread.run_sync(self._replace, items)
        while not self._stopped:
            began = time.monotonic()
            version = self._watch(version)
            if time.monotonic() - began < SOON and not self._stopped:
                raise ApiError(0, "Ended", f"watch {self._path}: ended by the server as soon as it began")

    def _watch(self, version: str) -> str:
        query = {
            **self._query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        self._stream = stream = self._api.stream(self._path, query, silence=_SILENCE)
        if self._stopped:
            stream.close()
        for line in stream:
            try:
                event = msgspec.json.decode(line)
                kind, obj = event["type"], event["object"]
                if kind == "ERROR":
                    code = int(obj.get("code") or 500)
                    raise ApiError(
                        code, str(obj.get("reason", "")), f"watch {self._path}: {obj.get('message')}"
                    )
                version = str(obj["metadata"]["resourceVersion"])
            except (msgspec.DecodeError, ValueError, KeyError, TypeError, AttributeError):
                raise ApiError(0, "Garbled", f"watch {self._path}: an event that cannot be read") from None
            if kind != "BOOKMARK":
                trio.from_thread.run_sync(self._take, kind, obj)
        return version

    # In trio's thread.

    def _replace(self, items: list[dict[str, Any]]) -> None:
        before = self.objects
        self.objects = {_name(one): one for one in items}
        self.synced = True
        if self.problem:
            self.problem = ""
            logger.info("%s can be read again", self._what)
        self._changed(frozenset(before) | frozenset(self.objects))

    def _take(self, kind: str, obj: dict[str, Any]) -> None:
        name = _name(obj)
        if kind == "DELETED":
            self.objects.pop(name, None)
        else:
            self.objects[name] = obj
        self._changed(frozenset((name,)))


def _name(obj: dict[str, Any]) -> Name:
    metadata = obj["metadata"]
    return str(metadata.get("namespace", "")), str(metadata["name"])
