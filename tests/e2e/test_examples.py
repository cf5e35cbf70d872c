"""What examples/ promises works as it stands there: in a mesh, out of it, and while it joins."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.telemetry.written import whole_lines
from ztunnel.embedded.testmesh import RunningMesh

EXAMPLES = Path(__file__).parents[2] / "examples"
JOINED = (
    "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}\n"
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def hello() -> Iterator[RunningMesh]:
    """A mesh of examples/hello, not joined."""
    with RunningMesh() as mesh:
        for file in sorted((EXAMPLES / "hello").glob("*.yaml")):
            mesh.write(file.name, file.read_text())
        mesh.wait_pods(mesh=False)
        yield mesh


def greetings(mesh: RunningMesh, *options: str, times: int = 24) -> set[str]:
    """What the web server answers the visitor: the different lines of so many calls."""
    lines = set()
    for _ in range(times):
        done = mesh.exec("visitor", "curl", "-sS", "--max-time", "5", *options, "http://web/")
        assert (done.code, done.stderr) == (0, "")
        lines.add(done.stdout.strip())
    return lines


def expected(mesh: RunningMesh, client: str) -> set[str]:
    return {f"hello from {pod['name']} on {pod['node']} to {client}" for pod in mesh.pods("web")}


def addresses(mesh: RunningMesh) -> tuple[str, str]:
    """The visitor's IPv4 and IPv6 address."""
    (visitor,) = mesh.pods("visitor")
    four = visitor["ip"]
    return four, f"fd00:10:244:1::{four.rpartition('.')[2]}"


def test_nothing_is_wrong_with_it(hello: RunningMesh) -> None:
    assert hello.status()["problems"] == []


def test_hello_before_and_after_joining(hello: RunningMesh) -> None:
    four, six = addresses(hello)
    assert {pod["node"] for pod in hello.pods("web")} == {"node-1", "node-2"}
    assert greetings(hello, "-4") == expected(hello, four)
    assert greetings(hello, "-6") == expected(hello, six)

    hello.write("joined.yaml", JOINED)
    hello.wait_pods(mesh=True)
    assert greetings(hello, "-4") == expected(hello, four)
    assert greetings(hello, "-6") == expected(hello, six)
    assert all(pod["restarts"] == 0 for pod in hello.pods())

    def carried() -> bool:
        log = whole_lines(hello.state.logs / "ztunnel-node-2.log")
        lines = [json.loads(line) for line in log if b'"scope":"access"' in line]
        return any(
            line["direction"] == "inbound"
            and line.get("src.identity") == "spiffe://cluster.local/ns/default/sa/visitor"
            and line.get("dst.identity") == "spiffe://cluster.local/ns/default/sa/web"
            and line["connection_security_policy"] == "mutual_tls"
            for line in lines
        )

    hello.until(carried, "a connection over the nodes' link in mutual TLS")


def test_the_visitor_is_greeted_once_a_second(hello: RunningMesh) -> None:
    log = hello.state.logs / "pods" / "default_visitor_visitor.log"
    hello.until(lambda: "hello from web-" in log.read_text(), "the visitor's log has a greeting")


def test_the_policies_let_the_visitor_in_and_nobody_else(hello: RunningMesh) -> None:
    """The policies beside the example: pods of the web server may not call one another, the visitor goes on."""
    four, _ = addresses(hello)
    hello.write("joined.yaml", JOINED)
    hello.wait_pods(mesh=True)
    call = ("python3", "-c", "import urllib.request; urllib.request.urlopen('http://web/', timeout=20)")
    assert hello.exec("web", *call).code == 0
    for file in (EXAMPLES / "policy").glob("*.yaml"):
        hello.write(file.name, file.read_text())
    hello.until(lambda: hello.exec("web", *call).code != 0, "the web server's own calls are refused", 30)
    assert greetings(hello, "-4") == expected(hello, four)
    assert hello.status()["problems"] == []
