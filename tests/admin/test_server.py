"""The proxy's own pages over a Unix socket: answered, refused, and never the end of the proxy."""

from pathlib import Path

import pytest
import trio

from ztunnel.admin.server import AddressError, Answer, serve


async def hello(method: str, query: dict[str, str]) -> Answer:
    return Answer(f"{method} {query}\n".encode())


async def broken(method: str, query: dict[str, str]) -> Answer:
    raise RuntimeError("a defect in a page")


async def ask(path: Path, target: str, method: str = "GET") -> tuple[int, bytes]:
    """Status and body."""
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join([data async for data in stream])
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def test_pages_are_answered_and_a_defect_in_one_is_its_own(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    path = tmp_path / "admin.sock"
    pages = {"/hello": hello, "/broken": broken}

    async def run(*, task_status: trio.TaskStatus[str]) -> None:
        await serve(f"unix:{path}", pages, loopback_only=True, task_status=task_status)

    await nursery.start(run)
    assert path.stat().st_mode & 0o777 == 0o600
    assert await ask(path, "/hello?a=1", "POST") == (200, b"POST {'a': '1'}\n")
    assert (await ask(path, "/nothing"))[0] == 404
    assert await ask(path, "/broken") == (500, b"internal error; see the log\n")
    assert (await ask(path, "/hello"))[0] == 200


async def test_pages_on_loopback_only(nursery: trio.Nursery) -> None:
    with pytest.raises(AddressError, match="loopback addresses only"):
        await serve("0.0.0.0:0", {}, loopback_only=True, task_status=trio.TASK_STATUS_IGNORED)
