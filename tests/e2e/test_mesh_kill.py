"""kill -9 of each process of a running mesh: what can go on does, the rest is back within seconds, nothing leaks."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.whole import (
    HTTP,
    MARKER,
    Conversation,
    LinkWatch,
    Load,
    WholeMesh,
    alive,
    idle,
    namespace,
    service,
    took,
    until,
    workload,
)

pytestmark = pytest.mark.e2e

RESOURCES = (
    namespace(mode="ambient")
    + workload("web", node="node-2")
    + service("web")
    + workload("near", node="node-1")
    + idle("client")
    + idle("neighbour", node="node-2")
)
RECOVERY = (
    10.0  # seconds; five are promised, and a machine that is busy with other tests is given twice as many
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(RESOURCES) as mesh:
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        yield mesh


@pytest.fixture(autouse=True)
def whole(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test leaves the shared mesh well."""
    yield
    if "mesh" in request.fixturenames:
        mesh = request.getfixturevalue("mesh")
        mesh.until(mesh.ready, "everything runs again")
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows again")


def part(mesh: WholeMesh, name: str) -> dict[str, Any]:
    """What the status says about a process of the mesh: controlplane, agent-1, ztunnel-2."""
    status = mesh.status()
    kind, _, number = name.partition("-")
    found: dict[str, Any] = status[kind] if not number else status["nodes"][int(number) - 1][kind]
    return found


def kill(mesh: WholeMesh, name: str) -> int:
    """kill -9, of this one process; its pid."""
    pid = int(part(mesh, name)["pid"])
    os.kill(pid, signal.SIGKILL)
    return pid


def restarted(mesh: WholeMesh, name: str, old: int) -> bool:
    now = part(mesh, name)
    return bool(now["ready"] and now["pid"] != old)


def end_ztunnel(mesh: WholeMesh, node: int) -> None:
    """kill -9 of a node's proxy, the control process and its workers, whichever there are now."""
    pid = part(mesh, f"ztunnel-{node}")["pid"]
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def outage(load: Load, since: float) -> float:
    """Seconds from `since` (of the load's clock) until the last request that failed; 0 if none did."""
    return max((at - since for at, _ in load.failures), default=0.0)


def connections(mesh: WholeMesh, node: int) -> dict[int, int]:
    """How many connections each worker of a node has, by its pid (the proxy's own count)."""
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(mesh.state.node(f"node-{node}") / "admin.sock"))
        admin.sendall(b"GET /config_dump HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: admin.recv(1 << 16), b""))
    stats = json.loads(answer.partition(b"\r\n\r\n")[2])["stats"]
    return {one["pid"]: one["connections"] for one in stats}


@pytest.mark.parametrize("node", [1, 2])
def test_a_worker(mesh: WholeMesh, node: int) -> None:
    """It takes its own connections with it, and no others; new ones have another in its place at once."""
    client, web, near = mesh.pod("client"), mesh.pod("web"), mesh.pod("near")
    talks: list[Conversation] = []
    try:
        # The kernel spreads connections over the two workers of a node.
        for _ in range(16):
            talks.append(mesh.connect(client, web.addresses[0]))
            talks[-1].talk()
        before = connections(mesh, node)
        victim = min(before, key=lambda pid: before[pid])
        assert sum(before.values()) >= 16
        with (
            Load(mesh, client, mesh.service("web").addresses[0], 80) as load,
            mesh.connect(client, near.addresses[0]) as local,
        ):
            load.wait(20)
            assert load.failures == []
            since = time.monotonic() - load.began
            os.kill(victim, signal.SIGKILL)
            mesh.until(
                lambda: len(connections(mesh, node)) == 2 and victim not in connections(mesh, node),
                "replaced",
            )
            load.wait(50)
            if node == 2:
                local.talk()
        assert outage(load, since) < RECOVERY
        survivors = sum(talk.works() for talk in talks)
        print(f"{survivors} of 16 connections went on; {len(load.failures)} requests failed")
        assert survivors >= 16 - before[victim]
        assert survivors >= 8
    finally:
        for talk in talks:
            talk.connection.close()


@pytest.mark.parametrize("node", [1, 2])
def test_the_control_process_of_a_ztunnel(mesh: WholeMesh, node: int) -> None:
    """What its workers carry goes on; new connections wait for its successor, and none fails."""
    client, web, near = mesh.pod("client"), mesh.pod("web"), mesh.pod("near")
    with (
        mesh.connect(client, web.addresses[0]) as open_before,
        Load(mesh, client, mesh.service("web").addresses[0], 80, timeout=40) as load,
        Load(mesh, client, near.addresses[0], HTTP, timeout=40) as local,
    ):
        load.wait(20)
        local.wait(20)
        since = time.monotonic()
        old = kill(mesh, f"ztunnel-{node}")
        took(lambda: None, lambda: restarted(mesh, f"ztunnel-{node}", old), f"ztunnel of node-{node} is back")
        load.wait(50)
        local.wait(50)
        # Its workers let what is open go on, also when another process has taken over.
        while time.monotonic() < since + RECOVERY:
            open_before.talk()
            time.sleep(0.1)
    assert load.failures == local.failures == []


@pytest.mark.parametrize("node", [1, 2])
def test_agent(mesh: WholeMesh, node: int) -> None:
    """Redirected pods stay so; a pod that comes meanwhile waits for the next agent, and is in the mesh then."""
    client, web = mesh.pod("client"), mesh.pod("web")
    with (
        mesh.connect(client, web.addresses[0]) as open_before,
        Load(mesh, client, mesh.service("web").addresses[0], 80) as load,
    ):
        load.wait(20)
        old = kill(mesh, f"agent-{node}")
        mesh.write("late.yaml", idle("late", node=f"node-{node}"))
        took(
            lambda: None,
            lambda: mesh.membership().get("late") and restarted(mesh, f"agent-{node}", old),
            f"the agent of node-{node} is back, and has brought the new pod in",
            RECOVERY,
        )
        load.wait(20)
        open_before.talk()
    assert load.failures == []
    assert mesh.curl("late", "http://web/").startswith("hello web")
    mesh.directory.joinpath("late.yaml").unlink()
    mesh.until(lambda: "late" not in mesh.membership(), "it is gone")


def test_the_control_plane(mesh: WholeMesh) -> None:
    client, web = mesh.pod("client"), mesh.pod("web")
    with (
        mesh.connect(client, web.addresses[0]) as open_before,
        Load(mesh, client, mesh.service("web").addresses[0], 80) as load,
    ):
        load.wait(20)
        old = kill(mesh, "controlplane")
        mesh.write("late.yaml", idle("late", node="node-1"))
        took(
            lambda: None,
            lambda: restarted(mesh, "controlplane", old) and mesh.membership().get("late"),
            "the control plane is back, and pods join",
            RECOVERY,
        )
        load.wait(20)
        open_before.talk()
    assert load.failures == []
    assert mesh.curl("late", "http://web/").startswith("hello web")
    mesh.directory.joinpath("late.yaml").unlink()
    mesh.until(lambda: "late" not in mesh.membership(), "it is gone")


def test_a_control_plane_that_does_not_answer_costs_nothing_but_news(mesh: WholeMesh) -> None:
    """Connections, old and new, also to where nobody has asked for before; a worker that dies meanwhile is replaced."""
    client, web, near = mesh.pod("client"), mesh.pod("web"), mesh.pod("near")
    pid = int(part(mesh, "controlplane")["pid"])
    with (
        mesh.connect(client, web.addresses[0]) as open_before,
        Load(mesh, client, mesh.service("web").addresses[0], 80) as load,
    ):
        load.wait(20)
        os.kill(pid, signal.SIGSTOP)
        try:
            mesh.write("late.yaml", idle("late", node="node-1"))
            with mesh.connect(mesh.pod("neighbour"), near.addresses[1]) as never_asked_for:
                never_asked_for.talk()
            assert load.failures == []
            victim = next(iter(connections(mesh, 1)))
            os.kill(victim, signal.SIGKILL)
            mesh.until(
                lambda: victim not in connections(mesh, 1) and len(connections(mesh, 1)) == 2, "replaced"
            )
            lost = len(load.failures)
            load.wait(200)
            assert len(load.failures) - lost <= 2, (
                "its successor has all that it needs from the control process"
            )
            open_before.works()  # it was the dead worker's, or goes on
        finally:
            os.kill(pid, signal.SIGCONT)
        mesh.until(lambda: mesh.membership().get("late"), "the news have come", 60)
    assert mesh.curl("late", "http://web/").startswith("hello web")
    mesh.directory.joinpath("late.yaml").unlink()
    mesh.until(lambda: "late" not in mesh.membership(), "it is gone")


@pytest.mark.parametrize("node", [1, 2])
def test_while_a_ztunnel_is_down_traffic_fails_and_nothing_is_readable(mesh: WholeMesh, node: int) -> None:
    """The whole proxy of a node is killed again and again for seconds, while connections are tried in a tight loop."""
    client, web = mesh.pod("client"), mesh.pod("web")
    near, neighbour = mesh.pod("near"), mesh.pod("neighbour")
    aside = (client, near) if node == 2 else (neighbour, web)
    with (
        LinkWatch(mesh, "node-1") as link,
        Load(mesh, client, mesh.service("web").addresses[0], 80) as by_vip,
        Load(mesh, client, web.addresses[0], HTTP) as by_address,
        Load(mesh, client, web.addresses[1], HTTP) as by_address6,
        Load(mesh, aside[0], aside[1].addresses[0], HTTP, threads=1) as elsewhere,
    ):
        loads = (by_vip, by_address, by_address6)
        for load in (*loads, elsewhere):
            load.wait(10)
        end_ztunnel(mesh, node)
        down = time.monotonic()
        while time.monotonic() < down + 3:
            end_ztunnel(mesh, node)
            time.sleep(0.05)
        answered = [sum(at > down + 0.3 - load.began for at in load.times) for load in loads]
        up = time.monotonic()
        took(
            lambda: None,
            lambda: all(load.times[-1] > up - load.began for load in loads),
            f"after an outage of 3 s the proxy of node-{node} carries traffic again",
            RECOVERY,
        )
        for load in loads:
            load.wait(10)
    print(f"{link.frames} frames; {[len(load.failures) for load in loads]} requests failed")
    assert answered == [0, 0, 0], "traffic fails while the proxy is down"
    assert all(len(load.failures) > 20 for load in loads)
    assert link.sightings == []
    assert link.frames > 100
    assert elsewhere.failures == [], "the other node's own traffic goes on"


def test_the_link_watch_sees_what_is_readable(mesh: WholeMesh) -> None:
    """The same capture and the same requests outside the mesh: else the tests here would prove nothing."""
    mesh.write("plain.yaml", idle("plain", labels=", istio.io/dataplane-mode: none"))
    mesh.until(lambda: any(p["name"] == "plain" and p["ready"] for p in mesh.pods()), "the pod runs")
    with LinkWatch(mesh, "node-1") as link:
        assert MARKER in mesh.curl("plain", "http://web/")
    assert link.sightings
    mesh.directory.joinpath("plain.yaml").unlink()
    mesh.until(lambda: not mesh.pods("plain"), "it is gone")


def test_the_supervisor() -> None:
    """Its programs run on, their traffic fails rather than flow readable, and the next start clears up."""
    with WholeMesh(RESOURCES) as mesh:
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        traces = mesh.traces()
        programs = mesh.programs()
        assert len(programs) == 4
        client, web = mesh.pod("client"), mesh.pod("web")
        with LinkWatch(mesh, "node-1") as link, Load(mesh, client, web.addresses[0], HTTP) as load:
            load.wait(10)
            mesh.stop(signal.SIGKILL)
            until(lambda: len(load.failures) > 50, "traffic fails")
            until(lambda: not mesh.state.socket.exists() or not mesh_answers(mesh), "nobody answers")
            assert all(map(alive, programs.values())), "the pods' programs go on"
        assert link.sightings == []
        began = time.monotonic()
        mesh.start()
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        print(f"up again {time.monotonic() - began:.1f} s after the next start")
        assert [pid for pid in traces.running() if pid in programs.values()] == []
        assert traces.running() == []


def mesh_answers(mesh: WholeMesh) -> bool:
    with contextlib.suppress(OSError, Exception):
        mesh.status()
        return True
    return False
