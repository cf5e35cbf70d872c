"""The same mesh without root: an ordinary user's own namespaces, real redirection and tunnels in them, nothing left."""

import os
import shutil
import signal
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.embedded.test_runtime import running
from tests.embedded.test_supervisor import NAMESPACE, addresses, answers, curl, web
from ztunnel.embedded import rootless
from ztunnel.embedded.statedir import clean
from ztunnel.embedded.testing import until
from ztunnel.embedded.testmesh import RunningMesh

pytestmark = pytest.mark.e2e

NOBODY = 65534
# setpriv starts its program with root's rights to reach it; env has none left when it starts the next.
SETPRIV = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env")


def may_run(user: list[str], python: str) -> bool:
    return subprocess.run([*user, python, "-c", ""], capture_output=True, check=False).returncode == 0


def ordinary_user() -> tuple[list[str], str, dict[str, str]]:
    """How to become one, and a Python with our packages that they may run (ours may be in root's home)."""
    prefix = [] if os.geteuid() else list(SETPRIV)
    path = os.pathsep.join([str(Path(__file__).parents[2]), *site.getsitepackages()])
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/nonexistent"}
    if may_run(prefix, sys.executable):
        return prefix, sys.executable, env
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    other = shutil.which(version, path=env["PATH"])
    remedy = f"install {version} for all users, or make the directory of this one readable"
    assert other, f"an ordinary user may not run {sys.executable}; {remedy}"
    assert may_run(prefix, other), f"an ordinary user may run neither {sys.executable} nor {other}; {remedy}"
    return prefix, other, env | {"PYTHONPATH": path}


def rootless_mesh(resources: str) -> RunningMesh:
    prefix, python, env = ordinary_user()
    return RunningMesh(
        resources, prefix=prefix, python=python, env=env, owner=NOBODY if os.geteuid() == 0 else None
    )


class TestRootless:
    def test_a_mesh_of_an_ordinary_user(self) -> None:
        _, python, _ = ordinary_user()
        with rootless_mesh(NAMESPACE % "none" + "---" + web(python=python)) as mesh:
            mesh.wait_pods(mesh=False)
            assert "without root" in mesh.out.read_text()
            assert mesh.exec("client", "id", "-u").stdout == "0\n"
            assert curl(mesh).startswith("hello web-")
            mesh.write("resources.yaml", NAMESPACE % "ambient" + "---" + web(python=python))
            mesh.wait_pods(mesh=True)
            mesh.until(lambda: answers(mesh, "hello"), "the pods talk")
            own = addresses(mesh, "client")
            assert curl(mesh).split()[2].removeprefix("::ffff:") in own
            log = mesh.state.logs / "ztunnel-node-1.log"
            # The first requests may come before the proxy has heard that the web pods take tunnels.
            mesh.until(
                lambda: answers(mesh, "hello") and "mutual_tls" in log.read_text(),
                "the access log names the tunnel",
            )
            pid = mesh.status()["pid"]
            assert os.stat(f"/proc/{pid}").st_uid == (os.geteuid() or NOBODY)
            members = mesh.state.leftovers()
            assert len(members) > 10
            assert mesh.stop(signal.SIGTERM) == 0
            assert not [one for one in members if running(one)]
            assert sorted(path.name for path in mesh.state.path.iterdir()) == ["ca", "logs"]

    def test_what_a_killed_one_left_is_removed_at_the_next_start(self) -> None:
        _, python, _ = ordinary_user()
        with rootless_mesh(web(python=python)) as mesh:
            mesh.wait_pods()
            before = [mesh.status()["pid"], *mesh.state.leftovers()]
            mesh.stop(signal.SIGKILL)
            assert [pid for pid in before if running(pid)], "the pods' programs go on"
            mesh.start()
            mesh.wait_pods()
            assert curl(mesh)
            until(lambda: not [pid for pid in before if running(pid)], "nothing of the first one runs")

    def test_a_mesh_of_root_does_not_take_it_for_its_own(self) -> None:
        """Mounts that were there when a user namespace was made are seen in it."""
        _, python, _ = ordinary_user()
        with RunningMesh() as other, rootless_mesh(web(python=python)) as mesh:
            mesh.wait_pods()
            ours = set(mesh.state.leftovers())
            assert len(ours) > 10
            assert not ours & set(other.state.leftovers())
            assert other.stop(signal.SIGKILL) == -9
            clean(other.state.path)
            assert mesh.ready()
            assert curl(mesh)

    def test_where_the_system_forbids_it_the_setting_is_named(self, tmp_path: Path) -> None:
        """A user namespace that may have no further ones stands in for a system with user.max_user_namespaces=0."""
        prefix, python, env = ordinary_user()
        code = (
            "import sys; from ztunnel.embedded import rootless\n"
            "rootless.enter(); open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
            "try: rootless.enter()\n"
            "except rootless.RootlessError as error: sys.exit(str(error))\n"
        )
        done = subprocess.run(
            [*prefix, python, "-c", code],
            env=env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 1
        assert "without root a mesh needs a user namespace: " in done.stderr
        assert "sysctl -w user.max_user_namespaces=15000" in done.stderr

    def test_root_needs_none_of_it(self) -> None:
        assert rootless.needed() == (os.geteuid() != 0)
