"""HBONE's codec: HTTP/2 CONNECT tunnels (RFC 9113), client and server, as pure code.

No sockets, no clock, no logging in this package.
"""

from ztunnel.hbone.allowance import Allowance
from ztunnel.hbone.config import Config, Role
from ztunnel.hbone.connection import Connection
from ztunnel.hbone.errors import CannotOpen, ErrorCode, LocalError
from ztunnel.hbone.events import (
    ConnectionFailed,
    ConnectRequested,
    DataReceived,
    Event,
    GoAwayReceived,
    Headers,
    PingAcknowledged,
    ResponseReceived,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    WindowOpened,
)

__all__ = [
    "Allowance",
    "CannotOpen",
    "Config",
    "ConnectRequested",
    "Connection",
    "ConnectionFailed",
    "DataReceived",
    "ErrorCode",
    "Event",
    "GoAwayReceived",
    "Headers",
    "LocalError",
    "PingAcknowledged",
    "ResponseReceived",
    "Role",
    "SettingsReceived",
    "StreamEnded",
    "StreamReset",
    "WindowOpened",
]
