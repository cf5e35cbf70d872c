"""`ambient check` on a real mesh: green while all is well, red with the right remedy for each thing that breaks."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cni.rules import Settings, remove
from tests.e2e.whole import WholeMesh, idle, namespace, service, workload
from ztunnel.inpod import netns

pytestmark = pytest.mark.e2e
RESOURCES = namespace(mode="ambient") + workload("web", node="node-2") + service("web") + idle("client")
LIMIT = 90.0  # seconds for the mesh to be as it was, and for certificates to end
TTL = "20s"  # the life of certificates


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(RESOURCES, env={**os.environ, "SECRET_TTL": TTL}) as mesh:
        mesh.wait_pods(mesh=True)
        yield mesh


def check(mesh: WholeMesh) -> dict[str, dict[str, Any]]:
    """The checks that are not well, by name; exit code and `success` have to agree."""
    done = mesh.ambient("check", "-o", "json")
    assert "Traceback" not in done.stderr, done.stderr
    report = json.loads(done.stdout)
    every = [one for category in report["categories"] for one in category["checks"]]
    failed = any(one["result"] == "failed" for one in every)
    assert (done.returncode == 1) is failed is not report["success"]
    return {one["description"]: one for one in every if one["result"] != "ok"}


def wait_well(mesh: WholeMesh) -> None:
    mesh.until(
        lambda: not [1 for one in check(mesh).values() if one["result"] == "failed"], "all is well", LIMIT
    )


def failing(mesh: WholeMesh, name: str) -> dict[str, Any]:
    """The check of this name, once it fails."""

    def found() -> dict[str, Any] | None:
        one = check(mesh).get(name)
        return one if one is not None and one["result"] == "failed" else None

    one: dict[str, Any] = mesh.until(found, name, LIMIT)
    return one


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_healthy_mesh_is_all_green(mesh: WholeMesh) -> None:
    wait_well(mesh)
    mesh.until(lambda: check(mesh) == {}, "there is no warning either", LIMIT)
    text = mesh.ok("check")
    assert "√ the mesh runs" in text
    assert "×" not in text
    assert text.splitlines()[-1].startswith("Status check results are √")
    assert json.loads(mesh.ok("check", "--pre", "-o", "json"))["success"]


def test_a_control_plane_that_was_killed_and_does_not_come_back(mesh: WholeMesh) -> None:
    """A file is in the place of its socket: it ends each time that it is started again. Then certificates end."""
    place = mesh.state.control_admin
    place.unlink()
    place.touch()
    try:
        os.kill(mesh.status()["controlplane"]["pid"], signal.SIGKILL)
        one = failing(mesh, "the control plane answers")
        assert "control plane" in one["details"][0]
        assert "ambient logs mesh/controlplane" in one["remedy"]
        found = check(mesh)
        assert found["the control plane runs and is ready"]["result"] == "failed"
        # What does not depend on it is well.
        assert "each pod of the mesh is redirected by the kernel" not in found
        synced = failing(mesh, "node proxies are in step with the control plane")
        assert {line.partition(":")[0] for line in synced["details"]} == {"node-1", "node-2"}
        assert "ambient proxy-status" in synced["remedy"]
        assert "a file that is no socket" in mesh.ok("logs", "mesh/controlplane")
        late = mesh.until(lambda: check(mesh).get("certificates are renewed in time"), "renewal fails", LIMIT)
        assert "ambient logs mesh/controlplane" in late["remedy"]
        ended = failing(mesh, "each identity has a valid certificate")
        assert "spiffe://cluster.local/ns/default/sa/default" in ended["details"][0]
        assert "expired at" in ended["details"][0] or "none yet" in ended["details"][0]
        assert "ambient proxy-status" in ended["remedy"]
    finally:
        place.unlink()
    wait_well(mesh)


def test_a_daemon_that_is_stopped(mesh: WholeMesh) -> None:
    pid = mesh.status()["nodes"][0]["ztunnel"]["pid"]
    with stopped(pid):
        one = check(mesh)["node proxies answer"]
        assert one["result"] == "failed"
        assert one["details"][0].startswith("node-1: ztunnel-node-1 does not answer")
        assert len(one["details"]) == 1
        assert f"kill -CONT {pid}" in one["remedy"]
        began = time.monotonic()
        assert mesh.ambient("check", "--wait", "2").returncode == 1
        assert time.monotonic() - began >= 2
    assert mesh.ambient("check", "--wait", "50").returncode == 0


def test_rules_that_were_removed_by_hand(mesh: WholeMesh) -> None:
    client = mesh.pod("client")
    descriptor = netns.open_path(mesh.state.netns / client.metadata.uid)
    try:
        remove(descriptor, Settings())
    finally:
        os.close(descriptor)
    found = {name: one for name, one in check(mesh).items() if one["result"] == "failed"}
    assert set(found) == {"each pod of the mesh is redirected by the kernel"}
    (one,) = found.values()
    assert one["details"][0].startswith("default/client: ")
    assert len(one["details"]) == 1
    agent = mesh.status()["nodes"][0]["agent"]["pid"]
    assert f"kill {agent} (node agent of node-1)" in one["remedy"]
    os.kill(agent, signal.SIGTERM)  # as it says
    wait_well(mesh)


def test_objects_that_are_refused(mesh: WholeMesh) -> None:
    mesh.write(
        "wrong.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: broken}\nspec: {ports: [{port: 0}]}\n"
    )
    try:
        one = failing(mesh, "no object is refused")
        assert "broken" in one["details"][0]
        assert "ambient analyze" in one["remedy"]
    finally:
        (mesh.directory / "wrong.yaml").unlink()
    wait_well(mesh)


def test_no_mesh_is_one_failure_and_the_rest_is_skipped(mesh: WholeMesh) -> None:
    done = mesh.ambient("check", "--state", "/tmp/there-is-no-mesh-here", "-o", "json")
    assert done.returncode == 1
    every = [one for category in json.loads(done.stdout)["categories"] for one in category["checks"]]
    failed = [one for one in every if one["result"] == "failed"]
    assert [one["description"] for one in failed] == ["the mesh runs"]
    assert "ambient up" in failed[0]["remedy"]
    assert sum(one["result"] == "skipped" for one in every) > 10
