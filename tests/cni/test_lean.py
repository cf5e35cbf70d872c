"""What an agent of a cluster loads: each megabyte is paid for on every node."""

import subprocess
import sys

HEAVY = (
    "kubernetes",
    "prometheus_client",
    "yaml",
    "ruamel",
    "grpclib",
    "OpenSSL",
    "cryptography",
    "google.protobuf",
    "pyroute2.ndb",
    "asyncio",
    "multiprocessing",
    "importlib.metadata",
    "sqlite3",
)
CODE = f"""
import sys
sys.argv = ["cni", "--kubernetes", "--help"]
import runpy
try:
    runpy.run_module("cni", run_name="__main__", alter_sys=False)
except SystemExit as end:
    assert end.code == 0, end.code
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
from cni import rules
rules.prepare(rules.Settings(dns_capture=True))
print("rules are made all the same")
"""


def test_it_loads_no_heavy_library_and_makes_its_rules_without_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "NODE_NAME" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["loaded: []", "rules are made all the same"]


def test_a_node_without_a_name_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cni", "--kubernetes"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 2
    assert "NODE_NAME" in done.stderr
