"""Keeps a long-lived process small: gives back to the kernel what was freed, takes nothing before it is used.

Rule: one call a while, never on the path of a byte. The C library keeps freed memory for later, and gives back only
what lies at the end of its heap. What TLS allocates lives for milliseconds beside what lives for hours (certificates,
code), so the end is seldom free and every peak leaves pages behind that nobody uses: in ten minutes of mixed load a
worker of 24 MiB grew by 2 to 4 MiB, and went on. A call takes 0.1 ms where there is nothing to give back, 1 ms where
there is.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Callable
from typing import Final, cast

import trio

_M_ARENA_MAX: Final = -8  # malloc.h
INTERVAL: Final = 5.0  # seconds between calls: within 30 a busy worker had 4 MiB of holes again


def _found() -> Callable[[int], int] | None:
    """malloc_trim(3), which only the GNU C library has."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return cast(Callable[[int], int], trim)


_trim: Final = _found()


def give_back() -> bool:
    """Give free pages back; whether there were any. Does nothing where the C library cannot."""
    return _trim is not None and _trim(0) == 1


def one_heap() -> None:
    """Have threads that are made from now on allocate from the one heap, and not each from one of its own.

    For processes whose threads wait most of the time: two at once would wait for each other. Else as `give_back`.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


async def keep_giving_back() -> None:
    """Give back every INTERVAL, until cancelled."""
    while True:
        await trio.sleep(INTERVAL)
        give_back()


def reserved(size: int) -> memoryview:
    """A buffer of `size` zeros that has no memory of its own before somebody writes to it, page by page.

    A bytearray is written to as it is made. Of a process that forks each has its own.
    """
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
