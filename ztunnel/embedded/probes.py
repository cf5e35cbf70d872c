"""Is it ready? One question each to the control plane, an agent and a ztunnel, as cheap as possible."""

from pathlib import Path

import trio

TIMEOUT = 2.0
ACCEPTS = 0x10000  # __SO_ACCEPTCON of /proc/net/unix


async def accepts(host: str, port: int) -> bool:
    """Whether somebody accepts TCP connections there. Raises OSError."""
    with trio.move_on_after(TIMEOUT):
        async with await trio.open_tcp_stream(host, port):
            return True
    return False


async def listens(path: Path) -> bool:
    """Whether a process listens on the Unix socket, without its hearing of the question. Raises OSError."""
    await trio.lowlevel.checkpoint()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[7] == str(path) and int(words[3], 16) & ACCEPTS:
            return True
    return False


async def http_ok(path: Path, page: str) -> bool:
    """Whether `page` of the HTTP server on the Unix socket answers 200. Raises OSError, trio.BrokenResourceError."""
    with trio.move_on_after(TIMEOUT):
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(
                f"GET {page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b""
            while len(answer) < 12 and (data := await stream.receive_some(4096)):
                answer += data
            return answer.startswith(b"HTTP/1.1 200")
    return False
