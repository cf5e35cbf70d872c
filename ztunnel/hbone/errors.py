"""Error codes of HTTP/2 (RFC 9113, 7) and the exceptions of the codec: only `LocalError` ever reaches a caller.

What a peer does wrong becomes an event; `ConnectionViolation` and `StreamViolation` carry it there from the
place that noticed it, inside one call of `Connection.receive`.
"""

from enum import IntEnum


class ErrorCode(IntEnum):
    """RFC 9113, 7. Codes that are not listed are legal on the wire and stay plain integers."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class LocalError(Exception):
    """Our own side asked for something that HTTP/2 forbids: a bug of the caller, nothing was sent."""


class CannotOpen(LocalError):
    """No stream can be opened on this connection (now): `Connection.can_open` is false."""


class ConnectionViolation(Exception):
    """The peer broke a rule that ends the connection (RFC 9113, 5.4.1). Never leaves `receive`."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class StreamViolation(Exception):
    """The peer broke a rule that ends one stream (RFC 9113, 5.4.2). Never leaves `receive`."""

    def __init__(self, stream_id: int, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.stream_id = stream_id
        self.code = code
        self.reason = reason
