"""The `ambient` command as an ordinary user: the demonstration, and what is said where it is not possible."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.embedded.test_rootless import NOBODY, ordinary_user

pytestmark = pytest.mark.e2e


def environment(home: Path) -> tuple[list[str], str, dict[str, str]]:
    """How to become an ordinary user, and a Python of theirs in which the project is installed.

    Programs in pods get no PYTHONPATH; where this test's environment is not readable, theirs is made to point to it.
    """
    prefix, python, env = ordinary_user()
    paths = env.pop("PYTHONPATH", "")
    if not paths:
        return prefix, python, env
    own = home / "venv"
    if not own.exists():
        subprocess.run([*prefix, python, "-m", "venv", "--without-pip", own], env=env, cwd=home, check=True)
        packages = next(own.glob("lib/python3*/site-packages"))
        (packages / "project.pth").write_text(paths.replace(os.pathsep, "\n") + "\n")
    return prefix, str(own / "bin" / "python"), env


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of the user, with a short name; empty at the end, or something was left behind."""
    path = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    yield path
    try:
        shutil.rmtree(path / "venv", ignore_errors=True)
        assert not list(path.iterdir())
        assert not [
            line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(path) in line
        ]
    finally:
        shutil.rmtree(path)


def as_user(
    home: Path, *words: str, forbidden: bool = False, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `ambient` as an ordinary user; `forbidden`: where they may make no user namespace."""
    prefix, python, env = environment(home)
    if forbidden:
        # Within a user namespace that may have no further ones, as a user who is not root there.
        prefix = [*prefix, python, "-c", CONFINED]
    argv = [*prefix, python, "-P", "-m", "ztunnel.cli.main", *words]
    return subprocess.run(
        argv,
        env=env | {"TMPDIR": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


CONFINED = """
import os, sys
from pathlib import Path
from ztunnel.inpod import netns
user, group = os.geteuid(), os.getegid()
netns.unshare(netns.CLONE_NEWUSER)
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"1000 {user} 1")
Path("/proc/self/gid_map").write_text(f"1000 {group} 1")
Path("/proc/sys/user/max_user_namespaces").write_text("0")
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_the_demonstration(home: Path) -> None:
    done = as_user(home, "demo", "--duration", "3", "-o", "json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == 0
    assert result["requests"] > 10
    assert result["mtls_percent"] == 100
    assert result["plaintext_leaks"] == 0
    assert result["leak_check_detects"] is True


def test_where_user_namespaces_are_not_allowed(home: Path) -> None:
    (home / "shop").mkdir(mode=0o755)
    try:
        done = as_user(home, "up", "shop", "--state", str(home / "s"), "--xds-port", "0", forbidden=True)
    finally:
        shutil.rmtree(home / "s", ignore_errors=True)
        (home / "shop").rmdir()
    assert done.returncode == 1
    assert done.stderr.startswith("error: without root a mesh needs a user namespace:"), done.stderr
    assert "run as root" in done.stderr
    assert "Traceback" not in done.stderr
    done = as_user(home, "demo", "--duration", "1", "-o", "json", forbidden=True)
    assert done.returncode == 1
    assert "without root a mesh needs a user namespace:" in done.stderr
    assert "Traceback" not in done.stderr
