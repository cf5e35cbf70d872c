"""Pipes through which bulk data goes from one socket to another without being copied: splice(2).

The bytes stay where the kernel has them; a pipe holds references. For plain TCP only: what is encrypted has to be seen.
"""

import fcntl
import os

SIZE = 1 << 20  # bytes; the most that the kernel gives without CAP_SYS_RESOURCE (fs.pipe-max-size)
MOST = 32  # pipes of a worker: 64 descriptors. Beyond it bytes are copied, at half as much again of processor time.
FREE = 4  # pipes that are kept for the next ones who need them


class Pipe:
    """One pipe, and how many bytes are in it."""

    __slots__ = ("held", "reader", "writer")

    def __init__(self) -> None:
        """Raises OSError where there are no descriptors, or pipes of this user are not allowed to be this large."""
        self.held = 0
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, SIZE)
        except OSError:
            self.close()
            raise

    def fill(self, source: int) -> int:
        """Take what the socket `source` has, into the empty pipe: how many bytes, 0 at its end. Raises OSError."""
        self.held = os.splice(source, self.writer, SIZE)
        return self.held

    def empty(self, destination: int) -> None:
        """Give the socket `destination` all of it. Raises BlockingIOError when it takes no more, or OSError.

        It is asked until it refuses: only then does the kernel tell when it takes bytes again.
        """
        while self.held:
            self.held -= os.splice(self.reader, destination, self.held)

    def close(self) -> None:
        """Close both ends; what is in it is lost."""
        os.close(self.reader)
        os.close(self.writer)


class Pipes:
    """A worker's pipes, lent to the connections that move much at the moment."""

    __slots__ = ("_free", "_lent")

    def __init__(self) -> None:
        self._free: list[Pipe] = []
        self._lent = 0

    @property
    def lent(self) -> int:
        """How many are in use."""
        return self._lent

    def take(self) -> Pipe | None:
        """An empty pipe, to be given back; None if there are too many, or the kernel gives none."""
        if self._lent >= MOST:
            return None
        if self._free:
            pipe = self._free.pop()
        else:
            try:
                pipe = Pipe()
            except OSError:
                return None
        self._lent += 1
        return pipe

    def give(self, pipe: Pipe) -> None:
        """It is not needed any more. One that has bytes of a connection in it is of no use to another."""
        self._lent -= 1
        if pipe.held or len(self._free) >= FREE:
            pipe.close()
        else:
            self._free.append(pipe)
