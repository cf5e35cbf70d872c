"""The comparison itself, short: direct, Envoys, mesh and a peer of one's own, each under its own heading."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf import sides
from perf.room import Carried, Room, WrongPathError
from perf.sides import Mesh, Side, turn
from ztunnel.inpod import netns

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
RELAY = Path(__file__).parent / "peer" / "start.sh"


def perf(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perf", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)


def test_all_sides_are_measured_in_one_run(tmp_path: Path) -> None:
    peer = f"relay=env PYTHON={sys.executable} {RELAY}"
    done = perf("connections", "--rounds", "1", "--seconds", "1", "--peer", peer, "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = tmp_path.glob("*.json")
    entries = {entry["measure"]: entry for entry in json.loads(found.read_text())["cases"]}
    for side in ("direct", "envoy", "mesh", "relay"):
        assert entries["connections/s"][side]["median"] > 1
    for side in ("envoy", "mesh", "relay"):
        assert entries["CPU s/100k"][side]["median"] > 0
        assert entries["connections/s"][side]["to_direct"] < 1
    assert "direct" not in entries["CPU s/100k"]
    assert found.with_suffix(".svg").read_text().startswith("<svg")
    assert str(found) in done.stdout


def test_a_peer_that_does_not_start_is_told(tmp_path: Path) -> None:
    done = perf("connections", "--peer", "broken=echo hello", "--results", str(tmp_path))
    assert done.returncode == 1
    assert "error: peer broken: it said 'hello'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_number_cannot_stand_under_the_wrong_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load of the mesh's turn that goes past it, and load of the direct turn that goes through it."""
    monkeypatch.setattr(sides, "LATE", 1.0)
    with Room(workers=1) as room:
        direct, mesh = Side(room), Mesh(room)
        with (
            pytest.raises(WrongPathError, match="of 5 connections its proxies carried 0"),
            turn(mesh, [direct, mesh], to_server=True) as one,
        ):
            one.made += 5
        with (
            pytest.raises(WrongPathError, match="mesh's proxies carried 2 connections that were direct's"),
            turn(direct, [direct, mesh], to_server=True),
        ):
            room.join(joined=True)
            direct.client.get(direct.targets()["http"])
        with turn(mesh, [direct, mesh], to_server=True) as one:
            mesh.client.get(mesh.targets()["http"])
            one.made += 1
        assert room.carried() > Carried(0, 0)
        assert netns.processes(room.pods["server"].netns)
