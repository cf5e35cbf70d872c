"""What a change touches, and only that; objects that are wrong stay their own problem."""

import time

import pytest

from tests.controlplane.objects import node, pod, service
from ztunnel.controlplane import translate
from ztunnel.controlplane.registry import Registry
from ztunnel.controlplane.resources import ADDRESS_TYPE, Entry, ResourceSet
from ztunnel.controlplane.translate import Settings
from ztunnel.store.models import Service, ServicePort
from ztunnel.wire.workload_pb2 import Address
from ztunnel.wire.xds_pb2 import DeltaDiscoveryResponse

WEB = "default/web.default.svc.cluster.local"


def uid(name: str, namespace: str = "default") -> str:
    return f"Kubernetes//Pod/{namespace}/{name}"


def address_of(entry: Entry | None) -> Address:
    assert entry is not None
    (resource,) = DeltaDiscoveryResponse.FromString(entry.encoded).resources
    assert resource.name == entry.name
    assert tuple(resource.aliases) == entry.aliases
    address = Address()
    assert resource.resource.Unpack(address)
    return address


@pytest.fixture
def registry() -> Registry:
    return Registry(Settings())


def test_a_pod_change_translates_that_pod_only(registry: Registry) -> None:
    registry.upsert(service("web", "10.96.0.1"))
    for number in range(1, 5):
        registry.upsert(pod(f"web-{number}", f"10.0.0.{number}", labels={"app": "web"}))
    assert len(registry.flush().resources) == 5
    registry.upsert(pod("web-3", "10.0.0.3", labels={"app": "web"}, ready=False))
    assert set(registry.flush().resources) == {uid("web-3")}
    assert not registry.flush().resources


def test_a_service_change_translates_the_pods_it_selects_or_selected(registry: Registry) -> None:
    registry.upsert(pod("a", "10.0.0.1", labels={"app": "a"}))
    registry.upsert(pod("b", "10.0.0.2", labels={"app": "b"}))
    registry.upsert(pod("c", "10.0.0.3", labels={"app": "c"}))
    registry.upsert(pod("a", "10.0.0.4", labels={"app": "a"}, namespace="other"))
    registry.upsert(service("web", "10.96.0.1", selector={"app": "a"}))
    assert list(address_of(registry.flush().resources[uid("a")]).workload.services) == [WEB]
    registry.upsert(service("web", "10.96.0.1", selector={"app": "b"}))
    update = registry.flush().resources
    assert set(update) == {WEB, uid("a"), uid("b")}
    assert not address_of(update[uid("a")]).workload.services
    registry.upsert(service("web", "10.96.0.1", selector={"app": "b"}, publish_not_ready_addresses=True))
    assert set(registry.flush().resources) == {WEB}
    registry.remove(service("web"))
    update = registry.flush().resources
    assert set(update) == {WEB, uid("b")}
    assert update[WEB] is None


def test_pods_that_end_or_go_are_removed(registry: Registry) -> None:
    registry.upsert(pod("a", "10.0.0.1"))
    registry.upsert(pod("b", "10.0.0.2"))
    registry.flush()
    registry.upsert(pod("a", "10.0.0.1", phase="Succeeded"))
    registry.remove(pod("b"))
    assert registry.flush().resources == {uid("a"): None, uid("b"): None}


def test_a_node_change_moves_its_pods_only(registry: Registry) -> None:
    registry.upsert(pod("a", "10.0.0.1", node="node-1"))
    registry.upsert(pod("b", "10.0.0.2", node="node-2"))
    registry.flush()
    registry.upsert(node("node-1", zone="z"))
    update = registry.flush().resources
    assert set(update) == {uid("a")}
    assert address_of(update[uid("a")]).workload.locality.zone == "z"
    registry.upsert(node("node-1", zone="z"))
    assert not registry.flush().resources
    registry.remove(node("node-1"))
    assert set(registry.flush().resources) == {uid("a")}


def test_aliases_and_groups(registry: Registry) -> None:
    registry.upsert(service("web", "10.96.0.1", "fd00::1"))
    registry.upsert(pod("a", "10.0.0.1", "fd00::a", labels={"app": "web"}))
    registry.upsert(pod("h", "10.99.0.11", host_network=True))
    update = registry.flush().resources
    entry, web, host = update[uid("a")], update[WEB], update[uid("h")]
    assert entry
    assert web
    assert host
    assert (entry.aliases, entry.groups) == (("/10.0.0.1", "/fd00::a"), (WEB,))
    assert web.aliases == ("/10.96.0.1", "/fd00::1")
    assert host.aliases == ()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "keeper"),
    [
        (service("a", "10.96.0.5"), service("b", "10.96.0.5"), "a"),
        (
            service("a", "10.96.0.5", created="2026-02-01T00:00:00Z"),
            service("b", "10.96.0.5", created="2026-01-01T00:00:00Z"),
            "b",
        ),
        (service("a", "10.96.0.5"), service("b", "10.96.0.5", created="2026-01-01T00:00:00Z"), "b"),
    ],
    ids=["first-by-name", "older", "known-age"],
)
def test_two_services_with_one_address(
    registry: Registry, first: Service, second: Service, keeper: str, reverse: bool
) -> None:
    loser = {"a": "b", "b": "a"}[keeper]
    for obj in (second, first) if reverse else (first, second):
        registry.upsert(obj)
        registry.flush()
    assert [str(problem) for problem in registry.problems] == [
        f"Service default/{loser}: address 10.96.0.5 is already that of Service default/{keeper}, which keeps it;"
        " give this one an address of its own"
    ]
    registry.remove(first if keeper == "a" else second)
    update = registry.flush()
    entry = update.resources[f"default/{loser}.default.svc.cluster.local"]
    assert address_of(entry).service.addresses[0].address == bytes((10, 96, 0, 5))
    assert len(update.solved_problems) == 1
    assert not registry.problems


def test_a_pod_that_goes_yields_its_address_to_its_successor(registry: Registry) -> None:
    registry.upsert(pod("a", "10.0.0.1", created="2026-01-01T00:00:00Z", deleted="2026-01-02T00:00:00Z"))
    registry.upsert(pod("b", "10.0.0.1", created="2026-01-02T00:00:00Z"))
    update = registry.flush()
    assert update.resources[uid("a")] is None
    assert address_of(update.resources[uid("b")]).workload.addresses == [bytes((10, 0, 0, 1))]


def test_bad_objects_leave_the_others_alone(registry: Registry) -> None:
    registry.upsert(service("bad", "10.96.0.1", ports=[ServicePort(port=0)]))
    registry.upsert(service("good", "10.96.0.2"))
    registry.upsert(pod("bad", "10.0.0.999"))
    registry.upsert(pod("good", "10.0.0.1"))
    update = registry.flush()
    assert update.resources[uid("bad")] is None
    assert address_of(update.resources[uid("good")]).workload.name == "good"
    assert not address_of(update.resources["default/bad.default.svc.cluster.local"]).service.ports
    assert address_of(update.resources["default/good.default.svc.cluster.local"]).service.ports
    assert {problem.object for problem in registry.problems} == {"Service default/bad", "Pod default/bad"}
    registry.upsert(pod("bad", "10.0.0.9"))
    assert [problem.object for problem in registry.flush().solved_problems] == ["Pod default/bad"]


def test_an_object_that_breaks_the_translation_leaves_the_others_alone(registry: Registry) -> None:
    # A lone surrogate passes as a Python string but cannot be written as UTF-8.
    registry.upsert(pod("bad", "10.0.0.1", account="\ud800"))
    registry.upsert(pod("good", "10.0.0.2"))
    update = registry.flush()
    assert update.resources[uid("bad")] is None
    assert update.resources[uid("good")] is not None
    assert "cannot be translated" in str(registry.problems[0])


def test_runs_on(registry: Registry) -> None:
    registry.upsert(pod("a", namespace="shop", account="cart", node="node-1", phase="Pending"))
    assert registry.runs_on("node-1", "shop", "cart")
    assert not registry.runs_on("node-2", "shop", "cart")
    assert not registry.runs_on("node-1", "default", "cart")
    assert not registry.runs_on("node-1", "shop", "default")
    registry.upsert(pod("a", namespace="shop", account="cart", node="node-2"))
    assert not registry.runs_on("node-1", "shop", "cart")
    assert registry.runs_on("node-2", "shop", "cart")
    registry.upsert(pod("a", namespace="shop", account="cart", node="node-2", phase="Failed"))
    assert not registry.runs_on("node-2", "shop", "cart")


def test_one_of_ten_thousand_pods(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = ResourceSet(ADDRESS_TYPE)
    for number in range(50):
        registry.upsert(service(f"svc-{number}", f"10.96.1.{number + 1}"))
    for number in range(10_000):
        registry.upsert(
            pod(f"p-{number}", f"10.{number >> 8}.{number & 255}.1", labels={"app": f"svc-{number % 50}"})
        )
    resources.update(registry.flush().resources)
    kept = resources.get(uid("p-1"))
    translated: list[str] = []
    original = translate.workload

    def counting(*args: object) -> object:
        translated.append(args[0].name)  # type: ignore[attr-defined]
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(translate, "workload", counting)
    started = time.perf_counter()
    registry.upsert(pod("p-77", "10.0.77.1", labels={"app": "svc-27"}, ready=False))
    changes = resources.update(registry.flush().resources)
    elapsed = time.perf_counter() - started
    assert translated == ["p-77"]
    assert set(changes) == {uid("p-77")}
    assert resources.get(uid("p-1")) is kept
    assert len(resources) == 10_050
    print(f"one pod of 10,000: {elapsed * 1e6:.0f} us")
