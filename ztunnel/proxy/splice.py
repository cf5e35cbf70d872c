"""Two TCP connections joined: a captured connection and the plain one that continues it outside the mesh.

Each end is passed on as what it is, at once: a half-close as a half-close, a reset as a reset. What comes little by
little is copied; what comes in whole chunks goes through a pipe (pipes.py), until it comes little by little. Hot path.
"""

import os
import socket

from ztunnel.inpod import sockets
from ztunnel.inpod.sockets import Socket
from ztunnel.proxy.context import Context
from ztunnel.proxy.errors import ProxyError, Reset, tcp_error
from ztunnel.proxy.pipes import Pipe
from ztunnel.proxy.reactor import ERR, HUP, IN, OUT, RDHUP
from ztunnel.proxy.relay import CHUNK, CONNECTING, FLOWING, OVER, shared
from ztunnel.telemetry.access import ConnectionRecord

LITTLE = CHUNK // 8  # a read of less than this ends the use of pipes


class SpliceOwner:
    """Who is told of a splice's steps."""

    __slots__ = ()

    def splice_connected(self, splice: "Splice") -> None:
        """The connection upstream is made; bytes flow."""
        raise NotImplementedError

    def splice_over(self, splice: "Splice", error: ProxyError | None) -> None:
        """Both sockets are closed."""
        raise NotImplementedError


class _Side:
    """One of the two sockets of a splice."""

    __slots__ = (
        "bulk",
        "ended",
        "ending",
        "fd",
        "other",
        "pending",
        "pipe",
        "queued",
        "sock",
        "splice",
        "taken",
    )

    other: "_Side"

    def __init__(self, splice: "Splice", sock: Socket) -> None:
        self.splice = splice
        self.sock = sock
        self.fd = sock.fileno()
        self.pending: memoryview | None = None  # what this socket did not take yet
        self.bulk = False  # it brings whole chunks
        self.pipe: Pipe | None = None  # holds what was read from this socket and the other did not take yet
        self.ending = False
        self.ended = False  # its FIN was read and passed on
        self.queued = False
        self.taken = 0  # bytes read from it

    @property
    def waiting(self) -> int:
        """Bytes that one socket was not able to take: here those for this one, in the pipe those for the other."""
        return (len(self.pending) if self.pending is not None else 0) + (self.pipe.held if self.pipe else 0)

    def on_event(self, event: int) -> None:
        splice = self.splice
        if event & ERR:
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                splice.failed(self, code)
                return
        if splice.state == FLOWING:
            if event & OUT:
                if self.pending is not None:
                    self.drain()
                self.other.push_again()
            if event & (IN | RDHUP | HUP):
                if event & (RDHUP | HUP):
                    self.ending = True
                self.pull()
        elif splice.state == CONNECTING:
            if event & (RDHUP | HUP):
                self.ending = True
            if self is splice.upstream and event & OUT:
                splice.connected()

    def pull(self) -> None:
        other = self.other
        if self.ended or other.pending is not None or self.pipe is not None or self.splice.state != FLOWING:
            return
        if self.bulk and (pipe := self.splice.context.pipes.take()) is not None:
            self.pull_through(pipe)
            return
        try:
            size = self.sock.recv_into(shared, CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self.splice.failed(self, error.errno or 0)
            return
        if size == 0:
            self.ended = True
            other.shut()
            return
        self.taken += size
        try:
            sent = other.sock.send(shared[:size])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.splice.failed(other, error.errno or 0)
            return
        if sent < size:
            other.pending = memoryview(bytes(shared[sent:size]))
            self.splice.context.buffers.changed(self.splice)
            return
        if size == CHUNK:
            self.bulk = True
        if self.bulk or self.ending:
            self.pull_soon()

    def pull_through(self, pipe: Pipe) -> None:
        """As `pull`, with a pipe, which is this side's only as long as something waits in it."""
        self.pipe = pipe
        try:
            size = pipe.fill(self.fd)
        except BlockingIOError:
            self.give_back()
            return
        except OSError as error:
            self.splice.failed(self, error.errno or 0)
            return
        if size == 0:
            self.give_back()
            self.ended = True
            self.other.shut()
            return
        self.taken += size
        if size < LITTLE:
            self.bulk = False
        if self.push(pipe):
            self.pull_soon()  # whether there was more does not show

    def push(self, pipe: Pipe) -> bool:
        """Give the other socket what is in the pipe; whether it took everything."""
        try:
            pipe.empty(self.other.fd)
        except BlockingIOError:
            self.splice.context.buffers.changed(self.splice)
            return False
        except OSError as error:
            self.splice.failed(self.other, error.errno or 0)
            return False
        self.give_back()
        return True

    def push_again(self) -> None:
        """The other socket takes bytes again."""
        pipe = self.pipe
        if pipe is not None and self.push(pipe):
            self.splice.context.buffers.changed(self.splice)
            self.pull()

    def give_back(self) -> None:
        """The pipe is not needed any more."""
        if self.pipe is not None:
            self.splice.context.pipes.give(self.pipe)
            self.pipe = None

    def pull_soon(self) -> None:
        if not self.queued:
            self.queued = True
            self.splice.reactor.again(self.pull_again)

    def pull_again(self) -> None:
        self.queued = False
        self.pull()

    def drain(self) -> None:
        pending = self.pending
        if pending is None:
            return
        try:
            sent = self.sock.send(pending)
        except BlockingIOError:
            return
        except OSError as error:
            self.splice.failed(self, error.errno or 0)
            return
        buffers = self.splice.context.buffers
        if sent < len(pending):
            self.pending = pending[sent:]
            buffers.changed(self.splice)
            return
        self.pending = None
        buffers.changed(self.splice)
        self.other.pull()

    def shut(self) -> None:
        if self.ended:
            self.splice.finish(None)
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.splice.failed(self, error.errno or 0)


class Splice:
    """A captured connection and the plain TCP connection that continues it: traffic outside the mesh."""

    __slots__ = ("context", "downstream", "owner", "reactor", "record", "state", "upstream")

    def __init__(
        self,
        context: Context,
        downstream: Socket,
        upstream: Socket,
        record: ConnectionRecord,
        owner: SpliceOwner,
    ) -> None:
        """`upstream` is still connecting; bytes flow as soon as it is connected."""
        self.context = context
        self.reactor = reactor = context.reactor
        self.record = record
        self.owner = owner
        self.state = CONNECTING
        self.downstream = _Side(self, downstream)
        self.upstream = _Side(self, upstream)
        self.downstream.other = self.upstream
        self.upstream.other = self.downstream
        reactor.register(self.downstream.fd, self.downstream.on_event)
        reactor.register(self.upstream.fd, self.upstream.on_event)

    @property
    def buffered(self) -> int:
        """Bytes that wait for a slow reader."""
        return self.downstream.waiting + self.upstream.waiting

    def connected(self) -> None:
        """Upstream answered: begin to relay."""
        self.state = FLOWING
        self.owner.splice_connected(self)
        self.downstream.pull()
        self.upstream.pull()

    def failed(self, side: _Side, code: int) -> None:
        """One socket failed: reset both."""
        text = os.strerror(code)
        if self.state == CONNECTING and side is self.upstream:
            self.finish(tcp_error(self.record.dst_addr, code, text))
        else:
            which = "the client's" if side is self.downstream else "the destination's"
            self.finish(Reset(f"{which} connection: {text}"))

    def fail(self, error: ProxyError) -> None:
        """End both with a reset."""
        self.finish(error)

    def finish(self, error: ProxyError | None) -> None:
        """Close both: in order, or with resets if there is an error."""
        if self.state == OVER:
            return
        self.state = OVER
        self.context.buffers.forget(self)
        for side in (self.downstream, self.upstream):
            self.reactor.forget(side.fd)
            side.pending = None
            side.give_back()
            if error is None:
                side.sock.close()
            else:
                sockets.reset(side.sock)
        self.record.sent += self.downstream.taken
        self.record.received += self.upstream.taken
        self.owner.splice_over(self, error)
