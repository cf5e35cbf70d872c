"""One HBONE connection, either role: a socket, TLS over it, HTTP/2 inside, and the application streams it carries.

Hot path; what it does to be fast, each measured by the prototypes (design, decisions 2 and 3):
- frames of all streams are gathered during a batch of events and leave as one TLS write and one send;
- bulk data goes from the application's socket into a buffer that has room for the frame header, and from there
  straight into TLS;
- records are decrypted sixteen at a time into one buffer, and DATA is handed on as views of it.

Backpressure: while the socket does not take ciphertext the tunnel is `blocked`, and no application is read for it;
what a slow application leaves unread is bounded by its stream's window.

A tunnel ends in one of two ways. `fail` cuts it: the streams are reset. `close`, for one that carries no stream any
more, sends all that is queued and its own end, and then waits for the peer's, because closing a socket with unread
bytes in it is a reset, which would take the last bytes of the last stream away from the peer.
"""

import os
import socket
from typing import Any

from OpenSSL import SSL

from ztunnel import hbone
from ztunnel.inpod.sockets import Socket
from ztunnel.proxy import tls
from ztunnel.proxy.context import WINDOWS, Context, Pod
from ztunnel.proxy.errors import (
    ConnectFailed,
    H2Failed,
    PeerClosed,
    ProxyError,
    Revoked,
    TlsFailed,
    tcp_error,
)
from ztunnel.proxy.reactor import ERR, HUP, IN, OUT, RDHUP, Flushable
from ztunnel.proxy.relay import Carried

CONNECTING = 0
HANDSHAKE = 1
OPEN = 2
CLOSING = 3  # nothing is carried any more; the peer's end is awaited
CLOSED = 4

SMALL = 16 * 1024  # bytes; larger frames are not gathered
READ_TURN = 1024 * 1024  # bytes of plaintext a tunnel may bring in before the other sockets get their turn
LINGER_TURN = 16  # reads of what nobody wants before the other sockets get their turn


class Tunnel(Flushable):
    """The common part; ClientTunnel (outbound) and ServerTunnel (inbound) say what streams mean."""

    pod: Pod

    __slots__ = (
        "_ending",
        "_queued",
        "_unsent",
        "blocked",
        "context",
        "engine",
        "fd",
        "going",
        "grown",
        "h2",
        "out",
        "reactor",
        "served",
        "sock",
        "starved",
        "state",
        "streams",
        "waiting",
    )

    def __init__(
        self,
        context: Context,
        sock: Socket,
        tls_context: SSL.Context,
        role: hbone.Role,
        state: int,
    ) -> None:
        self.context = context
        self.reactor = reactor = context.reactor
        self.sock = sock
        if context.congestion_control:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, context.congestion_control)
        self.fd = sock.fileno()
        self.engine = tls.Engine(tls_context, role is hbone.Role.SERVER)
        self.h2 = hbone.Connection(role, WINDOWS, context.allowance)
        self.state = state
        self.served = False  # whether it has carried a stream yet
        self.going = False  # one of the two ends said GOAWAY
        self.grown = False  # it has carried bulk data lately
        self.streams: dict[int, Carried] = {}
        self.out: list[bytes] = []
        self.blocked = True  # until the handshake is done
        self.waiting: dict[Carried, None] = {}  # to be read again once not blocked, in order
        self.starved: dict[Carried, None] = {}  # to be read again once the peer gives window
        self._unsent: memoryview | None = None
        self._ending = False  # epoll said that the peer closed its side: read on to the end
        self._queued = False
        reactor.register(self.fd, self.on_event)

    # What the roles fill in.

    def peer_label(self) -> str:
        """Who is at the other end, for messages."""
        raise NotImplementedError

    def handshaken(self) -> None:
        """TLS is up: check the peer. Raises ProxyError to refuse it."""
        raise NotImplementedError

    def opened(self) -> None:
        """The peer is who it has to be: streams may be opened."""
        raise NotImplementedError

    def on_connect_request(self, event: hbone.ConnectRequested) -> None:
        """The peer asks for a stream."""
        raise NotImplementedError

    def on_stream_gone(self) -> None:
        """One stream less."""
        raise NotImplementedError

    def on_closed(self, error: ProxyError | None) -> None:
        """The connection ended; its streams are told next."""
        raise NotImplementedError

    def on_goaway(self) -> None:
        """The peer takes, or opens, no new streams."""

    def on_settings(self, max_streams: int) -> None:
        """The peer said how many streams it takes."""

    # Events of the socket.

    def on_event(self, event: int) -> None:
        """Readiness of the socket."""
        state = self.state
        if event & (RDHUP | HUP | ERR):
            self._ending = True
        if state == OPEN:
            try:
                if event & OUT and self.blocked:
                    self._unblock()
                if event & (IN | RDHUP | HUP | ERR):
                    self.read()
            except tls.TlsError as error:
                self.fail(tls_failed(self.peer_label(), error))
            except OSError as error:
                self.fail(PeerClosed(f"tunnel with {self.peer_label()}: {error.strerror}"))
        elif state == CLOSING:
            self._linger(event)
        elif state != CLOSED:
            try:
                self._begin(event)
            except tls.TlsError as error:
                self._send_alert()
                self.fail(tls_failed(f"TLS handshake with {self.peer_label()}", error))
            except ProxyError as error:
                self._send_alert()
                self.fail(error)
            except OSError as error:
                self.fail(ConnectFailed(f"{self.peer_label()}: {error.strerror}"))

    def _begin(self, event: int) -> None:
        if self.state == CONNECTING:
            if not event & (OUT | ERR | HUP):
                return
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise tcp_error(self.peer_label(), code, os.strerror(code))
            self.state = HANDSHAKE
        engine = self.engine
        while not engine.handshake():
            self._pump()
            if not self._receive():
                return
        self._pump()
        self.handshaken()
        self.state = OPEN
        self.blocked = self._unsent is not None
        self.reactor.dirty.add(self)
        self.opened()
        self.read()

    def _send_alert(self) -> None:
        """Let the peer know why its handshake failed, as far as the socket takes it."""
        try:
            self._pump()
        except OSError:
            pass

    def _receive(self) -> bool:
        """Bring ciphertext into TLS; False if there is none now. Raises PeerClosed at the end."""
        try:
            size = self.sock.recv_into(tls.received)
        except BlockingIOError:
            return False
        if size == 0:
            raise PeerClosed(f"{self.peer_label()} closed the connection during the TLS handshake")
        self.engine.feed(size)
        return True

    def read(self) -> None:
        """Take in what the peer sent. Raises TlsError, OSError."""
        engine_read = self.engine.read
        feed = self.engine.feed
        recv_into = self.sock.recv_into
        receive = self.h2.receive
        plain = tls.plain
        received = tls.received
        total = 0
        more = True
        while self.state == OPEN:
            try:
                size = engine_read()
            except tls.TlsClosed:
                self._peer_closed()
                return
            if size:
                for event in receive(plain[:size]):
                    if type(event) is hbone.DataReceived:
                        stream = self.streams.get(event.stream_id)
                        if stream is not None:
                            stream.peer_data(event.data, event.credit)
                    else:
                        self._handle(event)
                total += size
                if total > READ_TURN:
                    if not self._queued:
                        self._queued = True
                        self.reactor.again(self._read_again)
                    break
                continue
            if not more:
                break
            try:
                size = recv_into(received)
            except BlockingIOError:
                break
            if size == 0:
                self._peer_closed()
                return
            feed(size)
            if size > SMALL and not self.grown:
                self._grow()
            # A short read emptied the socket: what comes later is another edge. That saves a call that finds nothing.
            more = size == tls.CIPHER or self._ending
        if self.h2.has_output:
            self.reactor.dirty.add(self)
        if self.going:
            self._close_if_over()

    def _read_again(self) -> None:
        self._queued = False
        self.on_event(IN)

    def _peer_closed(self) -> None:
        self.fail(PeerClosed(f"{self.peer_label()} closed the tunnel") if self.streams else None)

    def _handle(self, event: hbone.Event) -> None:
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            handler(self, event)

    def _on_stream_ended(self, event: hbone.StreamEnded) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.peer_end()

    def _on_stream_reset(self, event: hbone.StreamReset) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.peer_reset(event.code, event.remote)

    def _on_window(self, event: hbone.WindowOpened) -> None:
        if event.stream_id:
            stream = self.streams.get(event.stream_id)
            if stream is not None:
                self.starved.pop(stream, None)
                stream.pull()
            return
        starved = list(self.starved)
        self.starved.clear()
        for stream in starved:
            stream.pull()

    def _on_response(self, event: hbone.ResponseReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.peer_response(event.status)

    def _on_request(self, event: hbone.ConnectRequested) -> None:
        if self.state == OPEN:
            self.on_connect_request(event)

    def _on_settings(self, event: hbone.SettingsReceived) -> None:
        self.on_settings(event.max_concurrent_streams)

    def _on_goaway(self, event: hbone.GoAwayReceived) -> None:
        self.going = True
        self.on_goaway()

    def _on_failed(self, event: hbone.ConnectionFailed) -> None:
        self._write_out()
        self.fail(H2Failed(f"HTTP/2 error of {self.peer_label()}: {event.reason}"))

    # Writing.

    def queue_output(self) -> None:
        """Put the codec's own frames (HEADERS before DATA) in their place among the gathered ones."""
        self.out.append(self.h2.data_to_send())

    def write_frame(self, view: memoryview, size: int) -> None:
        """Send the frame in the first `size` bytes of `view`, after all that was queued.

        A small one waits for the end of the batch; a large one goes at once, without being copied.
        """
        out = self.out
        if size <= SMALL:
            out.append(bytes(view[:size]))
            self.reactor.dirty.add(self)
            return
        if not self.grown:
            self._grow()
        try:
            if out:
                self.engine.write(out[0] if len(out) == 1 else b"".join(out))
                out.clear()
            self.engine.write(view[:size])
            if not self._pump():
                self.blocked = True
        except tls.TlsError as error:
            self.fail(tls_failed(self.peer_label(), error))
        except OSError as error:
            self.fail(PeerClosed(f"tunnel with {self.peer_label()}: {error.strerror}"))

    def flush(self) -> None:
        """Send what was gathered during the batch."""
        if self.blocked or self.state != OPEN:
            return
        try:
            self._write_out()
            if not self._pump():
                self.blocked = True
        except tls.TlsError as error:
            self.fail(tls_failed(self.peer_label(), error))
        except OSError as error:
            self.fail(PeerClosed(f"tunnel with {self.peer_label()}: {error.strerror}"))

    def _write_out(self) -> None:
        out = self.out
        if self.h2.has_output:
            out.append(self.h2.data_to_send())
        if out:
            self.engine.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    def _pump(self) -> bool:
        """Send ciphertext; False if the socket did not take all. Raises OSError."""
        send = self.sock.send
        unsent = self._unsent
        if unsent is not None:
            try:
                sent = send(unsent)
            except BlockingIOError:
                return False
            if sent < len(unsent):
                self._unsent = unsent[sent:]
                return False
            self._unsent = None
        take = self.engine.take
        while True:
            view = take()
            size = len(view)
            if not size:
                return True
            try:
                sent = send(view)
            except BlockingIOError:
                sent = 0
            if sent < size:
                self._unsent = memoryview(bytes(view[sent:]))
                return False

    def _grow(self) -> None:
        self.grown = True
        self.context.grown.add(self, self.reactor.now)

    def shrink(self) -> None:
        """Give back the buffers that bulk data made grow."""
        self.grown = False
        if self.state == OPEN:
            if self.blocked:
                self._grow()
            else:
                self.engine.shrink()

    def _unblock(self) -> None:
        if not self._pump():
            return
        self.blocked = False
        self.flush()
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        # Each once: who wants more goes to the end of the queue.
        for _ in range(len(self.waiting)):
            if self.blocked or not self.waiting:
                return
            stream = next(iter(self.waiting))
            del self.waiting[stream]
            stream.pull()

    # Ends.

    def forget(self, stream: Carried) -> None:
        """The stream is over."""
        if self.streams.pop(stream.stream_id, None) is not None:
            self.waiting.pop(stream, None)
            self.starved.pop(stream, None)
            self.reactor.dirty.add(self)  # a reset or an END_STREAM may have been queued
            self.on_stream_gone()

    def fail(self, error: ProxyError | None) -> None:
        """End the connection now and reset what it carries; `error` None where nothing is wrong."""
        if self.state == CLOSED:
            return
        self.state = CLOSED
        try:
            self._pump()  # a GOAWAY or an alert, if there is room
        except OSError:
            pass
        self.h2.abandon()
        self.reactor.forget(self.fd)
        self.reactor.dirty.discard(self)
        self.context.closing.discard(self)
        self.context.grown.discard(self)
        self.sock.close()
        self._unsent = None
        self.out.clear()
        streams = list(self.streams.values())
        self.streams.clear()
        self.waiting.clear()
        self.starved.clear()
        self.on_closed(error)
        for stream in streams:
            stream.tunnel_failed(error or PeerClosed(f"the tunnel with {self.peer_label()} was closed"))

    def close(self) -> None:
        """End a connection that carries no stream politely: all that is queued, GOAWAY, close_notify, FIN."""
        if self.state == OPEN:
            self.state = CLOSING
            self.context.closing.add(self, self.reactor.now)
            try:
                self.h2.go_away()
                self._write_out()
                self.engine.close()
                self._end_sending()
            except (tls.TlsError, OSError):
                self.fail(None)
                return
            # The peer's end may have been announced already, by an edge that does not come again.
            self.reactor.again(self._linger_again)
        elif self.state != CLOSING:
            self.fail(None)

    def close_overdue(self) -> None:
        """The peer did not answer our end of the connection with its own."""
        self.fail(None)

    def _close_if_over(self) -> None:
        """Close once no stream is left and none can come: after GOAWAY and all that it promised to serve."""
        if self.state == OPEN and not self.streams and self.h2.closed:
            self.close()

    def _end_sending(self) -> None:
        if self._pump():
            self.sock.shutdown(socket.SHUT_WR)

    def _linger(self, event: int) -> None:
        try:
            if event & OUT and self._unsent is not None:
                self._end_sending()
            if event & (IN | RDHUP | HUP | ERR):
                for _ in range(LINGER_TURN):
                    if not self.sock.recv_into(tls.received):
                        self.fail(None)
                        return
                self.reactor.again(self._linger_again)
        except BlockingIOError:
            return
        except OSError:
            self.fail(None)

    def _linger_again(self) -> None:
        if self.state == CLOSING:
            self._linger(IN)

    @property
    def unsent(self) -> int:
        """Bytes that the socket did not take yet: what one batch of events left, since no more is read meanwhile."""
        return sum(map(len, self.out)) + (len(self._unsent) if self._unsent is not None else 0)

    @property
    def buffered(self) -> int:
        """Bytes that wait in this process for slow readers."""
        return self.unsent + sum(stream.buffered for stream in self.streams.values())


def tls_failed(where: str, error: tls.TlsError) -> TlsFailed:
    """What to log for OpenSSL's refusal, or the peer's."""
    return (Revoked if isinstance(error, tls.CertificateRevoked) else TlsFailed)(f"{where}: {error}")


_HANDLERS: dict[type, Any] = {
    hbone.StreamEnded: Tunnel._on_stream_ended,
    hbone.StreamReset: Tunnel._on_stream_reset,
    hbone.WindowOpened: Tunnel._on_window,
    hbone.ResponseReceived: Tunnel._on_response,
    hbone.ConnectRequested: Tunnel._on_request,
    hbone.SettingsReceived: Tunnel._on_settings,
    hbone.GoAwayReceived: Tunnel._on_goaway,
    hbone.ConnectionFailed: Tunnel._on_failed,
}
