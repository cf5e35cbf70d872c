"""Policies from the wire: what each field becomes, and that what is not understood keeps closed."""

from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mesh.test_policy_index import connections, policies
from tests.xds.resources import policy_resource
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
    decide,
)
from ztunnel.wire import authorization_pb2 as pb
from ztunnel.wire import workload_pb2, xds_pb2
from ztunnel.xds.decode_policy import AUTHORIZATION_TYPE, decode_authorization

SOMEBODY = Connection.of("spiffe://cluster.local/ns/a/sa/b", bytes(4), bytes(4), 80)


def policy(*rules: pb.Rule, action: "pb.Action.ValueType" = pb.DENY, **fields: object) -> pb.Authorization:
    message = pb.Authorization(name="p", namespace="shop", scope=pb.NAMESPACE, action=action, rules=rules)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def rule(*matches: pb.Match) -> pb.Rule:
    return pb.Rule(clauses=[pb.Clause(matches=[match]) for match in matches])


def decode(message: pb.Authorization) -> Authorization:
    return decode_authorization(policy_resource(message))


def address(text: str, length: int) -> pb.Address:
    return pb.Address(address=ip_address(text).packed, length=length)


def test_every_field() -> None:
    strings = [
        pb.StringMatch(exact="a"), pb.StringMatch(prefix="b"), pb.StringMatch(suffix="c"),
        pb.StringMatch(presence=Empty()),
    ]  # fmt: skip
    accounts = [pb.ServiceAccountMatch(namespace="a", serviceAccount="b")]
    message = pb.Match(
        namespaces=strings, not_namespaces=strings[:1], service_accounts=accounts, not_service_accounts=accounts,
        principals=strings[1:], not_principals=strings[2:],
        source_ips=[address("10.1.2.3", 8)], not_source_ips=[address("fd00::1", 128)],
        destination_ips=[address("::ffff:10.0.0.0", 104)], not_destination_ips=[address("0.0.0.0", 0)],
        destination_ports=[80, 65535], not_destination_ports=[1],
    )  # fmt: skip
    texts = (
        StringMatch(MatchKind.EXACT, "a"), StringMatch(MatchKind.PREFIX, "b"),
        StringMatch(MatchKind.SUFFIX, "c"), StringMatch(MatchKind.PRESENCE),
    )  # fmt: skip
    ten = Cidr(bytes([10, 0, 0, 0]), 8)
    expected = Match(
        namespaces=texts, not_namespaces=texts[:1],
        service_accounts=(ServiceAccount("a", "b"),), not_service_accounts=(ServiceAccount("a", "b"),),
        principals=texts[1:], not_principals=texts[2:],
        source_ips=(ten,), not_source_ips=(Cidr(ip_address("fd00::1").packed, 128),),
        destination_ips=(ten,), not_destination_ips=(Cidr(bytes(4), 0),),
        destination_ports=(80, 65535), not_destination_ports=(1,),
    )  # fmt: skip
    assert decode(policy(rule(message), dry_run=True)) == Authorization(
        name="p",
        namespace="shop",
        scope=PolicyScope.NAMESPACE,
        action=Action.DENY,
        rules=(Rule((Clause((expected,)),)),),
        dry_run=True,
    )


def test_rules_clauses_and_matches_keep_their_places() -> None:
    ports = [pb.Match(destination_ports=[port]) for port in (1, 2, 3)]
    message = policy(pb.Rule(), pb.Rule(clauses=[pb.Clause(), pb.Clause(matches=ports)]), action=pb.ALLOW)
    decoded = decode(message)
    assert decoded.rules == (
        Rule(),
        Rule((Clause(), Clause(tuple(Match(destination_ports=(port,)) for port in (1, 2, 3))))),
    )
    assert not decoded.problem


BAD_MATCHES: list[tuple[Callable[[pb.Match], object], str]] = [
    (lambda m: m.source_ips.add(address=b"123", length=8), "source_ips[0]: an address of 3 bytes"),
    (lambda m: m.source_ips.add(length=8), "source_ips[0]: an address of 0 bytes"),
    (lambda m: m.not_source_ips.add(address=bytes(4), length=33), "not_source_ips[0]: a prefix of 33 bits"),
    (
        lambda m: m.destination_ips.add(address=bytes(16), length=129),
        "destination_ips[0]: a prefix of 129 bits",
    ),
    (lambda m: m.destination_ports.append(0), "destination_ports[1]: 0 is no port"),
    (lambda m: m.not_destination_ports.append(65536 + 80), "not_destination_ports[0]: 65616 is no port"),
    (lambda m: m.principals.add(), "principals[0]: has none of exact, prefix, suffix and presence"),
    (lambda m: m.not_namespaces.add(), "not_namespaces[0]: has none of exact"),
    (lambda m: m.service_accounts.add(namespace="a"), "service_accounts[0]: namespace and serviceAccount"),
    (lambda m: m.extensions.add(name="geo"), "extensions[0]: 'geo' is unknown here"),
    (lambda m: m.MergeFromString(b"\xf8\x07\x01"), "field 127: is unknown here"),
]


@pytest.mark.parametrize(("spoil", "problem"), BAD_MATCHES, ids=[problem for _, problem in BAD_MATCHES])
def test_a_match_that_is_not_understood_keeps_closed(
    spoil: Callable[[pb.Match], object], problem: str
) -> None:
    """In an ALLOW policy it allows nobody, in a DENY policy it excludes nobody; the rest of the policy stands."""
    bad = pb.Match(destination_ports=[1])
    spoil(bad)
    # Together with others in its rule: what is left of the rule must still hold.
    rules = [rule(pb.Match(destination_ports=[2])), rule(bad, pb.Match(destination_ports=[80, 81]))]
    allowing, denying = decode(policy(*rules, action=pb.ALLOW)), decode(policy(*rules))
    for decoded in (allowing, denying):
        assert decoded.problem.startswith(
            f"AuthorizationPolicy shop/p: rules[1].clauses[0].matches[0].{problem}"
        )
    assert not decide([allowing], SOMEBODY).allowed
    assert decide([allowing], SOMEBODY._replace(port=2)).allowed
    assert not decide([denying], SOMEBODY).allowed
    assert not decide([denying], SOMEBODY._replace(port=2)).allowed
    assert decide([denying], SOMEBODY._replace(port=3)).allowed


def unknown(message: pb.Authorization | pb.Rule | pb.Clause) -> None:
    message.MergeFromString(b"\xf8\x07\x01")
    assert len(UnknownFieldSet(message))


@pytest.mark.parametrize("where", ["rules[0]", "rules[0].clauses[0]"])
def test_a_rule_that_is_not_understood_keeps_closed(where: str) -> None:
    spoilt = rule(pb.Match(destination_ports=[1]))
    unknown(spoilt if where == "rules[0]" else spoilt.clauses[0])
    for action in (pb.ALLOW, pb.DENY):
        decoded = decode(policy(spoilt, action=action))
        assert f"{where}.field 127: is unknown here" in decoded.problem
        assert not decide([decoded], SOMEBODY).allowed


def test_a_policy_that_is_not_understood_keeps_its_scope_closed() -> None:
    everything = rule(pb.Match(not_destination_ports=[1]))
    for action in (pb.ALLOW, pb.DENY):
        message = policy(everything, action=action, scope=pb.WORKLOAD_SELECTOR)
        unknown(message)
        decoded = decode(message)
        assert (decoded.action, decoded.scope) == (Action(action), PolicyScope.WORKLOAD_SELECTOR)
        assert not decide([decoded], SOMEBODY).allowed
        message = policy(everything, action=action)
        message.extensions.add(name="wasm")
        decoded = decode(message)
        assert decoded.problem == "AuthorizationPolicy shop/p: extensions[0]: 'wasm' is unknown here"
        assert not decide([decoded], SOMEBODY).allowed


def test_an_unknown_action_denies_and_an_unknown_scope_is_the_widest_that_it_can_be() -> None:
    decoded = decode(policy(rule(pb.Match(destination_ports=[1])), action=7))  # type: ignore[arg-type]
    assert (
        decoded.problem
        == "AuthorizationPolicy shop/p: action: value 7 is unknown here: a newer proxy may know it"
    )
    assert decoded.scope is PolicyScope.NAMESPACE
    assert not decide([decoded], SOMEBODY).allowed
    for namespace, scope in (("shop", PolicyScope.NAMESPACE), ("istio-system", PolicyScope.GLOBAL)):
        decoded = decode(policy(action=pb.ALLOW, scope=9, namespace=namespace))
        assert "scope: value 9 is unknown here" in decoded.problem
        assert (decoded.key, decoded.scope) == (f"{namespace}/p", scope)
        assert not decide([decoded], SOMEBODY).allowed


@pytest.mark.parametrize("namespace", ["shop", "root"])
def test_bytes_that_are_no_policy_deny_what_the_name_can_stand_for(namespace: str) -> None:
    resource = xds_pb2.Resource(name=f"{namespace}/p", version="1")
    resource.resource.type_url = AUTHORIZATION_TYPE
    resource.resource.value = b"\xff\xff"
    another = xds_pb2.Resource(name=f"{namespace}/p")
    another.resource.Pack(workload_pb2.Address())
    for one in (resource, another):
        decoded = decode_authorization(one, root_namespace="root")
        assert decoded.problem.startswith(f"AuthorizationPolicy {namespace}/p: is ")
        assert decoded.key == f"{namespace}/p"
        assert decoded.scope is (PolicyScope.GLOBAL if namespace == "root" else PolicyScope.NAMESPACE)
        assert not decide([decoded], SOMEBODY).allowed


def test_a_policy_under_another_name_is_closed_under_the_resources() -> None:
    resource = policy_resource(policy(rule(pb.Match(destination_ports=[1]))))
    resource.name = "shop/other"
    decoded = decode_authorization(resource)
    assert "say 'shop/p', which must be the resource's name" in decoded.problem
    assert decoded.key == "shop/other"
    assert not decide([decoded], SOMEBODY).allowed


def test_a_dry_run_that_is_not_understood_stays_one() -> None:
    bad = rule(pb.Match(destination_ports=[0]))
    assert decode(policy(bad, dry_run=True)).dry_run
    message = policy(bad, dry_run=True)
    unknown(message)
    assert decide([decode(message)], SOMEBODY).allowed


def encoded(one: Authorization) -> pb.Authorization:
    """A policy as a control plane sends it."""

    def string(pattern: StringMatch) -> pb.StringMatch:
        kinds = {
            MatchKind.EXACT: pb.StringMatch(exact=pattern.value),
            MatchKind.PREFIX: pb.StringMatch(prefix=pattern.value),
            MatchKind.SUFFIX: pb.StringMatch(suffix=pattern.value),
            MatchKind.PRESENCE: pb.StringMatch(presence=Empty()),
        }
        return kinds[pattern.kind]

    def value(part: object) -> object:
        if isinstance(part, StringMatch):
            return string(part)
        if isinstance(part, Cidr):
            return pb.Address(address=part.address, length=part.length)
        if isinstance(part, ServiceAccount):
            return pb.ServiceAccountMatch(namespace=part.namespace, serviceAccount=part.name)
        return part

    fields: dict[str, Any] = {"scope": int(one.scope), "action": int(one.action), "dry_run": one.dry_run}
    message = pb.Authorization(name=one.name, namespace=one.namespace, **fields)
    for own in one.rules:
        rule = message.rules.add()
        for clause in own.clauses:
            matches = rule.clauses.add().matches
            for match in clause.matches:
                added = matches.add()
                for name in Match.__struct_fields__:
                    getattr(added, name).extend(map(value, getattr(match, name)))
    return message


@settings(max_examples=40, deadline=None)
@given(policies)
def test_what_is_sent_is_what_is_meant(one: Authorization) -> None:
    assert decode(encoded(one)) == one


def spoil(message: pb.Authorization, data: st.DataObject) -> None:
    """Put something into the message that nobody understands."""
    places: list[Message] = [message]
    for rule in message.rules:
        places += [rule, *rule.clauses, *(match for clause in rule.clauses for match in clause.matches)]
    place = data.draw(st.sampled_from(places))
    if isinstance(place, pb.Match) and data.draw(st.booleans()):
        data.draw(st.sampled_from(BAD_MATCHES))[0](place)
    else:
        place.MergeFromString(b"\xf8\x07\x01")


@settings(max_examples=60, deadline=None)
@given(policies, st.lists(connections, min_size=1, max_size=5), st.data())
def test_what_is_not_understood_is_never_more_open_than_written(
    written: Authorization, tried: list[Connection], data: st.DataObject
) -> None:
    message = encoded(written)
    spoil(message, data)
    decoded = decode(message)
    assert decoded.problem
    assert (decoded.key, decoded.dry_run) == (written.key, written.dry_run)
    for connection in tried:
        if decide([decoded], connection, with_dry_run=True).allowed:
            assert decide([written], connection, with_dry_run=True).allowed


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_some_policy_or_a_problem(value: bytes) -> None:
    resource = xds_pb2.Resource(name="shop/p", version="1")
    resource.resource.type_url = AUTHORIZATION_TYPE
    resource.resource.value = value
    decoded = decode_authorization(resource)
    assert decoded.key == "shop/p"
    assert decoded.problem, "no such bytes have this name"
