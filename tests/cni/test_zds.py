"""The agent's side of ZDS, against ztunnels whose every packet is written here."""

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from cni.zds import ZdsServer
from tests.cni.conftest import LIMIT, ScriptedProxy, open_descriptors, wait_until
from ztunnel.inpod import netns
from ztunnel.inpod.pods import WorkloadInfo, ZdsError
from ztunnel.wire import zds_pb2

OWN = Path("/proc/self/ns/net")
INFO = WorkloadInfo("web", "shop", "clerk")


class Server(ZdsServer):
    """The server under test, which counts the snapshots that were answered."""

    def __init__(self, path: Path, *, patience: float = LIMIT) -> None:
        self.path = path
        self.synced = 0
        super().__init__(path, on_synced=self._count, ack_timeout=patience, hello_timeout=patience)

    def _count(self) -> None:
        self.synced += 1


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with trio.open_nursery() as nursery:
        server = Server(tmp_path / "run" / "zds")
        await nursery.start(server.run)
        yield server
        nursery.cancel_scope.cancel()
    assert not server.path.exists()


async def synced(server: Server, **known: str) -> ScriptedProxy:
    """A proxy that has taken its whole snapshot, which names nothing or, by kind, the pods in `known`."""
    proxy = await ScriptedProxy.connect(server.path)
    for uid, kind in known.items():
        assert (await proxy.take())[:2] == (kind, uid)
    count = server.synced
    assert (await proxy.take())[0] == "snapshot_sent"
    await wait_until(lambda: server.synced > count)
    return proxy


async def failure_of(server: Server, uid: str = "u1", patience: float = LIMIT) -> str:
    """The message with which adding the pod fails."""
    with pytest.raises(ZdsError) as raised:
        await server.add(uid, INFO, OWN, patience=patience)
    return str(raised.value)


async def test_a_pod_added_is_handed_over_and_the_answer_awaited(
    server: Server, nursery: trio.Nursery
) -> None:
    proxy = await synced(server)
    done = []

    async def add() -> None:
        await server.add("u1", INFO, OWN)
        done.append("added")

    nursery.start_soon(add)
    assert await proxy.request() == ("add", "u1", netns.inode(OWN))
    assert done == []
    await proxy.answer()
    await wait_until(lambda: done)
    await server.add("u1", INFO, OWN)  # known already: nothing is sent

    async def delete() -> None:
        await server.delete("u1")
        done.append("deleted")

    nursery.start_soon(delete)
    assert await proxy.request() == ("del", "u1", 0)
    assert done == ["added"]
    await proxy.answer()
    await wait_until(lambda: "deleted" in done)
    proxy.close()
    await wait_until(lambda: not server.connections)
    await server.delete("never added")


async def test_a_refusal_is_raised_and_the_next_add_asks_again(server: Server, nursery: trio.Nursery) -> None:
    proxy = await synced(server)
    nursery.start_soon(proxy.take, "address in use")
    message = await failure_of(server)
    assert "shop/web" in message
    assert "address in use" in message
    nursery.start_soon(proxy.take)
    await server.add("u1", INFO, OWN)
    nursery.start_soon(proxy.take, "busy")
    with pytest.raises(ZdsError, match="busy"):
        await server.delete("u1")
    proxy.close()


async def test_a_pod_added_before_any_proxy_is_there_waits_in_the_snapshot(server: Server) -> None:
    message = await failure_of(server, patience=0.05)
    assert "not connected" in message
    assert str(server.path) in message
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.add, "u1", INFO, OWN)
        proxy = await synced(server, u1="add")
    proxy.close()


async def test_every_proxy_gets_every_change_and_the_newest_one_counts(
    server: Server, nursery: trio.Nursery
) -> None:
    old = await synced(server)
    new = await synced(server)
    done = []

    async def add() -> None:
        await server.add("u1", INFO, OWN)
        done.append(True)

    nursery.start_soon(add)
    assert (await old.take())[:2] == ("add", "u1")
    assert (await new.request())[:2] == ("add", "u1")
    assert not done
    await new.answer()
    await wait_until(lambda: done)
    old.close()
    await wait_until(lambda: server.connections == 1)
    nursery.start_soon(new.take)
    await server.delete("u1")
    new.close()


async def test_where_the_newest_dies_the_one_before_it_counts(server: Server, nursery: trio.Nursery) -> None:
    old, new = await synced(server), await synced(server)
    nursery.start_soon(server.add, "u1", INFO, OWN)
    await old.take()
    await new.request()
    new.close()
    await wait_until(lambda: server.connections == 1)
    await server.add("u1", INFO, OWN)
    old.close()


async def test_the_same_process_keeps_what_it_has_and_is_told_what_changed(
    server: Server, nursery: trio.Nursery, tmp_path: Path
) -> None:
    proxy = await synced(server)
    for uid in ("u1", "u2", "u3"):
        nursery.start_soon(server.add, uid, INFO, OWN)
        assert (await proxy.take())[1] == uid
    proxy.close()
    await wait_until(lambda: not server.connections)
    await server.delete("u1")
    again = await ScriptedProxy.connect(server.path)
    assert await again.take() == ("keep", "u2", 0)
    assert await again.take("not known here") == ("keep", "u3", 0)
    assert await again.take() == ("add", "u3", netns.inode(OWN)), "what it cannot keep it is given"
    assert (await again.take())[0] == "snapshot_sent"
    again.close()


async def test_a_namespace_that_is_gone_is_reported_and_not_sent(
    server: Server, nursery: trio.Nursery, tmp_path: Path
) -> None:
    path = tmp_path / "ns"
    path.symlink_to("/proc/self/ns/net")
    with pytest.raises(ZdsError, match="shop/web"):
        await server.add("u0", INFO, tmp_path / "missing")
    proxy = await synced(server)
    nursery.start_soon(proxy.take)
    await server.add("u1", INFO, path)
    proxy.close()
    await wait_until(lambda: not server.connections)
    path.unlink()
    path.symlink_to("/proc/self/ns/mnt")
    # The process still has the one it was given; only another process needs the namespace again.
    again = await synced(server, u1="keep")
    nursery.start_soon(server.add, "u1", INFO, path)
    assert (await again.take())[:2] == ("add", "u1"), (
        "the pod's namespace was replaced: it is handed over again"
    )
    path.unlink()
    again.close()
    await wait_until(lambda: not server.connections)


@pytest.mark.parametrize(
    ("hello", "complaint"),
    [
        (b"\xff\xff", "malformed"),
        (b"x" * 20000, "more than"),
        (zds_pb2.ZdsHello(version=zds_pb2.NOT_USED).SerializeToString() or b"\x08\x00", "version 0"),
        (b"\x08\x07", "version 7"),
    ],
    ids=["garbage", "too long", "no version", "later version"],
)
async def test_a_stranger_is_sent_away_and_the_others_work_on(
    server: Server, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, hello: bytes, complaint: str
) -> None:
    proxy = await synced(server)
    stranger = await ScriptedProxy.connect(server.path, hello=hello)
    await stranger.closed()
    assert complaint in caplog.text
    nursery.start_soon(proxy.take)
    await server.add("u1", INFO, OWN)
    proxy.close()


@pytest.mark.parametrize(
    "packet", [b"\xff\xff", b"x" * 20000, b"\x0a\x00"], ids=["garbage", "long", "unasked"]
)
async def test_a_packet_that_is_no_answer_ends_that_connection_only(
    server: Server, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, packet: bytes
) -> None:
    proxy, broken = await synced(server), await synced(server)
    await broken.connection.send(packet)
    await broken.closed()
    await wait_until(lambda: server.connections == 1)
    assert "connection closed" in caplog.text
    nursery.start_soon(proxy.take)
    await server.add("u1", INFO, OWN)
    proxy.close()


async def test_a_proxy_that_does_not_answer_is_cut_off(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path / "zds", patience=0.1)
    async with trio.open_nursery() as running:
        await running.start(server.run)
        silent = await ScriptedProxy.connect(server.path, hello=b"")
        await silent.closed()
        assert "said nothing" in caplog.text
        proxy = await synced(server)
        nursery.start_soon(server.add, "u1", INFO, OWN)
        await proxy.request()
        await proxy.closed()
        assert "no answer to add" in caplog.text
        await synced(server, u1="add")
        running.cancel_scope.cancel()


async def test_no_descriptor_is_left_open(server: Server, nursery: trio.Nursery) -> None:
    proxy = await synced(server)
    before = open_descriptors()
    for number in range(20):
        nursery.start_soon(proxy.take, "no" if number % 2 else "")
        with pytest.raises(ZdsError) if number % 2 else trio.CancelScope():
            await server.add(f"u{number}", INFO, OWN)
    assert open_descriptors() == before
    proxy.close()
    await wait_until(lambda: not server.connections)
    assert open_descriptors() == before - 2, "both ends of the connection"


async def test_the_socket_of_a_dead_agent_is_taken_over(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "zds"
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(str(path))
    dead.listen()
    dead.close()
    server = Server(path)
    async with trio.open_nursery() as running:
        await running.start(server.run)
        assert path.stat().st_mode & 0o777 == 0o600
        (await synced(server)).close()
        with pytest.raises(ZdsError, match="another node agent listens"):
            await Server(path).run()
        (await synced(server)).close()
        running.cancel_scope.cancel()


async def test_a_path_that_cannot_be_listened_on_is_named(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("mine")
    with pytest.raises(ZdsError, match="is no socket"):
        await Server(plain).run()
    assert plain.read_text() == "mine"
    with pytest.raises(ZdsError, match="longer than 107 bytes"):
        await Server(tmp_path / ("x" * 120)).run()
    with pytest.raises(ZdsError, match="listen on"):
        await Server(plain / "below").run()
