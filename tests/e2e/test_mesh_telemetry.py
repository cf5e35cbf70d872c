"""The operators' view of a whole mesh: its metrics pages, and `ambient stat`, `top` and `graph` on it."""

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.whole import HTTP, MODE, WholeMesh
from tests.telemetry.scraped import Scraped
from ztunnel.cli.nodes import UnixConnection

pytestmark = pytest.mark.e2e

LIMIT = 30.0
PODS = f"""
apiVersion: v1
kind: Namespace
metadata: {{name: default, labels: {{{MODE}: ambient}}}}
---
apiVersion: v1
kind: Namespace
metadata: {{name: plain}}
---
apiVersion: v1
kind: Service
metadata: {{name: web}}
spec: {{selector: {{app: web}}, ports: [{{port: 80, targetPort: {HTTP}}}]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web}}
spec:
  replicas: 2
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web, version: v7}}}}
    spec: {{containers: [{{name: main, command: [PROGRAM]}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: client}}
spec: {{containers: [{{name: main, command: [sleep, "86400"]}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: stranger, namespace: plain}}
spec: {{containers: [{{name: main, command: [sleep, "86400"]}}]}}
"""


def wait_answer(mesh: WholeMesh, client: str, namespace: str, url: str) -> None:
    """Until the program that serves it does so: pods are ready before their programs listen."""

    def answers() -> bool:
        return mesh.exec(client, "curl", "-sf", "-m", "2", url, namespace=namespace).code == 0

    mesh.until(answers, f"{url} answers {client}", 60)


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(PODS) as mesh:
        mesh.wait_pods()
        mesh.until(
            lambda: (
                {pod["name"] for pod in mesh.pods() if pod["mesh"]} >= {"client"}
                and all(pod["mesh"] for pod in mesh.pods("web"))
            ),
            "the pods are in the mesh",
            60,
        )
        for client, namespace in (("client", "default"), ("stranger", "plain")):
            for web in mesh.pods("web"):
                wait_answer(mesh, client, namespace, f"http://{web['ip']}:{HTTP}/")
        yield mesh


def get(path: Path, page: str, accept: str = "") -> tuple[str, str]:
    """A page over a Unix socket: its body and content type."""
    with contextlib.closing(UnixConnection(path, LIMIT)) as connection:
        connection.request("GET", page, headers={"accept": accept} if accept else {})
        answer = connection.getresponse()
        body = answer.read().decode()
        assert answer.status == 200, body
        return body, answer.getheader("content-type", "")


def both(mesh: WholeMesh) -> list[Scraped]:
    return [
        Scraped(get(mesh.state.node(node) / "metrics.sock", "/metrics")[0]) for node in ("node-1", "node-2")
    ]


def ambient(mesh: WholeMesh, *arguments: str) -> str:
    done = mesh.ambient(*arguments)
    assert done.returncode == 0, done
    return str(done.stdout)


def _stat(mesh: WholeMesh, host: str) -> dict[str, Any]:
    """What `ambient stat services` says of one, since the proxies started."""
    found = json.loads(ambient(mesh, "stat", "services", "--from", "client", "--window", "0", "-o", "json"))
    (row,) = [row for row in found["rows"] if row["name"] == host]
    assert isinstance(row, dict)
    return row


def test_connections_through_a_service_are_in_every_view(mesh: WholeMesh) -> None:
    host = "web.default.svc.cluster.local"
    opened = "istio_tcp_connections_opened_total"
    wanted = {"destination_service": host, "connection_security_policy": "mutual_tls"}
    wait_answer(mesh, "client", "default", "http://web/")
    before = sum(page.sum(opened, reporter="source", **wanted) for page in both(mesh))
    failed = _stat(mesh, host)["failed"]
    for _ in range(10):
        done = mesh.exec("client", "curl", "-sSf", "http://web/")
        assert done.code == 0, done

    def counted() -> bool:
        pages = both(mesh)
        return all(
            sum(page.sum(opened, reporter=reporter, **wanted) for page in pages) >= before + 10
            for reporter in ("source", "destination")
        )

    mesh.until(counted, "both reporters have counted them", LIMIT)
    (line, *_) = [
        found for page in both(mesh) for found in page.find(opened, reporter="destination", **wanted)
    ]
    assert line.labels["destination_workload"] == "web"
    assert line.labels["destination_version"] == "v7"
    assert line.labels["source_workload"] == "client"
    assert line.labels["source_principal"] == "spiffe://cluster.local/ns/default/sa/default"

    row = _stat(mesh, host)
    assert (row["mutual_tls"], row["failed"]) == (1.0, failed)
    assert row["connections"] >= before + 10
    text = ambient(mesh, "stat", "deploy/web", "--window", "0")
    assert text.splitlines()[0].split()[:3] == ["NAME", "CONNECTIONS", "SUCCESS"]
    assert text.splitlines()[1].split()[0] == "web"
    assert int(text.splitlines()[1].split()[1].replace(",", "")) >= 10

    picture = json.loads(ambient(mesh, "graph", "--format", "json"))
    between = {
        edge["service"]: edge
        for edge in picture["edges"]
        if (edge["source"], edge["destination"]) == ("default/client", "default/web")
    }
    assert between[host]["mutual_tls"] == 1.0
    assert between[host]["connections"] >= 10
    assert '"default/client" -> "default/web"' in ambient(mesh, "graph", "--format", "dot")
    assert "default/client" in ambient(mesh, "graph").splitlines()


def test_a_plaintext_client_is_found_before_it_is_shut_out(mesh: WholeMesh) -> None:
    """What an operator looks for before STRICT: who is not in the mesh yet."""
    target = next(pod for pod in mesh.pods("web"))
    done = mesh.exec("stranger", "curl", "-sSf", f"http://{target['ip']}:{HTTP}/", namespace="plain")
    assert done.code == 0, done

    def seen() -> bool:
        edges = json.loads(ambient(mesh, "graph", "--plaintext", "--format", "json"))["edges"]
        return any(
            edge["source"] == "plain/stranger" and edge["destination"] == "default/web" for edge in edges
        )

    mesh.until(seen, "the graph of plaintext shows it", LIMIT)
    text = ambient(mesh, "stat", "--from", "plain/", "--window", "0")
    assert text.splitlines()[1].split()[-1] == "0.00%"


def test_top_shows_what_happens_now(mesh: WholeMesh) -> None:
    found = json.loads(ambient(mesh, "top", "--times", "1", "--interval", "0.2", "--all", "-o", "json"))
    assert found["seconds"] > 0
    assert any(row["destination"] == "default/web" for row in found["rows"])
    text = ambient(mesh, "top", "--times", "1", "--interval", "0.2", "--all", "--sort", "name")
    assert "SOURCE" in text.splitlines()[1]


def test_the_pages_of_a_node(mesh: WholeMesh) -> None:
    socket_path = mesh.state.node("node-1") / "metrics.sock"
    text, kind = get(socket_path, "/stats/prometheus")
    assert kind.startswith("text/plain; version=0.0.4")
    page = Scraped(text)
    assert page.find("istio_build")[0].labels["component"] == "ztunnel"
    pods = [pod for pod in mesh.pods() if pod["node"] == "node-1" and pod["mesh"]]
    assert page.sum("workload_manager_active_proxy_count") == len(pods)
    assert page.sum("workload_manager_pending_proxy_count") == 0
    address = "type.googleapis.com/istio.workload.Address"
    assert page.sum("istio_xds_message_total", url=address) >= 1
    assert mesh.exec("client", "getent", "hosts", "web").code == 0
    (client,) = mesh.pods("client")

    def asked() -> bool:
        found = Scraped(get(mesh.state.node(client["node"]) / "metrics.sock", "/metrics")[0])
        return found.sum("istio_dns_requests_total", source_canonical_service="client") > 0

    mesh.until(asked, "the pod's queries are counted", LIMIT)
    text, kind = get(socket_path, "/metrics", "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    assert Scraped(text, open_metrics=True).find("istio_build")


def test_a_verb_without_a_mesh_says_so(mesh: WholeMesh, tmp_path: Path) -> None:
    for verb in ("stat", "top", "graph"):
        done = mesh.ambient(verb, "--state", str(tmp_path))
        assert done.returncode == 1
        assert "no mesh is running" in done.stderr
        assert "Traceback" not in done.stderr


def test_many_scrapes_leave_nothing_behind(mesh: WholeMesh) -> None:
    """A connection for each, and many in one: the daemon holds as many descriptors as before."""
    path = mesh.state.node("node-1") / "metrics.sock"
    (pid,) = [node["ztunnel"]["pid"] for node in mesh.status()["nodes"] if node["name"] == "node-1"]

    def descriptors() -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    get(path, "/metrics")
    before = descriptors()
    for _ in range(150):
        get(path, "/metrics")
    with contextlib.closing(UnixConnection(path, LIMIT)) as connection:
        for _ in range(150):
            connection.request("GET", "/metrics", headers={"accept-encoding": "gzip"})
            answer = connection.getresponse()
            assert answer.status == 200
            assert b"istio_build" in gzip.decompress(answer.read())
    mesh.until(lambda: descriptors() <= before, "its descriptors are as many as before", LIMIT)
    with pytest.raises(AssertionError, match="GET"):
        post(path, "/metrics")


def post(path: Path, page: str) -> None:
    with contextlib.closing(UnixConnection(path, LIMIT)) as connection:
        connection.request("POST", page)
        answer = connection.getresponse()
        body = answer.read().decode()
        assert answer.status == 200, body
