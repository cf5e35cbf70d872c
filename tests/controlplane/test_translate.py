"""Objects to messages: every rule of the translation, as tables."""

from ipaddress import ip_address
from typing import Any

import pytest
from msgspec.structs import replace

from tests.controlplane.objects import node, pod, service
from ztunnel.controlplane import translate
from ztunnel.controlplane.translate import Settings
from ztunnel.store.kube.slim import slim_of
from ztunnel.store.models import (
    Container,
    ContainerPort,
    ContainerStatus,
    Pod,
    PodStatus,
    Service,
    ServicePort,
)
from ztunnel.wire import workload_pb2 as pb

SETTINGS = Settings("Kubernetes", "cluster.local", "net-1")


def workload_of(obj: Pod, *services: Service, **kwargs: Any) -> pb.Workload:
    addresses, problems = translate.parse_addresses(obj)
    assert not problems
    return translate.workload(obj, services, kwargs.get("node"), addresses, SETTINGS)


def service_of(obj: Service) -> pb.Service:
    addresses, problems = translate.parse_addresses(obj)
    message, more = translate.service(obj, addresses, SETTINGS)
    assert not problems + more
    return message


def packed(*texts: str) -> list[bytes]:
    return [ip_address(text).packed for text in texts]


def test_workload_carries_what_peers_need() -> None:
    message = workload_of(
        pod("reviews-7-abc", "10.244.1.5", "fd00:10:244:1::5", namespace="shop", account="reviews", mesh=True)
    )
    assert message == pb.Workload(
        uid="Kubernetes//Pod/shop/reviews-7-abc",
        name="reviews-7-abc",
        namespace="shop",
        addresses=packed("10.244.1.5", "fd00:10:244:1::5"),
        network="net-1",
        tunnel_protocol=pb.HBONE,
        trust_domain="cluster.local",
        service_account="reviews",
        node="node-1",
        canonical_name="reviews-7-abc",
        canonical_revision="latest",
        workload_type=pb.POD,
        workload_name="reviews-7-abc",
        status=pb.HEALTHY,
        cluster_id="Kubernetes",
    )


@pytest.mark.parametrize(
    ("labels", "owner", "expected"),
    [
        ({}, None, ("web-1", "latest", "web-1")),
        ({"app": "a"}, None, ("a", "latest", "web-1")),
        ({"app": "a", "app.kubernetes.io/name": "b"}, None, ("b", "latest", "web-1")),
        (
            {"app": "a", "app.kubernetes.io/name": "b", "service.istio.io/canonical-name": "c"},
            None,
            ("c", "latest", "web-1"),
        ),
        ({"version": "v1"}, None, ("web-1", "v1", "web-1")),
        ({"version": "v1", "app.kubernetes.io/version": "v2"}, None, ("web-1", "v2", "web-1")),
        (
            {"app.kubernetes.io/version": "v2", "service.istio.io/canonical-revision": "v3"},
            None,
            ("web-1", "v3", "web-1"),
        ),
        ({"pod-template-hash": "5d8"}, ("ReplicaSet", "web-5d8"), ("web", "latest", "web")),
        ({"app": "a", "pod-template-hash": "5d8"}, ("ReplicaSet", "web-5d8"), ("a", "latest", "web")),
        ({}, ("ReplicaSet", "web-5d8"), ("web-5d8", "latest", "web-5d8")),
        ({}, ("Deployment", "web"), ("web", "latest", "web")),
        ({}, ("StatefulSet", "db"), ("db", "latest", "db")),
        ({}, ("Job", "once"), ("once", "latest", "once")),
        ({}, ("Job", "nightly-28965600"), ("nightly", "latest", "nightly")),
    ],
)
def test_canonical_name_revision_and_owner(
    labels: dict[str, str], owner: tuple[str, str] | None, expected: tuple[str, str, str]
) -> None:
    message = workload_of(pod("web-1", "10.0.0.1", labels=labels, owner=owner))
    assert (message.canonical_name, message.canonical_revision, message.workload_name) == expected


@pytest.mark.parametrize(
    ("obj", "healthy"),
    [
        (pod("p", "10.0.0.1"), True),
        (pod("p", "10.0.0.1", ready=False), False),
        (pod("p", "10.0.0.1", phase="Pending"), False),
        (pod("p", "10.0.0.1", phase="Unknown"), False),
        (pod("p", "10.0.0.1", deleted="2026-01-01T00:00:00Z"), False),
        (pod("p", "10.0.0.1", ready=None), True),
        (
            Pod(
                metadata=pod("p").metadata,
                status=PodStatus(
                    phase="Running",
                    pod_ip="10.0.0.1",
                    container_statuses=[ContainerStatus(name="a", ready=True), ContainerStatus(name="b")],
                ),
            ),
            False,
        ),
    ],
    ids=[
        "ready",
        "unready",
        "pending",
        "unknown",
        "terminating",
        "runs-without-condition",
        "container-unready",
    ],
)
def test_health(obj: Pod, healthy: bool) -> None:
    assert workload_of(obj).status == (pb.HEALTHY if healthy else pb.UNHEALTHY)


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (pod("p", "10.0.0.1"), True),
        (pod("p"), False),
        (pod("p", "10.0.0.1", phase="Succeeded"), False),
        (pod("p", "10.0.0.1", phase="Failed"), False),
        (pod("p", "10.0.0.1", phase="Pending"), True),
    ],
)
def test_which_pods_are_workloads(obj: Pod, expected: bool) -> None:
    assert translate.is_workload(obj) is expected


def test_tunnel_protocol_only_once_redirected() -> None:
    assert workload_of(pod("p", "10.0.0.1")).tunnel_protocol == pb.NONE
    assert workload_of(pod("p", "10.0.0.1", mesh=True)).tunnel_protocol == pb.HBONE


def test_host_network_pods_never_tunnel() -> None:
    message = workload_of(pod("p", "10.0.0.1", mesh=True, host_network=True))
    assert (message.network_mode, message.tunnel_protocol) == (pb.HOST_NETWORK, pb.NONE)


def test_locality_is_the_nodes() -> None:
    message = workload_of(pod("p", "10.0.0.1"), node=node("node-1", region="r", zone="z", subzone="s"))
    assert message.locality == pb.Locality(region="r", zone="z", subzone="s")
    assert not workload_of(pod("p", "10.0.0.1"), node=node("node-1")).HasField("locality")


@pytest.mark.parametrize(
    ("ports", "container_ports", "expected"),
    [
        ([ServicePort(port=80)], {}, [(80, 80)]),
        ([ServicePort(port=80, target_port=8080)], {}, [(80, 8080)]),
        ([ServicePort(port=80, target_port="http")], {"http": 9080}, [(80, 9080)]),
        ([ServicePort(port=80, target_port="8081")], {}, [(80, 8081)]),
        ([ServicePort(port=80, target_port="http"), ServicePort(port=90)], {"other": 1}, [(90, 90)]),
        ([ServicePort(port=53, protocol="UDP"), ServicePort(port=53)], {}, [(53, 53)]),
        ([], {}, []),
    ],
    ids=["same", "number", "named", "number-as-text", "name-lacking", "udp-left-out", "no-ports"],
)
def test_target_ports_of_a_workload(
    ports: list[ServicePort], container_ports: dict[str, int], expected: list[tuple[int, int]]
) -> None:
    message = workload_of(
        pod("p", "10.0.0.1", ports=container_ports), service("web", "10.96.0.1", ports=ports)
    )
    listed = message.services["default/web.default.svc.cluster.local"].ports
    assert [(port.service_port, port.target_port) for port in listed] == expected


def test_a_named_port_may_be_that_of_a_sidecar() -> None:
    """An init container that is restarted always; others have ended before anybody connects."""
    named = service("web", "10.96.0.1", ports=[ServicePort(port=80, target_port="http")])
    ports = [ContainerPort(name="http", container_port=8443)]
    init = Container(name="init", ports=[ContainerPort(name="http", container_port=1)])
    sidecar = Container(name="auth", ports=ports, restart_policy="Always")
    one = pod("p", "10.0.0.1")
    one = replace(one, spec=replace(one.spec, init_containers=[init, sidecar]))
    for read in (one, slim_of(Pod)(one)):
        (listed,) = workload_of(read, named).services.values()
        assert [port.target_port for port in listed.ports] == [8443]


def test_a_pod_without_any_of_the_ports_is_no_endpoint() -> None:
    named = service("web", "10.96.0.1", ports=[ServicePort(port=80, target_port="http")])
    assert not workload_of(pod("p", "10.0.0.1"), named).services


def test_service_dual_stack() -> None:
    message = service_of(
        service(
            "web",
            "10.96.0.1",
            "fd00:10:96::1",
            namespace="shop",
            ip_families=["IPv4", "IPv6"],
            ports=[
                ServicePort(port=80, name="http-web", target_port="web"),
                ServicePort(port=9000, target_port=9001, app_protocol="kubernetes.io/h2c"),
                ServicePort(port=53, protocol="UDP"),
            ],
        )
    )
    assert message == pb.Service(
        name="web",
        namespace="shop",
        hostname="web.shop.svc.cluster.local",
        addresses=[
            pb.NetworkAddress(network="net-1", address=address)
            for address in packed("10.96.0.1", "fd00:10:96::1")
        ],
        ports=[
            pb.Port(service_port=80, target_port=0, app_protocol=pb.HTTP11),
            pb.Port(service_port=9000, target_port=9001, app_protocol=pb.HTTP2),
        ],
        ip_families=pb.DUAL,
        canonical=True,
    )


def test_headless_service_has_no_addresses() -> None:
    message = service_of(service("web"))
    assert list(message.addresses) == []
    assert [port.service_port for port in message.ports] == [80]


@pytest.mark.parametrize(
    ("families", "expected"),
    [
        ([], pb.AUTOMATIC),
        (["IPv4"], pb.IPV4_ONLY),
        (["IPv6"], pb.IPV6_ONLY),
        (["IPv6", "IPv4"], pb.DUAL),
    ],
)
def test_ip_families(families: list[str], expected: pb.IPFamilies.ValueType) -> None:
    assert service_of(service("web", "10.96.0.1", ip_families=families)).ip_families == expected


@pytest.mark.parametrize(
    ("name", "declared", "expected"),
    [
        ("", "", pb.UNKNOWN),
        ("web", "", pb.UNKNOWN),
        ("http", "", pb.HTTP11),
        ("http-web", "", pb.HTTP11),
        ("http2-web", "", pb.HTTP2),
        ("grpc", "", pb.GRPC),
        ("grpc-web-ui", "", pb.HTTP11),
        ("tcp-db", "", pb.TCP),
        ("tls-db", "", pb.TLS),
        ("https", "", pb.TLS),
        ("http", "grpc", pb.GRPC),
        ("", "kubernetes.io/h2c", pb.HTTP2),
        ("", "kubernetes.io/ws", pb.HTTP11),
        ("", "HTTP", pb.HTTP11),
        ("", "example.com/own", pb.UNKNOWN),
    ],
)
def test_app_protocol(name: str, declared: str, expected: pb.AppProtocol.ValueType) -> None:
    assert translate.app_protocol(ServicePort(port=1, name=name, app_protocol=declared)) == expected


LB = pb.LoadBalancing


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, LB()),
        ({"publish_not_ready_addresses": True}, LB(health_policy=LB.ALLOW_ALL)),
        ({"internal_traffic_policy": "Local"}, LB(routing_preference=[LB.NODE], mode=LB.STRICT)),
        (
            {"traffic_distribution": "PreferClose"},
            LB(routing_preference=[LB.NETWORK, LB.REGION, LB.ZONE], mode=LB.FAILOVER),
        ),
        (
            {"annotations": {"networking.istio.io/traffic-distribution": "PreferSameZone"}},
            LB(routing_preference=[LB.NETWORK, LB.REGION, LB.ZONE], mode=LB.FAILOVER),
        ),
    ],
)
def test_load_balancing(spec: dict[str, Any], expected: pb.LoadBalancing) -> None:
    assert service_of(service("web", "10.96.0.1", **spec)).load_balancing == expected


@pytest.mark.parametrize(
    ("selector", "labels", "namespace", "expected"),
    [
        ({"app": "web"}, {"app": "web", "x": "y"}, "default", True),
        ({"app": "web"}, {"app": "other"}, "default", False),
        ({"app": "web"}, {}, "default", False),
        ({"app": "web", "tier": "a"}, {"app": "web"}, "default", False),
        ({"app": "web"}, {"app": "web"}, "shop", False),
        ({}, {"app": "web"}, "default", False),
    ],
)
def test_selectors(selector: dict[str, str], labels: dict[str, str], namespace: str, expected: bool) -> None:
    chosen = service("web", "10.96.0.1", selector=selector)
    assert translate.selects(chosen, pod("p", "10.0.0.1", labels=labels, namespace=namespace)) is expected


@pytest.mark.parametrize("text", ["10.0.0", "300.0.0.1", "fd00::1::2", "", "localhost", "10.0.0.1/24"])
def test_an_invalid_address_is_a_problem_and_the_others_stay(text: str) -> None:
    addresses, problems = translate.parse_addresses(pod("p", text, "10.0.0.1"))
    assert list(addresses) == packed("10.0.0.1")
    assert "Pod default/p: status.podIPs" in str(problems[0])


@pytest.mark.parametrize("text", ["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1"])
def test_an_address_of_no_host_is_a_problem(text: str) -> None:
    addresses, problems = translate.parse_addresses(service("web", text))
    assert not addresses
    assert "Service default/web: spec.clusterIPs" in str(problems[0])


@pytest.mark.parametrize(
    "bad", [ServicePort(port=0), ServicePort(port=70000), ServicePort(port=81, target_port=0x10000)]
)
def test_a_bad_port_is_a_problem_and_the_others_stay(bad: ServicePort) -> None:
    message, problems = translate.service(service("web", ports=[bad, ServicePort(port=80)]), (), SETTINGS)
    assert [port.service_port for port in message.ports] == [80]
    assert "Service default/web: spec.ports[0]" in str(problems[0])
