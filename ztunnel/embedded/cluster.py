"""The resolver at work: follows the user's directory, writes the cluster's objects, and says what is wrong.

Deciding is `plan`'s; here is only reading, comparing and writing. What others write on the objects (a pod's status,
annotations of the node agent) is never written over: changes are merge patches of the fields that are the user's.
"""

import datetime
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from ztunnel.embedded.plan import KINDS, Given, Plan, plan
from ztunnel.store import files
from ztunnel.store.directory import DirectoryStore, object_file
from ztunnel.store.models import Deployment, Key, Node, Object, Pod, to_dict
from ztunnel.store.problems import NotFound, Problem, StoreError

logger = logging.getLogger("embedded.cluster")

# Changes that come together are resolved together: seconds, stretched so that resolving takes a tenth of the time at
# most. And how soon to try again what could not be written.
_SETTLE, _LONGEST_SETTLE = 0.01, 0.25
_STRETCH = 9
_RETRY = 1.0

# Which parts of an object the resolver writes; all others belong to whoever runs it.
_OWN_PARTS: dict[type[Object], tuple[str, ...]] = {
    Node: ("metadata", "spec", "status"),
    Deployment: ("metadata", "spec", "status"),
}


class Cluster:
    """Keeps the store `objects` in step with the store `source`, for a cluster of `nodes` nodes.

    `problems` is everything wrong now, the store's own and what others `report`; it is written to `problems_file`
    (a JSON list of Problem) and given to `on_problems` whenever it changes.
    """

    def __init__(
        self,
        source: DirectoryStore,
        objects: DirectoryStore,
        nodes: int,
        *,
        problems_file: Path | None = None,
        on_problems: Callable[[list[Problem]], None] | None = None,
        graceful: bool = False,
    ) -> None:
        """With `graceful` somebody runs the pods: one that shall go gets a deletionTimestamp, and whoever runs it
        removes the object when its programs have ended. Until then no other pod gets its name."""
        self.source = source
        self.objects = objects
        self.nodes = nodes
        self.problems: list[Problem] = []
        self._problems_file = problems_file
        self._on_problems = on_problems
        self._graceful = graceful
        self._published: list[Problem] | None = None
        self._found: list[Problem] = []
        self._reported: dict[str, Problem] = {}
        self._last: dict[int, int] = {}
        self._wake = trio.Event()
        source.when_problems_change(lambda: self._wake.set())

    def report(self, about: str, problem: Problem | None) -> None:
        """Take in what somebody else finds wrong with `about` (any name of his choice); None: it is right again."""
        if problem is None:
            self._reported.pop(about, None)
        else:
            self._reported[about] = problem
        self._publish()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Resolve now and after every change, for ever; started when the first state is written."""
        self.objects.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._follow, self.source, (*KINDS,))
            await nursery.start(self._follow, self.objects, (*KINDS,))
            started = False
            while True:
                self._wake = trio.Event()
                began = trio.current_time()
                written = self.resolve()
                settle = min(max(_SETTLE, _STRETCH * (trio.current_time() - began)), _LONGEST_SETTLE)
                if not started:
                    task_status.started()
                    started = True
                with trio.move_on_after(float("inf") if written else _RETRY):
                    await self._wake.wait()
                await trio.sleep(settle)

    def resolve(self) -> bool:
        """Bring `objects` in step with what is known of `source`; False if something could not be written."""
        current = {obj.key: obj for kind in KINDS for obj in self.objects.known(kind)}
        source = {obj.key: obj for kind in KINDS for obj in self.source.known(kind)}
        resolved = plan(
            Given(source, current, self.nodes), now=_now(), new_uid=lambda: str(uuid.uuid4()), last=self._last
        )
        self._last = resolved.last
        failures = self._write(resolved, current)
        self._found = [
            Problem(
                str(finding.key), self._file(finding.key), finding.message, finding.remedy, finding.severity
            )
            for finding in resolved.findings
        ] + failures
        self._publish()
        return not failures

    async def _follow(
        self,
        store: DirectoryStore,
        kinds: tuple[type[Object], ...],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async for change in store.watch(*kinds):
            if change.op == "synced":
                task_status.started()
            self._wake.set()

    def _write(self, resolved: Plan, current: dict[Key, Object]) -> list[Problem]:
        """Write what differs; what is gone goes first, so that its addresses and names are free."""
        failures = []
        for key, obj in current.items():
            if key not in resolved.objects:
                failures += self._attempt(key, lambda obj=obj: self._remove(obj))  # type: ignore[misc]
        for key, obj in resolved.objects.items():
            if obj != current.get(key):
                before = current.get(key)
                failures += self._attempt(key, lambda obj=obj, before=before: self._put(obj, before))  # type: ignore[misc]
        return failures

    def _attempt(self, key: Key, write: Callable[[], object]) -> list[Problem]:
        try:
            write()
        except NotFound:
            # Somebody else has removed or replaced it; the watch tells, and it is resolved again.
            self._wake.set()
        except StoreError as error:
            logger.warning("%s: %s", key, error)
            return [Problem(str(key), "", f"cannot be written: {error}", "it is tried again every second")]
        return []

    def _remove(self, obj: Object) -> None:
        if self._ends(obj):
            self._end(obj)
        else:
            self.objects.delete_key(obj.key)

    def _ends(self, obj: Object | None) -> bool:
        """Whether it is a pod that somebody runs."""
        return self._graceful and isinstance(obj, Pod) and bool(obj.addresses)

    def _end(self, pod: Object) -> None:
        if not pod.metadata.deletion_timestamp:
            merge = {"metadata": {"deletionTimestamp": _now()}}
            self.objects.patch(Pod, pod.namespace, pod.name, merge, uid=pod.metadata.uid)

    def _put(self, obj: Object, before: Object | None) -> None:
        if before is None or before.metadata.uid != obj.metadata.uid:
            if before is not None and self._ends(before):
                self._end(before)  # its successor follows when it is gone
            else:
                self.objects.apply(obj, file=object_file(obj.key))
            return
        own = _OWN_PARTS.get(type(obj), ("metadata", "spec"))
        if isinstance(obj, Pod) and not obj.addresses:
            own = (*own, "status")  # nobody runs it: the reason is the resolver's to say
        old, new = to_dict(before), to_dict(obj)
        difference = _difference({part: old.get(part) for part in own}, {part: new.get(part) for part in own})
        if difference:
            self.objects.patch(type(obj), obj.namespace, obj.name, difference, uid=obj.metadata.uid)

    def _file(self, key: Key) -> str:
        places = self.source.index.places(key)
        return self.source.index.relative(places[0]) if places else ""

    def _publish(self) -> None:
        everything = [*self.source.problems, *self._found, *self._reported.values()]
        self.problems = list(dict.fromkeys(everything))
        if self.problems == self._published:
            return
        if self._problems_file is not None:
            try:
                files.write(self._problems_file, msgspec.json.encode(self.problems) + b"\n", durable=False)
            except StoreError as error:
                logger.warning("%s", error)
                return
        self._published = self.problems
        if self._on_problems is not None:
            self._on_problems(self.problems)


def _now() -> str:
    """As Kubernetes writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _difference(old: Any, new: Any) -> Any:
    """The JSON merge patch (RFC 7386) that makes `new` of `old`."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    patch = {key: None for key in old if key not in new}
    for key, value in new.items():
        if key not in old:
            patch[key] = value
        elif old[key] != value:
            patch[key] = _difference(old[key], value)
    return patch
