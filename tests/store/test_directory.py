"""A directory of files is the store: what is read, how it is changed, what happens to what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.store.manifests import namespace, pod
from ztunnel.store.directory import DirectoryStore, object_file
from ztunnel.store.models import (
    Container,
    Deployment,
    Key,
    Namespace,
    ObjectMeta,
    Pod,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
)
from ztunnel.store.problems import Invalid, NotFound, Problem, StoreError


@pytest.fixture
def problems() -> list[Problem]:
    return []


@pytest.fixture
def store(tmp_path: Path, problems: list[Problem]) -> DirectoryStore:
    return DirectoryStore(tmp_path, problems.append)


def names(store: DirectoryStore) -> list[str]:
    return [str(key) for key in store.keys()]  # noqa: SIM118


def a_pod(name: str = "a", **labels: str) -> Pod:
    return Pod(
        metadata=ObjectMeta(name=name, namespace="default", labels=labels),
        spec=PodSpec(containers=[Container(name="c", command=["sleep", "inf"])]),
    )


def test_files_of_all_forms_are_read(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text(pod("b") + "---\n" + pod("a", "shop"))
    (tmp_path / "c.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}]}))  # fmt: skip
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "d.yaml").write_text("\ufeff" + pod("d"))
    assert [found.ref for found in store.list(Pod)] == ["Pod default/b", "Pod default/d", "Pod shop/a"]
    assert [found.name for found in store.list(Pod, "shop")] == ["a"]
    assert [found.name for found in store.list(Namespace, "any")] == ["shop"]
    assert store.get(Namespace, "any", "shop") is not None
    assert store.get(Pod, "", "b") is not None
    assert store.get(Pod, "shop", "b") is None
    assert store.get(Pod, "shop", "a").metadata.namespace == "shop"  # type: ignore[union-attr]
    assert not store.problems


@pytest.mark.parametrize(
    "name",
    [".hidden.yaml", "#web.yaml#", "web.yaml~", "web.yaml.swp", "web.yaml.bak", "README.md", ".#web.yaml"],
)
def test_hidden_files_and_editors_copies_do_not_count(
    store: DirectoryStore, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text(pod("a"))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.yaml").write_text(pod("b"))
    assert names(store) == []


def test_what_changed_is_seen_at_the_next_look(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for image in ("one", "two", "six"):  # same size, and within one tick of the clock
        path.write_text(pod("a", image=image))
        found = store.get(Pod, "default", "a")
        assert found is not None
        assert found.spec.containers[0].image == image
    path.unlink()
    assert store.get(Pod, "default", "a") is None
    assert store.list(Pod) == []


def test_new_objects_get_files_of_their_own(store: DirectoryStore, tmp_path: Path) -> None:
    service = Service(metadata=ObjectMeta(name="web"), spec=ServiceSpec(ports=[ServicePort(port=80)]))
    assert store.apply(service) == tmp_path / "service-default-web.yaml"
    assert (tmp_path / "service-default-web.yaml").read_text() == (
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  ports:\n  - port: 80\n"
    )
    (tmp_path / "namespace-shop.yaml").write_text("# nothing yet\n")
    assert store.apply(Namespace(metadata=ObjectMeta(name="shop"))) == tmp_path / "namespace-shop-2.yaml"
    assert store.apply(a_pod(), file=object_file(a_pod().key)) == tmp_path / "Pod" / "default" / "a.json"
    assert names(store) == ["Namespace shop", "Pod default/a", "Service default/web"]


def test_applying_replaces_where_the_object_lives(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(f"# head\n{namespace('shop')}---\n{pod('a')}# after a\n---\n{pod('b')}")
    assert store.apply(a_pod("a", tier="x")) == path
    text = path.read_text()
    assert text.startswith(f"# head\n{namespace('shop')}---\n")
    assert text.endswith(f"# after a\n---\n{pod('b')}")
    assert store.get(Pod, "default", "a") == a_pod("a", tier="x")


def test_applying_a_manifest_keeps_fields_that_are_not_used(store: DirectoryStore, tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"},
        "spec": {"containers": [{"name": "c", "command": ["x"], "resources": {"limits": {"cpu": "1"}}}]},
    }  # fmt: skip
    path = store.apply(data)
    assert "cpu: '1'" in path.read_text()
    store.patch(Pod, "default", "a", {"spec": {"nodeName": "node-2"}})
    assert "cpu: '1'" in path.read_text()


def test_a_file_with_other_objects_is_never_written_over(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "taken.yaml").write_text(pod("b"))
    with pytest.raises(
        StoreError, match=r"Pod default/a: taken\.yaml holds other objects; name another file"
    ):
        store.apply(a_pod("a"), file=Path("taken.yaml"))
    assert store.apply(a_pod("b"), file=Path("taken.yaml")) == tmp_path / "taken.yaml"
    (tmp_path / "broken.json").write_text('{"half": ')
    store.apply(a_pod("c"), file=Path("broken.json"))
    assert names(store) == ["Pod default/b", "Pod default/c"]


def test_applying_the_same_again_does_not_touch_the_file(store: DirectoryStore, tmp_path: Path) -> None:
    path = store.apply(a_pod())
    before = path.stat()
    store.apply(a_pod())
    assert path.stat() == before


def test_kinds_that_are_not_acted_on_can_be_stored(store: DirectoryStore, problems: list[Problem]) -> None:
    policy = {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "deny", "namespace": "shop"}, "spec": {},
    }  # fmt: skip
    store.apply(policy)
    key = Key("networking.k8s.io", "NetworkPolicy", "shop", "deny")
    assert store.keys() == [key]
    assert [str(problem) for problem in problems] == [
        "NetworkPolicy shop/deny (networkpolicy-shop-deny.yaml:1): is not enforced by this version; "
        "do not rely on it"
    ]
    assert store.delete_key(key)
    assert store.keys() == []
    assert store.problems == []


@pytest.mark.parametrize(
    "data",
    [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "A"},
            "spec": {"containers": [{"name": "c"}]},
        },
        {"apiVersion": "v1", "kind": "Nonsense", "metadata": {"name": "a"}},
        {},
    ],
)
def test_what_is_wrong_is_not_stored(store: DirectoryStore, tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as refused:
        store.apply(data)
    assert refused.value.problems
    assert not list(tmp_path.iterdir())


def test_deleting_takes_the_document_and_with_the_last_the_file(
    store: DirectoryStore, tmp_path: Path
) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(f"# head\n{pod('a')}---\n{pod('b')}")
    assert store.delete(Pod, "default", "a")
    assert path.read_text() == f"# head\n---\n{pod('b')}"
    assert not store.delete(Pod, "default", "a")
    assert store.delete(Pod, "", "b")
    assert not path.exists()


def test_deleting_from_a_list(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    items = "".join(
        f"- {{apiVersion: v1, kind: Namespace, metadata: {{name: {name}}}}} # {name}\n" for name in "abc"
    )
    path.write_text(f"apiVersion: v1\nkind: List\nitems:\n{items}")
    assert store.delete(Namespace, "", "b")
    assert names(store) == ["Namespace a", "Namespace c"]
    assert "# c" in path.read_text()
    assert store.delete(Namespace, "", "a")
    assert store.delete(Namespace, "", "c")
    assert not path.exists()


def test_deleting_takes_every_copy(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"{pod('x')}---\n{pod('x')}")
    (tmp_path / "b.yaml").write_text(f"{pod('y')}---\n{pod('x')}")
    assert store.delete(Pod, "default", "x")
    assert names(store) == ["Pod default/y"]


def test_patching_changes_only_what_it_says(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(f"{namespace('shop', team='blue')}---\n{pod('a')}")
    patched = store.patch(
        Namespace, "", "shop", {"metadata": {"labels": {"team": None, "istio.io/dataplane-mode": "ambient"}}}
    )
    assert patched.metadata.labels == {"istio.io/dataplane-mode": "ambient"}
    assert path.read_text() == (
        f"{namespace('shop')}  labels:\n    istio.io/dataplane-mode: ambient\n---\n{pod('a')}"
    )


def test_patching_an_item_of_a_list_and_json(store: DirectoryStore, tmp_path: Path) -> None:
    item = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}
    other = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "b"}}
    (tmp_path / "list.json").write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": [item, other]})
    )
    store.patch(Namespace, "", "b", {"metadata": {"labels": {"x": "y"}}})
    assert json.loads((tmp_path / "list.json").read_text())["items"] == [
        item,
        {**other, "metadata": {"name": "b", "labels": {"x": "y"}}},
    ]
    store.apply(a_pod("j"), file=Path("j.json"))
    assert store.patch(Pod, "default", "j", {"status": {"phase": "Running"}}).status.phase == "Running"
    assert json.loads((tmp_path / "j.json").read_text())["status"] == {"phase": "Running"}


def test_patching_what_is_not_there(store: DirectoryStore) -> None:
    with pytest.raises(NotFound, match=r"^Pod default/a: not found; create it first$"):
        store.patch(Pod, "default", "a", {})


def test_patching_only_the_very_object(store: DirectoryStore) -> None:
    first = Pod(metadata=ObjectMeta(name="a", uid="1"), spec=a_pod().spec)
    store.apply(first)
    assert (
        store.patch(Pod, "default", "a", {"status": {"phase": "Running"}}, uid="1").status.phase == "Running"
    )
    with pytest.raises(NotFound, match="another one has its name by now"):
        store.patch(Pod, "default", "a", {"status": {"phase": "Failed"}}, uid="2")
    assert store.get(Pod, "default", "a").status == PodStatus(phase="Running")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        ({"metadata": {"labels": {"a b": "c"}}}, "metadata.labels\\[a b\\]: not a valid label key"),
        ({"spec": {"containers": None}}, "spec.containers: is missing"),
        ({"metadata": {"name": "b"}}, "cannot be changed; delete it and create another"),
        ({"kind": "Namespace", "spec": None}, "cannot be changed; delete it and create another"),
    ],
)
def test_patches_that_would_break_the_object_are_refused(
    store: DirectoryStore, tmp_path: Path, patch: dict[str, Any], error: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(pod("a"))
    with pytest.raises(StoreError, match=error):
        store.patch(Pod, "default", "a", patch)
    assert path.read_text() == pod("a")


def test_modes_links_and_byte_order_marks_stay(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / ".real").mkdir()
    real = tmp_path / ".real" / "a.yaml"
    real.write_bytes(b"\xef\xbb\xbf" + pod("a").encode())
    real.chmod(0o640)
    (tmp_path / "a.yaml").symlink_to(real)
    store.patch(Pod, "default", "a", {"metadata": {"labels": {"x": "y"}}})
    assert (tmp_path / "a.yaml").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert real.read_bytes().startswith(b"\xef\xbb\xbfapiVersion")
    assert [path.name for path in (tmp_path / ".real").iterdir()] == ["a.yaml"]


def test_links_in_a_circle_end(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(pod("a"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "nowhere.yaml")
    assert names(store) == ["Pod default/a"]
    assert not store.problems


def test_an_object_in_two_files_is_told(
    store: DirectoryStore, tmp_path: Path, problems: list[Problem]
) -> None:
    (tmp_path / "b.yaml").write_text(pod("a", image="second"))
    (tmp_path / "a.yaml").write_text(pod("a", image="first"))
    (found,) = store.list(Pod)
    assert found.spec.containers[0].image == "first"
    assert [str(problem) for problem in problems] == [
        "Pod default/a (b.yaml): is in a.yaml too, which is the one that counts; remove one of the two"
    ]
    (tmp_path / "a.yaml").unlink()
    (found,) = store.list(Pod)
    assert found.spec.containers[0].image == "second"
    assert store.problems == []


def test_an_object_twice_in_a_file_is_told(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(pod("a", image="first") + "---\n" + pod("a", image="second"))
    assert store.list(Pod)[0].spec.containers[0].image == "first"
    assert [str(problem) for problem in store.problems] == [
        "Pod default/a (a.yaml:12): is in this file twice; remove one of the two documents"
    ]


def test_a_slip_of_the_pen_leaves_what_was(
    store: DirectoryStore, tmp_path: Path, problems: list[Problem]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"{pod('a')}---\n{pod('b')}")
    assert len(store.list(Pod)) == 2
    unclosed = pod("b").replace("[", "[[")
    path.write_text(f"{pod('a', image='new')}---\n{unclosed}")
    assert [found.spec.containers[0].image for found in store.list(Pod)] == ["new", "none"]
    path.write_text(f"{pod('a')}---\n{pod('b').replace('command', 'comand: 1#')}")
    assert len(store.list(Pod)) == 2
    path.write_text(f"{pod('a')}---\n{pod('b').replace('name: c', 'name: C')}")
    assert len(store.list(Pod)) == 2
    path.write_text(pod("a"))
    assert names(store) == ["Pod default/a"]
    assert store.problems == []
    assert [problem.line for problem in problems if problem.severity == "error"] == [22, 21, 19]
    assert [problem.object for problem in problems if problem.severity == "error"] == [
        "",
        "",
        "Pod default/b",
    ]


def test_files_that_cannot_be_read_are_told(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"kind: Pod\nname: \xff\n")
    (tmp_path / "b.yaml").write_text(pod("b"))
    assert names(store) == ["Pod default/b"]
    assert [str(problem) for problem in store.problems] == ["a.yaml:2: is not UTF-8 text; save it as UTF-8"]


def test_a_directory_that_is_not_there_is_told(tmp_path: Path, problems: list[Problem]) -> None:
    store = DirectoryStore(tmp_path / "gone", problems.append)
    assert store.list(Pod) == []
    assert store.list(Service) == []
    assert [str(problem) for problem in problems] == [
        f"{tmp_path / 'gone'}: No such file or directory: the directory cannot be read; create it again"
    ]
    with pytest.raises(StoreError, match="create the directory, or name another"):
        store.apply(a_pod())
    (tmp_path / "gone").mkdir()
    store.apply(a_pod())
    assert len(store.list(Pod)) == 1
    assert store.problems == []


def test_changing_a_file_with_errors_elsewhere_in_it(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"{pod('a')}---\nbroken: [\n---\n{pod('b')}")
    store.patch(Pod, "default", "b", {"metadata": {"labels": {"x": "y"}}})
    assert path.read_text().startswith(f"{pod('a')}---\nbroken: [\n---\n")
    assert store.delete(Pod, "default", "a")
    assert path.read_text().startswith("---\nbroken: [\n---\n")


def test_changing_an_object_that_only_memory_holds_is_refused(store: DirectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(pod("a"))
    assert len(store.list(Pod)) == 1
    path.write_text("broken: [\n")
    with pytest.raises(StoreError, match="correct the file's syntax first"):
        store.patch(Pod, "default", "a", {"metadata": {"labels": {"x": "y"}}})
    assert path.read_text() == "broken: [\n"


def test_thousands_of_objects(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    directory = tmp_path / "Pod" / "default"
    directory.mkdir(parents=True)
    text = json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "NAME", "namespace": "default"},
                       "spec": {"containers": [{"name": "c", "command": ["x"]}]}})  # fmt: skip
    for number in range(3_000):
        (directory / f"p{number}.json").write_text(text.replace("NAME", f"p{number}"))
    assert len(store.list(Pod)) == 3_000
    for number in range(100):
        store.patch(Pod, "default", f"p{number}", {"status": {"phase": "Running"}})
    assert sum(found.status.phase == "Running" for found in store.list(Pod)) == 100


def test_deployments_are_stored(store: DirectoryStore) -> None:
    store.apply({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
                 "spec": {"containers": [{"name": "c", "command": ["x"]}]}}},
    })  # fmt: skip
    assert store.patch(Deployment, "default", "d", {"spec": {"replicas": 3}}).spec.replicas == 3
