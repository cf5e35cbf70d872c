"""The soak's rules: what counts as growth, failure and defect; and its clients and servers, against each other."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from perf.machine import describe
from perf.soaking import payload, serving, traffic
from perf.soaking.claims import (
    LONG_ENOUGH,
    Claim,
    Growth,
    Point,
    Verdict,
    fewest_renewals,
    grown,
    growth,
    judged,
    together,
    windows,
)
from perf.soaking.ledger import Count, Failure, Ledger
from perf.soaking.report import Outcome, as_json, claims
from perf.soaking.traffic import Job, Load, Tally
from perf.soaking.watch import LogFindings, classify, sizes

# Growth.


def leak(seconds: float, rate: float, noise: float = 0.0) -> list[Point]:
    """Samples every 2 s of what begins at 100 and grows by `rate` a second, every fifth of them `noise` too high."""
    return [
        Point(at, 100 + rate * at + (noise if at % 10 == 0 else 0.0)) for at in range(0, int(seconds) + 1, 2)
    ]


def test_the_second_minute_is_compared_with_the_last() -> None:
    assert windows(600) == ((60, 120), (540, 600))


def test_the_windows_of_a_short_run_do_not_overlap() -> None:
    (begin, middle), (middle_too, end) = windows(30)
    assert (begin, end) == (10, 30)
    assert middle == middle_too == 20


def test_growth_before_the_first_minute_does_not_count() -> None:
    points = [Point(at, min(at, 60)) for at in range(0, 601, 2)]
    assert growth(points, 600) == Growth(60, 60)


def test_a_slow_leak_is_growth_and_noise_is_none() -> None:
    slow, still = growth(leak(600, 0.02), 600), growth(leak(600, 0.0, noise=80.0), 600)
    assert slow is not None
    assert still is not None
    assert grown(slow)
    assert not grown(still)


def test_connections_that_are_open_by_chance_are_no_leak_of_descriptors() -> None:
    points = [Point(at, 10 + (at * 7 % 30) * (at > 300)) for at in range(0, 601, 2)]
    assert growth(points, 600, min) == Growth(10, 10)
    leaking = [Point(at, value + at / 60) for at, value in points]
    least = growth(leaking, 600, min)
    assert least is not None
    assert grown(least, slack=2)


def test_the_workers_of_a_node_are_judged_together_at_each_moment() -> None:
    series = {
        "agent, node-1": [Point(0, 1.0)],
        "worker 0, node-1": [Point(0, 10.0), Point(2, 20.0), Point(4, 1.0)],
        "worker 1, node-1": [Point(0, 20.0), Point(2, 10.0)],
        "worker 0, node-2": [Point(0, 5.0)],
    }
    assert together(series) == {
        "agent, node-1": [Point(0, 1.0)],
        "workers, node-1": [Point(0, 30.0), Point(2, 30.0)],
        "workers, node-2": [Point(0, 5.0)],
    }


def test_a_few_descriptors_more_are_no_growth_although_they_are_more_than_5_percent() -> None:
    assert grown(Growth(10, 12))
    assert not grown(Growth(10, 12), slack=2)
    assert grown(Growth(10, 13), slack=2)


def test_no_samples_in_a_window_is_no_answer() -> None:
    assert growth([Point(70, 1.0)], 600) is None


def test_growth_is_judged_only_in_a_run_that_is_long_enough() -> None:
    assert judged(True, LONG_ENOUGH - 1) is Verdict.UNKNOWN
    assert judged(True, LONG_ENOUGH) is Verdict.FAILED
    assert judged(False, LONG_ENOUGH) is Verdict.HOLDS


def test_renewals_that_are_owed_follow_from_the_life() -> None:
    assert fewest_renewals(600, 60) == 17
    assert fewest_renewals(20, 60) == 0


# The account of the operations.


def account() -> tuple[Ledger, list[Failure]]:
    told: list[Failure] = []
    return Ledger(told.append), told


def tally(end: bool = False, **numbers: float) -> str:
    return json.dumps({"tally": {"job": numbers}} | ({"end": True} if end else {}))


def test_the_last_tally_of_each_client_counts() -> None:
    ledger, told = account()
    ledger.take("east", tally(begun=3, done=2, failed=0, bytes=20, slowest=0.1))
    ledger.take("east", tally(end=True, begun=5, done=5, failed=0, bytes=50, slowest=0.2))
    ledger.take("west", tally(end=True, begun=1, done=1, failed=0, bytes=7, slowest=0.5))
    ledger.close("east")
    ledger.close("west")
    assert ledger.total() == Count(6, 6, 0, 57, 0.5)
    assert told == []


def test_a_client_that_ends_without_its_account_is_a_failure() -> None:
    ledger, told = account()
    ledger.take("east", tally(begun=3, done=3, failed=0, bytes=20, slowest=0.1))
    ledger.close("east")
    (failure,) = told
    assert failure.error.startswith("ended without its last account; its last words: {")
    assert ledger.total().failed == 1


def test_a_traceback_of_a_client_is_a_failure() -> None:
    ledger, told = account()
    ledger.take("east", "Traceback (most recent call last):\n")
    assert told[0].error == "Traceback (most recent call last):"


def test_a_failure_is_told_with_its_words_and_its_time() -> None:
    ledger, told = account()
    failure = {"time": 1000.25, "job": "bulk", "host": "10.0.0.1", "took": 10.0, "error": "uploading: reset"}
    ledger.take("east", json.dumps({"failure": failure}))
    assert told == ledger.failures
    assert str(told[0]).endswith(".25 east, bulk 10.0.0.1: uploading: reset (10.00 s)")


# Logs.


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"level":"error","scope":"access","error":"reset by peer"}', ""),
        (b'{"level":"error","scope":"proxy","message":"internal error; the connection is closed"}', "defect"),
        (b'{"level":"warn","message":"x","traceback":"Traceback (most recent call last)"}', "defect"),
        (b'{"level":"error","scope":"worker","message":"a worker ended"}', "defect"),
        (b'{"level":"warn","scope":"zds","message":"trying again"}', "warning"),
        (b'{"level":"info","scope":"xds","message":"no error here"}', ""),
        (b"2026-11-23T12:00:00.000000Z error controlplane.ca cannot sign", "defect"),
        (b"2026-11-23T12:00:00.000000Z warn  controlplane.xds client rejects resources", "warning"),
        (b"2026-11-23T12:00:00.000000Z info  controlplane.ca an error was told of", ""),
        (b"2026-11-23 12:00:00,123 ERROR embedded.runtime Pod default/web", "defect"),
        (b"2026-11-23 12:00:00,123 INFO embedded.runtime Pod default/web", ""),
        (b"Traceback (most recent call last):", "defect"),
    ],
)  # fmt: skip
def test_what_a_log_line_tells_of(line: bytes, kind: str) -> None:
    assert classify(line) == kind


def test_sizes_of_a_process() -> None:
    found = sizes(os.getpid())
    assert 1 < found.anonymous <= found.pss < 10_000
    with socket.socket():
        assert sizes(os.getpid()).descriptors == found.descriptors + 1


# Claims.

GOOD = Outcome(
    machine=describe(),
    busy=0.5,
    seconds=600,
    wanted_seconds=600,
    counts={("east", "bulk"): Count(10, 10, 0, 10, 0.1)},
    total=Count(10, 10, 0, 10, 0.1),
    failures=[],
    memory={"worker": leak(600, 0.0)},
    anonymous={"worker": leak(600, 0.0)},
    descriptors={"worker": leak(600, 0.0)},
    lingering={"CLOSE_WAIT": [Point(at, 0) for at in range(0, 601, 6)]},
    cpu={"worker": 0.1},
    renewals={"a on node-1": 19},
    certificate_errors=[],
    written=6000,
    change_seconds=600,
    visits=59,
    revisions={"node-1": 5990, "node-2": 5985},
    services_differ=[],
    left_open={"node-1": 0, "node-2": 0},
    left_waiting=0,
    restarted=[],
    watch_errors=[],
    logs=LogFindings([], Counter()),
)
"""A run in which everything holds; each test below changes one thing."""
FAILURE = Failure(0.0, "east", "bulk", "10.0.0.1", 1.0, "reset")


def failed(found: list[Claim]) -> list[str]:
    return [claim.name for claim in found if claim.verdict is not Verdict.HOLDS]


def test_a_good_run_holds() -> None:
    assert failed(claims(GOOD)) == []
    json.dumps(as_json(GOOD))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"failures": [FAILURE]}, "no request fails"),
        ({"total": Count(11, 10, 0, 10, 0.1)}, "no request fails"),
        ({"renewals": {"a on node-1": 19, "b on node-2": 9}}, "certificates rotate every 30 s"),
        ({"renewals": {}}, "certificates rotate every 30 s"),
        ({"certificate_errors": ["a: failing"]}, "certificates rotate every 30 s"),
        ({"revisions": {"node-1": 5990, "node-2": 100}}, "10 changes a second reach every proxy"),
        ({"written": 3000, "revisions": {"node-1": 3000}}, "10 changes a second reach every proxy"),
        ({"services_differ": ["node-2"]}, "10 changes a second reach every proxy"),
        ({"memory": {"worker": leak(600, 0.02)}}, "memory of no process grows by more than 5 %"),
        ({"memory": {"worker": leak(300, 0.0)}}, "memory of no process grows by more than 5 %"),
        ({"descriptors": {"worker": leak(600, 0.02)}}, "no process leaks descriptors"),
        ({"lingering": {"CLOSE_WAIT": leak(600, 0.02)}}, "no sockets pile up half-closed"),
        ({"left_waiting": 1}, "no sockets pile up half-closed"),
        ({"left_open": {"node-1": 1, "node-2": 0}}, "after the load the proxies hold no connection"),
        ({"left_open": {"node-1": -1}}, "after the load the proxies hold no connection"),
        ({"restarted": ["worker"]}, "no internal error, no restart"),
        ({"logs": LogFindings(["ztunnel: internal error"], Counter())}, "no internal error, no restart"),
        ({"watch_errors": ["after 3 s: gone"]}, "no internal error, no restart"),
    ],
)  # fmt: skip
def test_one_thing_that_is_wrong_is_one_claim_that_fails(change: dict[str, object], name: str) -> None:
    assert failed(claims(GOOD._replace(**change))) == [name]  # type: ignore[arg-type]


def test_a_short_run_does_not_judge_growth() -> None:
    short = GOOD._replace(seconds=60, memory={"worker": leak(60, 5.0)}, change_seconds=60, written=600)
    verdicts = {claim.name: claim.verdict for claim in claims(short)}
    assert verdicts["memory of no process grows by more than 5 %"] is Verdict.UNKNOWN
    assert Verdict.FAILED not in verdicts.values()


# Clients and servers.


def test_what_is_transferred_has_a_sum_that_both_ends_know() -> None:
    total = payload.Sum()
    for chunk in payload.chunks(200_000):
        total.add(chunk)
    assert str(total) == payload.expected(200_000)
    assert len(payload.body(200_000)) == 200_000


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers' ports are free ones, of those that the kernel gives to nobody (below its ephemeral ones)."""
    free = {}
    sockets: list[socket.socket] = []
    for port in random.sample(range(12000, 32000), 1000):
        with contextlib.suppress(OSError):
            sockets.append(socket.create_server(("", port)))
        if len(sockets) == 3:
            break
    for name, sock in zip(("TALK_PORT", "BANNER_PORT", "CLOSED_PORT"), sockets, strict=True):
        free[name] = sock.getsockname()[1]
        sock.close()
        monkeypatch.setattr(traffic, name, free[name])
        if name != "CLOSED_PORT":
            monkeypatch.setattr(serving, name, free[name])


async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An HTTP server in few words."""
    with closing(writer):
        while head := (await reader.read(4096)).decode():
            size = int(head.split()[1].lstrip("/"))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + payload.body(size))
            if "Connection: close" in head:
                return


async def accepts(port: int) -> bool:
    """Whether somebody listens there by now."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def outcome(job: Job, operations: int) -> tuple[Tally, list[str]]:
    """Let a job run against the servers until it has done or failed so many operations."""
    server = asyncio.create_task(serving.main())
    http = await asyncio.start_server(web, "127.0.0.1", 0)
    async with asyncio.timeout(10):
        for name in ("TALK_PORT", "BANNER_PORT"):
            while not await accepts(vars(serving)[name]):
                await asyncio.sleep(0.01)
    said: list[str] = []
    job = job._replace(port=http.sockets[0].getsockname()[1])
    load = Load([job], lambda message: said.append(message.get("failure", {}).get("error", "")))
    running = asyncio.create_task(load.run())
    tally = load.tallies[job.name]
    async with asyncio.timeout(20):
        while tally.done + tally.failed < operations:
            await asyncio.sleep(0.01)
        load.stopping.set()
        await running
    http.close()
    os.kill(os.getpid(), signal.SIGTERM)  # taken by the server's own handler
    await server
    return tally, [error for error in said if error]


@pytest.mark.usefixtures("ports")
@pytest.mark.parametrize("kind", sorted(traffic.KINDS))
def test_every_kind_of_client_works_with_the_servers(kind: str) -> None:
    tally, errors = asyncio.run(outcome(Job("job", kind, ["127.0.0.1"], 200, 2, 300_000), 12))
    assert errors == []
    assert tally.begun == tally.done >= 12


@pytest.mark.usefixtures("ports")
@pytest.mark.parametrize("kind", sorted(set(traffic.KINDS) - {"refused"}))
def test_a_server_that_is_not_there_is_a_failure_of_each_operation(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "AFTER_FAILURE", 0.0)
    monkeypatch.setattr(traffic.Client, "open", refuse)
    job = Job("job", kind, ["127.0.0.1"], 200, 1, 300_000)
    tally, errors = asyncio.run(outcome(job, 3))
    assert tally.failed == len(errors) == tally.begun >= 3
    assert all(error.startswith("connecting: ") for error in errors)


async def refuse(self: traffic.Client, port: int) -> traffic.Connection:
    self.stage = "connecting"
    raise ConnectionRefusedError("nobody is there")


def test_a_wrong_body_is_not_taken_for_the_right_one() -> None:
    with pytest.raises(traffic.WrongAnswerError):
        traffic.check(bytes(12), 12)


@pytest.mark.parametrize("option", [["--stdin"], ["--seconds", "0"]])
def test_a_program_of_clients_tells_its_account_at_its_end(option: list[str]) -> None:
    root = Path(traffic.__file__).parents[2]
    jobs = json.dumps([Job("job", "held", ["127.0.0.1"], 5)._asdict()])
    program = subprocess.run(
        [sys.executable, "-m", "perf.soaking.traffic", *option, jobs],
        input="",
        capture_output=True,
        text=True,
        cwd=root,
        timeout=30,
        check=True,
    )
    assert json.loads(program.stdout.splitlines()[-1])["end"] is True
