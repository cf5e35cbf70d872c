"""The verbs on a cluster: as a user runs them, against a real API server; and on two nodes with the mesh on them."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kube.lab import Lab
from tests.kube.sample import ambient, install

pytestmark = [pytest.mark.kube, pytest.mark.timeout(600)]

LIMIT = 60.0
AMBIENT = "istio.io/dataplane-mode"
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
"""
ROLE = """\
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader}
rules: [{apiGroups: [""], resources: [pods], verbs: [get, list]}]
"""
POD = """\
apiVersion: v1
kind: Pod
metadata: {name: web-1, labels: {app: web}}
spec: {containers: [{name: web, image: none}]}
"""
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: viewer}
spec: {rules: [{from: [{source: {namespaces: [shop]}}]}]}
"""


class User:
    """Somebody with a kubeconfig and no mesh on this machine, in a namespace of his own."""

    def __init__(self, kubeconfig: Path, home: Path, namespace: str) -> None:
        self.kubeconfig = kubeconfig
        self.home = home
        self.namespace = namespace

    def run(
        self, *arguments: str, given: str | None = None, limit: float = LIMIT
    ) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key != "AMBIENT_STATE"}
        environment |= {"KUBECONFIG": str(self.kubeconfig), "HOME": str(self.home)}
        return subprocess.run(
            [sys.executable, "-P", "-m", "ztunnel.cli.main", *arguments],
            input=given,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )

    def ok(self, *arguments: str, given: str | None = None) -> str:
        done = self.run(*arguments, given=given)
        assert done.returncode == 0, done
        return done.stdout

    def fails(self, *arguments: str, given: str | None = None, code: int = 1) -> str:
        done = self.run(*arguments, given=given)
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr, done
        return done.stderr


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without anything; no mesh runs at the default place of who has it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def kinds(apiserver: Lab) -> None:
    """The mesh's own kinds are served."""
    folder = Path(__file__).parents[2] / "manifests" / "base" / "crds"
    apiserver.kubectl("apply", "--server-side", "--force-conflicts", "-k", folder)
    apiserver.kubectl("wait", "--for=condition=established", "crd", "--all", "--timeout=60s")


@pytest.fixture
def space(apiserver: Lab) -> Iterator[str]:
    name = f"cli-{uuid.uuid4().hex[:8]}"
    apiserver.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    account = {"name": "default", "namespace": name}  # which a controller makes where there is one
    apiserver.api.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
    yield name
    apiserver.api.delete("v1", "Namespace", "", name)  # which nobody finishes without a controller manager


@pytest.fixture
def user(apiserver: Lab, home: Path, space: str) -> User:
    return User(with_context(apiserver, home, space), home, space)


def with_context(lab: Lab, home: Path, namespace: str, **user: Any) -> Path:
    """A kubeconfig whose context `own` has the namespace; as `user`, if any is described, else as the lab's admin."""
    config = yaml.safe_load(lab.kubeconfig.read_text())
    context = {**config["contexts"][0]["context"], "namespace": namespace}
    if user:
        config["users"].append({"name": "own", "user": user})
        context["user"] = "own"
    config["contexts"].append({"name": "own", "context": context})
    config["current-context"] = "own"
    path = home / f"{uuid.uuid4().hex[:8]}.conf"
    path.write_text(yaml.safe_dump(config))
    return path


def until(look: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
    """Wait until `look` says yes."""
    end = time.monotonic() + limit
    while not look():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def test_objects_are_applied_changed_and_deleted_as_kubectl_would(apiserver: Lab, user: User) -> None:
    assert user.ok("apply", "-f", "-", given=f"{SERVICE}---\n{ROLE}") == (
        "service/web created\nrole.rbac.authorization.k8s.io/reader created\n"
    )
    assert user.ok("apply", "-f", "-", given=SERVICE) == "service/web unchanged\n"
    assert user.ok("apply", "-f", "-", given=SERVICE.replace("80", "81")) == "service/web configured\n"
    seen = json.loads(
        apiserver.kubectl(
            "get", "service", "web", "-n", user.namespace, "-o", "json", "--show-managed-fields"
        )
    )
    assert [port["port"] for port in seen["spec"]["ports"]] == [81]
    assert {field["manager"] for field in seen["metadata"]["managedFields"]} == {"ambient"}
    shown = json.loads(user.ok("get", "service", "web", "-o", "json"))
    assert shown["spec"]["clusterIP"] == seen["spec"]["clusterIP"]
    assert shown["metadata"]["resourceVersion"] == seen["metadata"]["resourceVersion"]
    assert user.ok("delete", "-f", "-", given=f"{SERVICE}---\n{ROLE}") == (
        "role.rbac.authorization.k8s.io/reader deleted\nservice/web deleted\n"
    )
    assert "service/web not found in namespace" in user.fails("delete", "service", "web")
    assert user.ok("delete", "service", "web", "--ignore-not-found") == ""


def test_what_is_wrong_stops_nothing_else(user: User) -> None:
    given = "---\n".join(
        (SERVICE.replace("80", "99999"), "apiVersion: v9\nkind: Thing\nmetadata: {name: it}\n", ROLE)
    )
    done = user.run("apply", "-f", "-", given=given)
    assert done.returncode == 1
    assert done.stdout == "role.rbac.authorization.k8s.io/reader created\n"
    assert "the cluster has no Thing of v9" in done.stderr
    assert f"Service {user.namespace}/web" in done.stderr


def test_an_object_of_another_namespace_than_was_said_is_refused(user: User) -> None:
    given = SERVICE.replace("{name: web}", "{name: web, namespace: elsewhere}")
    assert "is of namespace elsewhere" in user.fails("apply", "-n", user.namespace, "-f", "-", given=given)


def test_labels_are_set_kept_and_removed(apiserver: Lab, user: User) -> None:
    label = ("label", "namespace", user.namespace)
    assert user.ok(*label, f"{AMBIENT}=ambient") == f"namespace/{user.namespace} labeled\n"
    assert user.ok(*label, f"{AMBIENT}=ambient") == f"namespace/{user.namespace} not labeled\n"
    assert "change it with --overwrite" in user.fails(*label, f"{AMBIENT}=none")
    found = json.loads(apiserver.kubectl("get", "namespace", user.namespace, "-o", "json"))
    assert found["metadata"]["labels"][AMBIENT] == "ambient"
    assert user.ok(*label, f"{AMBIENT}-") == f"namespace/{user.namespace} unlabeled\n"
    assert "not found" in user.fails("label", "pod", "nobody", "a=b")


def test_the_namespace_is_the_contexts_and_contexts_are_chosen(apiserver: Lab, user: User) -> None:
    user.ok("apply", "-f", "-", given=SERVICE)
    assert user.ok("get", "services").splitlines()[1].split()[0] == "web"
    other = yaml.safe_load(user.kubeconfig.read_text())["contexts"][0]["name"]
    assert "web" not in user.run("--context", other, "get", "services").stdout
    assert "web" not in user.ok("get", "services", "--context", other)
    assert "own" in user.fails("get", "services", "--context", "absent")
    assert "give only one of them" in user.fails("get", "pods", "--context", "own", "--state", "/nowhere")
    assert "no such file" in user.fails("get", "pods", "--kubeconfig", str(user.home / "absent"))


def test_a_user_without_rights_hears_which(apiserver: Lab, home: Path, space: str) -> None:
    apiserver.kubectl("create", "serviceaccount", "guest", "-n", space)
    apiserver.kubectl("apply", "-n", space, "-f", "-", stdin=ROLE)
    apiserver.kubectl(
        "create", "rolebinding", "guest", "-n", space, "--role=reader", f"--serviceaccount={space}:guest"
    )
    token = apiserver.kubectl("create", "token", "guest", "-n", space).strip()
    guest = User(with_context(apiserver, home, space, token=token), home, space)
    until(lambda: guest.run("get", "pods").returncode == 0, "the rights are known")
    told = guest.fails("get", "services")
    assert 'cannot list resource "services"' in told
    assert f"system:serviceaccount:{space}:guest" in told
    assert "bind a Role or ClusterRole" in told
    told = guest.fails("apply", "-f", "-", given=SERVICE)
    assert 'cannot get resource "services"' in told or 'cannot patch resource "services"' in told
    checked = json.loads(guest.run("check", "-o", "json").stdout)
    found = {one["description"]: one for each in checked["categories"] for one in each["checks"]}
    assert found["the API server answers"]["result"] == "ok"
    assert found["everything may be asked for"]["result"] == "warning"
    assert any(
        'cannot list resource "deployments"' in each
        for each in found["everything may be asked for"]["details"]
    )
    assert found["the control plane runs and is ready"]["result"] == "skipped"


def test_a_token_that_is_not_valid_any_more_is_told_as_such(apiserver: Lab, home: Path, space: str) -> None:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    token = f"{part({'alg': 'RS256'})}.{part({'exp': 1})}.c2lnbmF0dXJl"
    expired = User(with_context(apiserver, home, space, token=token), home, space)
    told = expired.fails("get", "pods")
    assert "does not know who asks" in told
    assert "log in again" in told
    assert token not in told


def test_an_api_server_that_is_not_there_is_told_soon(apiserver: Lab, home: Path, space: str) -> None:
    config = yaml.safe_load(with_context(apiserver, home, space).read_text())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        for cluster in config["clusters"]:
            cluster["cluster"]["server"] = f"https://127.0.0.1:{unused.getsockname()[1]}"
        path = home / "gone.conf"
        path.write_text(yaml.safe_dump(config))
        nobody = User(path, home, space)
        assert "cannot be reached" in nobody.fails("get", "pods")
        assert "cannot be reached" in nobody.fails("proxy-status")
        checked = nobody.run("check")
        assert checked.returncode == 1
        assert "cannot be reached" in checked.stdout
        assert "--context" in checked.stdout


def test_a_cluster_without_the_mesh_says_how_to_install_it(user: User) -> None:
    for verb in (
        ["status"],
        ["proxy-status"],
        ["proxy-config", "workloads"],
        ["tap"],
        ["stat"],
        ["ca", "status"],
    ):
        assert "install the mesh with: ambient install" in user.fails(*verb), verb
    checked = user.run("check")
    assert checked.returncode == 1
    assert "there is no Deployment istio-system/istiod" in checked.stdout
    assert "remedy: install the mesh with: ambient install" in checked.stdout


def test_objects_are_analyzed(kinds: None, apiserver: Lab, user: User) -> None:
    apiserver.kubectl("label", "namespace", user.namespace, "istio-injection=enabled")
    apiserver.kubectl("apply", "-n", user.namespace, "-f", "-", stdin=f"{SERVICE}---\n{POD}")
    found = json.loads(user.run("analyze", "-o", "json").stdout)
    (hint,) = [one for one in found if one["object"] == f"Namespace {user.namespace}"]
    assert (
        f"kubectl label namespace {user.namespace} istio.io/dataplane-mode=ambient istio-injection-"
        in hint["remedy"]
    )
    policy = POLICY.replace("from:", "form:")
    done = user.run("analyze", "-f", "-", given=policy)
    assert done.returncode == 79, done
    assert "form" in done.stdout
    assert user.ok("analyze", "-f", "-", "-n", user.namespace, given=POLICY) == "no issues found\n"


def test_policies_are_looked_at_before_the_cluster_is_asked(kinds: None, user: User) -> None:
    told = user.fails("apply", "-f", "-", given=POLICY.replace("spec: {", "spec: {selectr: {}, "))
    assert 'did you mean "selector"?' in told


def test_pods_that_shall_be_in_the_mesh_are_explained(apiserver: Lab, user: User) -> None:
    apiserver.kubectl("apply", "-n", user.namespace, "-f", "-", stdin=f"{SERVICE}---\n{POD}")
    assert "web-1" in user.ok("get", "pods")
    told = user.fails("authz", "explain", "--from", "web-1", "--to", "web", "--port", "80", code=2)
    assert "has no pods" in told or "no address" in told
    assert "use: kubectl" in user.fails("exec", "node/n1", "--", "true")


# On two nodes, with the mesh.

SHOP = """\
apiVersion: v1
kind: Namespace
metadata: {name: NAME, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: NAME}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: NAME}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/hostname: node2}
      terminationGracePeriodSeconds: 1
      containers:
      - {name: web, image: "lab.local/tools:test", command: [python, -m, http.server, "8080"], workingDir: /usr}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: client, namespace: NAME}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client}}
    spec:
      nodeSelector: {kubernetes.io/hostname: node1}
      terminationGracePeriodSeconds: 1
      containers:
      - name: client
        image: lab.local/tools:test
        command: [sh, -c, "while :; do curl -s -o /dev/null http://web/; sleep 0.2; done"]
"""


@pytest.fixture(scope="module")
def shop(cluster: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """The mesh, and a client that asks a Service all the time; the user's own namespace is theirs."""
    name = f"cli-{uuid.uuid4().hex[:8]}"
    home = tmp_path_factory.mktemp("home")
    install(cluster)
    user = User(with_context(cluster, home, name), home, name)
    try:
        user.ok("apply", "-f", "-", given=SHOP.replace("NAME", name))
        until(lambda: user.run("check", "--wait", "30").returncode == 0, "all checks are green", 3 * LIMIT)
        yield user
    finally:
        user.run("delete", "-f", "-", given=SHOP.replace("NAME", name))
        cluster.kubectl("wait", "--for=delete", f"namespace/{name}", "--timeout=120s", timeout=150)
        ambient(cluster, "uninstall", "--purge", "-y", code=None)


def test_a_mesh_that_is_well_is_all_green(shop: User) -> None:
    def not_green() -> list[dict[str, Any]]:
        checked = json.loads(shop.ok("check", "--wait", "30", "-o", "json"))
        assert checked["success"]
        return [one for each in checked["categories"] for one in each["checks"] if one["result"] != "ok"]

    end = time.monotonic() + LIMIT
    while (found := not_green()) and time.monotonic() < end:
        time.sleep(1)
    assert found == []
    told = shop.ok("status")
    assert "controlplane" in told
    assert {f"{part}-node{number}" for part in ("agent", "ztunnel") for number in (1, 2)} <= set(told.split())
    (space,) = [
        one
        for one in json.loads(shop.ok("status", "-o", "json"))["namespaces"]
        if one["name"] == shop.namespace
    ]
    assert space == {"name": shop.namespace, "mode": "ambient", "pods": 2, "mesh": 2, "outside": 0}


def test_proxies_are_in_sync_and_tell_what_they_know(shop: User) -> None:
    lines = shop.ok("proxy-status").splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["node1", "node2"]
    assert all(line.count("SYNCED") == 2 for line in lines[1:])
    services = json.loads(shop.ok("proxy-config", "services", "node1", "-o", "json"))
    assert ("web", 1) in {
        (one["name"], one["endpoints"]) for one in services if one["namespace"] == shop.namespace
    }
    (certificate,) = json.loads(shop.ok("proxy-config", "certificates", "deploy/client", "-o", "json"))
    assert certificate["identity"] == f"spiffe://cluster.local/ns/{shop.namespace}/sa/default"
    assert "there is no node 'absent'" in shop.fails("proxy-config", "workloads", "node/absent")
    assert "BEGIN CERTIFICATE" in shop.ok("ca", "roots")
    assert "state: stable" in shop.ok("ca", "status")


def test_connections_are_seen_on_both_nodes(shop: User) -> None:
    tapped = [
        json.loads(line)
        for line in shop.ok("tap", "-n", shop.namespace, "--max", "8", "-o", "json").splitlines()
    ]
    assert {one["connection_security_policy"] for one in tapped} == {"mutual_tls"}
    assert {one["node"] for one in tapped} == {"node1", "node2"}
    (row,) = [one for one in json.loads(shop.ok("stat", "-o", "json"))["rows"] if one["name"] == "web"]
    assert row["connections"] > 0
    assert row["mutual_tls"] == 1
    assert f"-> {shop.namespace}/web" in shop.ok("graph", "-n", shop.namespace)
    assert "conversations: 1" in shop.ok("top", "--times", "1", "-n", shop.namespace)
    assert shop.ok(
        "authz", "explain", "--from", "deploy/client", "--to", "svc/web", "--port", "80"
    ).startswith("allowed")


def test_what_pods_and_the_mesh_print_is_shown(shop: User) -> None:
    assert "access" in shop.ok("logs", "mesh/ztunnel-node2", "--tail", "50")
    assert "GET /" in shop.ok("logs", "deploy/web", "--tail", "3")
    assert "agent-node1" in shop.fails("logs", "mesh/absent")


def test_a_capture_sees_tunnels_on_the_node_and_on_the_pod(shop: User) -> None:
    for where in (("--node", "node1"), ("deploy/web",)):
        final = json.loads(shop.ok("capture", *where, "--duration", "4", "-o", "json").splitlines()[-1])
        tunnels = [flow for flow in final["flows"] if flow["server"].endswith(":15008")]
        assert tunnels, (where, final)
        assert all(flow["security"] == "TLS" and flow["hbone"] for flow in tunnels), final
    assert "there is no node agent on node" in shop.fails("capture", "--node", "absent")
