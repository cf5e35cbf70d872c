"""Requests to a real API server."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kube.lab import Lab
from ztunnel.store.kube.api import ApiError

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]


@pytest.fixture
def namespace(apiserver: Lab) -> Iterator[str]:
    name = f"api-{uuid.uuid4().hex[:8]}"
    apiserver.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    apiserver.api.delete("v1", "Namespace", "", name)


def config(name: str, namespace: str, **data: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "labels": {"app": "x"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def test_an_object_is_applied_patched_listed_and_deleted(apiserver: Lab, namespace: str) -> None:
    api = apiserver.api
    assert api.apply(config("dry", namespace), dry_run=True)["metadata"]["uid"]
    assert api.get("v1", "ConfigMap", namespace, "dry") is None
    for number in range(5):
        api.apply(config(f"c{number}", namespace, a="1", b="2"))
    assert api.apply(config("c0", namespace, a="1"))["data"] == {"a": "1"}, (
        "what is no longer applied is gone"
    )
    assert api.patch("v1", "ConfigMap", namespace, "c0", {"data": {"c": "3"}})["data"] == {"a": "1", "c": "3"}
    listed = api.list("v1", "ConfigMap", namespace, "app=x", limit=2)
    assert [each["metadata"]["name"] for each in listed] == [f"c{number}" for number in range(5)]
    assert {each["kind"] for each in listed} == {"ConfigMap"}
    assert api.delete("v1", "ConfigMap", namespace, "c0")
    assert not api.delete("v1", "ConfigMap", namespace, "c0")
    assert not api.delete("v1", "ConfigMap", namespace, "c1", uid="00000000-0000-0000-0000-000000000000")


def test_fields_that_others_manage_are_taken_only_by_force(apiserver: Lab, namespace: str) -> None:
    api = apiserver.api
    api.apply(config("c", namespace, a="1"), field_manager="other")
    with pytest.raises(ApiError) as caught:
        api.apply(config("c", namespace, a="2"), force=False)
    assert caught.value.conflict
    assert f"ConfigMap {namespace}/c" in str(caught.value)
    assert '"other"' in str(caught.value)
    assert api.apply(config("c", namespace, a="2"))["data"] == {"a": "2"}


def test_a_watch_is_a_stream_of_lines(apiserver: Lab, namespace: str) -> None:
    api = apiserver.api
    path = api.path("v1", "ConfigMap", namespace)
    api.apply(config("c", namespace, a="1"))
    # Where controllers run, they put things of their own into the namespace.
    only = {"fieldSelector": "metadata.name=c"}
    stream = api.stream(path, {"watch": "true", "timeoutSeconds": "60", **only})
    lines = iter(stream)
    assert b'"ADDED"' in next(lines)
    api.apply(config("c", namespace, a="2"))
    assert b'"MODIFIED"' in next(lines)
    stream.close()
    assert list(lines) == []


def test_the_same_event_is_counted(apiserver: Lab, namespace: str) -> None:
    api = apiserver.api
    api.apply(config("c", namespace))
    found = api.get_json(api.path("v1", "ConfigMap", namespace, "c"))["metadata"]
    about = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "namespace": namespace,
        "name": "c",
        "uid": found["uid"],
    }
    for _ in range(3):
        api.event(about, reason="Tried", message="three times")
    api.event(about, reason="Tried", message="once", type="Normal", component="istiod")
    events = {each["message"]: each for each in api.list("v1", "Event", namespace)}
    assert events["three times"]["count"] == 3
    assert events["three times"]["type"] == "Warning"
    assert events["once"]["count"] == 1
    assert "three times" in apiserver.kubectl("describe", "configmap", "c", "-n", namespace)
