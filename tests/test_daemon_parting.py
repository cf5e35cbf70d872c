"""A daemon that is told to end before anybody follows it: it serves on until somebody does, or its time is over."""

import signal
import time

import pytest
import trio

from tests.test_daemon import LIMIT, World, get, lab, talk, until, wait, world
from ztunnel.inpod.pods import WorkloadInfo

__all__ = ["lab", "world"]  # fixtures

pytestmark = pytest.mark.e2e


async def ending(world: World) -> None:
    await until(lambda: world.lines(message="ending once another proxy serves the pods"), "it has heard")


async def test_it_takes_connections_and_pods_until_another_one_listens(world: World) -> None:
    old = world.start(TERMINATION_AWAITS_SUCCESSOR="true")
    await world.ready()
    await world.join()
    kept = world.pair()
    old.send_signal(signal.SIGTERM)
    await ending(world)
    assert await get(world.directory / "ready.sock", "/healthz/ready") == (503, "ending\n")
    later = world.pair()
    talk(*later)
    late = world.lab.pod("late", service_account="client")
    with trio.fail_after(LIMIT):
        await world.agent.add(late.uid, WorkloadInfo(late.name, late.namespace, "client"), late.path)
    assert not world.lines(message="draining")
    pages = {name: f"unix:{world.directory}/new-{name}" for name in ("admin", "ready", "metrics")}
    world.start(
        ADMIN_ADDR=pages["admin"], READINESS_ADDR=pages["ready"], METRICS_ADDR=pages["metrics"],
        TERMINATION_AWAITS_SUCCESSOR="true",
    )  # fmt: skip
    await until(lambda: world.lines(message="draining"), "the old one hears that somebody else listens")
    assert world.lines(message="draining")[0]["signal"] == "SIGTERM; another proxy listens"
    for pair in (kept, later):
        talk(*pair)
        for end in pair:
            end.close()
    assert await wait(old) == 0
    new = world.pair()
    talk(*new)
    for end in new:
        end.close()


async def test_without_a_successor_it_ends_when_its_time_is_over(world: World) -> None:
    began = time.monotonic()
    daemon = world.start(TERMINATION_AWAITS_SUCCESSOR="true", TERMINATION_GRACE_PERIOD="3s")
    await world.ready()
    await world.join()
    client, server = world.pair()
    daemon.send_signal(signal.SIGTERM)
    await ending(world)
    talk(client, server)
    assert await wait(daemon) == 0
    assert time.monotonic() - began >= 3
    line = world.lines(message="draining")[0]
    assert line["signal"] == "SIGTERM; the grace period ends"
    assert line["grace_seconds"] <= 1.5
    client.close()
    server.close()


@pytest.mark.parametrize("pods", [0, 2])
async def test_it_ends_at_once_when_there_is_nothing_to_serve(world: World, pods: int) -> None:
    daemon = world.start(TERMINATION_AWAITS_SUCCESSOR="true", TERMINATION_GRACE_PERIOD="1h")
    await world.ready()
    if pods:
        await world.join()
    daemon.send_signal(signal.SIGTERM)
    assert await wait(daemon) == 0
    assert world.lines(message="draining")[0]["signal"] == (
        "SIGTERM; nothing is open" if pods else "SIGTERM; no pods"
    )


async def test_a_second_signal_ends_the_wait(world: World) -> None:
    daemon = world.start(TERMINATION_AWAITS_SUCCESSOR="true", TERMINATION_GRACE_PERIOD="1h")
    await world.ready()
    await world.join()
    client, server = world.pair()
    daemon.send_signal(signal.SIGTERM)
    await ending(world)
    talk(client, server)
    daemon.send_signal(signal.SIGTERM)
    assert await wait(daemon) == 0
    client.close()
    server.close()
