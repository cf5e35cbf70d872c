"""One pod's way into the mesh and out of it: each step is safe to do again, and the kernel remembers how far it is.

Into the mesh: a pod whose programs run gets ztunnel's listeners before its rules, so that no connection is refused;
one that has not started gets its rules first, so that no connection ever goes outside, and one whose start waits for
us (the CNI plugin's) both at once. Out of it: no longer announced, no new connections redirected, ztunnel told, and
when the last of the proxy's connections has ended the rest of the rules goes.
"""

import logging
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from cni import rules
from cni.goals import Goal, annotations_patch
from cni.places import Places, PlacesError
from cni.routes import RoutesError, has_ipv6
from cni.rules import State
from cni.ruleset import RulesetError
from cni.sockets import SocketsError, missing_listeners, proxy_connections
from cni.zds import ZdsServer
from ztunnel.inpod import netns
from ztunnel.inpod.pods import ZdsError
from ztunnel.store.base import Store
from ztunnel.store.models import Object, Pod
from ztunnel.store.problems import NotFound, StoreError

log = logging.getLogger(__name__)
T = TypeVar("T")

SHOWN = 80  # characters of a difference in the log
FIRST_RETRY = 0.2  # seconds; doubles up to LAST_RETRY
LAST_RETRY = 5.0
FIRST_DRAIN_POLL = 0.02  # seconds between looks at the proxy's connections in a pod that has left; doubles
LAST_DRAIN_POLL = 1.0
GRACE = 1.0  # seconds for which peers that have not heard yet that the pod has left are still answered
PROXY_PATIENCE = 5.0  # seconds to wait for ztunnel before that is reported as what is wrong


class KernelError(Exception):
    """The pod's redirection is not as it should be."""


class Writer(Protocol):
    """Writes on a pod how it is."""

    def write(self, goal: Goal, *, enabled: bool, error: str) -> None:
        """If it is still there. Blocks; called by one thread at a time. Raises StoreError, OSError."""
        ...


class StoreWriter:
    """Writes into a directory of objects.

    The store is asked what a pod says: what was last heard from it may be older than what was last written.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, goal: Goal, *, enabled: bool, error: str) -> None:
        """Raises StoreError, OSError."""
        pod = self._store.get(Pod, goal.info.namespace, goal.info.name)
        if pod is None or pod.metadata.uid != goal.uid:
            return
        merge = annotations_patch(pod, enabled=enabled, error=error)
        if merge is not None:
            self._store.patch(Pod, goal.info.namespace, goal.info.name, merge)


class Observer:
    """Hears of what becomes of the pods, and does nothing with it."""

    def heard(self, what: str, obj: Object) -> None:
        """The store tells of a change: "added", "modified" or "deleted"; or of what it found at first ("added")."""

    async def entering(self, goal: Goal) -> None:
        """Its traffic is about to be redirected."""

    async def left(self, uid: str) -> None:
        """It is out, or gone."""

    def joined(self, goal: Goal) -> None:
        """It is in the mesh now, and was not before."""

    def repaired(self, goal: Goal, what: str, differences: list[str]) -> None:
        """It was in the mesh, and `what` ("rules", "listeners") was not as it should be; it is again."""

    def failed(self, goal: Goal, message: str) -> None:
        """It is not as it should be, and will be tried again; told once while the message stays the same."""


class Node:
    """What the pods of one node share: the store to write to, ztunnel, and where the namespaces are."""

    def __init__(
        self,
        writer: Writer,
        server: ZdsServer,
        places: Places,
        *,
        observer: Observer | None = None,
        grace: float = GRACE,
        patience: float = PROXY_PATIENCE,
        check_listeners: bool = False,
    ) -> None:
        self.server = server
        self.places = places
        self.observer = observer or Observer()
        self.grace = grace
        self.patience = patience
        self.check_listeners = check_listeners
        self.leaving = False  # for good: what cannot be written on pods keeps none of them in the mesh
        self._writer = writer
        self._writers = trio.CapacityLimiter(1)
        self._kernel = trio.CapacityLimiter(4)

    async def namespace(self, goal: Goal) -> Path | None:
        """The file that names the pod's network namespace, or None while there is none. Raises KernelError."""
        try:
            return await self.places.find(goal)
        except PlacesError as error:
            raise KernelError(str(error)) from error

    async def in_kernel(self, path: Path, work: Callable[[int], T]) -> T:
        """What `work` returns for the open namespace, in a thread. Raises KernelError with a person's message."""

        def run() -> T:
            descriptor = netns.open_path(path)
            try:
                return work(descriptor)
            finally:
                os.close(descriptor)

        try:
            return await trio.to_thread.run_sync(run, limiter=self._kernel)
        except (RulesetError, RoutesError, SocketsError, OSError) as error:
            raise KernelError(
                f"{path.name}: {error}" if isinstance(error, OSError) else str(error)
            ) from error

    async def write(self, goal: Goal, *, enabled: bool, error: str) -> None:
        """Write on the pod how it is, if it is still there and does not say so. Raises StoreError, OSError."""

        def run() -> None:
            self._writer.write(goal, enabled=enabled, error=error)

        try:
            await trio.to_thread.run_sync(run, limiter=self._writers)
        except NotFound:
            log.debug("%s is gone, nothing is written on it", goal.pod)


class Keeper:
    """Brings one pod to its goal and keeps it there. Ends only by cancellation.

    `joined`: it is redirected and ztunnel serves it. `at_rest`: nothing is left to be done for its goal.
    `failure`: why the last try failed, "" if it did not.
    `took`: seconds that the last steps into the mesh took, by their names ("rules", "ztunnel").
    """

    def __init__(self, node: Node, goal: Goal) -> None:
        self.goal = goal
        self.joined = False
        self.at_rest = False
        self.failure = ""
        self.took: dict[str, float] = {}
        self._starting = False  # none of its programs runs before it has joined
        self._node = node
        self._changed = trio.Event()
        self._woken = trio.Event()
        self._step: trio.CancelScope | None = None
        self._reported = ""
        self._poll = node.places.first_pause
        self._drain_poll = FIRST_DRAIN_POLL

    def aim(self, goal: Goal) -> None:
        """Go for this goal from now on."""
        before, self.goal = self.goal, goal
        if not goal.same_work(before):
            self.at_rest = False
            if self._step is not None:
                self._step.cancel()
            self._woken.set()
        elif (goal.enabled, goal.error, goal.addresses) != (before.enabled, before.error, before.addresses):
            self._poll = self._node.places.first_pause
            self._woken.set()

    def wake(self) -> None:
        """Look at everything again, now."""
        self._woken.set()

    def anew(self) -> None:
        """The pod has another network than before, and nothing runs in it yet: do everything again, now.

        That its probes pass is seen to by the caller, who knows its addresses.
        """
        self._starting = True
        self.took = {}
        self.joined = self.at_rest = False
        self.failure = ""
        if self._step is not None:
            self._step.cancel()
        self._woken.set()

    async def changed(self) -> None:
        """Until `joined`, `at_rest` or `failure` may have changed, or another try has failed."""
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def end(self) -> None:
        """It is kept no longer: who waits for it need not wait on."""
        self.joined = False
        self.at_rest = True
        self.failure = "it is gone"
        self._notify()

    async def cut(self) -> None:
        """Take the rules out now, whatever connections need them. Errors are logged."""
        goal = self.goal
        try:
            path = await self._node.namespace(goal)
            if path is not None:
                await self._node.in_kernel(path, lambda namespace: rules.remove(namespace, goal.settings))
        except KernelError as error:
            log.error("%s: %s", goal.pod, error)
        await self._node.observer.left(goal.uid)

    async def run(self) -> None:
        """Until cancelled."""
        retry = FIRST_RETRY
        while True:
            self._woken = trio.Event()
            pause = 0.0
            with trio.CancelScope() as self._step:
                try:
                    pause = await (self._join() if self.goal.joined else self._leave())
                    retry = FIRST_RETRY
                    self._reported = self.failure = ""
                    self.at_rest = pause == float("inf")
                except (KernelError, ZdsError, StoreError, OSError) as error:
                    self.at_rest = False
                    self.joined = self.joined and isinstance(error, StoreError)
                    self.failure = str(error)
                    self._notify()
                    await self._report(error)
                    pause = retry
                    retry = min(retry * 2, LAST_RETRY)
            self._step = None
            self._notify()
            with trio.move_on_after(pause):
                await self._woken.wait()

    async def _join(self) -> float:
        goal = self.goal
        self._drain_poll = FIRST_DRAIN_POLL
        path = await self._node.namespace(goal)
        if path is None:
            self.joined = False
            pause, self._poll = self._poll, min(self._poll * 2, self._node.places.last_pause)
            return pause
        self._poll = self._node.places.first_pause
        if not self._starting:
            await self._node.observer.entering(goal)
        was_in = self.joined
        if self._starting:
            await _at_once(partial(self._redirect, goal, path), partial(self._hand_over, goal, path))
            self._starting = False
        elif goal.started and not goal.enabled:
            await self._hand_over(goal, path)
            await self._redirect(goal, path)
        else:
            await self._redirect(goal, path)
            await self._hand_over(goal, path)
        if was_in and self._node.check_listeners:
            await self._check_listeners(goal, path)
        if not was_in:
            self.joined = True
            self._node.observer.joined(goal)
            self._notify()
        if not goal.enabled:
            log.info("%s is in the mesh", goal.pod, extra={"fields": {"uid": goal.uid}})
        if goal.problems and goal.problems != goal.error:
            log.warning("%s: %s", goal.pod, goal.problems, extra={"fields": {"uid": goal.uid}})
        await self._write(enabled=True, error=goal.problems)
        return float("inf")

    async def _hand_over(self, goal: Goal, path: Path) -> None:
        began = time.monotonic()
        await self._node.server.add(goal.uid, goal.info, path, patience=self._node.patience)
        self.took["ztunnel"] = time.monotonic() - began

    async def _redirect(self, goal: Goal, path: Path) -> None:
        def work(namespace: int) -> tuple[list[str], bool]:
            return rules.apply(namespace, goal.settings), has_ipv6(namespace)

        began = time.monotonic()
        changed, ipv6 = await self._node.in_kernel(path, work)
        self.took["rules"] = time.monotonic() - began
        if changed:
            was = [each if len(each) <= SHOWN else f"{each[:SHOWN]}..." for each in changed]
            fields = {"uid": goal.uid, "ipv6": ipv6, "was": was}
            log.info("%s is redirected", goal.pod, extra={"fields": fields})
            if goal.enabled and not self._starting:  # or it is written of an earlier sandbox
                self._node.observer.repaired(goal, "rules", changed)

    async def _check_listeners(self, goal: Goal, path: Path) -> None:
        """Have a ztunnel that says it serves the pod, and does not listen in it, take it anew. Raises ZdsError."""
        missing = await self._node.in_kernel(
            path, lambda namespace: missing_listeners(namespace, goal.settings)
        )
        if not missing:
            return
        ports = ", ".join(map(str, missing))
        log.warning("%s: ztunnel does not listen in it on %s; handing it over again", goal.pod, ports)
        self.joined = False
        await self._node.server.delete(goal.uid)
        await self._hand_over(goal, path)
        self.joined = True
        self._node.observer.repaired(goal, "listeners", [f"no listener on {ports}"])

    async def _leave(self) -> float:
        goal = self.goal
        self.joined = False
        path = await self._namespace_left(goal)
        if goal.ended:
            # Nobody in it is served any more. What is written on it next is what its network waits for: the other ends
            # have been told by then.
            await self._node.server.delete(goal.uid)
        try:
            await self._write(enabled=False)
        except (StoreError, OSError) as error:
            if not self._node.leaving:
                raise
            log.warning("%s: cannot write on it: %s", goal.pod, error)
        if goal.removed:
            return await self._is_out(goal)
        state = State.ABSENT
        if path is not None:
            state = await self._node.in_kernel(path, lambda namespace: rules.state(namespace, goal.settings))
        if path is None or state is State.ABSENT:
            await self._node.server.delete(goal.uid)
            return await self._is_out(goal)
        if state is not State.DRAINED:
            await self._node.in_kernel(path, lambda namespace: rules.drain(namespace, goal.settings))
            log.info("%s is redirected no longer", goal.pod, extra={"fields": {"uid": goal.uid}})
            if not goal.ended:
                await trio.sleep(self._node.grace)
        await self._node.server.delete(goal.uid)
        if await self._node.in_kernel(path, lambda namespace: proxy_connections(namespace, goal.settings)):
            pause, self._drain_poll = self._drain_poll, min(self._drain_poll * 2, LAST_DRAIN_POLL)
            return pause
        await self._node.in_kernel(path, lambda namespace: rules.remove(namespace, goal.settings))
        log.info("%s is out of the mesh", goal.pod, extra={"fields": {"uid": goal.uid}})
        return await self._is_out(goal)

    async def _namespace_left(self, goal: Goal) -> Path | None:
        """The namespace of a pod that shall be outside; one that cannot be told has nothing of ours that is known."""
        try:
            return await self._node.namespace(goal)
        except KernelError as error:
            log.debug("%s: %s", goal.pod, error)
            return None

    async def _is_out(self, goal: Goal) -> float:
        await self._node.observer.left(goal.uid)
        return float("inf")

    async def _report(self, error: Exception) -> None:
        """Say what is wrong, in the log (once, while it stays the same) and on the pod."""
        message = str(error)
        if message != self._reported:
            log.error(
                "%s: %s; trying again", self.goal.pod, message, extra={"fields": {"uid": self.goal.uid}}
            )
            self._reported = message
            self._node.observer.failed(self.goal, message)
        # Where only ztunnel does not answer the redirection holds: what is not carried is refused, not let through.
        enabled = self.goal.joined and self.goal.enabled and isinstance(error, ZdsError)
        try:
            await self._write(enabled=enabled, error=message)
        except (StoreError, OSError) as failure:
            log.error("%s: cannot write on it: %s", self.goal.pod, failure)

    async def _write(self, *, enabled: bool, error: str = "") -> None:
        await self._node.write(self.goal, enabled=enabled, error=error)
        self.goal = self.goal._replace(enabled=enabled, error=error)


async def _at_once(*steps: Callable[[], Awaitable[None]]) -> None:
    """Do all of them, beside one another. Raises what the first that fails raises; the others are ended then."""
    failures: list[KernelError | ZdsError] = []

    async def one(step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except (KernelError, ZdsError) as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for step in steps:
            nursery.start_soon(one, step)
    if failures:
        raise failures[0]
