"""Follows the store: feeds the registry with what changes and publishes the resources that result, a moment later.

The moment (2 ms of quiet, 50 ms at most) lets a burst of changes, such as a rollout, become one update. It is short
because the store has already waited for the end of a burst.
"""

import logging
from contextlib import aclosing
from typing import Final

import trio

from ztunnel.controlplane.registry import KINDS, Registry
from ztunnel.controlplane.resources import ResourceSet
from ztunnel.controlplane.status import StatusWriter
from ztunnel.store.base import Store
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane.store")

QUIET: Final = 0.002  # seconds without a change after which an update is published
LONGEST: Final = 0.050  # seconds after which it is published in any case


class Follower:
    """Keeps a registry, the published addresses and policies, and the policies' status in step with a store."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        addresses: ResourceSet,
        policies: ResourceSet,
        targeted: ResourceSet | None = None,
        *,
        write_status: bool = True,
    ) -> None:
        """`targeted` are the policies of waypoints. Without `write_status` somebody else runs `statuses`, or nobody."""
        self._targeted = targeted
        self._store = store
        self._registry = registry
        self._addresses = addresses
        self._policies = policies
        self.statuses = StatusWriter(store)
        self._write_status = write_status
        self._touched = trio.Event()  # the registry has something to flush
        self._moved = trio.Event()  # something changed since somebody waited; renewed with each change

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled; started once everything that was in the store at first is published."""
        synced = False
        async with trio.open_nursery() as nursery, aclosing(self._store.watch(*KINDS)) as changes:
            async for change in changes:
                if change.op == "synced":
                    if not synced:
                        synced = True
                        self._publish()
                        logger.info(
                            "store read",
                            extra=fields(resources=len(self._addresses), policies=len(self._policies)),
                        )
                        nursery.start_soon(self._publish_changes)
                        if self._write_status:
                            nursery.start_soon(self.statuses.run)
                        task_status.started()
                    continue
                if change.obj is None:
                    continue
                if change.op == "deleted":
                    self._registry.remove(change.obj)
                else:
                    self._registry.upsert(change.obj)
                logger.debug("change", extra=fields(op=change.op, object=change.obj.ref))
                self._touched.set()
                self._moved.set()
                self._moved = trio.Event()

    async def wait_runs_on(self, node: str, namespace: str, service_account: str, patience: float) -> bool:
        """`Registry.runs_on`, waiting up to `patience` seconds for it to become true.

        A node proxy hears of a new pod from its own node and may ask before the store's change has come here.
        """
        with trio.move_on_after(patience):
            while not self._registry.runs_on(node, namespace, service_account):
                await self._moved.wait()
        return self._registry.runs_on(node, namespace, service_account)

    async def _publish_changes(self) -> None:
        while True:
            await self._touched.wait()
            latest = trio.current_time() + LONGEST
            quiet = False
            while not quiet and trio.current_time() < latest:
                self._touched = trio.Event()
                with trio.move_on_at(min(latest, trio.current_time() + QUIET)) as wait:
                    await self._touched.wait()
                quiet = wait.cancelled_caught
            self._touched = trio.Event()
            self._publish()

    def _publish(self) -> None:
        update = self._registry.flush()
        for problem in update.new_problems:
            logger.warning("%s", problem, extra=fields(object=problem.object))
        for problem in update.solved_problems:
            logger.info("solved: %s", problem.message, extra=fields(object=problem.object))
        # A workload shall not list a policy that nobody has been told of: new policies go first, old ones last.
        self._policies.update({name: new for name, new in update.policies.items() if new is not None})
        if self._targeted is not None:
            self._targeted.update(update.targeted)
        changed = self._addresses.update(update.resources)
        self._policies.update({name: None for name, new in update.policies.items() if new is None})
        self.statuses.put(update.findings)
        if changed or update.policies:
            logger.debug(
                "published",
                extra=fields(
                    changed=len(changed), policies=len(update.policies), revision=self._addresses.revision
                ),
            )
