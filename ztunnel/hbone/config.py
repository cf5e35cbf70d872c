"""The limits of one connection, with the reason for each default."""

from dataclasses import dataclass
from enum import Enum

from ztunnel.hbone.frames import DEFAULT_WINDOW, MAX_MAX_FRAME, MAX_WINDOW, MIN_MAX_FRAME


class Role(Enum):
    """Which end of the connection we are: the client opens tunnels, the server accepts them."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Config:
    """Limits; sizes in bytes. Raises ValueError for values that HTTP/2 does not allow."""

    initial_window_size: int = 1 << 20
    """What a peer may send on a stream before `acknowledge`: bounds the memory that one stalled stream costs."""
    widest_window: int = 0
    """What that window grows to, by doubling, while its reader keeps up and the `Allowance` lasts; 0: it does not."""
    connection_window: int = 16 << 20
    """What a peer may send on all streams ahead of our reading; credited on receipt, so it never stalls."""
    max_frame_size: int = 1 << 20
    """The largest frame that we take. Large ones cost nothing: DATA is handed on piecewise as it arrives."""
    max_concurrent_streams: int = 256
    """Streams that a client may have open with us; more get REFUSED_STREAM."""
    max_header_list_size: int = 32 << 10
    """Of a request's or response's fields (RFC 9113, 6.5.2)."""

    max_continuations: int = 64
    """CONTINUATION frames of one field block (RFC 9113, 10.5; CVE-2024-27316)."""
    max_settings: int = 64
    """Values in one SETTINGS frame."""
    max_wasted_frames: int = 1000
    """Frames that move nothing (see `flood.py`), beyond what useful ones pay for."""
    max_wasted_streams: int = 1000
    """Streams reset before they were answered, or for errors, beyond what useful ones pay for (CVE-2023-44487)."""
    max_queued_replies: int = 10_000
    """Replies (ACKs, resets, refusals) that wait for `data_to_send`."""
    max_pings: int = 64
    """Pings of ours that wait for their answer."""
    closed_streams: int = 256
    """How many closed streams are remembered (RFC 9113, 5.1), to tell late frames from wrong ones."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("initial_window_size", 1, MAX_WINDOW),
            ("widest_window", 0, MAX_WINDOW),
            ("connection_window", DEFAULT_WINDOW, MAX_WINDOW),
            ("max_frame_size", MIN_MAX_FRAME, MAX_MAX_FRAME),
            ("max_concurrent_streams", 0, MAX_WINDOW),
            ("max_header_list_size", 256, 1 << 20),
            ("max_continuations", 1, 1 << 20),
            ("max_settings", 8, 1 << 16),
            ("max_wasted_frames", 1, 1 << 30),
            ("max_wasted_streams", 1, 1 << 30),
            ("max_queued_replies", 1, 1 << 30),
            ("max_pings", 1, 1 << 16),
            ("closed_streams", 1, 1 << 20),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"Config.{name} is {value}: must be between {low} and {high}")
