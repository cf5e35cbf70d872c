"""`python -m perf controlplane`: one control plane, a real API server full of objects, and a fleet of node proxies."""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from perf.controlplane import cluster
from perf.controlplane.clients import Fleet
from perf.controlplane.cluster import SYSTEM, Place, Size
from perf.machine import cpu_seconds, pss_mb, refusal
from perf.scale.report import Cell, Claim, Figures, Part, percentile, show, write
from tests.kube.binaries import BuildError
from tests.kube.cell import CellError
from tests.kube.lab import Lab, LabError
from ztunnel.store.kube.api import Api, ApiError

RESULTS = Path(__file__).parent.parent / "results"
WIDTH = 120
LIMIT = 120.0  # seconds for anything to come
REQUIRED, WANTED = 500.0, 50.0  # ms: a changed pod at every node, 99 of 100 times
SEED = 6
LOG = "istiod.log"
PAUSE = 0.02  # seconds between two changes


class Process(NamedTuple):
    """The control plane that runs."""

    process: subprocess.Popen[bytes]
    port: int
    ready: float  # seconds from its start until it served

    @property
    def cpu(self) -> float:
        """Seconds of processor time so far."""
        return cpu_seconds([self.process.pid])

    @property
    def memory(self) -> float:
        """MB (PSS)."""
        return pss_mb([self.process.pid])

    def end(self) -> None:
        """As Kubernetes would."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@contextmanager
def control_plane(lab: Lab, folder: Path, port: int = 0) -> Iterator[Process]:
    """Run a control plane of the lab's cluster on loopback. Raises AssertionError where it does not come up."""
    file, log = folder / f"port-{time.monotonic_ns()}", folder / LOG
    started = time.monotonic()
    arguments = [
        "--kubernetes",
        f"--kubeconfig={lab.kubeconfig}",
        f"--namespace={SYSTEM}",
        f"--port-file={file}",
    ]
    arguments += [f"--listen=127.0.0.1:{port}"]
    arguments += [f"--{flag}=127.0.0.1:{_free_port()}" for flag in ("ready", "metrics", "webhook")]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ztunnel.controlplane", *arguments],
            stdout=output, stderr=output, env={**os.environ, "LOG_LEVEL": "warn", "POD_NAME": "istiod-perf"},
        )  # fmt: skip
    try:
        while not file.exists():
            if process.poll() is not None or time.monotonic() > started + LIMIT:
                raise AssertionError(f"the control plane does not serve: {log.read_text()[-2000:]}")
            time.sleep(0.01)
        yield Process(process, int(file.read_text()), time.monotonic() - started)
    finally:
        process.kill()
        process.wait()


def measure(size: Size, changes: int, name: str = "", *, say: Callable[[str], None] = print) -> Part:
    """Fill a cluster (one of our own, or the lab that is up under a name) and measure.

    Raises LabError, ApiError, AssertionError, OSError.
    """
    with (
        contextlib.nullcontext(Lab.attach(name))
        if name
        else Lab.up(f"perf-controlplane-{os.getpid()}", 0) as lab,
        tempfile.TemporaryDirectory(prefix="ambient-perf-") as folder,
    ):
        places = cluster.fill(lab.api, size, say=say)
        tokens = cluster.tokens(lab.api, size.nodes)
        say("control plane")
        try:
            return asyncio.run(_measure(lab, Path(folder), size, places, tokens, changes, say))
        except TimeoutError as error:
            log = (Path(folder) / LOG).read_text()[-2000:].strip()
            raise AssertionError(f"{error}; the control plane's log: {log or 'empty'}") from None


async def _measure(
    lab: Lab,
    folder: Path,
    size: Size,
    places: Sequence[Place],
    tokens: Sequence[str],
    changes: int,
    say: Callable[[str], None],
) -> Part:
    api, fleet = lab.api, Fleet(tokens)
    rows: list[tuple[Cell, ...]] = []
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as running:
        plane = await loop.run_in_executor(None, running.enter_context, control_plane(lab, folder))
        rows.append(("start: everything read, ready to serve", plane.ready, plane.cpu, plane.memory))
        context = _context(cluster.root(api))
        say(f"{len(tokens)} clients at once")
        before, started = plane.cpu, time.monotonic()
        tasks = [asyncio.create_task(one.run(plane.port, context)) for one in fleet.clients]
        # The Services that the API server has by itself are among what is received.
        wanted = size.services + size.pods
        done = await fleet.until(lambda: all(len(one.held) >= wanted for one in fleet.clients), LIMIT)
        sync = done - started
        rows.append(
            (f"{len(tokens)} clients connect at once: all have all", sync, plane.cpu - before, plane.memory)
        )
        each = fleet.clients[0].bytes / 1e6

        say(f"{changes} changes of a pod")
        before = plane.cpu
        latencies, slowest, answers = await _change(api, fleet, places, changes)
        rows.append(
            (
                f"{changes} changes of one pod, each to all",
                sum(slowest) / 1000,
                plane.cpu - before,
                plane.memory,
            )
        )

        say("control plane restarted")
        for one in fleet.clients:
            one.received = one.streams = 0
        started = time.monotonic()
        await loop.run_in_executor(None, plane.end)
        for one in fleet.clients:
            one.answered = False
        port = plane.port
        plane = await loop.run_in_executor(None, running.enter_context, control_plane(lab, folder, port))
        done = await fleet.until(lambda: all(one.answered for one in fleet.clients), LIMIT)
        again = sum(one.received for one in fleet.clients)
        rows.append(("restarted: every client is in sync again", done - started, plane.cpu, plane.memory))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    table = Figures(
        f"{size.services:,} services, {size.pods:,} pods, {len(tokens)} clients ({each:.1f} MB each)",
        ("", "seconds", "CPU seconds", "PSS MB"),
        rows,
    )
    rounded: list[tuple[Cell, ...]] = [
        ("to a client", *_spread(latencies)),
        ("to the last of all", *_spread(slowest)),
    ]
    rounded.append(("of that, until the API server answers who changed it", *_spread(answers)))
    spread = Figures("a pod changes: ms until it is told", ("", "p50", "p99", "most"), rounded)
    claims = [
        Claim(
            "a changed pod at every node, p99", "ms", round(percentile(latencies, 0.99), 1), REQUIRED, WANTED
        ),
        Claim("sent again after a restart", "resources", again, 0),
    ]
    return Part("controlplane", [table, spread], claims)


async def _change(
    api: Api, fleet: Fleet, places: Sequence[Place], count: int
) -> tuple[list[float], list[float], list[float]]:
    """Change pods one after another: ms to each client, to the last one, and to the API server's answer."""
    chance = random.Random(SEED)  # noqa: S311
    latencies: list[float] = []
    slowest: list[float] = []
    answers: list[float] = []
    for place in chance.sample(list(places), count):
        begun = [0.0, 0.0]

        def change(place: Place = place, begun: list[float] = begun) -> None:
            begun[0] = time.monotonic()
            cluster.set_ready(api, place, False)
            begun[1] = time.monotonic()

        arrived = await fleet.arrivals(place.resource, change, LIMIT)
        latencies += [1000 * (moment - begun[0]) for moment in arrived]
        slowest.append(1000 * (max(arrived) - begun[0]))
        answers.append(1000 * (begun[1] - begun[0]))
        await asyncio.sleep(PAUSE)
    return latencies, slowest, answers


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return percentile(values, 0.5), percentile(values, 0.99), max(values)


def _context(root: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=root)
    context.set_alpn_protocols(["h2"])
    return context


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def main(argv: Sequence[str]) -> int:
    """Measure and report; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m perf controlplane",
        description="One control plane on a real API server full of objects, with a fleet of simulated ztunnels.",
        epilog="example:\n  sudo .venv/bin/python -m perf controlplane --pods 10000 --services 1000 --clients 50",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, default, what in (
        ("services", 1_000, "Services"),
        ("pods", 10_000, "pods, shared out among them"),
        ("clients", 50, "nodes, each with a client"),
        ("changes", 100, "changes of one pod that are timed"),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=f"{what} [%(default)s]")
    parser.add_argument(
        "--lab", default="", metavar="NAME", help="use this lab, which is up, and leave it so"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON file [perf/results]"
    )
    given = parser.parse_args(argv)
    if min(given.services, given.pods, given.clients, given.changes) < 1 or given.changes > given.pods:
        parser.error("each number must be at least 1, and --changes at most --pods")
    if refused := refusal(("etcd",)):
        print(f"error: {refused}", file=sys.stderr)
        return 1
    # Ended by a signal it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    size = Size(given.services, given.pods, given.clients)
    try:
        part = measure(size, given.changes, given.lab, say=lambda words: console.print(words, style="dim"))
    except (AssertionError, LabError, CellError, BuildError, ApiError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(part, console)
    path = write(given.results, [part], "controlplane")
    console.print(f"all numbers: {path}", soft_wrap=True)
    return 0 if all(claim.holds for claim in part.claims) else 1
