"""Real worker processes under their control process: what they are told, what becomes of them, what is left."""

import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.proxy.meshlab import wait_listening
from tests.telemetry.written import whole_lines
from ztunnel.embedded.testing import Lab, LabPod
from ztunnel.identity.ca import Authority
from ztunnel.identity.testing import CLIENT, workload
from ztunnel.mesh.model import Workload
from ztunnel.mesh.route import Route
from ztunnel.proxy import messages
from ztunnel.proxy.served import PodError
from ztunnel.proxy.workers import Workers
from ztunnel.telemetry.log import Logger

pytestmark = pytest.mark.e2e


async def until(condition: Callable[[], Any], what: str, limit: float = 15) -> None:
    with trio.move_on_after(limit):
        while True:
            value = condition()
            if hasattr(value, "__await__"):
                value = await value
            if value:
                return
            await trio.sleep(0.01)
    raise AssertionError(f"not within {limit} s: {what}")


class Control:
    """A control process's part, whose answers to questions the test decides."""

    def __init__(self, directory: Path, count: int = 2) -> None:
        self.path = directory / "log"
        self._log = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC)
        self.questions: list[tuple[messages.AskRoute, Callable[..., None]]] = []
        self.fail = False
        logger = Logger("debug", json=True, fd=self._log)
        self.workers = Workers(count, logger, self._ask, workload=self._workload)

    def _workload(self, namespace: str, name: str) -> Workload:
        return Workload(uid=f"Kubernetes//Pod/{namespace}/{name}", name=name, namespace=namespace)

    def _ask(self, question: messages.AskRoute, answer: Callable[..., None]) -> None:
        if self.fail:
            raise RuntimeError("a defect in the mesh model")
        self.questions.append((question, answer))

    def lines(self, **values: Any) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in whole_lines(self.path)]
        return [line for line in found if values.items() <= line.items()]

    def pids(self) -> list[int]:
        return [one["pid"] for one in self.workers.describe()]

    async def add(self, pod: LabPod, identity: str = CLIENT) -> None:
        await self.workers.add_pod(pod.uid, pod.name, pod.namespace, identity, pod.open())

    async def total(self, name: str) -> int:
        return sum(getattr(stats, name) for stats in await self.workers.stats())

    def close(self) -> None:
        os.close(self._log)


@pytest.fixture
async def control(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Control]:
    made = Control(tmp_path)
    await nursery.start(made.workers.run)
    made.workers.policies.update({})
    yield made
    nursery.cancel_scope.cancel()
    made.close()


@pytest.fixture
def pod(tmp_path: Path) -> Any:
    with Lab(tmp_path, nodes=1) as lab:
        yield lab.pod("web")


def restarted(control: Control, times: int) -> bool:
    """Whether all workers run, after so many restarts of each."""
    return control.workers.alive == 2 and all(one["restarts"] == times for one in control.workers.describe())


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_pods_come_and_go_and_leave_no_descriptor(control: Control, pod: LabPod) -> None:
    await control.add(pod)
    await control.workers.delete_pod(pod.uid)
    await until(lambda: not control.workers._leaving, "the first time is over")
    before = [descriptors(pid) for pid in (os.getpid(), *control.pids())]
    for _ in range(5):
        await control.add(pod)
        await control.add(pod)  # again is harmless
        wait_listening(pod, 15008)
        assert await control.total("pods") == 2
        await control.workers.delete_pod(pod.uid)
        await control.workers.delete_pod(pod.uid)
    await until(lambda: not control.workers._leaving, "all of it is let go of")
    assert [descriptors(pid) for pid in (os.getpid(), *control.pids())] == before
    assert await control.total("pods") == 0


async def test_a_port_that_is_taken_leaves_nothing(control: Control, pod: LabPod) -> None:
    before = descriptors(os.getpid())
    with pod.listen(15006), pytest.raises(PodError, match="cannot listen on port 15006"):
        await control.add(pod)
    assert descriptors(os.getpid()) == before
    assert not control.workers.pods


async def test_a_killed_worker_is_replaced_and_told_all_it_must_know(control: Control, pod: LabPod) -> None:
    certificate = workload(Authority.create(), CLIENT)
    control.workers.use_certificate(CLIENT, certificate.encode())
    await control.add(pod)
    for restarts in (1, 2):
        for pid in control.pids():
            os.kill(pid, signal.SIGKILL)
        await until(partial(restarted, control, restarts), "they are back")
        with trio.fail_after(
            10
        ):  # a worker that has just begun does not answer within stats' second, on a busy machine
            while await control.total("pods") != 2:
                await trio.sleep(0.02)
    assert [one["restarts"] for one in control.workers.describe()] == [2, 2]
    ended = control.lines(message="a worker ended; its connections are lost, another takes its place")
    assert {line["reason"] for line in ended} == {"signal SIGKILL"}


async def test_a_late_answer_is_for_the_worker_that_asked(control: Control, pod: LabPod) -> None:
    """Its successor has questions of its own under the same numbers: the answer would lead them astray."""
    await control.add(pod)
    slot = control.workers._slots[0]
    assert slot.channel is not None
    control.workers._handle(slot, slot.channel, messages.AskRoute(1, pod.uid, b"\x0a\x00\x00\x01", 80))
    ((_, answer),) = control.questions
    sent: list[messages.Message] = []
    old = slot.pid
    os.kill(old, signal.SIGKILL)
    await until(lambda: slot.channel is not None and slot.pid not in (0, old), "another worker")
    channel = slot.channel
    assert channel is not None
    send = channel.send

    def watched(message: messages.Message, fds: Any = ()) -> None:
        sent.append(message)
        send(message, fds)

    channel.send = watched  # type: ignore[method-assign]
    answer(Route((), "", "wrong", ()))
    assert sent == []


async def test_a_question_that_cannot_be_answered_does_not_end_the_control_process(
    control: Control, pod: LabPod
) -> None:
    await control.add(pod)
    control.fail = True
    slot = control.workers._slots[0]
    assert slot.channel is not None
    question = messages.AskRoute(1, pod.uid, b"\x0a\x00\x00\x01", 80)
    encoded = msgspec.msgpack.encode(question)
    before = len(control.lines(scope="worker"))
    # As if the worker had sent it: through the same path.
    slot.channel._in += len(encoded).to_bytes(4, "big") + b"\x00" + encoded
    await control.workers.stats()  # something comes from it, and what it "sent" before is looked at
    await until(lambda: len(control.lines(scope="worker")) > before, "the defect is in the log")
    assert "a defect in the mesh model" in control.lines(scope="worker")[-1]["error"]
    assert control.workers.alive == 2


async def test_draining_ends_idle_workers_at_once(control: Control, pod: LabPod) -> None:
    await control.add(pod)
    pids = control.pids()
    with trio.fail_after(10):
        await control.workers.drain(60)
        # A worker closes its channel a moment before it is gone.
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the workers are gone")


async def test_a_worker_without_a_control_process_ends(control: Control, pod: LabPod) -> None:
    await control.add(pod)
    slot = control.workers._slots[0]
    assert slot.channel is not None
    slot.channel.sock.shutdown(2)
    await until(
        lambda: control.lines(message="the control process is gone; waiting for the next one"), "it noticed"
    )
    await until(lambda: slot.restarts == 1 and slot.pid, "it ended and was replaced")


async def test_a_pod_that_came_back_is_another_one(control: Control, pod: LabPod) -> None:
    """Deleting and dropping the one that left does not touch the one that came."""
    await control.add(pod)
    first = control.workers.pods[pod.uid]
    await control.workers.delete_pod(pod.uid)
    await control.add(pod)
    second = control.workers.pods[pod.uid]
    assert first.number != second.number
    control.workers.send_all(messages.DropPod(first.number))
    control.workers.send_all(messages.DeletePod(first.number))
    assert await control.total("pods") == 2
    wait_listening(pod, 15001)


async def test_an_end_during_the_start_is_an_orderly_one(tmp_path: Path) -> None:
    control = Control(tmp_path)
    with trio.fail_after(10):
        await control.workers.drain(0.1)
        async with trio.open_nursery() as nursery:
            await nursery.start(control.workers.run)
            assert control.workers.alive == 0
            nursery.cancel_scope.cancel()
    assert control.lines(level="error") == []
