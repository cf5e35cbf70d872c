"""Real Envoy as the peer, on loopback: its CONNECT terminator for our client, its tunnels for our server."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.hbone.drivers import (
    ENVOY,
    LIMIT,
    Reset,
    Tunnel,
    answer_after_the_end,
    connect,
    echo,
    goodbye_first,
    program,
    relay_to_tcp,
    serve,
    short_directory,
    tcp_server,
)
from ztunnel.hbone import Config, ErrorCode

BULK = random.Random(9).randbytes(24 << 20)
TYPE = "type.googleapis.com/envoy.extensions."


def envoy(config: dict[str, Any], here: Path) -> list[str]:
    path = here / "envoy.json"
    path.write_text(json.dumps({"static_resources": config}))
    return [
        str(ENVOY),
        "-c",
        str(path),
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "--log-level",
        "warning",
    ]


def typed(name: str, **fields: Any) -> dict[str, Any]:
    return {"@type": TYPE + name, **fields}


def cluster(name: str, address: dict[str, Any], **fields: Any) -> dict[str, Any]:
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    assignment = {"cluster_name": name, "endpoints": endpoints}
    return {"name": name, "type": "STATIC", "connect_timeout": "5s", "load_assignment": assignment, **fields}


def listener(path: Path, network_filter: dict[str, Any]) -> dict[str, Any]:
    chain = {"filters": [{"name": "f", "typed_config": network_filter}]}
    return {"name": "l", "address": {"pipe": {"path": str(path)}}, "filter_chains": [chain]}


def terminator(path: Path, port: int) -> dict[str, Any]:
    """Takes CONNECT over HTTP/2 and connects to `port` on loopback."""
    upgrade = {"upgrade_type": "CONNECT"}
    action = {"cluster": "backend", "upgrade_configs": [{**upgrade, "connect_config": {}}], "timeout": "0s"}
    hosts = [
        {"name": "all", "domains": ["*"], "routes": [{"match": {"connect_matcher": {}}, "route": action}]}
    ]
    manager = typed(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="in",
        codec_type="HTTP2",
        http2_protocol_options={"allow_connect": True},
        upgrade_configs=[upgrade],
        route_config={"virtual_hosts": hosts},
        http_filters=[{"name": "router", "typed_config": typed("filters.http.router.v3.Router")}],
    )
    backend = cluster("backend", {"socket_address": {"address": "127.0.0.1", "port_value": port}})
    return {"listeners": [listener(path, manager)], "clusters": [backend]}


def tunneller(path: Path, server: Path, authority: str) -> dict[str, Any]:
    """Takes TCP and tunnels it to `authority` through the HTTP/2 server at `server`."""
    proxy = typed(
        "filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix="out",
        cluster="tunnel",
        tunneling_config={
            "hostname": authority,
            "headers_to_add": [{"header": {"key": "baggage", "value": "service.name=envoy"}}],
        },
    )
    protocol = typed(
        "upstreams.http.v3.HttpProtocolOptions",
        explicit_http_config={"http2_protocol_options": {"max_concurrent_streams": 100}},
    )
    options = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol}
    tunnel = cluster("tunnel", {"pipe": {"path": str(server)}}, typed_extension_protocol_options=options)
    return {"listeners": [listener(path, proxy)], "clusters": [tunnel]}


async def receive_exactly(stream: trio.abc.Stream | Tunnel, size: int) -> str:
    """The checksum of the next `size` bytes."""
    digest = hashlib.sha256()
    while size:
        piece = await stream.receive_some()
        assert piece, f"ended {size} bytes too early"
        digest.update(piece)
        size -= len(piece)
    assert size == 0
    return digest.hexdigest()


@pytest.mark.parametrize("window", [65_535, 1 << 20])
async def test_bulk_through_envoys_terminator(window: int, tmp_path: Path) -> None:
    with short_directory() as here:
        async with (
            tcp_server(echo) as port,
            program(envoy(terminator(here / "in", port), here), here / "in", tmp_path / "log"),
            connect(here / "in", Config(initial_window_size=window)) as driver,
        ):
            tunnel = await driver.open(
                "10.0.0.1:80", [("baggage", "service.name=web"), ("forwarded", "for=10.1.1.1")]
            )
            assert tunnel.status == 200
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tunnel.send_all, BULK)
                assert await receive_exactly(tunnel, len(BULK)) == hashlib.sha256(BULK).hexdigest()
            tunnel.send_eof()
            assert await tunnel.receive_all() == b""
            assert driver.connection.open_streams == 0
            assert driver.failure is None


async def test_many_streams_through_envoys_terminator(tmp_path: Path) -> None:
    with short_directory() as here:
        async with (
            tcp_server(echo) as port,
            program(envoy(terminator(here / "in", port), here), here / "in", tmp_path / "log"),
            connect(here / "in") as driver,
        ):

            async def one(number: int) -> None:
                tunnel = await driver.open(f"10.0.0.{number}:80")
                payload = BULK[number * 1000 :][: 300_000 + number]
                async with trio.open_nursery() as sending:
                    sending.start_soon(tunnel.send_all, payload)
                    assert await receive_exactly(tunnel, len(payload)) == hashlib.sha256(payload).hexdigest()
                tunnel.send_eof()
                assert await tunnel.receive_all() == b""

            for _ in range(2):
                async with trio.open_nursery() as nursery:
                    for number in range(40):
                        nursery.start_soon(one, number)
            assert driver.connection.open_streams == 0
            assert driver.failure is None


async def test_half_closes_through_envoys_terminator(tmp_path: Path) -> None:
    with short_directory() as here:
        async with (
            tcp_server(answer_after_the_end) as port,
            program(envoy(terminator(here / "in", port), here), here / "in", tmp_path / "log"),
            connect(here / "in") as driver,
        ):
            tunnel = await driver.open("10.0.0.1:80")
            await tunnel.send_all(BULK[:500_000])
            tunnel.send_eof()
            assert await tunnel.receive_all() == hashlib.sha256(BULK[:500_000]).hexdigest().encode()


async def test_envoys_terminator_gives_up_a_tunnel_whose_server_ends_first(tmp_path: Path) -> None:
    # Envoy 1.40 passes the end on, and then resets the stream instead of letting us finish: we see both, in order.
    with short_directory() as here:
        async with (
            tcp_server(goodbye_first([])) as port,
            program(envoy(terminator(here / "in", port), here), here / "in", tmp_path / "log"),
            connect(here / "in") as driver,
        ):
            tunnel = await driver.open("10.0.0.1:80")
            assert await tunnel.receive_all() == b"bye"
            with pytest.raises(Reset):
                await tunnel.wait_for(lambda: False)
            assert driver.connection.open_streams == 0
            assert (await driver.open("10.0.0.1:80")).status == 200


async def test_envoy_refuses_when_nobody_listens(tmp_path: Path) -> None:
    async with tcp_server(echo) as free:
        pass
    with short_directory() as here:
        async with (
            program(envoy(terminator(here / "in", free), here), here / "in", tmp_path / "log"),
            connect(here / "in") as driver,
        ):
            tunnel = await driver.open("10.0.0.1:80")
            assert tunnel.status == 503
            assert driver.failure is None


async def test_our_reset_reaches_envoys_backend(tmp_path: Path) -> None:
    gone = trio.Event()

    async def until_reset(stream: trio.SocketStream) -> None:
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        gone.set()

    with short_directory() as here:
        async with (
            tcp_server(until_reset) as port,
            program(envoy(terminator(here / "in", port), here), here / "in", tmp_path / "log"),
            connect(here / "in") as driver,
        ):
            tunnel = await driver.open("10.0.0.1:80")
            tunnel.reset(ErrorCode.CANCEL)
            with trio.fail_after(LIMIT):
                await gone.wait()


@pytest.mark.parametrize("window", [65_535, 1 << 20])
async def test_bulk_from_envoys_tunnel_to_our_server(window: int, tmp_path: Path) -> None:
    with short_directory() as here:
        async with (
            tcp_server(echo) as port,
            serve(relay_to_tcp, here / "ours", Config(initial_window_size=window)) as (_, drivers),
            program(
                envoy(tunneller(here / "out", here / "ours", f"127.0.0.1:{port}"), here),
                here / "out",
                tmp_path / "log",
            ),
        ):
            streams = [await trio.open_unix_socket(str(here / "out")) for _ in range(3)]

            async def one(stream: trio.SocketStream) -> None:
                payload = BULK[: len(BULK) // 3]
                async with trio.open_nursery() as sending:
                    sending.start_soon(stream.send_all, payload)
                    assert await receive_exactly(stream, len(payload)) == hashlib.sha256(payload).hexdigest()
                await stream.send_eof()
                assert await stream.receive_some() == b""
                await stream.aclose()

            with trio.fail_after(LIMIT):
                async with trio.open_nursery() as nursery:
                    for stream in streams:
                        nursery.start_soon(one, stream)
            assert all(driver.failure is None for driver in drivers)


async def test_half_closes_from_envoys_tunnel(tmp_path: Path) -> None:
    late: list[str] = []
    for handler in (answer_after_the_end, goodbye_first(late)):
        with short_directory() as here:
            async with (
                tcp_server(handler) as port,
                serve(relay_to_tcp, here / "ours"),
                program(
                    envoy(tunneller(here / "out", here / "ours", f"127.0.0.1:{port}"), here),
                    here / "out",
                    tmp_path / "log",
                ),
            ):
                stream = await trio.open_unix_socket(str(here / "out"))
                payload = BULK[:500_000]
                with trio.fail_after(LIMIT):
                    if handler is answer_after_the_end:
                        await stream.send_all(payload)
                        await stream.send_eof()
                        answer = b"".join([piece async for piece in stream])
                        assert answer == hashlib.sha256(payload).hexdigest().encode()
                    else:
                        assert b"".join([piece async for piece in stream]) == b"bye"
                        await stream.send_all(payload)
                        await stream.send_eof()
                        # Our own wait for Envoy to listen left an empty connection before this one.
                        while hashlib.sha256(payload).hexdigest() not in late:
                            await trio.sleep(0.01)
                await stream.aclose()


async def test_our_refusal_and_reset_end_envoys_connection(tmp_path: Path) -> None:
    async def refuse(tunnel: Tunnel) -> None:
        assert tunnel.authority == "10.0.0.1:80"
        tunnel.driver.connection.respond(tunnel.stream_id, 401, end_stream=True)
        tunnel.driver.wake_writer()

    async def abort(tunnel: Tunnel) -> None:
        tunnel.driver.connection.respond(tunnel.stream_id, 200)
        await tunnel.send_all(b"so far")
        tunnel.reset(ErrorCode.CONNECT_ERROR)

    for handler in (refuse, abort):
        with short_directory() as here:
            async with (
                serve(handler, here / "ours") as (_, drivers),
                program(
                    envoy(tunneller(here / "out", here / "ours", "10.0.0.1:80"), here),
                    here / "out",
                    tmp_path / "log",
                ),
            ):
                stream = await trio.open_unix_socket(str(here / "out"))
                received = b""
                with trio.fail_after(LIMIT):
                    try:
                        while piece := await stream.receive_some():
                            received += piece
                    except trio.BrokenResourceError:
                        pass
                assert b"so far".startswith(received)
                await stream.aclose()
                assert all(driver.failure is None for driver in drivers)


async def test_a_graceful_shutdown_moves_envoy_to_a_new_connection(tmp_path: Path) -> None:
    with short_directory() as here:
        async with (
            tcp_server(echo) as port,
            serve(relay_to_tcp, here / "ours") as (_, drivers),
            program(
                envoy(tunneller(here / "out", here / "ours", f"127.0.0.1:{port}"), here),
                here / "out",
                tmp_path / "log",
            ),
        ):
            with trio.fail_after(LIMIT):
                first = await trio.open_unix_socket(str(here / "out"))
                await first.send_all(b"one")
                assert await first.receive_some() == b"one"
                used = len(drivers)
                drivers[-1].connection.go_away(graceful=True)
                drivers[-1].wake_writer()
                while drivers[used - 1].connection._goaway_last is None:
                    await trio.sleep(0.01)
                second = await trio.open_unix_socket(str(here / "out"))
                await second.send_all(b"two")
                assert await second.receive_some() == b"two"
                assert len(drivers) == used + 1
                await first.send_all(b"still")
                assert await first.receive_some() == b"still"
                await first.aclose()
                await second.aclose()
                while not drivers[used - 1].connection.closed:
                    await trio.sleep(0.01)
            assert all(driver.failure is None for driver in drivers)
