"""Frames of an AF_PACKET socket through memory shared with the kernel (packet(7), PACKET_RX_RING, TPACKET_V3).

A socket's own buffer is limited by net.core.rmem_max, a fifth of a megabyte on most systems: under load it lost
frames each time the capture had to wait for a processor. A proof must see every frame; a ring of 32 MiB does, and
an ordinary user may have one in a user namespace. Its blocks are small: one is handed over when it is full or
RETIRE_MS old, so that a quiet link, too, uses them up, and they last for six seconds without a processor.
"""

import mmap
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 256 << 10  # bytes; the largest frame that is kept whole is a little smaller
BLOCKS = 128
SLOT = 2048  # has no meaning in version 3, but must divide the block
RETIRE_MS = 50  # after this time a block is handed over though it is not full

SOL_PACKET = 263
PACKET_RX_RING = 5
PACKET_STATISTICS = 6
PACKET_VERSION = 10
TPACKET_V3 = 2
STATUS_KERNEL, STATUS_USER = 0, 1

_request = struct.Struct("=7I")  # tpacket_req3
_block = struct.Struct("=8xIII")  # tpacket_block_desc: status, number of frames, offset of the first
# tpacket3_hdr: offset of the next, seconds, nanoseconds, bytes captured, bytes on the link, offset of its header
_frame = struct.Struct("=IIIII4xH")
_status = struct.Struct("=I")
STATUS_OFFSET = 8  # of the status in tpacket_block_desc
_statistics = struct.Struct("=III")  # tpacket_stats_v3: frames, drops, times the ring was full


class Frame(NamedTuple):
    """A frame: when it was seen (Unix time), its length on the link in bytes, and what was kept of it."""

    seconds: int
    nanoseconds: int
    length: int
    data: bytes

    @property
    def time(self) -> float:
        """When, as one number."""
        return self.seconds + self.nanoseconds / 1e9


class Ring:
    """The receive ring of a packet socket that is bound already. Raises OSError where the kernel has none to give."""

    def __init__(self, source: socket.socket) -> None:
        self._socket = source
        source.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
        request = _request.pack(BLOCK, BLOCKS, SLOT, BLOCK * BLOCKS // SLOT, RETIRE_MS, 0, 0)
        source.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
        self._memory = mmap.mmap(source.fileno(), BLOCK * BLOCKS)
        self._next = 0

    def frames(self) -> Iterator[bytes]:
        """The frames that have arrived, at most one whole ring of them; does not wait. Poll the socket to wait."""
        for frame in self.stamped():
            yield frame.data

    def stamped(self) -> Iterator[Frame]:
        """As `frames`, with the time of each."""
        for _ in range(BLOCKS):
            start = self._next * BLOCK
            status, count, offset = _block.unpack_from(self._memory, start)
            if not status & STATUS_USER:
                return
            for _ in range(count):
                place = start + offset
                following, seconds, nanoseconds, size, length, link = _frame.unpack_from(self._memory, place)
                data = self._memory[place + link : place + link + size]
                yield Frame(seconds, nanoseconds, length, data)
                offset += following
            _status.pack_into(self._memory, start + STATUS_OFFSET, STATUS_KERNEL)
            self._next = (self._next + 1) % BLOCKS

    def dropped(self) -> int:
        """How many frames were lost since the last call, because the ring was full."""
        statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, _statistics.size)
        return int(_statistics.unpack(statistics)[1])

    def close(self) -> None:
        """Give the memory back; the socket is closed by whoever made it."""
        self._memory.close()
