"""Requests that are odd, hostile or slow: each is its client's own matter."""

import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from ztunnel.admin import server as admin
from ztunnel.admin.server import AddressError, Answer, serve

BIG = b"x" * 8_000_000


async def hello(method: str, query: dict[str, str]) -> Answer:
    return Answer(f"{method} {query}\n".encode())


async def big(method: str, query: dict[str, str]) -> Answer:
    return Answer(BIG)


PAGES = {"/hello": hello, "/big": big}


@pytest.fixture
async def address(nursery: trio.Nursery) -> tuple[str, int]:
    """Where the pages are served, on loopback."""

    async def run(*, task_status: trio.TaskStatus[str]) -> None:
        await serve("127.0.0.1:0", PAGES, loopback_only=True, task_status=task_status)

    told = await nursery.start(run)
    host, _, port = told.rpartition(":")
    return host, int(port)


async def exchange(address: tuple[str, int], data: bytes) -> bytes:
    """Send these bytes and our end, and read to the end."""
    with trio.fail_after(10):
        async with await trio.open_tcp_stream(*address) as stream:
            try:
                await stream.send_all(data)
                await stream.send_eof()
                return b"".join([piece async for piece in stream])
            except trio.BrokenResourceError:
                return b"reset"


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET /hello\r\n\r\n",
        b"GET /hello HTTP/1.1\r\n\r\n",  # no Host
        b"GET //[ HTTP/1.1\r\nHost: x\r\n\r\n",  # an address in brackets that is never closed
        b"GET http://[::1/hello HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nHost: x\r\n" + b"a: " + b"b" * 100_000 + b"\r\n\r\n",
        b"POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: nonsense\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"",
        b"GET /hel",
    ],
)
async def test_garbage_is_refused_and_the_next_one_served(address: tuple[str, int], data: bytes) -> None:
    answer = await exchange(address, data)
    assert answer in (b"", b"reset") or answer.split(b" ")[1].startswith(b"4"), answer[:100]
    good = await exchange(address, b"GET /hello?a=b HTTP/1.1\r\nHost: x\r\n\r\n")
    assert good.startswith(b"HTTP/1.1 200")
    assert good.endswith(b"GET {'a': 'b'}\n")


async def test_several_requests_on_one_connection(address: tuple[str, int]) -> None:
    request = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
    body = b"POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n12345"
    head = b"HEAD /big HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await exchange(address, request + body + head + request)
    assert answer.count(b"HTTP/1.1 200") == 4
    assert len(answer) < 2000


async def test_a_large_page_arrives_whole(address: tuple[str, int]) -> None:
    answer = await exchange(address, b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.endswith(BIG)


async def test_who_does_not_read_is_let_go(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "ANSWER_TIMEOUT", 0.1)
    with trio.fail_after(10):
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
            total = 0
            await trio.testing.wait_all_tasks_blocked(0.3)
            try:
                async for piece in stream:
                    total += len(piece)
            except trio.BrokenResourceError:
                pass
            assert total < len(BIG)


async def test_who_says_nothing_is_let_go(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "IDLE_TIMEOUT", 0.1)
    with trio.fail_after(10):
        async with await trio.open_tcp_stream(*address) as stream:
            assert await stream.receive_some() == b""


async def test_connections_are_limited(address: tuple[str, int]) -> None:
    """Readiness is open to the whole network: whoever comes in masses must not take the daemon's descriptors."""
    streams = [await trio.open_tcp_stream(*address) for _ in range(admin.MOST_CONNECTIONS)]
    with trio.fail_after(10):
        for stream in streams:
            await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await stream.receive_some()
        assert await exchange(address, b"") in (b"", b"reset")
        for stream in streams:
            await stream.aclose()
        while not (await exchange(address, b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(
            b"HTTP/1.1 200"
        ):
            await trio.sleep(0.01)


async def refused(address: str) -> str:
    with pytest.raises(AddressError) as caught:
        await serve(address, PAGES, loopback_only=True, task_status=trio.TASK_STATUS_IGNORED)
    return str(caught.value)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
async def test_the_admin_pages_do_not_leave_the_machine(address: str) -> None:
    assert "loopback" in await refused(address)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "localhost:1", "127.0.0.1:many", "127.0.0.1:99999"])
async def test_what_is_no_address_is_named(address: str) -> None:
    assert repr(address) in await refused(address) or address in await refused(address)


async def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in await refused(address)


async def test_socket_files(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "admin.sock"
    address = f"unix:{path}"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))

    async def run(*, task_status: trio.TaskStatus[str]) -> None:
        await serve(address, PAGES, loopback_only=True, task_status=task_status)

    await nursery.start(run)  # nobody listened on it any more
    assert "another process listens" in await refused(address)
    (tmp_path / "file").write_text("precious")
    assert "no socket" in await refused(f"unix:{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "precious"
    assert "No such file" in await refused(f"unix:{tmp_path}/nowhere/admin.sock")
    assert "Not a directory" in await refused(f"unix:{tmp_path}/file/admin.sock")
    # Somebody put another one in its place: that one is not ours to remove.
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
        assert path.exists()
