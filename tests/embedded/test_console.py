"""What `ambient up` prints: each problem when it appears, once, and once that it is gone."""

import pytest

from ztunnel.embedded.console import Console
from ztunnel.store.problems import Problem


def test_problems_are_said_when_they_come_and_when_they_go(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    web = Problem("Service default/web", "web.yaml", "selects nothing", "correct spec.selector", "warning")
    other = Problem("Service default/web", "web.yaml", "port 80 twice", "remove one")
    console.problems([web])
    console.problems([web])
    assert capsys.readouterr().out == (
        "warning: Service default/web (web.yaml): selects nothing; correct spec.selector\n"
    )
    console.problems([other])
    assert capsys.readouterr().out == "error: Service default/web (web.yaml): port 80 twice; remove one\n"
    console.problems([])
    assert capsys.readouterr().out == "resolved: Service default/web\n"
    console.problems([web])
    assert "selects nothing" in capsys.readouterr().out, "it is news again"


def test_lines_are_not_wrapped_or_marked_up(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with console.waiting("starting"):
        console.say("[bold]" + "x" * 300)
    assert capsys.readouterr().out == "[bold]" + "x" * 300 + "\n"
