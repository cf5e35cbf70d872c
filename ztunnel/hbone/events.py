"""What `Connection.receive` reports: small immutable values, in the order in which the peer caused them.

They are msgspec structs, since some are made for every stream: 0.1 us each, where a frozen dataclass takes 0.5.
"""

from typing import NamedTuple

import msgspec

Headers = tuple[tuple[str, str], ...]
"""Regular fields as (lower-case name, value), in order, without pseudo-header fields; octets map to Latin-1."""


class DataReceived(NamedTuple):
    """Bytes of a tunnel, in order. The one event that is a named tuple: it is made for every piece of data.

    `data` is a view into what was given to `receive` and is valid until the next call. `credit` is what to give
    to `Connection.acknowledge` once the bytes were consumed (padding is accounted by the codec itself).
    """

    stream_id: int
    data: memoryview
    credit: int


class ConnectRequested(msgspec.Struct, frozen=True, gc=False):
    """Server: a valid CONNECT arrived; answer with `respond`. `authority` is not empty, but not yet parsed."""

    stream_id: int
    authority: str
    headers: Headers


class ResponseReceived(msgspec.Struct, frozen=True, gc=False):
    """Client: the final answer. 2xx means that the tunnel stands (RFC 9113, 8.5); 1xx are never reported."""

    stream_id: int
    status: int
    headers: Headers


class StreamEnded(msgspec.Struct, frozen=True, gc=False):
    """The peer sends no more on this stream (END_STREAM); we still may."""

    stream_id: int


class StreamReset(msgspec.Struct, frozen=True, gc=False):
    """The stream is gone, both ways. `remote`: the peer did it; else the codec did, for what `reason` says.

    `code` is an `ErrorCode`, or an integer that it does not know. REFUSED_STREAM: nothing was processed, the
    request is safe to retry elsewhere (RFC 9113, 8.7). Streams that `reset_stream` ended are not reported.
    """

    stream_id: int
    code: int
    remote: bool
    reason: str = ""


class WindowOpened(msgspec.Struct, frozen=True, gc=False):
    """`sendable` had been 0 and is no more, for this stream, or (0) for any stream that waits."""

    stream_id: int


class SettingsReceived(msgspec.Struct, frozen=True, gc=False):
    """The peer's SETTINGS took effect. `max_concurrent_streams` is how many streams it lets us have open."""

    max_concurrent_streams: int


class PingAcknowledged(msgspec.Struct, frozen=True, gc=False):
    """The answer to a `ping` of ours."""

    payload: bytes


class GoAwayReceived(msgspec.Struct, frozen=True, gc=False):
    """The peer takes no new streams. Ours above `last_stream_id` follow as StreamReset(REFUSED_STREAM)."""

    last_stream_id: int
    code: int
    debug: bytes


class ConnectionFailed(msgspec.Struct, frozen=True, gc=False):
    """The peer broke the protocol: always the last event.

    All streams are gone and a GOAWAY is queued: send it, then close.
    """

    code: int
    reason: str


Event = (
    DataReceived
    | ConnectRequested
    | ResponseReceived
    | StreamEnded
    | StreamReset
    | WindowOpened
    | SettingsReceived
    | PingAcknowledged
    | GoAwayReceived
    | ConnectionFailed
)
