"""The worker's side of policy: judges connections to its pods, and ends those that a change no longer allows.

Rule: what is not known denies. A pod is served only once its policies are known; a change takes effect as a whole; and
what cannot be judged is refused.

Who talks to whom repeats, so a judgement is kept, with how often it was asked for: a connection costs a look-up of
0.4 us, and what was judged lately is what `/debug/connections/recent` shows.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

from ztunnel.mesh.model import packed_ip
from ztunnel.mesh.policy import Authorization, Connection, Verdict
from ztunnel.mesh.policy_atoms import Atoms
from ztunnel.mesh.policy_index import PolicyIndex, judge
from ztunnel.proxy import messages
from ztunnel.proxy.errors import Denied, ProxyError

if TYPE_CHECKING:
    from ztunnel.proxy.context import Context, Pod

MOST: Final = 5000  # judgements that a worker keeps
MOST_FORMER: Final = 1000  # judgements kept that a change has made others of

STEP: Final = 10  # policies of ten rules: 2 ms

Change = list[messages.Policies | messages.ForgetPolicies | messages.PodPolicies]

Facts = tuple[str, str, str, int]
"""Who connects, from where, to what: SPIFFE id ("" for none), source and destination address, port."""


class Subject(Protocol):
    """What policies are for: a pod; at a waypoint, a service behind it."""

    @property
    def number(self) -> int:
        """Under which the control process tells of its policies."""

    @property
    def namespace(self) -> str: ...

    @property
    def name(self) -> str: ...


class Judged:
    """A connection that policies may forbid, also after it was allowed."""

    __slots__ = ()

    def facts(self) -> Facts | None:
        """What policies look at; None where that is not known yet."""
        raise NotImplementedError

    def fail(self, error: ProxyError) -> None:
        """End now."""
        raise NotImplementedError


class Judgement:
    """What the policies say of connections that are the same to them, and how many there were."""

    __slots__ = ("count", "last", "pod", "reason", "rehearsal", "revision", "source_workload", "verdict")

    def __init__(self, pod: Subject, verdict: Verdict, reason: str, rehearsal: str, revision: int) -> None:
        self.pod = (pod.namespace, pod.name)
        self.verdict = verdict
        self.reason = reason
        self.rehearsal = rehearsal
        """What would be otherwise if the dry-run policies were enforced; mostly nothing."""
        self.revision = revision
        self.count = 0
        self.last = 0.0  # of the reactor's clock
        self.source_workload = ""

    def refuse(self, when: str = "policy rejection") -> Denied | None:
        """The error of a connection that is not allowed."""
        return None if self.verdict.allowed else Denied(f"connection closed due to {when}: {self.reason}")


class _PodState:
    """The policies of one pod: of these groups; or, where they are not known, why not."""

    __slots__ = ("closed", "groups")

    def __init__(self, groups: tuple[int, ...], closed: str) -> None:
        self.groups = groups
        self.closed = closed


class _Side:
    """The policies, by group. There are two of them: one judges while the other is brought up to date.

    So a change takes effect as a whole, and however large it is no byte waits for it.
    """

    def __init__(self) -> None:
        self.atoms = Atoms()
        self.groups: dict[int, PolicyIndex] = {}

    def apply(self, change: Change) -> Iterator[None]:
        """Bring a change in; yields after every STEP policies."""
        done = 0
        for one in change:
            if isinstance(one, messages.PodPolicies):
                continue
            index = self.groups.get(one.group)
            if index is None:
                index = self.groups[one.group] = PolicyIndex(self.atoms)
            if isinstance(one, messages.ForgetPolicies):
                del self.groups[one.group]
                dropped: Iterable[str] = index.names()
                put: Iterable[Authorization] = ()
            else:
                dropped, put = one.dropped, one.put
            for key in dropped:
                index.drop(key)
                done += 1
                if done % STEP == 0:
                    yield
            for policy in put:
                index.put(policy)
                done += 1
                if done % STEP == 0:
                    yield


class Enforcement:
    """A worker's policies, the judgements it has made, and the changes that are on their way."""

    def __init__(self, context: "Context", ready: Callable[["Pod"], None]) -> None:
        """`ready(pod)` is called once something is known of a pod that is there already."""
        self._context = context
        self._ready = ready
        self._side, self._spare = _Side(), _Side()
        self._pods: dict[int, _PodState] = {}
        self._coming: Change = []
        self._changes: deque[Change] = deque()
        self._work: Iterator[None] | None = None
        self._defect = ""
        self._revision = 0
        self._judgements: dict[tuple[int, str, str, str, int], Judgement] = {}
        self._former: deque[tuple[Facts, Judgement]] = deque(maxlen=MOST_FORMER)

    # What the control process says.

    def take(self, message: messages.Policies | messages.ForgetPolicies | messages.PodPolicies) -> None:
        """A part of a change."""
        self._coming.append(message)

    def settle(self) -> None:
        """The change is complete. A small one takes effect now, a large one some turns of the reactor later."""
        self._changes.append(self._coming)
        self._coming = []
        if self._work is None:
            self._work = self._apply()
            self._step()

    def _step(self) -> None:
        """A turn's part of the work."""
        if self._work is not None:
            try:
                next(self._work)
            except StopIteration:
                self._work = None
            except Exception as defect:
                # Nobody can say any more what the policies are.
                self._work = None
                self._defect = f"a change of the policies failed: {type(defect).__name__}: {defect}"
                self._revision += 1
                raise
            else:
                self._context.reactor.again(self._step)

    def _apply(self) -> Iterator[None]:
        """Let the changes take effect, one after the other; yields where others should have their turn."""
        while self._changes:
            change = self._changes.popleft()
            yield from self._spare.apply(change)
            self._side, self._spare = self._spare, self._side
            self._take_effect(change)
            yield from self._spare.apply(change)

    def _take_effect(self, change: Change) -> None:
        """The policies are other ones now, for open connections too."""
        pods = {
            one.pod: _PodState(one.groups, one.closed)
            for one in change
            if isinstance(one, messages.PodPolicies)
        }
        groups = {one.group for one in change if isinstance(one, messages.Policies)}
        new = [number for number in pods if number not in self._pods]
        self._pods |= pods
        self._revision += 1
        context = self._context
        for number in new:
            if number in context.pods:
                self._ready(context.pods[number])
        self.look_again(
            lambda number: (
                number in pods or (number in self._pods and not groups.isdisjoint(self._pods[number].groups))
            )
        )

    def look_again(self, concerned: Callable[[int], bool]) -> None:
        """Judge the open connections to the subjects of these numbers by what the policies are now."""
        for pod in tuple(self._context.pods.values()):
            state = self._pods.get(pod.number)
            if state is not None and concerned(pod.number):
                self._judge_again(pod, state)

    def still_allowed(self, subject: Subject, facts: Facts) -> Denied | None:
        """The error of an open connection that a change no longer allows; none while policies are not known."""
        state = self._pods.get(subject.number)
        if state is None or state.closed or self._defect:
            return None
        return self._judgement(subject, facts).refuse("policy change")

    def _judge_again(self, pod: "Pod", state: _PodState) -> None:
        """End what is no longer allowed. While policies are not known nobody new comes in, and nobody is sent out."""
        if state.closed or self._defect:
            return
        guard = self._context.reactor.guard
        for one in tuple(pod.connections):
            if isinstance(one, Judged):
                facts = one.facts()
                refusal = self._judgement(pod, facts).refuse("policy change") if facts is not None else None
                if refusal is not None:
                    guard(one.fail, refusal)

    # Pods.

    def knows(self, number: int) -> bool:
        """Whether a pod may be served: its policies are known, or why it is closed."""
        return number in self._pods

    def forget(self, pod: "Pod") -> None:
        """The pod and its connections are gone."""
        self._pods.pop(pod.number, None)

    # Connections.

    def judge(self, pod: Subject, identity: str, source: str, address: str, port: int) -> Judgement:
        """Whether a connection may be that begins now, from `identity` ("" for none) at the address `source`."""
        judgement = self._judgements.get((pod.number, identity, source, address, port))
        if judgement is None or judgement.revision != self._revision:
            judgement = self._judgement(pod, (identity, source, address, port))
        judgement.count += 1
        judgement.last = self._context.reactor.now
        return judgement

    def _judgement(self, pod: Subject, facts: Facts) -> Judgement:
        """The judgement of connections like this one, made if there is none or policies changed since."""
        judgements = self._judgements
        key = (pod.number, *facts)
        known = judgements.get(key)
        if known is not None and known.revision == self._revision:
            return known
        verdict, reason, rehearsal = self._decide(pod, facts)
        if known is not None:
            if (known.verdict, known.reason, known.rehearsal) == (verdict, reason, rehearsal):
                known.revision = self._revision
                return known
            if known.count:
                self._former.append((facts, known))
        elif len(judgements) >= MOST:
            del judgements[next(iter(judgements))]
        judgement = judgements[key] = Judgement(pod, verdict, reason, rehearsal, self._revision)
        return judgement

    def _decide(self, pod: Subject, facts: Facts) -> tuple[Verdict, str, str]:
        state = self._pods.get(pod.number)
        closed = self._defect or ("its policies are not known" if state is None else state.closed)
        if state is None or closed:
            return Verdict(False), closed, ""
        identity, source, address, port = facts
        try:
            connection = Connection.of(identity, packed_ip(source), packed_ip(address), port)
        except (OSError, ValueError) as error:
            return Verdict(False), f"it cannot be judged: {error}", ""
        # A group without policies has no index.
        known = self._side.groups
        indexes = [known[number] for number in state.groups if number in known]
        verdict, rehearsed = judge(indexes, connection)
        rehearsal = ""
        if rehearsed is not None and rehearsed != verdict:
            rehearsal = f"would be {'allowed' if rehearsed.allowed else 'refused'}: {rehearsed.reason}"
        return verdict, verdict.reason, rehearsal

    def recent(self) -> Iterator[dict[str, Any]]:
        """What was judged lately; see admin/policies.py for the fields."""
        wall = time.time() - self._context.reactor.now
        kept = [(key[1:], one) for key, one in self._judgements.items()]
        yield from _shown([*self._former, *kept], wall)


def _shown(judged: Iterable[tuple[Facts, Judgement]], wall: float) -> Iterator[dict[str, Any]]:
    for (identity, source, address, port), one in judged:
        if one.count:
            yield {
                "time": round(wall + one.last, 3),
                "count": one.count,
                "direction": "inbound",
                "src_identity": identity,
                "src_addr": source,
                "src_workload": one.source_workload,
                "dst_addr": address,
                "dst_port": port,
                "dst_workload": one.pod[1],
                "dst_namespace": one.pod[0],
                "verdict": "allowed" if one.verdict.allowed else "denied",
                "policy": one.verdict.policy,
                "rule": one.verdict.rule,
                "reason": one.reason,
                "dry_run": one.rehearsal,
            }
