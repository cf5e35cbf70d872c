"""What an operator asks of a real mesh: proxy-status, proxy-config, tap, capture, analyze, and what they say."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_mesh_rootless import environment
from tests.e2e.whole import AMBIENT, WholeMesh, idle, namespace, service, workload
from tests.embedded.test_rootless import NOBODY
from tests.telemetry.written import whole_lines
from ztunnel.embedded.testmesh import RunningMesh
from ztunnel.store.models import Pod

pytestmark = pytest.mark.e2e
RESOURCES = (
    namespace(mode="ambient")
    + namespace("outside")
    + workload("web", node="node-2")
    + service("web")
    + idle("client")
    + workload("plain", node="node-1").replace("{name: plain}", "{name: plain, namespace: outside}", 1)
)
LIMIT = 30.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(RESOURCES) as mesh:
        mesh.until(lambda: mesh.membership().get("client"), "the client is in the mesh", LIMIT)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows", LIMIT)
        yield mesh


class Following:
    """A verb that runs on: its lines of JSON so far."""

    def __init__(self, mesh: WholeMesh, *words: str) -> None:
        verb, *rest = words
        argv = [AMBIENT, verb, "--state", mesh.state.path, "-o", "json", *rest]
        self.out = mesh.home / f"{verb}-{len(os.listdir(mesh.home))}"
        self.err = self.out.with_suffix(".err")
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                list(map(str, argv)), stdout=out, stderr=err, stdin=subprocess.DEVNULL
            )

    def lines(self, **wanted: Any) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in whole_lines(self.out)]
        return [one for one in found if wanted.items() <= one.items()]

    def says(self, words: str) -> bool:
        return words in self.err.read_text()

    def wait(self) -> int:
        return self.process.wait(LIMIT)

    def __enter__(self) -> "Following":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert "Traceback" not in self.err.read_text()


def by_name(rows: list[dict[str, Any]]) -> set[str]:
    return {row["name"] for row in rows}


def test_proxy_status_shows_every_node_in_step(mesh: WholeMesh) -> None:
    def synced() -> bool:
        done = mesh.ambient("proxy-status", "-o", "json")
        clients = json.loads(done.stdout)["clients"]
        states = {kind["status"] for client in clients for kind in client["types"].values()}
        return done.returncode == 0 and len(clients) == 2 and states <= {"SYNCED"}

    mesh.until(synced, "both nodes are synced", LIMIT)
    lines = mesh.ok("proxy-status").splitlines()
    assert lines[0].split()[:3] == ["NODE", "CONNECTED", "WORKLOADS"]
    assert [line.split()[0] for line in lines[1:3]] == ["node-1", "node-2"]
    assert all("SYNCED" in line for line in lines[1:3])


def test_proxy_status_shows_a_node_that_is_not_connected(mesh: WholeMesh) -> None:
    def missing() -> bool:
        # It is started again at once, so it is stopped again and again until it was seen to be away.
        pid = mesh.status()["nodes"][0]["ztunnel"]["pid"]
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        done = mesh.ambient("proxy-status")
        return done.returncode == 1 and "node-1   NOT CONNECTED" in done.stdout

    mesh.until(missing, "node-1 is missed", LIMIT)
    mesh.until(lambda: mesh.ready() and mesh.ambient("proxy-status").returncode == 0, "it is back", LIMIT)
    mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows", LIMIT)


def test_proxy_config(mesh: WholeMesh) -> None:
    def rows(*words: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(mesh.ok("proxy-config", *words, "-o", "json"))
        return found

    workloads = rows("workloads", "node-1")
    assert {row["proxy"] for row in workloads} == {"node-1"}
    assert {row["name"]: row["protocol"] for row in workloads if row["name"] == "client"} == {
        "client": "HBONE"
    }
    assert {row["proxy"] for row in rows("workload")} == {"node-1", "node-2"}
    (web,) = [row for row in rows("services", "node-2") if row["name"] == "web"]
    assert (web["endpoints"], web["healthy_endpoints"]) == (1, 1)
    assert web["addresses"] == mesh.service("web").addresses
    certificates = rows("certificates", "client")
    assert [row["identity"] for row in certificates] == ["spiffe://cluster.local/ns/default/sa/default"]
    assert certificates[0]["state"] == "valid"
    whole = json.loads(mesh.ok("proxy-config", "all"))
    assert set(whole) == {"node-1", "node-2"}
    assert "PRIVATE" not in json.dumps(whole)
    for what in ("workloads", "services", "certificates", "connections", "policies"):
        table = mesh.ok("proxy-config", what)
        assert table.startswith(("PROXY", f"no {what}")), table
    assert not mesh.ok("proxy-config", "services", "node-1").startswith("PROXY")


def test_proxy_config_of_those_that_answer(mesh: WholeMesh) -> None:
    socket = mesh.state.node("node-2") / "admin.sock"
    hidden = socket.with_name("hidden.sock")
    socket.rename(hidden)
    try:
        done = mesh.ambient("proxy-config", "certificates", "-o", "json")
        assert done.returncode == 1
        assert {row["proxy"] for row in json.loads(done.stdout)} == {"node-1"}
        assert "warning: node-2: ztunnel-node-2 does not answer" in done.stderr
        alone = mesh.ambient("proxy-config", "certificates", "node-2")
        assert (alone.returncode, alone.stdout) == (1, "")
        assert alone.stderr.startswith("error: node-2: ztunnel-node-2 does not answer")
    finally:
        hidden.rename(socket)


def test_connections_with_what_they_have_carried(mesh: WholeMesh) -> None:
    with mesh.connect(mesh.pod("client"), mesh.pod("web").addresses[0]) as talk:
        talk.talk()

        def found() -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = json.loads(
                mesh.ok("proxy-config", "connections", "client", "-o", "json")
            )
            return [row for row in rows if row["dst.addr"].endswith(":9000")]

        (one,) = mesh.until(lambda: len(found()) == 1 and found(), "the connection is shown", LIMIT)
        assert one["src.identity"] == one["dst.identity"] == "spiffe://cluster.local/ns/default/sa/default"
        assert one["bytes_sent"] > 0
        assert one["bytes_sent"] == one["bytes_recv"]
        assert one["connection_security_policy"] == "mutual_tls"
        assert "mTLS" in mesh.ok("proxy-config", "connections", "web")


def test_tap(mesh: WholeMesh) -> None:
    with (
        Following(mesh, "tap", "--to", "web", "--port", "8080") as tap,
        Following(mesh, "tap", "--errors") as errors,
    ):
        for each in (tap, errors):
            for name in ("node-1", "node-2"):
                mesh.until(partial(each.says, f"tapping {name}"), f"{name} is tapped", LIMIT)
        mesh.curl("client", "http://web/")
        assert mesh.curl_code("client", "http://web:81/") != 0
        mesh.until(lambda: len(tap.lines(event="closed")) == 2, "both ends are told of", LIMIT)
        assert {line["direction"]: line["node"] for line in tap.lines(event="opened")} == {
            "outbound": "node-1", "inbound": "node-2"
        }  # fmt: skip
        out, into = (tap.lines(event="closed", direction=way)[0] for way in ("outbound", "inbound"))
        assert out["bytes_recv"] == into["bytes_recv"] > 0
        assert out["dst.service"] == "web.default.svc.cluster.local"
        assert out["dst.workload"] == into["dst.workload"] == mesh.pod("web").name
        assert "error" not in out
        # One for each family that the client tries.
        failed = mesh.until(lambda: errors.lines(), "the failure is told of", LIMIT)
        assert all("has no port 81" in one["error"] for one in failed), failed
    counted = Following(mesh, "tap", "client", "--max", "2")
    with counted:
        mesh.until(lambda: "tapping" in counted.err.read_text(), "node-1 is tapped", LIMIT)
        mesh.until(
            lambda: mesh.curl("client", "http://web/") and counted.process.poll() is not None, "enough", LIMIT
        )
        assert counted.wait() == 0
    assert len(counted.lines()) == 2
    text = mesh.ambient("tap", "--for", "0.5")
    assert text.returncode == 0
    assert text.stdout == ""


def flows(capture: Following) -> list[dict[str, Any]]:
    (done,) = capture.lines(done=True)
    assert (done["dropped"], done["forgotten"]) == (0, 0)
    found: list[dict[str, Any]] = done["flows"]
    return found


def test_capture_says_what_is_encrypted(mesh: WholeMesh, tmp_path: Path) -> None:
    """The tunnel of a pod in the mesh is TLS; what a pod outside of it is asked is plaintext."""
    pcap = tmp_path / "node.pcap"
    plain = mesh.pod("plain", "outside").addresses[0]
    with (
        Following(mesh, "capture", "client") as pod,
        Following(mesh, "capture", "--node", "node-1", "-w", str(pcap), "--filter", "tcp") as node,
        Following(mesh, "capture", "client", "--interface", "lo", "--count", "4", "--packets") as inside,
    ):
        for each in (pod, node, inside):
            mesh.until(partial(each.lines, ready=True), "it captures", LIMIT)
        mesh.curl("client", "http://web/")
        assert "hello" in mesh.curl("web", f"http://{plain}:8080/")
        mesh.until(
            lambda: pod.lines() and [one for one in pod.lines() if "flow" in one], "a flow is told of", LIMIT
        )
        mesh.until(
            lambda: [one for one in node.lines() if one.get("flow", {}).get("security") == "plaintext"],
            "plaintext is told of", LIMIT,
        )  # fmt: skip
        assert inside.wait() == 0
        for each in (pod, node):
            each.process.send_signal(signal.SIGINT)
            assert each.wait() == 0
    tunnels = flows(pod)
    assert {(one["security"], one["hbone"]) for one in tunnels if one["packets"] > 3} == {("TLS", True)}
    seen = {one["security"]: one for one in flows(node) if one["packets"] > 3}
    assert set(seen) >= {"plaintext"}
    assert "GET / HTTP/1.1" in seen["plaintext"]["detail"]
    assert seen["plaintext"]["server"].endswith(":8080")
    assert len([one for one in inside.lines() if "packet" in one]) == 4
    from scapy.utils import rdpcap

    (done,) = node.lines(done=True)
    packets = rdpcap(str(pcap))
    assert len(packets) == done["packets"] > 3
    assert any(b"GET / HTTP/1.1" in bytes(packet) for packet in packets)


def test_analyze(mesh: WholeMesh, tmp_path: Path) -> None:
    assert "no issues" in mesh.ok("analyze")
    given = tmp_path / "policy.yaml"
    given.write_text(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: http}\n"
        "spec:\n  rules:\n  - to:\n    - operation: {methods: [GET]}\n"
    )
    before = mesh.ambient("analyze", "-f", str(given), "-o", "json")
    assert before.returncode == 0
    found = json.loads(before.stdout)
    assert {one["object"] for one in found} == {"AuthorizationPolicy default/http"}
    assert [one["level"] for one in found] == ["warning", "info"]
    mesh.write("policy.yaml", given.read_text().replace("[GET]", "[GET], ports: [http]"))
    try:
        mesh.until(lambda: mesh.ambient("analyze").returncode == 79, "the mesh tells of it", LIMIT)
        text = mesh.ambient("analyze").stdout
        assert "Error (AuthorizationPolicy default/http policy.yaml:7)" in text
        assert "ports" in text
        assert mesh.ambient("analyze", "-n", "outside").returncode == 0
    finally:
        (mesh.directory / "policy.yaml").unlink()
    mesh.until(lambda: mesh.ambient("analyze").returncode == 0, "all is well again", LIMIT)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["proxy-config", "workloads", "nobody"], 'no pod "nobody"'),
        (["proxy-config", "workloads", "node/9"], "the nodes are: node-1, node-2"),
        (["proxy-config", "certificates", "outside/plain"], "is not served by the proxy"),
        (["tap", "nobody"], 'no pod "nobody"'),
        (["capture"], "give a POD, or --node NODE"),
        (["capture", "nobody"], 'no pod "nobody"'),
        (["capture", "--node", "9"], "there is no node '9'"),
        (["capture", "client", "--interface", "eth7", "--duration", "1"], "cannot capture on eth7"),
        (["capture", "client", "--filter", "tcp nonsense"], "pcap-filter(7)"),
        (["capture", "client", "-w", "/no/such/place", "--duration", "1"], "/no/such/place"),
    ],
    ids=" ".join,
)
def test_what_a_user_gets_wrong_is_one_line(mesh: WholeMesh, words: list[str], told: str) -> None:
    done = mesh.ambient(*words)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["proxy-status", "proxy-config workloads", "tap", "capture x", "analyze"])
def test_without_a_mesh_each_says_so(tmp_path: Path, verb: str) -> None:
    argv = [str(AMBIENT), *verb.split(), "--state", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"no mesh is running on {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_as_an_ordinary_user() -> None:
    """Their mesh is in namespaces of its own, where `check` and `capture` have to look."""
    home = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    try:
        if os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)
        prefix, python, env = environment(home)
        owner = NOBODY if os.geteuid() == 0 else None
        resources = (
            'apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {"istio.io/dataplane-mode": ambient}}\n'
            "---\napiVersion: v1\nkind: Pod\nmetadata: {name: web}\n"
            "spec:\n  nodeName: node-2\n  containers:\n  - {name: main, command: [PYTHON, -m, http.server, '8080']}\n"
            "---\napiVersion: v1\nkind: Pod\nmetadata: {name: client}\n"
            "spec:\n  nodeName: node-1\n  containers:\n  - {name: main, command: [sleep, inf]}\n"
        ).replace("PYTHON", python)
        with RunningMesh(resources, prefix=prefix, python=python, env=env, owner=owner) as mesh:
            mesh.wait_pods(mesh=True)

            def ambient(*words: str) -> subprocess.CompletedProcess[str]:
                verb, *rest = words
                argv = [
                    *prefix,
                    python,
                    "-P",
                    "-m",
                    "ztunnel.cli.main",
                    verb,
                    "--state",
                    str(mesh.state.path),
                    *rest,
                ]
                return subprocess.run(
                    argv, env=env, cwd=home, capture_output=True, text=True, timeout=60, check=False
                )

            done = ambient("check", "--wait", "30", "-o", "json")
            assert done.returncode == 0, done.stdout
            every = [one for category in json.loads(done.stdout)["categories"] for one in category["checks"]]
            assert {one["result"] for one in every} <= {"ok", "warning"}
            address = mesh.objects().get(Pod, "default", "web")
            assert address is not None
            capture = subprocess.Popen(
                [*prefix, python, "-P", "-m", "ztunnel.cli.main", "capture", "client", "--state", str(mesh.state.path),
                 "-o", "json", "--filter", "tcp port 15008", "--count", "8", "-w", str(home / "x.pcap")],
                env=env, cwd=home, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                assert capture.stdout is not None
                assert json.loads(capture.stdout.readline()) == {"ready": True}
                assert mesh.exec("client", "curl", "-sS", f"http://{address.addresses[0]}:8080/").code == 0
                rest = [json.loads(line) for line in capture.stdout]
                assert capture.wait(LIMIT) == 0
            finally:
                capture.kill()
                capture.wait()
            assert rest[-1]["flows"][0]["security"] == "TLS"
            assert (home / "x.pcap").stat().st_size > 100
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_a_tap_goes_on_with_the_proxy_that_takes_over(mesh: WholeMesh) -> None:
    with Following(mesh, "tap", "client", "--to", "web") as tap:
        mesh.until(partial(tap.says, "tapping node-1"), "node-1 is tapped", LIMIT)
        mesh.ok("upgrade", "--node", "node-1")
        mesh.until(lambda: tap.err.read_text().count("tapping node-1") == 2, "the next one is tapped", LIMIT)
        mesh.curl("client", "http://web/")
        mesh.until(lambda: tap.lines(event="opened", direction="outbound"), "it is told of", LIMIT)
