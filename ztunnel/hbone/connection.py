"""One HTTP/2 connection that carries CONNECT tunnels: bytes in, events out, bytes to send. No socket, no clock.

What the codec does with an ordinary request: it answers 405 by itself, and a request whose fields exceed
`Config.max_header_list_size` with 431; a malformed one gets RST_STREAM(PROTOCOL_ERROR). None of them is reported.
"""

from collections.abc import Sequence

from ztunnel.hbone import frames
from ztunnel.hbone.allowance import Allowance
from ztunnel.hbone.config import Config, Role
from ztunnel.hbone.core import DRAIN_PING
from ztunnel.hbone.errors import CannotOpen, ErrorCode, LocalError
from ztunnel.hbone.flood import FRAMES_PER_DATA
from ztunnel.hbone.frames import HEAD_SIZE, MAX_STREAM_ID
from ztunnel.hbone.receiving import Receiver
from ztunnel.hbone.states import AFTER_END, AFTER_HEADERS, Closed, Side
from ztunnel.hbone.stream import Stream

_pack_head = frames.HEAD.pack_into
# See receiving.py.
_SIDE_HEADERS = Side.HEADERS
_SIDE_DATA = Side.DATA
_SIDE_ENDED = Side.ENDED
_CLOSED_ENDED = Closed.ENDED


class Connection(Receiver):
    """The codec of one connection, either end (RFC 9113).

    Preface and SETTINGS are queued at once: send `data_to_send()` first. After each `receive`, and each call that
    queues something, send what `data_to_send()` returns, in order; do not take it while the socket is blocked,
    so that the codec notices a peer that never reads its answers.

    Methods on a stream that is gone (reset by either side, perhaps by an event not looked at yet) do nothing,
    except those that send payload, which raise: `sendable` is 0 then. LocalError: the caller's own mistake.
    """

    __slots__ = ()

    def __init__(self, role: Role, config: Config | None = None, allowance: Allowance | None = None) -> None:
        """`allowance` bounds how far the streams' windows grow (`Config.widest_window`); without, they do not."""
        super().__init__(role, config or Config(), allowance)

    # What is going on

    @property
    def open_streams(self) -> int:
        """How many streams are not closed."""
        return len(self._streams)

    @property
    def can_open(self) -> bool:
        """Whether `open_stream` would succeed now."""
        return (
            self._is_client
            and not self._failed
            and self._peer_goaway_last is None
            and self._goaway_last is None
            and len(self._streams) < self._peer_max_streams
            and self._next_id <= MAX_STREAM_ID
        )

    @property
    def closed(self) -> bool:
        """Whether nothing more will happen: it failed, or it was told to go away (either way) and no stream is left.

        Send what `data_to_send` still holds, then close the transport.
        """
        if self._failed:
            return True
        going = self._goaway_last is not None or self._peer_goaway_last is not None
        return going and not self._streams

    @property
    def settings_acknowledged(self) -> bool:
        """Whether the peer acknowledged our SETTINGS. A caller with a clock may give up with SETTINGS_TIMEOUT."""
        return self._settings_acknowledged

    @property
    def has_output(self) -> bool:
        """Whether `data_to_send` would return anything."""
        return bool(self._output)

    def data_to_send(self) -> bytes:
        """What is queued for the peer, exactly once."""
        output = self._output
        if not output:
            return b""
        data = output[0] if len(output) == 1 else b"".join(output)
        output.clear()
        self._replies = 0
        return data

    # Streams

    def open_stream(self, authority: str, headers: Sequence[tuple[str, str]] = ()) -> int:
        """Client: ask for a tunnel to `authority` ("host:port"). Returns the stream's id.

        Raises CannotOpen when `can_open` is false, LocalError for fields that may not be sent.
        """
        if not self.can_open:
            raise CannotOpen("no stream can be opened on this connection now: check can_open first")
        block = self._encoder.request(authority, headers)
        stream_id = self._next_id
        self._next_id += 2
        stream = self._add_stream(stream_id)
        stream.sending = AFTER_HEADERS
        self._output.append(frames.header_block(stream_id, block, self._peer_max_frame, end_stream=False))
        return stream_id

    def respond(
        self, stream_id: int, status: int, headers: Sequence[tuple[str, str]] = (), end_stream: bool = False
    ) -> None:
        """Server: answer a CONNECT; 2xx opens the tunnel. Raises LocalError if it was answered already."""
        if self._is_client:
            raise LocalError("respond is for servers")
        stream = self._streams.get(stream_id) or self._own(stream_id)
        if stream is None:
            return
        if stream.sending is not _SIDE_HEADERS:
            raise LocalError(f"stream {stream_id} was answered already")
        block = self._encoder.response(status, headers)
        stream.sending = AFTER_HEADERS
        stream.connected = status < 300
        self._wasted_streams.pay(1)
        self._output.append(
            frames.header_block(stream_id, block, self._peer_max_frame, end_stream=end_stream)
        )
        if end_stream:
            self._end(stream)

    def sendable(self, stream_id: int) -> int:
        """How many bytes of DATA one frame on this stream may carry now; 0 waits for WindowOpened."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.sending is not _SIDE_DATA:
            return 0
        room = stream.send_window
        if self._send_window < room:
            room = self._send_window
        if self._peer_max_frame < room:
            room = self._peer_max_frame
        return room if room > 0 else 0

    def frame_data(
        self, stream_id: int, buffer: bytearray | memoryview, size: int, end_stream: bool = False
    ) -> None:
        """Make `buffer[:9 + size]` a DATA frame around the payload that already lies at `buffer[9:9 + size]`.

        The hot path of sending: nothing is copied or queued. The caller sends those bytes itself, after what
        `data_to_send` returned before. Raises LocalError when the stream may not send, or not `size` bytes
        (`sendable`); a size of 0 is always allowed.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.sending is not _SIDE_DATA:
            raise LocalError(f"stream {stream_id} may not send DATA (now): check sendable first")
        if (size > stream.send_window or size > self._send_window or size > self._peer_max_frame) and size:
            raise LocalError(
                f"stream {stream_id} may not send {size} bytes: sendable is {self.sendable(stream_id)}"
            )
        stream.send_window -= size
        self._send_window -= size
        self._wasted.level -= FRAMES_PER_DATA
        if end_stream:
            _pack_head(buffer, 0, size << 8, frames.FLAG_END_STREAM, stream_id)
            self._end(stream)
        else:
            _pack_head(buffer, 0, size << 8, 0, stream_id)

    def send_data(
        self, stream_id: int, data: bytes | bytearray | memoryview, end_stream: bool = False
    ) -> None:
        """Queue `data`, copied, in as many frames as the peer's frame size demands.

        Raises LocalError when the windows do not allow all of it.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.sending is not _SIDE_DATA:
            raise LocalError(f"stream {stream_id} may not send DATA (now): check sendable first")
        size = len(data)
        if size and (size > stream.send_window or size > self._send_window):
            raise LocalError(f"stream {stream_id} may not send {size} bytes: the window is smaller")
        view = memoryview(data)
        for start in range(0, size, self._peer_max_frame):
            piece = view[start : start + self._peer_max_frame]
            frame = bytearray(HEAD_SIZE + len(piece))
            frame[HEAD_SIZE:] = piece
            self.frame_data(stream_id, frame, len(piece), end_stream and start + len(piece) == size)
            self._output.append(bytes(frame))
        if not size and end_stream:
            self.end_stream(stream_id)

    def end_stream(self, stream_id: int) -> None:
        """Send no more on this stream (END_STREAM), while the peer still may.

        Raises LocalError if that was done before, or the CONNECT is not answered yet.
        """
        stream = self._streams.get(stream_id) or self._own(stream_id)
        if stream is None:
            return
        if stream.sending is not _SIDE_DATA:
            raise LocalError(
                f"stream {stream_id}: its sending side is in state {stream.sending.name}, not DATA"
            )
        self._output.append(frames.end_stream(stream_id))
        self._end(stream)

    def reset_stream(self, stream_id: int, code: int = ErrorCode.CANCEL) -> None:
        """Abort a stream both ways (RST_STREAM). No event follows for it."""
        if self._own(stream_id) is None:
            return
        self._retire(stream_id, Closed.RESET_BY_US)
        self._output.append(frames.rst_stream(stream_id, code))

    def acknowledge(self, stream_id: int, size: int, prompt: bool = False) -> None:
        """`size` bytes that DataReceived gave were consumed: the peer may send as many again.

        `prompt`: they came in bulk and were consumed at once; the window may grow (`Config.widest_window`).
        Raises LocalError for more than was received.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if stream.window + stream.credit + size > self._enforced_window + stream.extra:
            raise LocalError(f"stream {stream_id}: {size} bytes acknowledged, more than were received")
        self._give_back(stream, size, prompt)

    # The connection

    def abandon(self) -> None:
        """The transport is gone: give back what the streams held of the allowance. Nothing more may be called."""
        self._failed = True
        self._abandon()

    def ping(self, payload: bytes) -> None:
        """Send a PING; PingAcknowledged follows. `payload` is 8 bytes.

        Raises LocalError for other sizes, and when `Config.max_pings` wait for their answer.
        """
        if len(payload) != 8 or payload == DRAIN_PING:
            raise LocalError(f"ping payload {payload!r}: must be 8 bytes, other than {DRAIN_PING!r}")
        if sum(self._pings.values()) >= self._config.max_pings:
            raise LocalError(f"{self._config.max_pings} pings wait for their answer: the peer is stuck")
        if self._failed:
            return
        self._pings[payload] = self._pings.get(payload, 0) + 1
        self._output.append(frames.ping(payload))

    def go_away(self, code: int = ErrorCode.NO_ERROR, *, graceful: bool = False, debug: bytes = b"") -> None:
        """Take (server) or open (client) no new streams; those that are open go on (6.8).

        `graceful`, for servers: first announce it, and go on taking streams for the round trip in which the
        client learns of it, so that none is lost; the second GOAWAY follows by itself. `code` is then NO_ERROR.
        """
        if self._failed or self._goaway_last is not None:
            return
        if not graceful or self._is_client:
            self._queue_final_goaway(code, debug)
        elif not self._draining:
            self._draining = True
            self._output.append(frames.goaway(MAX_STREAM_ID, ErrorCode.NO_ERROR, debug))
            self._output.append(frames.ping(DRAIN_PING))

    # Within

    def _own(self, stream_id: int) -> Stream | None:
        """The stream, None if it is gone. Raises LocalError for one that never was."""
        stream = self._streams.get(stream_id)
        if stream is None and not self._failed and (stream_id <= 0 or self._is_idle(stream_id)):
            raise LocalError(f"stream {stream_id} was never opened")
        return stream

    def _end(self, stream: Stream) -> None:
        """Our side, which is in state DATA, ends."""
        stream.sending = AFTER_END
        if stream.receiving is _SIDE_ENDED:
            self._retire(stream.stream_id, _CLOSED_ENDED)
