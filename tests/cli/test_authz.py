"""What `ambient authz` says: in the words of the objects as they are written, and only what would change."""

import json
import subprocess
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.cli.conftest import Machine
from tests.controlplane.objects import authorization, peer_authentication, pod
from ztunnel.cli.app import ambient
from ztunnel.cli.authz.model import PolicyModel
from ztunnel.cli.authz.replay import Changed, replay
from ztunnel.mesh.policy import Connection

WEB: dict[str, Any] = {"selector": {"matchLabels": {"app": "web"}}}
CLIENT = "spiffe://cluster.local/ns/default/sa/client"
TO_WEB = pod("web-1", "10.0.0.1", labels={"app": "web"}, owner=("Deployment", "web"), mesh=True)


def connection(identity: str = CLIENT, source: str = "10.0.9.9", port: int = 80) -> Connection:
    return Connection.of(identity, ip_address(source).packed, ip_address("10.0.0.1").packed, port)


def from_namespace(name: str) -> dict[str, Any]:
    return {"from": [{"source": {"namespaces": [name]}}]}


def http() -> dict[str, Any]:
    return {"to": [{"operation": {"methods": ["GET"]}}]}


def test_rules_are_counted_as_they_are_written() -> None:
    """Not as they are sent: rules that need HTTP are left out on the way."""
    model = PolicyModel(
        [authorization("p", {**WEB, "rules": [http(), from_namespace("x"), from_namespace("default")]})]
    )
    told = model.explain(TO_WEB, connection())
    assert (told.allowed, told.policy, told.rule) == (True, "AuthorizationPolicy default/p", "rules[2]")
    assert told.reason == "allowed by AuthorizationPolicy default/p, rules[2]"
    assert told.policies[0].effect == "allows"


def test_every_policy_that_concerns_the_pod_is_told_of() -> None:
    model = PolicyModel(
        [
            authorization("a", {"rules": [from_namespace("default")]}),
            authorization("b", {"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["81"]}}]}]}),
            authorization("c", {**WEB, "rules": [{}]}),
            authorization("d", {"rules": []}, namespace="istio-system"),
            authorization("e", {"action": "DENY", "rules": [{}]}, dry_run=True),
            authorization("f", {"selector": {"matchLabels": {"app": "db"}}}),
            authorization("g", {}, namespace="other"),
            peer_authentication("s", {"mtls": {"mode": "STRICT"}}, namespace="istio-system"),
        ]
    )
    told = model.explain(TO_WEB, connection())
    assert [(each.object, each.scope, each.rule, each.effect, each.decides) for each in told.policies] == [
        ("AuthorizationPolicy default/b", "namespace", "", "no match", False),
        ("AuthorizationPolicy default/e", "namespace", "rules[0]", "dry run: denies", False),
        ("PeerAuthentication istio-system/s (STRICT)", "workload", "", "no match", False),
        ("AuthorizationPolicy istio-system/d", "mesh", "", "has no rules", False),
        ("AuthorizationPolicy default/a", "namespace", "rules[0]", "allows", True),
        ("AuthorizationPolicy default/c", "workload", "rules[0]", "allows too", False),
    ]
    assert told.rehearsed == "denied by AuthorizationPolicy default/e, rules[0]"
    plain = model.explain(TO_WEB, connection(""))
    assert plain.reason == "denied by PeerAuthentication istio-system/s (STRICT)"
    nobody = PolicyModel([authorization("p", {**WEB})]).explain(TO_WEB, connection())
    assert (nobody.allowed, nobody.reason) == (False, "ALLOW policies concern it, and none allows it")
    free = PolicyModel([]).explain(TO_WEB, connection())
    assert (free.allowed, free.reason) == (True, "no policy forbids it")


@pytest.mark.parametrize(
    ("objects", "deciding"),
    [
        ([("m", "istio-system", {"mtls": {"mode": "STRICT"}})], "istio-system/m"),
        ([("m", "istio-system", {"mtls": {"mode": "STRICT"}}), ("n", "default", {"mtls": {"mode": "UNSET"}})],
         "istio-system/m"),
        ([("m", "istio-system", {"mtls": {"mode": "STRICT"}}), ("n", "default", {"mtls": {"mode": "STRICT"}})],
         "default/n"),
        ([("n", "default", {"mtls": {"mode": "PERMISSIVE"}}), ("w", "default", {**WEB, "mtls": {"mode": "STRICT"}})],
         "default/w"),
        ([("n", "default", {"mtls": {"mode": "PERMISSIVE"}}), ("x", "default", {"mtls": {"mode": "strict"}})],
         "default/x"),
        ([("w", "default", {**WEB, "mtls": {"mode": "PERMISSIVE"}, "portLevelMtls": {80: {"mode": "STRICT"}}})],
         "default/w"),
    ],
)  # fmt: skip
def test_strict_is_told_by_the_object_that_says_so(
    objects: list[tuple[str, str, Any]], deciding: str
) -> None:
    model = PolicyModel([peer_authentication(name, spec, namespace=space) for name, space, spec in objects])
    assert model.explain(TO_WEB, connection("")).policy == f"PeerAuthentication {deciding} (STRICT)"


def record(
    identity: str = CLIENT, source: str = "10.0.9.9", to: str = "web-1", **more: Any
) -> dict[str, Any]:
    return {
        "src_identity": identity, "src_addr": source, "src_workload": "", "src_namespace": "", "dst_addr": "10.0.0.1",
        "dst_port": 80, "dst_workload": to, "dst_namespace": "default", "count": 1, "time": 100.0, **more,
    }  # fmt: skip


def test_a_replay_lists_what_changes_and_nothing_else() -> None:
    other = "spiffe://cluster.local/ns/other/sa/job"
    before = PolicyModel(
        [authorization("p", {**WEB, "rules": [from_namespace("default"), from_namespace("plain")]})]
    )
    after = PolicyModel([authorization("p", {**WEB, "rules": [from_namespace("other")]})])
    records = [
        record(count=3, time=50.0),
        record(source="10.0.9.8", count=4, time=70.0),
        record(dst_port=81, count=1),
        record(other, count=2),
        record("", source="10.0.7.7", count=9),
        record(to="gone", count=5),
        record("not an identity", count=7),
        record(to="db-1", count=6),
    ]
    pods = [TO_WEB, pod("db-1", "10.0.0.2", labels={"app": "db"})]
    told = replay(records, pods, before, after)
    none = "ALLOW policies concern it, and none allows it"
    assert told.cut_off == [
        Changed("cluster.local/ns/default/sa/client", "default/web", 80, none, 7, 70.0),
        Changed("cluster.local/ns/default/sa/client", "default/web", 81, none, 1, 100.0),
    ]
    assert told.newly_allowed == [
        Changed("cluster.local/ns/other/sa/job", "default/web", 80,
                "allowed by AuthorizationPolicy default/p, rules[0]", 2, 100.0)
    ]  # fmt: skip
    assert (told.connections, told.kinds, told.unknown, told.latest) == (25, 6, 12, 100.0)


def test_plaintext_is_told_by_who_sends_it() -> None:
    strict = PolicyModel([peer_authentication("s", {"mtls": {"mode": "STRICT"}})])
    records = [
        record("", src_workload="prometheus", src_namespace="monitoring"),
        record("", source="fd00::1"),
    ]
    told = replay(records, [TO_WEB], PolicyModel([]), strict)
    assert {each.source for each in told.cut_off} == {
        "plaintext, monitoring/prometheus",
        "plaintext, fd00::1",
    }
    assert not replay([], [TO_WEB], PolicyModel([]), strict).latest


def run(machine: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    return machine.ambient("authz", *words)


def test_questions_that_cannot_be_answered_are_exit_code_2(machine: Machine, tmp_path: Path) -> None:
    """As opposed to 1, which is an answer."""
    machine.ok("apply", "-f", "-", given="apiVersion: v1\nkind: Pod\nmetadata: {name: web}\n"
               "spec: {containers: [{name: c, command: [x]}]}\n")  # fmt: skip
    good = ("explain", "--to", "web", "--port", "80")
    for words, told in [
        ((*good, "--from", "nobody"), 'no pod "nobody"'),
        ((*good, "--from", "spiffe://x"), "is no identity"),
        ((*good, "--from", "web", "--from-ip", "here"), "here is no IP address"),
        (("explain", "--from", "web", "--to", "svc/shop", "--port", "80"), 'no Service "shop"'),
        (("check",), "give policies with -f FILE"),
        (("check", "--delete", "Pod/web"), "is no policy"),
        (("check", "--delete", "AuthorizationPolicy/x"), "AuthorizationPolicy default/x not found"),
        (("check", "-f", str(tmp_path / "none.yaml")), "does not exist"),
    ]:
        done = run(machine, *words)
        assert (done.returncode, told in done.stderr) == (2, True), done
        assert "Traceback" not in done.stderr
    policy = tmp_path / "p.yaml"
    policy.write_text(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {}\n"
    )
    silent = run(machine, "check", "-f", str(policy), "-o", "json")
    assert silent.returncode == 2, "no node tells what it has seen"
    assert json.loads(silent.stdout)["notReplayed"]
    assert "its connections are not replayed" in silent.stderr
    outside = run(machine, *good, "--from", "192.0.2.1")
    assert "not in the mesh: no policy is enforced" in outside.stdout + outside.stderr


def test_a_plain_name_is_a_service_before_it_is_the_beginning_of_a_pods_name(machine: Machine) -> None:
    machine.ok("apply", "-f", "-", given="apiVersion: v1\nkind: Pod\nmetadata: {name: shop-7f-1}\n"
               "spec: {containers: [{name: c, command: [x]}]}\n---\napiVersion: v1\nkind: Service\n"
               "metadata: {name: shop}\nspec: {selector: {app: shop}, ports: [{port: 80}]}\n")  # fmt: skip
    question = ("explain", "--from", "192.0.2.1", "--to")
    service = run(machine, *question, "shop", "--port", "80")
    assert "Service default/shop has no pods" in service.stderr
    pod = run(machine, *question, "shop", "--port", "8080")
    assert "pod default/shop-7f-1" in pod.stdout + pod.stderr
    machine.ok("apply", "-f", "-", given="apiVersion: v1\nkind: Pod\nmetadata: {name: shop}\n"
               "spec: {containers: [{name: c, command: [x]}]}\n")  # fmt: skip
    assert (
        "pod default/shop," in (done := run(machine, *question, "shop", "--port", "80")).stdout + done.stderr
    )


@pytest.mark.parametrize("verb", ["explain", "check"])
def test_each_has_examples_that_can_be_parsed(verb: str) -> None:
    shown = CliRunner().invoke(ambient, ["authz", verb, "--help"])
    assert shown.exit_code == 0
    for line in shown.output.partition("Examples:\n")[2].splitlines():
        words = line.partition("#")[0].partition("&&")[0].split()
        assert words[:3] == ["ambient", "authz", verb]
