"""How much memory a process has, and of what: the kernel's numbers, the collector's, and objects by type.

Everything but the kernel's numbers costs time in proportion to the objects there are; it is done in slices, and only
when asked for. tracemalloc, which slows every allocation down by a third or more, is off until somebody starts it.
"""

import gc
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import trio

SLICE = 5000  # objects counted before others get their turn: about 1 ms
MOST_TYPES = 200
FIELDS = {"Rss": "rss", "Pss": "pss", "Private_Dirty": "private", "Swap": "swap"}


def kernel() -> dict[str, int]:
    """What the kernel counts for this process, in bytes: rss, pss (shared pages divided), private, swap; and peak."""
    found = {}
    for path, names in (
        ("/proc/self/smaps_rollup", FIELDS),
        ("/proc/self/status", {"VmHWM": "peak"}),
    ):
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, rest = line.partition(":")
            if name in names:
                found[names[name]] = int(rest.split()[0]) * 1024
    return found


async def describe(objects: int = 0, trace: str = "") -> dict[str, Any]:
    """The report; `objects`: how many types to count objects of (0: none), `trace`: start, stop, show or nothing.

    Raises ValueError for another `trace`.
    """
    if trace not in ("", "start", "stop", "show"):
        raise ValueError(f"trace: {trace!r}: one of start, stop, show")
    report: dict[str, Any] = {
        "bytes": kernel(),
        "collector": {
            "waiting": gc.get_count(),
            "collections": [one["collections"] for one in gc.get_stats()],
            "uncollectable": sum(one["uncollectable"] for one in gc.get_stats()),
            "frozen": gc.get_freeze_count(),
        },
    }
    if objects > 0:
        report["objects"] = await _by_type(min(objects, MOST_TYPES))
    report["tracing"] = await _traced(trace, report)
    return report


async def _traced(trace: str, report: dict[str, Any]) -> bool:
    """Start, show or stop; whether allocations are traced then."""
    if not trace and "tracemalloc" not in sys.modules:
        return False
    import tracemalloc  # with all that it needs a third of a megabyte, which nobody shall pay who does not ask

    if trace == "start" and not tracemalloc.is_tracing():
        tracemalloc.start()
    elif trace in ("show", "stop") and tracemalloc.is_tracing():
        # By another thread: a snapshot of a large process takes seconds, and gives up the lock in between.
        report["allocations"] = await trio.to_thread.run_sync(_allocations)
        if trace == "stop":
            tracemalloc.stop()
    return tracemalloc.is_tracing()


async def _by_type(most: int) -> list[dict[str, Any]]:
    counted: Counter[type] = Counter()
    # Of those that the collector knows and has not frozen; what holds no references is not among them.
    found = iter(gc.get_objects())
    while True:
        types = [type(one) for one in islice(found, SLICE)]
        if not types:
            break
        counted.update(types)
        await trio.lowlevel.checkpoint()
    return [
        {"type": f"{kind.__module__}.{kind.__qualname__}", "count": count}
        for kind, count in counted.most_common(most)
    ]


def _allocations() -> list[dict[str, Any]]:
    import tracemalloc

    snapshot = tracemalloc.take_snapshot()
    return [
        {
            "place": f"{one.traceback[0].filename}:{one.traceback[0].lineno}",
            "bytes": one.size,
            "blocks": one.count,
        }
        for one in snapshot.statistics("lineno")[:MOST_TYPES]
    ]
