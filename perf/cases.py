"""What is measured: the cases, by group. A case knows the load; which side it goes through, it does not."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from subprocess import PIPE, Popen
from typing import NamedTuple

from perf.load import Iperf3, LoadError, Wrk, iperf3, iperf3_arguments, wrk
from perf.machine import pss_mb
from perf.pods import Pod, end, finish, until

IDLE = 10_000  # connections
FLOWING = 10_000_000  # bytes on the link after which a bulk stream is under way

HTTP, BULK, OUTSIDE = "http", "bulk", "outside"
"""Where a case goes: the server pod's nginx, its iperf3, and the iperf3 of a pod that is never in the mesh."""


class Measure(NamedTuple):
    """One number of one case, named with its unit. `higher` says whether more is better."""

    name: str
    higher: bool


RATE = Measure("requests/s", True)
CONNECTIONS = Measure("connections/s", True)
P50 = Measure("p50 us", False)
P99 = Measure("p99 us", False)
GBITS = Measure("Gbit/s", True)
PSS = Measure("PSS MB", False)
CPU_REQUESTS = Measure("CPU s/100k", False)
CPU_BULK = Measure("CPU s/GiB", False)

_WORK = {CPU_REQUESTS.name: 100_000, CPU_BULK.name: 2**30}


class Outcome(NamedTuple):
    """What a case found, by name of measure.

    `work` is how much was done for it, requests or bytes (0: not counted), with `connections` at least.
    """

    values: dict[str, float]
    work: float
    connections: int


class Lane(NamedTuple):
    """One side as a case sees it: where its load starts, where it leads, and the proxies' processes, by node."""

    client: Pod
    targets: Mapping[str, str]
    proxies: list[list[int]]

    def largest_pss(self) -> float:
        """MB of the larger of the two proxies."""
        return max(pss_mb(pids) for pids in self.proxies)


class Case(NamedTuple):
    """One thing that is measured. `cpu` is what the proxies' processor time is given per, None if it is not."""

    name: str
    measures: tuple[Measure, ...]
    run: Callable[[Lane, float], Outcome]
    cpu: Measure | None = None

    @property
    def all_measures(self) -> tuple[Measure, ...]:
        """What is measured, with the proxies' processor time."""
        return self.measures if self.cpu is None else (*self.measures, self.cpu)

    def cpu_per_work(self, seconds: float, work: float) -> dict[str, float]:
        """Seconds of the proxies' processor time per so many requests, or bytes."""
        return {} if self.cpu is None or not work else {self.cpu.name: seconds * _WORK[self.cpu.name] / work}


class Group(NamedTuple):
    """Cases about one subject; what goes through one side while another case must be compared with it is a pair."""

    name: str
    about: str
    cases: tuple[Case, ...]
    target: str = HTTP  # what a side must lead to for them


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def _values(found: Wrk, rate: Measure = RATE) -> dict[str, float]:
    return {rate.name: found.rate, P50.name: found.p50, P99.name: found.p99}


def requests(connections: int) -> Case:
    """Small HTTP requests, one after another on each of so many connections."""

    def run(lane: Lane, seconds: float) -> Outcome:
        found = wrk(lane.client.run, lane.targets[HTTP], connections, seconds)
        return Outcome(_values(found), found.requests, connections)

    return Case(f"HTTP, {_plural(connections, 'connection')}", (RATE, P50, P99), run, CPU_REQUESTS)


def new_connections(at_once: int) -> Case:
    """A connection for each request, so many at a time."""

    def run(lane: Lane, seconds: float) -> Outcome:
        found = wrk(lane.client.run, lane.targets[HTTP], at_once, seconds, "-H", "Connection: close")
        return Outcome(_values(found, CONNECTIONS), found.requests, found.requests)

    return Case(f"new connections, {at_once} at once", (CONNECTIONS, P50, P99), run, CPU_REQUESTS)


def bulk(streams: int, *, upload: bool, target: str = BULK) -> Case:
    """As many bytes as go through, from the client (`upload`) or to it."""

    def run(lane: Lane, seconds: float) -> Outcome:
        found = _patient(
            lambda: iperf3(lane.client.run, lane.targets[target], streams, seconds, upload=upload)
        )
        return Outcome({GBITS.name: found.rate}, found.bytes, streams + 1)

    what = "bulk" if target == BULK else "outside"
    name = f"{what}, {_plural(streams, 'stream')}, {'up' if upload else 'down'}"
    return Case(name, (GBITS,), run, CPU_BULK)


def _patient(run: Callable[[], Iperf3], attempts: int = 5) -> Iperf3:
    """An iperf3 server is busy for a moment after each client."""
    for _ in range(attempts - 1):
        try:
            return run()
        except LoadError as error:
            if "busy" not in str(error):
                raise
            time.sleep(0.2)
    return run()


def beside_bulk(connections: int) -> Case:
    """Small requests while one stream from the same client to the same server takes what it gets."""

    def run(lane: Lane, seconds: float) -> Outcome:
        arguments = iperf3_arguments(lane.targets[BULK], 1, seconds + 2, upload=True)
        stream = lane.client.start(["iperf3", *arguments], stdout=PIPE, stderr=PIPE)
        try:
            before = _sent(stream.pid)
            until(lambda: _sent(stream.pid) > before + FLOWING, "the bulk stream is under way", 5)
            found = wrk(lane.client.run, lane.targets[HTTP], connections, seconds)
            if stream.poll() is not None:
                raise LoadError(f"the bulk stream ended before the requests: {finish(stream)[-300:]}")
            rate = _rate_within(finish(stream), seconds)
        finally:
            end(stream)
        return Outcome(_values(found) | {GBITS.name: rate}, 0, connections + 2)

    return Case(f"HTTP, {connections} beside bulk", (RATE, P50, P99, GBITS), run)


def _sent(pid: int) -> int:
    """Bytes that have left the network namespace of a process on its links (proc(5), net/dev)."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    except OSError:
        return 0
    links = (line.split(":") for line in lines)
    return sum(int(numbers.split()[8]) for name, numbers in links if name.strip() != "lo")


def _rate_within(report: str, seconds: float) -> float:
    """Gbit/s of the stream's whole seconds that lie between the first one and `seconds`."""
    intervals = [one["sum"] for one in json.loads(report)["intervals"]]
    inner = [one for one in intervals if one["start"] > 0.9 and one["end"] < seconds + 0.1] or intervals
    return float(sum(one["bits_per_second"] for one in inner)) / len(inner) / 1e9


def idle_connections(count: int) -> Case:
    """Requests on 16 connections while so many others are open and idle, and the proxies' memory meanwhile."""

    def run(lane: Lane, seconds: float) -> Outcome:
        host, _, port = lane.targets[HTTP].rpartition(":")
        program = [sys.executable, str(Path(__file__).with_name("hold.py")), host, port, str(count)]
        holder = lane.client.start(program, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        try:
            words = _line(holder)
            found = wrk(lane.client.run, lane.targets[HTTP], 16, seconds)
            memory = {PSS.name: lane.largest_pss()} if lane.proxies else {}
            still = finish(holder).split()
        finally:
            end(holder)
        if still != ["still", str(count)]:
            raise LoadError(f"of {count} idle connections these were left at the end: {' '.join(still)}")
        opened = {CONNECTIONS.name: count / float(words[2])}
        return Outcome(_values(found) | opened | memory, 0, count + 16)

    name = f"HTTP, 16 beside {count:,} idle"
    return Case(name, (RATE, P50, P99, CONNECTIONS, PSS), run)


def _line(holder: "Popen[str]") -> list[str]:
    """The holder's words once all connections are open. Raises LoadError with its own where they could not be."""
    assert holder.stdout is not None  # noqa: S101  it was started so
    words = holder.stdout.readline().split()
    if words[:1] != ["open"]:
        finish(holder)
        raise LoadError("idle connections: the program that holds them said nothing")
    return words


GROUPS = (
    Group("requests", "small HTTP requests", tuple(map(requests, (1, 16, 64, 256)))),
    Group("connections", "new connections", (new_connections(16),)),
    Group(
        "bulk",
        "bulk throughput",
        tuple(bulk(streams, upload=upload) for streams in (1, 4) for upload in (True, False)),
    ),
    Group(
        "outside",
        "bulk throughput to a destination outside the mesh",
        tuple(bulk(1, upload=upload, target=OUTSIDE) for upload in (True, False)),
        OUTSIDE,
    ),
    Group("fairness", "small requests beside a bulk stream", (requests(4), beside_bulk(4))),
    Group("idle", f"{IDLE:,} open idle connections", (idle_connections(IDLE),)),
)

MEMORY = "memory"
MEMORY_CASE = Case("idle, 20 pods", (PSS,), lambda _lane, _seconds: Outcome({}, 0, 0))
"""Not a load: what the daemon of a node with 20 pods takes while nothing happens."""


def chosen(names: Iterable[str]) -> list[Group]:
    """The groups of these names, in their own order; all if there are no names."""
    wanted = set(names)
    return [group for group in GROUPS if not wanted or group.name in wanted]
