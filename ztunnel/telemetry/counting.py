"""What a worker counts for the metrics: plain dictionaries, emptied into a report every few seconds.

Rule: nothing here knows labels, names or the mesh. A key holds what tells one series from another as the worker sees
it (an address, an identity, a service); the control process looks up the rest when the report comes (`traffic.py`).

A connection costs one update of a dictionary: 0.6 us, where labels of its own would take 10. One that is open for
longer costs another one for each report in which it moved bytes.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

NONE: Final = "-"
"""The response flag of a connection that nothing was wrong with."""

OPENED, CLOSED, FAILED, SENT, RECEIVED = range(5)
"""What is counted for a key, by position."""

MOST: Final = 4096
"""Keys of one pod after which a report is sent at once instead of at its time."""

Key: TypeAlias = tuple[str, str, str, str, int, bool, str]
"""direction, the other end's address, its identity, service key (outbound), port (inbound), mutual TLS, response flag.

All but the direction and the flag are empty where they are not known or do not matter for the labels.
"""


class PodTraffic(msgspec.Struct, array_like=True):
    """What one pod's connections did: part of a worker's report."""

    namespace: str
    name: str
    identity: str
    counts: list[tuple[Key, list[int]]]


class Counts(dict[Key, list[int]]):
    """What the connections of one pod did since the last report."""

    __slots__ = ("soon",)

    def __init__(self, soon: Callable[[], None] = lambda: None) -> None:
        """`soon()` is called when there is so much that it should be reported now."""
        super().__init__()
        self.soon = soon

    def entry(self, key: Key) -> list[int]:
        """The counts of a key, all 0 if it is new."""
        entry = self.get(key)
        if entry is None:
            entry = self[key] = [0, 0, 0, 0, 0]
            if len(self) >= MOST:
                self.soon()
        return entry

    def take(self) -> list[tuple[Key, list[int]]]:
        """All there is, which is forgotten."""
        found = list(self.items())
        self.clear()
        return found
