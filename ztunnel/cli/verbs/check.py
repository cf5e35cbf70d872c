"""`ambient check`: named checks of the machine and the mesh, each with what to do where it fails."""

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from ztunnel.cli.app import Examples
from ztunnel.cli.options import target_options
from ztunnel.cli.target import Which

if TYPE_CHECKING:
    from ztunnel.cli.checks.outcome import Check, Outcome

SYMBOLS = {"ok": "√", "warning": "‼", "failed": "×", "skipped": "-"}
ASCII_SYMBOLS = {"ok": "+", "warning": "!", "failed": "x", "skipped": "-"}
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "bright_black"}
PAUSE = 1.0  # seconds between two rounds of --wait


@click.command(
    "check",
    cls=Examples,
    short_help="Check the machine and the mesh, with a remedy for what is wrong.",
    examples=(
        "ambient check --pre                    # can this machine, or the kubeconfig's cluster, take a mesh?",
        "ambient check",
        "ambient check --wait 60 -o json        # in a script: until all is well, a minute at most",
    ),
)
@click.option(
    "--pre", is_flag=True, help="Only what a mesh needs of this machine or cluster, before one runs."
)
@click.option(
    "--wait", type=click.FloatRange(0), default=0.0, metavar="SECONDS",
    help="Check again until nothing fails, for so long.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="Format.")
@target_options()
def command(pre: bool, wait: float, output: str, which: Which) -> int:
    """Check the machine or the cluster, the control plane, the nodes' agents and proxies, the pods and their
    redirection in the kernel, certificates, objects and clocks. Nothing is changed. What is wrong with pods
    or certificates is looked at again after a second, since they come and go: what is told was so both times.

    \b
    √ all is well      ‼ a warning      × it failed      - skipped, since something that it needs failed

    Exit code 1 where something failed; warnings alone are no failure.
    """
    from ztunnel.cli.checks.outcome import Result, lasting

    look = _round(which, pre)
    end = time.monotonic() + wait
    seen = results = look()

    def failing() -> bool:
        return any(outcome.result is Result.FAILED for _, outcome in results)

    wrong = (Result.FAILED, Result.WARNING)
    again = any(check.moves and outcome.result in wrong for check, outcome in results)
    while again or (failing() and time.monotonic() + PAUSE <= end):
        time.sleep(PAUSE)
        before, seen, again = seen, look(), False
        results = lasting(before, seen)
    failed = failing()
    if output == "json":
        click.echo(json.dumps(_json(results), indent=2, ensure_ascii=False))
    else:
        _show(results)
    return 1 if failed else 0


def _round(which: Which, pre: bool) -> "Callable[[], list[tuple[Check, Outcome]]]":
    """What makes one round of checks."""
    from ztunnel.cli.checks.facts import gather
    from ztunnel.cli.checks.judge import judge
    from ztunnel.cli.target import Embedded

    if pre:
        cluster = which.cluster_or_none()
        if cluster is None:
            return lambda: judge(gather(which.state_or_default(), pre=True), pre=True)
        from ztunnel.cli.install.preflight import preflight

        api = cluster.api()
        return lambda: preflight(api)
    target = which.target()
    if isinstance(target, Embedded):
        return lambda: judge(gather(target.state, pre=False), pre=False)
    from ztunnel.cli.kube import checks

    return lambda: checks.judged(checks.gather(target))


def _symbol(word: str) -> str:
    """The symbol of a result, or what a terminal of another alphabet can show instead."""
    try:
        SYMBOLS[word].encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return click.style(ASCII_SYMBOLS[word], fg=COLOURS[word])
    return click.style(SYMBOLS[word], fg=COLOURS[word])


def _show(results: "list[tuple[Check, Outcome]]") -> None:
    for category, group in itertools.groupby(results, lambda result: result[0].category):
        click.echo(f"{category}\n{'-' * len(category)}")
        for check, outcome in group:
            word = outcome.result.value
            click.echo(f"{_symbol(word)} {check.name}")
            if word in ("warning", "failed"):
                for line in outcome.details:
                    click.echo(f"    {line}")
                if outcome.remedy:
                    click.echo(f"    remedy: {outcome.remedy}")
        click.echo()
    counts = Counter(outcome.result.value for _, outcome in results)
    told = [f"{counts['ok']} passed"]
    for word, words in (("failed", "failed"), ("warning", "with warnings"), ("skipped", "skipped")):
        if counts[word]:
            told.append(f"{counts[word]} {words}")
    verdict = _symbol("failed" if counts["failed"] else "ok")
    click.echo(f"Status check results are {verdict}: {', '.join(told)}")


def _json(results: "list[tuple[Check, Outcome]]") -> dict[str, object]:
    """The form of `linkerd check -o json`: success, and categories with their checks."""
    categories: dict[str, list[dict[str, object]]] = {}
    for check, outcome in results:
        categories.setdefault(check.category, []).append(
            {
                "description": check.name,
                "result": outcome.result.value,
                "details": outcome.details,
                "remedy": outcome.remedy,
            }
        )
    return {
        "success": not any(outcome.result.value == "failed" for _, outcome in results),
        "categories": [{"name": name, "checks": checks} for name, checks in categories.items()],
    }
