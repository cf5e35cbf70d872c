"""nghttp2's real programs as peers, on loopback: nghttpx as the proxy on either side, h2load, nghttp and nghttpd."""

import hashlib
import random
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.hbone.drivers import (
    LIMIT,
    Reset,
    connect,
    echo,
    goodbye_first,
    program,
    relay_to_tcp,
    serve,
    short_directory,
    tcp_server,
)
from ztunnel.hbone import ErrorCode, PingAcknowledged

BULK = random.Random(7).randbytes(24 << 20)


def find(name: str, package: str) -> str:
    path = shutil.which(name, path="/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin")
    assert path, f"{name} is not installed: apt-get install {package}"
    return path


def nghttpx(frontend: Path, backend: str) -> list[str]:
    """nghttpx as a forward proxy: CONNECT in (HTTP/2 or HTTP/1.1), CONNECT out over HTTP/2."""
    return [
        find("nghttpx", "nghttp2-proxy"),
        "--conf=/dev/null",
        "--http2-proxy",
        "--single-process",
        "--backend-connections-per-host=100",  # streams of one origin that may be open; 8 otherwise
        "--log-level=WARN",
        "--accesslog-file=/dev/null",
        f"--frontend=unix:{frontend};no-tls",
        f"--backend={backend};;proto=h2",
    ]


async def talk_through(address: Path, port: int) -> None:
    """Our client, through whatever is at `address`, to a TCP echo server on `port`."""
    async with connect(address) as driver:
        tunnel = await driver.open(f"127.0.0.1:{port}", [("baggage", "service.name=web")])
        assert tunnel.status == 200
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tunnel.send_all, BULK)
            received = hashlib.sha256()
            size = 0
            while size < len(BULK):
                piece = await tunnel.receive_some()
                assert piece
                received.update(piece)
                size += len(piece)
        assert received.digest() == hashlib.sha256(BULK).digest()
        small = [await driver.open(f"127.0.0.1:{port}") for _ in range(10)]
        for number, other in enumerate(small):
            await other.send_all(b"%d" % number)
        for number, other in enumerate(small):
            assert await other.receive_some() == b"%d" % number
        assert driver.failure is None


async def test_our_client_and_our_server_with_nghttpx_between(tmp_path: Path) -> None:
    with short_directory() as here:
        async with (
            tcp_server(echo) as port,
            serve(relay_to_tcp, here / "ours") as (_, drivers),
            program(nghttpx(here / "x", f"unix:{here}/ours"), here / "x", tmp_path / "log"),
        ):
            await talk_through(here / "x", port)
        assert drivers
        assert all(driver.failure is None for driver in drivers)


async def test_the_end_and_a_refusal_through_nghttpx(tmp_path: Path) -> None:
    # nghttpx 1.52 passes on a server's END_STREAM; a client's half-close of a CONNECT it keeps to itself.
    late: list[str] = []
    with short_directory() as here:
        async with (
            tcp_server(goodbye_first(late)) as port,
            serve(relay_to_tcp, here / "ours"),
            program(nghttpx(here / "x", f"unix:{here}/ours"), here / "x", tmp_path / "log"),
            connect(here / "x") as driver,
        ):
            tunnel = await driver.open(f"127.0.0.1:{port}")
            assert await tunnel.receive_all() == b"bye"
            refused = await driver.open("127.0.0.1:1")
            assert refused.status == 503


async def test_a_reset_crosses_nghttpx(tmp_path: Path) -> None:
    seen: list[int | None] = []

    async def note_reset(tunnel) -> None:  # type: ignore[no-untyped-def]
        tunnel.driver.connection.respond(tunnel.stream_id, 200)
        tunnel.driver.wake_writer()
        with pytest.raises(Reset):
            await tunnel.receive_all()
        seen.append(tunnel.code)
        finished.set()

    finished = trio.Event()
    with short_directory() as here:
        async with (
            serve(note_reset, here / "ours"),
            program(nghttpx(here / "x", f"unix:{here}/ours"), here / "x", tmp_path / "log"),
            connect(here / "x") as driver,
        ):
            tunnel = await driver.open("127.0.0.1:9")
            tunnel.reset(ErrorCode.CANCEL)
            with trio.fail_after(LIMIT):
                await finished.wait()
    assert len(seen) == 1


async def test_an_http1_client_reaches_our_server_through_nghttpx(tmp_path: Path) -> None:
    with short_directory() as here:
        async with (
            tcp_server(echo) as port,
            serve(relay_to_tcp, here / "ours"),
            program(nghttpx(here / "x", f"unix:{here}/ours"), here / "x", tmp_path / "log"),
        ):
            stream = await trio.open_unix_socket(str(here / "x"))
            with trio.fail_after(LIMIT):
                await stream.send_all(
                    f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
                )
                answer = b""
                while b"\r\n\r\n" not in answer:
                    answer += await stream.receive_some()
                assert answer.startswith(b"HTTP/1.1 200")
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
            await stream.aclose()


async def test_h2load_gets_its_refusals() -> None:
    async with serve(relay_to_tcp) as (port, drivers):
        result = await trio.run_process(
            [find("h2load", "nghttp2-client"), "-n2000", "-c4", "-m50", f"http://127.0.0.1:{port}/"],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
    report = result.stdout.decode()
    assert re.search(r"2000 done, .* 2000 failed", report), report  # h2load counts a 4xx as a failure
    assert "2000 4xx" in report
    assert "0 errored, 0 timeout" in report
    assert all(driver.failure is None for driver in drivers)


async def test_nghttp_understands_our_greeting_and_refusal(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(bytes(200_000))
    async with serve(relay_to_tcp) as (port, _):
        result = await trio.run_process(
            [find("nghttp", "nghttp2-client"), "-v", "-n", f"--data={body}", f"http://127.0.0.1:{port}/"],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
    said = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout.decode())
    assert "recv SETTINGS frame" in said, said
    assert "[SETTINGS_INITIAL_WINDOW_SIZE(0x04):1048576]" in said
    assert "recv (stream_id=13) :status: 405" in said
    assert "recv (stream_id=13) allow: CONNECT" in said
    assert "error_code=NO_ERROR(0x00)" in said


def listening_port(pid: int) -> int | None:
    """The TCP port on which a process listens, from the kernel (proc(5)); None as long as there is none."""
    inodes = {fd.readlink().name for fd in Path(f"/proc/{pid}/fd").iterdir()}
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
            return int(words[1].split(":")[1], 16)
    return None


async def test_nghttpd_answers_our_client() -> None:
    # nghttpd serves files: what it says to a CONNECT is its own affair, that we understand it is ours.
    with short_directory() as here:
        async with trio.open_nursery() as nursery:
            argv = [find("nghttpd", "nghttp2-server"), "--no-tls", "--address=127.0.0.1", f"-d{here}", "0"]
            process: trio.Process = await nursery.start(partial(trio.run_process, argv, check=False))
            with trio.fail_after(LIMIT):
                while (port := listening_port(process.pid)) is None:
                    await trio.sleep(0.02)
            async with connect(port) as driver:
                tunnel = await driver.open("127.0.0.1:1", end=True)
                assert tunnel.status >= 400
                driver.connection.ping(b"are you?")
                driver.wake_writer()
                with trio.fail_after(LIMIT):
                    while PingAcknowledged(b"are you?") not in driver.other_events:
                        await trio.sleep(0.01)
                assert driver.failure is None
                assert driver.connection.settings_acknowledged
            nursery.cancel_scope.cancel()
