"""`ambient up` whole: the mesh's own processes and pods, what it refuses, and that it leaves nothing."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.embedded.test_runtime import running
from ztunnel.embedded.client import MeshClient, MeshNotRunning, MeshRequestError
from ztunnel.embedded.statedir import StateError, clean, stat_of
from ztunnel.embedded.testing import until
from ztunnel.embedded.testmesh import RunningMesh
from ztunnel.store.models import Pod

pytestmark = pytest.mark.e2e

NAMESPACE = """
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: %s}}
"""

WEB = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: %(name)s}
spec:
  replicas: %(replicas)d
  selector: {matchLabels: {app: %(name)s}}
  template:
    metadata: {labels: {app: %(name)s}}
    spec:
      containers:
      - name: c
        command: [%(python)s, -c, "%(code)s"]
        env: [{name: WORD, value: %(word)s}]
        ports: [{name: http, containerPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: %(name)s}
spec:
  selector: {app: %(name)s}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Pod
metadata: {name: %(client)s}
spec:
  nodeName: node-1
  containers: [{name: c, command: [sleep, infinity], env: [{name: COLOUR, value: blue}]}]
---
"""

CODE = """
import http.server, os, socket
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        body = (os.environ['WORD'] + ' ' + os.environ['POD_NAME'] + ' ' + self.client_address[0]).encode()
        self.send_response(200)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
Server(('::', 8080), Answer).serve_forever()
"""


# `ambient exec client -- ...` as a process of its own.
EXEC = (
    "import sys; from pathlib import Path; from ztunnel.embedded.client import MeshClient;"
    "sys.exit(MeshClient.connect(Path(sys.argv[1])).exec('default', 'client', sys.argv[2:]))"
)


def web(
    replicas: int = 2,
    word: str = "hello",
    *,
    name: str = "web",
    client: str = "client",
    python: str = sys.executable,
) -> str:
    """A Deployment with its Service, and a pod to ask it from."""
    code = CODE.strip().replace("\n", "\\n")
    return WEB % {
        "name": name,
        "client": client,
        "replicas": replicas,
        "word": word,
        "python": python,
        "code": code,
    }


def curl(mesh: RunningMesh, url: str = "http://web/") -> str:
    done = mesh.exec("client", "curl", "-sS", "--max-time", "5", url)
    assert done.code == 0, done.stderr
    return done.stdout


def answers(mesh: RunningMesh, word: str) -> bool:
    done = mesh.exec("client", "curl", "-s", "--max-time", "2", "http://web/")
    return done.stdout.startswith(word)


def addresses(mesh: RunningMesh, pod: str) -> list[str]:
    found = mesh.objects().get(Pod, "default", pod)
    assert found is not None
    return found.addresses


def nothing_left(mesh: RunningMesh, processes: list[int]) -> None:
    assert not [pid for pid in processes if running(pid)]
    assert str(mesh.home) not in Path("/proc/self/mounts").read_text()
    assert sorted(path.name for path in mesh.state.path.iterdir()) == ["ca", "logs"]
    assert f" {mesh.home}" not in Path("/proc/net/unix").read_text()


def all_processes(mesh: RunningMesh) -> list[int]:
    """Everything that lives in the mesh, and the supervisor."""
    return [mesh.status()["pid"], *mesh.state.leftovers()]


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    with RunningMesh(NAMESPACE % "none" + "---" + web()) as mesh:
        mesh.wait_pods()
        yield mesh


class TestPods:
    """One mesh for all of these: none changes what another sees."""

    def test_services_by_name_and_address_outside_the_mesh(self, mesh: RunningMesh) -> None:
        own = addresses(mesh, "client")
        assert curl(mesh).startswith("hello web-")
        assert curl(mesh, "http://web.default.svc.cluster.local/").split()[2].removeprefix("::ffff:") in own
        for kind in ("A", "AAAA"):
            address = mesh.exec("client", "dig", "+short", "+search", "web", kind).stdout.strip()
            assert curl(mesh, f"http://[{address}]/" if ":" in address else f"http://{address}/")
        mesh.until(lambda: len({curl(mesh).split()[1] for _ in range(8)}) == 2, "both pods answer")

    def test_exec_gives_exit_codes_streams_and_environment(self, mesh: RunningMesh) -> None:
        assert mesh.exec("client", "sh", "-c", "exit 7").code == 7
        assert mesh.exec("client", "sh", "-c", "kill -9 $$").code == 137
        assert mesh.exec("client", "tr", "a-z", "A-Z", stdin=b"through a pipe").stdout == "THROUGH A PIPE"
        assert mesh.exec("client", "sh", "-c", "echo oops >&2").stderr == "oops\n"
        assert (
            mesh.exec("client", "sh", "-c", "echo $COLOUR $POD_NAME; hostname").stdout
            == "blue client\nclient\n"
        )
        big = os.urandom(1 << 20).hex().encode()
        assert mesh.exec("client", "cat", stdin=big).stdout.encode() == big

    def test_exec_says_what_cannot_be_run(self, mesh: RunningMesh) -> None:
        done = mesh.exec("client", "no-such-program")
        assert (done.code, done.stderr) == (127, "ambient: no-such-program: not found in PATH\n")
        assert mesh.exec("client", "/etc/passwd").code == 126
        with pytest.raises(MeshRequestError, match="pod default/nobody is not running"):
            mesh.client.exec("default", "nobody", ["true"])
        with pytest.raises(MeshRequestError, match="pod default/client has no container 'x'; it has c"):
            mesh.client.exec("default", "client", ["true"], "x")
        with pytest.raises(
            MeshRequestError, match="there is no node 'node-9'; there are node-1, node-2, fabric"
        ):
            mesh.client.exec_on_node("node-9", ["true"])

    def test_exec_on_a_node_has_its_interfaces_and_may_change_them(self, mesh: RunningMesh) -> None:
        code = "import os, socket; print([name for _, name in socket.if_nameindex()]); os.listdir('/')"
        done = mesh.piped(
            lambda streams: mesh.client.exec_on_node("node-2", [sys.executable, "-c", code], streams=streams)
        )
        assert "cni0" in done.stdout
        assert "eth0" in done.stdout

    @pytest.mark.parametrize(
        ("request_line", "answer"),
        [
            (b"[]\n", "the request is not a JSON object"),
            (b"\xff\n", "the request is not a JSON object"),
            (b'{"do": "dance"}\n', "unknown request 'dance'"),
            (b'{"do": "exec", "argv": ["true"]}\n', "a program to run, and its three streams, are needed"),
            (b"x" * (2 << 20), "the request is too large"),
        ],
    )
    def test_nonsense_on_the_control_socket_is_answered(
        self, mesh: RunningMesh, request_line: bytes, answer: str
    ) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(mesh.state.socket))
            with contextlib.suppress(ConnectionError):
                client.sendall(request_line)
            assert answer in client.recv(10000).decode()
        assert mesh.ready()

    def test_signals_reach_the_program_and_it_ends_with_its_client(self, mesh: RunningMesh) -> None:
        shell = "trap 'echo caught; exit 5' INT; echo $$; while :; do sleep 0.05; done"
        for number in (signal.SIGINT, signal.SIGKILL):
            argv = [sys.executable, "-c", EXEC, str(mesh.state.path), "sh", "-c", shell]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as client:
                assert client.stdout is not None
                pid = int(client.stdout.readline())
                assert running(pid)
                client.send_signal(number)
                if number == signal.SIGINT:
                    assert client.wait(10) == 5
                    assert client.stdout.read() == b"caught\n"
            until(lambda pid=pid: not running(pid), "the program has ended")  # type: ignore[misc]

    def test_a_second_mesh_on_the_same_state_is_refused(self, mesh: RunningMesh) -> None:
        second = subprocess.run(
            list(map(str, mesh.argv)), capture_output=True, text=True, timeout=20, check=False
        )
        assert second.returncode == 1
        assert second.stderr.startswith(
            f"error: a mesh is running on {mesh.state.path} (pid {mesh.status()['pid']}"
        )
        with pytest.raises(StateError, match="stop it with `ambient down"):
            clean(mesh.state.path)
        assert mesh.ready()

    def test_modes_of_what_is_secret(self, mesh: RunningMesh) -> None:
        state = mesh.state
        secret = [*state.tokens.iterdir(), state.ca / "root-key.pem", state.ca / "ca-key.pem", state.socket]
        assert len(secret) == 5
        assert {path.stat().st_mode & 0o777 for path in secret} == {0o600}
        assert state.path.stat().st_mode & 0o777 == 0o700
        assert len({path.read_text() for path in state.tokens.iterdir()}) == 2


class TestLife:
    """A mesh each."""

    def test_joining_and_leaving_then_down_leaves_nothing(self) -> None:
        with RunningMesh(NAMESPACE % "none" + "---" + web()) as mesh:
            mesh.wait_pods(mesh=False)
            assert curl(mesh).startswith("hello")
            mesh.write("namespace.yaml", "")
            mesh.write("resources.yaml", NAMESPACE % "ambient" + "---" + web())
            mesh.wait_pods(mesh=True)
            mesh.until(lambda: answers(mesh, "hello"), "the pods talk")
            own = addresses(mesh, "client")
            assert curl(mesh).split()[2].removeprefix("::ffff:") in own, (
                "the server sees the client's own address"
            )
            # The other way, with pods that are in it from the start.
            mesh.write("more.yaml", web(name="shop", client="buyer"))
            mesh.until(lambda: len(mesh.pods("shop")) == 2, "the new pods are made")
            mesh.wait_pods(mesh=True)
            argv = ("curl", "-sS", "-m", "5", "http://shop/")
            mesh.until(
                lambda: mesh.exec("buyer", *argv).stdout.startswith("hello shop-"), "the new pods talk"
            )
            assert {pod["restarts"] for pod in mesh.pods()} == {0}
            processes = all_processes(mesh)
            assert len(processes) > 10
            assert mesh.process is not None
            mesh.client.down()
            assert mesh.process.wait(10) == 0
            mesh.process = None
            nothing_left(mesh, processes)
            with pytest.raises(MeshNotRunning):
                MeshClient.connect(mesh.state.path)

    def test_changes_of_the_files_take_effect_within_a_second(self) -> None:
        with RunningMesh(web(replicas=1)) as mesh:
            mesh.wait_pods()

            def took(text: str, true: Any) -> float:
                began = time.monotonic()
                mesh.write("resources.yaml", text)
                mesh.until(true, f"it is so: {text}")
                return time.monotonic() - began

            scale = took(web(replicas=3), lambda: len([p for p in mesh.pods("web") if p["ready"]]) == 3)
            change = took(web(replicas=3, word="changed"), lambda: answers(mesh, "changed"))
            delete = took(web(replicas=0), lambda: not mesh.pods("web"))
            # A machine that is busy with other tests is given more time than the second that is promised.
            assert max(scale, change, delete) < 5, (scale, change, delete)
            done = mesh.exec("client", "curl", "-sS", "--max-time", "5", "http://web/")
            assert done.code == 7, "refused at once, not hanging"

    @pytest.mark.parametrize("part", ["controlplane", "agent", "ztunnel"])
    def test_what_is_killed_runs_again(self, part: str) -> None:
        with RunningMesh(NAMESPACE % "ambient" + "---" + web()) as mesh:
            mesh.wait_pods(mesh=True)
            mesh.until(lambda: answers(mesh, "hello"), "the pods talk")
            status = mesh.status()
            killed = status[part] if part == "controlplane" else status["nodes"][0][part]
            os.kill(killed["pid"], signal.SIGKILL)
            began = time.monotonic()

            def again() -> bool:
                status = mesh.status()
                now = status[part] if part == "controlplane" else status["nodes"][0][part]
                return bool(now["ready"] and now["pid"] != killed["pid"] and now["restarts"] == 1)

            mesh.until(again, f"the {part} runs again")
            mesh.until(lambda: answers(mesh, "hello"), "traffic flows")
            assert time.monotonic() - began < 10
            name = part if part == "controlplane" else f"{part}-node-1"
            assert (
                f"warning: {name} was ended by SIGKILL; it is started again; its log is"
                in mesh.out.read_text()
            )
            mesh.until(lambda: f"resolved: {name}" in mesh.out.read_text(), "it is said to be well again")

    def test_connections_of_a_killed_ztunnel_go_on_and_end_with_the_mesh(self) -> None:
        code = (
            "import socket, sys\n"
            "answers = socket.create_connection(('web', 80)).makefile('rwb')\n"
            "for line in sys.stdin:\n"
            "    answers.write(b'GET / HTTP/1.1\\r\\nHost: web\\r\\n\\r\\n')\n"
            "    answers.flush()\n"
            "    head = b''.join(iter(answers.readline, b'\\r\\n')).decode()\n"
            "    answers.read(int(head.lower().split('content-length:')[1].split()[0]))\n"
            "    print('200 OK' in head, flush=True)\n"
        )
        with RunningMesh(NAMESPACE % "ambient" + "---" + web(replicas=1)) as mesh:
            mesh.wait_pods(mesh=True)
            mesh.until(lambda: answers(mesh, "hello"), "the pods talk")
            argv = [sys.executable, "-c", EXEC, str(mesh.state.path), sys.executable, "-uc", code]
            with subprocess.Popen(
                argv,
                text=True,
                start_new_session=True,
                bufsize=1,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            ) as client:
                assert client.stdin is not None
                assert client.stdout is not None

                def ask() -> str:
                    print("again", file=client.stdin)
                    return client.stdout.readline() if client.stdout else ""

                assert ask() == "True\n"
                before = {node["ztunnel"]["pid"] for node in mesh.status()["nodes"]}
                for pid in before:
                    os.kill(pid, signal.SIGKILL)
                mesh.until(mesh.ready, "new ones run")
                mesh.until(
                    lambda: not before & {node["ztunnel"]["pid"] for node in mesh.status()["nodes"]},
                    "new ones run",
                )
                assert ask() == "True\n", "the workers of the killed ones go on with it"
                left = [
                    pid for pid in mesh.state.leftovers() if (stat := stat_of(pid)) and stat.session in before
                ]
                assert left, "and they are on record"
                mesh.stop(signal.SIGKILL)
                clean(mesh.state.path)
                assert not [pid for pid in left if running(pid)]
                client.kill()

    def test_a_killed_supervisor_leaves_what_the_next_start_removes(self) -> None:
        with RunningMesh(NAMESPACE % "ambient" + "---" + web()) as mesh:
            mesh.wait_pods(mesh=True)
            before = all_processes(mesh)
            children = [mesh.status()["controlplane"]["pid"]] + [
                node[part]["pid"] for node in mesh.status()["nodes"] for part in ("agent", "ztunnel")
            ]
            mesh.stop(signal.SIGKILL)
            until(lambda: not any(running(pid) for pid in children), "the mesh's processes end by themselves")
            mesh.start()
            mesh.wait_pods(mesh=True)
            mesh.until(lambda: answers(mesh, "hello"), "the pods talk")
            assert not [pid for pid in before if running(pid)]
            mesh.stop(signal.SIGKILL)
            left = mesh.state.leftovers()
            assert left, "the pods' programs"
            clean(mesh.state.path)
            nothing_left(mesh, left)
            clean(mesh.state.path)

    def test_sigint_ends_it_in_order(self) -> None:
        with RunningMesh(web()) as mesh:
            mesh.wait_pods()
            processes = all_processes(mesh)
            assert mesh.stop(signal.SIGINT) == 0
            nothing_left(mesh, processes)
            assert "ended; what stays:" in mesh.out.read_text()

    def test_a_pod_without_agent_waits_and_says_why(self) -> None:
        with RunningMesh(NAMESPACE % "ambient") as mesh:
            agent = mesh.status()["nodes"][0]["agent"]["pid"]
            os.kill(agent, signal.SIGSTOP)
            mesh.write("resources.yaml", NAMESPACE % "ambient" + "---" + web(replicas=0))
            mesh.until(
                lambda: [p["message"] for p in mesh.pods("client")] == ["waiting for redirection"],
                "the pod waits",
            )
            with pytest.raises(MeshRequestError, match="is not running yet: waiting for redirection"):
                mesh.client.exec("default", "client", ["true"])
            os.kill(agent, signal.SIGCONT)
            mesh.wait_pods(mesh=True)

    def test_pods_and_the_label_that_come_at_once_send_nothing_before_they_are_in(self) -> None:
        with RunningMesh() as mesh:
            early = """
apiVersion: v1
kind: Pod
metadata: {name: early}
spec:
  containers: [{name: c, command: [sh, -c, "cat /proc/net/tcp /proc/net/tcp6; echo end; exec sleep infinity"]}]
"""
            mesh.write("resources.yaml", NAMESPACE % "ambient" + "---" + early)
            mesh.until(lambda: mesh.pods("early"), "it is made")
            mesh.wait_pods(mesh=True)
            log = mesh.state.logs / "pods" / "default_early_c.log"
            mesh.until(lambda: log.read_text().endswith("end\n"), "it has looked at its sockets")
            assert f":{15001:04X} " in log.read_text(), "the proxy was there when the program began"

    def test_problems_are_said_once_and_the_rest_works(self) -> None:
        broken = """
apiVersion: v1
kind: Pod
metadata: {name: broken}
spec:
  containers: [{name: c, command: [no-such-program]}]
---
"""
        with RunningMesh(broken + web(replicas=1)) as mesh:
            mesh.until(
                lambda: curl(mesh) if mesh.pods("web") and mesh.pods("web")[0]["ready"] else "", "web answers"
            )
            sentence = "Pod default/broken: container c: program not found: no-such-program"
            mesh.until(lambda: mesh.pods("broken")[0]["restarts"] >= 1, "it is tried again")
            assert mesh.out.read_text().count(sentence) == 1
            assert [p for p in mesh.status()["problems"] if str(p).startswith(sentence)]
            mesh.write("resources.yaml", web(replicas=1))
            mesh.until(lambda: "resolved: Pod default/broken" in mesh.out.read_text(), "it is resolved")
            assert mesh.status()["problems"] == []


class TestRefusals:
    """Before anything is made."""

    def test_a_port_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            mesh = RunningMesh(xds_port=taken.getsockname()[1])
            process = mesh.launch()
            assert process.wait(20) == 1
            said = mesh.out.read_text()
            port = taken.getsockname()[1]
            assert (
                f"error: port {port} of 127.0.0.1, where the control plane would listen: Address already in"
                in said
            )
            assert "--xds-port" in said
            assert list(mesh.state.path.iterdir()) == []
            mesh.close()

    def test_a_state_directory_with_too_long_a_name(self, tmp_path: Path) -> None:
        state = tmp_path / ("x" * 90)
        with pytest.raises(StateError, match=r"its sockets' names would be \d+ bytes long.*--state DIR"):
            clean_start(state)

    def test_another_process_with_a_recorded_number_is_left_alone(self, tmp_path: Path) -> None:
        with subprocess.Popen(["sleep", "1000"], start_new_session=True) as bystander:
            stat = stat_of(bystander.pid)
            assert stat is not None
            state = RunningMesh().state
            state.create()
            from ztunnel.embedded.statedir import Process

            state.write_processes({"controlplane": Process(bystander.pid, stat.start_time - 1)})
            clean(state.path)
            assert bystander.poll() is None
            state.create()
            state.write_processes({"controlplane": Process(bystander.pid, stat.start_time)})
            clean(state.path)
            assert bystander.wait(5) == -9
            state.path.parent.joinpath("dir", "resources.yaml").unlink()
            state.path.parent.joinpath("dir").rmdir()
            state.path.parent.rmdir()


def clean_start(state: Path) -> None:
    from ztunnel.embedded.statedir import State

    State(state).create()
