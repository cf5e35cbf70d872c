"""`python -m perf upgrade`: the node proxies are replaced, and killed, under load; no request may fail.

wrk keeps 64 connections busy from a pod on node 1 to one on node 2, while the proxy of the one node and then that of
the other is replaced by a new process (`ambient upgrade`). Each request has a connection of its own, or the
connections are kept. Then the same with control processes that are killed, and with one long connection.
"""

import argparse
import datetime
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from perf.load import HTTP_PORT, LoadError
from perf.machine import refusal
from perf.room import Room, WrongPathError
from perf.scale.report import Claim, Figures, Part, as_json, show
from ztunnel.inpod import netns

RESULTS = Path(__file__).parent / "results"
NODES = ("node-1", "node-2")
CONNECTIONS = 64
PAUSE = 0.1  # seconds between words on the long connection
GRACE = 30.0  # seconds: TERMINATION_GRACE_PERIOD in the embedded mesh
PATIENCE = 60.0
WIDTH = 120
PROGRAMS = ("nginx", "wrk")


class Run(NamedTuple):
    """What wrk found: requests a second, requests that were answered and that were not, the slowest in milliseconds."""

    rate: float
    requests: int
    failures: int
    slowest: float
    words: str


_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


def parse(output: str) -> Run:
    """Read wrk's report, failures and all. Raises LoadError where it is none."""
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    count = re.search(r"^\s*(\d+) requests in", output, re.MULTILINE)
    slowest = re.search(r"^\s+Latency\s+\S+\s+\S+\s+([\d.]+)(us|ms|s|m)\s", output, re.MULTILINE)
    if rate is None or count is None or slowest is None:
        raise LoadError(f"wrk measured nothing: {output.strip()[-300:]}")
    words = [line.strip() for line in output.splitlines() if re.match(r"\s*(Socket errors|Non-2xx)", line)]
    failures = sum(int(number) for line in words for number in re.findall(r"\b\d+\b(?!xx)", line))
    return Run(
        float(rate[1]), int(count[1]), failures, float(slowest[1]) * _UNITS[slowest[2]], "; ".join(words)
    )


class Upgrade:
    """The measurements, in a room that is running."""

    def __init__(self, room: Room, seconds: int, rounds: int) -> None:
        """Each load lasts `seconds`; `rounds` times each node's proxy is replaced in it."""
        self._room = room
        self._seconds = seconds
        self._rounds = rounds

    def under_load(self, act: Callable[[str], None] | None, *, kept: bool) -> Run:
        """Load, and meanwhile `act(node)` for one node after the other, spread evenly. Raises LoadError."""
        header = [] if kept else ["-H", "Connection: close"]
        found: list[Run] = []
        failure: list[BaseException] = []

        def load() -> None:
            try:
                words = ["-t2", f"-c{CONNECTIONS}", f"-d{self._seconds}s", "--latency", *header]
                found.append(parse(self._room.run("wrk", *words, f"http://{self._room.server}:{HTTP_PORT}/")))
            except BaseException as error:  # told by the thread that waits
                failure.append(error)

        thread = threading.Thread(target=load)
        began = time.monotonic()
        thread.start()
        try:
            nodes = NODES * self._rounds
            for number, node in enumerate(nodes, 1):
                time.sleep(max(0.0, began + self._seconds * number / (len(nodes) + 1) - time.monotonic()))
                if act is not None:
                    act(node)
        finally:
            thread.join()
        if failure:
            raise failure[0]
        return found[0]

    def replace(self, node: str) -> None:
        """Replace the node's proxy."""
        self._room.upgrade(node)

    def kill(self, node: str) -> None:
        """kill -9 of the control process of the node's proxy; its workers are left alone."""
        old = self._room.control_process(node)
        os.kill(old, signal.SIGKILL)
        end = time.monotonic() + PATIENCE
        while self._room.control_process(node) in (0, old):
            if time.monotonic() > end:
                raise LoadError(f"the proxy of {node} is not back within {PATIENCE:.0f} s")
            time.sleep(0.05)

    def long_connection(self, node: str) -> float:
        """For how many seconds a connection that is used all the time outlives its proxy's replacement."""
        client, server = self._room.pods["client"], self._room.server
        namespace = netns.open_path(client.netns)
        try:
            with netns.inside(namespace):
                connection = socket.socket()
        finally:
            os.close(namespace)
        request = f"GET / HTTP/1.1\r\nHost: {server}\r\n\r\n".encode()
        with connection:
            connection.settimeout(PATIENCE)
            connection.connect((server, HTTP_PORT))
            _ask(connection, request)
            self._room.upgrade(node)
            since = time.monotonic()
            while time.monotonic() - since < GRACE + PATIENCE:
                try:
                    _ask(connection, request)
                except OSError:
                    break
                time.sleep(PAUSE)
            return time.monotonic() - since


def _ask(connection: socket.socket, request: bytes) -> None:
    """One request and its whole answer, which has no more than a header of some lines and one of text."""
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"hello world\n"):
        data = connection.recv(4096)
        if not data:
            raise ConnectionResetError("the connection was closed")
        answer += data


def measure(seconds: int, rounds: int, *, say: Callable[[str], None] = print) -> Part:
    """All of it. Raises LoadError."""
    rows: list[tuple[str | float | int, ...]] = []
    claims: list[Claim] = []
    with Room(workers=2) as room, room.side(joined=True):
        upgrade = Upgrade(room, seconds, rounds)

        def one(name: str, act: Callable[[str], None] | None, *, kept: bool, claimed: bool = True) -> None:
            say(name)
            run = upgrade.under_load(act, kept=kept)
            if run.words:
                say(run.words)
            rows.append((name, run.requests, run.rate, run.slowest, run.failures))
            if claimed:
                claims.append(Claim(f"{name}: failed requests", "", run.failures, 0))

        one("nothing happens, a connection a request", None, kept=False)
        one("proxies replaced, a connection a request", upgrade.replace, kept=False)
        one("proxies replaced, connections kept", upgrade.replace, kept=True)
        one("control processes killed, a connection a request", upgrade.kill, kept=False)
        one("control processes killed, connections kept", upgrade.kill, kept=True)
        say(f"a long connection, for {GRACE:.0f} s")
        lasted = upgrade.long_connection("node-1")
        claims.append(
            Claim("a long connection: seconds of its grace period that it lost", "s", GRACE - lasted, 0.5)
        )
        claims.append(Claim("a long connection: seconds that it outlived it", "s", lasted - GRACE, 3))
    title = f"wrk, {CONNECTIONS} connections, {seconds} s each; each node's proxy {rounds} times"
    columns = ("what", "requests", "requests/s", "slowest, ms", "failed")
    return Part("upgrade", [Figures(title, columns, rows)], claims)


def main(argv: Sequence[str]) -> int:
    """Measure and report; the exit code: 1 where a request failed or nothing can be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m perf upgrade",
        description="The node proxies are replaced, and their control processes killed, under load: nothing may fail.",
        epilog="example:\n  sudo .venv/bin/python -m perf upgrade --rounds 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=int, default=12, help="seconds a load, fewer than 30 [12]")
    parser.add_argument("--rounds", type=int, default=2, help="times each node's proxy is replaced in it [2]")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON file [perf/results]"
    )
    given = parser.parse_args(argv)
    if not 0 < given.seconds < GRACE or given.rounds < 1:
        parser.error(f"--seconds must be from 1 to {GRACE - 1:.0f}, --rounds at least 1")
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if why_not := refusal(PROGRAMS):
        print(f"error: {why_not}", file=sys.stderr)
        return 1
    try:
        part = measure(given.seconds, given.rounds, say=lambda words: console.print(words, style="dim"))
    except (AssertionError, LoadError, WrongPathError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(part, console)
    console.print(f"all numbers: {_write(given.results, part)}", soft_wrap=True)
    return 0 if all(claim.holds for claim in part.claims) else 1


def _write(directory: Path, part: Part) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"upgrade-{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H%M%SZ}.json"
    path.write_text(json.dumps(as_json([part]), indent=2) + "\n")
    return path
