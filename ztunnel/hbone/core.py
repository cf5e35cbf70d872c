"""What the receiving and the sending half of a connection share: streams, windows, the output queue, how things end."""

from ztunnel.hbone import frames
from ztunnel.hbone.allowance import Allowance
from ztunnel.hbone.config import Config, Role
from ztunnel.hbone.errors import ConnectionViolation, ErrorCode
from ztunnel.hbone.events import ConnectionFailed, Event, StreamReset
from ztunnel.hbone.flood import Bucket
from ztunnel.hbone.frames import Setting
from ztunnel.hbone.headers import HeaderDecoder, HeaderEncoder
from ztunnel.hbone.states import Closed, ClosedStreams
from ztunnel.hbone.stream import Stream

DRAIN_PING = b"draining"
"""Payload of the PING that separates the two GOAWAYs of a graceful shutdown (6.8); not for the caller's pings."""


class Core:
    """State of a connection. Subclasses: `Receiver` (bytes in, events out), `Connection` (the whole)."""

    __slots__ = (
        "_allowance",
        "_closed_streams",
        "_config",
        "_current",
        "_decoder",
        "_draining",
        "_encoder",
        "_enforced_window",
        "_failed",
        "_goaway_last",
        "_is_client",
        "_last_peer_id",
        "_next_id",
        "_output",
        "_peer_goaway_last",
        "_peer_initial_window",
        "_peer_max_frame",
        "_peer_max_streams",
        "_pings",
        "_replies",
        "_room",
        "_room_low",
        "_send_window",
        "_settings_acknowledged",
        "_streams",
        "_update_at",
        "_wasted",
        "_wasted_streams",
    )

    def __init__(self, role: Role, config: Config, allowance: Allowance | None) -> None:
        self._config = config
        self._allowance = allowance
        self._is_client = role is Role.CLIENT
        self._streams: dict[int, Stream] = {}
        self._closed_streams = ClosedStreams(config.closed_streams)
        self._last_peer_id = 0  # the highest stream that the peer opened
        self._next_id = 1  # a client's next stream
        self._current: Stream | None = None  # whose DATA frame is being received
        self._failed = False

        # What the peer told us; until it does, the protocol's initial values (6.5.2). The number of streams has
        # no initial limit there: 100 is what RFC 9113 recommends as the least that a peer should allow.
        self._peer_initial_window = frames.DEFAULT_WINDOW
        self._peer_max_frame = frames.MIN_MAX_FRAME
        self._peer_max_streams = 100
        self._send_window = frames.DEFAULT_WINDOW

        # What we told the peer. Until it acknowledges our SETTINGS it may use the protocol's initial window
        # where that is larger than ours (6.5.3, 6.9.2).
        self._settings_acknowledged = False
        self._enforced_window = max(config.initial_window_size, frames.DEFAULT_WINDOW)
        self._room = config.connection_window  # what the peer may still send on all streams
        self._room_low = config.connection_window // 2

        self._update_at = max(1, config.initial_window_size // 2)  # consumed bytes worth a WINDOW_UPDATE

        self._goaway_last: int | None = None  # from our final GOAWAY
        self._peer_goaway_last: int | None = None
        self._draining = False  # the first of two GOAWAYs is out
        self._pings: dict[bytes, int] = {}

        self._decoder = HeaderDecoder(config.max_header_list_size)
        self._encoder = HeaderEncoder()
        self._wasted = Bucket(config.max_wasted_frames, "frames that carry nothing")
        self._wasted_streams = Bucket(config.max_wasted_streams, "streams given up or wrong")
        self._replies = 0
        self._output: list[bytes] = []

        values = [
            (Setting.HEADER_TABLE_SIZE, 0),
            (Setting.INITIAL_WINDOW_SIZE, config.initial_window_size),
            (Setting.MAX_FRAME_SIZE, config.max_frame_size),
            (Setting.MAX_HEADER_LIST_SIZE, config.max_header_list_size),
        ]
        if self._is_client:
            self._output.append(frames.PREFACE)
            values.append((Setting.ENABLE_PUSH, 0))
        else:
            values.append((Setting.MAX_CONCURRENT_STREAMS, config.max_concurrent_streams))
        self._output.append(frames.settings(values))
        if config.connection_window > frames.DEFAULT_WINDOW:
            # The connection's window is not a setting (6.9.2).
            self._output.append(frames.window_update(0, config.connection_window - frames.DEFAULT_WINDOW))

    def _reply(self, frame: bytes) -> None:
        """Queue what the peer made us send. A peer that never reads must not make us remember without bound."""
        self._output.append(frame)
        self._replies += 1
        if self._replies > self._config.max_queued_replies:
            raise ConnectionViolation(ErrorCode.ENHANCE_YOUR_CALM, "too many replies wait to be sent")

    def _add_stream(self, stream_id: int) -> Stream:
        stream = Stream(stream_id, self._enforced_window, self._peer_initial_window, self._update_at)
        self._streams[stream_id] = stream
        return stream

    def _retire(self, stream_id: int, how: Closed) -> None:
        """Forget a stream, remember how it closed."""
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            if self._current is stream:
                self._current = None  # what is left of its DATA frame will be discarded
            if stream.extra and self._allowance is not None:
                self._allowance.give(stream.extra)
        # What never became a stream (refused) had a whole window.
        window = self._enforced_window if stream is None else stream.window
        self._closed_streams.remember(stream_id, how, window)

    def _stream_error(self, stream_id: int, code: ErrorCode, reason: str, events: list[Event]) -> None:
        """End a stream for the peer's mistake (5.4.2)."""
        known = stream_id in self._streams
        self._retire(stream_id, Closed.RESET_BY_US)
        if known:
            events.append(StreamReset(stream_id, code, remote=False, reason=reason))
        self._reply(frames.rst_stream(stream_id, code))
        # Resets that the peer provokes cost as much as those it sends (CVE-2025-8671).
        self._wasted_streams.waste()

    def _abandon(self) -> None:
        """No stream goes on."""
        if self._allowance is not None:
            for stream in self._streams.values():
                self._allowance.give(stream.extra)
        self._streams.clear()
        self._current = None

    def _fail(self, code: ErrorCode, reason: str, events: list[Event]) -> None:
        """End the connection for the peer's mistake (5.4.1)."""
        self._failed = True
        self._abandon()
        last = self._last_peer_id if self._goaway_last is None else self._goaway_last
        self._output.append(frames.goaway(last, code, reason.encode("ascii", "replace")[:256]))
        events.append(ConnectionFailed(code, reason))

    def _queue_final_goaway(self, code: int, debug: bytes) -> None:
        self._goaway_last = self._last_peer_id
        self._draining = False
        self._output.append(frames.goaway(self._last_peer_id, code, debug))
