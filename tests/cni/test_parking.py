"""While no proxy serves a pod connections to its ports wait in the agent's listeners, and go on with the next proxy."""

import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from pyroute2 import IPRoute

from cni.parking import PORTS, Parking
from cni.zds import ZdsServer
from tests.cni.conftest import LIMIT, ScriptedProxy, wait_until
from ztunnel.inpod import handover, netns, sockets
from ztunnel.inpod.pods import WorkloadInfo

pytestmark = pytest.mark.e2e
INFO = WorkloadInfo("web", "shop", "clerk")


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Path]:
    """The file of a network namespace whose loopback interface is up."""

    def prepare(namespace: int) -> None:
        with IPRoute() as ipr:
            ipr.link("set", index=1, state="up")

    path = tmp_path / "pod"
    netns.create(path, prepare)
    yield path
    netns.remove(path)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ZdsServer]:
    async with trio.open_nursery() as nursery:
        server = ZdsServer(tmp_path / "zds")
        await nursery.start(server.run)
        yield server
        nursery.cancel_scope.cancel()


class Within:
    """What tests do in the pod's namespace."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._fd = netns.open_path(self._path)
        self._inside = netns.inside(self._fd)
        self._inside.__enter__()

    def __exit__(self, *_: object) -> None:
        self._inside.__exit__(None, None, None)
        os.close(self._fd)


def connect(pod: Path, port: int) -> socket.socket:
    with Within(pod):
        client = socket.socket()
    client.settimeout(LIMIT)
    client.connect(("127.0.0.1", port))
    return client


def listening(pod: Path) -> list[int]:
    with Within(pod):
        return [port for port in PORTS if handover.listening_here(port)]


async def proxy_of(path: Path, pods: int) -> ScriptedProxy:
    """One that has connected, and answered nothing yet."""
    proxy = await ScriptedProxy.connect(path)
    for _ in range(pods):
        assert (await proxy.request())[0] == "add"
    return proxy


async def test_connections_wait_for_the_next_proxy_which_serves_them(
    server: ZdsServer, pod: Path, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parking = Parking(server)
    nursery.start_soon(parking.run)
    server.offer("u1", INFO, pod)
    await wait_until(lambda: listening(pod) == list(PORTS))
    clients = {port: connect(pod, port) for port in PORTS}
    many = [connect(pod, 15001) for _ in range(20)]
    for number, client in enumerate(many):
        client.sendall(bytes([number]))
    proxy = await proxy_of(tmp_path / "zds", 1)
    assert parking.pods == 1, "until it says that it serves the pod"
    with Within(pod):
        mine = {port: sockets.listen(port) for port in PORTS}
    await proxy.answer()
    await wait_until(lambda: parking.pods == 0)
    await wait_until(lambda: sockets.queued(mine[15001]) == 21)
    assert sockets.queued(mine[15008]) == sockets.queued(mine[15006]) == 1
    numbers = set()
    for _ in range(21):
        accepted, _ = mine[15001].accept()
        with accepted:
            accepted.settimeout(0.5)
            try:
                numbers.add(accepted.recv(1)[0])
            except TimeoutError:
                continue  # the one that says nothing
    assert numbers == set(range(20))
    for each in (*mine.values(), *clients.values(), *many):
        each.close()
    proxy.close()
    # It is gone without a word: the agent listens again.
    await wait_until(lambda: parking.pods == 1)
    assert listening(pod) == list(PORTS)


async def test_where_workers_serve_on_nobody_is_let_wait(
    server: ZdsServer, pod: Path, nursery: trio.Nursery
) -> None:
    with Within(pod):
        worker = sockets.listen(15008)
    parking = Parking(server)
    nursery.start_soon(parking.run)
    server.offer("u1", INFO, pod)
    looked = trio.current_time()
    await wait_until(lambda: trio.current_time() > looked + 0.5)
    assert parking.pods == 0
    worker.close()
    await wait_until(lambda: parking.pods == 1)


async def test_a_pod_that_leaves_has_no_listeners_of_the_agents(
    server: ZdsServer, pod: Path, nursery: trio.Nursery
) -> None:
    parking, scope = Parking(server), trio.CancelScope()
    nursery.start_soon(_run_in, scope, parking)
    server.offer("u1", INFO, pod)
    await wait_until(lambda: parking.pods == 1)
    await server.delete("u1")
    await wait_until(lambda: listening(pod) == [])
    server.offer("u1", INFO, pod)
    await wait_until(lambda: parking.pods == 1)
    scope.cancel()
    await wait_until(lambda: listening(pod) == [])


async def _run_in(scope: trio.CancelScope, parking: Parking) -> None:
    with scope:
        await parking.run()


async def test_where_nothing_would_migrate_nobody_waits_in_vain(
    server: ZdsServer, pod: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def no() -> bool:
        asked.append(True)
        return False

    monkeypatch.setattr(handover, "migrate_on_close", no)
    parking = Parking(server)
    nursery.start_soon(parking.run)
    server.offer("u1", INFO, pod)
    await wait_until(lambda: len(asked) > 2)
    assert parking.pods == 0
    assert listening(pod) == []
