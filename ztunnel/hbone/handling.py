"""What each frame other than DATA does to a connection (RFC 9113, 6), once all of it is there.

Handlers raise ConnectionViolation or StreamViolation for what the peer does wrong; `Receiver` turns them into
events and into GOAWAY or RST_STREAM.
"""

from collections.abc import Callable
from typing import TypeVar

from ztunnel.hbone import frames
from ztunnel.hbone.allowance import Allowance
from ztunnel.hbone.config import Config, Role
from ztunnel.hbone.core import DRAIN_PING, Core
from ztunnel.hbone.errors import ConnectionViolation, ErrorCode, StreamViolation
from ztunnel.hbone.events import (
    ConnectRequested,
    Event,
    GoAwayReceived,
    PingAcknowledged,
    ResponseReceived,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    WindowOpened,
)
from ztunnel.hbone.frames import MAX_STREAM_ID, MAX_WINDOW, FrameType, Setting
from ztunnel.hbone.headers import (
    REQUEST_HEADER_FIELDS_TOO_LARGE,
    Fields,
    Malformed,
    Request,
    TooLarge,
    parse_nothing,
    parse_request,
    parse_response,
    parse_trailers,
)
from ztunnel.hbone.states import (
    AFTER_END,
    AFTER_HEADERS,
    ON_CLOSED,
    TRANSITIONS,
    VIOLATIONS,
    Closed,
    Reaction,
    Side,
    Signal,
)
from ztunnel.hbone.stream import Stream

T = TypeVar("T")

# The attribute of an enumeration costs 40 ns at each use; these are used for every stream.
_SIDE_HEADERS = Side.HEADERS
_SIDE_DATA = Side.DATA
_SIDE_ENDED = Side.ENDED
_CLOSED_ENDED = Closed.ENDED

KEPT_DEBUG = 1024
"""How much of a GOAWAY's debug data is kept; the rest is skipped."""

_ODD_HEADERS = frames.FLAG_PADDED | frames.FLAG_PRIORITY

SHORT_HEADERS = 512
"""Bytes of a HEADERS frame that fits any `Config.max_header_list_size` (256 at least, see `_kept`)."""

READY = 0
"""Any frame may come. The other phases: what must come next."""
AWAIT_PREFACE = 1
AWAIT_SETTINGS = 2
AWAIT_CONTINUATION = 3


class Handlers(Core):
    """One method a frame type, found through `_HANDLERS`."""

    __slots__ = ("_block", "_block_end_stream", "_block_frames", "_block_stream", "_phase")

    def __init__(self, role: Role, config: Config, allowance: Allowance | None) -> None:
        super().__init__(role, config, allowance)
        self._phase = AWAIT_SETTINGS if self._is_client else AWAIT_PREFACE
        # A field block that waits for its CONTINUATION frames (6.10).
        self._block = bytearray()
        self._block_stream = 0
        self._block_end_stream = False
        self._block_frames = 0

    def _check_order(self, kind: int, flags: int, stream_id: int) -> None:
        """Whether this frame may come now, seen from its header alone. Raises ConnectionViolation."""
        if self._phase == AWAIT_SETTINGS:
            if kind != FrameType.SETTINGS or flags & frames.FLAG_ACK:  # 3.4
                reason = "the first frame is not SETTINGS: the peer does not speak HTTP/2"
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, reason)
        elif kind != FrameType.CONTINUATION or stream_id != self._block_stream:  # 6.10
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "field block not continued")

    def _kept(self, kind: int, length: int) -> int:
        """How many of a frame's payload bytes its handler wants; the rest is skipped. Raises ConnectionViolation.

        Called as soon as the frame's header is there, so that nothing too large is ever collected.
        """
        if length > self._config.max_frame_size:  # 4.2
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, f"frame of {length} bytes")
        if kind in (FrameType.HEADERS, FrameType.CONTINUATION):
            # Padding and priority come on top of the block: 1 + 255 + 5 bytes.
            if len(self._block) + length > self._config.max_header_list_size + 261:
                raise ConnectionViolation(ErrorCode.ENHANCE_YOUR_CALM, "field block too large")
            return length
        if kind == FrameType.SETTINGS:
            if length > 6 * self._config.max_settings:
                raise ConnectionViolation(ErrorCode.ENHANCE_YOUR_CALM, "too many values in SETTINGS")
            return length
        if kind == FrameType.GOAWAY:
            return min(length, 8 + KEPT_DEBUG)
        # The others have a fixed size, which the handler checks; unknown types are of no interest (4.1).
        return min(length, 9) if kind in _HANDLERS else 0

    def _on_frame(self, kind: int, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        handler = _HANDLERS.get(kind)
        if handler is None:
            self._wasted.waste()  # 4.1: ignored
        else:
            handler(self, flags, stream_id, payload, events)

    # Which stream is it

    def _is_idle(self, stream_id: int) -> bool:
        """Whether nobody ever opened this stream (5.1, idle). Only odd streams exist: nothing is ever pushed."""
        if not stream_id & 1:
            return True
        return stream_id >= self._next_id if self._is_client else stream_id > self._last_peer_id

    def _how_closed(self, stream_id: int) -> Closed:
        how = self._closed_streams.get(stream_id)
        return how or (Closed.FORGOTTEN if self._is_client else Closed.PASSED_OVER)

    def _require_stream(self, stream_id: int, name: str) -> Stream | None:
        """The stream, or None if it is closed. Raises ConnectionViolation for stream 0 and idle ones."""
        stream = self._streams.get(stream_id)
        if stream is None:
            if stream_id == 0:
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"{name} on stream 0")
            if self._is_idle(stream_id):
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"{name} on idle stream {stream_id}")
        return stream

    def _on_closed(self, stream_id: int, kind: FrameType, size: int = 0) -> None:
        """A frame with `size` bytes of flow-controlled payload on a closed stream: see `states.ON_CLOSED`."""
        how = self._how_closed(stream_id)
        reaction, code = ON_CLOSED[how, kind]
        if reaction is Reaction.IGNORE:
            # A window full of small frames may be on its way when we reset a stream: no waste, and no more than
            # that, since nobody gives credit to a stream that is gone.
            if not size:
                self._wasted.waste()
            elif not self._closed_streams.spend(stream_id, size):
                raise ConnectionViolation(
                    ErrorCode.FLOW_CONTROL_ERROR,
                    f"DATA beyond the window of stream {stream_id}, which was reset",
                )
            return
        self._wasted.waste()
        reason = f"{kind.name} on stream {stream_id}, which closed before ({how.value})"
        if reaction is Reaction.STREAM_ERROR:
            raise StreamViolation(stream_id, code, reason)
        raise ConnectionViolation(code, reason)

    def _advance(self, stream: Stream, signal: Signal) -> None:
        """The peer's direction makes a transition. Raises StreamViolation."""
        key = (stream.receiving, signal)
        to = TRANSITIONS.get(key)
        if to is None:
            code = VIOLATIONS.get(key, ErrorCode.PROTOCOL_ERROR)
            where = (
                "after END_STREAM" if stream.receiving is Side.ENDED else f"in state {stream.receiving.name}"
            )
            raise StreamViolation(stream.stream_id, code, f"{signal.value} {where}")
        stream.receiving = to

    def _peer_ended(self, stream: Stream, events: list[Event]) -> None:
        if stream.receiving is _SIDE_DATA:
            stream.receiving = AFTER_END
        else:
            self._advance(stream, Signal.END_STREAM)
        events.append(StreamEnded(stream.stream_id))
        if stream.sending is _SIDE_ENDED:
            self._retire(stream.stream_id, _CLOSED_ENDED)

    # Field blocks: HEADERS, CONTINUATION

    def _short_headers(self, flags: int, stream_id: int, block: bytes, events: list[Event]) -> None:
        """HEADERS that are whole, where any frame may come: what nearly all requests and answers are."""
        try:
            if flags & _ODD_HEADERS:
                self._headers(flags, stream_id, block, events)
            elif self._is_client:
                stream = self._streams.get(stream_id)
                if stream is not None and stream.receiving is _SIDE_HEADERS:
                    self._on_response(stream, block, bool(flags & frames.FLAG_END_STREAM), events)
                else:
                    self._headers(flags, stream_id, block, events)
            elif stream_id & 1 and stream_id > self._last_peer_id:
                self._on_request(stream_id, block, bool(flags & frames.FLAG_END_STREAM), events)
            else:
                self._headers(flags, stream_id, block, events)
        except StreamViolation as violation:
            self._stream_error(violation.stream_id, violation.code, violation.reason, events)

    def _headers(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if not stream_id & 1:
            # 5.1.1: clients use odd streams, and a server that may not push opens none.
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        if self._is_client and self._is_idle(stream_id):
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"HEADERS on idle stream {stream_id}")
        block = frames.strip_headers_payload(flags, payload)
        end_stream = bool(flags & frames.FLAG_END_STREAM)
        if flags & frames.FLAG_END_HEADERS:
            self._on_block(stream_id, block, end_stream, events)
            return
        self._phase = AWAIT_CONTINUATION
        self._block += block
        self._block_stream = stream_id
        self._block_end_stream = end_stream
        self._block_frames = 0

    def _continuation(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if self._phase != AWAIT_CONTINUATION:
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._block += payload
        self._block_frames += 1
        if self._block_frames > self._config.max_continuations:
            raise ConnectionViolation(ErrorCode.ENHANCE_YOUR_CALM, "too many CONTINUATION frames")
        if not payload:
            self._wasted.waste()
        if flags & frames.FLAG_END_HEADERS:
            block = bytes(self._block)
            self._block.clear()
            self._phase = READY
            self._on_block(stream_id, block, self._block_end_stream, events)

    def _on_block(self, stream_id: int, block: bytes, end_stream: bool, events: list[Event]) -> None:
        """A whole field block. It is decoded whatever comes of the stream, to keep the decoder's state (4.3)."""
        stream = self._streams.get(stream_id)
        if stream is None:
            if not self._is_client and stream_id > self._last_peer_id:
                self._on_request(stream_id, block, end_stream, events)
                return
            self._decode(stream_id, block, parse_nothing)
            self._on_closed(stream_id, FrameType.HEADERS)
        elif self._is_client and stream.receiving is _SIDE_HEADERS:
            self._on_response(stream, block, end_stream, events)
        else:
            self._decode(stream_id, block, parse_trailers if stream.receiving is Side.DATA else parse_nothing)
            self._advance(stream, Signal.HEADERS_IN_TUNNEL if stream.connected else Signal.TRAILERS)
            if not end_stream:
                raise StreamViolation(
                    stream_id, ErrorCode.PROTOCOL_ERROR, "trailers without END_STREAM"
                )  # 8.1
            self._peer_ended(stream, events)

    def _decode(self, stream_id: int, block: bytes, parse: Callable[[Fields], T]) -> T:
        try:
            return self._decoder.decode(block, parse)
        except (Malformed, TooLarge) as error:  # 8.1.1
            raise StreamViolation(stream_id, ErrorCode.PROTOCOL_ERROR, str(error)) from None

    def _on_request(self, stream_id: int, block: bytes, end_stream: bool, events: list[Event]) -> None:
        self._last_peer_id = stream_id
        try:
            request = self._decoder.decode(block, parse_request)
        except TooLarge:
            request = Request("", (), REQUEST_HEADER_FIELDS_TOO_LARGE)
            self._wasted_streams.waste()
        except Malformed as error:
            raise StreamViolation(stream_id, ErrorCode.PROTOCOL_ERROR, str(error)) from None
        if self._goaway_last is not None:
            raise StreamViolation(stream_id, ErrorCode.REFUSED_STREAM, "after GOAWAY")  # 6.8
        if request.refusal:
            self._refuse(stream_id, request.refusal, end_stream)
            return
        if len(self._streams) >= self._config.max_concurrent_streams:  # 5.1.2
            raise StreamViolation(stream_id, ErrorCode.REFUSED_STREAM, "too many streams")
        stream = self._add_stream(stream_id)
        stream.receiving = AFTER_HEADERS
        events.append(ConnectRequested(stream_id, request.authority, request.headers))
        if end_stream:
            self._peer_ended(stream, events)

    def _refuse(self, stream_id: int, status: int, end_stream: bool) -> None:
        """Answer a request that never becomes a stream of the caller's. No event."""
        headers = (("allow", "CONNECT"),) if status == 405 else ()
        block = self._encoder.response(status, headers)
        self._reply(frames.header_block(stream_id, block, self._peer_max_frame, end_stream=True))
        if end_stream:
            self._retire(stream_id, Closed.ENDED)
        else:
            # 8.1: a complete answer, then RST_STREAM(NO_ERROR) asks the client to stop its request's content.
            self._reply(frames.rst_stream(stream_id, ErrorCode.NO_ERROR))
            self._retire(stream_id, Closed.RESET_BY_US)

    def _on_response(self, stream: Stream, block: bytes, end_stream: bool, events: list[Event]) -> None:
        response = self._decode(stream.stream_id, block, parse_response)
        if response.status < 200:
            if end_stream:  # 8.1
                raise StreamViolation(
                    stream.stream_id, ErrorCode.PROTOCOL_ERROR, f"status {response.status} with END_STREAM"
                )
            self._advance(stream, Signal.INFORMATIONAL)
            self._wasted.waste()
            return
        stream.receiving = AFTER_HEADERS  # nothing was received before
        stream.connected = response.status < 300
        self._wasted_streams.pay(1)
        events.append(ResponseReceived(stream.stream_id, response.status, response.headers))
        if end_stream:
            self._peer_ended(stream, events)

    # The other frames about one stream

    def _priority(self, _flags: int, stream_id: int, payload: bytes, _events: list[Event]) -> None:
        """Ignored (5.3.2), but for its form (6.3)."""
        self._wasted.waste()
        if stream_id == 0:
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            reason = f"PRIORITY of {len(payload)} bytes"
            if stream_id in self._streams:
                raise StreamViolation(stream_id, ErrorCode.FRAME_SIZE_ERROR, reason)
            # No RST_STREAM may be sent on an idle stream (6.4), and a closed one needs none.
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, reason)

    def _rst_stream(self, _flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, f"RST_STREAM of {len(payload)} bytes")
        stream = self._require_stream(stream_id, "RST_STREAM")
        if stream is None:
            self._wasted.waste()
            return
        self._retire(stream_id, Closed.RESET_BY_PEER)
        events.append(StreamReset(stream_id, int.from_bytes(payload, "big"), remote=True))
        if stream.sending is Side.HEADERS:
            self._wasted_streams.waste()  # given up before it was answered: rapid reset (CVE-2023-44487)

    def _window_update(self, _flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        self._wasted.waste()
        if len(payload) != 4:
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, f"WINDOW_UPDATE of {len(payload)} bytes")
        increment = int.from_bytes(payload, "big") & MAX_WINDOW
        if stream_id == 0:
            if increment == 0:
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            before = self._send_window
            self._send_window = before + increment
            if self._send_window > MAX_WINDOW:  # 6.9.1
                raise ConnectionViolation(ErrorCode.FLOW_CONTROL_ERROR, "connection window above 2^31-1")
            if before <= 0:  # it never becomes negative: no setting shrinks it
                events.append(WindowOpened(0))
            return
        stream = self._require_stream(stream_id, "WINDOW_UPDATE")
        if stream is None:
            return
        if increment == 0:
            raise StreamViolation(stream_id, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        before = stream.send_window
        stream.send_window = before + increment
        if stream.send_window > MAX_WINDOW:
            raise StreamViolation(stream_id, ErrorCode.FLOW_CONTROL_ERROR, "stream window above 2^31-1")
        if before <= 0 < stream.send_window and self._send_window > 0 and stream.sending is Side.DATA:
            events.append(WindowOpened(stream_id))

    # Frames about the connection

    def _settings(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if stream_id:
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"SETTINGS on stream {stream_id}")
        if flags & frames.FLAG_ACK:
            self._settings_ack(payload)
            return
        if len(payload) % 6:
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
        self._phase = READY
        values = frames.parse_settings(payload)
        self._wasted.waste(1 + len(values))
        opened = False
        for identifier, value in values:  # in order (6.5.3)
            opened |= self._apply(identifier, value)
        self._reply(frames.SETTINGS_ACK)
        events.append(SettingsReceived(self._peer_max_streams))
        if opened and self._send_window > 0:
            events.append(WindowOpened(0))

    def _settings_ack(self, payload: bytes) -> None:
        if payload:
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS with ACK and a payload")
        if self._settings_acknowledged:  # we send SETTINGS once
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "SETTINGS acknowledged that were not sent")
        self._settings_acknowledged = True
        self._decoder.forbid_table()
        shift = self._config.initial_window_size - self._enforced_window
        self._enforced_window += shift
        for stream in self._streams.values():
            stream.window += shift

    def _apply(self, identifier: int, value: int) -> bool:
        """One value of SETTINGS (6.5.2). Returns whether the window of some stream opened."""
        if identifier == Setting.INITIAL_WINDOW_SIZE:
            if value > MAX_WINDOW:
                raise ConnectionViolation(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE {value}")
            return self._shift_send_windows(value)
        if identifier == Setting.MAX_FRAME_SIZE:
            if not frames.MIN_MAX_FRAME <= value <= frames.MAX_MAX_FRAME:
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE {value}")
            self._peer_max_frame = value
        elif identifier == Setting.MAX_CONCURRENT_STREAMS:
            self._peer_max_streams = value
        elif identifier == Setting.ENABLE_PUSH:
            if value > 1 or (value and self._is_client):
                raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")
        elif identifier == Setting.ENABLE_CONNECT_PROTOCOL and value > 1:  # RFC 8441, 3
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"ENABLE_CONNECT_PROTOCOL {value}")
        # HEADER_TABLE_SIZE: we use no table. MAX_HEADER_LIST_SIZE: advice. Unknown ones: ignored (6.5.2).
        return False

    def _shift_send_windows(self, value: int) -> bool:
        """A new initial window changes those of all streams, perhaps below zero (6.9.2)."""
        shift = value - self._peer_initial_window
        self._peer_initial_window = value
        opened = False
        for stream in self._streams.values():
            before = stream.send_window
            stream.send_window = before + shift
            if stream.send_window > MAX_WINDOW:
                raise ConnectionViolation(
                    ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE {value} overflows a stream's window"
                )
            opened |= before <= 0 < stream.send_window and stream.sending is Side.DATA
        return opened

    def _push_promise(self, _flags: int, _stream_id: int, _payload: bytes, _events: list[Event]) -> None:
        # 8.4: a client cannot push, and we as a client sent ENABLE_PUSH 0; a CONNECT has nothing to push anyway.
        raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE")

    def _ping(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if stream_id:
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"PING on stream {stream_id}")
        if len(payload) != 8:
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
        self._wasted.waste()
        if not flags & frames.FLAG_ACK:
            self._reply(frames.ping(payload, ack=True))
            return
        count = self._pings.pop(payload, 0)
        if count > 1:
            self._pings[payload] = count - 1
        if payload == DRAIN_PING and self._draining:
            # Every stream that the client opened before it read our first GOAWAY has arrived (6.8).
            self._queue_final_goaway(ErrorCode.NO_ERROR, b"")
        elif count:
            events.append(PingAcknowledged(payload))

    def _goaway(self, _flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if stream_id:
            raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, f"GOAWAY on stream {stream_id}")
        if len(payload) < 8:
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, f"GOAWAY of {len(payload)} bytes")
        self._wasted.waste()
        last, code = frames.parse_pair(payload)
        if last > (MAX_STREAM_ID if self._peer_goaway_last is None else self._peer_goaway_last):  # 6.8
            raise ConnectionViolation(
                ErrorCode.PROTOCOL_ERROR, "GOAWAY with a higher last stream than before"
            )
        self._peer_goaway_last = last
        events.append(GoAwayReceived(last, code, payload[8:]))
        if self._is_client:  # a client's GOAWAY is about the streams that we, its server, never open
            for unprocessed in [number for number in self._streams if number > last]:
                self._retire(unprocessed, Closed.RESET_BY_US)
                events.append(StreamReset(unprocessed, ErrorCode.REFUSED_STREAM, remote=True))


# Functions, not a connection's bound methods: those would keep it alive until the garbage collector comes by.
_HANDLERS: dict[int, Callable[[Handlers, int, int, bytes, list[Event]], None]] = {
    FrameType.HEADERS: Handlers._headers,
    FrameType.PRIORITY: Handlers._priority,
    FrameType.RST_STREAM: Handlers._rst_stream,
    FrameType.SETTINGS: Handlers._settings,
    FrameType.PUSH_PROMISE: Handlers._push_promise,
    FrameType.PING: Handlers._ping,
    FrameType.GOAWAY: Handlers._goaway,
    FrameType.WINDOW_UPDATE: Handlers._window_update,
    FrameType.CONTINUATION: Handlers._continuation,
}
