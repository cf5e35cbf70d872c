"""The visitors: a closed loop of keep-alive connections that measures every request; standard library only.

Prints JSON lines: a progress report each interval, and at its end one with `"done": true`. Runs inside a pod.
"""

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from array import array
from collections.abc import Sequence
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from ztunnel.cli.demo.bookshop import MARKER
from ztunnel.cli.demo.http1 import Client, HttpError

MOST_ERRORS_KEPT = 5


def quantile(latencies: Sequence[float], share: float) -> float:
    """The value below which `share` of the (sorted) values lie, by nearest rank; 0.0 of none."""
    if not latencies:
        return 0.0
    return latencies[min(len(latencies) - 1, int(share * len(latencies)))]


class Load:
    """The requests of all visitors together: how many, how many failed and why, and each one's seconds."""

    def __init__(self, url: str, marker: str, per_connection: int, limit: int) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or 80
        self.path = parts.path or "/"
        self.marker = marker
        self.per_connection = per_connection
        self.limit = limit
        self.latencies = array("d")
        self.failures = 0
        self.errors: dict[str, int] = {}
        self.stop = threading.Event()
        self._started = 0
        self._lock = threading.Lock()

    def _next(self) -> bool:
        if self.stop.is_set():
            return False
        with self._lock:
            self._started += 1
            return not self.limit or self._started <= self.limit

    def visit(self) -> None:
        """Be one visitor: request after request, on a new connection after `per_connection` of them."""
        client = Client(self.host, self.port)
        wanted = self.marker.encode()
        done = 0
        while self._next():
            begin = time.perf_counter()
            failure = ""
            try:
                status, body = client.get(self.path, {MARKER: self.marker})
                if status != 200:
                    failure = f"HTTP {status}: {body[:200].decode(errors='replace')}"
                elif wanted not in body:
                    failure = "the answer lacks the marker"
            except (OSError, HttpError) as error:
                failure = str(error) or type(error).__name__
            seconds = time.perf_counter() - begin
            with self._lock:
                self.latencies.append(seconds)
                if failure:
                    self.failures += 1
                    if failure in self.errors or len(self.errors) < MOST_ERRORS_KEPT:
                        self.errors[failure] = self.errors.get(failure, 0) + 1
            done += 1
            if done % self.per_connection == 0:
                client.close()
            if failure:
                self.stop.wait(0.05)  # a target that is down is not asked in a tight loop
        client.close()

    def report(self, since: int, seconds: float) -> dict[str, Any]:
        """Counts so far, and rate and latencies of the requests from number `since` on, made in `seconds`."""
        with self._lock:
            recent = sorted(self.latencies[since:])
            report: dict[str, Any] = {
                "requests": len(self.latencies),
                "failures": self.failures,
                "errors": dict(self.errors),
            }
        report["requests_per_second"] = round(len(recent) / seconds, 1) if seconds > 0 else 0.0
        report["p50_ms"] = round(quantile(recent, 0.50) * 1000, 3)
        report["p99_ms"] = round(quantile(recent, 0.99) * 1000, 3)
        return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Load one URL as told by the command line, until the time or the number of requests is up, or SIGTERM."""
    parser = argparse.ArgumentParser(prog="loadgen", description="Visitors of the demo's bookshop.")
    parser.add_argument("url", help="http://HOST:PORT/PATH")
    parser.add_argument("--marker", required=True, help="sent with each request, expected in each answer")
    parser.add_argument("--connections", type=int, default=4, help="visitors at a time")
    parser.add_argument("--per-connection", type=int, default=20, help="requests before a visitor reconnects")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--requests", type=int, default=0, help="stop after this many (0: only by time)")
    parser.add_argument("--report", type=float, default=0.5, help="seconds between reports")
    options = parser.parse_args(arguments)
    load = Load(options.url, options.marker, options.per_connection, options.requests)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        load.stop.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    visitors = [threading.Thread(target=load.visit) for _ in range(options.connections)]
    begin = last = time.perf_counter()
    for visitor in visitors:
        visitor.start()
    seen = 0
    while any(visitor.is_alive() for visitor in visitors):
        remaining = begin + options.seconds - time.perf_counter()
        if remaining <= 0:
            load.stop.set()
        _wait_for_all(visitors, min(options.report, remaining) if remaining > 0 else options.report)
        now = time.perf_counter()
        report = load.report(seen, now - last)
        seen, last = report["requests"], now
        print(json.dumps(report), flush=True)
    elapsed = time.perf_counter() - begin
    print(json.dumps({"done": True, "seconds": round(elapsed, 3), **load.report(0, elapsed)}), flush=True)


def _wait_for_all(visitors: Sequence[threading.Thread], seconds: float) -> None:
    """Wait until all have ended, at most `seconds`."""
    end = time.perf_counter() + seconds
    for visitor in visitors:
        visitor.join(max(0.0, end - time.perf_counter()))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
    sys.exit(0)
