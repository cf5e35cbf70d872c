"""What a connection policy means, sentence by sentence."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

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
    applying,
    decide,
)

WEB = "spiffe://cluster.local/ns/shop/sa/web"


def connection(
    identity: str = WEB, source: str = "10.1.2.3", to: str = "10.9.9.9", port: int = 80
) -> Connection:
    return Connection.of(identity, ip_address(source).packed, ip_address(to).packed, port)


def exact(value: str) -> StringMatch:
    return StringMatch(MatchKind.EXACT, value)


def prefix(value: str) -> StringMatch:
    return StringMatch(MatchKind.PREFIX, value)


def suffix(value: str) -> StringMatch:
    return StringMatch(MatchKind.SUFFIX, value)


PRESENCE = StringMatch(MatchKind.PRESENCE)


def cidr(text: str) -> Cidr:
    network = ip_network(text, strict=False)
    return Cidr.of(network.network_address.packed, network.prefixlen)


def policy(action: Action, *rules: Rule, name: str = "p", **fields: Any) -> Authorization:
    values: dict[str, Any] = {"name": name, "namespace": "shop", "scope": PolicyScope.NAMESPACE}
    return Authorization(**(values | fields), action=action, rules=rules)


def allow(*rules: Rule, **fields: Any) -> Authorization:
    return policy(Action.ALLOW, *rules, **fields)


def deny(*rules: Rule, **fields: Any) -> Authorization:
    return policy(Action.DENY, *rules, **fields)


def rule(*matches: Match) -> Rule:
    """A rule of one clause for each of these."""
    return Rule(tuple(Clause((one,)) for one in matches))


@pytest.mark.parametrize(
    ("match", "those", "others"),
    [
        (
            Match(namespaces=(exact("shop"),)),
            [connection()],
            [connection("spiffe://c/ns/shops/sa/web"), connection("")],
        ),
        (
            Match(namespaces=(prefix("sh"),)),
            [connection()],
            [connection("spiffe://c/ns/x/sa/sh"), connection("")],
        ),
        (Match(namespaces=(suffix("op"),)), [connection()], [connection("spiffe://c/ns/opera/sa/web")]),
        (Match(namespaces=(PRESENCE,)), [connection()], [connection("")]),
        (
            Match(not_namespaces=(exact("shop"),)),
            [connection("spiffe://c/ns/x/sa/web"), connection("")],
            [connection()],
        ),
        (
            Match(principals=(exact("cluster.local/ns/shop/sa/web"),)),
            [connection()],
            [connection("spiffe://other/ns/shop/sa/web")],
        ),
        (
            Match(principals=(prefix("cluster.local/ns/shop/"),)),
            [connection()],
            [connection("spiffe://cluster.local/ns/x/sa/web")],
        ),
        (Match(principals=(prefix(""),)), [connection()], [connection("")]),
        (
            Match(principals=(suffix("/sa/web"),)),
            [connection()],
            [connection("spiffe://cluster.local/ns/shop/sa/webs")],
        ),
        (Match(principals=(exact(WEB),)), [], [connection()]),
        (Match(not_principals=(PRESENCE,)), [connection("")], [connection()]),
        (Match(not_principals=(exact("cluster.local/ns/shop/sa/web"),)), [connection("")], [connection()]),
        (
            Match(service_accounts=(ServiceAccount("shop", "web"),)),
            [connection(), connection("spiffe://other/ns/shop/sa/web")],
            [connection("spiffe://c/ns/web/sa/shop"), connection("")],
        ),
        (Match(not_service_accounts=(ServiceAccount("shop", "web"),)), [connection("")], [connection()]),
        (
            Match(source_ips=(cidr("10.1.0.0/16"),)),
            [connection(source="10.1.255.255"), connection(source="::ffff:10.1.0.0")],
            [connection(source="10.2.0.0"), connection(source="fd00::a01")],
        ),
        (
            Match(source_ips=(cidr("10.1.2.3/8"),)),
            [connection(source="10.255.0.1")],
            [connection(source="11.0.0.0")],
        ),
        (
            Match(source_ips=(cidr("::ffff:10.1.0.0/112"),)),
            [connection(source="10.1.2.3")],
            [connection(source="10.2.0.0")],
        ),
        (Match(source_ips=(cidr("0.0.0.0/0"),)), [connection()], [connection(source="fd00::1")]),
        (
            Match(source_ips=(cidr("::/0"),)),
            [connection(source="fd00::1")],
            [connection(), connection(source="::ffff:10.1.2.3")],
        ),
        (Match(source_ips=(cidr("10.1.2.3"),)), [connection()], [connection(source="10.1.2.4")]),
        (
            Match(not_source_ips=(cidr("10.0.0.0/8"), cidr("fd00::/8"))),
            [connection(source="11.0.0.1")],
            [connection(), connection(source="fd00::1")],
        ),
        (Match(destination_ips=(cidr("10.9.0.0/16"),)), [connection()], [connection(to="10.8.0.1")]),
        (Match(not_destination_ips=(cidr("10.9.0.0/16"),)), [connection(to="10.8.0.1")], [connection()]),
        (Match(destination_ports=(80, 443)), [connection(), connection(port=443)], [connection(port=8080)]),
        (
            Match(not_destination_ports=(80, 443)),
            [connection(port=8080)],
            [connection(), connection(port=443)],
        ),
        (
            Match(namespaces=(exact("a"), exact("shop")), destination_ports=(80,)),
            [connection()],
            [connection(port=81), connection("spiffe://c/ns/b/sa/x")],
        ),
        (
            Match(namespaces=(prefix("s"),), not_namespaces=(exact("shop"),)),
            [connection("spiffe://c/ns/s/sa/x")],
            [connection()],
        ),
    ],
)
def test_every_field(match: Match, those: list[Connection], others: list[Connection]) -> None:
    for one in those:
        assert decide([allow(rule(match))], one).allowed, one
        assert not decide([deny(rule(match))], one).allowed, one
    for one in others:
        assert not decide([allow(rule(match))], one).allowed, one
        assert decide([deny(rule(match))], one).allowed, one


def test_rules_or_clauses_and_matches_or() -> None:
    web, port = Match(namespaces=(exact("shop"),)), Match(destination_ports=(80,))
    never = Match(destination_ports=(1,))
    assert not decide([allow(rule(web, never))], connection()).allowed
    assert decide([allow(rule(web, port))], connection()).allowed
    assert decide([allow(Rule((Clause((never, port)),)))], connection()).allowed
    assert decide([allow(rule(never), rule(never), rule(port))], connection()) == Verdict(True, "shop/p", 2)


def test_no_rules_no_clauses_no_matches_no_conditions() -> None:
    """Without rules nothing matches; a rule and a clause that ask for nothing do; a match that says nothing closes."""
    assert not decide([allow()], connection()).allowed
    assert decide([deny()], connection()).allowed
    for everything in (Rule(), Rule((Clause(),))):
        assert decide([allow(everything)], connection()).allowed
        assert not decide([deny(everything)], connection()).allowed
    assert not decide([allow(rule(Match()))], connection()).allowed
    assert not decide([deny(rule(Match()))], connection()).allowed


def test_deny_comes_before_allow_and_both_name_policy_and_rule() -> None:
    everything, never = Rule(), rule(Match(destination_ports=(1,)))
    policies = [allow(everything, name="a"), deny(never, everything, name="z")]
    verdict = decide(policies, connection())
    assert verdict == Verdict(False, "shop/z", 1)
    assert verdict.reason == "explicitly denied by: shop/z (rule 1)"
    assert decide(policies[:1], connection()) == Verdict(True, "shop/a", 0)
    assert decide([], connection()) == Verdict(True)
    refused = decide([allow(never), allow(name="b")], connection())
    assert refused == Verdict(False)
    assert refused.reason == "allow policies exist, but none allowed"


def test_dry_run_counts_only_when_asked_for() -> None:
    policies = [deny(Rule(), name="later", dry_run=True)]
    assert decide(policies, connection()).allowed
    assert decide(policies, connection(), with_dry_run=True) == Verdict(False, "shop/later", 0)
    assert not decide([allow(dry_run=True)], connection(), with_dry_run=True).allowed


def test_which_policies_concern_a_workload() -> None:
    everywhere = deny(name="all", namespace="istio-system", scope=PolicyScope.GLOBAL)
    here = deny(name="here")
    there = deny(name="there", namespace="other")
    chosen = deny(name="chosen", scope=PolicyScope.WORKLOAD_SELECTOR)
    strict = deny(name="strict", namespace="istio-system", scope=PolicyScope.WORKLOAD_SELECTOR)
    every = [everywhere, here, there, chosen, strict]
    assert applying(every, "shop", ()) == [everywhere, here]
    assert applying(every, "shop", ["shop/chosen", "istio-system/strict"]) == [
        everywhere,
        here,
        chosen,
        strict,
    ]


@pytest.mark.parametrize(
    "identity",
    [
        "cluster.local/ns/a/sa/b",
        "spiffe://c/ns/a/sa/b/c",
        "spiffe://c/ns//sa/b",
        "spiffe:///ns/a/sa/b",
        "spiffe://c",
    ],
)
def test_what_is_no_identity_is_an_error_and_not_no_identity(identity: str) -> None:
    with pytest.raises(ValueError, match="is not spiffe://"):
        connection(identity)


@pytest.mark.parametrize(
    ("address", "length"), [(b"\x0a\x01\x02", 8), (b"", 0), (bytes(4), 33), (bytes(16), 129), (bytes(4), -1)]
)
def test_what_is_no_block(address: bytes, length: int) -> None:
    with pytest.raises(ValueError):
        Cidr.of(address, length)
