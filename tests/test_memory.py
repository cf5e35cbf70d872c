"""What a process has freed goes back to the kernel, wherever in the heap it lies."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from ztunnel import memory

HOLES = """
from pathlib import Path
from ztunnel.memory import give_back

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4

# Larger than what Python allocates by itself, smaller than what is mapped by itself: these are in the C library's heap.
full = [bytes(20_000) for _ in range(4000)]
last = full[-1]
at_most = rss()
full.clear()  # all but the last one, which keeps the heap's end where it is
before = rss()
assert give_back()
print(at_most, before, rss())
"""


def test_holes_in_the_heap_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    most, before, after = map(int, done.stdout.split())
    assert before > most - 10_000, "the C library keeps it"  # KiB, of about 80,000
    assert after < most - 60_000


THREADS = """
import sys, threading
from pathlib import Path
from ztunnel.memory import one_heap

def heaps_of_threads():  # each begins at a multiple of 64 MiB
    written = [line for line in Path("/proc/self/maps").read_text().splitlines() if " rw-p " in line]
    return sum(int(line.split("-")[0], 16) % (64 << 20) == 0 for line in written)

if sys.argv[1] == "one":
    one_heap()
threads = [threading.Thread(target=lambda: (bytes(20_000), there.wait(), done.wait())) for _ in range(2)]
there, done = threading.Barrier(3), threading.Event()
for thread in threads:
    thread.start()
there.wait()
print(heaps_of_threads())
done.set()
"""


@pytest.mark.parametrize(("kind", "heaps"), [("one", 0), ("each its own", 2)])
def test_threads_share_a_heap(kind: str, heaps: int) -> None:
    command = [sys.executable, "-c", THREADS, kind]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == heaps


def test_a_reserved_buffer_has_memory_where_it_was_written_to() -> None:
    buffer = memory.reserved(64 << 20)
    before = memory_of_this_process()
    assert buffer[-1] == 0
    assert memory_of_this_process() < before + (1 << 20)
    buffer[: 32 << 20] = bytes(32 << 20)
    assert memory_of_this_process() > before + (31 << 20)


def memory_of_this_process() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


async def test_it_is_done_again_and_again(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    calls = list[float]()

    def trim(pad: int) -> int:
        calls.append(trio.current_time())
        return pad

    monkeypatch.setattr(memory, "_trim", trim)
    with trio.move_on_after(memory.INTERVAL * 3.5):
        await memory.keep_giving_back()
    assert len(calls) == 3


def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_trim", None)
    assert not memory.give_back()
