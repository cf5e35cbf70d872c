"""Pages without an end: pieces come as they are made, and the page ends with its client."""

import socket
from pathlib import Path

import pytest
import trio

from ztunnel.admin import server as admin
from ztunnel.admin.server import Answer, Send, serve


class Page:
    """A page that sends what it is told to, and knows whether it runs."""

    def __init__(self) -> None:
        self.running = 0
        self.pieces, self._out = trio.open_memory_channel[bytes](10)

    async def handler(self, method: str, query: dict[str, str]) -> Answer:
        return Answer(content_type="text/x", stream=self.produce)

    async def produce(self, send: Send) -> None:
        self.running += 1
        try:
            async for piece in self._out:
                if piece == b"defect":
                    raise RuntimeError("a defect in a page")
                await send(piece)
        finally:
            self.running -= 1


@pytest.fixture
async def page(tmp_path: Path, nursery: trio.Nursery) -> Page:
    made = Page()

    async def run(*, task_status: trio.TaskStatus[str]) -> None:
        pages = {"/stream": made.handler}
        await serve(f"unix:{tmp_path}/admin.sock", pages, loopback_only=True, task_status=task_status)

    await nursery.start(run)
    return made


async def ask(path: Path, method: str = "GET") -> trio.SocketStream:
    stream = await trio.open_unix_socket(path / "admin.sock")
    await stream.send_all(f"{method} /stream HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return stream


async def read_until(stream: trio.SocketStream, end: bytes) -> bytes:
    got = b""
    with trio.fail_after(30):
        while end not in got:
            piece = await stream.receive_some()
            assert piece, got
            got += piece
    return got


async def ended(page: Page) -> None:
    with trio.fail_after(30):
        while page.running:
            await trio.sleep(0.01)


async def test_pieces_come_as_they_are_made(page: Page, tmp_path: Path) -> None:
    async with await ask(tmp_path) as stream:
        await page.pieces.send(b"one")
        head = await read_until(stream, b"one")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"transfer-encoding: chunked" in head.lower()
        await page.pieces.send(b"two")
        await read_until(stream, b"two")
        await page.pieces.aclose()
        assert (await read_until(stream, b"0\r\n\r\n")).endswith(b"0\r\n\r\n")
        with trio.fail_after(30):
            assert await stream.receive_some() == b""
    await ended(page)


async def test_the_page_ends_with_its_client(page: Page, tmp_path: Path) -> None:
    stream = await ask(tmp_path)
    await page.pieces.send(b"one")
    await read_until(stream, b"one")
    assert page.running == 1
    await stream.aclose()
    await ended(page)


async def test_a_client_that_does_not_read_is_let_go(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "ANSWER_TIMEOUT", 0.2)
    stream = await ask(tmp_path)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await page.pieces.send(b"x" * 8_000_000)
    await ended(page)
    await stream.aclose()


async def test_a_defect_breaks_the_stream_off_and_nothing_else(page: Page, tmp_path: Path) -> None:
    async with await ask(tmp_path) as stream:
        await page.pieces.send(b"one")
        await read_until(stream, b"one")
        await page.pieces.send(b"defect")
        with trio.fail_after(30):
            rest = b"".join([piece async for piece in stream])
        assert not rest.endswith(b"0\r\n\r\n")  # it must not look whole
    await ended(page)
    async with await ask(tmp_path, "HEAD") as stream:
        assert (await read_until(stream, b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
