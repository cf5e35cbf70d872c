"""One of the two streams of a connection through the waypoint, joined with the other: HTTP/2 to HTTP/2.

Each end is passed on as what it is, at once: END_STREAM as END_STREAM, a reset as a reset. What one side does not take
is not given back as window to the other side, so a slow reader holds a stream's window at most. Hot path: DATA is
copied once, from the buffer that it was decrypted into to the one that it is framed in.
"""

from typing import Protocol

from ztunnel.proxy.errors import H2Failed, ProxyError, Reset
from ztunnel.proxy.relay import BULK, CONNECT_ERROR, FRAME_HEADER, REFUSED_STREAM, AppStream, shared
from ztunnel.proxy.tunnel import Tunnel

WAITING = 1  # its peer did not answer, or was not answered yet
FLOWING = 2
OVER = 3

MOST = len(shared) - FRAME_HEADER
_payload = shared[FRAME_HEADER:]


class LegOwner(Protocol):
    """Who is told of what becomes of a connection."""

    def leg_answered(self, leg: "Leg", status: int) -> None:
        """The peer answered our CONNECT."""

    def leg_refused(self, leg: "Leg") -> None:
        """The peer did not look at our CONNECT: it may be sent again elsewhere."""

    def leg_lost(self, leg: "Leg", error: ProxyError) -> None:
        """The stream, or its tunnel, is gone."""

    def legs_finished(self) -> None:
        """Both directions ended in order."""


class Leg:
    """A stream on a tunnel; what comes on it goes out on `other`.

    It stands where an application's connection does on a node (`AppStream`): the tunnel knows no difference.
    """

    __slots__ = (
        "_credit",
        "_pending",
        "other",
        "owner",
        "received",
        "received_end",
        "sent_end",
        "state",
        "stream_id",
        "tunnel",
    )

    def __init__(self, owner: LegOwner) -> None:
        self.owner = owner
        self.other: Leg | None = None
        self.state = WAITING
        self.tunnel: Tunnel | None = None
        self.stream_id = 0
        self.received = 0  # bytes of DATA that came on it and went out on the other
        self.received_end = False
        self.sent_end = False
        self._pending: bytearray | None = None  # what the other did not take yet
        self._credit = 0  # the window to give back once it does

    @property
    def buffered(self) -> int:
        """Bytes that came on this stream and wait for the other."""
        return len(self._pending) if self._pending is not None else 0

    def bind(self, tunnel: Tunnel, stream_id: int) -> None:
        """This stream of this tunnel is the leg's."""
        self.tunnel = tunnel
        self.stream_id = stream_id
        tunnel.streams[stream_id] = self

    def flow(self) -> None:
        """Both streams are open: pass on what has come meanwhile."""
        self.state = FLOWING

    # What the tunnel tells.

    def peer_data(self, data: memoryview, credit: int) -> None:
        """DATA came; `credit` is what it took of the stream's window."""
        tunnel = self.tunnel
        if self.state == OVER or tunnel is None:
            return
        other = self.other
        size = len(data)
        if self._pending is None:
            sent = other.send(data) if other is not None and self.state == FLOWING else 0
            self.received += sent
            if self.state == OVER:  # sending found the other's tunnel broken
                return
            if sent == size:
                tunnel.h2.acknowledge(self.stream_id, credit, size >= BULK)
                return
            self._pending = bytearray(data[sent:])
            self._credit = credit
        else:
            self._pending += data
            self._credit += credit
        tunnel.context.buffers.changed(self)

    def peer_end(self) -> None:
        """END_STREAM came."""
        self.received_end = True
        self._pass_end()

    def peer_response(self, status: int) -> None:
        """The answer to our CONNECT."""
        if self.state == WAITING:
            self.owner.leg_answered(self, status)

    def peer_reset(self, code: int, remote: bool) -> None:
        """The stream was reset, by the peer or for its breach of the protocol."""
        if self.state == WAITING and code == REFUSED_STREAM:
            self.owner.leg_refused(self)
            return
        who = "the peer reset the stream" if remote else "the peer broke the stream's protocol"
        kind = Reset if remote else H2Failed
        self.owner.leg_lost(self, kind(f"{who} (HTTP/2 error {code:#x})"))

    def refused(self) -> None:
        """The tunnel takes no more streams, which it found out too late."""
        self.owner.leg_refused(self)

    def tunnel_failed(self, error: ProxyError) -> None:
        """The tunnel is gone."""
        self.owner.leg_lost(self, error)

    def pull(self) -> None:
        """There is room to send again: take what the other holds."""
        if self.other is not None:
            self.other.drain()

    # Sending.

    def send(self, data: "memoryview | bytearray") -> int:
        """Frame as much of `data` as the peer and the tunnel take; returns how many bytes that was."""
        tunnel = self.tunnel
        if self.state != FLOWING or tunnel is None or self.sent_end:
            return 0
        h2 = tunnel.h2
        stream_id = self.stream_id
        done, size = 0, len(data)
        while done < size:
            if tunnel.blocked:
                tunnel.waiting[self] = None
                break
            room = h2.sendable(stream_id)
            if room <= 0:
                tunnel.starved[self] = None
                break
            part = min(size - done, room, MOST)
            _payload[:part] = data[done : done + part]
            if h2.has_output:
                tunnel.queue_output()
            h2.frame_data(stream_id, shared, part)
            tunnel.write_frame(shared, part + FRAME_HEADER)
            done += part
            if self.state == OVER:
                break
        return done

    def drain(self) -> None:
        """Send on what is held, as far as the other takes it, and then the end if it came."""
        pending, other, tunnel = self._pending, self.other, self.tunnel
        if self.state != FLOWING or other is None or tunnel is None:
            return
        if pending is not None:
            sent = other.send(pending)
            if not sent:
                return
            self.received += sent
            if self.state == OVER:
                return
            if sent < len(pending):
                del pending[:sent]
                given = min(sent, self._credit)
                tunnel.context.buffers.changed(self)
            else:
                self._pending = None
                given = self._credit
                tunnel.context.buffers.forget(self)
            self._credit -= given
            tunnel.h2.acknowledge(self.stream_id, given)
            if tunnel.h2.has_output:
                tunnel.reactor.dirty.add(tunnel)
        self._pass_end()

    def _pass_end(self) -> None:
        other = self.other
        if (
            not self.received_end
            or self._pending is not None
            or self.state != FLOWING
            or other is None
            or other.state != FLOWING
            or other.sent_end
            or other.tunnel is None
        ):
            return
        other.sent_end = True
        other.tunnel.h2.end_stream(other.stream_id)
        other.tunnel.reactor.dirty.add(other.tunnel)
        if self.sent_end:
            self.owner.legs_finished()

    # Ends.

    def hand_over(self, stream: AppStream) -> None:
        """Let an endpoint's socket have the stream, with what has come on it."""
        tunnel, pending = self.tunnel, self._pending
        if tunnel is None:
            return
        self.state = OVER
        self.tunnel = self._pending = None
        stream.bind(tunnel, self.stream_id)
        if pending is not None:
            tunnel.context.buffers.forget(self)
            stream.peer_data(memoryview(pending), self._credit)
        if self.received_end:
            stream.peer_end()

    def fail(self, error: ProxyError) -> None:
        """End the connection, as its buffers' limit demands."""
        self.owner.leg_lost(self, error)

    def close(self, reset: bool) -> None:
        """Leave the tunnel; with `reset` its peer is told that the connection broke."""
        if self.state == OVER:
            return
        self.state = OVER
        tunnel = self.tunnel
        if tunnel is None:
            return
        if self._pending is not None:
            self._pending = None
            tunnel.context.buffers.forget(self)
        if reset and self.stream_id:
            tunnel.h2.reset_stream(self.stream_id, CONNECT_ERROR)
        tunnel.forget(self)
        self.tunnel = None
