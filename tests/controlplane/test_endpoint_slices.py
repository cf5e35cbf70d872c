"""What stands behind Services that select no pods: addresses outside of the mesh, and pods that a slice names."""

from typing import Any

import msgspec
import pytest

from tests.controlplane.objects import node, pod, service
from tests.controlplane.test_registry import WEB, address_of, uid
from ztunnel.controlplane.registry import Registry, Update
from ztunnel.controlplane.translate import Settings
from ztunnel.store.endpointslice import EndpointSlice
from ztunnel.store.models import Namespace, ObjectMeta, ServicePort
from ztunnel.wire import workload_pb2 as pb

OUTSIDE = "Kubernetes/discovery.k8s.io/EndpointSlice/default/web-1/192.0.2.7"


def slice_(
    *endpoints: dict[str, Any], ports: Any = None, family: str = "IPv4", **labels: str
) -> EndpointSlice:
    marks = labels or {"kubernetes.io/service-name": "web"}
    return msgspec.convert(
        {
            "metadata": {"name": "web-1", "namespace": "default", "labels": marks},
            "addressType": family,
            "endpoints": list(endpoints),
            "ports": ports if ports is not None else [{"name": "", "port": 8080, "protocol": "TCP"}],
        },
        EndpointSlice,
    )


def endpoint(*addresses: str, **fields: Any) -> dict[str, Any]:
    return {"addresses": list(addresses), **fields}


def services_of(update: Update, name: str) -> dict[str, list[tuple[int, int]]]:
    message = address_of(update.resources[name]).workload
    return {
        key: [(port.service_port, port.target_port) for port in ports.ports]
        for key, ports in message.services.items()
    }


@pytest.fixture
def registry() -> Registry:
    registry = Registry(Settings())
    registry.upsert(service("web", "10.96.0.1", selector={}))
    registry.flush()
    return registry


def test_an_address_that_is_no_pod_becomes_a_workload_outside_of_the_mesh(registry: Registry) -> None:
    registry.upsert(node("n1", region="r", zone="z"))
    registry.upsert(slice_(endpoint("192.0.2.7", nodeName="n1", conditions={"ready": True})))
    update = registry.flush()
    assert set(update.resources) == {OUTSIDE}
    entry = update.resources[OUTSIDE]
    assert entry is not None
    assert entry.aliases == ()
    workload = address_of(entry).workload
    assert list(workload.addresses) == [bytes([192, 0, 2, 7])]
    assert workload.tunnel_protocol == pb.NONE
    assert workload.network_mode == pb.HOST_NETWORK
    assert workload.status == pb.HEALTHY
    assert workload.locality.region == "r"
    assert services_of(update, OUTSIDE) == {WEB: [(80, 8080)]}
    registry.upsert(node("n1", region="s", zone="z"))
    moved = registry.flush().resources
    assert address_of(moved[OUTSIDE]).workload.locality.region == "s"


def test_readiness_counts_and_is_true_where_nobody_says(registry: Registry) -> None:
    registry.upsert(slice_(endpoint("192.0.2.7", conditions={"ready": False}), endpoint("192.0.2.8")))
    resources = registry.flush().resources
    assert address_of(resources[OUTSIDE]).workload.status == pb.UNHEALTHY
    assert address_of(resources[OUTSIDE.replace("2.7", "2.8")]).workload.status == pb.HEALTHY


def test_what_a_slice_no_longer_names_is_gone(registry: Registry) -> None:
    registry.upsert(slice_(endpoint("192.0.2.7"), endpoint("192.0.2.8")))
    registry.flush()
    registry.upsert(slice_(endpoint("192.0.2.8")))
    assert registry.flush().resources[OUTSIDE] is None
    registry.remove(slice_(endpoint("192.0.2.8")))
    assert registry.flush().resources == {OUTSIDE.replace("2.7", "2.8"): None}


def test_a_service_that_comes_or_goes_brings_and_takes_its_addresses(registry: Registry) -> None:
    web = service("web", "10.96.0.1", selector={})
    registry.remove(web)
    registry.upsert(slice_(endpoint("192.0.2.7")))
    assert registry.flush().resources == {WEB: None}
    registry.upsert(web)
    assert registry.flush().resources[OUTSIDE] is not None
    registry.upsert(service("web", selector={}, type="ExternalName", external_name="example.org"))
    update = registry.flush()
    assert update.resources[OUTSIDE] is None
    assert "example.org" in str(update.new_problems[0])


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by address"])
def test_an_endpoint_that_is_a_pod_adds_the_service_to_the_pod(registry: Registry, named: bool) -> None:
    registry.upsert(pod("a", "10.0.0.1", mesh=True))
    target = {"targetRef": {"kind": "Pod", "name": "a", "namespace": "default"}} if named else {}
    registry.upsert(slice_(endpoint("10.0.0.1", **target)))
    update = registry.flush()
    assert services_of(update, uid("a")) == {WEB: [(80, 8080)]}
    assert not any("EndpointSlice" in name for name in update.resources)
    registry.remove(slice_())
    assert services_of(registry.flush(), uid("a")) == {}


def test_an_address_that_a_pod_gets_later_is_the_pods_and_then_nobodys(registry: Registry) -> None:
    name = OUTSIDE.replace("192.0.2.7", "10.0.0.1")
    registry.upsert(slice_(endpoint("10.0.0.1")))
    assert registry.flush().resources[name] is not None
    registry.upsert(pod("a", "10.0.0.1", mesh=True))
    update = registry.flush()
    assert update.resources[name] is None
    assert services_of(update, uid("a")) == {WEB: [(80, 8080)]}
    registry.remove(pod("a", "10.0.0.1", mesh=True))
    update = registry.flush()
    assert update.resources[uid("a")] is None
    assert update.resources[name] is not None


def test_a_pod_that_the_selector_gives_keeps_what_the_selector_says(registry: Registry) -> None:
    registry.upsert(service("web", "10.96.0.1", selector={"app": "web"}))
    registry.upsert(pod("a", "10.0.0.1", labels={"app": "web"}))
    registry.upsert(slice_(endpoint("10.0.0.1"), ports=[{"name": "", "port": 9999, "protocol": "TCP"}]))
    assert services_of(registry.flush(), uid("a")) == {WEB: [(80, 80)]}


def test_what_cannot_be_used_is_told_and_the_rest_serves(registry: Registry) -> None:
    registry.upsert(slice_(endpoint("127.0.0.1"), endpoint("somewhere"), endpoint("192.0.2.7")))
    update = registry.flush()
    assert set(update.resources) == {OUTSIDE}
    assert [str(problem).partition(":")[0] for problem in update.new_problems] == [
        "EndpointSlice default/web-1"
    ] * 2
    registry.upsert(slice_(endpoint("example.org"), family="FQDN"))
    update = registry.flush()
    assert update.resources == {OUTSIDE: None}
    assert "FQDN" in str(update.new_problems[0])


def test_a_slice_of_no_service_means_nothing(registry: Registry) -> None:
    registry.upsert(slice_(endpoint("192.0.2.7"), app="web"))
    assert registry.flush().resources == {}


def test_ports_are_found_by_name(registry: Registry) -> None:
    registry.upsert(
        service(
            "web",
            "10.96.0.1",
            ports=[ServicePort(name="http", port=80), ServicePort(name="admin", port=81)],
            selector={},
        )
    )
    ports = [
        {"name": "admin", "port": 9001},
        {"name": "http", "port": 8080, "protocol": "TCP"},
        {"name": "x", "port": 1},
    ]
    registry.upsert(slice_(endpoint("192.0.2.7"), ports=ports))
    assert sorted(services_of(registry.flush(), OUTSIDE)[WEB]) == [(80, 8080), (81, 9001)]


def test_a_namespaces_labels_touch_all_that_is_in_it(registry: Registry) -> None:
    def namespace(**labels: str) -> Namespace:
        return Namespace(metadata=ObjectMeta(name="default", labels=labels))

    registry.upsert(pod("a", "10.0.0.1"))
    registry.upsert(pod("a", "10.0.0.2", namespace="other"))
    registry.upsert(namespace())
    registry.flush()
    registry.upsert(namespace())
    assert not registry.flush().resources
    registry.upsert(namespace(x="y"))
    assert set(registry.flush().resources) == {WEB, uid("a")}
    found = registry.namespace("default")
    assert found is not None
    assert found.metadata.labels == {"x": "y"}
    registry.remove(namespace(x="y"))
    assert registry.namespace("default") is None
