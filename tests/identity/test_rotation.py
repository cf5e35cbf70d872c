"""Rotation on a virtual clock: days of renewals, failing authorities, suspended machines, in milliseconds.

Every test asks for `autojump_clock` itself: pytest-trio runs on a clock only if it is the test's own argument.
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ztunnel.identity import keys
from ztunnel.identity.ca import Authority
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import CertificateUnavailableError, IdentityError, SpiffeIdError
from ztunnel.identity.rotation import CertificateManager, CertificateState

A = "spiffe://cluster.local/ns/default/sa/a"
B = "spiffe://cluster.local/ns/default/sa/b"
START = 1_800_000_000.0
HOUR, DAY = 3600.0, 86400.0


class _World:
    """A wall clock that goes with trio's (unless set), and an authority that can be slow, wrong or down."""

    def __init__(self) -> None:
        self.offset = START
        self.authority = Authority.create(now=self.now)
        self.failure: Exception | None = None
        self.delay = 0.0
        self.calls: list[tuple[float, str]] = []
        self.under_way: Counter[str] = Counter()
        self.most = 0
        self.issued: list[WorkloadCertificate] = []
        self.answer: Callable[[bytes, str, int], list[bytes]] = self.authority.sign
        self.manager = self.make()

    def make(
        self, ttl: int = 86400, *, max_fetches: int = 8, fetch_timeout: float = 30.0
    ) -> CertificateManager:
        self.manager = CertificateManager(
            self.sign,
            ttl,
            on_update=self.issued.append,
            now=self.now,
            rng=random.Random(7),
            max_fetches=max_fetches,
            fetch_timeout=fetch_timeout,
        )
        return self.manager

    def now(self) -> float:
        try:
            return self.offset + trio.current_time()
        except RuntimeError:
            return self.offset

    async def sign(self, csr: bytes, identity: str, ttl: int) -> list[bytes]:
        self.calls.append((self.now(), identity))
        self.under_way[identity] += 1
        self.most = max(self.most, self.under_way.total())
        assert self.under_way[identity] == 1, "two fetches for one identity at once"
        try:
            await trio.sleep(self.delay)
            if self.failure is not None:
                raise self.failure
            return self.answer(csr, identity, ttl)
        finally:
            self.under_way[identity] -= 1

    def state(self, identity: str = A) -> CertificateState:
        return next(one.state for one in self.manager.status() if one.identity == identity)


@pytest.fixture
def world() -> _World:
    return _World()


async def test_a_wanted_identity_gets_its_certificate(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    manager = world.manager
    manager.want(A)
    assert manager.current(A) is None
    assert world.state() is CertificateState.PENDING
    await nursery.start(manager.run)
    certificate = await manager.wait(A)
    assert certificate.identity == A
    assert manager.current(A) is certificate
    assert world.issued == [certificate]
    assert world.state() is CertificateState.VALID
    manager.want(B)
    assert (await manager.wait(B)).identity == B
    assert [one.identity for one in manager.status()] == [A, B]


async def test_only_identities_are_wanted(autojump_clock: MockClock, world: _World) -> None:
    with pytest.raises(SpiffeIdError):
        world.manager.want("default/a")
    with pytest.raises(IdentityError, match="nobody on this node wants it"):
        await world.manager.wait(A)
    with pytest.raises(IdentityError, match="nobody on this node wants it"):
        world.manager.release(A)
    assert world.manager.current(A) is None
    assert world.manager.status() == []


async def test_ten_days_of_renewals_at_half_of_the_life(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    manager = world.manager
    for identity in (A, B):
        manager.want(identity)
    await nursery.start(manager.run)
    await manager.wait(A)
    await manager.wait(B)
    while trio.current_time() < 10 * DAY:
        await trio.sleep(HOUR)
        for identity in (A, B):
            certificate = manager.current(identity)
            assert certificate is not None
            assert certificate.not_after - world.now() > 0.4 * DAY
    gaps = []
    for identity in (A, B):
        times = [at for at, whose in world.calls if whose == identity]
        gaps += [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) >= 2 * 18
    assert all(0.45 * DAY - 1 <= gap <= 0.55 * DAY + 1 for gap in gaps)  # certificates end on whole seconds
    assert max(gaps) - min(gaps) > 0.01 * DAY, "no jitter: all nodes would ask at once"
    assert len({one.key_pem for one in world.issued}) == len(world.issued), "a key was used twice"


async def test_one_fetch_however_many_want_and_wait(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    world.delay = 5.0
    manager = world.manager
    await nursery.start(manager.run)
    got = []

    async def one() -> None:
        manager.want(A)
        got.append(await manager.wait(A))

    async with trio.open_nursery() as waiting:
        for _ in range(20):
            waiting.start_soon(one)
    assert len(world.calls) == 1
    assert len({id(certificate) for certificate in got}) == 1
    assert manager.status()[0].references == 20


async def test_kept_until_the_last_release(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)
    manager.want(A)
    await manager.wait(A)
    manager.release(A)
    assert manager.current(A) is not None
    manager.release(A)
    assert manager.current(A) is None
    assert manager.status() == []
    await trio.sleep(5 * DAY)
    assert len(world.calls) == 1, "a released identity was renewed"
    with pytest.raises(IdentityError, match="nobody"):
        manager.release(A)


async def test_wanted_again_after_a_release_is_a_new_key(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)
    first = await manager.wait(A)
    for pause in (True, False):
        manager.release(A)
        if pause:
            await wait_all_tasks_blocked()
        manager.want(A)
        assert manager.current(A) is None
        second = await manager.wait(A)
        assert second.key_pem != first.key_pem
    await trio.sleep(10 * DAY)
    assert len(world.calls) == pytest.approx(23, abs=3), "renewed by more than one task"


async def test_a_release_ends_the_fetch_and_wanting_again_waits_for_that(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    """Also for an authority that is slow to notice; `sign` asserts that it is never asked twice at once."""
    noticing = 3.0
    sign = world.sign

    async def slow(csr: bytes, identity: str, ttl: int) -> list[bytes]:
        world.under_way[A] += 1
        try:
            await trio.sleep(10)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep(noticing)
            raise
        finally:
            world.under_way[A] -= 1
        return await sign(csr, identity, ttl)

    manager = world.manager
    manager._sign = slow
    await nursery.start(manager.run)
    for _ in range(3):
        manager.want(A)
        await trio.sleep(1)
        manager.release(A)
    manager.want(A)
    manager._sign = sign
    assert (await manager.wait(A)).identity == A
    assert len(world.calls) == 1
    assert len(world.issued) == 1


async def test_a_release_wakes_who_waits(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    world.delay = 10.0
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)

    async def release() -> None:
        await trio.sleep(1)
        manager.release(A)

    nursery.start_soon(release)
    with pytest.raises(IdentityError, match="nobody on this node wants it"):
        await manager.wait(A)
    assert trio.current_time() == pytest.approx(1.0)


async def test_no_certificate_at_all_is_told_with_the_last_error(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    world.failure = OSError("connection refused by 10.96.0.5:15012")
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)
    with pytest.raises(CertificateUnavailableError, match=f"{A}: connection refused by 10.96") as caught:
        await manager.wait(A)
    assert caught.value.identity == A
    assert manager.current(A) is None
    status = manager.status()[0]
    assert (status.state, status.failures) == (CertificateState.UNAVAILABLE, 1)
    assert status.not_after is None
    assert status.next_fetch is not None
    assert status.next_fetch > world.now()
    # At once, not after the next attempt: a connection that needs it is to be refused, not held.
    before = trio.current_time()
    with pytest.raises(CertificateUnavailableError):
        await manager.wait(A)
    assert trio.current_time() == before


async def test_a_patient_waiter_gets_it_once_the_authority_is_back(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    world.failure = OSError("down")
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)

    async def mend() -> None:
        await trio.sleep(100)
        world.failure = None

    nursery.start_soon(mend)
    assert (await manager.wait(A, persist=True)).identity == A
    assert 100 <= trio.current_time() <= 131
    assert world.state() is CertificateState.VALID
    assert manager.status()[0].last_error == ""


async def test_retries_back_off_with_jitter_up_to_a_limit(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    world.failure = OSError("down")
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)
    await trio.sleep(HOUR)
    times = [at for at, _ in world.calls]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    for number, gap in enumerate(gaps):
        longest = min(30.0, 0.25 * 2**number)
        assert longest / 2 - 1e-3 <= gap <= longest + 1e-3
    assert 120 <= len(gaps) <= 260
    assert len({round(gap, 3) for gap in gaps[10:]}) > 50


async def test_the_old_certificate_serves_until_it_ends(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    manager = world.make(ttl=7200)
    await nursery.start(manager.run)
    manager.want(A)
    old = await manager.wait(A)
    world.failure = OSError("the control plane is down")
    while world.now() < old.not_after - 1:
        assert await manager.wait(A) is old
        await trio.sleep(min(300, old.not_after - 0.5 - world.now()))
    assert world.state() is CertificateState.FAILING
    assert manager.status()[0].last_error == "the control plane is down"
    assert manager.current(A) is old
    await trio.sleep(1)
    assert manager.current(A) is None
    assert world.state() is CertificateState.UNAVAILABLE
    with pytest.raises(CertificateUnavailableError, match="the control plane is down"):
        while True:  # an attempt that is under way is waited for
            await manager.wait(A)
    world.failure = None
    new = await manager.wait(A, persist=True)
    assert new is not old
    assert manager.current(A) is new


async def test_one_failing_identity_does_not_hold_up_others(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    def answer(csr: bytes, identity: str, ttl: int) -> list[bytes]:
        if identity == A:
            raise OSError("no such service account")
        return world.authority.sign(csr, identity, ttl)

    world.answer = answer
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)
    manager.want(B)
    assert (await manager.wait(B)).identity == B
    assert {one.identity: one.state for one in manager.status()} == {
        A: CertificateState.UNAVAILABLE,
        B: CertificateState.VALID,
    }


async def test_an_authority_that_does_not_answer(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    world.delay = 1000.0
    manager = world.make(fetch_timeout=20.0)
    await nursery.start(manager.run)
    manager.want(A)
    with pytest.raises(CertificateUnavailableError, match="did not answer within 20 s"):
        await manager.wait(A)
    assert trio.current_time() == pytest.approx(20.0)


async def test_an_answer_that_is_wrong_is_a_failed_fetch(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    manager = world.manager
    await nursery.start(manager.run)
    good = world.authority.sign
    manager.want(A)
    for answer, complaint in (
        (lambda _csr, identity, ttl: good(keys.csr(keys.generate(), A), identity, ttl), "another key"),
        (lambda csr, _identity, ttl: good(csr, B, ttl), "URI SANs"),
        (lambda csr, identity, ttl: [*good(csr, identity, ttl)[:-1], Authority.create().root_pem], "chain"),
        (lambda _csr, _identity, _ttl: [], "0 PEMs"),
    ):
        world.answer = answer
        await trio.sleep(HOUR)
        with pytest.raises(CertificateUnavailableError, match=complaint):
            await manager.wait(A)
    assert world.issued == []
    world.answer = good
    assert await manager.wait(A, persist=True)


async def test_errors_in_a_group_are_told_in_one_line(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    world.failure = ExceptionGroup("stream", [OSError("reset by peer"), ValueError()])
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)
    with pytest.raises(CertificateUnavailableError, match=r"reset by peer; ValueError$"):
        await manager.wait(A)


async def test_a_listener_that_fails_does_not_end_rotation(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    def listener(_certificate: WorkloadCertificate) -> None:
        raise RuntimeError("worker is gone")

    manager = CertificateManager(world.sign, on_update=listener, now=world.now)
    await nursery.start(manager.run)
    manager.want(A)
    await manager.wait(A)
    await trio.sleep(3 * DAY)
    assert manager.current(A) is not None
    assert "worker is gone" in caplog.text


async def test_few_fetches_at_once(autojump_clock: MockClock, world: _World, nursery: trio.Nursery) -> None:
    world.delay = 1.0
    manager = world.make(max_fetches=3)
    await nursery.start(manager.run)
    names = [f"spiffe://cluster.local/ns/default/sa/s{number}" for number in range(10)]
    for name in names:
        manager.want(name)
    for name in names:
        await manager.wait(name)
    assert world.most == 3
    assert trio.current_time() == pytest.approx(4.0)


async def test_a_short_life_is_renewed_at_half_and_does_not_spin(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    manager = world.make(ttl=10)
    await nursery.start(manager.run)
    manager.want(A)
    await manager.wait(A)
    await trio.sleep(99)
    assert 15 <= len(world.calls) <= 25
    assert manager.current(A) is not None

    manager.release(A)
    world.calls.clear()
    manager = world.make(ttl=1)
    await nursery.start(manager.run)
    manager.want(A)
    await trio.sleep(60)
    assert len(world.calls) <= 120


async def test_after_a_suspension_it_is_renewed_at_once(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)
    first = await manager.wait(A)
    await trio.sleep(10)
    world.offset += 30 * DAY  # the wall clock went on, trio's did not
    assert manager.current(A) is None
    before = trio.current_time()
    second = await manager.wait(A)
    assert second is not first
    assert trio.current_time() == before
    # And without anybody asking, within a minute or so.
    await trio.sleep(10)
    world.offset += 30 * DAY
    await trio.sleep(61)
    assert manager.current(A) is not None


async def test_a_wall_clock_set_back_does_not_put_off_renewal(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)
    await manager.wait(A)
    world.offset -= 60.0
    await trio.sleep(0.56 * DAY)
    assert len(world.calls) == 2


async def test_cancelling_run_ends_everything_and_it_may_run_again(
    autojump_clock: MockClock, world: _World
) -> None:
    world.delay = 5.0
    manager = world.manager
    manager.want(A)
    with trio.move_on_after(1):
        await manager.run()
    assert world.under_way.total() == 0
    assert world.state() is CertificateState.PENDING
    with trio.move_on_after(20):
        await manager.run()
    assert manager.current(A) is not None
    manager.release(A)
    assert manager.status() == []


async def test_it_runs_once_at_a_time(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery
) -> None:
    await nursery.start(world.manager.run)
    with pytest.raises(RuntimeError, match="runs already"):
        await world.manager.run()


async def test_no_key_is_ever_logged(
    autojump_clock: MockClock, world: _World, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    manager = world.manager
    await nursery.start(manager.run)
    manager.want(A)
    certificate = await manager.wait(A)
    world.failure = OSError("down")
    await trio.sleep(0.6 * DAY)
    shown = caplog.text + repr(manager.status()) + repr(manager)
    assert "down" in shown
    for line in certificate.key_pem.decode().splitlines()[1:-1]:
        assert line not in shown
