"""Which scheduling class a worker asks for. Real classes of this very thread, put back at the end."""

import os
from collections.abc import Iterator

import pytest

from ztunnel.proxy.scheduling import Scheduling


@pytest.fixture(autouse=True)
def _back_to_normal() -> Iterator[None]:
    before = os.sched_getscheduler(0)
    if before != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    yield
    os.sched_setscheduler(0, before, os.sched_param(0))


def test_many_events_a_turn_are_gathered_and_few_are_not() -> None:
    scheduling = Scheduling()
    scheduling.adapt(100, 150)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    scheduling.adapt(200, 150 + 400)
    assert os.sched_getscheduler(0) == os.SCHED_BATCH
    scheduling.adapt(300, 550 + 250)  # between: as it was
    assert os.sched_getscheduler(0) == os.SCHED_BATCH
    scheduling.adapt(400, 800 + 150)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    scheduling.adapt(500, 950 + 250)  # between: as it was
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_silence_is_not_many() -> None:
    scheduling = Scheduling()
    scheduling.adapt(10, 100)
    assert os.sched_getscheduler(0) == os.SCHED_BATCH
    scheduling.adapt(10, 100)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_it_can_be_turned_off() -> None:
    Scheduling(enabled=False).adapt(10, 1000)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_class_that_somebody_chose_stays() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    scheduling = Scheduling()
    scheduling.adapt(10, 1000)
    scheduling.adapt(20, 1001)
    assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert not scheduling.batch


def test_a_system_that_refuses_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(pid: int, policy: int, parameter: os.sched_param) -> None:
        asked.append(policy)
        raise PermissionError(1, "Operation not permitted")

    scheduling = Scheduling()
    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_setscheduler", refuse)
        scheduling.adapt(10, 1000)
        scheduling.adapt(20, 2000)
    assert asked == [os.SCHED_BATCH]
    assert not scheduling.batch
