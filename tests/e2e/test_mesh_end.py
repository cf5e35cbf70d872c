"""However a mesh is ended, nothing of it is left: processes, namespaces, mounts, sockets, temporary files."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.whole import (
    AMBIENT,
    HTTP,
    LinkWatch,
    Load,
    Traces,
    WholeMesh,
    idle,
    namespace,
    service,
    until,
    workload,
)

pytestmark = pytest.mark.e2e

RESOURCES = namespace(mode="ambient") + workload("web", node="node-2") + service("web") + idle("client")


def interfaces() -> set[str]:
    """This machine's own network devices."""
    return {path.name for path in Path("/sys/class/net").iterdir()}


def settled(mesh: WholeMesh) -> Traces:
    """Wait until the mesh works, and return by what to recognize its remains."""
    mesh.wait_pods(mesh=True)
    mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
    return mesh.traces()


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP", "down", "Ctrl-C"])
def test_an_orderly_end(how: str) -> None:
    """While requests are under way and a connection is open."""
    before = interfaces()
    with WholeMesh(RESOURCES) as mesh:
        traces = settled(mesh)
        assert len(traces.spaces) == 5
        assert len(traces.started) > 10
        client, web = mesh.pod("client"), mesh.pod("web")
        process = mesh.process
        assert process is not None
        with mesh.connect(client, web.addresses[0]), Load(mesh, client, web.addresses[0], HTTP) as load:
            load.wait(5)
            began = time.monotonic()
            if how == "down":
                assert f"the mesh on {mesh.state.path} is down" in mesh.ok("down")
                traces.check_gone()
                mesh.process = None
                assert process.wait(10) == 0
            elif how == "Ctrl-C":
                # The terminal sends it to every process of the foreground group; the mesh's own are not in it.
                os.killpg(process.pid, signal.SIGINT)
                mesh.process = None
                assert process.wait(20) == 0
            else:
                assert mesh.stop(getattr(signal, how)) == 0
            seconds = time.monotonic() - began
        print(f"{how}: ended within {seconds:.2f} s")
        assert seconds < 10
        traces.check_gone()
        assert "Traceback" not in mesh.out.read_text()
        # Once more, and without a mesh.
        again = mesh.ambient("down")
        assert again.returncode == 1
        assert again.stderr.startswith(f"error: no mesh is running on {mesh.state.path}")
        assert "ambient up" in again.stderr
        traces.check_gone()
    assert interfaces() == before


def test_down_where_there_never_was_a_mesh(tmp_path: Path) -> None:
    state = tmp_path / "none"
    argv = [str(AMBIENT), "down", "--state", str(state)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no mesh is running on {state}")
    assert not state.exists()


def test_an_impatient_end() -> None:
    """Ctrl-C again and again changes nothing about what is left."""
    with WholeMesh(RESOURCES) as mesh:
        traces = settled(mesh)
        process, mesh.process = mesh.process, None
        assert process is not None
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)  # faster than a person
        assert process.returncode == 0
        traces.check_gone()


def test_an_end_while_it_starts() -> None:
    """At whatever moment: what was made by then is removed."""
    for moment in (0.3, 0.5, 0.7, 0.9, 1.2):
        mesh = WholeMesh(RESOURCES)
        try:
            mesh.process = mesh.launch()
            time.sleep(moment)  # not to wait for something: this is the moment
            mesh.stop(signal.SIGINT)
            Traces(mesh.home, mesh.state.path, set(), set()).check_gone(files=mesh.state.path.exists())
            assert "Traceback" not in mesh.out.read_text()
        finally:
            mesh.close()


def test_a_killed_supervisor_and_then_down() -> None:
    with WholeMesh(RESOURCES) as mesh:
        traces = settled(mesh)
        client, web = mesh.pod("client"), mesh.pod("web")
        with LinkWatch(mesh, "node-1") as link, Load(mesh, client, web.addresses[0], HTTP) as load:
            load.wait(5)
            mesh.stop(signal.SIGKILL)
            until(lambda: len(load.failures) > 20, "traffic fails")
            assert traces.found(), "pods and their programs"
            assert f"removed what a killed mesh had left on {mesh.state.path}" in mesh.ok("down")
        assert link.sightings == []
        traces.check_gone()
        mesh.start()
        settled(mesh)


def test_everything_killed_at_once_and_then_down() -> None:
    """As the kernel does when memory ends: no process of the mesh could clean up."""
    with WholeMesh(RESOURCES) as mesh:
        traces = settled(mesh)
        process = mesh.process
        assert process is not None
        for pid in [process.pid, *traces.started]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        mesh.stop(signal.SIGKILL)
        assert f"removed what a killed mesh had left on {mesh.state.path}" in mesh.ok("down")
        traces.check_gone()
