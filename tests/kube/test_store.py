"""The Kubernetes store on a real API server: what is told, through everything that may happen to that server."""

import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.kube.following import LIMIT, following, until
from tests.kube.lab import Lab
from tests.kube.things import GROUP, Thing, define, pod, thing, undefine
from ztunnel.store.kube.api import Api, ApiError
from ztunnel.store.kube.cache import Cache
from ztunnel.store.kube.reflector import Reflector
from ztunnel.store.kube.store import KubernetesStore
from ztunnel.store.models import Namespace, Pod, ServiceAccount
from ztunnel.store.problems import NotFound, Problem

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]


class Watched:
    """A store, and the problems that it told of."""

    def __init__(self, api: Api, page: int = 500) -> None:
        self.problems: list[Problem] = []
        self.store = KubernetesStore(api, self.problems.append, page=page)


@pytest.fixture
def watched(apiserver: Lab) -> Watched:
    return Watched(apiserver.api)


@pytest.fixture
async def namespace(apiserver: Lab) -> AsyncIterator[str]:
    """A namespace in which pods can be made; what is in it goes, it stays (nothing here ends namespaces)."""
    name = f"store-{uuid.uuid4().hex[:8]}"
    for obj in (
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}},
    ):
        await trio.to_thread.run_sync(apiserver.api.apply, obj)
    yield name
    for kind in ("pods", "serviceaccounts"):
        path = f"/api/v1/namespaces/{name}/{kind}"
        apiserver.api.request("DELETE", path, query={"gracePeriodSeconds": "0"})
    apiserver.api.delete("v1", "Namespace", "", name)


@pytest.fixture
def things(apiserver: Lab) -> Iterator[None]:
    define(apiserver)
    yield
    undefine(apiserver)


def make(lab: Lab, *objects: dict[str, Any]) -> None:
    for obj in objects:
        lab.api.apply(obj)


def remove(lab: Lab, namespace: str, name: str) -> None:
    lab.api.request("DELETE", lab.api.path("v1", "Pod", namespace, name), query={"gracePeriodSeconds": "0"})


async def test_pages_of_objects_come_first_and_then_each_change(apiserver: Lab, namespace: str) -> None:
    watched = Watched(apiserver.api, page=3)
    make(apiserver, *(pod(f"p{number}", namespace, app="x") for number in range(10)))
    async with following(watched.store, Pod) as told:
        assert told.names(namespace) == {f"p{number}" for number in range(10)}
        first = told.objects[f"{namespace}/p0"]
        assert isinstance(first, Pod)
        assert first.metadata.labels == {"app": "x"}
        assert first.spec.containers[0].ports[0].container_port == 80
        assert first.spec.containers[0].command == []  # what nobody reads is not kept
        make(apiserver, pod("later", namespace))
        await told.until(lambda: "later" in told.names(namespace))
        apiserver.api.patch("v1", "Pod", namespace, "p1", {"metadata": {"labels": {"app": "y"}}})
        await told.until(lambda: told.objects[f"{namespace}/p1"].metadata.labels == {"app": "y"})
        remove(apiserver, namespace, "p2")
        await told.until(lambda: "p2" not in told.names(namespace))
        assert [each.name for each in watched.store.known(Pod) if each.namespace == namespace] == sorted(
            told.names(namespace)
        )
        whole = await trio.to_thread.run_sync(watched.store.get, Pod, namespace, "p1")
        assert whole is not None
        assert whole.spec.containers[0].command == ["sleep"]
        listed = await trio.to_thread.run_sync(watched.store.list, Pod, namespace)
        assert [each.name for each in listed] == sorted(told.names(namespace))
    assert watched.problems == []


async def test_only_what_is_selected_is_told(apiserver: Lab, namespace: str) -> None:
    store = KubernetesStore(
        apiserver.api,
        field_selectors={Pod: f"metadata.namespace={namespace}"},
        label_selectors={Pod: "app=x"},
    )
    make(apiserver, pod("a", namespace, app="x"), pod("b", namespace, app="y"))
    async with following(store, Pod) as told:
        assert set(told.objects) == {f"{namespace}/a"}
        apiserver.api.patch("v1", "Pod", namespace, "b", {"metadata": {"labels": {"app": "x"}}})
        apiserver.api.patch("v1", "Pod", namespace, "a", {"metadata": {"labels": {"app": "y"}}})
        await told.until(lambda: set(told.objects) == {f"{namespace}/b"})


async def test_another_object_of_the_same_name_is_another_object(
    apiserver: Lab, namespace: str, watched: Watched
) -> None:
    make(apiserver, pod("p", namespace))
    changes = watched.store.watch(Pod)
    with trio.fail_after(LIMIT):
        async for change in changes:
            if change.op == "synced":
                break
        (before,) = (each for each in watched.store.known(Pod) if each.namespace == namespace)
        remove(apiserver, namespace, "p")
        make(apiserver, pod("p", namespace))
        new = apiserver.api.get_json(apiserver.api.path("v1", "Pod", namespace, "p"))["metadata"]["uid"]
        await until(lambda: any(each.metadata.uid == new for each in watched.store.known(Pod)))
        told = [await anext(changes), await anext(changes)]
    assert [(change.op, change.obj.metadata.uid) for change in told if change.obj] == [
        ("deleted", before.metadata.uid),
        ("added", new),
    ]
    await changes.aclose()


async def test_a_server_that_is_killed_and_comes_again_takes_nothing_away(
    apiserver: Lab, namespace: str, watched: Watched, things: None
) -> None:
    make(apiserver, pod("a", namespace), thing("t", namespace))
    async with following(watched.store, Pod, Namespace, Thing) as told:
        await trio.to_thread.run_sync(apiserver.stop_apiserver)
        try:
            await until(lambda: any("API server" in str(problem) for problem in watched.store.problems))
            await trio.sleep(2)  # several more attempts of each kind, each of which fails in its own way
            assert told.names(namespace) == {"a", "t"}
            assert len(watched.problems) == 1, f"one and the same for every kind: {watched.problems}"
        finally:
            await trio.to_thread.run_sync(apiserver.start_apiserver)
        make(apiserver, pod("b", namespace), thing("u", namespace))
        await told.until(lambda: told.names(namespace) == {"a", "b", "t", "u"})
        await until(lambda: watched.store.problems == [])
        assert told.deleted() == []


async def test_an_older_state_of_etcd_is_what_counts_then(
    apiserver: Lab, namespace: str, watched: Watched
) -> None:
    make(apiserver, pod("kept", namespace), pod("removed", namespace))
    await trio.to_thread.run_sync(apiserver.snapshot_etcd)
    async with following(watched.store, Pod) as told:
        make(apiserver, *(pod(f"new-{number}", namespace) for number in range(20)))
        remove(apiserver, namespace, "removed")
        await told.until(lambda: len(told.names(namespace)) == 21)
        await trio.to_thread.run_sync(apiserver.restore_etcd)
        await told.until(lambda: told.names(namespace) == {"kept", "removed"})
        make(apiserver, pod("after", namespace))
        await told.until(lambda: told.names(namespace) == {"kept", "removed", "after"})


class Stale(Reflector):
    """Watches, the first time, from a version that is long gone."""

    stale = True

    def _list(self) -> str:
        version = super()._list()
        if self.stale:
            self.stale = False
            return "1"
        return version


async def test_history_that_is_gone_is_no_problem(apiserver: Lab, namespace: str) -> None:
    problems: list[Problem] = []
    cache = Cache(problems.append, lambda: None)
    lists: list[None] = []
    reflector = Stale(apiserver.api, Pod, cache, on_listed=lambda: lists.append(None))
    reflector.start()
    await until(lambda: len(lists) == 2)
    make(apiserver, pod("p", namespace))
    await until(lambda: any(key.name == "p" for key in cache.objects(Pod)))
    reflector.stop()
    assert await trio.to_thread.run_sync(reflector.join, LIMIT)
    assert problems == []


@pytest.fixture
def limited(apiserver: Lab, namespace: str, tmp_path: Path) -> Api:
    """A service account as a pod would use it: it may do nothing yet."""
    make(
        apiserver,
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "meek", "namespace": namespace}},
    )
    (tmp_path / "token").write_text(apiserver.kubectl("create", "token", "meek", "-n", namespace))
    (tmp_path / "ca.crt").write_bytes((apiserver.folder / "pki" / "ca.crt").read_bytes())
    host, _, port = apiserver.api.server.removeprefix("https://").rpartition(":")
    return Api.in_cluster(tmp_path, {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port})


async def test_what_may_not_be_watched_is_told_with_verb_and_resource_and_tried_again(
    apiserver: Lab, namespace: str, limited: Api
) -> None:
    watched = Watched(limited)
    role = f"meek-{namespace}"
    async with following(watched.store, Pod, synced=False) as told:
        await until(lambda: bool(watched.problems))
        assert 'cannot list resource "pods"' in str(watched.problems[0])
        assert f"{namespace}:meek" in str(watched.problems[0])
        assert "Role" in watched.problems[0].remedy
        assert not told.synced, "nobody may take what is not known for what is not there"
        apiserver.kubectl("create", "clusterrole", role, "--verb=list,watch", "--resource=pods")
        user = f"--serviceaccount={namespace}:meek"
        apiserver.kubectl("create", "clusterrolebinding", role, f"--clusterrole={role}", user)
        try:
            await told.until(lambda: told.synced)
            make(apiserver, pod("p", namespace))
            await told.until(lambda: "p" in told.names(namespace))
            await until(lambda: watched.store.problems == [])
        finally:
            apiserver.kubectl("delete", "clusterrolebinding,clusterrole", role)


async def test_a_kind_whose_definition_comes_later_is_followed_and_gone_with_it(
    apiserver: Lab, namespace: str, watched: Watched
) -> None:
    undefine(apiserver)
    async with following(watched.store, Thing, Namespace) as told:
        assert not any(isinstance(obj, Thing) for obj in told.objects.values())
        assert await trio.to_thread.run_sync(watched.store.list, Thing) == []
        assert await trio.to_thread.run_sync(watched.store.get, Thing, namespace, "a") is None
        for _ in range(2):
            await trio.to_thread.run_sync(define, apiserver)
            make(apiserver, thing("a", namespace, size=1))
            await told.until(lambda: "a" in told.names(namespace))
            await trio.to_thread.run_sync(undefine, apiserver)
            await told.until(lambda: "a" not in told.names(namespace))
    assert watched.problems == []


async def test_without_the_right_to_see_definitions_only_that_is_a_problem(
    apiserver: Lab, namespace: str, limited: Api
) -> None:
    role = f"meek-{namespace}"
    rules = [{"apiGroups": ["", GROUP], "resources": ["pods", "things"], "verbs": ["list", "watch"]}]
    kind = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole"}
    make(apiserver, {**kind, "metadata": {"name": role}, "rules": rules})
    user = f"--serviceaccount={namespace}:meek"
    apiserver.kubectl("create", "clusterrolebinding", role, f"--clusterrole={role}", user)
    undefine(apiserver)
    watched = Watched(limited)
    try:
        async with following(watched.store, Thing, Pod):
            await until(lambda: any("customresourcedefinitions" in str(each) for each in watched.problems))
    finally:
        apiserver.kubectl("delete", "clusterrolebinding,clusterrole", role)


async def test_an_object_that_cannot_be_read_stays_as_it_was_and_the_others_are_told(
    apiserver: Lab, namespace: str, watched: Watched, things: None
) -> None:
    make(apiserver, thing("a", namespace, size=1), thing("wrong", namespace, size="big"))
    async with following(watched.store, Thing) as told:
        assert told.names(namespace) == {"a"}
        assert f"Thing {namespace}/wrong" in str(watched.store.problems[0])
        make(apiserver, thing("a", namespace, size="bigger"))
        await until(lambda: len(watched.store.problems) == 2)
        assert told.objects[f"{namespace}/a"].spec.size == 1  # type: ignore[attr-defined]
        make(apiserver, thing("wrong", namespace, size=2), thing("a", namespace, size=3))
        await told.until(lambda: told.names(namespace) == {"a", "wrong"})
        await until(lambda: watched.store.problems == [])


async def test_an_object_of_a_megabyte_is_an_object(
    apiserver: Lab, namespace: str, watched: Watched, things: None
) -> None:
    async with following(watched.store, Thing) as told:
        # Server-side apply notes who manages what: this one is made plainly.
        path = apiserver.api.path(Thing.API_VERSION, "Thing", namespace)
        apiserver.api.request("POST", path, body=thing("big", namespace, text="x" * 1_000_000))
        await told.until(lambda: "big" in told.names(namespace))
        assert len(told.objects[f"{namespace}/big"].spec.text) == 1_000_000  # type: ignore[attr-defined]
        async with following(watched.store, Thing) as again:
            assert "big" in again.names(namespace)


async def test_patches_that_meet_one_another_all_count(
    apiserver: Lab, namespace: str, watched: Watched, things: None
) -> None:
    make(apiserver, thing("a", namespace, size=1))
    store = watched.store
    uid = apiserver.api.get_json(apiserver.api.path(Thing.API_VERSION, "Thing", namespace, "a"))["metadata"][
        "uid"
    ]

    async def patch(merge: dict[str, Any], given: str) -> None:
        await trio.to_thread.run_sync(partial(store.patch, Thing, namespace, "a", merge, uid=given))

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(patch, {"status": {f"s{number}": number}}, uid)
            nursery.start_soon(
                patch, {"metadata": {"labels": {f"l{number}": "x"}}}, uid if number % 2 else ""
            )
    found = store.get(Thing, namespace, "a")
    assert found is not None
    assert found.status == {f"s{number}": number for number in range(6)}
    assert set(found.metadata.labels) == {f"l{number}" for number in range(6)}
    for given in ({"status": {"x": 1}}, {"metadata": {"labels": {"x": "y"}}}):
        with pytest.raises(NotFound, match="another one has its name"):
            store.patch(Thing, namespace, "a", given, uid="another")
        with pytest.raises(NotFound, match="create it first"):
            store.patch(Thing, namespace, "absent", given)
    assert store.get(Thing, namespace, "a") == found


async def test_a_namespace_that_is_deleted_whole_takes_everything_with_it(
    apiserver: Lab, watched: Watched
) -> None:
    name = f"whole-{uuid.uuid4().hex[:8]}"
    await trio.to_thread.run_sync(apiserver.start_controllers)
    apiserver.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    async with following(watched.store, Namespace, ServiceAccount, Pod) as told:
        await told.until(lambda: f"{name}/default" in told.objects)  # the controllers make it
        make(apiserver, *(pod(f"p{number}", name) for number in range(5)))
        await told.until(lambda: len(told.names(name)) == 6)
        # Nobody runs these pods, so nobody else would end them.
        apiserver.api.delete("v1", "Namespace", "", name)
        apiserver.kubectl("delete", "pods", "--all", "-n", name, "--force", "--grace-period=0")
        await told.until(lambda: not told.names(name) and name not in told.objects)


async def test_a_watch_that_is_cancelled_ends_its_threads(apiserver: Lab, watched: Watched) -> None:
    def watching() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("watch ")}

    async with following(watched.store, Pod, Namespace), following(watched.store, Pod):
        assert watching() == {"watch Pod", "watch Namespace"}
    await until(lambda: not watching())
    with trio.move_on_after(0):
        async for _ in watched.store.watch(Pod):
            pass
    await until(lambda: not watching())


async def test_what_is_asked_for_of_a_dead_server_is_an_error_in_words(
    apiserver: Lab, watched: Watched
) -> None:
    unused = Api(apiserver.api.access._replace(server="https://127.0.0.1:1"))
    store = KubernetesStore(unused)
    for ask in (partial(store.list, Pod), partial(store.get, Pod, "default", "x")):
        with pytest.raises(ApiError, match="cannot be reached"):
            await trio.to_thread.run_sync(ask)
