"""What `ambient analyze` finds in files, without a mesh: object, field, file, line, remedy; and its exit codes."""

import contextlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ztunnel.cli.app import run as cli

GOOD = """
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {"istio.io/dataplane-mode": ambient}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec: {containers: [{name: web, command: [sleep, inf]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: viewers}
spec: {action: ALLOW, rules: [{from: [{source: {namespaces: [shop]}}]}]}
"""


def analyze(tmp_path: Path, text: str, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    file = tmp_path / "given.yaml"
    file.write_text(text)
    done = run("-f", str(file), "--no-mesh", "-o", "json", *arguments)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The verb in this process: what it prints, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli(["analyze", *arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_what_is_right_is_no_news(tmp_path: Path) -> None:
    assert analyze(tmp_path, GOOD) == (0, [])
    assert "no issues found" in run("-f", str(tmp_path / "given.yaml"), "--no-mesh").stdout


@pytest.mark.parametrize(
    ("wrong", "level", "about", "line", "words"),
    [
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec:\n  ports:\n  - port: 99999\n",
            "error", "Service default/x", 6, "spec.ports[0].port",
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: nowhere}\nspec: {ports: [{port: 1}]}\n",
            "error", "Service nowhere/x", 0, 'namespace "nowhere" not found',
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x}\n"
            "spec:\n  action: DENY\n  rules:\n  - from:\n    - source: {ipBlocks: [10.0.0.0/99]}\n",
            "error", "AuthorizationPolicy default/x", 8, "ipBlocks",
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x}\n"
            "spec:\n  rules:\n  - when:\n    - {key: source.colour, values: [red]}\n",
            "error", "AuthorizationPolicy default/x", 7, "source.colour",
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x}\n"
            "spec:\n  rules:\n  - to:\n    - operation: {methods: [GET]}\n",
            "warning", "AuthorizationPolicy default/x", 6, "spec.rules[0]: ztunnel does not see HTTP",
        ),
        ("apiVersion: v1\nkind: Nonsense\nmetadata: {name: x}\n", "error", "Nonsense", 2, ""),
        ("{", "error", "", 2, "not valid YAML"),
    ],
    ids=["a port", "a namespace", "a CIDR", "a when key", "HTTP at L4", "a kind", "YAML"],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(
    tmp_path: Path, wrong: str, level: str, about: str, line: int, words: str
) -> None:
    code, found = analyze(tmp_path, wrong)
    assert code == (79 if level == "error" else 0)
    one = next(one for one in found if one["level"] == level and words in one["message"])
    assert about in one["object"]
    assert one["file"] == str(tmp_path / "given.yaml")
    if line:
        assert one["line"] == line, found
    assert len({json.dumps(one) for one in found}) == len(found)


def test_thresholds(tmp_path: Path) -> None:
    warned = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n"
    code, found = analyze(tmp_path, warned)
    assert (code, [one["level"] for one in found]) == (0, ["warning"])
    assert analyze(tmp_path, warned, "--failure-threshold", "warning")[0] == 79
    assert analyze(tmp_path, warned, "--output-threshold", "error") == (0, [])


def test_what_cannot_be_analyzed(tmp_path: Path) -> None:
    for arguments, told in (
        (["-f", str(tmp_path / "none.yaml"), "--no-mesh"], "does not exist"),
        (["--no-mesh"], "give files, or leave out"),
        (["--state", str(tmp_path)], "no mesh is running"),
    ):
        done = run(*arguments)
        assert done.returncode == 1
        assert told in done.stderr
        assert "Traceback" not in done.stderr
