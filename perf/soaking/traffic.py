"""The soak's clients, a program in a pod: `python -m perf.soaking.traffic JOBS`, JOBS being a JSON list of Job.

Every operation that is begun is counted as done or as failed, exactly once. What happened is told on standard output
in JSON lines: {"failure": ...} at once, {"tally": ...} every second, and a last one with "end": true. It ends, after
the operations that are under way, with SIGTERM, at the end of standard input where `--stdin` is given, or after
`--seconds N`. Only the standard library.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from perf.soaking.payload import (
    BANNER,
    BANNER_PORT,
    CHUNK,
    CLOSED_PORT,
    HTTP_PORT,
    TALK_PORT,
    Sum,
    body,
    chunks,
    expected,
)

TIMEOUT = 10.0  # seconds an operation may take
SIZES = (12, 8 * 1024, 64 * 1024)  # bytes of the files that are asked for
RENEW = 300  # requests on one connection before another is made
MESSAGE = 1000  # bytes that are echoed
AFTER_FAILURE = 0.1  # seconds


class Job(NamedTuple):
    """What one group of clients does: `rate` operations a second, by `lanes` clients, in turn to each of `hosts`.

    `size` is the bytes of a transfer, `port` that of the HTTP server.
    """

    name: str
    kind: str
    hosts: Sequence[str]
    rate: float
    lanes: int = 1
    size: int = 0
    port: int = HTTP_PORT


class WrongAnswerError(Exception):
    """What came is not what was asked for."""


class Tally:
    """What became of a job's operations; `slowest` in seconds."""

    def __init__(self) -> None:
        self.begun = self.done = self.failed = self.bytes = 0
        self.slowest = 0.0


class Connection:
    """A TCP connection, and what is being waited for on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def close(self) -> None:
        """End it, and wait for the end of what was to be sent."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        """End it with a reset."""
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        self.writer.write_eof()


class Client:
    """One lane of a job; `stage` says what it waits for. `once` does one operation and returns its bytes."""

    def __init__(self, job: Job, host: str) -> None:
        self.job = job
        self.host = host
        self.stage = ""
        self.connection: Connection | None = None

    async def once(self) -> int:
        """One operation. Raises WrongAnswerError, EOFError, OSError."""
        raise NotImplementedError

    async def open(self, port: int) -> Connection:
        """Make a connection, which `drop` ends."""
        self.stage = "connecting"
        self.connection = Connection(*await asyncio.open_connection(self.host, port, limit=4 * CHUNK))
        return self.connection

    def drop(self) -> None:
        """After a failure: let go of the connection."""
        if self.connection is not None:
            self.connection.writer.transport.abort()
            self.connection = None

    async def leave(self) -> None:
        """End the connection in order."""
        if self.connection is not None:
            connection, self.connection = self.connection, None
            await connection.close()

    async def request(self, connection: Connection, size: int, last: bool) -> int:
        """One HTTP request for a file of so many bytes, and its answer."""
        self.stage = "sending a request"
        ending = "Connection: close\r\n" if last else ""
        connection.writer.write(f"GET /{size} HTTP/1.1\r\nHost: soak\r\n{ending}\r\n".encode())
        await connection.writer.drain()
        self.stage = "waiting for an answer"
        head = await connection.reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise WrongAnswerError(f"answered {head.partition(bytes([13]))[0].decode(errors='replace')!r}")
        self.stage = "reading an answer's body"
        check(await connection.reader.readexactly(size), size)
        return len(head) + size

    async def echo(self, connection: Connection, size: int) -> None:
        """Send something, and have it back."""
        data = os.urandom(size)
        self.stage = "sending"
        connection.writer.write(data)
        await connection.writer.drain()
        self.stage = "waiting for an echo"
        if await connection.reader.readexactly(size) != data:
            raise WrongAnswerError(f"the echo of {size} bytes differs")

    async def to_the_end(self, connection: Connection) -> bytes:
        """What comes before the peer's end: nothing, if all is well."""
        self.stage = "waiting for the end"
        rest = await connection.reader.read(CHUNK)
        if rest:
            raise WrongAnswerError(f"{len(rest)} bytes too many: {rest[:40]!r}")
        return rest


class Requests(Client):
    """HTTP requests one after another, of mixed sizes, on a connection that is made anew now and then."""

    def __init__(self, job: Job, host: str) -> None:
        super().__init__(job, host)
        self.sizes = itertools.cycle(SIZES)
        self.left = 0

    async def once(self) -> int:
        if not self.left:
            await self.leave()
            self.left = random.randrange(RENEW // 2, RENEW)  # noqa: S311
        connection = self.connection or await self.open(self.job.port)
        self.left -= 1
        return await self.request(connection, next(self.sizes), last=False)

    def drop(self) -> None:
        super().drop()
        self.left = 0


class Held(Client):
    """A connection that stays open from the first to the last moment, with a little echo now and then."""

    async def once(self) -> int:
        connection = self.connection
        if connection is None:
            connection = await self.open(TALK_PORT)
            connection.writer.write(b"echo\n")
        await self.echo(connection, MESSAGE)
        return 2 * MESSAGE


class Upload(Client):
    """A transfer to the server, which says what came."""

    async def once(self) -> int:
        connection = await self.open(TALK_PORT)
        self.stage = "uploading"
        connection.writer.write(b"put\n")
        for chunk in chunks(self.job.size):
            connection.writer.write(chunk)
            await connection.writer.drain()
        connection.finish()
        self.stage = "waiting for the sum"
        told = (await connection.reader.readline()).decode().strip()
        if told != (wanted := _expected(self.job.size)):
            raise WrongAnswerError(f"the server received {told!r}, sent was {wanted!r}")
        await self.leave()
        return self.job.size


class Download(Client):
    """A transfer from the server."""

    async def once(self) -> int:
        connection = await self.open(TALK_PORT)
        self.stage = "downloading"
        connection.writer.write(f"get {self.job.size}\n".encode())
        total = Sum()
        while data := await connection.reader.read(4 * CHUNK):
            total.add(data)
            self.stage = f"downloading, after {total.size} bytes"
        if str(total) != (wanted := _expected(self.job.size)):
            raise WrongAnswerError(f"received {total}, sent was {wanted}")
        await self.leave()
        return self.job.size


class Short(Client):
    """A new connection for each operation, ended in each of the ways in which connections end."""

    def __init__(self, job: Job, host: str) -> None:
        super().__init__(job, host)
        ways = (self._server_ends, self._client_ends, self._half_close, self._banner, self._abort)
        self.ways = itertools.cycle(ways)

    async def once(self) -> int:
        size = await next(self.ways)()
        await self.leave()
        return size

    async def _server_ends(self) -> int:
        connection = await self.open(self.job.port)
        size = await self.request(connection, SIZES[0], last=True)
        await self.to_the_end(connection)
        return size

    async def _client_ends(self) -> int:
        connection = await self.open(TALK_PORT)
        connection.writer.write(b"echo\n")
        await self.echo(connection, MESSAGE)
        return 2 * MESSAGE

    async def _half_close(self) -> int:
        connection = await self.open(TALK_PORT)
        connection.writer.write(b"echo\n")
        await self.echo(connection, 20 * MESSAGE)
        connection.finish()
        await self.to_the_end(connection)
        return 40 * MESSAGE

    async def _banner(self) -> int:
        connection = await self.open(BANNER_PORT)
        self.stage = "waiting for the server's first words"
        if (said := await connection.reader.readexactly(len(BANNER))) != BANNER:
            raise WrongAnswerError(f"the server said {said!r}")
        connection.finish()
        await self.to_the_end(connection)
        return len(BANNER)

    async def _abort(self) -> int:
        """A client that asks for much and leaves in the middle of it: no failure, but a lot to clean up."""
        connection = await self.open(TALK_PORT)
        connection.writer.write(f"get {64 * CHUNK}\n".encode())
        self.stage = "downloading before it leaves"
        size = len(await connection.reader.readexactly(CHUNK))
        connection.reset()
        self.connection = None
        return size


class ByService(Short):
    """New HTTP connections only: for Services, and for servers that speak nothing else."""

    def __init__(self, job: Job, host: str) -> None:
        super().__init__(job, host)
        self.ways = itertools.cycle((self._server_ends,))


class Refused(Client):
    """Connections to a port that nobody listens on: each must end soon, and without a byte."""

    async def once(self) -> int:
        with contextlib.suppress(ConnectionError):
            await self.to_the_end(await self.open(CLOSED_PORT))
        self.drop()
        return 0


KINDS: dict[str, type[Client]] = {
    "requests": Requests,
    "held": Held,
    "upload": Upload,
    "download": Download,
    "short": Short,
    "service": ByService,
    "refused": Refused,
}


@cache
def _expected(size: int) -> str:
    return expected(size)


def check(data: bytes, size: int) -> None:
    """Raises WrongAnswerError if `data` is not the transfer of this size."""
    if data != _body(size):
        raise WrongAnswerError(f"{len(data)} bytes came, and they are not those of /{size}")


@cache
def _body(size: int) -> bytes:
    return body(size)


def told(error: BaseException, client: Client) -> str:
    """One line for a failure."""
    if isinstance(error, TimeoutError) and error.errno is None:
        return f"{client.stage}: nothing for {TIMEOUT:g} s"
    if isinstance(error, asyncio.IncompleteReadError):
        return f"{client.stage}: the connection ended after {len(error.partial)} bytes"
    return f"{client.stage}: {error or type(error).__name__}"


class Load:
    """All jobs of one program."""

    def __init__(self, jobs: Sequence[Job], say: Callable[[dict[str, Any]], None]) -> None:
        self.jobs = jobs
        self.tallies = {job.name: Tally() for job in jobs}
        self.say = say
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        """Until `stopping`, and the end of what is under way then."""
        telling = asyncio.create_task(self._tell())
        async with asyncio.TaskGroup() as lanes:
            for job in self.jobs:
                for number in range(job.lanes):
                    client = KINDS[job.kind](job, job.hosts[number % len(job.hosts)])
                    lanes.create_task(self._lane(job, client))
        telling.cancel()
        self.say(self._report() | {"end": True})

    async def _lane(self, job: Job, client: Client) -> None:
        interval = job.lanes / job.rate
        await self._rest(random.random() * min(interval, 1.0))  # noqa: S311
        while not self.stopping.is_set():
            began = time.monotonic()
            if not await self._once(job, client):
                await asyncio.sleep(AFTER_FAILURE)
            await self._rest(began + interval - time.monotonic())
        with contextlib.suppress(OSError):
            async with asyncio.timeout(TIMEOUT):
                await client.leave()

    async def _once(self, job: Job, client: Client) -> bool:
        """One operation, counted; whether it succeeded."""
        tally = self.tallies[job.name]
        tally.begun += 1
        began = time.monotonic()
        try:
            async with asyncio.timeout(TIMEOUT):
                tally.bytes += await client.once()
        except (WrongAnswerError, EOFError, OSError) as error:
            tally.failed += 1
            failure = {
                "time": time.time(),
                "job": job.name,
                "host": client.host,
                "took": round(time.monotonic() - began, 3),
                "error": told(error, client),
            }
            client.drop()
            self.say({"failure": failure})
            return False
        tally.done += 1
        tally.slowest = max(tally.slowest, time.monotonic() - began)
        return True

    async def _rest(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.stopping.wait()
        else:
            await asyncio.sleep(0)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.say(self._report())

    def _report(self) -> dict[str, Any]:
        return {"tally": {name: vars(tally) for name, tally in self.tallies.items()}}


def say(message: dict[str, Any]) -> None:
    """Write one line for whoever started this."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def main(arguments: Sequence[str]) -> None:
    """Run the jobs until told to end."""
    parser = argparse.ArgumentParser(prog="python -m perf.soaking.traffic")
    parser.add_argument("jobs", type=json.loads)
    parser.add_argument("--stdin", action="store_true")
    parser.add_argument("--seconds", type=float)
    given = parser.parse_args(arguments)
    load = Load([Job(**job) for job in given.jobs], say)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, load.stopping.set)
    if given.stdin:
        loop.add_reader(0, partial(_stdin, loop, load.stopping.set))
    if given.seconds is not None:
        loop.call_later(given.seconds, load.stopping.set)
    await load.run()


def _stdin(loop: asyncio.AbstractEventLoop, ended: Callable[[], None]) -> None:
    if not os.read(0, 4096):
        loop.remove_reader(0)
        ended()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
