"""The load generators, wrk and iperf3: how they are called, and what their output says."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

HTTP_PORT = 8080
BULK_PORT = 5201

Run = Callable[..., str]
"""run(program, *arguments): the standard output of a program run in the client's pod; raises LoadError."""


class LoadError(Exception):
    """A load generator failed, or had failures to report; the message holds its own words."""


class Wrk(NamedTuple):
    """What wrk found: requests a second, latencies in microseconds, and how many requests there were."""

    rate: float
    p50: float
    p99: float
    requests: int


class Iperf3(NamedTuple):
    """What iperf3 found: Gbit/s and bytes that arrived."""

    rate: float
    bytes: float


_UNITS = {"us": 1.0, "ms": 1000.0, "s": 1_000_000.0, "m": 60_000_000.0}


def parse_wrk(output: str) -> Wrk:
    """Read wrk's report. Raises LoadError where requests failed or nothing came."""
    errors = re.search(r"^\s*(Socket errors:.*|Non-2xx.*)$", output, re.MULTILINE)
    if errors:
        raise LoadError(f"wrk: {errors[1].strip()}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    count = re.search(r"^\s*(\d+) requests in", output, re.MULTILINE)
    percentiles = [
        re.search(rf"^\s+{percent}%\s+([\d.]+)(\w+)", output, re.MULTILINE) for percent in (50, 99)
    ]
    p50, p99 = (float(found[1]) * _UNITS[found[2]] if found else 0.0 for found in percentiles)
    if rate is None or count is None or not float(rate[1]):
        raise LoadError(f"wrk measured nothing: {output.strip()[-300:]}")
    return Wrk(float(rate[1]), p50, p99, int(count[1]))


def parse_iperf3(output: str) -> Iperf3:
    """Read iperf3's report (-J). Raises LoadError."""
    try:
        report: dict[str, Any] = json.loads(output)
    except ValueError as error:
        raise LoadError(f"iperf3: {output.strip()[-300:]}") from error
    if "error" in report:
        raise LoadError(f"iperf3: {report['error']}")
    received = report["end"]["sum_received"]
    return Iperf3(float(received["bits_per_second"]) / 1e9, float(received["bytes"]))


def wrk(run: Run, target: str, connections: int, seconds: float, *more: str) -> Wrk:
    """Small HTTP requests to `target` (host:port), one after another on each connection. Raises LoadError."""
    options = ["-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", *more]
    return parse_wrk(run("wrk", *options, f"http://{target}/"))


def iperf3_arguments(target: str, streams: int, seconds: float, *, upload: bool) -> list[str]:
    """The command line that sends as much as goes through to `target` (host:port), or gets it from there."""
    host, _, port = target.rpartition(":")
    direction = [] if upload else ["-R"]
    return ["-c", host, "-p", port, "-t", f"{seconds:g}", "-P", str(streams), "-J", *direction]


def iperf3(run: Run, target: str, streams: int, seconds: float, *, upload: bool) -> Iperf3:
    """As many bytes as go through. Raises LoadError, "busy" in it where the server had another client just now."""
    return parse_iperf3(run("iperf3", *iperf3_arguments(target, streams, seconds, upload=upload)))
