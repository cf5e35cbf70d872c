"""A worker's judgements: kept, made anew when policies change, bounded, and never in favour of what is not known."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.proxy.ends import Bench
from ztunnel.mesh.policy import Action, Authorization, Clause, Match, MatchKind, Rule, StringMatch
from ztunnel.mesh.policy_index import PolicyIndex
from ztunnel.proxy import enforcement, messages
from ztunnel.proxy.context import Pod
from ztunnel.proxy.enforcement import Enforcement, Facts, Judged
from ztunnel.proxy.errors import Denied, ProxyError

WEB = "spiffe://cluster.local/ns/shop/sa/web"


class Open(Judged):
    """An open connection."""

    def __init__(self, *facts: Any) -> None:
        self._facts: Facts | None = facts if facts else None
        self.errors: list[ProxyError] = []

    def facts(self) -> Facts | None:
        return self._facts

    def fail(self, error: ProxyError) -> None:
        self.errors.append(error)


class Enforced:
    """An enforcement, a pod, and the ways of the control process."""

    def __init__(self, bench: Bench) -> None:
        self.pod = bench.pod()
        bench.context.pods[self.pod.number] = self.pod
        self.ready: list[Pod] = []
        self.open: Any = self.pod.connections
        self.enforcement = Enforcement(bench.context, self.ready.append)

    def change(self, *said: messages.Policies | messages.ForgetPolicies | messages.PodPolicies) -> None:
        for one in said:
            self.enforcement.take(one)
        self.enforcement.settle()

    def serve(self, *policies: Authorization) -> None:
        self.change(messages.Policies(7, policies), messages.PodPolicies(self.pod.number, (7,)))

    def allowed(
        self, identity: str = WEB, source: str = "10.1.2.3", to: str = "10.9.9.9", port: int = 80
    ) -> bool:
        return self.enforcement.judge(self.pod, identity, source, to, port).verdict.allowed


@pytest.fixture
def enforced(bench: Bench) -> Iterator[Enforced]:
    made = Enforced(bench)
    yield made
    made.pod.close()


def policy(name: str, action: Action, *ports: int, **fields: Any) -> Authorization:
    match = Match(destination_ports=ports)
    return Authorization(
        name=name, namespace="shop", action=action, rules=(Rule((Clause((match,)),)),), **fields
    )


STRICT = Authorization(
    name="strict",
    namespace="shop",
    action=Action.DENY,
    rules=(Rule((Clause((Match(not_principals=(StringMatch(MatchKind.PRESENCE),)),)),)),),
)


def test_nobody_comes_in_before_anything_is_known(enforced: Enforced) -> None:
    judgement = enforced.enforcement.judge(enforced.pod, WEB, "10.1.2.3", "10.9.9.9", 80)
    assert str(judgement.refuse()) == "connection closed due to policy rejection: its policies are not known"
    assert not enforced.enforcement.knows(enforced.pod.number)
    enforced.serve()
    assert enforced.enforcement.knows(enforced.pod.number)
    assert enforced.ready == [enforced.pod]
    assert enforced.allowed()
    enforced.serve()
    assert enforced.ready == [enforced.pod], "once is enough"
    enforced.enforcement.forget(enforced.pod)
    assert not enforced.enforcement.knows(enforced.pod.number)


def test_a_change_counts_when_it_is_complete(enforced: Enforced) -> None:
    enforced.serve(policy("p", Action.ALLOW, 80))
    assert enforced.allowed(port=80)
    assert not enforced.allowed(port=81)
    enforced.enforcement.take(messages.Policies(7, (), ("shop/p",)))
    enforced.enforcement.take(messages.Policies(7, (policy("q", Action.ALLOW, 81),)))
    assert enforced.allowed(port=80)
    enforced.enforcement.settle()
    assert not enforced.allowed(port=80)
    assert enforced.allowed(port=81)


def test_a_large_change_lets_others_have_their_turn_and_is_still_one(
    enforced: Enforced, bench: Bench
) -> None:
    enforced.serve(policy("open", Action.ALLOW, 80))
    many = [policy(f"p{number:03}", Action.ALLOW, 1000 + number) for number in range(10 * enforcement.STEP)]
    enforced.enforcement.take(messages.Policies(7, tuple(many), ("shop/open",)))
    enforced.enforcement.settle()
    enforced.change(messages.Policies(7, (policy("last", Action.ALLOW, 2000),)))
    turns = 0
    while enforced.allowed(port=80):
        assert not enforced.allowed(port=1000 + turns)
        bench.context.reactor.turn()
        turns += 1
    assert turns >= 10
    assert all(enforced.allowed(port=1000 + number) for number in range(len(many)))
    for _ in range(40):
        bench.context.reactor.turn()
    assert enforced.allowed(port=2000)
    for side in (enforced.enforcement._side, enforced.enforcement._spare):
        assert len(side.groups[7]) == len(many) + 1


def test_a_defect_keeps_closed(enforced: Enforced, monkeypatch: pytest.MonkeyPatch) -> None:
    enforced.serve()
    assert enforced.allowed()

    def defect(index: PolicyIndex, policy: Authorization) -> None:
        raise RuntimeError("not foreseen")

    monkeypatch.setattr(PolicyIndex, "put", defect)
    with pytest.raises(RuntimeError):
        enforced.serve(STRICT)
    judgement = enforced.enforcement.judge(enforced.pod, WEB, "10.1.2.3", "10.9.9.9", 80)
    assert "a change of the policies failed: RuntimeError: not foreseen" in str(judgement.refuse())


def test_open_connections_are_judged_again(enforced: Enforced) -> None:
    enforced.serve()
    plain, meshed, other = (Open(*one, "10.1.2.3", "10.9.9.9", 80) for one in (("",), (WEB,), (WEB,)))
    beginning = Open()
    enforced.open |= {plain, meshed, beginning}
    enforced.change(messages.Policies(8, (STRICT,)))
    assert plain.errors == [], "a group of other pods"
    enforced.serve(STRICT)
    (error,) = plain.errors
    assert isinstance(error, Denied)
    assert str(error) == "connection closed due to policy change: explicitly denied by: shop/strict (rule 0)"
    assert meshed.errors == beginning.errors == other.errors == []
    # Which groups are a pod's is a change too.
    enforced.change(messages.Policies(9, (policy("p", Action.DENY, 80),)))
    enforced.change(messages.PodPolicies(enforced.pod.number, (9,)))
    assert len(meshed.errors) == 1


def test_a_closed_pod_lets_nobody_in_and_throws_nobody_out(enforced: Enforced) -> None:
    enforced.serve()
    one = Open(WEB, "10.1.2.3", "10.9.9.9", 80)
    enforced.open.add(one)
    assert enforced.allowed()
    enforced.change(messages.PodPolicies(enforced.pod.number, (), "shop/late has not come"))
    assert one.errors == []
    judgement = enforced.enforcement.judge(enforced.pod, WEB, "10.1.2.3", "10.9.9.9", 80)
    assert str(judgement.refuse()) == "connection closed due to policy rejection: shop/late has not come"
    enforced.serve()
    assert enforced.allowed()


@pytest.mark.parametrize(
    ("identity", "source"),
    [("spiffe://x/what", "10.1.2.3"), (WEB, "nowhere"), (WEB, ""), ("web", "10.1.2.3")],
)
def test_what_cannot_be_judged_is_refused(enforced: Enforced, identity: str, source: str) -> None:
    enforced.serve()
    judgement = enforced.enforcement.judge(enforced.pod, identity, source, "10.9.9.9", 80)
    assert "it cannot be judged" in str(judgement.refuse())


def test_a_link_local_source_is_judged_without_its_scope(enforced: Enforced) -> None:
    enforced.serve(STRICT)
    assert enforced.allowed(source="fe80::1%eth0", to="fd00::9")


def test_groups_that_are_forgotten_leave_nothing(enforced: Enforced) -> None:
    enforced.serve(STRICT)
    enforced.change(messages.PodPolicies(enforced.pod.number, ()), messages.ForgetPolicies(7))
    assert enforced.allowed("")
    for side in (enforced.enforcement._side, enforced.enforcement._spare):
        assert not side.groups
        assert len(side.atoms) == 0
    enforced.change(messages.ForgetPolicies(7))


def test_what_was_judged_lately(enforced: Enforced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enforcement, "MOST", 3)
    enforced.serve(policy("later", Action.DENY, 80, dry_run=True))
    for _ in range(3):
        assert enforced.allowed()
    assert enforced.allowed(port=81)
    enforced.serve(policy("now", Action.DENY, 80), policy("later", Action.DENY, 81, dry_run=True))
    assert not enforced.allowed()
    found = list(enforced.enforcement.recent())
    told = [(one["dst_port"], one["count"], one["verdict"], one["policy"], one["dry_run"]) for one in found]
    refused = "would be refused: explicitly denied by: shop/later (rule 0)"
    assert told == [
        (80, 3, "allowed", "", refused),
        (80, 1, "denied", "shop/now", ""),
        (81, 1, "allowed", "", ""),
    ]
    assert (found[0]["src_identity"], found[0]["src_addr"]) == (WEB, "10.1.2.3")
    assert (found[0]["dst_namespace"], found[0]["dst_workload"]) == (
        enforced.pod.namespace,
        enforced.pod.name,
    )
    # The oldest ones make room.
    for port in range(90, 100):
        enforced.allowed(port=port)
    assert len(enforced.enforcement._judgements) == 3
