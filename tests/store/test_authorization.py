"""AuthorizationPolicies as they are written: what they say, and that nothing wrong with them opens anything."""

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.store import authorization, peerauth
from ztunnel.store.authorization import ANYTHING, DENY, Match, Policy
from ztunnel.store.decode import decode
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import AuthorizationPolicy, ObjectMeta, PeerAuthentication
from ztunnel.store.problems import Problem


def read(spec: str, **annotations: str) -> Policy:
    named = {key.replace("_", "/", 1).replace("_", "-"): value for key, value in annotations.items()}
    metadata = ObjectMeta(name="p", namespace="shop", annotations=named)
    return authorization.read(AuthorizationPolicy(metadata=metadata, spec=yaml.safe_load(spec)))


def said(policy: Policy, severity: str = "error") -> list[str]:
    return [f"{fault}; {fault.remedy}" for fault in policy.faults if fault.severity == severity]


def test_every_field_of_connections_is_read() -> None:
    policy = read("""
selector: {matchLabels: {app: web}}
action: DENY
rules:
- from:
  - source: {principals: ["cluster.local/ns/a/sa/b", "*/sa/c"], notPrincipals: [x],
             namespaces: [a], notNamespaces: ["b*"]}
  - source: {serviceAccounts: [own, other/theirs], notServiceAccounts: [x/y],
             ipBlocks: [10.1.2.3/8], notIpBlocks: ["::1"]}
  to:
  - operation: {ports: ["80"], notPorts: ["443", "1"]}
  when:
  - {key: source.ip, values: ["10.0.0.1"], notValues: ["fd00::/8"]}
  - {key: destination.port, notValues: ["22"]}
  - {key: source.serviceAccount, values: [z]}
- {}
""")
    assert not policy.faults
    assert policy.sound
    assert (policy.action, policy.selector, policy.dry_run) == (DENY, {"app": "web"}, False)
    first, second = policy.rules
    assert (second.clauses, second.complete) == ((), True)
    assert first.complete
    assert first.clauses == (
        (
            Match(
                principals=("cluster.local/ns/a/sa/b", "*/sa/c"),
                not_principals=("x",),
                namespaces=("a",),
                not_namespaces=("b*",),
            ),
            Match(
                service_accounts=(("shop", "own"), ("other", "theirs")),
                not_service_accounts=(("x", "y"),),
                source_ips=(ip_network("10.0.0.0/8"),),
                not_source_ips=(ip_network("::1"),),
            ),
        ),
        (Match(destination_ports=(80,), not_destination_ports=(443, 1)),),
        (Match(source_ips=(ip_network("10.0.0.1"),)),),
        (Match(not_source_ips=(ip_network("fd00::/8"),)),),
        (Match(not_destination_ports=(22,)),),
        (Match(service_accounts=(("shop", "z"),)),),
    )


def test_an_ipv4_block_written_as_ipv6_is_one_of_ipv4() -> None:
    (rule,) = read("rules: [{from: [{source: {ipBlocks: ['::ffff:10.0.0.0/104']}}]}]").rules
    assert rule.clauses[0][0].source_ips == (ip_network("10.0.0.0/8"),)


@pytest.mark.parametrize(
    ("rule", "where", "what"),
    [
        ("5", "", "expected a mapping"),
        ("{form: []}", ".form", 'unknown field; did you mean "from"'),
        ("{from: []}", ".from", "is empty"),
        ("{from: {source: {}}}", ".from", "expected a list"),
        ("{from: [{}]}", ".from[0].source", "is missing"),
        ("{from: [{source: {}}]}", ".from[0].source", "is empty"),
        ("{from: [{sources: {}}]}", ".from[0].sources", 'unknown field; did you mean "source"'),
        ("{from: [{source: {principals: a}}]}", ".from[0].source.principals", "expected a list"),
        ("{from: [{source: {principals: []}}]}", ".from[0].source.principals", "is empty"),
        ("{from: [{source: {principals: ['']}}]}", ".from[0].source.principals[0]", "is empty"),
        (
            "{from: [{source: {principals: [a, 5]}}]}",
            ".from[0].source.principals[1]",
            "expected a text, got 5",
        ),
        (
            "{from: [{source: {principals: ['spiffe://x/ns/a/sa/b']}}]}",
            ".from[0].source.principals[0]",
            "scheme",
        ),
        ("{from: [{source: {namespaces: ['a*b']}}]}", ".from[0].source.namespaces[0]", "has a *"),
        ("{from: [{source: {namespaces: ['*a*']}}]}", ".from[0].source.namespaces[0]", "has a *"),
        (
            "{from: [{source: {serviceAccounts: ['a/b/c']}}]}",
            ".from[0].source.serviceAccounts[0]",
            "is not a service",
        ),
        (
            "{from: [{source: {serviceAccounts: ['a/*']}}]}",
            ".from[0].source.serviceAccounts[0]",
            "is not a service",
        ),
        (
            "{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}",
            ".from[0].source.serviceAccounts",
            "together",
        ),
        (
            "{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}",
            ".from[0].source.ipBlocks[0]",
            "is not an IP address",
        ),
        (
            "{from: [{source: {ipBlocks: [10.0.0.0/-1]}}]}",
            ".from[0].source.ipBlocks[0]",
            "is not an IP address",
        ),
        (
            "{from: [{source: {ipBlocks: [10.0.0.0/255.0.0.0]}}]}",
            ".from[0].source.ipBlocks[0]",
            "is not an IP",
        ),
        ("{from: [{source: {ipBlocks: ['fe80::1%eth0']}}]}", ".from[0].source.ipBlocks[0]", "has a zone"),
        (
            "{from: [{source: {remoteIpBlocks: [x]}}]}",
            ".from[0].source.remoteIpBlocks[0]",
            "is not an IP address",
        ),
        ("{to: [{operation: {port: ['80']}}]}", ".to[0].operation.port", 'did you mean "ports"'),
        ("{to: [{operation: {ports: [80]}}]}", ".to[0].operation.ports[0]", 'put it in quotes: "80"'),
        ("{to: [{operation: {ports: ['0']}}]}", ".to[0].operation.ports[0]", "is not a port"),
        ("{to: [{operation: {ports: ['65536']}}]}", ".to[0].operation.ports[0]", "is not a port"),
        ("{to: [{operation: {ports: ['80-90']}}]}", ".to[0].operation.ports[0]", "is not a port"),
        ("{when: [{key: source.name, values: [a]}]}", ".when[0].key", '"source.name" is not known'),
        ("{when: [{key: 'destination.labels[app]', values: [a]}]}", ".when[0].key", "spec.selector instead"),
        ("{when: [{key: 'request.headers', values: [a]}]}", ".when[0].key", "is not known"),
        ("{when: [{values: [a]}]}", ".when[0].key", "is missing"),
        ("{when: [{key: source.ip}]}", ".when[0]", "neither values nor notValues"),
        ("{when: [{key: source.ip, values: []}]}", ".when[0].values", "is empty"),
        ("{when: [{key: destination.port, values: [http]}]}", ".when[0].values[0]", "is not a port"),
        ("{when: [{key: source.ip, values: [a], value: b}]}", ".when[0].value", 'did you mean "values"'),
    ],
)
def test_what_is_wrong_with_a_rule_is_said_and_takes_the_rule_out(rule: str, where: str, what: str) -> None:
    allow = read(f"rules: [{rule}, {{}}]")
    (*_, error) = said(allow)
    assert any(text.startswith(f"spec.rules[0]{where}: ") and what in text for text in said(allow)), said(
        allow
    )
    assert error.endswith("until then this rule allows nothing")
    assert [each.complete for each in allow.rules] == [False, True], "the other rule is not affected"
    deny = read(f"{{action: DENY, rules: [{rule}]}}")
    assert said(deny)[0].endswith("until then this rule denies more")
    assert all(clause == (ANYTHING,) or "together" in what for clause in deny.rules[0].clauses), (
        "nothing is left"
    )


def test_of_a_list_with_a_wrong_value_nothing_is_relied_on() -> None:
    """A DENY of some addresses, one of which is a slip, denies all addresses: not only the readable ones."""
    policy = read("""
action: DENY
rules: [{from: [{source: {ipBlocks: [10.0.0.0/8, 10.1.0.0/160], namespaces: [a]}}]}]
""")
    assert policy.rules[0].clauses == ((Match(namespaces=("a",)),),)


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ("{rule: []}", "spec.rule"),
        ("{rules: 5}", "spec.rules"),
        ("{selector: 5}", "spec.selector"),
        ("{selector: {matchLabels: [a]}}", "spec.selector.matchLabels"),
        ("{selector: {matchLabels: {app: 5}}}", "spec.selector.matchLabels.app"),
        ("{selector: {matchLabels: {app: 'a*'}}}", "spec.selector.matchLabels.app"),
        ("{selector: {matchExpressions: []}}", "spec.selector.matchExpressions"),
        ("{provider: {name: x}}", "spec.provider"),
    ],
)
def test_what_is_wrong_with_the_whole_policy_is_said(spec: str, where: str) -> None:
    policy = read(spec)
    assert not policy.sound
    assert said(policy)[0].startswith(f"{where}: ")
    assert said(policy)[0].endswith("until then the policy allows nothing")
    assert not policy.selector, "a selector that is not understood selects everything"


@pytest.mark.parametrize(
    "spec",
    [*(f"{{action: {word}, rules: [{{}}]}}" for word in ("deny", "Deny", "DROP", "5", "''", "[]")),
     "{acton: DENY}", "{spec: {action: DENY}}", "5"],
)  # fmt: skip
def test_an_unknown_action_denies_everything(spec: str) -> None:
    policy = read(spec)
    assert (policy.action, policy.sound) == (DENY, False)
    assert said(policy)[0].startswith("spec")
    assert said(policy)[0].endswith("until then the policy denies everything")


def test_http_attributes_are_named_and_what_that_means() -> None:
    rule = (
        "{from: [{source: {requestPrincipals: ['*']}}], to: [{operation: {methods: [GET], ports: ['80']}}]}"
    )
    allow, deny = read(f"rules: [{rule}]"), read(f"{{action: DENY, rules: [{rule}]}}")
    assert (allow.http, allow.rules[0].complete, said(allow)) == (("methods", "requestPrincipals"), False, [])
    assert "left out and allows nothing" in said(allow, "warning")[0]
    assert "denies more than is written" in said(deny, "warning")[0]
    everything = read("{action: DENY, rules: [{to: [{operation: {paths: [/admin]}}]}]}")
    assert "denies every connection" in said(everything, "warning")[0]
    keys = [
        "request.headers[a]",
        "request.auth.claims[a][b]",
        "remote.ip",
        "connection.sni",
        "request.auth.audiences",
    ]
    conditions = ", ".join(f"{{key: '{key}', values: ['10.0.0.1']}}" for key in keys)
    assert read(f"rules: [{{when: [{conditions}]}}]").http == tuple(sorted(keys))


def test_actions_and_targets_that_ztunnel_does_not_enforce_are_said() -> None:
    assert (
        "does not support the CUSTOM action"
        in said(read("{action: CUSTOM, provider: {name: x}, rules: [{}]}"), "warning")[0]
    )
    policy = read("{targetRefs: [{group: '', kind: Service, name: reviews}], rules: []}")
    assert policy.targets == ("Service reviews",)
    assert "for the waypoint of Service reviews" in said(policy, "warning")[0]
    both = read("{targetRefs: [{kind: Pod, name: a, namespace: b}], selector: {}}")
    assert [text.split(":")[0] for text in said(both)] == [
        "spec.targetRefs[0].kind", "spec.targetRefs[0].namespace", "spec.selector",
    ]  # fmt: skip
    assert "denies nothing" in said(read("{action: DENY}"), "warning")[0]


def test_dry_run() -> None:
    assert read("{}", istio_io_dry_run="true").dry_run is False, "that is no name of ours"
    metadata = ObjectMeta(name="p", namespace="shop", annotations={"istio.io/dry-run": "true"})
    assert authorization.read(AuthorizationPolicy(metadata=metadata, spec={})).dry_run
    wrong = ObjectMeta(name="p", namespace="shop", annotations={"istio.io/dry-run": "yes"})
    for action, sound, effect in (
        ("DENY", True, "it is enforced"),
        ("ALLOW", False, "the policy allows nothing"),
    ):
        policy = authorization.read(
            AuthorizationPolicy(metadata=wrong, spec={"action": action, "rules": [{}]})
        )
        assert (policy.dry_run, policy.sound) == (False, sound)
        assert said(policy) == [
            f'metadata.annotations[istio.io/dry-run]: "yes" is not possible; use "true" or "false"; until then {effect}'
        ]


def peer(spec: str) -> peerauth.PeerPolicy:
    return peerauth.read(
        PeerAuthentication(metadata=ObjectMeta(name="p", namespace="a"), spec=yaml.safe_load(spec))
    )


def test_a_peer_authentication_is_read() -> None:
    policy = peer("""
selector: {matchLabels: {app: web}}
mtls: {mode: STRICT}
portLevelMtls: {8080: {mode: PERMISSIVE}, "9090": {mode: DISABLE}, 7070: {mode: UNSET}, 6060: {}}
""")
    assert policy.sound
    assert (policy.selector, policy.mode) == ({"app": "web"}, "STRICT")
    assert policy.ports == {8080: "PERMISSIVE", 9090: "PERMISSIVE", 7070: "UNSET", 6060: "UNSET"}
    assert [fault.severity for fault in policy.faults] == ["warning"], "DISABLE is not what it says"
    assert peer("{}").mode == "UNSET"
    assert peer("mtls: {}").mode == "UNSET"


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ("[]", "spec"),
        ("{mtls: STRICT}", "spec.mtls"),
        ("{mtls: {mode: strict}}", "spec.mtls.mode"),
        ("{mtls: {mod: STRICT}}", "spec.mtls.mod"),
        ("{mTLS: {mode: STRICT}}", "spec.mTLS"),
        ("{portLevelMtls: {80: {mode: PERMISSIVE}}}", "spec.portLevelMtls"),
        (
            "{selector: {matchLabels: {a: b}}, portLevelMtls: {0: {mode: PERMISSIVE}}}",
            "spec.portLevelMtls[0]",
        ),
        (
            "{selector: {matchLabels: {a: b}}, portLevelMtls: {http: {mode: PERMISSIVE}}}",
            "spec.portLevelMtls.http",
        ),
        ("{selector: {matchLabels: {a: b}}, portLevelMtls: {}}", "spec.portLevelMtls"),
    ],
)
def test_a_peer_authentication_with_a_fault_is_strict(spec: str, where: str) -> None:
    policy = peer(spec)
    assert (policy.sound, policy.mode, policy.ports) == (False, "STRICT", {})
    fault = policy.faults[0]
    assert f"{fault}".startswith(f"{where}: ")
    assert fault.remedy.endswith("until then it is taken for STRICT")


def test_a_policy_with_faults_counts_in_the_store(tmp_path: Path) -> None:
    """Left out it would open what it closes; `ambient apply` refuses it, an edited file is as it is."""
    (tmp_path / "policies.yaml").write_text("""
apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata: {name: a, labels: {version: 1}}
rules: [{}]
spec: {action: DENY}
status: [5]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: Wrong_Name}
spec: {}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: b}
spec: {mtls: {mode: STRICT}}
""")
    problems: list[Problem] = []
    store = DirectoryStore(tmp_path, on_problem=problems.append)
    (kept,) = store.list(AuthorizationPolicy)
    assert kept.name == "a"
    assert not authorization.read(kept).sound, "what stood beside spec is not understood"
    assert [obj.name for obj in store.list(PeerAuthentication)] == ["b"], "the other is not affected"
    told = [str(problem) for problem in problems]
    assert any(
        "rules: unknown field; put it below spec, or remove it; until then the policy denies" in t
        for t in told
    )
    assert any("metadata.labels.version: expected str, got int (1)" in text for text in told)
    assert any('"Wrong_Name" is not a valid name' in text for text in told)
    other = DirectoryStore(tmp_path / "copy")
    other.path.mkdir()
    other.apply(kept, file=Path("a.json"))
    assert other.list(AuthorizationPolicy) == [kept], "and survives being copied by a program"
    assert not decode(
        {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": 5}}
    ).counts


def test_a_stray_field_in_a_json_file_is_seen_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '{"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "a"}, '
        '"mtls": {"mode": "STRICT"}}'
    )
    (kept,) = DirectoryStore(tmp_path).list(PeerAuthentication)
    assert peerauth.read(kept).mode == "STRICT"


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["rules", "from", "source", "to", "operation", "when", "key", "values", "ports", "ipBlocks", "principals",
             "selector", "matchLabels", "action", "targetRefs", "mtls", "mode", "portLevelMtls", "80", "x"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_nothing_that_can_be_written_is_an_exception(spec: Any) -> None:
    metadata = ObjectMeta(name="p", namespace="a")
    policy = authorization.read(AuthorizationPolicy(metadata=metadata, spec=spec))
    assert policy.sound or policy.faults
    assert all(rule.complete or policy.faults for rule in policy.rules)
    peer_policy = peerauth.read(PeerAuthentication(metadata=metadata, spec=spec))
    assert peer_policy.sound or (peer_policy.mode == "STRICT" and not peer_policy.ports)
