"""What the agent tells the cluster: annotations of pods, Events, and how the node is.

An API server that is away holds nothing up: Events wait in a short queue, of which the oldest are dropped.
"""

import logging
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, Literal

import trio

from cni.counting import Counters
from cni.goals import Goal
from cni.keeper import Observer
from cni.probes import HostProbes
from ztunnel.store.kube.api import Api, ApiError
from ztunnel.store.membership import (
    REDIRECTION_ANNOTATION,
    REDIRECTION_ENABLED,
    REDIRECTION_ERROR_ANNOTATION,
    asks_for_mesh,
    cannot_join,
)
from ztunnel.store.models import Namespace, Object, Pod

log = logging.getLogger(__name__)

MOST_WAITING: Final = 200  # Events
FAILED: Final = "RedirectionFailed"
UNSUPPORTED: Final = "RedirectionNotSupported"
REPAIRED: Final = "RedirectionRepaired"
INSTALL_FAILED: Final = "CNIInstallFailed"


class Annotations:
    """Writes on pods through the API server. To be used by one thread at a time."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._written: dict[str, tuple[bool, str]] = {}  # by uid

    def write(self, goal: Goal, *, enabled: bool, error: str) -> None:
        """The annotations of the pod of this uid, through its status: nothing else can be changed that way.

        Raises ApiError, but not where the pod is gone.
        """
        wanted = (enabled, error)
        if (goal.enabled, goal.error) == wanted and self._written.get(goal.uid, wanted) == wanted:
            return
        values = {
            REDIRECTION_ANNOTATION: REDIRECTION_ENABLED if enabled else None,
            REDIRECTION_ERROR_ANNOTATION: error or None,
        }
        # A uid in a patch is a condition: another pod of the same name is not touched.
        merge = {"metadata": {"uid": goal.uid, "annotations": values}}
        try:
            self._api.patch("v1", "Pod", goal.info.namespace, goal.info.name, merge, "status")
        except ApiError as failure:
            if failure.not_found or failure.conflict:
                log.debug("%s is gone, nothing is written on it", goal.pod)
                return
            raise
        self._written[goal.uid] = wanted

    def forget(self, uid: str) -> None:
        """The pod is no more."""
        self._written.pop(uid, None)


class Events:
    """Sends Events, one after the other."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._waiting: deque[tuple[dict[str, str], str, str, Literal["Normal", "Warning"]]] = deque(
            maxlen=MOST_WAITING
        )
        self._more = trio.Event()

    def say(
        self,
        about: dict[str, str],
        reason: str,
        message: str,
        *,
        kind: Literal["Normal", "Warning"] = "Warning",
    ) -> None:
        """Put an Event in the queue."""
        self._waiting.append((about, reason, message, kind))
        self._more.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._more.wait()
            self._more = trio.Event()
            while self._waiting:
                about, reason, message, kind = self._waiting.popleft()

                def send(
                    about: dict[str, str] = about,
                    reason: str = reason,
                    message: str = message,
                    kind: Literal["Normal", "Warning"] = kind,
                ) -> None:
                    self._api.event(about, reason=reason, message=message, type=kind)

                try:
                    await trio.to_thread.run_sync(send)
                except ApiError as error:
                    log.warning("Event %s on %s %s: %s", reason, about["kind"], about["name"], error)


def pod_reference(namespace: str, name: str, uid: str) -> dict[str, str]:
    """What an Event is about."""
    return {"apiVersion": "v1", "kind": "Pod", "namespace": namespace, "name": name, "uid": uid}


def _of(goal: Goal) -> dict[str, str]:
    return pod_reference(goal.info.namespace, goal.info.name, goal.uid)


class Reporter(Observer):
    """Hears of everything on the node, counts it, and tells the cluster what people have to know."""

    def __init__(
        self, events: Events, counters: Counters, probes: HostProbes, annotations: Annotations, node: str
    ) -> None:
        self._events = events
        self._counters = counters
        self._probes = probes
        self._annotations = annotations
        self._node = node
        self._unable: dict[str, Pod] = {}  # by uid: pods of the node that can never join
        self._told: set[str] = set()  # of those
        self._namespaces: dict[str, Namespace] = {}

    def heard(self, what: str, obj: Object) -> None:
        """Count it; tell of pods that shall be in the mesh, and never can."""
        self._counters.heard[{"added": "add", "modified": "update", "deleted": "delete"}.get(what, what)] += 1
        gone = what == "deleted"
        touched: Iterable[Pod] = ()
        if isinstance(obj, Namespace):
            if gone:
                self._namespaces.pop(obj.name, None)
            else:
                self._namespaces[obj.name] = obj
            touched = [pod for pod in self._unable.values() if pod.namespace == obj.name]
        elif isinstance(obj, Pod) and obj.spec.node_name == self._node:
            uid = obj.metadata.uid
            if gone:
                self._unable.pop(uid, None)
                self._told.discard(uid)
                self._annotations.forget(uid)
            elif cannot_join(obj):
                self._unable[uid] = obj
                touched = [obj]
        for pod in touched:
            self._tell_unable(pod)

    def _tell_unable(self, pod: Pod) -> None:
        uid = pod.metadata.uid
        if uid in self._told or not asks_for_mesh(pod, self._namespaces.get(pod.namespace)):
            return
        self._told.add(uid)
        why = cannot_join(pod)
        log.warning("%s stays outside the mesh: %s", pod.ref, why)
        self._events.say(
            pod_reference(pod.namespace, pod.name, uid), UNSUPPORTED, f"it stays outside the mesh: {why}"
        )

    def unable(self) -> list[tuple[Pod, str]]:
        """The node's pods that are asked into the mesh and never can be, and why."""
        return [
            (pod, cannot_join(pod))
            for pod in self._unable.values()
            if asks_for_mesh(pod, self._namespaces.get(pod.namespace))
        ]

    async def entering(self, goal: Goal) -> None:
        """Let its probes pass before anything is redirected."""
        await self._probes.admit(goal.uid, goal.addresses)

    async def left(self, uid: str) -> None:
        """Its probes need no help any more."""
        await self._probes.dismiss(uid)

    def repaired(self, goal: Goal, what: str, differences: list[str]) -> None:
        """Tell of a pod that was outside the mesh although everybody took it to be in it."""
        self._counters.repairs[what] += 1
        shown = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
        log.warning("%s: repaired: %s", goal.pod, shown)
        self._events.say(_of(goal), REPAIRED, f"its redirection was not in place and is again: {shown}")

    def failed(self, goal: Goal, message: str) -> None:
        """Tell of a pod that is not where it should be."""
        self._counters.failures += 1
        way = "join" if goal.joined else "leave"
        self._events.say(_of(goal), FAILED, f"it could not {way} the mesh: {message}")

    def install_failed(self, message: str) -> None:
        """Tell of a node on which the plugin cannot be put in place."""
        about: dict[str, Any] = {"apiVersion": "v1", "kind": "Node", "name": self._node}
        self._events.say(about, INSTALL_FAILED, message)
