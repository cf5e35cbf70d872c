"""python holder.py HOST PORT: opens, uses and closes many HTTP connections, as lines on its standard input tell it.

    open COUNT    so many connections, a request answered on each
    use           another request on each of them
    close         all of them

Each line is answered with one of JSON: what was done, what failed and why, the seconds it took, and how long each
connection waited (p50 and p99, ms). Nothing but the standard library, and nothing of the project: it runs in a pod.
"""

import errno
import json
import os
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable

AT_ONCE = 16  # connections that are being opened, or wait for an answer
REQUEST = b"GET / HTTP/1.1\r\nHost: server\r\n\r\n"
ANSWER = b"HTTP/1.1 200 "
END = b"hello world\n"
LIMIT = 20.0  # seconds without any event after which what is under way has failed


class Step:
    """Something done on many connections, a few at a time: each sends a request, and is done with the whole answer."""

    def __init__(self, begin: Callable[[], socket.socket | None]) -> None:
        """`begin()` gives the next connection, connecting or connected, None when there is no more."""
        self.done: list[socket.socket] = []
        self.failed: Counter[str] = Counter()
        self._begin = begin
        self._waits: list[float] = []
        self._began = time.monotonic()
        self._under_way: dict[socket.socket, tuple[float, bytes]] = {}
        self._selector = selectors.DefaultSelector()

    def run(self) -> dict[str, object]:
        """Do it; the report."""
        more = True
        while more or self._under_way:
            while more and len(self._under_way) < AT_ONCE:
                more = self._next()
            events = self._selector.select(LIMIT) if self._under_way else []
            if not events:
                for connection in list(self._under_way):
                    self._fail(connection, f"no answer within {LIMIT:g} s")
            for key, _ in events:
                ready = key.fileobj
                assert isinstance(ready, socket.socket)  # noqa: S101  that is what was registered
                try:
                    self._continue(ready, key.events)
                except OSError as error:
                    self._fail(ready, os.strerror(error.errno or 0))
        self._selector.close()
        waits = sorted(self._waits) or [0.0]
        return {
            "done": len(self.done),
            "failed": dict(self.failed),
            "seconds": time.monotonic() - self._began,
            "p50_ms": waits[len(waits) // 2] * 1000,
            "p99_ms": waits[len(waits) * 99 // 100] * 1000,
        }

    def _next(self) -> bool:
        try:
            connection = self._begin()
        except OSError as error:
            self.failed[os.strerror(error.errno or 0)] += 1
            return True
        if connection is None:
            return False
        self._under_way[connection] = (time.monotonic(), b"")
        self._selector.register(connection, selectors.EVENT_WRITE)
        return True

    def _continue(self, connection: socket.socket, events: int) -> None:
        began, received = self._under_way[connection]
        if events == selectors.EVENT_WRITE:
            connection.send(REQUEST)
            self._selector.modify(connection, selectors.EVENT_READ)
            return
        data = connection.recv(4096)
        received += data
        if received.endswith(END) and received.startswith(ANSWER):
            self._waits.append(time.monotonic() - began)
            self._leave(connection)
            self.done.append(connection)
        elif not data:
            self._fail(connection, "closed before the answer")
        else:
            self._under_way[connection] = (began, received)

    def _fail(self, connection: socket.socket, why: str) -> None:
        self.failed[why] += 1
        self._leave(connection)
        connection.close()

    def _leave(self, connection: socket.socket) -> None:
        del self._under_way[connection]
        self._selector.unregister(connection)


def _connections(address: tuple[str, int], count: int) -> Callable[[], socket.socket | None]:
    """Begins so many connections, one a call."""
    left = count

    def begin() -> socket.socket | None:
        nonlocal left
        if not left:
            return None
        left -= 1
        connection = socket.socket()
        connection.setblocking(False)
        code = connection.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            connection.close()
            raise OSError(code, "connect")
        return connection

    return begin


def _each(connections: Iterable[socket.socket]) -> Callable[[], socket.socket | None]:
    rest = iter(connections)
    return lambda: next(rest, None)


def main(host: str, port: int) -> None:
    """Do what the lines say until they end."""
    held: list[socket.socket] = []
    for line in sys.stdin:
        words = line.split()
        if words[0] == "close":
            for connection in held:
                connection.close()
            report: dict[str, object] = {"done": len(held)}
            held = []
        else:
            step = Step(_connections((host, port), int(words[1])) if words[0] == "open" else _each(held))
            report = step.run()
            held = step.done
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
