"""How much may be under way at a time, shared fairly between pods."""

from collections import Counter


class Limit:
    """At most `most` things at a time, and for each owner at most as many as are still free.

    So one pod alone gets half of all, and however much it asks for, others find room: each next one half of what is
    left (a dynamic threshold, as switches share their buffers between ports).
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._by_owner: Counter[str] = Counter()

    def take(self, owner: str) -> bool:
        """Take one for this owner, if he may have one more now."""
        if self._by_owner[owner] >= self.most - self.taken:
            return False
        self.taken += 1
        self._by_owner[owner] += 1
        return True

    def give_back(self, owner: str) -> None:
        """One that was taken has ended."""
        self.taken -= 1
        self._by_owner[owner] -= 1
        if not self._by_owner[owner]:
            del self._by_owner[owner]
