"""Where log lines go: a descriptor that is written to without ever waiting for it, once `never_wait` was called.

A pipe whose reader has stopped, a full disk or a closed descriptor must not stop a connection: what cannot be written
is dropped, and counted in lines.
"""

import os
import socket
import stat


def keep_standard_descriptors() -> None:
    """Open what is closed of the descriptors 0 to 2 on /dev/null.

    Otherwise the next socket would have the number of standard error, and get the log's lines.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(fd, True)


class Sink:
    """Writes lines to `fd`. As it is made it waits as write(2) does."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.dropped = 0  # lines
        self._own = -1  # of a description that is ours alone, so that it can be told not to wait
        self._socket: socket.socket | None = None
        self._rest = b""  # of a line that was written in part

    def never_wait(self) -> None:
        """From now on drop what would have to wait.

        The descriptor is shared with other processes, so its flags are not ours to change: a pipe is opened a second
        time, a socket is told with each message. Files do not wait; terminals may, they are a person's.
        """
        try:
            mode = os.fstat(self.fd).st_mode
            if stat.S_ISFIFO(mode):
                self._own = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            elif stat.S_ISSOCK(mode):
                self._socket = socket.socket(fileno=os.dup(self.fd))
        except OSError:
            return  # closed, or another user's pipe: as before

    def write(self, lines: bytes) -> None:
        """Write whole lines, or drop them."""
        rest = self._rest
        data = rest + lines if rest else lines
        try:
            sent = self._send(data)
        except OSError:
            self.dropped += lines.count(b"\n")
            return
        self._rest = b""
        if sent < len(data):
            # A pipe takes up to PIPE_BUF bytes in one piece or not at all, so this is a longer line, or a full disk.
            end = sent
            if data[sent - 1 : sent] != b"\n":
                end = data.find(b"\n", sent) + 1
                self._rest = data[
                    sent:end
                ]  # first thing next time: or the next line would begin within this one
            self.dropped += data.count(b"\n", end)

    def _send(self, data: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        return os.write(self.fd if self._own < 0 else self._own, data)
