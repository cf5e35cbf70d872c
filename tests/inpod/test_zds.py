"""The proxy's side of ZDS, against an agent whose every packet is written here."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.inpod.conftest import (
    RecordingPods,
    ScriptedAgent,
    add_request,
    delete_request,
    keep_request,
    open_descriptors,
    snapshot_sent,
    wait_until,
)
from ztunnel.inpod import netns, zds
from ztunnel.inpod.pods import WorkloadInfo
from ztunnel.wire import zds_pb2

OWN = "/proc/self/ns/net"


@pytest.fixture
async def agent(pods: RecordingPods, tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[ScriptedAgent]:
    """An agent to which the proxy under test has said hello."""

    async def run() -> None:
        await zds.run(str(tmp_path / "zds"), pods, on_state=pods.states.append)

    agent = ScriptedAgent(tmp_path / "zds")
    nursery.start_soon(run)
    await agent.accept()
    yield agent
    agent.close()


class TestConnected:
    async def test_a_pod_is_served_with_its_own_namespace(
        self, agent: ScriptedAgent, pods: RecordingPods
    ) -> None:
        with open(OWN) as namespace:
            assert await agent.ask(add_request("u1"), namespace.fileno()) == ""
        assert pods.pods == {"u1": (WorkloadInfo("web", "shop", "clerk"), netns.inode(OWN))}
        assert pods.states == []
        assert await agent.ask(snapshot_sent()) == ""
        assert pods.states == [True]
        assert await agent.ask(delete_request("u1")) == ""
        assert pods.pods == {}

    async def test_pods_not_named_in_the_snapshot_are_dropped(
        self, agent: ScriptedAgent, pods: RecordingPods
    ) -> None:
        nobody = WorkloadInfo("", "", "")
        pods.pods = dict.fromkeys(("kept", "added", "refused", "gone", "deleted"), (nobody, 0))
        pods.refuse["refused"] = "listen on 15001: address in use"
        with open(OWN) as namespace:
            assert await agent.ask(keep_request("kept")) == ""
            assert await agent.ask(add_request("added"), namespace.fileno()) == ""
            assert (
                await agent.ask(add_request("refused"), namespace.fileno())
                == "listen on 15001: address in use"
            )
            assert await agent.ask(add_request("deleted"), namespace.fileno()) == ""
        assert await agent.ask(delete_request("deleted")) == ""
        assert await agent.ask(snapshot_sent()) == ""
        assert pods.known() == {"kept", "added", "refused"}

    async def test_what_the_proxy_cannot_do_is_answered_with_the_reason(
        self, agent: ScriptedAgent, pods: RecordingPods
    ) -> None:
        pods.refuse["u1"] = "no more files"
        with open(OWN) as namespace:
            assert await agent.ask(add_request("u1"), namespace.fileno()) == "no more files"
            assert await agent.ask(delete_request("u1")) == "no more files"
            assert "uid" in await agent.ask(add_request(""), namespace.fileno())
        assert "descriptor" in await agent.ask(add_request("u2"))
        assert "not known" in await agent.ask(keep_request("u3"))
        assert await agent.ask(delete_request("never added")) == ""

    async def test_descriptors_nobody_takes_are_closed(
        self, agent: ScriptedAgent, pods: RecordingPods
    ) -> None:
        with open(OWN) as namespace:
            fd = namespace.fileno()
            assert await agent.ask(add_request("u1"), fd) == ""
            before = open_descriptors()
            for _ in range(20):
                assert await agent.ask(add_request("u1"), fd, fd, fd) == ""
                assert await agent.ask(delete_request("u1"), fd) == ""
                assert await agent.ask(add_request(""), fd, fd) != ""
                assert await agent.ask(keep_request("u1"), fd) != ""
                assert await agent.ask(snapshot_sent(), fd) == ""
            assert open_descriptors() == before
            pods.refuse["u1"] = "no"
            assert await agent.ask(add_request("u1"), fd) == "no"
            assert open_descriptors() == before

    @pytest.mark.parametrize(
        ("packet", "descriptors"),
        [
            (b"\xff\xff\xff\xff", 1),
            (b"", 1),
            (zds_pb2.WorkloadRequest(keep=zds_pb2.KeepWorkload(uid="x" * 20000)).SerializeToString(), 1),
            (add_request("u1").SerializeToString(), 40),
            (b"\x78\x01", 1),
        ],
        ids=["garbage", "empty", "too long", "too many descriptors", "unknown request"],
    )
    async def test_a_packet_that_is_none_ends_the_connection_and_a_new_one_is_made(
        self, agent: ScriptedAgent, pods: RecordingPods, packet: bytes, descriptors: int
    ) -> None:
        with open(OWN) as namespace:
            assert await agent.ask(add_request("u1"), namespace.fileno()) == ""
            assert await agent.ask(snapshot_sent()) == ""
            before = open_descriptors()
            await agent.send(packet, *[namespace.fileno()] * descriptors)
            await agent.closed()
            await agent.accept()
            assert open_descriptors() == before
        assert pods.known() == {"u1"}
        assert await agent.ask(keep_request("u1")) == ""
        assert await agent.ask(snapshot_sent()) == ""
        assert pods.states == [True, False, True]
        assert pods.calls == ["add u1"]

    async def test_pods_are_served_on_while_the_agent_is_away(
        self, agent: ScriptedAgent, pods: RecordingPods, tmp_path: Path
    ) -> None:
        with open(OWN) as namespace:
            assert await agent.ask(add_request("u1"), namespace.fileno()) == ""
        assert await agent.ask(snapshot_sent()) == ""
        agent.close()
        await wait_until(lambda: pods.states == [True, False])
        (tmp_path / "zds").unlink()
        assert pods.known() == {"u1"}
        successor = ScriptedAgent(tmp_path / "zds")
        try:
            await successor.accept()
            assert await successor.ask(snapshot_sent()) == ""
        finally:
            successor.close()
        assert pods.known() == set()
        await wait_until(lambda: pods.states == [True, False, True, False])


async def test_the_proxy_waits_for_an_agent_that_is_not_there_yet(
    pods: RecordingPods, tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        await zds.run(str(tmp_path / "zds"), pods, on_state=pods.states.append)

    nursery.start_soon(run)
    await wait_until(lambda: "No such file" in caplog.text)
    agent = ScriptedAgent(tmp_path / "zds")
    try:
        await agent.accept()
        assert await agent.ask(snapshot_sent()) == ""
        assert pods.states == [True]
        assert caplog.text.count("No such file") == 1, "one failure is logged once, not at every attempt"
    finally:
        agent.close()
