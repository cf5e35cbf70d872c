"""An application's TCP connection and the CONNECT stream that carries it.

Each end is passed on as what it is, at once: a half-close as a half-close, a reset as a reset. Hot path: one receive
buffer for the whole process, no object a chunk, no call that is not needed.
"""

import os
import socket
from typing import TYPE_CHECKING, Protocol

from ztunnel.inpod import sockets
from ztunnel.inpod.sockets import Socket
from ztunnel.memory import reserved
from ztunnel.proxy.errors import Denied, H2Failed, ProxyError, Reset, tcp_error
from ztunnel.proxy.reactor import ERR, HUP, IN, OUT, RDHUP, Reactor
from ztunnel.telemetry.access import ConnectionRecord

if TYPE_CHECKING:
    from ztunnel.proxy.tunnel import Tunnel

CHUNK = 256 * 1024  # bytes read at once: 64-256 KiB is best, 1 MiB leaves the cache
FRAME_HEADER = 9
_frame = reserved(FRAME_HEADER + CHUNK)
_payload = _frame[FRAME_HEADER:]
shared = _frame
"""The buffer, for other relays: nobody keeps anything in it beyond his own call."""

BULK = 8 * 1024  # bytes of DATA at once that tell a transfer from requests

CONNECT_ERROR = 0xA  # RFC 9113, 8.5: how a TCP connection error is told to the other end of the stream
REFUSED_STREAM = 0x7

CONNECTING = 0  # the socket towards the application is not connected yet (inbound)
WAITING = 1  # the peer did not answer the CONNECT yet (outbound)
FLOWING = 2
OVER = 3


class Carried(Protocol):
    """What a tunnel carries on one of its streams: told what comes there, asked for more when there is room."""

    tunnel: "Tunnel | None"
    stream_id: int

    def __hash__(self) -> int:
        """By identity."""

    @property
    def buffered(self) -> int:
        """Bytes from the peer that wait."""

    def bind(self, tunnel: "Tunnel", stream_id: int) -> None:
        """This stream of this tunnel is yours."""

    def pull(self) -> None:
        """There is room: send on."""

    def peer_data(self, data: memoryview, credit: int) -> None:
        """DATA came; `credit` is what it took of the stream's window."""

    def peer_end(self) -> None:
        """The peer's END_STREAM."""

    def peer_response(self, status: int) -> None:
        """The peer's answer to our CONNECT."""

    def peer_reset(self, code: int, remote: bool) -> None:
        """The stream was reset, by the peer or for its breach of the protocol."""

    def refused(self) -> None:
        """The tunnel has no room for the stream."""

    def tunnel_failed(self, error: ProxyError) -> None:
        """The tunnel is gone."""


class AppStream:
    """An application's TCP connection and the stream that carries it.

    The owner (outbound or inbound) makes it, binds it to a tunnel's stream, and lets it flow; from then on it ends
    by itself, and its record is finished exactly once.
    """

    __slots__ = (
        "_credit",
        "_ending",
        "_pending",
        "_queued",
        "_received_end",
        "_sent_end",
        "fd",
        "owner",
        "reactor",
        "record",
        "sock",
        "state",
        "stream_id",
        "to_app",
        "to_peer",
        "tunnel",
    )

    def __init__(
        self,
        reactor: Reactor,
        sock: Socket,
        record: ConnectionRecord,
        owner: "StreamOwner",
        state: int,
    ) -> None:
        self.reactor = reactor
        self.sock = sock
        self.fd = sock.fileno()
        self.record = record
        self.owner = owner
        self.state = state
        self.tunnel: Tunnel | None = None
        self.stream_id = 0
        self.to_app = 0  # bytes written to the application's socket
        self.to_peer = 0  # bytes read from it
        self._pending: bytearray | None = None  # what the application did not take yet
        self._credit = 0  # the window to give back once it does
        self._sent_end = False  # the application's FIN went to the peer
        self._received_end = False  # the peer's END_STREAM came
        self._ending = False  # epoll said that the application closed its side: read on to the end
        self._queued = False
        reactor.register(self.fd, self.on_event)

    @property
    def buffered(self) -> int:
        """Bytes from the peer that wait for the application."""
        return len(self._pending) if self._pending is not None else 0

    def bind(self, tunnel: "Tunnel", stream_id: int) -> None:
        """This stream of this tunnel is the connection's."""
        self.tunnel = tunnel
        self.stream_id = stream_id
        tunnel.streams[stream_id] = self

    def flow(self) -> None:
        """Both ends are there: begin to relay."""
        self.state = FLOWING
        # A peer may have sent on without waiting for our answer.
        if self._pending is not None:
            self._drain()
        elif self._received_end:
            self._shut()
        self.pull()

    def on_event(self, event: int) -> None:
        """Readiness of the application's socket."""
        state = self.state
        if event & ERR:
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._application_failed(code)
                return
        if state == FLOWING:
            if event & OUT and self._pending is not None:
                self._drain()
            if event & (IN | RDHUP | HUP):
                if event & (RDHUP | HUP):
                    self._ending = True
                self.pull()
        elif state != OVER:
            if event & (RDHUP | HUP):
                self._ending = True
            if state == CONNECTING and event & OUT:
                self.owner.connected(self)

    # Application to peer.

    def pull(self) -> None:
        """Read what the application sent and frame it, as far as the peer and the tunnel take it."""
        tunnel = self.tunnel
        if self._sent_end or self.state != FLOWING or tunnel is None:
            return
        if tunnel.blocked:
            tunnel.waiting[self] = None
            return
        h2 = tunnel.h2
        stream_id = self.stream_id
        room = h2.sendable(stream_id)
        if room <= 0:
            tunnel.starved[self] = None
            return
        wanted = room if room < CHUNK else CHUNK
        try:
            size = self.sock.recv_into(_payload, wanted)
        except BlockingIOError:
            return
        except OSError as error:
            self._application_failed(error.errno or 0)
            return
        if size == 0:
            self._sent_end = True
            h2.end_stream(stream_id)
            self.reactor.dirty.add(tunnel)
            if self._received_end and self._pending is None:
                self._finish()
            return
        self.to_peer += size
        if h2.has_output:
            tunnel.queue_output()
        h2.frame_data(stream_id, _frame, size)
        tunnel.write_frame(_frame, size + FRAME_HEADER)
        # A short read emptied the socket; the rest is another edge. Otherwise let the others have a turn first.
        if (size == wanted or self._ending) and not self._queued:
            self._queued = True
            self.reactor.again(self._pull_again)

    def _pull_again(self) -> None:
        self._queued = False
        self.pull()

    # Peer to application.

    def peer_data(self, data: memoryview, credit: int) -> None:
        """DATA came; `credit` is what it took of the stream's window."""
        pending = self._pending
        if pending is not None:
            pending += data
            self._credit += credit
            self._hold()
            return
        if self.state != FLOWING:
            self._pending = bytearray(data)
            self._credit = credit
            self._hold()
            return
        size = len(data)
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._application_failed(error.errno or 0)
            return
        self.to_app += sent
        if sent == size:
            self.tunnel.h2.acknowledge(self.stream_id, credit, size >= BULK)  # type: ignore[union-attr]
        else:
            self._pending = bytearray(data[sent:])
            self._credit = credit
            self._hold()

    def _hold(self) -> None:
        tunnel = self.tunnel
        if tunnel is not None:
            tunnel.context.buffers.changed(self)

    def _drain(self) -> None:
        pending = self._pending
        tunnel = self.tunnel
        if pending is None or tunnel is None:
            return
        try:
            sent = self.sock.send(pending)
        except BlockingIOError:
            return
        except OSError as error:
            self._application_failed(error.errno or 0)
            return
        self.to_app += sent
        if sent < len(pending):
            del pending[:sent]
            given = min(sent, self._credit)
        else:
            self._pending = None
            given = self._credit
        self._credit -= given
        buffers = tunnel.context.buffers
        if self._pending is None:
            buffers.forget(self)
        else:
            buffers.changed(self)
        tunnel.h2.acknowledge(self.stream_id, given)
        if tunnel.h2.has_output:
            self.reactor.dirty.add(tunnel)
        if self._pending is None and self._received_end:
            self._shut()

    def peer_end(self) -> None:
        """The peer's END_STREAM: its application sends no more."""
        self._received_end = True
        if self._pending is None and self.state == FLOWING:
            self._shut()

    def _shut(self) -> None:
        if self._sent_end:
            self._finish()
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._application_failed(error.errno or 0)

    def peer_response(self, status: int) -> None:
        """The peer's answer to our CONNECT (outbound)."""
        if self.state == WAITING:
            self.owner.answered(self, status)

    def peer_reset(self, code: int, remote: bool) -> None:
        """The stream was reset, by the peer or for its breach of the protocol."""
        if self.state == WAITING and code == REFUSED_STREAM:
            self.owner.refused(self)
            return
        who = "the peer reset the stream" if remote else "the peer broke the stream's protocol"
        kind = Reset if remote else H2Failed
        self.end(kind(f"{who} (HTTP/2 error {code:#x})"))

    def refused(self) -> None:
        """The tunnel takes no more streams, which it found out too late."""
        self.owner.refused(self)

    def tunnel_failed(self, error: ProxyError) -> None:
        """The tunnel is gone."""
        if self.state == WAITING:
            self.owner.lost(self, error)
        else:
            self.end(error)

    # Ends.

    def _application_failed(self, code: int) -> None:
        if self.state == CONNECTING:
            self.owner.connect_failed(self, tcp_error(self.record.dst_addr, code, os.strerror(code)))
            return
        self.abort(Reset(f"the application's connection: {os.strerror(code)}"))

    def abort(self, error: ProxyError) -> None:
        """End the connection: a reset to both ends."""
        tunnel = self.tunnel
        if tunnel is not None and self.state != OVER and self.stream_id:
            tunnel.h2.reset_stream(self.stream_id, CONNECT_ERROR)
        self.end(error)

    def fail(self, error: ProxyError) -> None:
        """As `abort`."""
        self.abort(error)

    def _finish(self) -> None:
        """Both directions ended in order."""
        if self.state == OVER:
            return
        self.state = OVER
        self.reactor.forget(self.fd)
        self.sock.close()
        self._account(None)

    def end(self, error: ProxyError) -> None:
        """Reset the application's side; the stream's end was dealt with."""
        if self.state == OVER:
            return
        self.state = OVER
        self.reactor.forget(self.fd)
        sockets.reset(self.sock)
        self._account(error)

    def _account(self, error: ProxyError | None) -> None:
        tunnel = self.tunnel
        if tunnel is not None:
            if self._pending is not None:
                self._pending = None
                tunnel.context.buffers.forget(self)
            tunnel.forget(self)
        self.owner.over(self, error)


class StreamOwner:
    """What the two directions decide about a stream's beginning and end."""

    __slots__ = ()

    def connected(self, stream: AppStream) -> None:
        """The connection to the application may be made: look at SO_ERROR (inbound)."""
        raise NotImplementedError

    def connect_failed(self, stream: AppStream, error: ProxyError) -> None:
        """The connection to the application was not made (inbound)."""
        raise NotImplementedError

    def answered(self, stream: AppStream, status: int) -> None:
        """The peer answered the CONNECT (outbound)."""
        raise NotImplementedError

    def refused(self, stream: AppStream) -> None:
        """The peer did not look at the CONNECT: it may be sent again elsewhere (outbound)."""
        raise NotImplementedError

    def lost(self, stream: AppStream, error: ProxyError) -> None:
        """The tunnel ended before it answered (outbound)."""
        raise NotImplementedError

    def over(self, stream: AppStream, error: ProxyError | None) -> None:
        """The connection ended; the socket is closed."""
        raise NotImplementedError


def status_error(status: int, peer: str) -> ProxyError:
    """What the peer's answer `status` to a CONNECT means."""
    if status == 401:
        return Denied(f"{peer}: denied by policy (HTTP 401)")
    meaning = {
        400: "it does not serve this address",
        502: "bad gateway",
        503: "it could not connect to the application",
    }
    return H2Failed(f"{peer} answered the CONNECT with HTTP {status}: {meaning.get(status, 'refused')}")
