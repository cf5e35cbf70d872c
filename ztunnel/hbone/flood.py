"""How much nonsense a peer has sent: two leaky buckets without a clock (RFC 9113, 10.5).

A clockless codec cannot count frames a second, and a fixed budget for a connection's life would end an idle
tunnel after some hours of keepalive PINGs. What tells a flood from keepalives is density: so every call of
`receive` (one TLS record, one read of the socket) pays for a few frames, and so does useful work (DATA frames
that we send pay for the WINDOW_UPDATEs which they cause; an answered stream for one that was given up). A
flood spread over one record for each frame gets through, and costs no more than any other small record.
"""

from ztunnel.hbone.errors import ConnectionViolation, ErrorCode

FRAMES_PER_CALL = 8
"""Wasted frames that a call of `receive` pays for."""
FRAMES_PER_DATA = 4
"""Wasted frames that a DATA frame which we send pays for: peers update two windows, some of them in pieces."""
BANKED = 50
"""How many times its limit a bucket may be in credit: bursts of small DATA frames are updated in bursts."""


class Bucket:
    """Counts up on waste, down on use. `level` may be lowered freely; it is clamped when waste is counted."""

    __slots__ = ("_limit", "_what", "level")

    def __init__(self, limit: int, what: str) -> None:
        self.level = 0
        self._limit = limit
        self._what = what

    def waste(self, amount: int = 1) -> None:
        """Count `amount`. Raises ConnectionViolation(ENHANCE_YOUR_CALM) past the limit."""
        level = self.level
        if level < -BANKED * self._limit:
            level = -BANKED * self._limit
        self.level = level = level + amount
        if level > self._limit:
            raise ConnectionViolation(ErrorCode.ENHANCE_YOUR_CALM, f"too many {self._what}")

    def pay(self, amount: int) -> None:
        """Forgive up to `amount`, never below zero."""
        if self.level > 0:
            self.level = max(0, self.level - amount)
