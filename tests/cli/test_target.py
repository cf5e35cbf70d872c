"""Which mesh a verb acts on: what was said, what runs here, what kubeconfigs there are."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ztunnel.cli import target
from ztunnel.cli.errors import UserError
from ztunnel.cli.target import Cluster, Embedded, Which


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with a home of his own, without meshes and kubeconfigs."""
    for name in ("AMBIENT_STATE", "KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("ztunnel.cli.options.default_state", lambda: tmp_path / "state")
    (tmp_path / "state").mkdir()
    return


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Path]:
    """A mesh at the default place."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "state" / "ambient.sock"))
        listener.listen()
        yield tmp_path / "state"


def kubeconfig(home: Path) -> Path:
    path = home / ".kube" / "config"
    path.parent.mkdir()
    path.write_text("apiVersion: v1\nkind: Config\n")
    return path


def test_what_was_said_comes_first(running: Path, tmp_path: Path) -> None:
    kubeconfig(tmp_path)
    assert Which(kubeconfig=Path("/k")).target() == Cluster(Path("/k"), None)
    assert Which(context="prod").target() == Cluster(None, "prod")
    assert Which(state=Path("/s")).target() == Embedded(Path("/s"))


def test_both_at_once_is_an_error() -> None:
    with pytest.raises(UserError, match="give only one"):
        Which(state=Path("/s"), context="prod").target()


def test_a_mesh_that_runs_here_goes_before_a_kubeconfig_that_lies_about(
    running: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path)))
    assert Which().target() == Embedded(running)


def test_one_that_has_ended_does_not(running: Path, tmp_path: Path) -> None:
    kubeconfig(tmp_path)
    with socket.socket(socket.AF_UNIX) as ended:
        (running / "ambient.sock").unlink()
        ended.bind(str(running / "ambient.sock"))
    assert Which().target() == Cluster()


def test_the_state_of_the_environment_goes_before_a_kubeconfig(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig(tmp_path)
    monkeypatch.setenv("AMBIENT_STATE", "/elsewhere")
    assert Which().target() == Embedded(tmp_path / "state")


def test_any_file_of_kubeconfig_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/absent:{kubeconfig(tmp_path)}")
    assert Which().target() == Cluster()


def test_a_kubeconfig_that_is_not_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no kubeconfig"):
        Which().target()


def test_in_a_pod_it_is_the_pods_own_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    (tmp_path / "token").write_text("t")
    monkeypatch.setattr(target, "SERVICE_ACCOUNT", tmp_path / "token")
    assert Which().target() == Cluster()


def test_where_there_is_nothing_both_ways_are_told() -> None:
    with pytest.raises(UserError, match=r"ambient up DIR; or name a cluster with --kubeconfig"):
        Which().target()


def test_a_target_says_what_it_is() -> None:
    assert str(Embedded(Path("/run/ambient"))) == "the mesh on /run/ambient"
    assert str(Cluster(Path("/k"), "prod")) == "the cluster (context prod, kubeconfig /k)"
