"""What the soak's clients have told so far: every operation, counted once, and every failure with its own words.

Written by the threads that listen to the clients, read by whoever reports.
"""

import json
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

LONGEST = 400  # characters of a client's words in a message


class Failure(NamedTuple):
    """One failed operation: when it ended (Unix seconds), whose it was, how long it took (seconds), and why."""

    time: float
    client: str
    job: str
    host: str
    took: float
    error: str

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.time)) + f"{self.time % 1:.2f}"[1:]
        return f"{clock} {self.client}, {self.job} {self.host}: {self.error} ({self.took:.2f} s)"


class Count(NamedTuple):
    """What became of a job's operations; `slowest` in seconds."""

    begun: int = 0
    done: int = 0
    failed: int = 0
    bytes: int = 0
    slowest: float = 0.0

    def __add__(self, other: object) -> "Count":
        if not isinstance(other, Count):
            return NotImplemented
        return Count(
            self.begun + other.begun,
            self.done + other.done,
            self.failed + other.failed,
            self.bytes + other.bytes,
            max(self.slowest, other.slowest),
        )


class Ledger:
    """Counts by client and job, and all failures in the order in which they were told."""

    def __init__(self, on_failure: Callable[[Failure], None]) -> None:
        self.failures: list[Failure] = []
        self._on_failure = on_failure
        self._tallies: dict[str, dict[str, Count]] = {}
        self._ended: set[str] = set()
        self._last_words: dict[str, str] = {}
        self._lock = threading.Lock()

    def take(self, client: str, line: str) -> None:
        """A line that a client wrote: JSON, or else (a traceback) a failure itself."""
        self._last_words[client] = line.strip()
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            self.fail(client, "program", line.strip())
            return
        if "failure" in message:
            self._add(Failure(client=client, **message["failure"]))
        else:
            with self._lock:
                counts = {job: Count(**tally) for job, tally in message["tally"].items()}
                self._tallies[client] = counts
                if message.get("end"):
                    self._ended.add(client)

    def fail(self, client: str, job: str, error: str) -> None:
        """Something else that should not have happened."""
        self._add(Failure(time.time(), client, job, "", 0.0, error))

    def close(self, client: str) -> None:
        """The client's program has ended: it must have given its last account."""
        with self._lock:
            ended = client in self._ended
        if not ended:
            words = self._last_words.get(client, "nothing")
            self.fail(client, "program", f"ended without its last account; its last words: {words[:LONGEST]}")

    def counts(self) -> dict[tuple[str, str], Count]:
        """By client and job."""
        with self._lock:
            return {
                (client, job): count for client, jobs in self._tallies.items() for job, count in jobs.items()
            }

    def total(self) -> Count:
        """All together. Failures of programs count as failed operations."""
        total = sum(self.counts().values(), Count())
        programs = sum(failure.job == "program" for failure in self.failures)
        return total._replace(failed=total.failed + programs)

    def _add(self, failure: Failure) -> None:
        with self._lock:
            self.failures.append(failure)
        self._on_failure(failure)
