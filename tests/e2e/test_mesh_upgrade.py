"""`ambient upgrade`: a node's proxy is replaced under load; nothing fails, and the old one serves what it has."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.whole import Load, WholeMesh, alive, idle, namespace, service, workload

pytestmark = pytest.mark.e2e

RESOURCES = (
    namespace(mode="ambient")
    + workload("web", node="node-2")
    + service("web")
    + idle("client")
    + workload("gone", node="node-2")
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(RESOURCES) as mesh:
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        yield mesh


def others(mesh: WholeMesh, node: int) -> list[int]:
    """The pids of a node's proxies that are beside the one that counts."""
    found: list[int] = mesh.status()["nodes"][node - 1]["ztunnel"]["others"]
    return found


def has_network(mesh: WholeMesh, pid: int, inode: int) -> bool:
    """Whether a process holds a network namespace open."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if fd.stat().st_ino == inode and "net" in str(fd.readlink()):
                return True
    return False


@pytest.mark.parametrize("node", [1, 2])
def test_new_connections_are_the_new_ones_and_open_ones_stay_with_the_old(mesh: WholeMesh, node: int) -> None:
    client, web = mesh.pod("client"), mesh.pod("web")
    with (
        mesh.connect(client, web.addresses[0]) as open_before,
        mesh.connect(client, web.addresses[1]) as open_before6,
        Load(mesh, client, mesh.service("web").addresses[0], 80, timeout=40) as load,
        Load(mesh, client, mesh.service("web").addresses[0], 80, timeout=40) as more,
    ):
        load.wait(20)
        (upgraded,) = json.loads(mesh.ok("upgrade", "--node", f"node-{node}", "-o", "json"))
        load.wait(50)
        more.wait(50)
        assert others(mesh, node) == [upgraded["old"]]
        open_before.talk()
        open_before6.talk()
        status = mesh.status()["nodes"][node - 1]["ztunnel"]
        assert (status["pid"], status["ready"], status["restarts"]) == (upgraded["new"], True, 0)
    assert load.failures == more.failures == []
    # The pages that count are the new one's.
    admin = json.loads(mesh.ok("upgrade", "--node", f"node-{node}", "-o", "json"))
    assert admin[0]["old"] == upgraded["new"]
    # Nothing is open in them any more: they need not wait for the end of their time.
    mesh.until(lambda: others(mesh, node) == [], "the old ones have ended", 30)
    assert not alive(upgraded["old"])


def test_a_proxy_that_drains_still_hears_of_pods_that_end(mesh: WholeMesh) -> None:
    """The agent tells both: else the old one would hold a dead pod's namespace and connections for its grace period."""
    client, gone, web = mesh.pod("client"), mesh.pod("gone"), mesh.pod("web")
    inode = (mesh.state.netns / gone.metadata.uid).stat().st_ino
    with (
        mesh.connect(client, gone.addresses[0]) as to_gone,
        mesh.connect(client, web.addresses[0]) as to_web,
    ):
        (upgraded,) = json.loads(mesh.ok("upgrade", "--node", "node-2", "-o", "json"))
        old = upgraded["old"]
        to_gone.talk()
        assert has_network(mesh, old, inode)
        resources = RESOURCES.replace(workload("gone", node="node-2"), "")
        mesh.resources(resources)
        mesh.until(lambda: not has_network(mesh, old, inode), "the old one lets go of it", 30)
        to_web.talk()
        assert alive(old)
    mesh.until(lambda: others(mesh, 2) == [], "the old one has ended", 30)


def test_a_new_one_that_does_not_get_ready_changes_nothing(mesh: WholeMesh) -> None:
    """The control plane stands still: the new one cannot know the mesh, and does not touch the pods."""
    client, web = mesh.pod("client"), mesh.pod("web")
    controlplane = mesh.status()["controlplane"]["pid"]
    before = mesh.status()["nodes"][0]["ztunnel"]["pid"]
    said: list[subprocess.CompletedProcess[str]] = []
    upgrade = threading.Thread(target=lambda: said.append(mesh.ambient("upgrade", "--node", "node-1")))
    with (
        mesh.connect(client, web.addresses[0]) as open_before,
        Load(mesh, client, mesh.service("web").addresses[0], 80, timeout=40) as load,
    ):
        os.kill(controlplane, signal.SIGSTOP)
        try:
            upgrade.start()
            (new,) = mesh.until(lambda: others(mesh, 1), "the new one starts")
            load.wait(100)
            os.kill(new, signal.SIGKILL)
            upgrade.join()
        finally:
            os.kill(controlplane, signal.SIGCONT)
        load.wait(20)
        open_before.talk()
    assert said[0].returncode == 1
    assert "was ended by SIGKILL; the old one serves on" in said[0].stderr
    assert load.failures == []
    assert mesh.status()["nodes"][0]["ztunnel"]["pid"] == before
    assert others(mesh, 1) == []
