"""Policies and pods as objects, and what becomes of a connection under them.

The way is the mesh's own: the control plane's translation, the messages it would send, and the proxies' decoder and
evaluator. Only the answer to "which of the objects was it" is added.
"""

from collections.abc import Iterable
from typing import NamedTuple

from ztunnel.controlplane import policies as translation
from ztunnel.controlplane.registry import Registry
from ztunnel.controlplane.resources import Entry
from ztunnel.controlplane.translate import Settings
from ztunnel.mesh.policy import (
    Action,
    Authorization,
    Connection,
    PolicyScope,
    Verdict,
    applying,
    decide,
    first_match,
    precedence,
)
from ztunnel.store import authorization
from ztunnel.store.models import AuthorizationPolicy, Object, PeerAuthentication, Pod, reference
from ztunnel.wire.xds_pb2 import DeltaDiscoveryResponse
from ztunnel.xds.decode_policy import decode_authorization

KINDS: tuple[type[Object], ...] = (PeerAuthentication, AuthorizationPolicy, Pod)
"""The kinds of objects that a verdict depends on."""

SCOPES = {
    PolicyScope.GLOBAL: "mesh",
    PolicyScope.NAMESPACE: "namespace",
    PolicyScope.WORKLOAD_SELECTOR: "workload",
}


class Consulted(NamedTuple):
    """A policy that concerns the destination. `rule` is where in it ("rules[0]"), "" if the connection does not match.

    `object` is such as "AuthorizationPolicy default/reviews"; `effect` says for people what came of it.
    """

    object: str
    action: str
    scope: str
    dry_run: bool
    rule: str
    decides: bool
    effect: str


class Explanation(NamedTuple):
    """What becomes of a connection and why; `rehearsed` is what would if dry-run policies were enforced, if that is
    something else. Policies are in the order in which they are looked at."""

    allowed: bool
    reason: str
    policy: str
    rule: str
    rehearsed: str
    policies: tuple[Consulted, ...]


class PolicyModel:
    """Verdicts under these objects (others than KINDS are not looked at)."""

    def __init__(self, objects: Iterable[Object], root_namespace: str = "istio-system") -> None:
        self._registry = Registry(Settings(root_namespace=root_namespace))
        self._authorizations: dict[str, AuthorizationPolicy] = {}
        self._concerning: dict[tuple[str, str], list[Authorization]] = {}
        for obj in objects:
            if isinstance(obj, AuthorizationPolicy):
                self._authorizations[f"{obj.namespace}/{obj.name}"] = obj
            if isinstance(obj, AuthorizationPolicy | PeerAuthentication):
                self._registry.upsert(obj)
        self._policies = [
            _decoded(entry) for entry in self._registry.flush().policies.values() if entry is not None
        ]

    def allowed(self, pod: Pod, connection: Connection) -> Verdict:
        """The verdict on a connection to the pod."""
        return decide(self.concerning(pod), connection)

    def concerning(self, pod: Pod) -> list[Authorization]:
        """The policies that are looked at for a connection to the pod, in that order."""
        key = (pod.namespace, pod.name)
        if key not in self._concerning:
            names = self._registry.policies.names_of(pod)
            found = applying(self._policies, pod.namespace, names)
            self._concerning[key] = sorted(found, key=precedence)
        return self._concerning[key]

    def explain(self, pod: Pod, connection: Connection) -> Explanation:
        """The verdict on a connection to the pod, and what each policy has to do with it."""
        concerning = self.concerning(pod)
        verdict, rehearsed = decide(concerning, connection), decide(concerning, connection, with_dry_run=True)
        consulted = []
        for policy in concerning:
            index = first_match(policy, connection)
            decides = policy.key == verdict.policy
            consulted.append(
                Consulted(
                    self.object_of(policy.key, pod),
                    policy.action.name,
                    SCOPES[policy.scope],
                    policy.dry_run,
                    "" if index is None else self.rule_of(policy.key, index),
                    decides,
                    _effect(policy, index is not None, decides),
                )
            )
        return Explanation(
            verdict.allowed,
            self.reason(verdict, pod),
            self.object_of(verdict.policy, pod),
            self.rule_of(verdict.policy, verdict.rule),
            "" if rehearsed == verdict else self.reason(rehearsed, pod),
            tuple(consulted),
        )

    def reason(self, verdict: Verdict, pod: Pod) -> str:
        """A verdict in words that name objects as the user wrote them."""
        if not verdict.policy:
            return (
                "no policy forbids it" if verdict.allowed else "ALLOW policies concern it, and none allows it"
            )
        word = "allowed" if verdict.allowed else "denied"
        rule = self.rule_of(verdict.policy, verdict.rule)
        return f"{word} by {self.object_of(verdict.policy, pod)}{f', {rule}' if rule else ''}"

    def object_of(self, key: str, pod: Pod) -> str:
        """The object that a policy is made of, "" for none; of STRICT the PeerAuthentication that says so."""
        if not key:
            return ""
        namespace, _, name = key.partition("/")
        if name == translation.STATIC_STRICT:
            return f"{self._registry.policies.peer_of(pod)} (STRICT)"
        if name.startswith(translation.CONVERTED_PREFIX):
            name = name.removeprefix(translation.CONVERTED_PREFIX)
            return f"{reference(PeerAuthentication.KIND, namespace, name)} (STRICT)"
        return reference(AuthorizationPolicy.KIND, namespace, name)

    def rule_of(self, key: str, index: int) -> str:
        """Where in spec a rule of a policy is: "rules[0]"; "" for one that is written nowhere as such."""
        obj = self._authorizations.get(key)
        if obj is None or index < 0:
            return ""
        numbers = translation.enforced_rules(authorization.read(obj))
        return f"rules[{numbers[index]}]" if 0 <= index < len(numbers) and numbers[index] >= 0 else ""


def _decoded(entry: Entry) -> Authorization:
    (resource,) = DeltaDiscoveryResponse.FromString(entry.encoded).resources
    return decode_authorization(resource)


def _effect(policy: Authorization, matches: bool, decides: bool) -> str:
    if not matches:
        return "no match" if policy.rules else "has no rules"
    word = "denies" if policy.action is Action.DENY else "allows"
    if policy.dry_run:
        return f"dry run: {word}"
    return word if decides else f"{word} too"
