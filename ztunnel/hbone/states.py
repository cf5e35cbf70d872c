"""Every state of a stream and every transition, as data; everything that decides what may follow what is here.

A stream of RFC 9113, 5.1 is two directions that advance independently, so its states are pairs: `idle` is a
stream we do not hold, `open` is neither direction ENDED, `half-closed (local)` is the direction we send on
ENDED, `half-closed (remote)` the other, `closed` both; a closed stream leaves the table of streams and is
remembered for a while in `ClosedStreams`, with the way in which it closed.

The check for DATA in `receiving.py` and `connection.py` is written out there (`is Side.DATA`): it runs for each
frame. So are the transitions of a stream whose life is in order (`AFTER_HEADERS`, `AFTER_END`): a look into the
table takes 0.8 us, because each member of an enumeration is hashed by a method in Python.
"""

from enum import Enum, IntEnum

from ztunnel.hbone.errors import ErrorCode
from ztunnel.hbone.frames import FrameType


class Side(IntEnum):
    """One direction of a stream."""

    HEADERS = 0  # the header section is still to come
    DATA = 1  # bytes may flow
    ENDED = 2  # END_STREAM was seen


class Signal(Enum):
    """What happens in one direction."""

    INFORMATIONAL = "a 1xx response"
    HEADERS = "a header section"
    DATA = "DATA"
    TRAILERS = "a trailer section"
    HEADERS_IN_TUNNEL = "a header section on a connected stream"
    END_STREAM = "END_STREAM"


TRANSITIONS: dict[tuple[Side, Signal], Side] = {
    (Side.HEADERS, Signal.INFORMATIONAL): Side.HEADERS,
    (Side.HEADERS, Signal.HEADERS): Side.DATA,
    (Side.DATA, Signal.DATA): Side.DATA,
    (Side.DATA, Signal.TRAILERS): Side.DATA,  # they carry END_STREAM, which follows as its own signal
    (Side.DATA, Signal.END_STREAM): Side.ENDED,
}
"""Whatever is not here is a violation."""

AFTER_HEADERS = TRANSITIONS[Side.HEADERS, Signal.HEADERS]
AFTER_END = TRANSITIONS[Side.DATA, Signal.END_STREAM]

VIOLATIONS: dict[tuple[Side, Signal], ErrorCode] = {
    # DATA before the header section: malformed (8.1, 8.1.1).
    (Side.HEADERS, Signal.DATA): ErrorCode.PROTOCOL_ERROR,
    # 8.5: only DATA, RST_STREAM, WINDOW_UPDATE and PRIORITY on a connected stream; anything else is a stream error.
    (Side.DATA, Signal.HEADERS_IN_TUNNEL): ErrorCode.PROTOCOL_ERROR,
    # 5.1, half-closed (remote): a stream error of type STREAM_CLOSED.
    (Side.ENDED, Signal.DATA): ErrorCode.STREAM_CLOSED,
    (Side.ENDED, Signal.HEADERS): ErrorCode.STREAM_CLOSED,
    (Side.ENDED, Signal.TRAILERS): ErrorCode.STREAM_CLOSED,
    (Side.ENDED, Signal.HEADERS_IN_TUNNEL): ErrorCode.STREAM_CLOSED,
}
"""The stream error for a transition that the peer may not make; PROTOCOL_ERROR where nothing else is said."""


class Closed(Enum):
    """How a stream closed, which decides what a late frame means (5.1, closed)."""

    ENDED = "both sides sent END_STREAM"
    RESET_BY_US = "we sent RST_STREAM"
    RESET_BY_PEER = "the peer sent RST_STREAM"
    FORGOTTEN = "long ago"  # a client's own stream: it was certainly used
    PASSED_OVER = "long ago, or never used"  # a server cannot tell these apart (5.1.1)


class Reaction(Enum):
    """What to do about a frame on a closed stream."""

    IGNORE = "ignore"
    STREAM_ERROR = "stream error"
    CONNECTION_ERROR = "connection error"


ON_CLOSED: dict[tuple[Closed, FrameType], tuple[Reaction, ErrorCode]] = {
    # The peer sent it before it knew of our RST_STREAM.
    (Closed.RESET_BY_US, FrameType.DATA): (Reaction.IGNORE, ErrorCode.STREAM_CLOSED),
    (Closed.RESET_BY_US, FrameType.HEADERS): (Reaction.IGNORE, ErrorCode.STREAM_CLOSED),
    # The peer reset the stream and goes on with it.
    (Closed.RESET_BY_PEER, FrameType.DATA): (Reaction.STREAM_ERROR, ErrorCode.STREAM_CLOSED),
    (Closed.RESET_BY_PEER, FrameType.HEADERS): (Reaction.STREAM_ERROR, ErrorCode.STREAM_CLOSED),
    # The peer ended the stream and goes on with it: it has lost count.
    (Closed.ENDED, FrameType.DATA): (Reaction.CONNECTION_ERROR, ErrorCode.STREAM_CLOSED),
    (Closed.ENDED, FrameType.HEADERS): (Reaction.CONNECTION_ERROR, ErrorCode.STREAM_CLOSED),
    # 5.4.2: another RST_STREAM may be sent when frames arrive after more than a round trip.
    (Closed.FORGOTTEN, FrameType.DATA): (Reaction.STREAM_ERROR, ErrorCode.STREAM_CLOSED),
    (Closed.FORGOTTEN, FrameType.HEADERS): (Reaction.STREAM_ERROR, ErrorCode.STREAM_CLOSED),
    (Closed.PASSED_OVER, FrameType.DATA): (Reaction.STREAM_ERROR, ErrorCode.STREAM_CLOSED),
    # 5.1.1: a new stream's id must be greater than all before it.
    (Closed.PASSED_OVER, FrameType.HEADERS): (Reaction.CONNECTION_ERROR, ErrorCode.PROTOCOL_ERROR),
}
"""Frames that are not here (WINDOW_UPDATE, RST_STREAM, PRIORITY) are ignored on a closed stream."""


class ClosedStreams:
    """How the streams that closed lately did, in bounded memory: at least the last `limit`, at most twice as many.

    With each stream goes the window that its peer had left: what may still arrive after our reset. Two
    generations: when the young one is full it becomes the old one, so nothing is ever evicted one by one
    (deleting the oldest key of a dict again and again scans the holes that it leaves).
    """

    __slots__ = ("_limit", "_old", "_young")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._young: dict[int, tuple[Closed, int]] = {}
        self._old: dict[int, tuple[Closed, int]] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def remember(self, stream_id: int, how: Closed, window: int) -> None:
        """Note how a stream closed, with `window` bytes that the peer may have sent before it knew."""
        if len(self._young) >= self._limit:
            self._old = self._young
            self._young = {}
        self._young[stream_id] = how, window

    def get(self, stream_id: int) -> Closed | None:
        """How it closed; None when that was forgotten or never happened."""
        entry = self._young.get(stream_id) or self._old.get(stream_id)
        return entry and entry[0]

    def spend(self, stream_id: int, size: int) -> bool:
        """Late DATA of `size` bytes on a remembered stream: whether its window had room for it."""
        generation = self._young if stream_id in self._young else self._old
        how, window = generation[stream_id]
        generation[stream_id] = how, window - size
        return window >= size
