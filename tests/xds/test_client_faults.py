"""The delta ADS client when the control plane is away, dies, refuses, or is somebody else."""

import itertools
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.xds.control_plane import FakeControlPlane, Line, Pki
from tests.xds.resources import workload
from tests.xds.test_client import Mesh
from ztunnel.xds import channel, client, subscription
from ztunnel.xds.channel import ConfigError, ControlPlane
from ztunnel.xds.client import MAX_BACKOFF, XdsClient
from ztunnel.xds.subscription import SLICE


async def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds, at most 20 seconds."""
    with trio.move_on_after(20):
        while not condition():
            await trio.sleep(0.005)
        return
    raise AssertionError(f"never: {what}")


async def test_a_server_killed_in_the_middle_of_a_push(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    line = Line(control_plane.port)
    async with line.open():
        mesh = Mesh(control_plane, line.port)
        await nursery.start(mesh.client.run)
        connection = await control_plane.connection()
        await connection.request()
        await connection.push_and_ack(workload("a", "10.244.1.2"))
        line.remaining = 20_000
        connection.push(*(workload(f"b-{number}") for number in range(1000)), version="2")
        connection = await control_plane.connection()
        # Half a response is none.
        assert mesh.names == {"a"}
        assert mesh.client.synced.is_set()
        first = await connection.request()
        assert dict(first.initial_resource_versions) == {"Kubernetes//Pod/default/a": "1"}
        await connection.push_and_ack(*(workload(f"b-{number}") for number in range(1000)), version="2")
        assert len(mesh.names) == 1001


async def test_a_restarted_server_is_found_again(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    line = Line(control_plane.port)
    async with line.open():
        mesh = Mesh(control_plane, line.port)
        await nursery.start(mesh.client.run)
        connection = await control_plane.connection()
        await connection.request()
        await connection.push_and_ack(workload("a"))
    await eventually(lambda: not mesh.client.connected, "the client noticed")
    await eventually(
        lambda: "connection refused" in mesh.client.error, "the client tries and says why it can't"
    )
    assert mesh.names == {"a"}
    async with line.open():
        connection = await control_plane.connection()
        await connection.push_and_ack_after_first(workload("b"))
        assert mesh.names == {"a", "b"}
        assert mesh.client.connected
        assert not mesh.client.error


async def test_waits_grow_are_bounded_and_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    attempts: list[float] = []

    async def refuse(self: XdsClient) -> None:
        attempts.append(trio.current_time())
        raise channel.CallError("nobody there")

    monkeypatch.setattr(XdsClient, "_stream", refuse)
    plane = FakeControlPlane(Pki(tmp_path), tmp_path, port=1)
    with trio.move_on_after(60):
        await Mesh(plane).client.run()
    waits = [later - earlier for earlier, later in itertools.pairwise(attempts)]
    assert waits[0] <= client.FIRST_BACKOFF
    assert max(waits) <= MAX_BACKOFF
    assert min(waits[10:]) >= MAX_BACKOFF / 2
    assert len(set(waits[10:])) > 5


async def test_a_token_is_read_anew_for_each_connection(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    control_plane.token_file.write_text("expired")
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    await eventually(lambda: mesh.client.error, "the client was refused")
    assert "UNAUTHENTICATED" in mesh.client.error
    assert f"check the token in {control_plane.token_file}" in mesh.client.error
    assert not mesh.client.connected
    control_plane.token_file.write_text("fresh")
    control_plane.tokens.add("fresh")
    connection = await control_plane.connection()
    await connection.request()
    await connection.push_and_ack()
    assert mesh.client.connected


async def test_unusable_files_are_named_and_waited_for(
    control_plane: FakeControlPlane, nursery: trio.Nursery, tmp_path: Path
) -> None:
    root = control_plane.pki.root_file.read_bytes()
    control_plane.pki.root_file.unlink()
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    await eventually(lambda: "No such file" in mesh.client.error, "missing root reported")
    assert str(control_plane.pki.root_file) in mesh.client.error
    control_plane.pki.root_file.write_text("not PEM")
    await eventually(lambda: "no PEM certificate" in mesh.client.error, "bad root reported")
    control_plane.token_file.write_text(" \n")
    control_plane.pki.root_file.write_bytes(root)
    await eventually(lambda: "is empty" in mesh.client.error, "empty token reported")
    control_plane.token_file.unlink()
    await eventually(lambda: "No such file" in mesh.client.error, "missing token reported")
    control_plane.token_file.write_text(next(iter(control_plane.tokens)))
    await control_plane.connection()


async def test_a_server_of_another_root_is_not_talked_to(
    asyncio_loop: None, tmp_path: Path, nursery: trio.Nursery
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    plane = FakeControlPlane(Pki(theirs), theirs)
    plane.pki.root_file = Pki(ours).root_file
    async with plane.serve():
        mesh = Mesh(plane)
        await nursery.start(mesh.client.run)
        await eventually(lambda: mesh.client.error, "the client gave up")
    assert "its certificate is refused" in mesh.client.error
    assert str(plane.pki.root_file) in mesh.client.error


async def test_a_server_of_another_name_is_not_talked_to(
    asyncio_loop: None, tmp_path: Path, nursery: trio.Nursery
) -> None:
    plane = FakeControlPlane(Pki(tmp_path, names=["localhost", "10.0.0.1"]), tmp_path)
    async with plane.serve():
        mesh = Mesh(plane)
        await nursery.start(mesh.client.run)
        await eventually(lambda: mesh.client.error, "the client gave up")
        assert "127.0.0.1" in mesh.client.error
        named = XdsClient(
            client.XdsConfig(server=plane.address(host="localhost"), node=plane.config().node),
            mesh.state,
            lambda tags: None,
            lambda changes: None,
        )
        await nursery.start(named.run)
        await plane.connection()


async def test_a_dead_peer_is_noticed(
    control_plane: FakeControlPlane, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_keepalive_time", "_keepalive_timeout", "_http2_min_sent_ping_interval_without_data"):
        monkeypatch.setitem(channel._KEEPALIVE, name, 0.2)
    line = Line(control_plane.port)
    async with line.open():
        mesh = Mesh(control_plane, line.port)
        await nursery.start(mesh.client.run)
        connection = await control_plane.connection()
        await connection.request()
        await connection.push_and_ack(workload("a"))
        line.dead = True
        await eventually(lambda: not mesh.client.connected, "the silence was noticed")
        line.dead = False
        connection = await control_plane.connection()
        await connection.request()
        assert mesh.names == {"a"}


async def test_a_peer_that_never_answers_the_handshake(
    control_plane: FakeControlPlane, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CONNECT_TIMEOUT", 0.2)
    line = Line(control_plane.port)
    line.dead = True
    async with line.open():
        mesh = Mesh(control_plane, line.port)
        await nursery.start(mesh.client.run)
        await eventually(lambda: "no answer in time" in mesh.client.error, "the client gave up")


async def test_a_large_push_is_applied_in_slices(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    mesh = Mesh(control_plane)
    counts: list[int] = []
    turns_between: list[int] = []
    turns = 0

    def on_change(tags: frozenset[str]) -> None:
        nonlocal turns
        counts.append(mesh.state.workload_count)
        turns_between.append(turns)
        turns = 0

    async def other_work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    mesh.client = XdsClient(control_plane.config(), mesh.state, on_change, mesh.policies.append)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    pods = [workload(f"pod-{n}", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}") for n in range(20_000)]
    nursery.start_soon(other_work)
    await connection.push_and_ack(*pods)
    assert mesh.state.workload_count == 20_000
    # Never more than a slice at once, and the others run between slices (trio runs the tasks of one turn in any
    # order, so they may come twice between two slices and not between the next two).
    assert [later - earlier for earlier, later in itertools.pairwise([0, *counts])] == [SLICE] * 200
    assert all(sum(pair) for pair in itertools.pairwise(turns_between[1:]))


async def test_more_resources_than_a_request_can_name(
    control_plane: FakeControlPlane, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "MAX_REQUEST", 1000)
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    await connection.push_and_ack(*(workload(f"pod-{number}") for number in range(100)))
    connection.end()
    connection = await control_plane.connection()
    first = await connection.request()
    assert not first.initial_resource_versions
    assert len(mesh.names) == 100
    # The server sends its whole state, here in two responses; what it no longer has is gone after the last.
    await connection.push_and_ack(*(workload(f"pod-{number}") for number in range(40)), version="2+")
    assert len(mesh.names) == 100
    await connection.push_and_ack(*(workload(f"pod-{number}") for number in range(40, 60)), version="2")
    assert mesh.names == {f"pod-{number}" for number in range(60)}
    # And later responses are differences again.
    await connection.push_and_ack(workload("new"), version="3")
    assert len(mesh.names) == 61


async def test_a_response_that_is_no_message_ends_the_stream_only(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    await connection.push_and_ack(workload("a"))
    connection.push_bytes(b"\xff\xff\xff")
    await eventually(lambda: not mesh.client.connected, "the stream was given up")
    assert "sent what is no response" in mesh.client.error
    connection = await control_plane.connection()
    await connection.push_and_ack_after_first(workload("b"))
    assert mesh.names == {"a", "b"}


async def test_the_log_names_the_server_and_the_reason(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, unused_port: int
) -> None:
    plane = FakeControlPlane(Pki(tmp_path), tmp_path, port=unused_port)
    mesh = Mesh(plane)
    with caplog.at_level(logging.WARNING, "ztunnel.xds"):
        # No asyncio loop is open here: the client brings its own.
        await nursery.start(mesh.client.run)
        await eventually(lambda: caplog.messages, "a line was logged")
    assert f"https://127.0.0.1:{unused_port}" in caplog.messages[0]
    assert "refused" in caplog.messages[0]
    assert next(iter(plane.tokens)) not in caplog.text


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:15010",
        "127.0.0.1:15012",
        "https://host",
        "https://:15012",
        "https://h:x",
        "https://h:1/p",
    ],
)
def test_an_address_of_another_form_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="https://HOST:PORT"):
        ControlPlane(address=address, root_ca=tmp_path, token=tmp_path)


def test_the_server_must_be_verified(tmp_path: Path) -> None:
    server = ControlPlane(address="https://[::1]:15012", root_ca=Pki(tmp_path).root_file, token=tmp_path)
    assert server.host_and_port() == ("::1", 15012)
    context = server.tls()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
