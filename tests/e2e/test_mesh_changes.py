"""Files of a running mesh are edited, added and deleted: what they say is so within a second."""

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.whole import (
    WholeMesh,
    idle,
    namespace,
    service,
    took,
    workload,
)

pytestmark = pytest.mark.e2e

# A second is promised. On a machine that is busy with other tests programs take longer to start; what was measured
# is printed.
SOON = 4.0

BASE = namespace(mode="ambient") + workload("web", node="node-2") + service("web") + idle("client")


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(BASE) as mesh:
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        yield mesh


@pytest.fixture(autouse=True)
def base(mesh: WholeMesh) -> Iterator[None]:
    """Each test begins with the same files."""
    yield
    for path in mesh.directory.iterdir():
        if path.name != "resources.yaml":
            path.unlink()
    mesh.resources(BASE)
    mesh.until(
        lambda: {pod["name"].partition("-")[0] for pod in mesh.pods()} == {"web", "client"}, "as before"
    )
    mesh.wait_pods(mesh=True)
    mesh.until(answers(mesh, "http://web/"), "traffic flows")


def answers(mesh: WholeMesh, url: str, word: str = "hello") -> Callable[[], bool]:
    """Whether the client pod is answered with this word."""
    return lambda: mesh.exec("client", "curl", "-s", "--max-time", "2", url).stdout.startswith(word)


def soon(change: Callable[[], object], so: Callable[[], object], what: str) -> None:
    assert took(change, so, what) < SOON


def test_a_new_file_with_a_pod_and_its_service(mesh: WholeMesh) -> None:
    soon(
        lambda: mesh.resources(workload("shop", node="node-2") + service("shop"), "shop.yaml"),
        answers(mesh, "http://shop/"),
        "a new pod answers by its new service's name",
    )
    assert mesh.membership()[mesh.pod("shop").name] is True
    soon(
        mesh.directory.joinpath("shop.yaml").unlink,
        lambda: not mesh.pods("shop") and mesh.curl_code("client", "http://shop/") == 6,
        "pod and name are gone with the file",
    )


def test_replicas(mesh: WholeMesh) -> None:
    def ready() -> int:
        return sum(pod["ready"] and pod["mesh"] for pod in mesh.pods("web"))

    first = mesh.pod("web").name
    soon(
        lambda: mesh.resources(BASE.replace("replicas: 1", "replicas: 3")),
        lambda: ready() == 3,
        "three pods run",
    )
    seen = set()

    def all_seen() -> bool:
        seen.add(mesh.exec("client", "curl", "-s", "--max-time", "2", "http://web/").stdout.split(" ")[1])
        return len(seen) == 3

    mesh.until(all_seen, "all three answer")
    soon(lambda: mesh.resources(BASE), lambda: len(mesh.pods("web")) == 1, "one is left")
    assert mesh.pod("web").name == first, "the oldest"
    for _ in range(10):
        assert mesh.curl_code("client", "http://web/") == 0, "nobody is sent to those that have gone"


def test_another_port_of_a_service(mesh: WholeMesh) -> None:
    soon(
        lambda: mesh.resources(BASE.replace("port: 80,", "port: 81,")),
        answers(mesh, "http://web:81/"),
        "the new port answers",
    )
    assert mesh.curl_code("client", "http://web/") in (7, 52, 56), "the old one is refused, at once"


def test_a_removed_service(mesh: WholeMesh) -> None:
    vip = mesh.service("web").addresses[0]
    soon(
        lambda: mesh.resources(BASE.replace(service("web"), "")),
        lambda: mesh.curl_code("client", "http://web/") == 6,
        "the name is gone",
    )
    mesh.until(lambda: mesh.curl_code("client", f"http://{vip}/") in (7, 52, 56), "its address is refused")


def test_a_deployment_with_other_words(mesh: WholeMesh) -> None:
    """A template that differs means other pods."""
    before = mesh.pod("web").name
    soon(
        lambda: mesh.resources(BASE.replace("value: hello", "value: changed")),
        answers(mesh, "http://web/", "changed"),
        "the new pod answers",
    )
    assert mesh.pod("web").name != before


def test_a_removed_deployment(mesh: WholeMesh) -> None:
    pids = mesh.programs()
    soon(
        lambda: mesh.resources(BASE.replace(workload("web", node="node-2"), "")),
        lambda: not mesh.pods("web"),
        "the pods are gone",
    )
    assert len(mesh.programs()) == len(pids) - 1
    assert mesh.curl_code("client", "http://web/") in (7, 52, 56), "refused at once"


def test_apply_and_delete(mesh: WholeMesh) -> None:
    """The same through the command, which returns when the mesh has taken the change in."""
    text = idle("extra", node="node-2") + service("extra", app="web")
    assert "pod/extra created" in mesh.ambient("apply", "-f", "-", stdin=text).stdout
    mesh.until(answers(mesh, "http://extra/"), "the new name answers")
    assert "extra" in mesh.ok("get", "pods")
    done = mesh.ambient("delete", "-f", "-", stdin=text)
    assert done.returncode == 0, done.stderr
    mesh.until(lambda: not mesh.pods("extra"), "it is gone")
