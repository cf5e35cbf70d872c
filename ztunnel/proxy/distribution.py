"""The control process's side of policy: which policies the workers need for the node's own pods, and what changed.

Rule: a worker gets only what concerns its pods, each policy once however many pods it concerns, and of a change what
changed. Policies are in groups: those of the whole mesh, those of a namespace, those that some pods list by name; a
group exists while a pod of this node is concerned, and a pod has one to three groups.

A pod whose policies are not all known is closed. Before anything is known of it its connections wait; once SETTLE
seconds have passed they are refused, with the reason. A pod that was served, and whose workload lists a policy that
has not come yet, goes on with the ones it had for SETTLE seconds: the policy is on its way in another message. A
policy that was there and was removed is no longer waited for, although workloads still list it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from ztunnel.mesh.model import Workload
from ztunnel.mesh.policy import Authorization, PolicyScope
from ztunnel.mesh.policy_store import PolicyChanges, PolicyStore
from ztunnel.proxy import messages
from ztunnel.telemetry.log import Logger

SETTLE: Final = 3.0  # seconds for what a pod's policies lack to come
SLICE: Final = 100  # policies in a message

GroupKey = str | tuple[str, ...]
"""A namespace, or the names of policies in order; no names: the policies of the whole mesh."""
_MESH: Final[GroupKey] = ()


@dataclass
class _Group:
    """Policies that the workers have, under a number; `pods` are those whom they concern."""

    number: int
    pods: set[int] = field(default_factory=set)


@dataclass
class _Pod:
    """One of the node's pods. `listed` are the policies that its workload lists, None while that is not known."""

    number: int
    namespace: str
    name: str
    since: float  # when its policies were last all known, or it came
    listed: tuple[str, ...] | None = None
    groups: tuple[GroupKey, ...] = ()
    told: messages.PodPolicies | None = None
    lacks: str = ""


class Distribution(Protocol):
    """Which policies the workers have: a node's, or a waypoint's."""

    @property
    def store(self) -> Any:
        """All policies."""

    def update(self, changes: PolicyChanges) -> None:
        """Take a complete change of the policies (of the first state: all of them)."""

    def workloads_changed(self) -> None:
        """What is known of the node's pods may have changed."""

    def add(self, number: int, namespace: str, name: str) -> None:
        """A pod, before the workers hear of it."""

    def remove(self, number: int) -> None:
        """The pod and the last of its connections are gone."""

    def introduce(self, pods: frozenset[int]) -> Iterator[messages.Message]:
        """What a new worker must be told before these pods."""

    async def run(self) -> None:
        """Look after it until cancelled."""

    def describe(self) -> Iterator[dict[str, object]]:
        """For the admin page."""


class PolicyDistribution:
    """All policies, and what the workers were told of them."""

    def __init__(
        self,
        logger: Logger,
        send: Callable[[messages.Message], object],
        workload: Callable[[str, str], Workload | None],
    ) -> None:
        """`send` reaches every worker that runs; `workload(namespace, name)` is what is known of a pod of the node."""
        self.store = PolicyStore()
        self._logger = logger
        self._send = send
        self._workload = workload
        self._known = False  # the first state of the policies has come
        self._pods: dict[int, _Pod] = {}
        self._groups: dict[GroupKey, _Group] = {}
        self._listing: dict[str, set[GroupKey]] = {}  # by policy: the groups of policies by name that have it
        self._removed: set[str] = set()  # policies that were there, and that workloads may list still
        self._next = 1

    # What changes.

    def update(self, changes: PolicyChanges) -> None:
        """Take a complete change of the policies (of the first state: all of them)."""
        self._known = True
        changed: dict[GroupKey, tuple[list[Authorization], list[str]]] = {}
        for key, policy in changes.items():
            old = self.store.put(key, policy)
            if old == policy:
                continue
            if policy is None:
                self._removed.add(key)
            else:
                self._removed.discard(key)
            targets = self._targets(key, policy)
            for target in targets | self._targets(key, old):
                if target in self._groups:
                    put, dropped = changed.setdefault(target, ([], []))
                    if policy is not None and target in targets:
                        put.append(policy)
                    else:
                        dropped.append(key)
        for target, (put, dropped) in changed.items():
            for message in _slices(self._groups[target].number, put, dropped):
                self._send(message)
        told = self._settle_pods()
        if changed or told:
            self._send(messages.PoliciesSettled())

    def workloads_changed(self) -> None:
        """What is known of the node's pods may have changed."""
        if self._settle_pods():
            self._send(messages.PoliciesSettled())

    def add(self, number: int, namespace: str, name: str) -> None:
        """A pod of the node, before the workers hear of it."""
        self._pods[number] = _Pod(number, namespace, name, trio.current_time())
        self.workloads_changed()

    def remove(self, number: int) -> None:
        """The pod and the last of its connections are gone."""
        pod = self._pods.pop(number, None)
        if pod is not None:
            self._regroup(pod, ())

    def introduce(self, pods: frozenset[int]) -> Iterator[messages.Message]:
        """What a new worker must be told before these pods."""
        for key, group in self._groups.items():
            yield from _slices(group.number, list(self._members(key)), [])
        for pod in self._pods.values():
            if pod.number in pods and pod.told is not None:
                yield pod.told
        yield messages.PoliciesSettled()

    async def run(self) -> None:
        """Close the pods whose policies don't come, until cancelled."""
        while True:
            await trio.sleep(SETTLE / 4)
            if any(pod.lacks for pod in self._pods.values()):
                self.workloads_changed()

    def describe(self) -> Iterator[dict[str, object]]:
        """The node's pods, for the admin page: the policies that concern each, and what it lacks."""
        for pod in tuple(self._pods.values()):
            policies = [policy.key for key in pod.groups for policy in self._members(key)]
            yield {
                "namespace": pod.namespace,
                "name": pod.name,
                "policies": policies,
                "lacks": pod.lacks,
                "closed": pod.told is None or bool(pod.told.closed),
            }

    # Pods and their groups.

    def _settle_pods(self) -> bool:
        """Tell the workers of the pods that have other policies now; whether there were any."""
        told = False
        now = trio.current_time()
        for pod in self._pods.values():
            told |= self._settle(pod, now)
        if self._removed:
            self._removed &= {name for pod in self._pods.values() for name in pod.listed or ()}
        return told

    def _settle(self, pod: _Pod, now: float) -> bool:
        workload = self._workload(pod.namespace, pod.name)
        if workload is not None:
            pod.listed = workload.policies
        pod.lacks = self._lack(pod)
        if not pod.lacks:
            pod.since = now
            listed = pod.listed or ()
            groups: tuple[GroupKey, ...] = (_MESH, pod.namespace)
            if listed:
                groups += (tuple(sorted(set(listed))),)
            self._regroup(pod, groups)
            message = messages.PodPolicies(pod.number, tuple(self._groups[key].number for key in groups))
        elif now - pod.since < SETTLE:
            return False
        else:
            self._regroup(pod, ())
            message = messages.PodPolicies(pod.number, (), pod.lacks)
        if message == pod.told:
            return False
        if message.closed:
            # Where it was served before that is news; a new pod may be on its way to the control plane still.
            log = self._logger.info if pod.told is None else self._logger.warn
            log(
                "policy", "a pod is closed: its policies are not known",
                pod=f"{pod.namespace}/{pod.name}", reason=pod.lacks,
            )  # fmt: skip
        pod.told = message
        self._send(message)
        return True

    def _lack(self, pod: _Pod) -> str:
        """What of the pod's policies is not known; empty if all are."""
        if not self._known:
            return "the control plane has not sent the policies yet"
        if pod.listed is None:
            return f"the control plane has not told of the workload {pod.namespace}/{pod.name} yet"
        missing = [name for name in pod.listed if name not in self.store and name not in self._removed]
        if missing:
            return f"{', '.join(missing)}: the workload lists it, and the control plane has not sent it yet"
        return ""

    def _regroup(self, pod: _Pod, groups: tuple[GroupKey, ...]) -> None:
        """Let these be the pod's groups."""
        old, pod.groups = pod.groups, groups
        for key in groups:
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = _Group(self._next)
                self._next += 1
                for name in key if isinstance(key, tuple) else ():
                    self._listing.setdefault(name, set()).add(key)
                for message in _slices(group.number, list(self._members(key)), []):
                    self._send(message)
            group.pods.add(pod.number)
        for key in old:
            if key in groups:
                continue
            group = self._groups[key]
            group.pods.discard(pod.number)
            if not group.pods:
                del self._groups[key]
                for name in key if isinstance(key, tuple) else ():
                    listing = self._listing[name]
                    listing.discard(key)
                    if not listing:
                        del self._listing[name]
                self._send(messages.ForgetPolicies(group.number))

    def _members(self, key: GroupKey) -> Iterator[Authorization]:
        """The policies of a group."""
        if isinstance(key, str):
            yield from self.store.of_namespace(key).values()
        elif key == _MESH:
            yield from self.store.everywhere().values()
        else:
            for name in key:
                policy = self.store.get(name)
                if policy is not None:
                    yield policy

    def _targets(self, key: str, policy: Authorization | None) -> set[GroupKey]:
        """The groups that have, or would have, a policy of this name that is like this."""
        if policy is None:
            return set()
        targets = set(self._listing.get(key, ()))
        if policy.scope is PolicyScope.GLOBAL:
            targets.add(_MESH)
        elif policy.scope is PolicyScope.NAMESPACE:
            targets.add(policy.namespace)
        return targets


def _slices(group: int, put: list[Authorization], dropped: list[str]) -> Iterator[messages.Policies]:
    """The change of a group, in messages of bounded size."""
    yield messages.Policies(group, tuple(put[:SLICE]), tuple(dropped))
    for start in range(SLICE, len(put), SLICE):
        yield messages.Policies(group, tuple(put[start : start + SLICE]))
