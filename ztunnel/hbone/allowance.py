"""How much larger than at first the windows of all streams together may become."""


class Allowance:
    """Bytes that windows may grow by, over all connections that share this; what ends gives its part back."""

    __slots__ = ("granted", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.granted = 0

    def take(self, size: int) -> bool:
        """Whether a window may grow by `size` bytes; if so they are granted."""
        if self.granted + size > self.total:
            return False
        self.granted += size
        return True

    def give(self, size: int) -> None:
        """`size` granted bytes are not used any more."""
        self.granted -= size
