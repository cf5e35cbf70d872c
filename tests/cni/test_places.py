"""Which network namespace is a pod's, told by the plugin or found by the pod's addresses; real namespaces."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni import places
from cni.goals import Goal
from cni.places import PlacesError, Runtime, addresses_in
from cni.rules import Settings
from ztunnel.inpod import netns
from ztunnel.inpod.pods import WorkloadInfo

pytestmark = pytest.mark.e2e


def goal(uid: str, *addresses: str, started: bool = True, ending: bool = False) -> Goal:
    info = WorkloadInfo(uid, "shop", "clerk")
    return Goal(uid, info, True, started, Settings(), False, "", addresses=addresses, ending=ending)


class Node:
    """Namespaces in a directory, named as a runtime does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: list[Path] = []

    def make(self, name: str, *addresses: str) -> Path:
        path = self.directory / name

        def prepare(namespace: int) -> None:
            def ip(*words: str) -> None:
                subprocess.run(
                    ["nsenter", f"--net=/proc/{os.getpid()}/fd/{namespace}", "ip", *words], check=True
                )

            ip("link", "add", "eth0", "type", "veth", "peer", "name", "peer0")
            for address in addresses:
                ip("address", "add", address, "dev", "eth0", *(["nodad"] if ":" in address else []))

        netns.create(path, prepare)
        self.made.append(path)
        return path

    def remove(self, path: Path) -> None:
        netns.remove(path)
        self.made.remove(path)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(places, "SCAN_PAUSE", 0.0)
    made = Node(tmp_path)
    yield made
    for path in list(made.made):
        made.remove(path)


def test_the_addresses_of_a_namespace_are_seen(node: Node) -> None:
    path = node.make("cni-1", "10.0.0.1/24", "fd00::1/64")
    assert {"10.0.0.1", "fd00::1"} == {str(each) for each in addresses_in(path)}


async def test_a_pod_that_ran_before_is_found_by_its_addresses(node: Node) -> None:
    paths = {
        uid: node.make(f"cni-{uid}", address) for uid, address in (("a", "10.0.0.1/24"), ("b", "fd00::2/64"))
    }
    (node.directory / "stray").write_text("no namespace")
    runtime = Runtime(node.directory)
    assert await runtime.find(goal("a", "10.0.0.1")) == paths["a"]
    assert await runtime.find(goal("b", "10.0.0.9", "fd00::2")) == paths["b"]
    assert await runtime.find(goal("c")) is None
    node.remove(paths["a"])
    with pytest.raises(PlacesError, match=r"no network namespace with the pod's address 10\.0\.0\.1"):
        await runtime.find(goal("a", "10.0.0.1"))
    assert await runtime.find(goal("a", "10.0.0.1", started=False)) is None
    assert await runtime.find(goal("a", "10.0.0.1", ending=True)) is None


async def test_one_that_gets_its_address_later_is_seen_then(node: Node) -> None:
    path = node.make("cni-1")
    runtime = Runtime(node.directory)
    assert await runtime.find(goal("a", "10.0.0.1", started=False)) is None
    subprocess.run(
        ["nsenter", f"--net={path}", "ip", "address", "add", "10.0.0.1/32", "dev", "eth0"], check=True
    )
    assert await runtime.find(goal("a", "10.0.0.1")) == path


async def test_which_of_two_cannot_be_told(node: Node) -> None:
    first, second = node.make("cni-1", "10.0.0.1/24"), node.make("cni-2", "10.0.0.1/24")
    runtime = Runtime(node.directory)
    with pytest.raises(PlacesError, match=r"several network namespaces .*cni-1, cni-2"):
        await runtime.find(goal("a", "10.0.0.1"))
    # Unless the plugin says so; the other is then left for the other.
    runtime.tell("a", runtime.file_of(f"/run/netns/{second.name}"))
    assert await runtime.find(goal("a", "10.0.0.1")) == second
    assert await runtime.find(goal("b", "10.0.0.1")) == first


async def test_what_the_plugin_says_holds_without_any_address(node: Node) -> None:
    path = node.make("cni-1")
    runtime = Runtime(node.directory)
    runtime.tell("a", runtime.file_of("/var/run/netns/cni-1"))
    assert await runtime.find(goal("a")) == path
    for name in ("", "/var/run/netns/cni-2"):
        with pytest.raises(PlacesError, match="HostToContainer"):
            runtime.file_of(name)


async def test_a_network_that_is_taken_down_is_not_found_again(node: Node) -> None:
    path = node.make("cni-1", "10.0.0.1/24")
    runtime = Runtime(node.directory)
    runtime.tell("a", path)
    assert not runtime.end("a", "/var/run/netns/cni-0"), "that of an earlier sandbox"
    assert not runtime.end("b", "/var/run/netns/cni-1")
    assert runtime.end("a", "/var/run/netns/cni-1")
    assert await runtime.find(goal("a", "10.0.0.1")) is None
    # Its successor in the same pod is.
    later = node.make("cni-2", "10.0.0.1/24")
    runtime.tell("a", later)
    assert await runtime.find(goal("a", "10.0.0.1")) == later
    # And one that has the address next does not get the old one.
    assert await runtime.find(goal("b", "10.0.0.1", started=False)) is None


async def test_the_end_of_an_earlier_sandbox_that_is_told_late_changes_nothing(node: Node) -> None:
    """The kubelet stops it once more a minute later, and its namespace has no name any more."""
    first, second = node.make("cni-1"), node.make("cni-2")
    runtime = Runtime(node.directory)
    runtime.tell("a", first, "one")
    assert runtime.end("a", "/var/run/netns/cni-1", "one")
    runtime.tell("a", second, "two")
    assert not runtime.end("a", "", "one")
    assert not runtime.end("a", "/var/run/netns/cni-1", "one")
    assert await runtime.find(goal("a")) == second
    assert runtime.end("a", "", "two"), "which one it is needs no namespace"
    # Found by its addresses it has no sandbox that is known: then only the namespace tells.
    third = node.make("cni-3", "10.0.0.1/24")
    assert await runtime.find(goal("b", "10.0.0.1")) == third
    assert not runtime.end("b", "", "three")
    assert runtime.end("b", "/var/run/netns/cni-3", "three")


async def test_nothing_is_remembered_of_a_pod_that_is_gone(node: Node) -> None:
    path = node.make("cni-1", "10.0.0.1/24")
    runtime = Runtime(node.directory)
    runtime.tell("a", path, "one")
    runtime.forget("a")
    # The address belongs to another pod now, the namespace does not.
    assert await runtime.find(goal("b", "10.0.0.1", started=False)) is None
    assert not runtime.end("a", str(path), "one")
    node.remove(path)
    runtime.forget("another")
    held = (runtime._known, runtime._sandboxes, runtime._ended, runtime._over)
    assert not any(held)


async def test_a_number_that_the_kernel_gives_again_is_another_namespace(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "_inode", lambda self, path: 7 if path.exists() else None)
    runtime = Runtime(node.directory)
    for name, address in (("cni-1", "10.0.0.1"), ("cni-2", "10.0.0.2")):
        path = node.make(name, f"{address}/24")
        assert await runtime.find(goal(name, address)) == path
        node.remove(path)


async def test_another_namespace_under_the_same_name_is_another(node: Node) -> None:
    path = node.make("cni-1", "10.0.0.1/24")
    runtime = Runtime(node.directory)
    runtime.tell("a", path)
    node.remove(path)
    node.make("cni-1", "10.0.0.2/24")
    assert await runtime.find(goal("a", started=False)) is None
