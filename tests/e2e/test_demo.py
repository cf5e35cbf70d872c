"""`ambient demo` from its first line to its last: what it claims, and that nothing of it is left however it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ztunnel.cli.demo.home import MARK, Home, sweep
from ztunnel.embedded.testing import until

pytestmark = pytest.mark.e2e

AMBIENT = [sys.executable, "-P", "-m", "ztunnel.cli.main"]
ACCOUNTS = "spiffe://cluster.local/ns/default/sa/"
CALLS = {
    ("default", "bookshop-productpage"),
    ("bookshop-productpage", "bookshop-details"),
    ("bookshop-productpage", "bookshop-reviews"),
    ("bookshop-reviews", "bookshop-ratings"),
}


def ambient(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AMBIENT, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def processes_of(path: Path) -> list[str]:
    """The command lines of processes that name the path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(path) in line and entry.name != str(os.getpid()):
                found.append(line)
    return found


def nothing_left(state: Path) -> bool:
    """Whether no process, mount or file of the demo whose state was in `state` is left."""
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if f"{state}/" in line]
    return not processes_of(state.parent) and not mounts and not state.parent.exists()


def assert_success(result: dict[str, Any]) -> None:
    assert result["requests"] > 50
    assert (result["failures"], result["errors"]) == (0, {})
    assert (result["mtls_percent"], result["plaintext_leaks"], result["leak_check_detects"]) == (100, 0, True)
    seen = {
        tuple(str(pair[end]).removeprefix(ACCOUNTS) for end in ("source", "destination"))
        for pair in result["identities"]
    }
    assert seen == CALLS
    assert sum(pair["connections"] for pair in result["identities"]) == result["connections"]
    assert 0 < result["p50_ms"] <= result["p99_ms"]
    assert result["packets_captured"] > 100
    assert result["ports_inside"] == [15008]
    assert 9080 in result["ports_outside"]
    assert (result["nodes"], result["pods"]) == (2, 7)
    acts = result["acts"]
    assert (acts["strict_refuses_plaintext"], acts["policy_denies_identity"]) == (True, True)
    assert acts["certificates_renewed"] == acts["certificates"] >= 5
    assert acts["requests_meanwhile"] > 20
    assert acts["failures_meanwhile"] == 0


def test_the_demo_holds_what_it_claims_and_leaves_nothing() -> None:
    demo = subprocess.Popen(
        [*AMBIENT, "demo", "--duration", "5", "-o", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with demo:
        state = until(lambda: state_of_child(demo.pid), "the demo has started a mesh")
        output, errors = demo.communicate(timeout=200)
    assert output.count("\n") == 1, (output, errors)
    assert_success(json.loads(output))
    assert (demo.returncode, errors) == (0, "")
    assert nothing_left(state)


def state_of_child(demo: int) -> Path | None:
    """The state directory that the demo has given to the `ambient up` it started."""
    for children in Path(f"/proc/{demo}/task").glob("*/children"):
        for child in children.read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"up" in words and b"--state" in words:
                return Path(os.fsdecode(words[words.index(b"--state") + 1]))
    return None


def test_a_mesh_that_is_kept_can_be_used_and_taken_down(tmp_path: Path) -> None:
    state = Path(f"/tmp/demo-kept-{os.getpid()}")
    try:
        done = ambient("demo", "--once", "--duration", "1", "--keep", "--state", str(state))
        assert done.returncode == 0, done
        assert "the mesh kept the bookshop's secrets" in done.stdout
        assert f"ambient down --state {state}" in done.stdout
        assert "a mesh is running on" in ambient("demo", "--state", str(state)).stderr
        status = json.loads(ambient("status", "-o", "json", AMBIENT_STATE=str(state)).stdout)
        home = Path(status["dir"]).parent
        assert (home / MARK).is_file()
        sweep()
        page = ambient(
            "exec", "visitors", "--", "curl", "-s", "http://productpage:9080/", AMBIENT_STATE=str(state)
        )
        assert json.loads(page.stdout)["reviews"]["service"] == "reviews"
        assert ambient("down", AMBIENT_STATE=str(state)).returncode == 0
        assert not home.exists()
        assert not processes_of(home)
    finally:
        ambient("down", "--state", str(state))
        subprocess.run(["rm", "-rf", str(state)], check=True)


@pytest.mark.parametrize("moment", ["starting a mesh", "visitors for", "out of the mesh"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(moment: str, how: signal.Signals) -> None:
    demo = subprocess.Popen(
        [*AMBIENT, "demo", "--once", "--duration", "30" if moment == "visitors for" else "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        state = None
        for line in demo.stdout:
            if found := re.search(r"state: (\S+)\)", line):
                state = Path(found[1])
            if moment in line:
                break
        assert state is not None
        demo.send_signal(how)
        demo.send_signal(how)  # impatience must not spoil the cleaning
        assert demo.wait(60) == 130
        assert "Traceback" not in demo.stderr.read()
    assert nothing_left(state)


def test_a_killed_demo_takes_its_mesh_with_it_and_the_next_one_sweeps_up() -> None:
    demo = subprocess.Popen(
        [*AMBIENT, "demo", "--once", "--duration", "60"], stdout=subprocess.PIPE, text=True
    )
    with demo:
        assert demo.stdout is not None
        found = re.search(r"state: (\S+)\)", demo.stdout.readline())
        assert found
        state = Path(found[1])
        assert "pods run and are in the mesh" in demo.stdout.readline()
        demo.kill()
        demo.wait(20)
    until(lambda: not processes_of(state.parent), "the mesh of a killed demo has ended", limit=30)
    Home(None).remove()  # what every demo begins with
    assert nothing_left(state)


def test_a_demo_that_cannot_start_says_why(tmp_path: Path) -> None:
    done = ambient("demo", "--once", "--state", str(tmp_path / ("x" * 100)))
    assert (done.returncode, done.stdout) == (1, "")
    assert "give a shorter one with --state DIR" in done.stderr
    file = Path(f"/tmp/demo-file-{os.getpid()}")
    file.touch()
    try:
        done = ambient("demo", "--once", "--state", str(file))
    finally:
        file.unlink()
    assert done.returncode == 1
    assert "error: `ambient up` ended with exit code 1" in done.stderr
    assert f"state directory {file}" in done.stderr
