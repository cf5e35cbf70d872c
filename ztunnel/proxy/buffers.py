"""What waits in a worker for slow readers, and the most that may.

A stream's window bounds what one reader can leave lying. Windows begin small and grow only while their reader keeps
up (`Allowance`), so that many stalled readers cost little; what bounds all of them together is here.
"""

from typing import Protocol

from ztunnel.proxy.errors import BuffersFull, ProxyError

MIB = 1 << 20


class Holder(Protocol):
    """A connection for one end of which bytes wait."""

    def __hash__(self) -> int:
        """By identity."""

    @property
    def buffered(self) -> int:
        """How many."""

    def fail(self, error: ProxyError) -> None:
        """End now."""


class Buffers:
    """Counts the bytes that wait; over the limit, the connection for which most of them wait is reset."""

    __slots__ = ("_holders", "held", "limit")

    def __init__(self, limit: int) -> None:
        """`limit` in bytes."""
        self.limit = limit
        self.held = 0
        self._holders: dict[Holder, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def changed(self, holder: Holder) -> None:
        """What waits for `holder` is more or less than before; the limit may end it, or another one."""
        waiting = holder.buffered
        self.held += waiting - self._holders.get(holder, 0)
        self._holders[holder] = waiting
        while self.held > self.limit:
            largest = max(self._holders, key=self._holders.__getitem__)
            mib, size = self.limit / MIB, self._holders[largest]
            largest.fail(
                BuffersFull(
                    f"the proxy holds {mib:.0f} MiB for readers that do not keep up, its limit (BUFFER_LIMIT); this "
                    f"connection had the most of it, {size / MIB:.1f} MiB"
                )
            )
            self.forget(largest)  # it did by itself; a loop must not depend on it

    def forget(self, holder: Holder) -> None:
        """Nothing waits for `holder` any more."""
        self.held -= self._holders.pop(holder, 0)
