"""What the load generators print becomes the right numbers, ratios and verdicts; rounds that differ are noisy."""

import io
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from perf.__main__ import main
from perf.budget import judge
from perf.cases import CPU_BULK, GROUPS, MEMORY_CASE, RATE, bulk, chosen, requests
from perf.chart import draw
from perf.load import LoadError, parse_iperf3, parse_wrk
from perf.machine import Ticks, cpu_seconds, describe, pss_mb
from perf.peer import parse_ready
from perf.report import NARROWEST, table
from perf.results import Results, Rounds, Series, load, write
from perf.room import AccessLogs, Carried

WRK = """Running 1s test @ http://10.244.2.2:8080/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.02ms  880.33us  20.57ms   85.10%
    Req/Sec    17.85k     2.10k   21.20k    70.00%
  Latency Distribution
     50%  306.00us
     75%    1.30ms
     90%    2.01ms
     99%    8.62ms
  17800 requests in 1.00s, 3.02MB read
{errors}Requests/sec:  17762.31
Transfer/sec:      3.01MB
"""


def test_wrk_latencies_come_in_microseconds_whatever_their_unit() -> None:
    assert parse_wrk(WRK.format(errors="")) == (17762.31, 306.0, 8620.0, 17800)


@pytest.mark.parametrize(
    "errors",
    ["  Socket errors: connect 0, read 3, write 0, timeout 0\n", "  Non-2xx or 3xx responses: 12\n"],
)
def test_a_failed_request_is_no_measurement(errors: str) -> None:
    with pytest.raises(LoadError, match=errors.strip()[:10]):
        parse_wrk(WRK.format(errors=errors))


def test_iperf3_counts_what_arrived() -> None:
    sent, received = {"bits_per_second": 9e9, "bytes": 9}, {"bits_per_second": 5.5e9, "bytes": 7}
    report = {"end": {"sum_sent": sent, "sum_received": received}}
    assert parse_iperf3(json.dumps(report)) == (5.5, 7)


def test_iperf3s_own_error_is_told() -> None:
    with pytest.raises(LoadError, match="the server is busy"):
        parse_iperf3(json.dumps({"error": "the server is busy running a test"}))


def rounds(*factors: float) -> Rounds:
    """As many rounds in which every measure of every case is 1000 times a factor."""
    cases = [case for group in GROUPS for case in group.cases]
    return [
        {case.name: {one.name: 1000.0 * factor for one in case.all_measures} for case in cases}
        for factor in factors
    ]


def results(
    direct: Rounds, mesh: Rounds | None = None, envoys: Rounds | None = None, **more: object
) -> Results:
    mesh = rounds(0.4, 0.5, 0.6) if mesh is None else mesh
    sides = {"direct": direct, "envoy": envoys or rounds(0.5, 0.5, 0.5), "mesh": mesh}
    run = Results(machine=describe(), time="2026-01-31T120000Z", seconds=1, sides=sides)
    for name, value in more.items():
        setattr(run, name, value)
    return run


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    """The machine was three times as fast in one round: the ratios do not see it."""
    drifting = results(rounds(1.0, 3.0, 1.0), rounds(0.5, 1.5, 0.4), rounds(0.5, 1.5, 0.5))
    name, measure = requests(16).name, RATE.name
    assert drifting.ratio("mesh", "direct", name, measure) == 0.5
    assert drifting.ratio("mesh", "envoy", name, measure) == 1.0
    assert drifting.ratio("mesh", "nobody", name, measure) is None
    (verdict,) = [one for one in judge(drifting) if one.budget.case.name == name]
    assert (min(verdict.values.values), max(verdict.values.values)) == (0.8, 1.0)


def test_a_round_that_one_side_lacks_has_no_ratio() -> None:
    run = results(rounds(1.0, 3.0, 1.0), rounds(0.5, 1.5, 0.5))
    name, measure = requests(16).name, RATE.name
    del run.sides["mesh"][0][name]
    found = run.ratios("mesh", "direct", name, measure)
    assert found is not None
    assert found.values == (0.5, 0.5)
    run.sides["direct"] = [{}, {}, {}]
    assert run.ratios("mesh", "direct", name, measure) is None


def test_every_measure_has_its_row_and_fits() -> None:
    run = results(rounds(1.0, 0.9, 1.1))
    shown = table(run)
    assert shown.row_count == sum(len(case.all_measures) for group in GROUPS for case in group.cases)
    assert [column.header for column in shown.columns[2:]] == [
        "direct", "envoy", "/direct", "mesh", "/direct", "/envoy",
    ]  # fmt: skip
    paper = Console(width=NARROWEST, file=io.StringIO())
    paper.print(shown)
    assert "…" not in paper.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_was_written_is_read_again(tmp_path: Path) -> None:
    run = results(rounds(1.0, 0.9, 1.1))
    path = write(tmp_path, run, ["noisy"])
    assert load(path) == run
    entry = json.loads(path.read_text())["cases"][0]
    assert entry["mesh"]["to_envoy"] == 1.0
    assert entry["direct"]["median"] == 1000.0
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not the results"):
        load(tmp_path / "other.json")


def test_budgets_are_judged_by_what_they_are_compared_with() -> None:
    run = results(rounds(1.0, 1.0, 1.0), rounds(0.6, 0.6, 0.6))
    run.sides["mesh"][0][MEMORY_CASE.name] = {"PSS MB": 75.0}
    verdicts = {v.budget.text: v for v in judge(run)}
    faster = verdicts["HTTP, 16 connections: requests/s, to envoy"]
    assert (faster.values.median, faster.required, faster.wanted) == (1.2, True, True)
    slower = verdicts["HTTP, 1 connection: p50 us, to envoy"]
    assert (slower.values.median, slower.required, slower.wanted) == (1.2, True, False)
    memory = verdicts["idle, 20 pods: PSS MB"]
    assert (memory.values.median, memory.required, memory.wanted) == (75.0, True, False)
    outside = verdicts["outside, 1 stream, up: Gbit/s, to direct"]
    assert (outside.values.median, outside.required, outside.wanted) == (0.6, False, None)
    fair = verdicts["HTTP, 4 beside bulk: p99 us, to HTTP, 4 connections"]
    assert (fair.values.median, fair.required) == (1.0, True)


def test_a_quiet_machine_is_not_called_noisy() -> None:
    assert results(rounds(1.0, 0.95, 1.1)).noise(0.1) == []


def test_rounds_that_differ_and_busy_cores_are_called_noisy() -> None:
    run = results(rounds(1.0, 0.5, 1.1), background=[0.4], stolen=0.2)
    reasons = run.noise(0.1)
    assert any("40% of the cores" in reason for reason in reasons)
    assert any("took 20%" in reason for reason in reasons)
    assert any("differ by 60%" in reason for reason in reasons)
    assert all(verdict.noisy for verdict in judge(run))


def test_spread_of_nothing_is_nothing() -> None:
    assert Series((0.0, 0.0)).spread == 0.0


def test_a_chart_is_the_same_for_the_same_run_and_shows_its_numbers() -> None:
    run = results(rounds(1.0, 0.9, 1.1))
    run.sides["<other>"] = rounds(0.7, 0.7, 0.7)
    picture = draw(run)
    assert picture == draw(run)
    tree = ElementTree.fromstring(picture)
    words = ["".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "<other>" in words
    assert any(word == "500 (1.00x Envoy)" for word in words)
    bars = [node for node in tree.iter("{http://www.w3.org/2000/svg}rect") if node.get("class") == "mesh"]
    assert all(int(node.attrib["x"]) + int(node.attrib["width"]) < 960 for node in bars)


def test_busy_is_what_was_not_idle() -> None:
    assert Ticks(200, 130, 5).busy_since(Ticks(100, 80, 0)) == 0.5
    assert Ticks(200, 130, 5).stolen_since(Ticks(100, 80, 0)) == 0.05


def test_memory_and_time_of_a_process() -> None:
    assert 1 < pss_mb([os.getpid()]) < 10_000
    before = cpu_seconds([os.getpid()])
    sum(range(3_000_000))
    assert before <= cpu_seconds([os.getpid()]) < before + 60
    assert cpu_seconds([os.getpid()]) > 0
    assert pss_mb([2**22 + 1]) == cpu_seconds([2**22 + 1]) == 0.0


def test_processor_time_is_given_per_work() -> None:
    assert requests(16).cpu_per_work(2.0, 50_000) == {"CPU s/100k": 4.0}
    assert bulk(1, upload=True).cpu_per_work(2.0, 2**30) == {CPU_BULK.name: 2.0}
    assert bulk(1, upload=True).cpu_per_work(2.0, 0) == {}


def test_a_peers_targets() -> None:
    line = "ready http=127.0.0.1:9201 bulk=127.0.0.1:9202\n"
    assert parse_ready(line) == {"http": "127.0.0.1:9201", "bulk": "127.0.0.1:9202"}
    for wrong in ("", "ready", "ready http=127.0.0.1:1", "ready http=a:1 bulk=b", line + "more=x:1", "no"):
        with pytest.raises(LoadError, match="expected is"):
            parse_ready(wrong)


def test_access_log_lines_are_counted_once_each_by_direction(tmp_path: Path) -> None:
    log = tmp_path / "ztunnel-node-1.log"
    out = b'{"scope":"access","direction":"outbound","connection_security_policy":"unknown"}\n'
    tunnelled = b'{"scope":"access","direction":"inbound","connection_security_policy":"mutual_tls"}\n'
    plain = tunnelled.replace(b"mutual_tls", b"unknown")
    log.write_bytes(b'{"scope":"xds","direction":"outbound"}\n' + out + tunnelled + plain + out[:20])
    logs = AccessLogs(tmp_path)
    assert logs.carried() == Carried(1, 1)
    with log.open("ab") as file:
        file.write(out[20:])
    assert logs.settled() == Carried(2, 1)


def test_groups_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [group.name for group in chosen(["bulk", "requests"])] == ["requests", "bulk"]
    assert chosen([]) == list(GROUPS)
    for wrong in (["bluk"], ["--rounds", "0"], ["--peer", "mesh=x"], ["--peer", "name"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "unknown group 'bluk'; there are requests" in capsys.readouterr().err
