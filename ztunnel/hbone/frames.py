"""The layout of HTTP/2 frames (RFC 9113, 4 and 6): constants, builders, parsers. No state, no rule of order."""

from collections.abc import Iterable
from enum import IntEnum
from struct import Struct

from ztunnel.hbone.errors import ConnectionViolation, ErrorCode

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client sends first (RFC 9113, 3.4)."""

HEAD = Struct(">IBI")
"""A frame's header read as (length << 8 | type, flags, stream id): three integers from nine bytes in 40 ns."""
HEAD_SIZE = 9

MAX_WINDOW = (1 << 31) - 1
MAX_STREAM_ID = (1 << 31) - 1
DEFAULT_WINDOW = 65_535
MIN_MAX_FRAME = 1 << 14
MAX_MAX_FRAME = (1 << 24) - 1

FLAG_ACK = 0x1
FLAG_END_STREAM = 0x1
FLAG_END_HEADERS = 0x4
FLAG_PADDED = 0x8
FLAG_PRIORITY = 0x20

_pack_head = HEAD.pack
_WINDOW_UPDATE = Struct(">IBII").pack
_RST_STREAM = _WINDOW_UPDATE
_SETTING = Struct(">HI")
_PAIR = Struct(">II")


class FrameType(IntEnum):
    """RFC 9113, 6. Other types are ignored (4.1)."""

    DATA = 0x0
    HEADERS = 0x1
    PRIORITY = 0x2
    RST_STREAM = 0x3
    SETTINGS = 0x4
    PUSH_PROMISE = 0x5
    PING = 0x6
    GOAWAY = 0x7
    WINDOW_UPDATE = 0x8
    CONTINUATION = 0x9


_HEADERS = int(FrameType.HEADERS)


class Setting(IntEnum):
    """RFC 9113, 6.5.2, and RFC 8441, 3."""

    HEADER_TABLE_SIZE = 0x1
    ENABLE_PUSH = 0x2
    MAX_CONCURRENT_STREAMS = 0x3
    INITIAL_WINDOW_SIZE = 0x4
    MAX_FRAME_SIZE = 0x5
    MAX_HEADER_LIST_SIZE = 0x6
    ENABLE_CONNECT_PROTOCOL = 0x8


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Any frame."""
    return HEAD.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def end_stream(stream_id: int) -> bytes:
    """An empty DATA frame with END_STREAM (6.1)."""
    return _pack_head(0, FLAG_END_STREAM, stream_id)


def window_update(stream_id: int, increment: int) -> bytes:
    """WINDOW_UPDATE (6.9) of `increment` bytes."""
    return _WINDOW_UPDATE(4 << 8 | FrameType.WINDOW_UPDATE, 0, stream_id, increment)


def rst_stream(stream_id: int, code: int) -> bytes:
    """RST_STREAM (6.4)."""
    return _RST_STREAM(4 << 8 | FrameType.RST_STREAM, 0, stream_id, code)


def settings(values: Iterable[tuple[int, int]]) -> bytes:
    """SETTINGS (6.5) with (identifier, value) pairs in order."""
    return frame(FrameType.SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in values))


SETTINGS_ACK = frame(FrameType.SETTINGS, FLAG_ACK, 0)


def ping(payload: bytes, *, ack: bool = False) -> bytes:
    """PING (6.7); `payload` has 8 bytes."""
    return frame(FrameType.PING, FLAG_ACK if ack else 0, 0, payload)


def goaway(last_stream_id: int, code: int, debug: bytes = b"") -> bytes:
    """GOAWAY (6.8)."""
    return frame(FrameType.GOAWAY, 0, 0, _PAIR.pack(last_stream_id, code) + debug)


def header_block(stream_id: int, block: bytes, max_frame: int, *, end_stream: bool) -> bytes:
    """HEADERS, and as many CONTINUATION frames as `max_frame` bytes a frame demand (6.2, 6.10)."""
    flags = FLAG_END_STREAM if end_stream else 0
    if len(block) <= max_frame:
        return _pack_head(len(block) << 8 | _HEADERS, flags | FLAG_END_HEADERS, stream_id) + block
    frames = [frame(FrameType.HEADERS, flags, stream_id, block[:max_frame])]
    for start in range(max_frame, len(block), max_frame):
        last = start + max_frame >= len(block)
        frames.append(
            frame(
                FrameType.CONTINUATION,
                FLAG_END_HEADERS if last else 0,
                stream_id,
                block[start : start + max_frame],
            )
        )
    return b"".join(frames)


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """The (identifier, value) pairs, in order. `payload` is a multiple of 6 bytes."""
    return list(_SETTING.iter_unpack(payload))


def parse_pair(payload: bytes) -> tuple[int, int]:
    """The two 32-bit integers that GOAWAY begins with, reserved bit cleared from the first."""
    first, second = _PAIR.unpack_from(payload)
    return first & MAX_STREAM_ID, second


def strip_headers_payload(flags: int, payload: bytes) -> bytes:
    """The field block fragment of a HEADERS frame: without padding and priority (6.2).

    Raises ConnectionViolation: any error in a frame that carries a field block ends the connection (4.2).
    """
    if not flags & (FLAG_PADDED | FLAG_PRIORITY):
        return payload
    start, end = 0, len(payload)
    if flags & FLAG_PADDED:
        if not payload:
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its pad length")
        start, end = 1, end - payload[0]
    if flags & FLAG_PRIORITY:
        start += 5
        if start > len(payload):
            raise ConnectionViolation(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
    if end < start:
        raise ConnectionViolation(ErrorCode.PROTOCOL_ERROR, "HEADERS with more padding than payload")
    return payload[start:end]
