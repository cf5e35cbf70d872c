"""A run as tables for the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from perf.budget import Verdict, judge
from perf.results import Results, Series
from perf.sides import DIRECT, ENVOY

NARROWEST = 118  # columns; less would cut numbers off, which is worse than broken lines
WIDER = 30  # for each peer more


def table(results: Results) -> Table:
    """Medians of all sides, with half of what lies between the best and the worst round, and ratios."""
    shown = Table(
        title="medians ± half of what the rounds differ by; ratios are medians of the rounds' own",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("case", no_wrap=True)
    shown.add_column("measure", no_wrap=True)
    for side in results.sides:
        shown.add_column(side, justify="right", no_wrap=True)
        for other in _others(side):
            shown.add_column(f"/{other}", justify="right", no_wrap=True, style="dim")
    for case in results.cases():
        measures = results.measures(case)
        for index, measure in enumerate(measures):
            cells = [case.name if index == 0 else "", measure.name]
            for side in results.sides:
                cells.append(cell(results.series(side, case.name, measure.name)))
                ratios = (results.ratio(side, o, case.name, measure.name) for o in _others(side))
                cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            shown.add_row(*cells, end_section=index == len(measures) - 1)
    return shown


def _others(side: str) -> list[str]:
    """The sides that one is compared with."""
    if side == DIRECT:
        return []
    return [DIRECT] if side == ENVOY else [DIRECT, ENVOY]


def cell(series: Series | None) -> str:
    """A median with half of the spread; empty where nothing was measured."""
    if series is None:
        return ""
    value = f"{series.median:,.0f}" if series.median >= 100 else f"{series.median:.2f}"
    return f"{value} ±{series.spread / 2:.0%}" if len(series.values) > 1 else value


def budgets(verdicts: list[Verdict]) -> Table:
    """What is required and wanted of the mesh, and whether this run kept it."""
    shown = Table(
        title="budgets of the mesh", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("figure", "this run", "rounds", "required", "met", "wanted", "met", ""):
        shown.add_column(name, no_wrap=True, justify="left" if name in ("figure", "met", "") else "right")
    for verdict in verdicts:
        budget = verdict.budget
        shown.add_row(
            budget.text,
            budget.show(verdict.values.median),
            _between(verdict.values),
            budget.limit(budget.required),
            _met(verdict.required),
            budget.limit(budget.wanted),
            _met(verdict.wanted),
            "noisy" if verdict.noisy else "",
        )
    return shown


def _between(series: Series) -> str:
    """The lowest and the highest of the rounds."""
    low, high = min(series.values), max(series.values)
    return f"{low:.2f}-{high:.2f}" if len(series.values) > 1 else ""


def _met(kept: bool | None) -> str:
    if kept is None:
        return ""
    return "[green]yes[/]" if kept else "[red]no[/]"


def show(results: Results, noise: list[str], console: Console) -> None:
    """Print everything about a run."""
    machine = results.machine
    console.print()
    console.print(table(results))
    if verdicts := judge(results):
        console.print(budgets(verdicts))
    console.print(
        f"machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, Python {machine['python']}",
        soft_wrap=True,
    )
    for failure in results.failures:
        console.print(f"[red]not measured: {failure}[/]", soft_wrap=True)
    for failure in results.repeated:
        console.print(f"[yellow]measured again: {failure}[/]", soft_wrap=True)
    for reason in noise:
        console.print(f"[yellow]too noisy to trust: {reason}[/]", soft_wrap=True)
