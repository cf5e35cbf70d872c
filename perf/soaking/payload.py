"""What the soak's programs send each other: bytes that both ends can make, and the sum that tells whether they came.

Only the standard library: the programs in the pods import this.
"""

import random
import zlib
from collections.abc import Iterator

HTTP_PORT = 8080
TALK_PORT = 7000
BANNER_PORT = 7001
CLOSED_PORT = 7999
BANNER = b"220 ready when you are\n"
CHUNK = 64 * 1024  # bytes

_PATTERN = random.Random(20).randbytes(CHUNK)  # noqa: S311 - nothing secret


def chunks(size: int) -> Iterator[bytes]:
    """The `size` bytes of a transfer, in pieces of at most CHUNK."""
    for _ in range(size // CHUNK):
        yield _PATTERN
    if rest := size % CHUNK:
        yield _PATTERN[:rest]


def body(size: int) -> bytes:
    """The `size` bytes in one."""
    return b"".join(chunks(size))


class Sum:
    """The length and CRC-32 of what went by."""

    __slots__ = ("crc", "size")

    def __init__(self) -> None:
        self.size = 0
        self.crc = 0

    def add(self, data: bytes) -> None:
        """Take the next bytes into account."""
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def __str__(self) -> str:
        return f"{self.size} {self.crc:08x}"


def expected(size: int) -> str:
    """The sum of a transfer of `size` bytes, as text."""
    total = Sum()
    for chunk in chunks(size):
        total.add(chunk)
    return str(total)
