"""The resolver between two directories: what the user writes arrives, what others write stays."""

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from ztunnel.embedded.cluster import Cluster
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Deployment, Namespace, Pod, Service
from ztunnel.store.problems import Problem

pytestmark = pytest.mark.timeout(60)

WEB = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, command: [x]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
"""


class Place:
    """A user's directory, the resolved one, and a reader of each that is nobody else's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory = root / "shop"
        self.directory.mkdir(exist_ok=True)
        self.user = DirectoryStore(self.directory)
        self.objects = DirectoryStore(root / "state" / "objects")
        self.said: list[list[Problem]] = []

    @asynccontextmanager
    async def resolved(self, nodes: int = 2, *, graceful: bool = False) -> AsyncIterator[Cluster]:
        """The resolver at work until the end of the block."""
        cluster = Cluster(
            DirectoryStore(self.directory),
            DirectoryStore(self.root / "state" / "objects"),
            nodes,
            problems_file=self.root / "state" / "problems.json",
            on_problems=self.said.append,
            graceful=graceful,
        )
        async with trio.open_nursery() as nursery:
            with trio.fail_after(10):
                await nursery.start(cluster.run)
            yield cluster
            nursery.cancel_scope.cancel()

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)

    def pods(self) -> list[Pod]:
        return self.objects.list(Pod, "default")

    def written_problems(self) -> list[Problem]:
        return msgspec.json.decode((self.root / "state" / "problems.json").read_bytes(), type=list[Problem])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def until(true: Callable[[], object], limit: float = 10.0) -> None:
    with trio.fail_after(limit):
        while not true():
            await trio.sleep(0.005)


async def test_everything_is_there_when_it_has_started(place: Place) -> None:
    place.write("web.yaml", WEB)
    async with place.resolved() as cluster:
        assert len(place.pods()) == 2
        assert place.objects.get(Service, "default", "web").addresses  # type: ignore[union-attr]
        assert place.objects.get(Namespace, "", "default") is not None
        assert cluster.problems == place.written_problems() == []
    assert (place.root / "state" / "objects").stat().st_mode & 0o777 == 0o700


async def test_what_the_user_does_arrives_within_a_second(place: Place) -> None:
    async with place.resolved():
        place.write("web.yaml", WEB)
        await until(lambda: len(place.pods()) == 2, 1)
        place.user.patch(Deployment, "default", "web", {"spec": {"replicas": 4}})
        await until(lambda: len(place.pods()) == 4, 1)
        place.user.apply(Namespace(metadata=msgspec.convert({"name": "shop", "labels": {"a": "b"}}, type(
            Namespace().metadata))))  # fmt: skip
        await until(lambda: place.objects.get(Namespace, "", "shop"), 1)
        place.user.patch(Namespace, "", "shop", {"metadata": {"labels": {"a": None, "c": "d"}}})
        await until(lambda: place.objects.get(Namespace, "", "shop").metadata.labels == {"c": "d"}, 1)  # type: ignore[union-attr]
        os.unlink(place.directory / "web.yaml")
        await until(lambda: not place.pods(), 1)
        assert place.objects.list(Service) == []


async def test_a_label_changes_no_running_pod(place: Place) -> None:
    place.write("pod.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"
                            "spec: {containers: [{name: c, command: [x]}]}\n")  # fmt: skip
    async with place.resolved():
        (before,) = place.pods()
        place.objects.patch(
            Pod,
            "default",
            "a",
            {
                "status": {"phase": "Running", "message": "up"},
                "metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}},
            },
        )
        place.user.patch(Pod, "default", "a", {"metadata": {"labels": {"x": "y"}, "annotations": {"n": "1"}}})
        await until(lambda: place.pods()[0].metadata.labels == {"x": "y"})
        (after,) = place.pods()
        assert after.metadata.uid == before.metadata.uid
        assert after.addresses == before.addresses
        assert (after.status.phase, after.status.message) == ("Running", "up")
        assert after.metadata.annotations["ambient.istio.io/redirection"] == "enabled"
        assert after.metadata.annotations["n"] == "1"


async def test_pods_are_the_same_after_a_restart(place: Place) -> None:
    place.write("web.yaml", WEB)
    async with place.resolved():
        before = (place.pods(), place.objects.list(Service))
    async with place.resolved():
        assert (place.pods(), place.objects.list(Service)) == before
        files = {path: path.stat().st_mtime_ns for path in (place.root / "state" / "objects").rglob("*.json")}
    async with place.resolved():
        pass
    assert files == {
        path: path.stat().st_mtime_ns for path in (place.root / "state" / "objects").rglob("*.json")
    }


async def test_what_went_while_nobody_looked_is_gone_at_the_next_start(place: Place) -> None:
    place.write("web.yaml", WEB)
    async with place.resolved():
        pass
    (place.directory / "web.yaml").unlink()
    async with place.resolved():
        assert place.pods() == []


async def test_status_written_by_others_at_any_moment_is_kept(place: Place) -> None:
    """The runner and the user change the same pods at the same time."""
    place.write("web.yaml", WEB.replace("replicas: 2", "replicas: 5"))
    async with place.resolved():
        pods = place.pods()
        for step in range(20):
            for pod in pods:
                place.objects.patch(
                    Pod, "default", pod.name, {"status": {"message": f"step {step}"}}, uid=pod.metadata.uid
                )
            place.user.patch(Deployment, "default", "web", {"metadata": {"labels": {"step": str(step)}}})
            await trio.sleep(0)
        await until(lambda: place.objects.get(Deployment, "default", "web").metadata.labels == {"step": "19"})  # type: ignore[union-attr]
        assert [pod.status.message for pod in place.pods()] == ["step 19"] * 5
        assert [pod.metadata.uid for pod in place.pods()] == [pod.metadata.uid for pod in pods]


async def test_readiness_counts_on_the_deployment(place: Place) -> None:
    place.write("web.yaml", WEB)
    async with place.resolved():
        for number, pod in enumerate(place.pods(), 1):
            ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
            place.objects.patch(Pod, "default", pod.name, ready)
            await until(
                lambda: place.objects.get(Deployment, "default", "web").status.ready_replicas == number  # type: ignore[union-attr]  # noqa: B023
            )


async def test_objects_that_somebody_removed_come_back(place: Place) -> None:
    place.write("web.yaml", WEB)
    async with place.resolved():
        lost = place.pods()[0]
        place.objects.delete(Pod, "default", lost.name)
        await until(lambda: len(place.pods()) == 2)
        found = place.objects.get(Pod, "default", lost.name)
        assert found is not None
        assert found.metadata.uid != lost.metadata.uid


async def test_problems_are_told_written_and_taken_back(place: Place) -> None:
    place.write("web.yaml", WEB)
    place.write("bad.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\nnot: [valid\n")
    place.write("lost.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: lost}\n"
                             "spec: {selector: {app: none}, ports: [{port: 80}]}\n")  # fmt: skip
    async with place.resolved() as cluster:
        assert [str(problem) for problem in place.written_problems()] == [
            "Pod default/a (bad.yaml:1): spec.containers: is missing; "
            "list at least one container with name and command",
            "bad.yaml:6: not valid YAML: did not find expected ',' or ']'; correct the syntax there",
            "Service default/lost (lost.yaml): spec.selector (app=none) selects no pod of namespace default; "
            "make it match the labels of the pods meant",
        ]
        assert len(place.pods()) == 2
        cluster.report("network", Problem("Node node-1", "", "no bridge", "load the module"))
        assert place.written_problems()[-1].object == "Node node-1"
        cluster.report("network", None)
        (place.directory / "bad.yaml").unlink()
        (place.directory / "lost.yaml").unlink()
        await until(lambda: place.written_problems() == [])
        assert cluster.problems == []
        assert place.said[-1] == []


async def test_a_slip_of_the_pen_stops_no_pod(place: Place) -> None:
    place.write("web.yaml", WEB)
    async with place.resolved():
        before = place.pods()
        place.write("web.yaml", WEB.replace("replicas: 2", "replicas: [2"))
        await until(lambda: place.written_problems())
        assert place.pods() == before
        place.write("web.yaml", WEB.replace("replicas: 2", "replicas: 1"))
        await until(lambda: len(place.pods()) == 1)
        assert place.written_problems() == []


async def test_the_users_directory_may_vanish_for_a_while(place: Place) -> None:
    place.write("web.yaml", WEB)
    async with place.resolved():
        before = place.pods()
        place.directory.rename(place.root / "moved")
        await until(lambda: place.written_problems())
        assert place.pods() == before
        (place.root / "moved").rename(place.directory)
        await until(lambda: not place.written_problems())
        assert place.pods() == before


async def test_a_pod_that_waits_starts_when_it_can(place: Place) -> None:
    place.write("web.yaml", WEB.replace("spec: {containers", "spec: {serviceAccountName: cart, containers"))
    async with place.resolved():
        assert {pod.status.reason for pod in place.pods()} == {"NoServiceAccount"}
        place.write("cart.yaml", "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: cart}\n")
        await until(lambda: all(pod.addresses for pod in place.pods()))
        assert {(pod.status.reason, pod.status.message) for pod in place.pods()} == {("", "")}


async def test_a_store_that_cannot_be_written_is_tried_again(place: Place) -> None:
    place.write("web.yaml", WEB)
    blocked = place.root / "state" / "objects" / "Pod"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    async with place.resolved():
        failed = [problem for problem in place.written_problems() if problem.object.startswith("Pod ")]
        assert len(failed) == 2
        assert "cannot be written" in failed[0].message
        assert place.objects.get(Service, "default", "web") is not None
        blocked.unlink()
        await until(lambda: len(place.pods()) == 2)
        await until(lambda: place.written_problems() == [])


async def test_files_of_the_store_are_plain_kubernetes_objects(place: Place) -> None:
    place.write("web.yaml", WEB)
    async with place.resolved():
        data = json.loads((place.root / "state" / "objects" / "Service" / "default" / "web.json").read_text())
        assert (data["apiVersion"], data["kind"], data["spec"]["selector"]) == (
            "v1",
            "Service",
            {"app": "web"},
        )
        assert (place.root / "state" / "objects" / "Node" / "_cluster" / "node-1.json").exists()


async def test_where_pods_are_run_they_are_removed_by_whoever_runs_them(tmp_path: Path) -> None:
    """Until then the object stays, told to end, and no other pod has its name."""
    place = Place(tmp_path)
    one = "apiVersion: v1\nkind: Pod\nmetadata: {name: one}\nspec: {containers: [{name: c, command: [%s]}]}\n"
    place.write("one.yaml", one % "x")
    async with place.resolved(graceful=True):
        (first,) = place.pods()
        place.write("one.yaml", one % "y")
        await until(lambda: place.pods()[0].metadata.deletion_timestamp)
        (going,) = place.pods()
        assert going.metadata.uid == first.metadata.uid
        assert going.spec.containers[0].command == ["x"]
        place.objects.delete_key(going.key)
        await until(lambda: [pod.spec.containers[0].command for pod in place.pods()] == [["y"]])
        (second,) = place.pods()
        assert second.metadata.uid != first.metadata.uid
        place.directory.joinpath("one.yaml").unlink()
        await until(lambda: place.pods()[0].metadata.deletion_timestamp)
        place.objects.delete_key(second.key)
        await until(lambda: place.pods() == [])
