"""Policies as files of a whole mesh's directory, and real connections: each action and each field, let in and kept out.

What a row says must become so, and stays so; how soon is not this module's subject.
"""

import itertools
import json
import os
import socket
import subprocess
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.whole import AMBIENT, ECHO, HTTP, MODE, WholeMesh
from ztunnel.cli.nodes import nodes
from ztunnel.inpod import netns
from ztunnel.store.models import AuthorizationPolicy, Condition, PeerAuthentication, Pod

pytestmark = pytest.mark.e2e

LIMIT = 30.0  # seconds for what takes a moment on a machine that is not busy
SEED = Path(__file__).parent.parent / "policy" / "seed.yaml"


def a_pod(name: str, node: str, *, namespace: str = "default", app: str = "", program: str = "[sleep, infinity]",
          mesh: bool = True) -> str:  # fmt: skip
    """A pod with a service account of its name."""
    outside = "" if mesh else f", {MODE}: none"
    return f"""
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app or name}{outside}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  terminationGracePeriodSeconds: 0
  containers: [{{name: main, command: {program}}}]
---
"""


def server(name: str, namespace: str = "default", app: str = "") -> str:
    return a_pod(name, "node-2", namespace=namespace, app=app, program="[PROGRAM]")


RESOURCES = "".join(
    f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{MODE}: ambient}}}}\n---\n"
    for name in ("default", "production", "legacy-apps")
)
RESOURCES += (
    server("web")
    + server("reviews")
    + server("api", "production", "api-server")
    + server("batch", "production")
)
RESOURCES += server("old", "legacy-apps") + a_pod("client", "node-1") + a_pod("productpage", "node-1")
RESOURCES += a_pod("frontend", "node-1", namespace="production") + a_pod("outsider", "node-1", mesh=False)
RESOURCES += """
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
"""


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(RESOURCES) as mesh:
        mesh.until(lambda: len([pod for pod in mesh.pods() if pod["ready"]]) == 9, "the pods run", LIMIT)
        mesh.wait_membership(
            web=True, reviews=True, api=True, batch=True, old=True, client=True, frontend=True
        )
        mesh.until(lambda: passes(mesh, "client > web:8080"), "traffic flows", LIMIT)
        yield mesh


def find(mesh: WholeMesh, name: str) -> Pod:
    return next(pod for pod in mesh.objects().list(Pod) if pod.name == name)


def passes(mesh: WholeMesh, row: str) -> bool:
    """Whether a connection "POD > POD:PORT" is answered; one that is refused ends without an answer."""
    source, target = (word.strip() for word in row.split(">"))
    name, port = target.split(":")
    space = netns.open_path(mesh.state.netns / find(mesh, source).metadata.uid)
    try:
        with netns.inside(space):
            connection = socket.socket()
    finally:
        os.close(space)
    with connection:
        connection.settimeout(LIMIT)
        try:
            connection.connect((find(mesh, name).addresses[0], int(port)))
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(1) != b""
        except ConnectionError:
            return False


class Case(NamedTuple):
    """A policy's spec ({web}, {client} stand for addresses), and rows about it: yes or no, and a connection."""

    name: str
    spec: str
    rows: str
    kind: str = "AuthorizationPolicy"
    namespace: str = "default"
    note: str = ""


WEB = "selector: {matchLabels: {app: web}}\n"
ID = "cluster.local/ns/default/sa/client"


def rule(text: str, action: str = "ALLOW") -> str:
    return f"{WEB}action: {action}\nrules: [{text}]"


def source(text: str, action: str = "ALLOW") -> str:
    return rule(f"{{from: [{{source: {{{text}}}}}]}}", action)


def when(key: str, text: str, action: str = "ALLOW") -> str:
    return rule(f"{{when: [{{key: {key}, {text}}}]}}", action)


ONLY_CLIENT = (
    "yes client > web:8080\nno productpage > web:8080\nno outsider > web:8080\nyes outsider > reviews:8080"
)
NOT_CLIENT = "no client > web:8080\nyes productpage > web:8080\nyes client > reviews:8080"
ONLY_HTTP = f"yes client > web:{HTTP}\nno client > web:{ECHO}\nyes client > reviews:{ECHO}"
NOT_HTTP = f"no client > web:{HTTP}\nyes client > web:{ECHO}"
NOTHING = "no client > web:8080\nno outsider > web:8080\nyes client > reviews:8080"

CASES = [
    Case("principals", source(f"principals: [{ID}]"), ONLY_CLIENT),
    Case("deny principals", source(f"principals: [{ID}]", "DENY"), NOT_CLIENT + "\nyes outsider > web:8080"),
    Case("a beginning", source('principals: ["cluster.local/ns/production/*"]'),
         "yes frontend > web:8080\nno client > web:8080"),
    Case("an end", source('principals: ["*/sa/client"]', "DENY"), NOT_CLIENT),
    Case("presence", source('principals: ["*"]'), "yes client > web:8080\nno outsider > web:8080"),
    Case("notPrincipals", source(f"notPrincipals: [{ID}]"), NOT_CLIENT + "\nyes outsider > web:8080"),
    Case("deny notPrincipals", source('notPrincipals: ["*"]', "DENY"), "yes client > web:8080\nno outsider > web:8080"),
    Case("namespaces", source("namespaces: [production]"), "yes frontend > web:8080\nno client > web:8080"),
    Case("deny namespaces", source('namespaces: ["prod*"]', "DENY"), "no frontend > web:8080\nyes client > web:8080"),
    Case("notNamespaces", source("notNamespaces: [default]"), "yes frontend > web:8080\nno client > web:8080"),
    Case("deny notNamespaces", source("notNamespaces: [default]", "DENY"),
         "no frontend > web:8080\nyes client > web:8080"),
    Case("serviceAccounts", source("serviceAccounts: [client, production/frontend]"),
         ONLY_CLIENT + "\nyes frontend > web:8080"),
    Case("deny serviceAccounts", source("serviceAccounts: [default/client]", "DENY"), NOT_CLIENT),
    Case("notServiceAccounts", source("notServiceAccounts: [client]"), NOT_CLIENT),
    Case("deny notServiceAccounts", source("notServiceAccounts: [client]", "DENY"), ONLY_CLIENT),
    Case("ipBlocks", source("ipBlocks: [{client}/32]"), ONLY_CLIENT),
    Case("deny ipBlocks", source("ipBlocks: [{client}]", "DENY"), NOT_CLIENT),
    Case("notIpBlocks", source("notIpBlocks: [{client}]"), NOT_CLIENT + "\nyes outsider > web:8080"),
    Case("deny notIpBlocks", source("notIpBlocks: [{client}]", "DENY"), ONLY_CLIENT),
    Case("ports", rule("{to: [{operation: {ports: ['8080']}}]}"), ONLY_HTTP),
    Case("deny ports", rule("{to: [{operation: {ports: ['8080']}}]}", "DENY"), NOT_HTTP),
    Case("notPorts", rule("{to: [{operation: {notPorts: ['8080']}}]}"), NOT_HTTP),
    Case("deny notPorts", rule("{to: [{operation: {notPorts: ['8080']}}]}", "DENY"), ONLY_HTTP),
    Case("when source.principal", when("source.principal", f"values: [{ID}]"), ONLY_CLIENT),
    Case("when not source.principal", when("source.principal", f"notValues: [{ID}]"), NOT_CLIENT),
    Case("when source.namespace", when("source.namespace", "values: [production]", "DENY"),
         "no frontend > web:8080\nyes client > web:8080"),
    Case("when source.serviceAccount", when("source.serviceAccount", "values: [client]"), ONLY_CLIENT),
    Case("when source.ip", when("source.ip", "values: ['{client}']"), ONLY_CLIENT),
    Case("when destination.ip", when("destination.ip", "values: ['{web}']", "DENY"), NOTHING),
    Case("when not destination.ip", when("destination.ip", "notValues: ['{web}']"), NOTHING),
    Case("when destination.port", when("destination.port", "values: ['8080']"), ONLY_HTTP),
    Case("empty spec", "{{}}", "no client > web:8080\nno client > reviews:8080\nyes client > api:8080"),
    Case("deny all", rule("{}", "DENY"), NOTHING),
    Case("allow all", rule("{}"), "yes client > web:8080\nyes outsider > web:8080"),
    Case("of the root namespace", f"action: DENY\nrules: [{{from: [{{source: {{principals: [{ID}]}}}}]}}]",
         "no client > web:8080\nno client > api:8080\nyes productpage > api:8080", namespace="istio-system"),
    Case("HTTP in ALLOW", rule("{to: [{operation: {methods: [GET]}}]}"), NOTHING),
    Case("HTTP in DENY", rule("{to: [{operation: {methods: [GET], ports: ['8080']}}]}", "DENY"), NOT_HTTP),
    Case("nothing but HTTP in DENY", rule("{to: [{operation: {paths: [/admin]}}]}", "DENY"), NOTHING),
    Case("a fault in ALLOW", source("ipBlocks: [0.0.0.0/33]"), NOTHING),
    Case("a fault in DENY", source("ipBlocks: [0.0.0.0/33]", "DENY"), NOTHING),
    Case("a dry run", rule("{}", "DENY"), "yes client > web:8080", note='istio.io/dry-run: "true"'),
    Case("STRICT of the mesh", "mtls: {mode: STRICT}",
         "no outsider > web:8080\nno outsider > api:8080\nyes client > web:8080",
         kind="PeerAuthentication", namespace="istio-system"),
    Case("STRICT of a namespace", "mtls: {mode: STRICT}",
         "no outsider > web:8080\nyes outsider > api:8080\nyes client > web:8080", kind="PeerAuthentication"),
    Case("STRICT of a workload", WEB + "mtls: {mode: STRICT}",
         "no outsider > web:8080\nyes outsider > reviews:8080\nyes client > web:8080", kind="PeerAuthentication"),
    Case("a port that takes plaintext", WEB + "mtls: {mode: STRICT}\nportLevelMtls: {8080: {mode: PERMISSIVE}}",
         f"yes outsider > web:8080\nno outsider > web:{ECHO}\nyes client > web:{ECHO}", kind="PeerAuthentication"),
    Case("a port that does not", WEB + "mtls: {mode: PERMISSIVE}\nportLevelMtls: {8080: {mode: STRICT}}",
         f"no outsider > web:8080\nyes outsider > web:{ECHO}\nyes client > web:8080", kind="PeerAuthentication"),
    Case("DISABLE", "mtls: {mode: DISABLE}", "yes outsider > web:8080\nyes client > web:8080",
         kind="PeerAuthentication"),
]  # fmt: skip

NUMBERS = itertools.count()


def document(mesh: WholeMesh, case: Case, name: str) -> str:
    spec = case.spec.replace("{client}", find(mesh, "client").addresses[0])
    spec = spec.replace("{web}", find(mesh, "web").addresses[0]).replace("{{}}", "{}")
    annotations = f", annotations: {{{case.note}}}" if case.note else ""
    return (
        f"apiVersion: security.istio.io/v1\nkind: {case.kind}\n"
        f"metadata: {{name: {name}, namespace: {case.namespace}{annotations}}}\nspec:\n{textwrap.indent(spec, '  ')}\n"
    )


def at_nodes(mesh: WholeMesh) -> set[str]:
    """The policies that every node's proxy holds."""
    held = [
        {f"{each['namespace']}/{each['name']}" for each in node.dump("policies")["policies"]}
        for node in nodes(mesh.state.path)
    ]
    return set.intersection(*held)


def settle(mesh: WholeMesh, rows: str) -> None:
    """Until every row is so."""

    def wrong() -> list[str]:
        return [
            row for row in rows.strip().splitlines()
            if passes(mesh, row.split(maxsplit=1)[1]) is not (row.split()[0] == "yes")
        ]  # fmt: skip

    left: list[str] = []

    def settled() -> bool:
        left[:] = wrong()
        return not left

    try:
        mesh.until(settled, "the connections are as they should be", LIMIT)
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(f"still wrong: {left}") from error


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_each_action_and_field(mesh: WholeMesh, case: Case) -> None:
    name = f"case-{next(NUMBERS)}"
    mesh.resources(document(mesh, case, name), "policy.yaml")
    if case.kind == "AuthorizationPolicy":
        mesh.until(lambda: f"{case.namespace}/{name}" in at_nodes(mesh), "the nodes have it", LIMIT)
    settle(mesh, case.rows)


def conditions(mesh: WholeMesh, kind: Any, namespace: str, name: str) -> list[Condition]:
    found = mesh.objects().get(kind, namespace, name)
    return list(found.status.conditions) if found is not None else []


def test_the_documents_of_the_seed(mesh: WholeMesh) -> None:
    """As they are; what of them is not about connections is said, and never opens anything."""
    mesh.resources(SEED.read_text(), "policy.yaml")
    settle(mesh, """
        no outsider > web:8080
        yes client > web:8080
        no client > reviews:8080
        no productpage > reviews:8080
        no frontend > api:8080
        no frontend > batch:8080
        yes outsider > old:8080
        yes client > old:8080
    """)  # fmt: skip
    wanted = {
        (PeerAuthentication, "istio-system", "default"): ("True", "enforced by ztunnel"),
        (PeerAuthentication, "legacy-apps", "legacy-compat"): ("True", "enforced by ztunnel"),
        (AuthorizationPolicy, "production", "deny-all"): ("True", "allows nothing (it has no rules)"),
        (AuthorizationPolicy, "default", "reviews-viewer"): ("False", "found: methods, paths"),
        (AuthorizationPolicy, "production", "require-jwt"): ("False", "left out: rules[0]"),
        (AuthorizationPolicy, "production", "ext-authz"): ("False", "does not support the CUSTOM action"),
    }
    for key, (status, message) in wanted.items():
        mesh.until(partial(conditions, mesh, *key), f"{key} has a status", LIMIT)
        (condition,) = conditions(mesh, *key)
        assert (condition.type, condition.status) == ("ZtunnelAccepted", status)
        assert message in condition.message
    shown = mesh.ok("get", "authorizationpolicy", "reviews-viewer", "-o", "yaml")
    assert "ZtunnelAccepted" in shown
    assert "methods: [" in shown or "- GET" in shown, "the spec is as it was written"
    table = mesh.ok("get", "authorizationpolicies,peerauthentications", "-A")
    assert "reviews-viewer" in table
    assert "UnsupportedValue" in table
    problems = [str(problem) for problem in mesh.status()["problems"]]
    assert any("AuthorizationPolicy default/reviews-viewer (policy.yaml:" in text for text in problems)


def authz(mesh: WholeMesh, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [AMBIENT, "authz", *words, "--state", str(mesh.state.path)],
        capture_output=True, text=True, timeout=60, check=False, env=mesh.env,
    )  # fmt: skip


def test_explain_says_what_happens(mesh: WholeMesh) -> None:
    mesh.resources(document(mesh, Case("", source(f"principals: [{ID}]"), ""), "only-client"), "policy.yaml")
    settle(mesh, ONLY_CLIENT)
    allowed = authz(mesh, "explain", "--from", "client", "--to", "web", "--port", "8080")
    assert allowed.returncode == 0, allowed
    assert "allowed: by AuthorizationPolicy default/only-client, rules[0]" in allowed.stdout
    denied = authz(mesh, "explain", "--from", "productpage", "--to", "svc/web", "--port", "80", "-o", "json")
    assert denied.returncode == 1, denied
    (answer,) = json.loads(denied.stdout)
    assert (answer["allowed"], answer["to"]["port"], answer["policies"][0]["effect"]) == (
        False,
        8080,
        "no match",
    )
    plain = authz(mesh, "explain", "--from", "outsider", "--to", "web", "--port", "8080")
    assert (plain.returncode, "not in the mesh" in plain.stdout) == (1, True), plain
    other = authz(mesh, "explain", "--from", ID, "--to", "default/web", "--port", "8080", "-n", "production")
    assert other.returncode == 0, other
    unknown = authz(mesh, "explain", "--from", "nobody", "--to", "web", "--port", "8080")
    assert (unknown.returncode, 'no pod "nobody"' in unknown.stderr) == (2, True), unknown


def test_check_finds_what_a_policy_would_cut_off(mesh: WholeMesh, tmp_path: Path) -> None:
    mesh.resources(
        document(mesh, Case("", source(f"notPrincipals: [{ID}]"), ""), "not-client"), "policy.yaml"
    )
    settle(mesh, "no client > web:8080\nyes productpage > web:8080\nyes frontend > web:8080")
    new = tmp_path / "new.yaml"
    new.write_text(
        document(mesh, Case("", source("principals: ['cluster.local/ns/default/*']"), ""), "not-client")
    )
    done = authz(mesh, "check", "-f", str(new), "-o", "json")
    assert done.returncode == 1, done
    told = json.loads(done.stdout)
    assert told["with"] == ["AuthorizationPolicy default/not-client (changed)"]
    cut = {(each["source"], each["destination"], each["port"]) for each in told["cutOff"]}
    assert ("cluster.local/ns/production/sa/frontend", "default/web", 8080) in cut
    assert ("cluster.local/ns/default/sa/productpage", "default/web", 8080) not in cut
    opened = {(each["source"], each["port"]) for each in told["newlyAllowed"]}
    assert (ID, 8080) in opened
    table = authz(mesh, "check", "-f", str(new))
    assert "would be cut off" in table.stdout
    assert "would be newly allowed" in table.stdout
    new.write_text(document(mesh, Case("", rule("{}"), ""), "all"))
    harmless = authz(mesh, "check", "-f", str(new))
    assert harmless.returncode == 0, harmless
    assert "nothing would be cut off" in harmless.stdout
    settle(mesh, "no client > web:8080\nyes frontend > web:8080")  # nothing was applied
    new.write_text(document(mesh, Case("", rule("{form: []}"), ""), "wrong"))
    wrong = authz(mesh, "check", "-f", str(new))
    assert (wrong.returncode, 'did you mean "from"?' in wrong.stderr) == (2, True), wrong
