"""What fails, or ends as soon as it begins, is tried again after a pause that grows: no server is asked without end."""

import itertools
import time
from typing import Any

import pytest
import trio

from tests.store.kube.server import Answer, Request, serving
from ztunnel.controlplane import waypoints
from ztunnel.controlplane.kube import roots
from ztunnel.controlplane.kube.mirror import FIRST_PAUSE, Mirror
from ztunnel.controlplane.waypoint_objects import Deployment
from ztunnel.controlplane.waypoints import Deployer
from ztunnel.store.kube.api import Api

LIMIT = 60.0  # seconds
PODS = {"resources": [{"name": "pods", "kind": "Pod", "namespaced": True}]}
SETTINGS = Deployment("image", "Always", "https://a:1", "default", "Kubernetes", "cluster.local", "", "mesh")


class Hasty:
    """Has one list, and ends each watch as soon as it begins; `watches` are when they began."""

    def __init__(self) -> None:
        self.watches: list[float] = []

    def __call__(self, request: Request) -> Answer:
        if request.path == "/api/v1":
            return Answer(body=PODS)
        if request.query.get("watch"):
            self.watches.append(time.monotonic())
            return Answer(body=b"")
        return Answer(body={"metadata": {"resourceVersion": "7"}, "items": []})

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.watches)]


async def until(condition: Any) -> None:
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.01)


async def test_a_mirror_whose_watch_ends_at_once(nursery: trio.Nursery) -> None:
    server = Hasty()
    with serving(server) as fake:
        mirror = Mirror(fake.api(), "/api/v1/pods", {}, "pods", lambda names: None)
        scope = trio.CancelScope()

        async def follow() -> None:
            with scope:
                await mirror.run()

        nursery.start_soon(follow)
        await until(lambda: len(server.watches) >= 4)
        assert mirror.synced
        scope.cancel()
    first, second, third = server.gaps[:3]
    assert first >= FIRST_PAUSE
    assert second >= 2 * FIRST_PAUSE
    assert third >= 4 * FIRST_PAUSE


async def test_a_watch_for_waypoints_that_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waypoints, "RETRY", 0.3)
    server = Hasty()
    with serving(server) as fake:
        watch = waypoints._Watch(fake.api(), "v1", "Pod", "", lambda: None)
        watch.start()
        await until(lambda: len(server.watches) >= 3)
        watch.stop()
    assert min(server.gaps) >= 0.3


class Stubborn(Deployer):
    """What it does never succeeds."""

    def __init__(self, api: Api) -> None:
        super().__init__(api, SETTINGS)
        self.times: list[float] = []

    async def _served(self) -> None:
        pass

    def _make_class(self) -> None:
        pass

    def _reconcile(self) -> bool:
        self.times.append(time.monotonic())
        return False


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(waypoints, "RETRY", 0.1)
    monkeypatch.setattr(waypoints, "RESYNC", 0.4)
    monkeypatch.setattr(waypoints, "TOGETHER", 0.0)
    return 0.1


async def test_a_gateway_that_cannot_be_deployed(
    nursery: trio.Nursery, quick: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waypoints._Watch, "start", lambda self: None)
    with serving(lambda request: Answer(body={})) as fake:
        deployer = Stubborn(fake.api())
        scope = trio.CancelScope()

        async def deploy() -> None:
            with scope:
                await deployer.run()

        nursery.start_soon(deploy)
        await until(lambda: len(deployer.times) >= 5)
        gaps = [later - earlier for earlier, later in itertools.pairwise(deployer.times)]
        assert all(
            gap >= least for gap, least in zip(gaps, (quick, 2 * quick, 4 * quick, 4 * quick), strict=False)
        )
        scope.cancel()


async def test_a_config_map_that_somebody_else_writes_too(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another mesh, say, which holds its own roots for right."""
    with serving(lambda request: Answer(body={})) as fake:
        publisher = roots.RootPublisher(fake.api(), lambda: b"ours", lambda: b"")
        times: list[float] = []

        def other_mesh(target: roots.Target, wanted: dict[str, Any], *, there: bool) -> None:
            if target[1] == roots.NAME:
                times.append(time.monotonic())
                trio.from_thread.run_sync(publisher._put, frozenset([target]))

        async def run(mirror: Mirror) -> None:
            mirror.synced = True
            if mirror is publisher._namespaces:
                mirror.objects = {("", "shop"): {"metadata": {"name": "shop"}}}
            await trio.sleep_forever()

        monkeypatch.setattr(Mirror, "run", run)
        monkeypatch.setattr(publisher, "_send", other_mesh)
        scope = trio.CancelScope()

        async def publish() -> None:
            with scope:
                await publisher.run()

        nursery.start_soon(publish)
        await until(lambda: len(times) >= roots.AT_ONCE_AGAIN + 3)
        scope.cancel()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)][roots.AT_ONCE_AGAIN :]
    assert gaps[0] >= 2 * roots.FIRST_PAUSE
    assert gaps[1] >= 4 * roots.FIRST_PAUSE
