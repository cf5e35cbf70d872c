"""Who may connect to whom: connection policies as the control plane sends them, and what they mean.

Rule: immutable values and their definition, no index and no I/O. `decide` is what the words of a policy mean, one
policy after the other; `policy_index` gives the same answers fast, and names the same policy and rule.

The shape is that of the xDS type istio.security.Authorization: rules OR, clauses AND, matches OR, and within a
match every field that is not empty must match: one of its values, of a `not_` field none.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple, Self

import msgspec

from ztunnel.mesh.model import ip_text

SPIFFE_SCHEME: Final = "spiffe://"

MAPPED_IPV4: Final = bytes(10) + b"\xff\xff"
"""The first 12 bytes of an IPv4 address that is written as an IPv6 address (RFC 4291, 2.5.5.2)."""


class Action(IntEnum):
    """What a policy that matches does (istio.security.Action)."""

    ALLOW = 0
    DENY = 1


class PolicyScope(IntEnum):
    """Whom a policy concerns (istio.security.Scope). A workload that lists it by name is concerned in any case."""

    GLOBAL = 0
    NAMESPACE = 1
    WORKLOAD_SELECTOR = 2


class MatchKind(IntEnum):
    """How a text is compared (istio.security.StringMatch.match_type)."""

    EXACT = 0
    PREFIX = 1
    SUFFIX = 2
    PRESENCE = 3


class StringMatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A pattern for a text; PRESENCE matches whatever is not empty."""

    kind: MatchKind
    value: str = ""

    def matches(self, text: str) -> bool:
        """Whether `text` (empty: there is none) matches. What does not exist has no prefix, not even an empty one."""
        if not text:
            return False
        match self.kind:
            case MatchKind.EXACT:
                return text == self.value
            case MatchKind.PREFIX:
                return text.startswith(self.value)
            case MatchKind.SUFFIX:
                return text.endswith(self.value)
            case MatchKind.PRESENCE:
                return True

    def __str__(self) -> str:
        match self.kind:
            case MatchKind.EXACT:
                return self.value
            case MatchKind.PREFIX:
                return f"{self.value}*"
            case MatchKind.SUFFIX:
                return f"*{self.value}"
            case MatchKind.PRESENCE:
                return "*"


class Cidr(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A block of addresses: packed address with the host bits zero, and the length of its prefix in bits."""

    address: bytes
    length: int

    @classmethod
    def of(cls, address: bytes, length: int) -> Self:
        """The block of `length` bits around a packed address; of IPv4 if it is a block of IPv4 written as IPv6.

        Raises ValueError if these are no address and no length of a prefix of it.
        """
        if len(address) not in (4, 16):
            raise ValueError(f"an address of {len(address)} bytes: 4 or 16 are right")
        bits = 8 * len(address)
        if not 0 <= length <= bits:
            raise ValueError(f"a prefix of {length} bits: {ip_text(address)} has 0 to {bits}")
        if address.startswith(MAPPED_IPV4) and length >= 96:
            address, length, bits = address[12:], length - 96, 32
        network = int.from_bytes(address) >> (bits - length) << (bits - length)
        return cls(network.to_bytes(len(address)), length)

    def matches(self, ip: bytes) -> bool:
        """Whether a packed address is in the block; one of the other family never is."""
        if len(ip) != len(self.address):
            return False
        shift = 8 * len(ip) - self.length
        return int.from_bytes(ip) >> shift == int.from_bytes(self.address) >> shift

    def __str__(self) -> str:
        return f"{ip_text(self.address)}/{self.length}"


class ServiceAccount(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A service account, of whatever trust domain."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Match(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, kw_only=True, gc=False):
    """Conditions that must all hold. Principals have no `spiffe://`.

    One without any condition is what is left of one that a layer-4 proxy cannot judge. It is taken for what keeps
    closed: in an ALLOW policy it never matches, in a DENY policy always.
    """

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    service_accounts: tuple[ServiceAccount, ...] = ()
    not_service_accounts: tuple[ServiceAccount, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    not_principals: tuple[StringMatch, ...] = ()
    source_ips: tuple[Cidr, ...] = ()
    not_source_ips: tuple[Cidr, ...] = ()
    destination_ips: tuple[Cidr, ...] = ()
    not_destination_ips: tuple[Cidr, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()


NO_CONDITION: Final = Match()


class Clause(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Matches of which one must match; without any it asks for nothing."""

    matches: tuple[Match, ...] = ()


class Rule(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Clauses that must all match; without any it matches every connection."""

    clauses: tuple[Clause, ...] = ()


class Authorization(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A policy. Without rules it never matches: an ALLOW policy then allows nobody.

    `problem` says what of it could not be understood and is taken for the stricter meaning; for operators.
    """

    name: str
    namespace: str
    scope: PolicyScope = PolicyScope.WORKLOAD_SELECTOR
    action: Action = Action.ALLOW
    rules: tuple[Rule, ...] = ()
    dry_run: bool = False
    problem: str = ""

    @property
    def key(self) -> str:
        """The resource name, "namespace/name", by which workloads list it."""
        return f"{self.namespace}/{self.name}"


class Connection(NamedTuple):
    """What policies look at: who connects, from where, to what. `principal`, `namespace` and `service_account`
    are empty where the peer has no identity; addresses are packed, IPv4 never in the form of IPv6."""

    principal: str
    namespace: str
    service_account: str
    source: bytes
    destination: bytes
    port: int

    @classmethod
    def of(cls, identity: str, source: bytes, destination: bytes, port: int) -> Self:
        """A connection of a SPIFFE id ("" if there is none) between packed addresses, to a port.

        Raises ValueError if the identity is not `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
        """
        principal = namespace = account = ""
        if identity:
            principal = identity.removeprefix(SPIFFE_SCHEME)
            words = principal.split("/")
            if (
                principal == identity
                or len(words) != 5
                or words[1] != "ns"
                or words[3] != "sa"
                or not all(words)
            ):
                raise ValueError(
                    f"identity {identity!r}: is not spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT"
                )
            namespace, account = words[2], words[4]
        return cls(principal, namespace, account, plain_ip(source), plain_ip(destination), port)


class Verdict(NamedTuple):
    """Whether a connection may be, and why: the policy "namespace/name" and the index of its rule that decided.

    Where no policy decided `policy` is empty and `rule` -1: nothing forbids it, or no ALLOW policy allows it.
    """

    allowed: bool
    policy: str = ""
    rule: int = -1

    @property
    def reason(self) -> str:
        """For operators, e.g. in the error of a connection that was refused."""
        if self.allowed:
            return f"allowed by {self.policy} (rule {self.rule})" if self.policy else "no policy forbids it"
        if self.policy:
            return f"explicitly denied by: {self.policy} (rule {self.rule})"
        return "allow policies exist, but none allowed"


ALLOWED: Final = Verdict(True)
NOT_ALLOWED: Final = Verdict(False)


def plain_ip(ip: bytes) -> bytes:
    """A packed address; of IPv4 if it is one written as IPv6, which is how an IPv6 socket names an IPv4 peer."""
    return ip[12:] if len(ip) == 16 and ip.startswith(MAPPED_IPV4) else ip


def applying(policies: Iterable[Authorization], namespace: str, named: Iterable[str]) -> list[Authorization]:
    """The policies that concern a workload of this namespace that lists `named` ("namespace/name" each)."""
    names = frozenset(named)
    return [
        policy
        for policy in policies
        if policy.scope is PolicyScope.GLOBAL
        or (policy.scope is PolicyScope.NAMESPACE and policy.namespace == namespace)
        or policy.key in names
    ]


def decide(
    policies: Iterable[Authorization], connection: Connection, *, with_dry_run: bool = False
) -> Verdict:
    """The verdict of policies that concern the destination: a DENY that matches denies; no ALLOW policy at all
    allows; otherwise some ALLOW must match. Of several that match the one with the first name (by `precedence`)
    decides. Dry-run policies count only `with_dry_run`: as if they were enforced.
    """
    ordered = sorted((one for one in policies if with_dry_run or not one.dry_run), key=precedence)
    limited = False
    for policy in ordered:
        limited |= policy.action is Action.ALLOW
        rule = first_match(policy, connection)
        if rule is not None:
            return Verdict(policy.action is Action.ALLOW, policy.key, rule)
    return NOT_ALLOWED if limited else ALLOWED


def precedence(policy: Authorization) -> tuple[int, int, str]:
    """Sorts policies: DENY before ALLOW, then the wider scope, then the name."""
    return (-policy.action, policy.scope, policy.key)


def first_match(policy: Authorization, connection: Connection) -> int | None:
    """The index of the policy's first rule that matches; None if none does."""
    for index, rule in enumerate(policy.rules):
        if all(_clause_matches(clause, policy.action, connection) for clause in rule.clauses):
            return index
    return None


def _clause_matches(clause: Clause, action: Action, connection: Connection) -> bool:
    if not clause.matches:
        return True
    return any(_match_matches(one, action, connection) for one in clause.matches)


def _match_matches(match: Match, action: Action, connection: Connection) -> bool:
    if match == NO_CONDITION:
        return action is Action.DENY
    account = ServiceAccount(connection.namespace, connection.service_account)
    return (
        _texts(match.namespaces, match.not_namespaces, connection.namespace)
        and _texts(match.principals, match.not_principals, connection.principal)
        and _addresses(match.source_ips, match.not_source_ips, connection.source)
        and _addresses(match.destination_ips, match.not_destination_ips, connection.destination)
        and _among(match.service_accounts, match.not_service_accounts, account)
        and _among(match.destination_ports, match.not_destination_ports, connection.port)
    )


def _texts(wanted: tuple[StringMatch, ...], unwanted: tuple[StringMatch, ...], text: str) -> bool:
    return (not wanted or any(one.matches(text) for one in wanted)) and not any(
        one.matches(text) for one in unwanted
    )


def _addresses(wanted: tuple[Cidr, ...], unwanted: tuple[Cidr, ...], ip: bytes) -> bool:
    return (not wanted or any(one.matches(ip) for one in wanted)) and not any(
        one.matches(ip) for one in unwanted
    )


def _among(wanted: tuple[object, ...], unwanted: tuple[object, ...], value: object) -> bool:
    return (not wanted or value in wanted) and value not in unwanted
