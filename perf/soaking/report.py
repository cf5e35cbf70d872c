"""From what was counted and watched in a soak to claims, tables and a file."""

import datetime
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from perf.soaking.changes import RATE
from perf.soaking.claims import (
    ENOUGH_CHANGES,
    ENOUGH_REVISIONS,
    LOOSE_DESCRIPTORS,
    Claim,
    Growth,
    Point,
    Verdict,
    fewest_renewals,
    grown,
    growth,
    judged,
    together,
    verdict,
    windows,
)
from perf.soaking.ledger import Count, Failure
from perf.soaking.room import CERTIFICATE_LIFE
from perf.soaking.watch import LogFindings

MIB = 2**20
MOST_SHOWN = 10  # defects and warnings that are printed; the file has all


class Outcome(NamedTuple):
    """Everything that is known of a soak of `seconds`.

    `revisions` and `written` are of the changes; `services_differ` names the nodes that do not have the last state.
    `left_open` is what the workers still had after the load, by node (-1: no answer); `left_waiting` the sockets in
    CLOSE_WAIT then.
    """

    machine: dict[str, str | int]
    busy: float
    seconds: float
    wanted_seconds: float
    counts: dict[tuple[str, str], Count]
    total: Count
    failures: list[Failure]
    memory: dict[str, list[Point]]
    anonymous: dict[str, list[Point]]
    descriptors: dict[str, list[Point]]
    lingering: dict[str, list[Point]]
    cpu: dict[str, float]
    renewals: dict[str, int]
    certificate_errors: list[str]
    written: int
    change_seconds: float
    visits: int
    revisions: dict[str, int]
    services_differ: list[str]
    left_open: dict[str, int]
    left_waiting: int
    restarted: list[str]
    watch_errors: list[str]
    logs: LogFindings


def claims(outcome: Outcome) -> list[Claim]:
    """The verdicts, in the order in which they are shown."""
    return [
        _requests(outcome),
        _rotation(outcome),
        _changes(outcome),
        _memory(outcome),
        _descriptors(outcome),
        _sockets(outcome),
        _left_over(outcome),
        _logs(outcome),
    ]


def _requests(outcome: Outcome) -> Claim:
    total, failed = outcome.total, len(outcome.failures)
    numbers = f"{total.done:,} operations, {total.bytes / MIB / 1024:.1f} GiB, {failed} failed"
    return Claim("no request fails", verdict(not failed and total.done == total.begun), numbers)


def _rotation(outcome: Outcome) -> Claim:
    renewals = outcome.renewals.values()
    fewest = fewest_renewals(outcome.seconds, CERTIFICATE_LIFE)
    numbers = (
        f"{len(outcome.renewals)} certificates, each renewed {min(renewals, default=0)} to {max(renewals, default=0)} "
        f"times; at least {fewest} wanted"
    )
    if outcome.certificate_errors:
        numbers += f"; {len(outcome.certificate_errors)} errors: {outcome.certificate_errors[0]}"
    holds = min(renewals, default=0) >= fewest and not outcome.certificate_errors
    name = f"certificates rotate every {CERTIFICATE_LIFE // 2} s"
    return Claim(name, verdict(holds) if fewest else Verdict.UNKNOWN, numbers)


def _changes(outcome: Outcome) -> Claim:
    rate = outcome.written / outcome.change_seconds if outcome.change_seconds else 0.0
    arrived = min(outcome.revisions.values(), default=0)
    numbers = (
        f"{outcome.written:,} written ({rate:.1f}/s), and {outcome.visits} pods came and went; "
        + ", ".join(f"{node} took in {count:,} revisions" for node, count in outcome.revisions.items())
    )
    if outcome.services_differ:
        numbers += f"; the last state did not come to {', '.join(outcome.services_differ)}"
    holds = (
        rate >= ENOUGH_CHANGES * RATE
        and arrived >= ENOUGH_REVISIONS * outcome.written
        and not outcome.services_differ
    )
    return Claim(f"{RATE:.0f} changes a second reach every proxy", verdict(holds), numbers)


def _memory(outcome: Outcome) -> Claim:
    series = together(outcome.memory)
    found = {process: growth(points, outcome.seconds) for process, points in series.items()}
    return _growth(outcome, "memory of no process grows by more than 5 %", found, "MiB", 0.0)


def _descriptors(outcome: Outcome) -> Claim:
    series = together(outcome.descriptors)
    found = {process: growth(points, outcome.seconds, min) for process, points in series.items()}
    return _growth(outcome, "no process leaks descriptors", found, "", LOOSE_DESCRIPTORS)


def _growth(outcome: Outcome, name: str, found: dict[str, Growth | None], unit: str, slack: float) -> Claim:
    known = {process: one for process, one in found.items() if one is not None}
    if not known:
        return Claim(name, Verdict.UNKNOWN, "no samples")
    bad = [f"{process}: {_change(one, unit)}" for process, one in known.items() if grown(one, slack)]
    worst = max(known, key=lambda process: known[process].share)
    numbers = "; ".join(bad) if bad else f"at most {worst}: {_change(known[worst], unit)}"
    return Claim(name, judged(bool(bad) or len(known) < len(found), outcome.seconds), numbers)


def _change(found: Growth, unit: str) -> str:
    digits = ".1f" if unit else ".0f"
    after = f"{found.after:{digits}} {unit}".strip()
    return f"{found.before:{digits}} to {after} ({found.share:+.1%})"


def _sockets(outcome: Outcome) -> Claim:
    found = {state: growth(points, outcome.seconds, min) for state, points in outcome.lingering.items()}
    numbers = [f"{state} {_change(one, '')}" for state, one in found.items() if one is not None]
    numbers.append(f"{outcome.left_waiting} in CLOSE_WAIT after the load")
    piled = any(one is not None and grown(one, LOOSE_DESCRIPTORS) for one in found.values())
    state = judged(piled, outcome.seconds)
    if outcome.left_waiting:
        state = Verdict.FAILED
    return Claim("no sockets pile up half-closed", state, ", ".join(numbers))


def _left_over(outcome: Outcome) -> Claim:
    numbers = ", ".join(
        f"{count} on {node}" if count >= 0 else f"{node} does not answer"
        for node, count in outcome.left_open.items()
    )
    holds = bool(outcome.left_open) and not any(outcome.left_open.values())
    return Claim("after the load the proxies hold no connection", verdict(holds), numbers)


def _logs(outcome: Outcome) -> Claim:
    defects, warnings = outcome.logs.defects, outcome.logs.warnings
    numbers = (
        f"{len(defects)} defects, {warnings.total()} warnings, {len(outcome.restarted)} processes restarted"
    )
    if outcome.watch_errors:
        numbers += f", {len(outcome.watch_errors)} errors of watching: {outcome.watch_errors[0]}"
    holds = not (defects or outcome.restarted or outcome.watch_errors)
    return Claim("no internal error, no restart", verdict(holds), numbers)


# What is shown.


def show(outcome: Outcome, console: Console) -> None:
    """Print it all."""
    console.print()
    console.print(_load_table(outcome))
    console.print(_process_table(outcome))
    console.print(_claim_table(outcome))
    for line in outcome.logs.defects[:MOST_SHOWN]:
        console.print(f"[red]{line}[/]", soft_wrap=True, markup=True)
    for text, count in outcome.logs.warnings.most_common(MOST_SHOWN):
        console.print(f"warned {count} times: {text}", soft_wrap=True, markup=False)
    machine = outcome.machine
    console.print(
        f"machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, Python {machine['python']}; {outcome.busy:.0%} busy meanwhile",
        markup=False,
    )
    if outcome.seconds < outcome.wanted_seconds:
        console.print(f"[yellow]ended after {outcome.seconds:.0f} of {outcome.wanted_seconds:.0f} s[/]")


def _table(title: str, *columns: str) -> Table:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, name in enumerate(columns):
        shown.add_column(name, justify="right" if number else "left", no_wrap=True)
    return shown


def by_job(counts: dict[tuple[str, str], Count]) -> dict[str, Count]:
    """The counts of all clients that have a job of the same name."""
    jobs: dict[str, Count] = defaultdict(Count)
    for (_, job), count in counts.items():
        jobs[job] += count
    return dict(jobs)


def _load_table(outcome: Outcome) -> Table:
    minutes = f"{outcome.seconds / 60:.1f} minutes of load"
    shown = _table(minutes, "load", "operations", "failed", "a second", "MiB", "slowest, ms")
    for job, count in by_job(outcome.counts).items():
        shown.add_row(
            job,
            f"{count.done:,}",
            f"[red]{count.failed}[/]" if count.failed else "0",
            f"{count.done / outcome.seconds:.1f}",
            f"{count.bytes / MIB:,.0f}",
            f"{count.slowest * 1000:,.0f}",
        )
    return shown


def _process_table(outcome: Outcome) -> Table:
    first, last = windows(outcome.seconds)
    title = (
        f"seconds {first[0]:.0f} to {first[1]:.0f}, and {last[0]:.0f} to {last[1]:.0f}: the median memory, the fewest "
        "descriptors"
    )
    shown = _table(
        title, "process", "PSS, MiB", "to", "", "of it anonymous", "to", "descriptors", "to", "CPU"
    )
    all_anonymous = outcome.anonymous | together(outcome.anonymous)
    all_descriptors = outcome.descriptors | together(outcome.descriptors)
    for process, points in sorted((outcome.memory | together(outcome.memory)).items(), key=_by_node):
        memory = growth(points, outcome.seconds)
        anonymous = growth(all_anonymous[process], outcome.seconds)
        descriptors = growth(all_descriptors[process], outcome.seconds, min)
        if memory is None or anonymous is None or descriptors is None:
            continue
        shown.add_row(
            process, f"{memory.before:.1f}", f"{memory.after:.1f}", f"{memory.share:+.1%}",
            f"{anonymous.before:.1f}", f"{anonymous.after:.1f}",
            f"{descriptors.before:.0f}", f"{descriptors.after:.0f}",
            f"{outcome.cpu[process]:.1%}" if process in outcome.cpu else "",
        )  # fmt: skip
    return shown


def _by_node(item: tuple[str, object]) -> tuple[str, str]:
    kind, _, node = item[0].partition(", ")
    return node, kind


def _claim_table(outcome: Outcome) -> Table:
    shown = Table(title="claims", title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("claim")
    shown.add_column("", no_wrap=True)
    shown.add_column("numbers")
    colours = {Verdict.HOLDS: "green", Verdict.FAILED: "bold red", Verdict.UNKNOWN: "yellow"}
    for claim in claims(outcome):
        shown.add_row(claim.name, f"[{colours[claim.verdict]}]{claim.verdict.value}[/]", claim.numbers)
    return shown


def as_json(outcome: Outcome) -> dict[str, Any]:
    """All numbers, with every sample."""
    found = outcome._asdict()
    found["counts"] = {job: count._asdict() for job, count in by_job(outcome.counts).items()}
    found["total"] = outcome.total._asdict()
    found["failures"] = [failure._asdict() for failure in outcome.failures]
    for name in ("memory", "anonymous", "descriptors", "lingering"):
        found[name] = {key: [_rounded(point) for point in points] for key, points in found[name].items()}
    found["logs"] = {"defects": outcome.logs.defects, "warnings": dict(outcome.logs.warnings)}
    judged_now = claims(outcome)
    verdicts = [
        {"claim": one.name, "verdict": one.verdict.value, "numbers": one.numbers} for one in judged_now
    ]
    return {"claims": verdicts} | found


def _rounded(point: Point) -> list[float]:
    return [round(number, 3) for number in point]


def write(directory: Path, outcome: Outcome) -> Path:
    """Write the JSON file, named for the time (UTC); its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"soak-{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H%M%SZ}.json"
    path.write_text(json.dumps(as_json(outcome), indent=1) + "\n")
    return path
