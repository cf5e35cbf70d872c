"""A watch tells everything there is, then every change, and never misses how things end."""

import functools
import operator
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import trio

from tests.store.manifests import following, namespace, pod, until_synced, wait_until
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Container, Key, Namespace, Object, ObjectMeta, Pod, PodSpec
from ztunnel.store.notify import Notifier
from ztunnel.store.problems import Problem

pytestmark = pytest.mark.timeout(60)


def a_pod(name: str = "a", uid: str = "", image: str = "") -> Pod:
    container = Container(name="c", image=image, command=["x"])
    return Pod(
        metadata=ObjectMeta(name=name, namespace="default", uid=uid), spec=PodSpec(containers=[container])
    )


async def test_what_there_is_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"{pod('b')}---\n{namespace('shop')}---\n{pod('a')}")
    watch = DirectoryStore(tmp_path).watch(Namespace, Pod)
    assert await until_synced(watch) == ["shop", "a", "b"]
    await watch.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(watch)


async def test_only_the_kinds_asked_for_are_told(tmp_path: Path) -> None:
    watch = DirectoryStore(tmp_path).watch(Namespace)
    assert await until_synced(watch) == []
    (tmp_path / "a.yaml").write_text(f"{pod('a')}---\n{namespace('shop')}")
    change = await following(watch)
    assert (change.op, change.obj and change.obj.ref) == ("added", "Namespace shop")


async def test_every_step_of_an_object(tmp_path: Path) -> None:
    watch = DirectoryStore(tmp_path).watch(Pod)
    await until_synced(watch)
    path = tmp_path / "a.yaml"
    path.write_text(pod("a", image="one"))
    assert (await following(watch)).op == "added"
    path.write_text(pod("a", image="two"))
    change = await following(watch)
    assert change.op == "modified"
    assert isinstance(change.obj, Pod)
    assert change.obj.spec.containers[0].image == "two"
    path.unlink()
    change = await following(watch)
    assert change.op == "deleted"
    assert isinstance(change.obj, Pod)
    assert change.obj.spec.containers[0].image == "two"


async def test_a_change_is_told_at_once(tmp_path: Path) -> None:
    """Far less than what people notice; the median, since machines have bad moments."""
    watch = DirectoryStore(tmp_path).watch(Pod)
    await until_synced(watch)
    delays = []
    for number in range(15):
        started = trio.current_time()
        (tmp_path / "a.yaml").write_text(pod("a", image=f"v{number}"))
        await following(watch)
        delays.append(trio.current_time() - started)
    assert sorted(delays)[len(delays) // 2] < 0.3


async def test_another_object_of_the_same_name_is_another(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.apply(a_pod(uid="1"))
    watch = store.watch(Pod)
    await until_synced(watch)
    store.apply(a_pod(uid="2"))
    deleted, added = await following(watch), await following(watch)
    assert deleted.op == "deleted"
    assert added.op == "added"
    assert [change.obj and change.obj.metadata.uid for change in (deleted, added)] == ["1", "2"]


async def test_directories_that_come_and_go(tmp_path: Path) -> None:
    watch = DirectoryStore(tmp_path).watch(Pod)
    await until_synced(watch)
    for _ in range(3):
        (tmp_path / "x" / "y").mkdir(parents=True)
        (tmp_path / "x" / "y" / "a.yaml").write_text(pod("a"))
        assert (await following(watch)).op == "added"
        (tmp_path / "x" / "y" / "b.yaml").write_text(pod("b"))
        assert (await following(watch)).op == "added"
        shutil.rmtree(tmp_path / "x")
        assert {(await following(watch)).op, (await following(watch)).op} == {"deleted"}


async def test_a_directory_moved_in_with_all_its_files(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.yaml").write_text(pod("a"))
    root = tmp_path / "root"
    root.mkdir()
    watch = DirectoryStore(root).watch(Pod)
    await until_synced(watch)
    elsewhere.rename(root / "inside")
    assert (await following(watch)).op == "added"
    (root / "inside" / "b.yaml").write_text(pod("b"))
    assert (await following(watch)).op == "added"
    (root / "inside").rename(elsewhere)
    assert {(await following(watch)).op, (await following(watch)).op} == {"deleted"}


async def test_a_directory_that_vanishes_and_returns(tmp_path: Path) -> None:
    problems: list[Problem] = []
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.yaml").write_text(pod("a"))
    store = DirectoryStore(root, problems.append)
    watch = store.watch(Pod)
    await until_synced(watch)

    async with trio.open_nursery() as nursery:
        changes: list[str] = []

        async def follow() -> None:
            async for change in watch:
                changes.append(f"{change.op} {change.obj and change.obj.name}")

        nursery.start_soon(follow)
        shutil.rmtree(root)
        await wait_until(lambda: problems)
        assert "create it again" in problems[0].remedy
        assert changes == [], "what runs is kept while the directory is missing"
        root.mkdir()
        (root / "b.yaml").write_text(pod("b"))
        await wait_until(lambda: sorted(changes) == ["added b", "deleted a"])
        assert store.problems == []
        (root / "c.yaml").write_text(pod("c"))
        await wait_until(lambda: "added c" in changes)
        nursery.cancel_scope.cancel()


async def test_volumes_of_configuration_are_followed(tmp_path: Path) -> None:
    """Kubernetes mounts a ConfigMap as links through `..data`, which is swapped at once."""
    for version in ("one", "two"):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "a.yaml").write_text(pod("a", image=version))
    (tmp_path / "..data").symlink_to("..one")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    watch = DirectoryStore(tmp_path).watch(Pod)
    assert await until_synced(watch) == ["a"]
    (tmp_path / "..data_tmp").symlink_to("..two")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    change = await following(watch)
    assert change.op == "modified"
    assert isinstance(change.obj, Pod)
    assert change.obj.spec.containers[0].image == "two"


async def test_a_link_to_a_file_elsewhere_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "real.yaml"
    real.write_text(pod("a"))
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.yaml").symlink_to(real)
    watch = DirectoryStore(root).watch(Pod)
    assert await until_synced(watch) == ["a"]
    real.write_text(pod("a", image="new"))
    assert (await following(watch)).op == "modified"


async def test_an_editors_steps_are_one_change(tmp_path: Path) -> None:
    """Vim: back up, write, remove the backup. The object is never gone in between."""
    path = tmp_path / "a.yaml"
    path.write_text(pod("a"))
    watch = DirectoryStore(tmp_path).watch(Pod)
    await until_synced(watch)
    path.rename(tmp_path / "a.yaml~")
    path.write_text(pod("a", image="new"))
    (tmp_path / "a.yaml~").unlink()
    assert (await following(watch)).op == "modified"


async def test_a_file_being_written_is_not_read_half(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(pod("a") + "---\n" + pod("b"))
    watch = DirectoryStore(tmp_path).watch(Pod, Namespace)
    assert await until_synced(watch) == ["a", "b"]
    with path.open("w") as file:
        file.write(pod("a"))
        file.flush()
        (tmp_path / "n.yaml").write_text(namespace("other"))
        assert (await following(watch)).op == "added"
        file.write("---\n" + pod("b", image="new"))
    change = await following(watch)
    assert (change.op, change.obj and change.obj.name) == ("modified", "b")


async def test_a_burst_ends_in_the_right_state_for_every_watch(tmp_path: Path) -> None:
    """Several watches of one store and of another, while another process changes files at random."""
    shared, other = DirectoryStore(tmp_path), DirectoryStore(tmp_path)
    states: list[dict[Key, Object]] = [{}, {}, {}]
    seed = random.Random(7)
    script = (
        "import os, random, sys, time\n"
        "root, seed = sys.argv[1], random.Random(int(sys.argv[2]))\n"
        "for step in range(1500):\n"
        "    name = f'{root}/{seed.choice(\"xyz\")}/p{seed.randrange(20)}.yaml'\n"
        "    os.makedirs(os.path.dirname(name), exist_ok=True)\n"
        "    stem = os.path.basename(name)[:-5] + '-' + os.path.basename(os.path.dirname(name))\n"
        "    if seed.random() < 0.3:\n"
        "        if os.path.exists(name): os.unlink(name)\n"
        "        continue\n"
        "    text = ('apiVersion: v1\\nkind: Pod\\nmetadata: {name: %s}\\n'\n"
        "            'spec: {containers: [{name: c, image: \"%d\", command: [x]}]}\\n') % (stem, step)\n"
        "    if seed.random() < 0.5:\n"
        "        open(name, 'w').write(text)\n"
        "    else:\n"
        "        open(name + '.tmp', 'w').write(text); os.rename(name + '.tmp', name)\n"
        "    if seed.random() < 0.01: time.sleep(0.03)\n"
    )

    async def follow(store: DirectoryStore, state: dict[Key, Object]) -> None:
        async for op, obj in store.watch(Pod):
            if obj is None:
                continue
            if op == "deleted":
                del state[obj.key]
            else:
                assert (obj.key in state) == (op == "modified")
                state[obj.key] = obj

    async with trio.open_nursery() as nursery:
        for store, state in zip((shared, shared, other), states, strict=True):
            nursery.start_soon(follow, store, state)
        command = [sys.executable, "-c", script, str(tmp_path), str(seed.randrange(1000))]
        await trio.run_process(command)
        truth = {found.key: found for found in DirectoryStore(tmp_path).list(Pod)}
        assert len(truth) > 20
        for state in states:
            await wait_until(functools.partial(operator.eq, state, truth))
        nursery.cancel_scope.cancel()


async def test_many_watches_release_what_they_hold(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        watch = store.watch(Pod)
        await until_synced(watch)
        await watch.aclose()
    with trio.move_on_after(0.05):
        async for _ in store.watch(Pod):
            pass
    watch = store.watch(Pod)
    await until_synced(watch)
    del watch
    assert len(os.listdir("/proc/self/fd")) == before
    store.apply(a_pod())
    assert [found.name for found in store.list(Pod)] == ["a"]


WITHOUT_INOTIFY = """
import sys, trio
from pathlib import Path
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Pod

async def main():
    problems = []
    root = Path(sys.argv[1])
    watch = DirectoryStore(root, problems.append).watch(Pod)
    assert (await anext(watch)).op == "synced"
    print(*problems)
    (root / "a.yaml").write_text(sys.argv[2])
    with trio.fail_after(10):
        print(*await anext(watch))
trio.run(main)
"""


async def test_without_watches_of_the_kernel_changes_come_later(tmp_path: Path) -> None:
    """In a user namespace, which has a limit of its own."""
    limit = "echo 0 > /proc/sys/user/max_inotify_instances"
    command = ["unshare", "-Ur", "sh", "-c", f'{limit} && exec "$@"', "sh"]
    command += [sys.executable, "-c", WITHOUT_INOTIFY, str(tmp_path), pod("a")]
    result = await trio.run_process(command, capture_stdout=True)
    problem, change = result.stdout.decode().splitlines()
    assert "changes are seen late" in problem
    assert problem.endswith("raise fs.inotify.max_user_instances and fs.inotify.max_user_watches with sysctl")
    assert change.startswith("added Pod(")


async def test_waiting_for_nothing_ends(tmp_path: Path) -> None:
    notifier = Notifier()
    assert notifier.add(tmp_path)
    assert not notifier.add(tmp_path)
    assert not notifier.add(tmp_path / "missing")
    assert await notifier.wait(0.01) is None
    (tmp_path / ".hidden").write_text("")
    assert await notifier.wait(5) == set()
    (tmp_path / "seen").write_text("")
    assert await notifier.wait(5) == {tmp_path / "seen"}
    notifier.close()
    notifier.close()


class BusyMachine(trio.abc.Clock):
    """A clock on which time passes between any two looks at it."""

    def __init__(self, step: float) -> None:
        self._now = 0.0
        self._step = step

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        self._now += self._step
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return max(0.0, deadline - self._now)


@pytest.mark.parametrize("step", [0.008, 0.012, 0.024, 0.04])
def test_waiting_bears_a_busy_machine(tmp_path: Path, step: float) -> None:
    async def run() -> set[Path] | None:
        notifier = Notifier()
        notifier.add(tmp_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, write)
            found = await notifier.wait(1000)
            over.append(True)
        notifier.close()
        return found

    def write() -> None:
        while not over:
            (tmp_path / "a.yaml").write_text("")

    over: list[bool] = []
    assert trio.run(run, clock=BusyMachine(step)) == {tmp_path / "a.yaml"}
