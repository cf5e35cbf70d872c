"""One stream's numbers. No rules: those are in `states.py` and in the two directions' files."""

from ztunnel.hbone.states import Side


class Stream:
    """A stream that is not closed (RFC 9113, 5.1) and its two flow-control windows (5.2), in bytes."""

    __slots__ = (
        "connected",
        "credit",
        "extra",
        "receiving",
        "send_window",
        "sending",
        "stream_id",
        "update_at",
        "window",
    )

    def __init__(self, stream_id: int, window: int, send_window: int, update_at: int) -> None:
        self.stream_id = stream_id
        self.receiving = Side.HEADERS
        self.sending = Side.HEADERS
        self.connected = False  # a 2xx went from server to client
        self.window = window  # what the peer may still send
        self.credit = 0  # consumed by the application, not yet given back to the peer
        self.update_at = update_at  # how much of it is worth a WINDOW_UPDATE
        self.extra = 0  # by how much the window has grown
        self.send_window = (
            send_window  # what we may still send; negative after a SETTINGS that shrinks it (6.9.2)
        )
