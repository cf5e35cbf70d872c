"""Several processes change one directory at once: nothing is lost, nothing is seen half written."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.store.manifests import namespace, pod
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.files import locked
from ztunnel.store.models import Namespace, Pod
from ztunnel.store.problems import StoreError

LABEL = """
import sys
from pathlib import Path
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Namespace
root, who, count, name = sys.argv[1:]
store = DirectoryStore(Path(root))
for step in range(int(count)):
    store.patch(Namespace, "", name, {"metadata": {"labels": {f"{who}-{step}": "x"}}})
"""


def start(script: str, *arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def finish(*processes: "subprocess.Popen[bytes]") -> None:
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_every_patch_of_every_process_is_kept(tmp_path: Path, suffix: str) -> None:
    store = DirectoryStore(tmp_path)
    if suffix == "yaml":
        (tmp_path / "all.yaml").write_text(f"{pod('before')}---\n{namespace('shop')}---\n{pod('after')}")
    else:
        (tmp_path / "shop.json").write_text(
            '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}'
        )
    processes = [start(LABEL, tmp_path, who, 15, "shop") for who in "abcd"]
    readings = 0
    while any(process.poll() is None for process in processes):
        # Never a moment without the object, never a file that is half there.
        found = DirectoryStore(tmp_path).list(Namespace)
        assert [seen.name for seen in found] == ["shop"]
        readings += 1
    finish(*processes)
    assert readings > 5
    shop = store.get(Namespace, "", "shop")
    assert shop is not None
    assert set(shop.metadata.labels) == {f"{who}-{step}" for who in "abcd" for step in range(15)}
    if suffix == "yaml":
        text = (tmp_path / "all.yaml").read_text()
        assert text.startswith(f"{pod('before')}---\n")
        assert text.endswith(f"---\n{pod('after')}")
    assert len(list(tmp_path.iterdir())) == 1, "no temporary file is left"


CHURN = """
import sys
from pathlib import Path
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Container, ObjectMeta, Pod, PodSpec
root, who, count = sys.argv[1:]
store = DirectoryStore(Path(root))
for step in range(int(count)):
    name = f"{who}-{step % 5}"
    spec = PodSpec(containers=[Container(name="c", command=["x"], image=str(step))])
    store.apply(Pod(metadata=ObjectMeta(name=name), spec=spec), file=Path("all") / f"{name}.yaml")
    if step % 2 and step < int(count) - 10:
        assert store.delete(Pod, "default", name)
"""


def test_creating_and_deleting_in_one_directory(tmp_path: Path) -> None:
    processes = [start(CHURN, tmp_path, who, 60) for who in "abc"]
    finish(*processes)
    store = DirectoryStore(tmp_path)
    assert [found.name for found in store.list(Pod)] == [
        f"{who}-{number}" for who in "abc" for number in range(5)
    ]
    assert store.problems == []


HOLD = """
import sys, time
from pathlib import Path
from ztunnel.store.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_writer_that_dies_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(namespace("shop"))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    DirectoryStore(tmp_path).patch(Namespace, "", "shop", {"metadata": {"labels": {"a": "b"}}})


def test_a_writer_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztunnel.store.files._LOCK_PATIENCE", 0.2)
    with locked(tmp_path):
        started = time.monotonic()
        with pytest.raises(StoreError, match="another process has been changing it"), locked(tmp_path):
            pass
        assert time.monotonic() - started < 5
    with locked(tmp_path):
        pass
