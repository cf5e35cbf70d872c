"""The soak's server, a program in a pod: `python -m perf.soaking.serving`. Only the standard library.

On TALK_PORT a connection's first line says what the client wants:

| line | then |
|---|---|
| `put` | the client sends until it half-closes; answered with the length and CRC-32 of what came |
| `get SIZE` | SIZE bytes, then the end |
| `echo` | everything comes back, until the client half-closes |

On BANNER_PORT the server speaks first: a line, and what comes then is echoed.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

from perf.soaking.payload import BANNER, BANNER_PORT, CHUNK, TALK_PORT, Sum, chunks


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection on TALK_PORT."""
    async with closing(writer):
        match (await reader.readline()).split():
            case [b"put"]:
                total = Sum()
                while data := await reader.read(CHUNK):
                    total.add(data)
                writer.write(f"{total}\n".encode())
            case [b"get", size]:
                for chunk in chunks(int(size)):
                    writer.write(chunk)
                    await writer.drain()
            case [b"echo"]:
                await echo(reader, writer)


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection on BANNER_PORT."""
    async with closing(writer):
        writer.write(BANNER)
        await echo(reader, writer)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, until the client's end."""
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()


@contextlib.asynccontextmanager
async def closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close the connection after the block; a client that is gone is its own matter, it counts what fails."""
    try:
        with contextlib.suppress(ConnectionError):
            yield
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def main() -> None:
    """Serve until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    for handler, port in ((talk, TALK_PORT), (greet, BANNER_PORT)):
        await asyncio.start_server(handler, None, port, backlog=512)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(main())
