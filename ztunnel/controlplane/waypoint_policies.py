"""AuthorizationPolicies that target waypoints, as far as they are about connections. Pure functions.

Rule: as for node proxies, what a waypoint cannot know closes: a rule of an ALLOW policy that asks for HTTP is left out,
one of a DENY policy is enforced without that and denies more.
"""

from collections import Counter
from typing import Final, NamedTuple

from ztunnel.controlplane import policies
from ztunnel.controlplane.claims import Owner
from ztunnel.controlplane.policies import policy_key
from ztunnel.controlplane.resources import WAYPOINT_POLICY_TYPE, Entry, entry
from ztunnel.controlplane.translate import service_hostname
from ztunnel.store.authorization import ALLOW, DENY, Policy
from ztunnel.store.gateways import WAYPOINT_CLASS
from ztunnel.wire import waypoint_pb2 as pb

GATEWAY: Final = "Gateway"
GATEWAY_CLASS: Final = "GatewayClass"
SERVICE: Final = "Service"
EVERY: Final = "*"
"""Instead of a Gateway's name: all waypoints of the namespace."""


class Target(NamedTuple):
    """What a policy is for: `name` of a Service is its hostname, `EVERY` that of a Gateway all of the namespace."""

    kind: str
    namespace: str
    name: str


class Targets:
    """How many policies that are enforced are for what: to know what must not be reached around its waypoint."""

    def __init__(self, root_namespace: str) -> None:
        self._root_namespace = root_namespace
        self._counts: Counter[Target] = Counter()

    def change(self, owner: Owner, old: Policy | None, new: Policy | None) -> set[Target]:
        """Take note of a policy as it is now (None: gone); the targets that got their first policy or lost the last."""
        before, after = _closing(owner, old), _closing(owner, new)
        moved = set()
        for target in before - after:
            self._counts[target] -= 1
            if not self._counts[target]:
                del self._counts[target]
                moved.add(target)
        for target in after - before:
            self._counts[target] += 1
            if self._counts[target] == 1:
                moved.add(target)
        return moved

    def concern(self, waypoint: Owner, service: Owner | None) -> bool:
        """Whether a policy is for this waypoint (there need not be one), or for this Service."""
        asked = [
            Target(GATEWAY, waypoint.namespace, waypoint.name),
            Target(GATEWAY, waypoint.namespace, EVERY),
            Target(GATEWAY_CLASS, self._root_namespace, WAYPOINT_CLASS),
        ]
        if service is not None:
            asked.append(Target(SERVICE, service.namespace, service_hostname(*service)))
        return any(target in self._counts for target in asked)


def is_sent(policy: Policy) -> bool:
    """Whether waypoints are to enforce the policy."""
    return policy.action in (ALLOW, DENY) and bool(policy.targets)


def policy_entry(owner: Owner, policy: Policy, root_namespace: str) -> Entry:
    """The resource of a policy that `is_sent`."""
    message = pb.Policy(
        authorization=policies.authorization(*owner, policy, root_namespace),
        targets=[pb.Target(**_target(text, owner.namespace)._asdict()) for text in policy.targets],
    )
    return entry(policy_key(*owner), message, WAYPOINT_POLICY_TYPE)


def _closing(owner: Owner, policy: Policy | None) -> set[Target]:
    if policy is None or policy.dry_run or not is_sent(policy):
        return set()
    return {_target(text, owner.namespace) for text in policy.targets}


def _target(text: str, namespace: str) -> Target:
    """The target that `store.authorization` reads as "Service reviews".

    Where that could not be read the policy is for every waypoint of its namespace: it keeps closed.
    """
    kind, _, name = text.partition(" ")
    if kind not in (GATEWAY, GATEWAY_CLASS, SERVICE, "ServiceEntry") or not name:
        kind, name = GATEWAY, EVERY
    return Target(kind, namespace, service_hostname(namespace, name) if kind == SERVICE else name)
