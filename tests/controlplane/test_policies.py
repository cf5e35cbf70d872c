"""Which Authorization messages the objects become, and which of them a pod lists."""

import random
import time
from typing import Any

import pytest
import yaml
from google.protobuf import text_format

from tests.controlplane.objects import authorization, peer_authentication, pod
from ztunnel.controlplane.policy_status import Finding
from ztunnel.controlplane.registry import Registry, Update
from ztunnel.controlplane.translate import Settings
from ztunnel.store.models import Pod
from ztunnel.wire import authorization_pb2 as pb
from ztunnel.wire.workload_pb2 import Address
from ztunnel.wire.xds_pb2 import DeltaDiscoveryResponse

STRICT = "istio-system/istio_converted_static_strict"
WEB = {"app": "web"}
SELECTS_WEB: dict[str, Any] = {"selector": {"matchLabels": WEB}}


class Cluster:
    """A registry, and everything that it has published."""

    def __init__(self, root_namespace: str = "istio-system") -> None:
        self.registry = Registry(Settings(root_namespace=root_namespace))
        self.policies: dict[str, pb.Authorization] = {}
        self.listed: dict[str, list[str]] = {}
        self.findings: dict[str, Finding] = {}
        self.update = Update({}, [], [], {}, [], {})

    def flush(self) -> "Cluster":
        self.update = self.registry.flush()
        for name, entry in self.update.policies.items():
            self.policies.pop(name, None)
            if entry is not None:
                (resource,) = DeltaDiscoveryResponse.FromString(entry.encoded).resources
                self.policies[name] = pb.Authorization.FromString(resource.resource.value)
                assert f"{self.policies[name].namespace}/{self.policies[name].name}" == name
        for entry in self.update.resources.values():
            if entry is not None:
                (resource,) = DeltaDiscoveryResponse.FromString(entry.encoded).resources
                workload = Address.FromString(resource.resource.value).workload
                self.listed[f"{workload.namespace}/{workload.name}"] = list(workload.authorization_policies)
        self.findings.update({obj.name: finding for obj, finding in self.update.findings})
        return self

    def put(self, *objects: Any) -> "Cluster":
        for obj in objects:
            self.registry.upsert(obj)
        return self.flush()

    def drop(self, *objects: Any) -> "Cluster":
        for obj in objects:
            self.registry.remove(obj)
        return self.flush()

    def text(self, name: str) -> str:
        """The rules of a policy, as text that fits on a line."""
        return " ".join(
            text_format.MessageToString(rule, as_one_line=True).strip() for rule in self.policies[name].rules
        )


def policy(spec: str, **options: Any) -> Any:
    return authorization("p", yaml.safe_load(spec), **options)


def peer(name: str, mode: str = "", *, created: str = "", namespace: str = "default", **spec: Any) -> Any:
    given = {**({"mtls": {"mode": mode}} if mode else {}), **spec}
    return peer_authentication(name, given, namespace=namespace, created=created)


@pytest.mark.parametrize(
    ("namespace", "spec", "scope"),
    [
        ("default", "{}", pb.NAMESPACE),
        ("default", "{selector: {}}", pb.NAMESPACE),
        ("default", "{selector: {matchLabels: {app: web}}}", pb.WORKLOAD_SELECTOR),
        ("istio-system", "{}", pb.GLOBAL),
        ("istio-system", "{selector: {matchLabels: {app: web}}}", pb.WORKLOAD_SELECTOR),
    ],
)
def test_scopes(namespace: str, spec: str, scope: int) -> None:
    cluster = Cluster().put(policy(spec, namespace=namespace))
    assert cluster.policies[f"{namespace}/p"].scope == scope


def test_the_root_namespace_is_a_setting() -> None:
    cluster = Cluster("mesh").put(policy("{}", namespace="mesh"), policy("{}", namespace="istio-system"))
    assert cluster.policies["mesh/p"].scope == pb.GLOBAL
    assert cluster.policies["istio-system/p"].scope == pb.NAMESPACE
    assert "mesh/istio_converted_static_strict" in cluster.policies


def test_the_strings_of_a_rule() -> None:
    cluster = Cluster().put(
        policy("""
rules:
- from: [{source: {principals: ["cluster.local/ns/a/sa/b", "cluster.local/ns/a/*", "*/sa/b", "*"],
                   notNamespaces: [x], notIpBlocks: [10.1.2.3/8]}},
         {source: {serviceAccounts: [a, b/c]}}]
  to: [{operation: {ports: ["80", "443"]}}]
  when: [{key: source.ip, values: ["fd00::1"], notValues: ["10.0.0.1"]}]
""")
    )
    assert cluster.text("default/p") == (
        "clauses { "
        'matches { not_namespaces { exact: "x" } principals { exact: "cluster.local/ns/a/sa/b" } '
        'principals { prefix: "cluster.local/ns/a/" } '
        'principals { suffix: "/sa/b" } principals { presence { } } '
        'not_source_ips { address: "\\n\\000\\000\\000" length: 8 } } '
        'matches { service_accounts { namespace: "default" serviceAccount: "a" } '
        'service_accounts { namespace: "b" serviceAccount: "c" } } } '
        "clauses { matches { destination_ports: 80 destination_ports: 443 } } "
        'clauses { matches { source_ips { address: "\\375\\000\\000\\000\\000\\000\\000\\000\\000\\000\\000\\000'
        '\\000\\000\\000\\001" length: 128 } } } '
        'clauses { matches { not_source_ips { address: "\\n\\000\\000\\001" length: 32 } } }'
    )


@pytest.mark.parametrize(
    ("spec", "action", "rules"),
    [
        ("{}", pb.ALLOW, []),
        ("{rules: [{}]}", pb.ALLOW, [""]),
        ("{action: DENY, rules: [{}]}", pb.DENY, [""]),
        ("{action: DENY}", pb.DENY, []),
        # What ztunnel cannot know: out of an ALLOW policy, dropped from a DENY policy.
        ("{rules: [{to: [{operation: {methods: [GET]}}]}]}", pb.ALLOW, []),
        ("{rules: [{to: [{operation: {methods: [GET]}}]}, {}]}", pb.ALLOW, [""]),
        ("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}", pb.DENY, [""]),
        ("{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['80']}}]}]}",
         pb.DENY, ["destination_ports: 80"]),
        # Sources are alternatives: one that anything is makes the others meaningless.
        ("{action: DENY, rules: [{from: [{source: {requestPrincipals: [a]}}, {source: {namespaces: [b]}}]}]}",
         pb.DENY, [""]),
        ("{action: DENY, rules: [{from: [{source: {requestPrincipals: [a]}}], to: [{operation: {ports: ['1']}}]}]}",
         pb.DENY, ["destination_ports: 1"]),
        # What is wrong, in the same way.
        ("{rules: [{to: [{operation: {ports: [x]}}]}, {to: [{operation: {ports: ['1']}}]}]}",
         pb.ALLOW, ["destination_ports: 1"]),
        ("{action: DENY, rules: [{to: [{operation: {ports: [x, '1']}}]}]}", pb.DENY, [""]),
        ("{rule: [{}], rules: [{}]}", pb.ALLOW, []),
        ("{action: DENY, rule: [{to: [{operation: {ports: ['1']}}]}]}", pb.DENY, [""]),
        ("{action: DENIED, rules: [{to: [{operation: {ports: ['1']}}]}]}", pb.DENY, [""]),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_never_open(spec: str, action: int, rules: list[str]) -> None:
    message = Cluster().put(policy(spec)).policies["default/p"]
    assert message.action == action
    matches = [
        [
            text_format.MessageToString(m, as_one_line=True).strip()
            for clause in rule.clauses
            for m in clause.matches
        ]
        for rule in message.rules
    ]
    assert matches == [[text] if text else [] for text in rules]


def test_what_is_not_for_ztunnel_is_not_sent() -> None:
    cluster = Cluster()
    for spec in (
        "{action: CUSTOM, provider: {name: x}, rules: [{}]}",
        "{action: AUDIT, rules: [{}]}",
        "{targetRefs: [{kind: Service, group: '', name: reviews}], rules: [{}]}",
    ):
        cluster.put(policy("{}"))
        assert "default/p" in cluster.policies
        cluster.put(policy(spec))
        assert "default/p" not in cluster.policies
        finding = cluster.findings["p"]
        assert (finding.type, finding.accepted) != ("ZtunnelAccepted", True)


def test_dry_run() -> None:
    cluster = Cluster().put(policy("{}", dry_run=True))
    assert cluster.policies["default/p"].dry_run
    assert cluster.findings["p"].message.startswith("recorded but not enforced (dry run)")
    cluster.put(policy("{}"))
    assert not cluster.policies["default/p"].dry_run


@pytest.mark.parametrize(
    ("spec", "accepted", "reason", "message"),
    [
        ("{rules: [{}]}", True, "Accepted", "enforced by ztunnel: all rules"),
        ("{}", True, "Accepted", "enforced by ztunnel as an ALLOW policy that allows nothing (it has no rules)"),
        ("{action: DENY, rules: [{}]}", True, "Accepted", "enforced by ztunnel: all rules"),
        ("{rules: [{}, {to: [{operation: {methods: [GET]}}]}]}", False, "UnsupportedValue",
         "ztunnel does not support HTTP attributes (found: methods), a waypoint does. enforced by ztunnel: rules[0]; "
         "left out, allowing nothing: rules[1]"),
        ("{rules: [{to: [{operation: {methods: [GET]}}]}]}", False, "UnsupportedValue",
         "ztunnel does not support HTTP attributes (found: methods), a waypoint does. enforced by ztunnel as an ALLOW "
         "policy that allows nothing (left out: rules[0])"),
        ("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}, "
         "{to: [{operation: {hosts: [a], ports: ['1']}}]}]}",
         False, "UnsupportedValue",
         "ztunnel does not support HTTP attributes (found: hosts, methods), a waypoint does. enforced by ztunnel: all "
         "rules; denying everything: rules[0]; without what ztunnel cannot know, denying more than is written: "
         "rules[1]"),
        ("{action: CUSTOM, provider: {name: x}}", False, "UnsupportedValue",
         "not enforced: ztunnel does not support the CUSTOM action"),
        ("{rules: [{to: [{operation: {ports: [http]}}]}]}", False, "Invalid",
         'enforced by ztunnel as an ALLOW policy that allows nothing (left out: rules[0]). '
         'spec.rules[0].to[0].operation.ports[0]: "http" is not a port'),
        ("{action: DENY, x: 1}", False, "Invalid",
         "enforced by ztunnel as a DENY policy that denies everything. spec.x: unknown field"),
    ],
)  # fmt: skip
def test_the_status_says_what_is_enforced(spec: str, accepted: bool, reason: str, message: str) -> None:
    assert Cluster().put(policy(spec)).findings["p"] == Finding(accepted, reason, message)


@pytest.mark.parametrize(
    ("spec", "accepted", "reason", "message"),
    [
        ("{targetRefs: [{kind: Service, name: a}], rules: [{}]}", True, "Accepted",
         "for the waypoint of Service a: enforced by the waypoint: all rules"),
        ("{targetRefs: [{kind: Service, name: a}], rules: [{to: [{operation: {methods: [GET]}}]}]}", False,
         "UnsupportedValue",
         "waypoints of this version do not see HTTP (found: methods). for the waypoint of Service a: enforced by the "
         "waypoint as an ALLOW policy that allows nothing (left out: rules[0])"),
        ("{targetRefs: [{kind: Service, name: a}], action: CUSTOM, provider: {name: x}}", False, "UnsupportedValue",
         "not enforced: waypoints do not support the CUSTOM action (for the waypoint of Service a)"),
    ],
)  # fmt: skip
def test_the_status_says_what_waypoints_enforce(spec: str, accepted: bool, reason: str, message: str) -> None:
    finding = Finding(accepted, reason, message, "WaypointAccepted")
    assert Cluster().put(policy(spec)).findings["p"] == finding


def test_pods_list_the_policies_that_select_them() -> None:
    cluster = Cluster().put(
        pod("web", "10.0.0.1", labels={"app": "web", "tier": "front"}),
        pod("db", "10.0.0.2", labels={"app": "db"}),
        pod("web", "10.0.0.3", labels=WEB, namespace="other"),
        authorization("own", SELECTS_WEB),
        authorization("both", {"selector": {"matchLabels": {"app": "web", "tier": "front"}}}),
        authorization("neither", {"selector": {"matchLabels": {"app": "web", "tier": "back"}}}),
        authorization("mesh", SELECTS_WEB, namespace="istio-system"),
        authorization("wide", {}),
    )
    assert cluster.listed == {
        "default/web": ["default/both", "default/own", "istio-system/mesh"],
        "default/db": [],
        "other/web": ["istio-system/mesh"],
    }


def test_a_change_touches_only_what_it_concerns() -> None:
    cluster = Cluster().put(
        pod("a", "10.0.0.1", labels={"app": "a"}),
        pod("b", "10.0.0.2", labels={"app": "b"}),
        pod("b", "10.0.0.3", labels={"app": "b"}, namespace="other"),
        authorization("p", {"selector": {"matchLabels": {"app": "a"}}}),
        authorization("q", {}),
    )

    def changed() -> tuple[set[str], set[str]]:
        return set(cluster.update.policies), {name.rpartition("Pod/")[2] for name in cluster.update.resources}

    cluster.put(authorization("p", {"selector": {"matchLabels": {"app": "a"}}, "rules": [{}]}))
    assert changed() == ({"default/p"}, set()), "who lists it does not change"
    cluster.put(authorization("p", {"selector": {"matchLabels": {"app": "b"}}, "rules": [{}]}))
    assert changed() == ({"default/p"}, {"default/a", "default/b"})
    cluster.put(authorization("p", {"selector": {"matchLabels": {"app": "b"}}, "rules": [{}]}))
    assert changed() == (set(), set()), "nothing is said that was not said before"
    cluster.drop(authorization("q", {}))
    assert changed() == ({"default/q"}, set())
    cluster.put(peer("p", "STRICT"))
    assert changed()[1] == {"default/a", "default/b"}
    cluster.put(peer("p", "STRICT", namespace="istio-system"))
    assert changed()[1] == {"default/a", "default/b", "other/b"}
    cluster.drop(authorization("p", {}))
    assert changed() == ({"default/p"}, {"default/b"})
    assert "default/p" not in cluster.policies


def listed(*objects: Any, labels: dict[str, str] | None = None, namespace: str = "default") -> str:
    """What a pod lists for these PeerAuthentications: strict, the name of a converted one, or nothing."""
    cluster = Cluster().put(pod("web", "10.0.0.1", labels=labels or WEB, namespace=namespace), *objects)
    (name,) = cluster.listed[f"{namespace}/web"] or [""]
    assert not name or name in cluster.policies, "what is listed is there"
    return {STRICT: "strict", "": "-"}.get(name, name.rpartition("/")[2])


ROOT: dict[str, Any] = {"namespace": "istio-system"}
PORT: dict[str, Any] = {**SELECTS_WEB, "portLevelMtls": {8080: {"mode": "PERMISSIVE"}}}
STRICT_PORT: dict[str, Any] = {**SELECTS_WEB, "portLevelMtls": {8080: {"mode": "STRICT"}}}


@pytest.mark.parametrize(
    ("objects", "result"),
    [
        ([], "-"),
        ([peer("m", "STRICT", **ROOT)], "strict"),
        ([peer("m", "PERMISSIVE", **ROOT)], "-"),
        ([peer("m", "DISABLE", **ROOT)], "-"),
        ([peer("n", "STRICT")], "strict"),
        ([peer("n", "STRICT", namespace="other")], "-"),
        ([peer("m", "STRICT", **ROOT), peer("n", "PERMISSIVE")], "-"),
        ([peer("m", "STRICT", **ROOT), peer("n", "UNSET")], "strict"),
        ([peer("m", "STRICT", **ROOT), peer("n")], "strict"),
        ([peer("m", "PERMISSIVE", **ROOT), peer("n", "STRICT")], "strict"),
        ([peer("m", "STRICT", **ROOT), peer("n", "DISABLE")], "-"),
        # Of a workload, over namespace and mesh; an empty selector is none.
        ([peer("n", "STRICT"), peer("w", "PERMISSIVE", **SELECTS_WEB)], "-"),
        ([peer("n", "PERMISSIVE"), peer("w", "STRICT", **SELECTS_WEB)], "strict"),
        ([peer("n", "STRICT"), peer("w", "UNSET", **SELECTS_WEB)], "strict"),
        ([peer("w", "STRICT", selector={"matchLabels": {"app": "db"}})], "-"),
        ([peer("w", "STRICT", selector={})], "strict"),
        ([peer("w", "STRICT", **SELECTS_WEB, **ROOT)], "-"),
        # The oldest counts; without a time one is younger than all that have one.
        ([peer("a", "STRICT", created="2025-02-01T00:00:00Z"),
          peer("b", "PERMISSIVE", created="2025-01-01T00:00:00Z")], "-"),
        ([peer("a", "PERMISSIVE"), peer("b", "STRICT", created="2025-01-01T00:00:00Z")], "strict"),
        ([peer("a", "STRICT"), peer("b", "PERMISSIVE")], "strict"),
        ([peer("a", "STRICT", created="2025-02-01T00:00:00Z", **SELECTS_WEB),
          peer("b", "PERMISSIVE", created="2025-01-01T00:00:00Z", **SELECTS_WEB)], "-"),
        # Ports.
        ([peer("w", "STRICT", **PORT)], "converted_peer_authentication_w"),
        ([peer("w", "PERMISSIVE", **PORT)], "-"),
        ([peer("w", "STRICT", **STRICT_PORT)], "strict"),
        ([peer("w", "PERMISSIVE", **STRICT_PORT)], "converted_peer_authentication_w"),
        ([peer("w", **PORT)], "-"),
        ([peer("w", **STRICT_PORT)], "converted_peer_authentication_w"),
        ([peer("m", "STRICT", **ROOT), peer("w", **PORT)], "converted_peer_authentication_w"),
        ([peer("m", "STRICT", **ROOT), peer("w", **STRICT_PORT)], "strict"),
        ([peer("n", "STRICT"), peer("w", "UNSET", **PORT)], "converted_peer_authentication_w"),
        ([peer("m", "STRICT", **ROOT), peer("n", "PERMISSIVE"), peer("w", **PORT)], "-"),
        # What is wrong is strict, whatever others say.
        ([peer("a", "PERMISSIVE", created="2025-01-01T00:00:00Z"), peer("b", "strict")], "strict"),
        ([peer("m", "strict", **ROOT), peer("n", "PERMISSIVE")], "strict"),
        ([peer("w", "PERMISSIVE", selector={"matchLabels": {"app": "db"}}, x=1)], "-"),
        ([peer("w", "PERMISSIVE", selector={"matchLabels": 5})], "strict"),
        ([peer("w", "PERMISSIVE", **SELECTS_WEB, x=1)], "strict"),
    ],
)  # fmt: skip
def test_peer_authentications(objects: list[Any], result: str) -> None:
    assert listed(*objects) == result
    assert listed(*reversed(objects)) == result, "in whatever order they come"


def test_a_pod_of_the_root_namespace_has_the_mode_of_the_mesh() -> None:
    assert listed(peer("m", "STRICT", **ROOT), **ROOT) == "strict"
    assert listed(peer("m", "STRICT", **ROOT), peer("w", "PERMISSIVE", **SELECTS_WEB, **ROOT), **ROOT) == "-"


def test_the_rules_of_ports() -> None:
    cluster = Cluster().put(
        peer(
            "s",
            "STRICT",
            **SELECTS_WEB,
            portLevelMtls={9090: {"mode": "DISABLE"}, 8080: {"mode": "PERMISSIVE"}},
        ),
        peer(
            "p",
            "PERMISSIVE",
            **SELECTS_WEB,
            portLevelMtls={7070: {"mode": "STRICT"}, 6060: {"mode": "UNSET"}},
        ),
    )
    nobody = "not_principals { presence { } }"
    assert cluster.text("default/converted_peer_authentication_s") == (
        f"clauses {{ matches {{ {nobody} }} }} "
        "clauses { matches { not_destination_ports: 8080 not_destination_ports: 9090 } }"
    )
    assert cluster.text("default/converted_peer_authentication_p") == (
        f"clauses {{ matches {{ {nobody} destination_ports: 7070 }} }}"
    )
    assert cluster.text(STRICT) == f"clauses {{ matches {{ {nobody} }} }}"
    assert {p.action for p in cluster.policies.values()} == {pb.DENY}
    assert {p.scope for p in cluster.policies.values()} == {pb.WORKLOAD_SELECTOR}


def test_a_converted_policy_follows_the_mode_it_inherits() -> None:
    name = "default/converted_peer_authentication_w"
    cluster = Cluster().put(pod("web", "10.0.0.1", labels=WEB), peer("w", **PORT))
    assert name not in cluster.policies
    cluster.put(peer("m", "STRICT", **ROOT))
    assert name in cluster.policies
    assert cluster.listed["default/web"] == [name]
    cluster.put(peer("n", "PERMISSIVE"))
    assert name not in cluster.policies
    assert cluster.listed["default/web"] == []
    cluster.drop(peer("n"))
    assert cluster.listed["default/web"] == [name]
    cluster.drop(peer("w"))
    assert name not in cluster.policies
    assert cluster.listed["default/web"] == [STRICT]


def test_the_status_of_peer_authentications() -> None:
    cluster = Cluster().put(
        peer("old", "STRICT", created="2025-01-01T00:00:00Z"),
        peer("young", "PERMISSIVE", created="2025-02-01T00:00:00Z"),
        peer("off", "DISABLE", **SELECTS_WEB),
        peer("wrong", "ON", **SELECTS_WEB),
    )
    assert cluster.findings["old"] == Finding(True, "Accepted", "enforced by ztunnel")
    assert cluster.findings["young"].reason == "Conflicted"
    assert "PeerAuthentication default/old is older" in cluster.findings["young"].message
    assert cluster.findings["off"].reason == "UnsupportedValue"
    assert cluster.findings["wrong"].reason == "Invalid"
    cluster.drop(peer("old"))
    assert cluster.findings["young"].accepted, "now it counts"


def test_a_random_history_ends_as_the_same_objects_at_once() -> None:
    """What is kept between changes (indexes, marks) must never be seen in the result."""
    source = random.Random(7)
    labels = [{}, WEB, {"app": "db"}, {"app": "web", "tier": "a"}]
    for _ in range(30):
        cluster, present = Cluster(), dict[tuple[str, str, str], Any]()
        for _ in range(40):
            namespace, name = source.choice(["default", "other", "istio-system"]), source.choice("abc")
            selector = source.choice(labels)
            spec: dict[str, Any] = {"selector": {"matchLabels": selector}} if selector else {}
            made: Any
            match source.randrange(3):
                case 0:
                    made = pod(
                        name, f"10.0.{len(namespace)}.{ord(name)}", labels=selector, namespace=namespace
                    )
                case 1:
                    made = authorization(name, spec, namespace=namespace)
                case _:
                    mode = source.choice(["STRICT", "PERMISSIVE", "UNSET", "wrong"])
                    spec |= {"mtls": {"mode": mode}}
                    if selector and source.random() < 0.5:
                        spec["portLevelMtls"] = {80: {"mode": source.choice(["STRICT", "PERMISSIVE"])}}
                    created = f"2025-01-0{source.randrange(1, 4)}T00:00:00Z"
                    made = peer_authentication(name, spec, namespace=namespace, created=created)
            key = (made.KIND, namespace, name)
            if key in present and source.random() < 0.4:
                cluster.drop(present.pop(key))
                if key[0] == "Pod":
                    cluster.listed.pop(f"{namespace}/{name}")
            else:
                present[key] = made
                cluster.put(made)
        fresh = Cluster().put(*present.values())
        assert cluster.policies == fresh.policies
        assert cluster.listed == fresh.listed


MANY = 2000


def test_one_change_among_thousands() -> None:
    cluster = Cluster()
    pods: list[Pod] = [
        pod(f"p{n}", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", labels={"app": f"a{n}"})
        for n in range(1, MANY + 1)
    ]
    rules = [{"from": [{"source": {"principals": [f"cluster.local/ns/a/sa/s{i}"]}}]} for i in range(10)]
    cluster.put(*pods)
    began = time.perf_counter()
    for n in range(1, MANY + 1):
        cluster.registry.upsert(
            authorization(f"w{n}", {"selector": {"matchLabels": {"app": f"a{n}"}}, "rules": rules})
        )
    assert len(cluster.registry.flush().policies) == MANY
    print(
        f"10,000 policies of 10 rules, each selecting one of 10,000 pods: {time.perf_counter() - began:.2f} s"
    )
    began = time.perf_counter()
    cluster.put(authorization("w1", {"selector": {"matchLabels": {"app": "a1"}}, "rules": rules[:5]}))
    print(f"one of them changed: {(time.perf_counter() - began) * 1000:.2f} ms")
    assert set(cluster.update.policies) == {"default/w1"}
    assert not cluster.update.resources
    cluster.put(authorization("w1", {"selector": {"matchLabels": {"app": "a2"}}}))
    assert set(cluster.update.policies) == {"default/w1"}
    assert len(cluster.update.resources) == 2, "of all pods those two that are concerned"
