"""Writes what the control plane finds of policies into their status, a little at a time."""

import datetime
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec
import trio

from ztunnel.controlplane.policy_registry import PolicyObject
from ztunnel.controlplane.policy_status import CONDITIONS, Finding
from ztunnel.store.base import Store, called
from ztunnel.store.models import Key
from ztunnel.store.problems import NotFound, StoreError
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane.status")


Told = Callable[[PolicyObject, Finding], None]
"""Called, in a thread, with what was written; may raise StoreError."""

PAUSE: Final = 1.0  # seconds before a remote store is tried again, then twice as long each time
LONGEST_PAUSE: Final = 60.0
REMEMBERED: Final = 10_000  # objects
MOST: Final = 5  # times that the same is written of the same generation: then somebody else keeps changing it


class StatusWriter:
    """What is to be written waits here: the latest finding of each object, and only if its status says otherwise.

    It waits until it is written, also while nobody runs this. `told` may be set, to tell elsewhere too, and `store`, to
    write by another way than others.
    """

    def __init__(self, store: Store) -> None:
        self.told: Told | None = None
        self.store = store
        self._waiting: dict[Key, tuple[PolicyObject, Finding]] = {}
        self._written: dict[Key, tuple[str, int, Finding, int]] = {}  # uid, generation, finding, how often
        self._wake = trio.Event()
        self._failing = False

    def put(self, findings: Iterable[tuple[PolicyObject, Finding]]) -> None:
        """Have these written."""
        for obj, finding in findings:
            self._waiting.pop(obj.key, None)
            if not finding.told_by(obj.status, obj.metadata.generation):
                self._waiting[obj.key] = (obj, finding)
        if self._waiting:
            self._wake.set()

    @property
    def waits(self) -> int:
        """How many objects have a status that is to be written."""
        return len(self._waiting)

    async def run(self) -> None:
        """Write for ever. A status that a store of this machine refuses is left as it is; a remote one is tried again.

        It changes nothing that is enforced.
        """
        pause = PAUSE
        if self._waiting:
            self._wake.set()
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._waiting:
                key, one = next(iter(self._waiting.items()))
                done = await self._write(*one)
                if self._waiting.get(key) is one:
                    del self._waiting[key]
                    if not done:
                        self._waiting[key] = one  # behind the others
                if done:
                    pause = PAUSE
                else:
                    await trio.sleep(pause)
                    pause = min(pause * 2, LONGEST_PAUSE)

    async def _write(self, obj: PolicyObject, finding: Finding) -> bool:
        """Whether there is nothing more to do."""
        if self.store.REMOTE and self._quarrel(obj, finding):
            return True
        written = False

        def change(present: PolicyObject) -> dict[str, Any]:
            """The condition among those that the object has now, which others may have written meanwhile."""
            nonlocal written
            generation = obj.metadata.generation
            written = False
            if present.metadata.generation != generation or finding.told_by(present.status, generation):
                return {}  # it is about to be judged anew, or another replica wrote it
            written = True
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            others = [each for each in present.status.conditions if each.type not in CONDITIONS]
            condition = finding.condition(present.status, now, generation)
            return {"status": {"conditions": msgspec.to_builtins([*others, condition])}}

        try:
            await called(
                self.store,
                self.store.revise,
                type(obj),
                obj.namespace,
                obj.name,
                change,
                uid=obj.metadata.uid,
            )
            if written:
                self._note(obj, finding)
            if written and self.told is not None:
                await trio.to_thread.run_sync(self.told, obj, finding)
        except NotFound:
            self._written.pop(obj.key, None)  # gone, or another one by now, which is told of by itself
        except (StoreError, OSError) as error:
            if not self._failing:
                logger.warning("cannot write status: %s", error, extra=fields(object=obj.ref))
            self._failing = True
            return not self.store.REMOTE
        self._failing = False
        return True

    def _quarrel(self, obj: PolicyObject, finding: Finding) -> bool:
        """Whether somebody else writes something else again and again: another version of us, say."""
        *before, count = self._written.get(obj.key, ("", 0, None, 0))
        if tuple(before) != (obj.metadata.uid, obj.metadata.generation, finding) or count < MOST:
            return False
        if count == MOST:
            self._note(obj, finding)
            logger.warning(
                "its status is changed by somebody else again and again; it is left so",
                extra=fields(object=obj.ref),
            )
        return True

    def _note(self, obj: PolicyObject, finding: Finding) -> None:
        if len(self._written) > REMEMBERED:
            self._written.clear()
        this = obj.metadata.uid, obj.metadata.generation, finding
        *before, count = self._written.get(obj.key, (*this, 0))
        self._written[obj.key] = (*this, count + 1 if tuple(before) == this else 1)
