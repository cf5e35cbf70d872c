"""python hold.py HOST PORT COUNT: open so many connections, a request on each, and keep them until stdin ends.

Prints `open COUNT SECONDS` once all have their answer, and `still N` at the end: how many had stayed open. They end
with a reset: 10,000 ports in TIME_WAIT are a third of what the client has, and finding another one takes the kernel a
millisecond then. Only the standard library, and nothing of the project: it runs as a program of the client's pod.
"""

import errno
import selectors
import socket
import struct
import sys
import time

AT_ONCE = 64  # connections that are being opened
REQUEST = b"GET / HTTP/1.1\r\nHost: server\r\n\r\n"
LIMIT = 60.0
RESET = struct.pack("ii", 1, 0)


class Opening:
    """Connections on their way: connecting, asking, answered."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.done: list[socket.socket] = []
        self.pending = 0
        self._selector = selectors.DefaultSelector()

    def start(self) -> None:
        """Begin to connect one more."""
        connection = socket.socket()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        code = connection.connect_ex(self.address)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, "connect")
        self._selector.register(connection, selectors.EVENT_WRITE)
        self.pending += 1

    def step(self) -> None:
        """Wait until something happens, and take each connection that it happened to one step on."""
        for key, _ in self._selector.select(LIMIT):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)  # noqa: S101  that is what was registered
            if key.events == selectors.EVENT_WRITE:
                connection.send(REQUEST)
                self._selector.modify(connection, selectors.EVENT_READ)
            elif connection.recv(4096):
                self._selector.unregister(connection)
                self.done.append(connection)
                self.pending -= 1
            else:
                raise ConnectionError("closed before the answer")


def is_open(connection: socket.socket) -> bool:
    """Whether the peer has neither ended nor reset it."""
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def main(host: str, port: int, count: int) -> None:
    """Open, say so, wait, and count."""
    started = time.monotonic()
    opening = Opening((host, port))
    while len(opening.done) < count:
        while opening.pending < AT_ONCE and opening.pending + len(opening.done) < count:
            opening.start()
        opening.step()
        if time.monotonic() - started > LIMIT:
            raise TimeoutError(f"{len(opening.done)} of {count} connections after {LIMIT:g} s")
    print(f"open {count} {time.monotonic() - started:.3f}", flush=True)
    sys.stdin.read()
    print(f"still {sum(map(is_open, opening.done))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
