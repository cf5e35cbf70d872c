"""What a soak claims, and the rules by which a claim holds. Pure.

Growth is judged by two windows of a minute each: that after the first minute, and the last. Of memory their medians are
compared: a leak moves a median, a sample taken in the middle of something does not. Of descriptors and sockets it is
the smallest samples, since most of what is open belongs to connections that come and go by chance: a leak is what is
there when the fewest are. The workers of a node are judged together: which of them has a connection, and its tunnel, is
chance. In a run of less than three minutes the windows would be too near to each other: then the numbers are shown, and
nothing is said.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

SETTLED = 60.0  # seconds after which nothing may grow any more
WINDOW = 60.0  # seconds of samples that a median is taken of
LONG_ENOUGH = SETTLED + 2 * WINDOW
MOST_GROWTH = 0.05
LOOSE_DESCRIPTORS = 2  # a small number of them may differ by so many, however few 5 % are
LATEST_RENEWAL = 0.55  # of a certificate's life: half of it, and a tenth of that by chance
ENOUGH_CHANGES = 0.9  # of the rate that is wanted
ENOUGH_REVISIONS = 0.75  # of the changes: those that are seen within 50 ms of one another are one revision


class Verdict(Enum):
    """Whether a claim holds."""

    HOLDS = "holds"
    FAILED = "FAILED"
    UNKNOWN = "too short to tell"


class Claim(NamedTuple):
    """One sentence about the run, with the numbers that it rests on."""

    name: str
    verdict: Verdict
    numbers: str


class Point(NamedTuple):
    """A value at a time, in seconds since the load began."""

    time: float
    value: float


class Growth(NamedTuple):
    """What the first and the last window come to."""

    before: float
    after: float

    @property
    def share(self) -> float:
        """What was added, as a share of what was there."""
        return (self.after - self.before) / self.before if self.before else 0.0


def windows(seconds: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The two windows of a run of so many seconds; of a short one, its last two thirds halved."""
    settled = min(SETTLED, seconds / 3)
    width = min(WINDOW, (seconds - settled) / 2)
    return (settled, settled + width), (seconds - width, seconds)


def growth(
    points: Sequence[Point], seconds: float, value_of: Callable[[Iterable[float]], float] = statistics.median
) -> Growth | None:
    """How a value has grown in a run of so many seconds; None where a window has no sample."""
    found = []
    for begin, end in windows(seconds):
        values = [value for time, value in points if begin <= time <= end]
        if not values:
            return None
        found.append(value_of(values))
    return Growth(*found)


def together(series: Mapping[str, Sequence[Point]]) -> dict[str, list[Point]]:
    """The series by process, those of the workers of a node ("worker 0, node-1") added up as one."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    parts: Counter[str] = Counter()
    for process, points in series.items():
        kind, comma, node = process.partition(", ")
        name = f"workers{comma}{node}" if kind.startswith("worker ") else process
        parts[name] += 1
        for time, value in points:
            values[name][time].append(value)
    return {
        name: [Point(time, sum(found)) for time, found in sorted(of.items()) if len(found) == parts[name]]
        for name, of in values.items()
    }


def grown(found: Growth, slack: float = 0.0) -> bool:
    """Whether it is more than 5 %, and more than `slack`."""
    return found.after - found.before > max(MOST_GROWTH * found.before, slack)


def judged(failed: bool, seconds: float) -> Verdict:
    """The verdict on growth."""
    if seconds < LONG_ENOUGH:
        return Verdict.UNKNOWN
    return Verdict.FAILED if failed else Verdict.HOLDS


def verdict(holds: bool) -> Verdict:
    """Of a claim that can be judged however short the run."""
    return Verdict.HOLDS if holds else Verdict.FAILED


def fewest_renewals(seconds: float, life: float) -> int:
    """How often a certificate of this life must at least have been renewed in a run of so many seconds."""
    return math.floor(seconds / (life * LATEST_RENEWAL + 1))
