"""One kind followed on a server that does what real ones rarely do: ends watches, forgets history, denies the kind."""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from tests.store.kube.server import Answer, Fake, Request, failure
from ztunnel.store.kube import decoding, reflector
from ztunnel.store.kube.cache import Cache
from ztunnel.store.kube.reflector import Reflector
from ztunnel.store.models import AuthorizationPolicy, Key, Pod
from ztunnel.store.problems import Problem

LIMIT = 60.0

Chunks = queue.Queue[bytes | None]


def pod(name: str, version: int = 1, **fields: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "ns", "uid": f"u-{name}", "resourceVersion": str(version)}
    return {"metadata": metadata | fields.pop("metadata", {}), **fields}


def line(kind: str, obj: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


class Server:
    """Lists `items` at `version`, in pages of two; each watch is a queue that the test fills."""

    def __init__(self) -> None:
        self.items = [pod("a"), pod("b"), pod("c")]
        self.version = 10
        self.refusals: list[Answer] = []  # for the next lists
        self.watches: list[tuple[dict[str, str], Chunks]] = []
        self.lists = 0
        self.begun: Callable[[Chunks], None] = lambda chunks: None
        self.fake = Fake(self.handle)

    def handle(self, request: Request) -> Answer:
        if request.query.get("watch"):
            chunks: Chunks = queue.Queue()
            self.watches.append((request.query, chunks))
            self.begun(chunks)
            return Answer(chunks=chunks)
        if self.refusals:
            return self.refusals.pop(0)
        start = int(request.query.get("continue") or 0)
        if not start:
            self.lists += 1
        end = start + 2 if "limit" in request.query else len(self.items)
        more = str(end) if end < len(self.items) else ""
        metadata = {"resourceVersion": str(self.version), "continue": more}
        return Answer(body={"metadata": metadata, "items": self.items[start:end]})

    def close(self) -> None:
        self.begun = lambda chunks: chunks.put(None)
        for _, chunks in self.watches:
            chunks.put(None)
        self.fake.close()


class Followed:
    """A reflector of pods on a server, and what it has put into its cache."""

    def __init__(self, server: Server) -> None:
        self.problems: list[Problem] = []
        self.cache = Cache(self.problems.append, lambda: None)
        self.reflector = Reflector(server.fake.api(), Pod, self.cache, page=2)
        self.reflector.start()

    def names(self) -> set[str]:
        return {key.name for key in self.cache.objects(Pod)}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def followed(server: Server) -> Iterator[Followed]:
    followed = Followed(server)
    yield followed
    followed.reflector.stop()
    server.close()
    assert followed.reflector.join(LIMIT)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


def test_pages_are_read_and_the_watch_begins_where_they_stood(server: Server, followed: Followed) -> None:
    until(lambda: len(server.watches) == 1)
    assert followed.names() == {"a", "b", "c"}
    query, chunks = server.watches[0]
    assert query["resourceVersion"] == "10"
    assert query["allowWatchBookmarks"] == "true"
    assert 200 < int(query["timeoutSeconds"]) < 700
    chunks.put(line("ADDED", pod("d")) + line("DELETED", pod("a")))
    until(lambda: followed.names() == {"b", "c", "d"})


def test_history_that_ends_within_a_watch_is_listed_anew_without_a_word(
    server: Server, followed: Followed
) -> None:
    until(lambda: len(server.watches) == 1)
    server.items, server.version = [pod("c", 20), pod("e", 21)], 30
    error = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
    server.watches[0][1].put(line("ERROR", error))
    until(lambda: followed.names() == {"c", "e"})
    until(lambda: len(server.watches) == 2)
    assert server.watches[1][0]["resourceVersion"] == "30"
    assert followed.problems == []


def test_pages_that_expire_are_asked_for_in_one_piece(server: Server) -> None:
    real, count = server.handle, 0

    def handle(request: Request) -> Answer:
        nonlocal count
        if request.query.get("continue"):
            count += 1
            return failure(410, "Expired", "the provided continue parameter is too old")
        return real(request)

    server.fake.handle = handle
    followed = Followed(server)
    until(lambda: followed.names() == {"a", "b", "c"})
    followed.reflector.stop()
    assert count == 1
    assert followed.problems == []


def test_a_watch_that_the_server_ends_in_time_goes_on_where_it_was(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflector, "_SLACK", 1000.0)
    versions = ["40", "50"]

    def begun(chunks: Chunks) -> None:
        if not versions:
            return
        version = versions.pop(0)
        event = line("MODIFIED", pod("a", 40)) if version == "40" else b""
        bookmark = line("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": "50"}})
        chunks.put(event or bookmark)
        chunks.put(None)

    server.begun = begun
    followed = Followed(server)
    until(lambda: len(server.watches) == 3)
    followed.reflector.stop()
    assert [query["resourceVersion"] for query, _ in server.watches] == ["10", "40", "50"]
    assert server.lists == 1


def test_a_watch_that_breaks_off_is_never_trusted(server: Server, followed: Followed) -> None:
    until(lambda: len(server.watches) == 1)
    server.items, server.version = [pod("b", 3)], 5  # an older state than was known
    server.watches[0][1].put(None)
    until(lambda: followed.names() == {"b"})
    until(lambda: len(server.watches) == 2)
    assert server.watches[1][0]["resourceVersion"] == "5"


def test_a_server_that_ends_every_watch_at_once_is_not_stormed(server: Server) -> None:
    server.begun = lambda chunks: chunks.put(None)
    followed = Followed(server)
    until(lambda: bool(followed.problems))
    time.sleep(3)  # how often it was asked in this time, is what is looked at
    followed.reflector.stop()
    assert server.lists < 20
    assert "ended by the server" in str(followed.problems[0])
    assert followed.names() == {"a", "b", "c"}


def test_a_kind_that_is_missing_for_a_moment_keeps_its_objects(server: Server, followed: Followed) -> None:
    until(lambda: len(server.watches) == 1)
    server.refusals = [failure(404, "NotFound", "the server could not find the requested resource")] * 2
    gone: list[set[str]] = []
    server.watches[0][1].put(None)
    until(lambda: gone.append(followed.names()) or len(server.watches) == 2)  # type: ignore[func-returns-value]
    assert all(names == {"a", "b", "c"} for names in gone)


def test_a_kind_that_stays_missing_is_gone(server: Server, followed: Followed) -> None:
    until(lambda: len(server.watches) == 1)
    server.refusals = [failure(404, "NotFound", "the server could not find the requested resource")] * 1000
    server.watches[0][1].put(None)
    until(lambda: followed.names() == set())
    server.refusals = []
    followed.reflector.nudge(expected=True)
    until(lambda: followed.names() == {"a", "b", "c"})


def test_what_is_no_event_or_has_no_name_harms_nothing(server: Server, followed: Followed) -> None:
    until(lambda: len(server.watches) == 1)
    server.watches[0][1].put(line("ADDED", {"metadata": {}}) + line("ADDED", pod("d")) + b"garbage\n")
    until(lambda: len(server.watches) == 2)
    server.watches[1][1].put(line("ADDED", pod("e")))
    until(lambda: "e" in followed.names())


def test_after_its_end_nothing_is_put_in(server: Server, followed: Followed) -> None:
    until(lambda: len(server.watches) == 1)
    followed.reflector.stop()
    server.watches[0][1].put(line("ADDED", pod("late")))
    server.watches[0][1].put(None)
    assert followed.reflector.join(LIMIT)
    assert "late" not in followed.names()


def test_pods_of_one_deployment_share_what_is_the_same() -> None:
    read = decoding.reader(Pod, slim=True)

    def made(name: str) -> Pod:
        spec = {
            "nodeName": "n",
            "containers": [
                {"name": "c", "env": [{"name": "A", "value": "x"}], "ports": [{"containerPort": 80}]}
            ],
        }
        applied = {"kubectl.kubernetes.io/last-applied-configuration": "{}", "x": "y"}
        metadata = {
            "labels": {"app": "web"},
            "annotations": applied,
            "managedFields": [{"manager": "kubelet"}],
        }
        status = {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}, {"type": "Other", "status": "True"}],
        }
        found = read(msgspec.json.encode(pod(name, metadata=metadata, spec=spec, status=status)))
        assert found is not None
        assert isinstance(found.obj, Pod)
        return found.obj

    one, other = made("one"), made("other")
    assert one.metadata.labels is other.metadata.labels
    assert one.metadata.annotations == {"x": "y"}
    assert one.spec.containers is other.spec.containers
    assert one.spec.containers[0].env == []
    assert one.ready
    assert len(one.status.conditions) == 1


def test_a_policy_with_faults_counts_and_is_told_of() -> None:
    read = decoding.reader(AuthorizationPolicy, slim=True)
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        **pod("p", spec={"action": "DENIE"}),
    }
    found = read(msgspec.json.encode(policy))
    assert found is not None
    assert found.obj is not None
    assert "DENIE" in str(found.problems[0])
    assert found.key == Key("security.istio.io", "AuthorizationPolicy", "ns", "p")


def test_threads_are_named_for_their_kind(followed: Followed) -> None:
    assert "watch Pod" in {thread.name for thread in threading.enumerate()}
