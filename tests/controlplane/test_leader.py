"""One of several writes: candidates in one process, with a lease that is kept in memory."""

import json
import threading
import time
from typing import Any, cast

import pytest
import trio

from tests.store.kube.server import Answer, Request, serving
from ztunnel.controlplane.leader import Leader, Timing
from ztunnel.store.kube.api import Api
from ztunnel.store.kube.errors import ApiError

LIMIT = 60.0  # seconds
TIMING = Timing(duration=3, deadline=1.5, retry=0.1)


class Leases:
    """What of an API server keeps leases: one object, optimistic concurrency."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.cut_off: dict[str, ApiError] = {}
        self._lock = threading.Lock()

    def seen_by(self, name: str) -> Api:
        return cast(Api, _Seen(self, name))

    @property
    def holder(self) -> str:
        return str(self.lease["spec"]["holderIdentity"]) if self.lease else ""

    def request(self, method: str, body: dict[str, Any] | None) -> bytes:
        with self._lock:
            if method == "POST":
                if self.lease is not None:
                    raise ApiError(409, "AlreadyExists", "exists")
            elif self.lease is None:
                raise ApiError(404, "NotFound", "not found")
            if body is not None:
                if method == "PUT" and body["metadata"]["resourceVersion"] != str(self.version):
                    raise ApiError(409, "Conflict", "changed meanwhile")
                self.version += 1
                self.lease = json.loads(json.dumps(body))
                self.lease["metadata"]["resourceVersion"] = str(self.version)
            return json.dumps(self.lease).encode()


class _Seen:
    def __init__(self, leases: Leases, name: str) -> None:
        self._leases = leases
        self._name = name

    def request(
        self, method: str, path: str, *, body: dict[str, Any] | None = None, timeout: float = 30
    ) -> bytes:
        assert path.startswith("/apis/coordination.k8s.io/v1/namespaces/mesh/leases")
        assert timeout <= TIMING.duration - TIMING.deadline
        if error := self._leases.cut_off.get(self._name):
            raise error
        return self._leases.request(method, body)


class Candidate:
    """A leader with one writer, which notes when it runs."""

    def __init__(self, leases: Leases, name: str, running: list[str]) -> None:
        self.name = name
        self.leader = Leader(leases.seen_by(name), "mesh", identity=name, timing=TIMING)
        self.scope = trio.CancelScope()
        self.runs = 0
        self._running = running

    async def write(self) -> None:
        assert self._running == [], "another still writes"
        self._running.append(self.name)
        self.runs += 1
        try:
            await trio.sleep_forever()
        finally:
            self._running.remove(self.name)

    async def run(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.leader.run)
                nursery.start_soon(self.leader.run_while_leading, self.write, "write")


async def until(condition: Any) -> None:
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.01)


@pytest.fixture
def leases() -> Leases:
    return Leases()


async def test_one_writes_and_the_next_follows(leases: Leases, nursery: trio.Nursery) -> None:
    running: list[str] = []
    one, two = (Candidate(leases, name, running) for name in ("one", "two"))
    nursery.start_soon(one.run)
    await until(lambda: running == ["one"])
    assert leases.holder == one.leader.identity
    nursery.start_soon(two.run)
    await until(lambda: two.leader.describe()["holder"] == one.leader.identity)
    assert not two.leader.leading
    # An orderly end: its writers stop, then the lease is free.
    one.scope.cancel()
    await until(lambda: running == ["two"])
    assert leases.lease is not None
    assert leases.lease["spec"]["leaseTransitions"] == 1
    assert (one.runs, two.runs) == (1, 1)
    two.scope.cancel()


async def test_who_cannot_renew_stops_before_another_may_start(leases: Leases, nursery: trio.Nursery) -> None:
    running: list[str] = []
    one, two = (Candidate(leases, name, running) for name in ("one", "two"))
    nursery.start_soon(one.run)
    await until(lambda: running == ["one"])
    nursery.start_soon(two.run)
    leases.cut_off["one"] = ApiError(0, "Unreachable", "cannot be reached")
    await until(lambda: running == [])
    assert not one.leader.leading
    assert leases.holder == one.leader.identity, "the lease is not over yet"
    await until(lambda: running == ["two"])
    leases.cut_off.clear()
    await until(lambda: one.leader.describe()["holder"] == two.leader.identity)
    assert running == ["two"]
    one.scope.cancel()
    two.scope.cancel()


async def test_a_lease_that_is_deleted_is_made_again_by_its_holder(
    leases: Leases, nursery: trio.Nursery
) -> None:
    running: list[str] = []
    one, two = (Candidate(leases, name, running) for name in ("one", "two"))
    nursery.start_soon(one.run)
    await until(lambda: running == ["one"])
    nursery.start_soon(two.run)
    await until(lambda: two.leader.describe()["holder"] == one.leader.identity)
    for _ in range(5):
        leases.lease = None
        await until(lambda: leases.lease is not None)
        assert leases.holder == one.leader.identity
    assert (one.runs, two.runs) == (1, 0)
    one.scope.cancel()
    two.scope.cancel()


async def test_a_writer_that_fails_is_run_again_and_holds_up_no_other(
    leases: Leases, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    leader = Leader(leases.seen_by("one"), "mesh", timing=TIMING)
    tries: list[str] = []

    async def denied() -> None:
        tries.append("denied")
        async with trio.open_nursery():
            raise ApiError(403, "Forbidden", "configmaps is forbidden; bind a Role")

    async def broken() -> None:
        tries.append("broken")
        raise ValueError("a fault of ours")

    async def well() -> None:
        tries.append("well")
        await trio.sleep_forever()

    async with trio.open_nursery() as inner:
        inner.start_soon(leader.run)
        for run, what in ((denied, "write roots"), (broken, "write status"), (well, "be well")):
            inner.start_soon(leader.run_while_leading, run, what)
        await until(lambda: tries.count("denied") == 2 and tries.count("broken") == 2)
        inner.cancel_scope.cancel()
    assert tries.count("well") == 1
    told = [record.getMessage() for record in caplog.records]
    assert told.count("cannot write roots: configmaps is forbidden; bind a Role") == 1
    assert "internal error: write status failed" in told


async def test_who_may_not_have_leases_does_not_write(
    leases: Leases, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    running: list[str] = []
    one = Candidate(leases, "one", running)
    leases.cut_off["one"] = ApiError(403, "Forbidden", "leases is forbidden; bind a Role")
    nursery.start_soon(one.run)
    await until(lambda: one.leader.describe()["problem"])
    assert running == []
    assert any("leases is forbidden" in record.getMessage() for record in caplog.records)
    leases.cut_off.clear()
    await until(lambda: running == ["one"])
    one.scope.cancel()


async def test_two_that_come_at_the_same_moment(leases: Leases, nursery: trio.Nursery) -> None:
    running: list[str] = []
    many = [Candidate(leases, f"number-{number}", running) for number in range(8)]
    for one in many:
        nursery.start_soon(one.run)
    await until(lambda: len(running) == 1)
    await until(lambda: all(one.leader.describe()["holder"] == leases.holder for one in many))
    assert sum(one.runs for one in many) == 1
    for one in many:
        one.scope.cancel()


async def test_what_a_thread_began_writes_no_more_once_the_lease_is_another_s(
    leases: Leases, nursery: trio.Nursery
) -> None:
    """A writer's thread, which nobody can cancel, goes on after the lease is lost."""
    leader = Leader(leases.seen_by("one"), "mesh", timing=TIMING)
    with serving(lambda request: Answer(body={})) as fake:
        api = fake.api().while_allowed(leader.limit)

        def write() -> None:
            api.request("PUT", "/x", body={})

        def refused() -> bool:
            try:
                write()
            except ApiError as error:
                return error.reason == "NotLeading"
            return False

        assert refused()
        scope = trio.CancelScope()

        async def lead() -> None:
            with scope:
                await leader.run()

        nursery.start_soon(lead)
        await until(lambda: leader.leading)
        write()
        most = TIMING.deadline + TIMING.timeout
        assert 0 < leader.limit(1000.0) <= most < TIMING.duration
        assert leader.limit(0.01) == 0.01
        leases.cut_off["one"] = ApiError(0, "Unreachable", "cannot be reached")
        await until(refused)
        count = len(fake.requests)
        api.get_json("/x")  # reading is for everybody
        api.request("POST", "/x", query={"dryRun": "All"}, body={})
        assert refused()
        assert len(fake.requests) == count + 2
        scope.cancel()


def test_a_request_that_is_sent_again_has_only_the_time_that_is_left() -> None:
    """By a server that ends each connection late and without a word."""

    def late(_: Request) -> Answer:
        time.sleep(0.6)
        return Answer(0)

    with serving(late) as fake:
        with pytest.raises(ApiError) as caught:
            fake.api().request("GET", "/x", timeout=1.0)
        assert caught.value.reason == "Timeout"
