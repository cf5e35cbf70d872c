"""What the status of a policy says: what of it node proxies enforce, and what not. Pure functions.

The condition is ZtunnelAccepted, as Istio's control plane writes it: "True" if everything that is written is
enforced, else "False" with the reason.
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ztunnel.controlplane.policies import enforced_rules, is_sent
from ztunnel.store.authorization import ALLOW, ANYTHING, DENY, Policy
from ztunnel.store.faults import Fault
from ztunnel.store.models import Condition, PolicyStatus
from ztunnel.store.peerauth import PeerPolicy

CONDITION: Final = "ZtunnelAccepted"
INVALID: Final = "Invalid"
"""The reason where a policy has faults."""
WAYPOINT_CONDITION: Final = "WaypointAccepted"
CONDITIONS: Final = (CONDITION, WAYPOINT_CONDITION)
"""Those that are written here: a policy has one of them."""
_FAULTS_TOLD = 3


class Finding(NamedTuple):
    """A condition before it has a time."""

    accepted: bool
    reason: str
    message: str
    type: str = CONDITION

    def told_by(self, status: PolicyStatus, generation: int) -> bool:
        """Whether the status says this already of this generation."""
        return any(
            (each.type, each.status, each.reason, each.message, each.observed_generation)
            == (self.type, "True" if self.accepted else "False", self.reason, self.message, generation)
            for each in status.conditions
        )

    def condition(self, status: PolicyStatus, now: str, generation: int) -> Condition:
        """The condition, with `now` (RFC 3339) as its time if its status differs from the one before."""
        word = "True" if self.accepted else "False"
        since = next(
            (
                each.last_transition_time
                for each in status.conditions
                if (each.type, each.status) == (self.type, word)
            ),
            now,
        )
        return Condition(
            type=self.type,
            status="True" if self.accepted else "False",
            reason=self.reason,
            message=self.message,
            last_transition_time=since,
            observed_generation=generation,
        )  # fmt: skip


def of_authorization(policy: Policy) -> Finding:
    """What is enforced of an AuthorizationPolicy."""
    errors = [fault for fault in policy.faults if fault.severity == "error"]
    if policy.targets:
        return _of_targeted(policy, errors)
    if not is_sent(policy):
        message = f"not enforced: ztunnel does not support the {policy.action} action"
        return Finding(False, "UnsupportedValue", message + _errors(errors))
    if errors:
        return Finding(False, INVALID, _extent(policy) + _errors(errors))
    if policy.http:
        message = (
            f"ztunnel does not support HTTP attributes (found: {', '.join(policy.http)}), a waypoint does. "
        )
        return Finding(False, "UnsupportedValue", message + _extent(policy))
    return Finding(True, "Accepted", _extent(policy))


def _of_targeted(policy: Policy, errors: Sequence[Fault]) -> Finding:
    """What waypoints enforce of a policy that targets them."""
    where = f"for the waypoint of {', '.join(policy.targets)}"
    if policy.action not in (ALLOW, DENY):
        message = f"not enforced: waypoints do not support the {policy.action} action ({where})"
        return Finding(False, "UnsupportedValue", message + _errors(errors), WAYPOINT_CONDITION)
    extent = f"{where}: {_extent(policy, 'the waypoint')}"
    if errors:
        return Finding(False, INVALID, extent + _errors(errors), WAYPOINT_CONDITION)
    if policy.http:
        message = f"waypoints of this version do not see HTTP (found: {', '.join(policy.http)}). "
        return Finding(False, "UnsupportedValue", message + extent, WAYPOINT_CONDITION)
    return Finding(True, "Accepted", extent, WAYPOINT_CONDITION)


def of_peer_authentication(policy: PeerPolicy, superseded_by: str = "") -> Finding:
    """What is enforced of a PeerAuthentication; `superseded_by` is an older one that counts instead."""
    errors = [fault for fault in policy.faults if fault.severity == "error"]
    if errors:
        return Finding(False, INVALID, "its workloads take no plaintext on any port" + _errors(errors))
    if superseded_by:
        return Finding(
            False, "Conflicted", f"not enforced: {superseded_by} is older and for the same workloads"
        )
    if policy.disables:
        message = "DISABLE is enforced as PERMISSIVE: plaintext is taken, and mutual TLS as well"
        return Finding(False, "UnsupportedValue", message)
    return Finding(True, "Accepted", "enforced by ztunnel")


def _extent(policy: Policy, by: str = "ztunnel") -> str:
    """Which of the rules are enforced."""
    done = "recorded but not enforced (dry run)" if policy.dry_run else f"enforced by {by}"
    numbers = enforced_rules(policy)
    if policy.action == ALLOW:
        left_out = [rule.number for rule in policy.rules if rule.number not in numbers]
        if not numbers:
            why = f"left out: {_rules(left_out)}" if left_out else "it has no rules"
            return f"{done} as an ALLOW policy that allows nothing ({why})"
        if left_out:
            return f"{done}: {_rules(numbers)}; left out, allowing nothing: {_rules(left_out)}"
        return f"{done}: all rules"
    if not policy.sound:
        return f"{done} as a DENY policy that denies everything"
    reduced = [rule for rule in policy.rules if not rule.complete]
    total = [rule.number for rule in reduced if all(ANYTHING in clause for clause in rule.clauses)]
    partial = [rule.number for rule in reduced if rule.number not in total]
    told = [f"denying everything: {_rules(total)}"] if total else []
    if partial:
        told.append(f"without what ztunnel cannot know, denying more than is written: {_rules(partial)}")
    if not policy.rules:
        return f"{done}: no rules, denies nothing"
    return f"{done}: all rules" + "".join(f"; {each}" for each in told)


def _rules(numbers: Iterable[object]) -> str:
    return ", ".join(f"rules[{number}]" for number in numbers)


def _errors(errors: Sequence[Fault]) -> str:
    if not errors:
        return ""
    told = "; ".join(str(fault) for fault in errors[:_FAULTS_TOLD])
    more = f"; and {len(errors) - _FAULTS_TOLD} more" if len(errors) > _FAULTS_TOLD else ""
    return f". {told}{more}"
