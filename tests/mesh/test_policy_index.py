"""The index gives the answers of the plain meaning, whatever the policies, and whatever came and went before."""

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from ztunnel.mesh import policy_index
from ztunnel.mesh.policy import (
    Action,
    Authorization,
    Cidr,
    Clause,
    Connection,
    Match,
    MatchKind,
    PolicyScope,
    Rule,
    ServiceAccount,
    StringMatch,
    Verdict,
    decide,
    plain_ip,
)
from ztunnel.mesh.policy_atoms import Atoms
from ztunnel.mesh.policy_index import PolicyIndex, judge

NAMESPACES = ["a", "ab", "b", "shop"]
ACCOUNTS = ["a", "web"]
BLOCKS = [
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.3/32",
    "0.0.0.0/0",
    "fd00::/8",
    "fd00::1/128",
    "::/0",
    "::ffff:10.1.0.0/112",
]
ADDRESSES = ["10.1.2.3", "10.1.9.9", "10.9.9.9", "192.0.2.1", "fd00::1", "2001:db8::1", "::ffff:10.1.2.3"]
PORTS = [80, 443, 8080]


def few(values: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.one_of(st.just(()), st.just(()), st.lists(values, min_size=1, max_size=2).map(tuple))


def strings(words: Sequence[str]) -> st.SearchStrategy[StringMatch]:
    return st.one_of(
        st.sampled_from(words).map(lambda word: StringMatch(MatchKind.EXACT, word)),
        st.sampled_from([*words, ""]).map(lambda word: StringMatch(MatchKind.PREFIX, word[:-1])),
        st.sampled_from([*words, ""]).map(lambda word: StringMatch(MatchKind.SUFFIX, word[1:])),
        st.just(StringMatch(MatchKind.PRESENCE)),
    )


def block(text: str) -> Cidr:
    network = ip_network(text)
    return Cidr.of(network.network_address.packed, network.prefixlen)


namespaces = strings(NAMESPACES)
principals = strings([f"c/ns/{namespace}/sa/{account}" for namespace in NAMESPACES for account in ACCOUNTS])
accounts = st.builds(ServiceAccount, st.sampled_from(NAMESPACES), st.sampled_from(ACCOUNTS))
blocks = st.sampled_from(BLOCKS).map(block)
ports = st.sampled_from(PORTS)
matches = st.builds(
    Match,
    namespaces=few(namespaces), not_namespaces=few(namespaces),
    service_accounts=few(accounts), not_service_accounts=few(accounts),
    principals=few(principals), not_principals=few(principals),
    source_ips=few(blocks), not_source_ips=few(blocks),
    destination_ips=few(blocks), not_destination_ips=few(blocks),
    destination_ports=few(ports), not_destination_ports=few(ports),
)  # fmt: skip
clauses = st.builds(Clause, st.lists(matches, max_size=3).map(tuple))
rules = st.builds(Rule, st.lists(clauses, max_size=3).map(tuple))
policies = st.builds(
    Authorization,
    name=st.sampled_from(["p", "q", "r", "s"]),
    namespace=st.sampled_from(["a", "istio-system"]),
    scope=st.sampled_from(PolicyScope),
    action=st.sampled_from(Action),
    rules=st.lists(rules, max_size=3).map(tuple),
    dry_run=st.sampled_from([False, False, True]),
)
connections = st.builds(
    Connection.of,
    st.one_of(
        st.just(""),
        st.builds("spiffe://c/ns/{}/sa/{}".format, st.sampled_from(NAMESPACES), st.sampled_from(ACCOUNTS)),
    ),
    st.sampled_from(ADDRESSES).map(lambda text: ip_address(text).packed),
    st.sampled_from(ADDRESSES).map(lambda text: ip_address(text).packed),
    st.sampled_from([*PORTS, 9]),
)


def verdict_by_the_book(those: list[Authorization], connection: Connection) -> bool:
    """The sentences of the protocol's description, written down once more."""

    def text(pattern: StringMatch, value: str) -> bool:
        if pattern.kind is MatchKind.EXACT:
            return value != "" and value == pattern.value
        if pattern.kind is MatchKind.PREFIX:
            return value != "" and value[: len(pattern.value)] == pattern.value
        if pattern.kind is MatchKind.SUFFIX:
            return value != "" and value[len(value) - len(pattern.value) :] == pattern.value
        return value != ""

    def inside(one: Cidr, ip: bytes) -> bool:
        address, network = ip_address(plain_ip(ip)), ip_network((one.address, one.length))
        return address.version == network.version and address in network

    def account(one: ServiceAccount) -> bool:
        return connection.principal.endswith(f"/ns/{one.namespace}/sa/{one.name}")

    def holds(match: Match, action: Action) -> bool:
        fields = [
            ([text(one, connection.namespace) for one in match.namespaces], True),
            ([text(one, connection.namespace) for one in match.not_namespaces], False),
            ([text(one, connection.principal) for one in match.principals], True),
            ([text(one, connection.principal) for one in match.not_principals], False),
            ([account(one) for one in match.service_accounts], True),
            ([account(one) for one in match.not_service_accounts], False),
            ([inside(one, connection.source) for one in match.source_ips], True),
            ([inside(one, connection.source) for one in match.not_source_ips], False),
            ([inside(one, connection.destination) for one in match.destination_ips], True),
            ([inside(one, connection.destination) for one in match.not_destination_ips], False),
            ([one == connection.port for one in match.destination_ports], True),
            ([one == connection.port for one in match.not_destination_ports], False),
        ]  # fmt: skip
        if not any(values for values, _ in fields):
            return action is Action.DENY
        return all(any(values) if wanted else not any(values) for values, wanted in fields if values)

    def matching(policy: Authorization) -> bool:
        return any(
            all(
                not clause.matches or any(holds(match, policy.action) for match in clause.matches)
                for clause in rule.clauses
            )
            for rule in policy.rules
        )

    if any(matching(one) for one in those if one.action is Action.DENY):
        return False
    allowing = [one for one in those if one.action is Action.ALLOW]
    return not allowing or any(matching(one) for one in allowing)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(policies, max_size=6, unique_by=lambda one: one.key),
    st.lists(connections, min_size=1, max_size=4),
    st.sampled_from([1, 8]),
)
def test_index_meaning_and_book_agree(those: list[Authorization], tried: list[Connection], many: int) -> None:
    with patch.multiple(policy_index, _MANY=many, _CHUNK=4 * many):
        _compare(those, tried)


def _compare(those: list[Authorization], tried: list[Connection]) -> None:
    atoms = Atoms()
    index, other = PolicyIndex(atoms), PolicyIndex(atoms)
    for number, policy in enumerate(those):
        (other if number % 3 == 0 else index).put(policy)
    enforced = [one for one in those if not one.dry_run]
    for connection in tried:
        verdict, rehearsed = judge([index, other], connection)
        assert verdict == decide(those, connection)
        assert verdict.allowed == verdict_by_the_book(enforced, connection)
        if len(enforced) < len(those):
            assert rehearsed == decide(those, connection, with_dry_run=True)
            assert rehearsed.allowed == verdict_by_the_book(those, connection)
        else:
            assert rehearsed is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(policies, st.booleans()), max_size=15), connections)
def test_what_came_and_went_leaves_nothing(
    steps: list[tuple[Authorization, bool]], connection: Connection
) -> None:
    with patch.multiple(policy_index, _MANY=1, _CHUNK=4):
        _come_and_go(steps, connection)


def _come_and_go(steps: list[tuple[Authorization, bool]], connection: Connection) -> None:
    atoms = Atoms()
    index = PolicyIndex(atoms)
    held: dict[str, Authorization] = {}
    for policy, kept in steps:
        index.put(policy)
        held[policy.key] = policy
        if not kept:
            index.drop(policy.key)
            del held[policy.key]
        assert judge([index], connection)[0] == decide(held.values(), connection)
    assert len(index) == len(held)
    for key in index.names():
        index.drop(key)
    assert len(index) == len(atoms) == 0
    assert judge([index], connection) == (Verdict(True), None)


def test_many_rules_that_only_exclude() -> None:
    """More of them than are looked at together."""
    index = PolicyIndex(Atoms())
    for number in range(1000):
        match = Match(not_destination_ports=(80, 1000 + number) if number != 700 else (1,))
        rule = Rule((Clause((match,)),))
        index.put(Authorization(name=f"p{number:04}", namespace="a", action=Action.DENY, rules=(rule,)))
    connection = Connection.of("", b"\x0a\0\0\1", b"\x0a\0\0\2", 80)
    assert judge([index], connection)[0] == Verdict(False, "a/p0700", 0)
    index.drop("a/p0700")
    assert judge([index], connection)[0].allowed
    assert judge([index], connection._replace(port=1000))[0] == Verdict(False, "a/p0001", 0)
