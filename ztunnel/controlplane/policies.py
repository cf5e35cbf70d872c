"""AuthorizationPolicy and PeerAuthentication into the Authorization messages that node proxies enforce.

Pure functions of their arguments. What the objects mean is read in ztunnel.store (authorization, peerauth); here is
which messages say it, in the shapes that Istio's control plane sends in ambient mode. Where these would let something
pass because a proxy cannot know an attribute, the message is stricter: a DENY rule of which nothing is left has no
clause and so matches everything (Istio sends an empty match, which its ztunnel never matches).
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from google.protobuf.empty_pb2 import Empty

from ztunnel.store.authorization import ALLOW, ANYTHING, DENY, Match, Policy
from ztunnel.store.peerauth import PERMISSIVE, STRICT, UNSET, PeerPolicy
from ztunnel.store.specs import Network
from ztunnel.wire import authorization_pb2 as pb

# '_' cannot be in the name of an object, so these are nobody's.
STATIC_STRICT: Final = "istio_converted_static_strict"
CONVERTED_PREFIX: Final = "converted_peer_authentication_"


class Modes(NamedTuple):
    """What a workload that no PeerAuthentication selects takes: STRICT or PERMISSIVE, by its namespace and the mesh."""

    namespace: str = UNSET
    mesh: str = UNSET

    @property
    def effective(self) -> str:
        """The mode that counts: UNSET inherits, and nothing at all is PERMISSIVE."""
        inherited = self.mesh if self.namespace == UNSET else self.namespace
        return PERMISSIVE if inherited == UNSET else inherited


def policy_key(namespace: str, name: str) -> str:
    """The resource name of a policy, and how workloads list it."""
    return f"{namespace}/{name}"


def is_sent(policy: Policy) -> bool:
    """Whether node proxies are to enforce the policy: not one for a waypoint or of an action they do not know."""
    return policy.action in (ALLOW, DENY) and not policy.targets


def is_selective(policy: Policy) -> bool:
    """Whether the policy is for some workloads, which then list it, and not for a whole namespace or the mesh."""
    return bool(policy.selector)


def enforced_rules(policy: Policy) -> tuple[int, ...]:
    """The places in spec.rules of the message's rules, in their order; -1 is one that stands for all of them."""
    if policy.action == DENY:
        return tuple(rule.number for rule in policy.rules) if policy.sound else (-1,)
    return tuple(rule.number for rule in policy.rules if rule.complete) if policy.sound else ()


def authorization(namespace: str, name: str, policy: Policy, root_namespace: str) -> pb.Authorization:
    """The message of an AuthorizationPolicy that `is_sent`."""
    scope = pb.WORKLOAD_SELECTOR
    if not is_selective(policy):
        scope = pb.GLOBAL if namespace == root_namespace else pb.NAMESPACE
    by_number = {rule.number: rule for rule in policy.rules}
    return pb.Authorization(
        name=name,
        namespace=namespace,
        scope=scope,
        action=pb.DENY if policy.action == DENY else pb.ALLOW,
        rules=[
            _rule(by_number[number].clauses) if number >= 0 else pb.Rule()
            for number in enforced_rules(policy)
        ],
        dry_run=policy.dry_run,
    )


def static_strict(root_namespace: str) -> pb.Authorization:
    """The policy that workloads list which take no plaintext at all."""
    return pb.Authorization(
        name=STATIC_STRICT,
        namespace=root_namespace,
        scope=pb.WORKLOAD_SELECTOR,
        action=pb.DENY,
        rules=[pb.Rule(clauses=[pb.Clause(matches=[_no_identity()])])],
    )


def port_exceptions(policy: PeerPolicy, modes: Modes) -> tuple[str, tuple[int, ...]]:
    """The mode of a selected workload's ports in general, and those ports that take the other one, sorted."""
    general = modes.effective if policy.mode == UNSET else policy.mode
    others = (port for port, mode in policy.ports.items() if mode not in (UNSET, general))
    return general, tuple(sorted(others))


def peer_authentication(
    namespace: str, name: str, policy: PeerPolicy, modes: Modes
) -> pb.Authorization | None:
    """The message of a PeerAuthentication with ports that are unlike the others; None if it has none."""
    general, others = port_exceptions(policy, modes)
    if not others:
        return None
    if general == STRICT:
        clauses = [
            pb.Clause(matches=[_no_identity()]),
            pb.Clause(matches=[pb.Match(not_destination_ports=others)]),
        ]
    else:
        match = _no_identity()
        match.destination_ports.extend(others)
        clauses = [pb.Clause(matches=[match])]
    return pb.Authorization(
        name=CONVERTED_PREFIX + name,
        namespace=namespace,
        scope=pb.WORKLOAD_SELECTOR,
        action=pb.DENY,
        rules=[pb.Rule(clauses=clauses)],
    )


def _no_identity() -> pb.Match:
    return pb.Match(not_principals=[pb.StringMatch(presence=Empty())])


def _rule(clauses: Iterable[tuple[Match, ...]]) -> pb.Rule:
    # An empty match would never match at a proxy; a clause that anything matches asks for nothing.
    asking = [clause for clause in clauses if ANYTHING not in clause]
    return pb.Rule(clauses=[pb.Clause(matches=[_match(match) for match in clause]) for clause in asking])


def _match(match: Match) -> pb.Match:
    return pb.Match(
        principals=map(_string, match.principals),
        not_principals=map(_string, match.not_principals),
        namespaces=map(_string, match.namespaces),
        not_namespaces=map(_string, match.not_namespaces),
        service_accounts=map(_account, match.service_accounts),
        not_service_accounts=map(_account, match.not_service_accounts),
        source_ips=map(_address, match.source_ips),
        not_source_ips=map(_address, match.not_source_ips),
        destination_ips=map(_address, match.destination_ips),
        not_destination_ips=map(_address, match.not_destination_ips),
        destination_ports=match.destination_ports,
        not_destination_ports=match.not_destination_ports,
    )


def _string(value: str) -> pb.StringMatch:
    if value == "*":
        return pb.StringMatch(presence=Empty())
    if value.startswith("*"):
        return pb.StringMatch(suffix=value[1:])
    return pb.StringMatch(prefix=value[:-1]) if value.endswith("*") else pb.StringMatch(exact=value)


def _account(value: tuple[str, str]) -> pb.ServiceAccountMatch:
    return pb.ServiceAccountMatch(namespace=value[0], serviceAccount=value[1])


def _address(value: Network) -> pb.Address:
    return pb.Address(address=value.network_address.packed, length=value.prefixlen)
