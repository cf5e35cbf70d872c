"""The plugin and its entry on a node's disk: put there, repaired, taken away; what cannot be, told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from cni import conflist
from cni.installer import Installer, InstallError, Plan
from tests.cni.conftest import wait_until

OURS = conflist.entry(socket="/run/agent.sock", exempt=["istio-system"])
LIST = '{"cniVersion":"1.0.0","name":"net","plugins":[\n {"type":"ptp"}\n]}\n'
LIMIT = 30.0


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    root = tmp_path / "host"
    for name in ("bin", "net.d"):
        (root / name).mkdir(parents=True)
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF plugin")
    return Plan(program, root / "bin", root / "net.d", OURS, host_prefix=str(root))


def files(plan: Plan) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(plan.net_dir.iterdir())}


def test_in_and_out_leaves_the_node_as_it_was(plan: Plan) -> None:
    (plan.net_dir / "10-net.conflist").write_text(LIST)
    (plan.net_dir / "10-net.conflist").chmod(0o600)
    installer = Installer(plan)
    assert installer.install() == ["plugin", "conflist"]
    assert (plan.bin_dir / "ambient-cni").read_bytes() == b"\x7fELF plugin"
    assert (plan.bin_dir / "ambient-cni").stat().st_mode & 0o777 == 0o755
    assert json.loads(files(plan)["10-net.conflist"])["plugins"][-1] == OURS
    assert (plan.net_dir / "10-net.conflist").stat().st_mode & 0o777 == 0o600
    assert installer.install() == []
    assert installer.remove() == []
    assert files(plan) == {"10-net.conflist": LIST}
    assert list(plan.bin_dir.iterdir()) == []
    assert installer.remove() == []


def test_another_plugin_program_and_one_of_another_mode_are_replaced(plan: Plan) -> None:
    (plan.net_dir / "10-net.conflist").write_text(LIST)
    (plan.bin_dir / "ambient-cni").write_bytes(b"old")
    installer = Installer(plan)
    assert "plugin" in installer.install()
    (plan.bin_dir / "ambient-cni").chmod(0o644)
    assert installer.install() == ["plugin"]


def test_a_single_plugins_file_comes_back_when_the_mesh_goes(plan: Plan) -> None:
    single = '{"cniVersion":"0.3.1","name":"n","type":"bridge"}'
    (plan.net_dir / "10-net.conf").write_text(single)
    installer = Installer(plan)
    installer.install()
    assert set(files(plan)) == {"10-net.conf.before-ambient", "10-net.conflist"}
    assert [each["type"] for each in json.loads(files(plan)["10-net.conflist"])["plugins"]] == [
        "bridge",
        "ambient-cni",
    ]
    assert installer.install() == []
    # Its owner writes it again, as some do at each start.
    (plan.net_dir / "10-net.conf").write_text(single.replace("bridge", "ptp"))
    assert installer.install() == ["conflist"]
    assert json.loads(files(plan)["10-net.conflist"])["plugins"][0] == {"type": "ptp"}
    assert installer.remove() == []
    assert files(plan) == {"10-net.conf": single.replace("bridge", "ptp")}


def test_a_new_first_file_is_the_one_that_counts_and_both_are_cleaned(plan: Plan) -> None:
    (plan.net_dir / "10-net.conflist").write_text(LIST)
    installer = Installer(plan)
    installer.install()
    (plan.net_dir / "05-other.conflist").write_text(LIST)
    assert installer.install() == ["conflist"]
    assert conflist.contains(files(plan)["05-other.conflist"])
    assert installer.remove() == []
    assert files(plan) == {"05-other.conflist": LIST, "10-net.conflist": LIST}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "/net.d/10-net.conflist: it is not JSON"),
        (b"\xff\xfe", "/net.d/10-net.conflist: it is not JSON: it is not UTF-8"),
        (b'{"plugins":[]}', "is empty"),
        (b" " * (5 << 20), "is larger than"),
    ],
    ids=["half", "binary", "empty", "large"],
)
def test_a_file_that_is_no_configuration_is_told_and_left_alone(
    plan: Plan, content: bytes, told: str
) -> None:
    (plan.net_dir / "10-net.conflist").write_bytes(content)
    with pytest.raises(InstallError, match=told) as failed:
        Installer(plan).install()
    assert failed.value.reason == "CREATE_CNI_CONFIG_FAILURE"
    Installer(plan).remove()
    assert (plan.net_dir / "10-net.conflist").read_bytes() == content


def test_nothing_there_yet_is_told(plan: Plan) -> None:
    with pytest.raises(InstallError, match="there is no network configuration"):
        Installer(plan).install()
    plan.program.unlink()
    with pytest.raises(InstallError, match=r"cannot be read.*cni\.plugin\.build"):
        Installer(plan).install()


SCRIPT = """
import sys
from pathlib import Path
from cni.installer import Installer, InstallError, Plan
program, root = Path(sys.argv[1]), Path(sys.argv[2])
try:
    Installer(Plan(program, root / "bin", root / "net.d", {"type": "ambient-cni"}, str(root))).install()
except InstallError as error:
    print(error)
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("mounts", "told"),
    [
        (
            "mount --bind $1/net.d $1/net.d && mount -o remount,bind,ro $1/net.d",
            "/net.d/10-net.conflist: cannot be written: Read-only file system; mount it writable",
        ),
        (
            "mount --bind $1/bin $1/bin && mount -o remount,bind,ro $1/bin",
            "/bin/ambient-cni: cannot be written: Read-only file system; mount it writable",
        ),
        (
            "mount -t tmpfs -o size=16k tmpfs $1/bin && head -c 16384 /dev/zero > $1/bin/full",
            "/bin/ambient-cni: cannot be written: No space left on device; make room",
        ),
    ],
    ids=["read-only configuration", "read-only plugins", "full disk"],
)
def test_a_disk_that_takes_nothing_is_told(plan: Plan, mounts: str, told: str) -> None:
    (plan.net_dir / "10-net.conflist").write_text(LIST)
    root = plan.net_dir.parent
    command = f"{mounts} && exec {sys.executable} -c '{SCRIPT}' {plan.program} {root}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", command, "sh", root],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert told in done.stdout
    assert files(plan) == {"10-net.conflist": LIST}, "no half of anything is left"


async def test_it_follows_what_others_do(plan: Plan) -> None:
    done: list[str] = []
    told: list[str] = []
    installer = Installer(plan, on_change=done.append, on_failure=lambda error: told.append(str(error)))
    path = plan.net_dir / "10-net.conflist"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(installer.run)
        await wait_until(lambda: told, LIMIT)  # there is no configuration yet
        assert not installer.ready
        path.write_text(LIST)
        await wait_until(lambda: installer.ready, LIMIT)
        assert installer.problem == ""
        path.write_text(LIST)
        await wait_until(lambda: done.count("conflist") == 2 and conflist.contains(path.read_text()), LIMIT)
        (plan.bin_dir / "ambient-cni").unlink()
        await wait_until(lambda: (plan.bin_dir / "ambient-cni").exists(), LIMIT)
        path.unlink()
        await wait_until(lambda: not installer.ready, LIMIT)
        path.write_text(LIST[:20])
        await wait_until(lambda: "not JSON" in installer.problem, LIMIT)
        assert sum("not JSON" in each for each in told) == 1
        path.write_text(LIST)
        await wait_until(lambda: installer.ready, LIMIT)
        nursery.cancel_scope.cancel()
    assert conflist.contains(path.read_text()), "what ends for an upgrade stays in place"
