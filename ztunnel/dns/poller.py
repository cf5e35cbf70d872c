"""One epoll set for all DNS sockets, with a callback each: a query costs no task, and a pod four descriptors.

trio waits for the set as a whole. Callbacks run to their end without waiting.
"""

import math
import select
import socket
from collections.abc import Callable

import trio

MOST_EVENTS = 256  # taken at once


class Poller:
    """Calls back when a socket is readable (level triggered). `failed` hears of what a callback raises."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}

    def add(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        """Call back whenever the socket has something to read, or an error. Raises OSError."""
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        self._callbacks[sock.fileno()] = callback

    def remove(self, sock: socket.socket) -> None:
        """Not any more; before the socket is closed. One that is not there is no error."""
        if self._callbacks.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())

    def close(self) -> None:
        """Close the set itself."""
        self._epoll.close()

    async def wait(self, seconds: float) -> None:
        """Wait for something to call back about, or so many seconds (math.inf: as long as it takes)."""
        if seconds == math.inf:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
        else:
            with trio.move_on_after(seconds):
                await trio.lowlevel.wait_readable(self._epoll.fileno())

    def call_back(self) -> None:
        """Call back about all that is readable now."""
        for fd, _ in self._epoll.poll(0, MOST_EVENTS):
            callback = self._callbacks.get(fd)
            if callback is not None:  # it may have gone in a callback before
                try:
                    callback()
                except Exception as error:  # one query's bug must not end all DNS of the node
                    self._failed(error)
