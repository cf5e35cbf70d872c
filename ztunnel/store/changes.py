"""What a watch has told of a store, and what it is yet to tell: the same for files and for a cluster."""

from collections import deque
from collections.abc import Mapping

from ztunnel.store.base import Change
from ztunnel.store.models import Key, Object


class Told:
    """The objects as they were last told of, and the changes in the order in which they are to be."""

    def __init__(self) -> None:
        self.pending: deque[Change] = deque()
        self._known: dict[Key, Object] = {}

    def begin(self, found: Mapping[Key, Object]) -> None:
        """All objects of a kind are to be told of."""
        for key in sorted(found):
            self._known[key] = found[key]
            self.pending.append(Change("added", found[key]))

    def synced(self) -> None:
        """All that there is has been told."""
        self.pending.append(Change("synced", None))

    def take(self, key: Key, now: Object | None) -> None:
        """An object is so now (None: gone); nothing is to be told if that is how it was."""
        before = self._known.get(key)
        if now is None:
            if before is not None:
                del self._known[key]
                self.pending.append(Change("deleted", before))
        elif before is None:
            self._known[key] = now
            self.pending.append(Change("added", now))
        elif now != before:
            self._known[key] = now
            if now.metadata.uid != before.metadata.uid and before.metadata.uid:
                # Another object of the same name took its place between two looks.
                self.pending += [Change("deleted", before), Change("added", now)]
            else:
                self.pending.append(Change("modified", now))
