"""Where a process spends its time: its main thread's stack, looked at a hundred times a second by another thread.

Costs nothing while nobody asks. A look takes about 20 us under the interpreter's lock, so a profile of a busy worker
costs it less than 1 %. What the main thread does in C counts for the Python function that called it.
"""

import sys
import threading
import time
from collections import Counter
from types import CodeType, FrameType
from typing import Any

import trio

LONGEST = 60.0  # seconds
INTERVAL = 0.01  # seconds between looks
MOST_STACKS = 20_000  # different ones kept; looks at further ones are counted as MORE
DEEPEST = 100  # frames
MORE = ("(more stacks than are kept)",)
ASLEEP = frozenset({"get_events", "poll"})  # where a trio loop, or the reactor, waits for the kernel

_one_at_a_time = threading.Lock()


class BusyError(Exception):
    """A profile is being made already."""


async def sample(seconds: float) -> Counter[tuple[str, ...]]:
    """The stacks of the main thread, outermost first, and how often each was seen, in `seconds` (LONGEST at most).

    Raises BusyError, ValueError.
    """
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"seconds: {seconds:g}: more than 0, at most {LONGEST:g}")
    if not _one_at_a_time.acquire(blocking=False):
        raise BusyError("a profile is being made already; try again when it is done")
    stop = threading.Event()
    found: Counter[tuple[str, ...]] = Counter()
    try:
        thread = threading.Thread(
            target=_look, args=(threading.main_thread().ident, stop, found), name="profiler", daemon=True
        )
        thread.start()
        try:
            await trio.sleep(seconds)
        finally:
            stop.set()
            thread.join()
    finally:
        _one_at_a_time.release()
    return found


def _look(ident: int, stop: threading.Event, found: Counter[tuple[str, ...]]) -> None:
    due = time.monotonic()
    while True:
        due += INTERVAL
        if stop.wait(max(0.0, due - time.monotonic())):
            return
        frame = sys._current_frames().get(ident)
        if frame is None:
            continue
        stack = _stack(frame)
        del frame
        if stack in found or len(found) < MOST_STACKS:
            found[stack] += 1
        else:
            found[MORE] += 1


def _stack(frame: FrameType | None) -> tuple[str, ...]:
    names: list[str] = []
    while frame is not None and len(names) < DEEPEST:
        names.append(_name(frame.f_code))
        frame = frame.f_back
    names.reverse()
    return tuple(names)


def _name(code: CodeType) -> str:
    # Neither of the two separators of the collapsed format may be in a name.
    file = code.co_filename.removesuffix(".py").replace("/", ".").split("site-packages.")[-1]
    return f"{'.'.join(file.split('.')[-3:])}:{code.co_qualname}".replace(";", ",").replace(" ", "_")


def collapsed(process: str, stacks: Counter[tuple[str, ...]]) -> str:
    """A line a stack, as flame graph tools read it: `process;outer;inner COUNT`."""
    return "".join(f"{';'.join((process, *stack))} {count}\n" for stack, count in stacks.most_common())


def as_text(process: str, stacks: Counter[tuple[str, ...]], rows: int = 30) -> str:
    """Functions by the share of looks that found them at work themselves, and with what they call."""
    total = sum(stacks.values())
    own: Counter[str] = Counter()
    cumulative: Counter[str] = Counter()
    for stack, count in stacks.items():
        if stack:
            own[stack[-1]] += count
        cumulative.update(dict.fromkeys(stack, count))
    asleep = sum(count for name, count in own.items() if name.rpartition(".")[2].rpartition(":")[2] in ASLEEP)
    lines = [f"{process}: {total} looks, {_share(asleep, total)} of them asleep"]
    lines.append(f"{'self':>7} {'total':>7}  function")
    lines += [
        f"{_share(count, total):>7} {_share(cumulative[name], total):>7}  {name}"
        for name, count in own.most_common(rows)
    ]
    return "".join(f"{line}\n" for line in lines)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def as_list(stacks: Counter[tuple[str, ...]]) -> list[Any]:
    """For a message."""
    return [[list(stack), count] for stack, count in stacks.items()]


def from_list(found: list[Any]) -> Counter[tuple[str, ...]]:
    """What `as_list` made."""
    return Counter({tuple(stack): count for stack, count in found})
