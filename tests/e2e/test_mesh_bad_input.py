"""What users get wrong in a running mesh: a message that names the object and the remedy, and the rest works on."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.whole import (
    AMBIENT,
    HTTP,
    MODE,
    WholeMesh,
    idle,
    namespace,
    service,
    workload,
)

pytestmark = pytest.mark.e2e

BASE = namespace(mode="ambient") + workload("web", node="node-2") + service("web") + idle("client")

POD = """
apiVersion: v1
kind: Pod
metadata: {name: bad}
spec:
  containers: [{name: main, %s}]
---
"""

# Each: what is written, the problem (object first, remedy last) that it is told of.
MISTAKES = {
    "invalid YAML": ("kind: [", "bad.yaml:2: not valid YAML", "correct the syntax there"),
    "unknown kind": (
        "apiVersion: example.com/v1\nkind: Gizmo\nmetadata: {name: one}\n",
        'Gizmo one (bad.yaml:2): kind: "Gizmo"',
        "known kinds are Namespace,",
    ),
    "service that selects nothing": (
        service("lonely", app="nobody"),
        "Service default/lonely (bad.yaml): spec.selector (app=nobody) selects no pod",
        "make it match the labels",
    ),
    "two services with one address": (
        service("thief", app="web", extra="clusterIP: 10.96.7.7").replace("thief", "a-first")
        + service("thief", app="web", extra="clusterIP: 10.96.7.7"),
        "Service default/thief (bad.yaml",
        "choose another clusterIP, or leave it out to be given one",
    ),
    "program that exits": (
        POD % "command: [sh, -c, 'exit 3']",
        "Pod default/bad: container main exited with code 3",
        "_bad_main.log",
    ),
    "program that is missing": (
        POD % "command: [no-such-program]",
        "Pod default/bad: container main: program not found: no-such-program",
        "correct `command`",
    ),
    "container without command": (
        POD % "image: nginx",
        "Pod default/bad (bad.yaml",
        "write the program as command: [...]",
    ),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(BASE) as mesh:
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        yield mesh


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file(mesh: WholeMesh, mistake: str) -> None:
    text, about, remedy = MISTAKES[mistake]
    mesh.write("bad.yaml", text)

    def told() -> str:
        found = [str(problem) for problem in mesh.status()["problems"]]
        return next((sentence for sentence in found if about in sentence and remedy in sentence), "")

    sentence = mesh.until(lambda: told(), f"{mistake}: {about}: {remedy}", 8)
    print(sentence)
    mesh.until(lambda: sentence in mesh.out.read_text(), "`ambient up` says so too")
    assert sentence in " ".join(mesh.ok("status").split()) or sentence in mesh.ok("status")
    # The rest works, also what is written now.
    assert mesh.curl("client", "http://web/").startswith("hello web")
    mesh.write("good.yaml", idle("good", node="node-2"))
    mesh.until(lambda: mesh.membership().get("good"), "another pod joins")
    assert mesh.curl("good", "http://web/").startswith("hello web")
    mesh.directory.joinpath("good.yaml").unlink()
    mesh.directory.joinpath("bad.yaml").unlink()
    mesh.until(lambda: mesh.status()["problems"] == [], "the problem is gone with the file")
    mesh.until(
        lambda: {p["name"].partition("-")[0] for p in mesh.pods()} == {"web", "client"}, "and its pods"
    )


def test_what_was_right_before_stays_while_a_file_is_broken(mesh: WholeMesh) -> None:
    """Half-written YAML over a good file: its objects go on as they were."""
    good = (mesh.directory / "resources.yaml").read_text()
    before = mesh.programs()
    mesh.write("resources.yaml", good + "\nkind: [")
    mesh.until(lambda: mesh.status()["problems"], "it is told")
    assert mesh.programs() == before
    assert mesh.curl("client", "http://web/").startswith("hello web")
    mesh.write("resources.yaml", good)
    mesh.until(lambda: mesh.status()["problems"] == [], "it is well again")
    assert mesh.programs() == before


def test_a_second_mesh_on_the_same_state(mesh: WholeMesh) -> None:
    second = subprocess.run(
        [*map(str, mesh.argv)], env=mesh.env, capture_output=True, text=True, timeout=30, check=False
    )
    assert second.returncode == 1
    assert f"a mesh is running on {mesh.state.path}" in second.stderr
    assert f"ambient down --state {mesh.state.path}" in second.stderr
    assert "Traceback" not in second.stderr
    assert mesh.curl("client", "http://web/").startswith("hello web")


def test_a_port_in_use(mesh: WholeMesh) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        state = mesh.home / "other"
        argv = [str(AMBIENT), "up", str(mesh.directory), "--state", str(state), "--xds-port", port]
        done = subprocess.run(argv, env=mesh.env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1" in done.stderr
    assert "--xds-port" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(state.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    """Namespaces, mounts, files and programs; a foreign program with a recorded number is not touched."""
    with WholeMesh(BASE) as mesh:
        mesh.wait_pods(mesh=True)
        traces = mesh.traces()
        children = [pid for pid in traces.running() if pid not in mesh.programs().values()]
        process = mesh.process
        assert process is not None
        for pid in children:
            if pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        mesh.stop(signal.SIGKILL)
        left = traces.found()
        assert any(line.startswith("mount ") for line in left)
        assert any("program.py" in line for line in left)
        mesh.start()
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        assert traces.running() == []
        assert len(Path("/proc/self/mountinfo").read_text().split(str(mesh.state.netns))) - 1 == 5


# The kernel refuses netfilter sockets to the process as one without nftables refuses them to all (seccomp(2)).
NO_NFTABLES = """
import ctypes, os, platform, struct, sys
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
def step(code, value, yes=0, no=0): return struct.pack("HBBI", code, yes, no, value)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
program = b"".join([
    step(LOAD, 0), step(EQUAL, number, 0, 5),
    step(LOAD, 16), step(EQUAL, 16, 0, 3),
    step(LOAD, 32), step(EQUAL, 12, 0, 1),
    step(RETURN, 0x00050000 | 93), step(RETURN, 0x7fff0000),
])
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(program, len(program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_node_without_nftables() -> None:
    """Nothing can be redirected there: pods that belong to the mesh wait, and say why; the others run."""
    text = BASE + idle("apart", labels=f", {MODE}: none")
    text += workload("plain", node="node-2", labels=f", {MODE}: none")
    with WholeMesh(text, prefix=[sys.executable, "-c", NO_NFTABLES]) as mesh:
        for pod in ("client", "web"):
            name = mesh.until(lambda pod=pod: mesh.pods(pod) and mesh.pods(pod)[0]["name"], "the pod is made")  # type: ignore[misc]
            mesh.until(
                lambda name=name: any(  # type: ignore[misc]
                    name in str(problem) and "nf_tables" in str(problem) and "modprobe" in str(problem)
                    for problem in mesh.status()["problems"]
                ),
                f"it is told about {name}",
            )
        problems = " ".join(map(str, mesh.status()["problems"]))
        assert "Node node-1: Services cannot be reached" in problems
        assert mesh.membership()["client"] is False
        assert "client" not in mesh.programs(), "it never sends a byte past the proxy"
        mesh.until(lambda: mesh.pods("plain")[0]["ready"], "pods outside the mesh run")
        address = mesh.pod("plain").addresses[0]
        assert mesh.curl("apart", f"http://{address}:{HTTP}/").startswith("hello plain")


def older_pythons() -> list[str]:
    """Interpreters of this machine that are too old for the project."""
    places = [Path("/usr/bin"), *Path(os.environ.get("PYENV_ROOT", "/nonexistent")).glob("versions/*/bin")]
    found = [place / f"python3.{minor}" for place in places for minor in range(6, 11)]
    return [str(path) for path in found if path.exists()]


OLD = "import sys; sys.version_info = (3, 9, 18, 'final', 0); sys.argv = ['ambient', 'up', 'x'];"


@pytest.mark.parametrize("python", [None, *older_pythons()])
def test_a_python_that_is_too_old(python: str | None) -> None:
    script = "import runpy; runpy.run_module('ztunnel.cli.main', run_name='__main__')"
    argv = (
        [sys.executable, "-c", OLD + script]
        if python is None
        else [python, "-m", "ztunnel.cli.main", "up", "x"]
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ambient needs Python 3.11 or newer, this is Python 3.")
    assert "install" in done.stderr
    assert "Traceback" not in done.stderr
