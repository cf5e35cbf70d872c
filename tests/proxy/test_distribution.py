"""What the control process tells its workers of policies: what concerns the node's pods, once, and what changed."""

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from ztunnel.mesh.model import Workload
from ztunnel.mesh.policy import Action, Authorization, PolicyScope, Rule
from ztunnel.proxy import messages
from ztunnel.proxy.distribution import SETTLE, SLICE, PolicyDistribution
from ztunnel.telemetry.log import Logger


class Workers:
    """All workers of a node: what they were told, and what they hold by it."""

    def __init__(self, log: Path) -> None:
        self.workloads: dict[tuple[str, str], Workload] = {}
        self.said: list[messages.Message] = []
        self._log = log.open("wb")
        logger = Logger("info", json=True, fd=self._log.fileno())
        self.distribution = PolicyDistribution(
            logger, self.said.append, lambda *name: self.workloads.get(name)
        )

    def workload(self, name: str, *policies: str, namespace: str = "shop") -> None:
        """The control plane tells of a pod."""
        uid = f"Kubernetes//Pod/{namespace}/{name}"
        self.workloads[namespace, name] = Workload(uid=uid, name=name, namespace=namespace, policies=policies)
        self.distribution.workloads_changed()

    def heard(self) -> list[messages.Message]:
        """What was said since the last time; a change always ends with PoliciesSettled."""
        said, self.said[:] = list(self.said), []
        if any(not isinstance(one, messages.ForgetPolicies) for one in said):
            assert isinstance(said[-1], messages.PoliciesSettled)
        return said

    def holds(self, said: list[messages.Message]) -> dict[int, set[str] | str]:
        """The keys of the policies of each pod, or why it is closed, by what was said from the beginning."""
        groups: dict[int, dict[str, Authorization]] = {}
        pods: dict[int, messages.PodPolicies] = {}
        for one in said:
            if isinstance(one, messages.Policies):
                group = groups.setdefault(one.group, {})
                for key in one.dropped:
                    group.pop(key, None)
                group.update({policy.key: policy for policy in one.put})
            elif isinstance(one, messages.ForgetPolicies):
                groups.pop(one.group, None)
            elif isinstance(one, messages.PodPolicies):
                pods[one.pod] = one
        return {
            number: pod.closed or {key for group in pod.groups for key in groups.get(group, ())}
            for number, pod in pods.items()
        }

    def close(self) -> None:
        self._log.close()


@pytest.fixture
def workers(tmp_path: Path) -> Any:
    made = Workers(tmp_path / "log")
    yield made
    made.close()


def policy(key: str, scope: PolicyScope = PolicyScope.NAMESPACE, **fields: Any) -> Authorization:
    namespace, _, name = key.partition("/")
    values: dict[str, Any] = {"action": Action.DENY, "rules": (Rule(),)}
    return Authorization(name=name, namespace=namespace, scope=scope, **(values | fields))


def changes(*policies: Authorization, removed: tuple[str, ...] = ()) -> dict[str, Authorization | None]:
    return {one.key: one for one in policies} | dict.fromkeys(removed)


EVERYWHERE = policy("istio-system/all", PolicyScope.GLOBAL)
SHOP = policy("shop/ns")
OTHER = policy("other/ns")
CHOSEN = policy("shop/chosen", PolicyScope.WORKLOAD_SELECTOR)
UNUSED = policy("shop/unused", PolicyScope.WORKLOAD_SELECTOR)


async def test_each_pod_has_what_concerns_it_and_nothing_else_is_sent(workers: Workers) -> None:
    distribution = workers.distribution
    distribution.update(changes(EVERYWHERE, SHOP, OTHER, CHOSEN, UNUSED))
    assert workers.heard() == [] or all(isinstance(one, messages.PoliciesSettled) for one in workers.heard())
    workers.workload("web", "shop/chosen")
    workers.workload("db")
    distribution.add(1, "shop", "web")
    distribution.add(2, "shop", "db")
    distribution.add(3, "shop", "web")
    said = workers.heard()
    both = {"istio-system/all", "shop/ns"}
    assert workers.holds(said) == {1: {*both, "shop/chosen"}, 2: both, 3: {*both, "shop/chosen"}}
    sent = [one.key for message in said if isinstance(message, messages.Policies) for one in message.put]
    assert sorted(sent) == ["istio-system/all", "shop/chosen", "shop/ns"]
    # A new worker is told the same.
    again = list(distribution.introduce(frozenset({1, 2})))
    assert workers.holds(again) == {1: {*both, "shop/chosen"}, 2: both}


async def test_a_change_sends_what_changed(workers: Workers) -> None:
    distribution = workers.distribution
    distribution.update(changes(EVERYWHERE, SHOP, OTHER, CHOSEN))
    workers.workload("web", "shop/chosen")
    distribution.add(1, "shop", "web")
    said = workers.heard()

    def told(*policies: Authorization, removed: tuple[str, ...] = ()) -> list[messages.Message]:
        distribution.update(changes(*policies, removed=removed))
        heard = workers.heard()
        said.extend(heard)
        return heard

    assert told(SHOP) == []
    assert told(policy("other/ns", rules=())) == []
    (first, _) = told(policy("shop/ns", rules=()))
    assert isinstance(first, messages.Policies)
    assert ([one.key for one in first.put], first.dropped) == (["shop/ns"], ())
    # It becomes one for the whole mesh: out of one group, into another, in one change.
    told(policy("shop/ns", PolicyScope.GLOBAL))
    assert workers.holds(said) == {1: {"istio-system/all", "shop/ns", "shop/chosen"}}
    # One that is listed belongs to who lists it, whatever its scope.
    told(policy("shop/chosen", PolicyScope.GLOBAL))
    assert workers.holds(said) == {1: {"istio-system/all", "shop/ns", "shop/chosen"}}
    told(removed=("shop/ns", "shop/chosen", "istio-system/all"))
    assert workers.holds(said) == {1: set()}


async def test_groups_that_concern_nobody_are_forgotten(workers: Workers) -> None:
    distribution = workers.distribution
    distribution.update(changes(EVERYWHERE, SHOP, CHOSEN))
    workers.workload("web", "shop/chosen")
    distribution.add(1, "shop", "web")
    workers.heard()
    workers.workload("web")
    said = workers.heard()
    assert sum(isinstance(one, messages.ForgetPolicies) for one in said) == 1
    distribution.remove(1)
    assert [type(one) for one in workers.heard()] == [messages.ForgetPolicies] * 2
    assert list(distribution.introduce(frozenset())) == [messages.PoliciesSettled()]
    distribution.update(changes(policy("shop/ns", rules=()), removed=("shop/chosen",)))
    assert workers.heard() == []
    assert not distribution._groups
    assert not distribution._listing
    assert not distribution._removed


async def test_many_policies_are_several_messages(workers: Workers) -> None:
    distribution = workers.distribution
    distribution.update({})
    workers.workload("web")
    distribution.add(1, "shop", "web")
    workers.heard()
    distribution.update(changes(*(policy(f"shop/p{number}") for number in range(2 * SLICE + 1))))
    said = workers.heard()
    sizes = [len(one.put) for one in said if isinstance(one, messages.Policies)]
    assert sizes == [SLICE, SLICE, 1]


async def test_a_pod_waits_for_what_is_not_known_and_is_closed_when_it_does_not_come(
    workers: Workers, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    distribution = workers.distribution
    nursery.start_soon(distribution.run)
    distribution.add(1, "shop", "web")
    assert workers.heard() == []
    await trio.sleep(2 * SETTLE)
    said = workers.heard()
    assert workers.holds(said) == {1: "the control plane has not sent the policies yet"}
    distribution.update({})
    said += workers.heard()
    assert workers.holds(said) == {1: "the control plane has not told of the workload shop/web yet"}
    workers.workload("web")
    said += workers.heard()
    assert workers.holds(said) == {1: set()}
    # A policy that it lists is on its way: it goes on with what it had, for a while.
    workers.workload("web", "shop/chosen")
    await trio.sleep(SETTLE / 2)
    assert workers.heard() == []
    distribution.update(changes(CHOSEN))
    said += workers.heard()
    assert workers.holds(said) == {1: {"shop/chosen"}}
    # Another one that does not come.
    workers.workload("web", "shop/chosen", "shop/late")
    await trio.sleep(2 * SETTLE)
    said += workers.heard()
    told = "shop/late: the workload lists it, and the control plane has not sent it yet"
    assert workers.holds(said) == {1: told}
    (shown,) = distribution.describe()
    assert (shown["lacks"], shown["closed"]) == (told, True)
    distribution.update(changes(policy("shop/late", PolicyScope.WORKLOAD_SELECTOR)))
    said += workers.heard()
    assert workers.holds(said) == {1: {"shop/chosen", "shop/late"}}


async def test_a_policy_that_was_removed_is_not_waited_for(
    workers: Workers, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    distribution = workers.distribution
    nursery.start_soon(distribution.run)
    distribution.update(changes(CHOSEN))
    workers.workload("web", "shop/chosen")
    distribution.add(1, "shop", "web")
    said = workers.heard()
    distribution.update(changes(removed=("shop/chosen",)))
    await trio.sleep(2 * SETTLE)
    said += workers.heard()
    assert workers.holds(said) == {1: set()}
    # The workload lists it no more: nothing is left of it. Were it listed again, it would be waited for again.
    workers.workload("web")
    assert not distribution._removed
    workers.workload("web", "shop/chosen")
    await trio.sleep(2 * SETTLE)
    said += workers.heard()
    assert "shop/chosen" in str(workers.holds(said)[1])


async def test_a_pod_that_the_control_plane_forgets_keeps_its_policies(workers: Workers) -> None:
    """It goes, and its last connections are still judged."""
    distribution = workers.distribution
    distribution.update(changes(SHOP))
    workers.workload("web")
    distribution.add(1, "shop", "web")
    said = workers.heard()
    workers.workloads.clear()
    distribution.workloads_changed()
    said += workers.heard()
    assert workers.holds(said) == {1: {"shop/ns"}}
    distribution.update(changes(policy("shop/new")))
    said += workers.heard()
    assert workers.holds(said) == {1: {"shop/ns", "shop/new"}}
