"""The frame of the command: help with examples for every verb, exit codes, errors without tracebacks."""

import ast
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import ztunnel.cli.main
from ztunnel import __version__
from ztunnel.cli import habits
from ztunnel.cli.app import VERBS, Examples, ambient, run
from ztunnel.cli.errors import UserError
from ztunnel.cli.options import default_state
from ztunnel.cli.selectors import parse

HEAVY = {
    "trio",
    "scapy",
    "yaml",
    "rich",
    "msgspec",
    "OpenSSL",
    "cryptography",
    "pyroute2",
    "google",
}


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(ambient)
    for name in ambient.list_commands(context):
        command = ambient.get_command(context, name)
        assert command is not None
        yield name, command


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "ztunnel.cli.main", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_verb_of_the_readme_is_there() -> None:
    wanted = {"up", "down", "status", "apply", "delete", "get", "label", "exec", "logs", "demo"}
    assert {name for name, _ in commands()} >= wanted


@pytest.mark.parametrize("name", list(VERBS))
def test_help_has_examples_that_start_with_the_verb_and_can_be_parsed(name: str) -> None:
    shown = CliRunner().invoke(ambient, [name, "--help"])
    assert shown.exit_code == 0
    assert f"Usage: ambient {name}" in shown.output
    examples = shown.output.partition("Examples:\n")[2].splitlines()
    assert examples
    command = dict(commands())[name]
    assert isinstance(command, Examples)
    assert [line.strip() for line in examples] == list(command.examples)
    for example in command.examples:
        words = example.partition("#")[0].rpartition("| ")[2].split()
        assert words[:2] == ["ambient", name]
        command.make_context(name, words[2:])  # raises a usage error where an example would not run


@pytest.mark.parametrize("name", list(VERBS))
def test_options_all_have_a_help_text(name: str) -> None:
    for option in dict(commands())[name].params:
        if isinstance(option, click.Option):
            assert option.help, option.name


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from ztunnel.cli.app import run; run(['--help']); run(['demo', '--help']);"
        f"sys.stderr.write(' '.join(sorted({HEAVY!r} & set(sys.modules))))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    assert "Examples:" in shown.stdout


def test_version() -> None:
    assert cli("--version").stdout == f"ambient {__version__}\n"


def test_wrong_usage_is_exit_code_2_and_names_the_word() -> None:
    for arguments, word in [
        (["fly"], "there is no verb 'fly'"),
        (["instal"], "did you mean install"),
        (["viz", "stat", "deploy"], "ambient stat"),
        (["inject", "-"], "istio.io/dataplane-mode=ambient"),
        (["kube-inject", "-f", "x"], "there are no sidecars"),
        (["experimental", "precheck"], "leave the word out"),
        (["precheck"], "ambient check --pre"),
        (["pc", "routes", "web"], "the node proxy has none; nearest is: services"),
        (["pc", "workload-s"], "did you mean workloads"),
        (["analyze", "-n", "shop", "-A"], "do not go together"),
        (["get"], "KIND"),
        (["get", "pods", "--colour"], "--colour"),
        (["up", "x", "--nodes", "0"], "--nodes"),
        (["exec", "web"], "PROGRAM"),
        (["label", "namespace", "default", "nonsense"], "KEY=VALUE"),
        (["delete"], "-f FILE"),
        (["delete", "pod"], "NAME"),
        (["get", "gadgets"], "gadgets"),
        (["get", "pods", "-l", "a b"], "a b"),
        (["demo", "--nodes", "1"], "--nodes"),
    ]:
        shown = cli(*arguments)
        assert (shown.returncode, shown.stdout) == (2, ""), arguments
        assert word in shown.stderr
        assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(("word", "verb"), sorted(habits.ALIASES.items()))
def test_other_names_of_verbs_are_those_verbs(word: str, verb: str) -> None:
    shown = cli(word, "--help")
    assert shown.returncode == 0
    assert f"Usage: ambient {verb} " in shown.stdout


def test_hints_name_verbs_that_there_are() -> None:
    said = "; ".join(map(habits.of_verb, habits.WORDS, itertools.repeat(())))
    assert set(re.findall(r"ambient ([a-z][a-z-]*)", said)) <= set(VERBS)
    assert not {*habits.WORDS, *habits.ALIASES} & set(VERBS)


def test_user_errors_are_one_line_with_a_remedy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["up", str(tmp_path / "missing")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/missing does not exist; make it with: mkdir")
    (tmp_path / "file").touch()
    assert run(["up", str(tmp_path / "file")]) == 1
    assert "is not a directory" in capsys.readouterr().err


def test_errors_show_message_remedy_and_detail() -> None:
    assert str(UserError("it broke")) == "it broke"
    assert str(UserError("it broke", "mend it", detail="  the log")) == "it broke; mend it\n  the log"


def test_the_entry_parses_on_old_interpreters_and_says_which_it_needs() -> None:
    for module in (ztunnel.cli.main.__file__, Path(ztunnel.cli.main.__file__).parent / "__init__.py"):
        ast.parse(Path(module).read_text(), feature_version=(3, 6))
    script = (
        "import sys; sys.version_info = (3, 8, 1)\n"
        "from ztunnel.cli.main import main\n"
        "code = main(); assert 'click' not in sys.modules; sys.exit(code)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert shown.stderr.startswith("error: ambient needs Python 3.11 or newer, this is Python 3.8 (")
    assert "Traceback" not in shown.stderr


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "ztunnel.cli.main", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert shown.stderr == b""


def test_the_state_directory_comes_from_option_environment_and_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AMBIENT_STATE", str(tmp_path))
    assert default_state() == tmp_path
    monkeypatch.delenv("AMBIENT_STATE")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_state() == Path("/run/ambient")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert default_state() == Path("/somewhere/ambient")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_state() == Path("/home/someone/.local/state/ambient")


@pytest.mark.parametrize(
    ("text", "labels", "selected"),
    [
        ("app=web", {"app": "web"}, True),
        ("app==web , version!=v1", {"app": "web", "version": "v2"}, True),
        ("version!=v1", {}, True),
        ("version!=v1", {"version": "v1"}, False),
        ("app in (a, web)", {"app": "web"}, True),
        ("app notin (a, web),app", {"app": "web"}, False),
        ("istio.io/dataplane-mode=ambient,!legacy", {"istio.io/dataplane-mode": "ambient"}, True),
        ("!legacy", {"legacy": ""}, False),
        ("legacy", {}, False),
        ("app=", {"app": ""}, True),
    ],
)
def test_selectors(text: str, labels: dict[str, str], selected: bool) -> None:
    assert parse(text).matches(labels) is selected


@pytest.mark.parametrize("text", ["a b", "app in a", "=x", "app=web;tier=db", "a=b,,c"])
def test_selectors_that_make_no_sense(text: str) -> None:
    with pytest.raises(click.BadParameter, match="not understood"):
        parse(text)


def test_json_output_of_the_runner_is_json_only() -> None:
    # Without a mesh, a script that reads -o json gets nothing on stdout, and the reason on stderr.
    shown = cli("status", "-o", "json", AMBIENT_STATE="/nonexistent/state")
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr == "error: no mesh is running on /nonexistent/state; start one with: ambient up DIR\n"
