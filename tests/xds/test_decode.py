"""From xDS resources to the model."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.xds.resources import key, resource, service, workload
from ztunnel.mesh import model
from ztunnel.wire import workload_pb2 as pb
from ztunnel.wire import xds_pb2
from ztunnel.xds.decode import DecodeError, Decoder


def decode(message: pb.Workload | pb.Service) -> model.Workload | model.Service:
    return Decoder().address(resource(message))


def test_every_field_of_a_workload() -> None:
    message = pb.Workload(
        uid="c//Pod/ns/pod",
        name="pod",
        namespace="ns",
        addresses=[b"\x0a\xf4\x01\x02", bytes(15) + b"\x01"],
        hostname="pod.example.com",
        network="net",
        tunnel_protocol=pb.HBONE,
        trust_domain="td",
        service_account="sa",
        waypoint=pb.GatewayAddress(
            hostname=pb.NamespacedHostname(namespace="ns", hostname="waypoint.ns.svc.cluster.local")
        ),
        network_gateway=pb.GatewayAddress(
            address=pb.NetworkAddress(network="other", address=b"\x01\x02\x03\x04"), hbone_mtls_port=15009
        ),
        node="node-1",
        canonical_name="app",
        canonical_revision="v1",
        workload_type=pb.JOB,
        workload_name="deployment",
        native_tunnel=True,
        application_tunnel=pb.ApplicationTunnel(protocol=pb.ApplicationTunnel.PROXY, port=8080),
        services={
            "ns/svc": pb.PortList(ports=[pb.Port(service_port=80, target_port=8080, app_protocol=pb.HTTP2)])
        },
        authorization_policies=["ns/allow"],
        status=pb.UNHEALTHY,
        cluster_id="c",
        locality=pb.Locality(region="r", zone="z", subzone="s"),
        network_mode=pb.HOST_NETWORK,
    )
    message.capacity.value = 3
    assert decode(message) == model.Workload(
        uid="c//Pod/ns/pod",
        name="pod",
        namespace="ns",
        addresses=(b"\x0a\xf4\x01\x02", bytes(15) + b"\x01"),
        hostname="pod.example.com",
        network="net",
        tunnel_protocol=model.TunnelProtocol.HBONE,
        trust_domain="td",
        service_account="sa",
        waypoint=model.GatewayAddress(service="ns/waypoint.ns.svc.cluster.local", hbone_port=15008),
        network_gateway=model.GatewayAddress(network="other", ip=b"\x01\x02\x03\x04", hbone_port=15009),
        node="node-1",
        canonical_name="app",
        canonical_revision="v1",
        workload_type=model.WorkloadType.JOB,
        workload_name="deployment",
        native_tunnel=True,
        application_tunnel=model.ApplicationTunnel(proxy_protocol=True, port=8080),
        services={"ns/svc": (model.Port(80, 8080, model.AppProtocol.HTTP2),)},
        policies=("ns/allow",),
        healthy=False,
        cluster_id="c",
        locality=model.Locality("r", "z", "s"),
        host_network=True,
        capacity=3,
    )


def test_every_field_of_a_service() -> None:
    waypoint = pb.GatewayAddress(hostname=pb.NamespacedHostname(namespace="ns", hostname="w"))
    message = pb.Service(
        name="svc",
        namespace="ns",
        hostname="svc.ns",
        addresses=[pb.NetworkAddress(network="net", address=b"\x0a\x60\x00\x01")],
        ports=[pb.Port(service_port=80, app_protocol=pb.GRPC)],
        subject_alt_names=["spiffe://td/x"],
        waypoint=waypoint,
        load_balancing=pb.LoadBalancing(
            routing_preference=[pb.LoadBalancing.REGION, pb.LoadBalancing.NODE],
            mode=pb.LoadBalancing.STRICT,
            health_policy=pb.LoadBalancing.ALLOW_ALL,
        ),
        ip_families=pb.DUAL,
        canonical=True,
        weighted_waypoints=[pb.WeightedWaypoint(destination=waypoint, weight=7)],
        visibility=pb.Service.NAMESPACE,
    )
    gateway = model.GatewayAddress(service="ns/w")
    assert decode(message) == model.Service(
        name="svc",
        namespace="ns",
        hostname="svc.ns",
        vips=(("net", b"\x0a\x60\x00\x01"),),
        ports=(model.Port(80, 0, model.AppProtocol.GRPC),),
        subject_alt_names=("spiffe://td/x",),
        waypoint=gateway,
        load_balancing=model.LoadBalancing(
            (model.Scope.REGION, model.Scope.NODE), model.BalancingMode.STRICT, allow_unhealthy=True
        ),
        ip_families=model.IpFamilies.DUAL,
        canonical=True,
        weighted_waypoints=((gateway, 7),),
        namespace_only=True,
    )


def test_what_is_left_out_has_istios_defaults() -> None:
    found = decode(pb.Workload(uid="u", name="n", namespace="ns"))
    assert isinstance(found, model.Workload)
    assert found.identity == "spiffe://cluster.local/ns/ns/sa/default"
    assert found.healthy
    assert not found.hbone
    assert found.capacity == 1


def test_pods_of_a_deployment_share_what_is_equal() -> None:
    decoder = Decoder()
    services = {key("web"): {80: 8080, 443: 8443}, key("all"): {1: 1}}
    pods = []
    for number in range(2):
        message = workload(f"web-{number}", "10.0.0.1", services=services)
        message.authorization_policies[:] = ["r", "z", "s"]
        message.locality.CopyFrom(pb.Locality(region="r", zone="z", subzone="s"))
        pods.append(decoder.address(resource(message)))
    first, second = pods
    assert isinstance(first, model.Workload)
    assert isinstance(second, model.Workload)
    for field in ("namespace", "services", "policies", "locality", "service_account"):
        assert getattr(first, field) is getattr(second, field), field
    # A tuple of three strings and a Locality are equal, and must not be taken for one another.
    assert type(first.policies) is tuple
    assert type(first.locality) is model.Locality


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.addresses.append(b"\x01\x02\x03"), "addresses: one is 3 bytes long"),
        (lambda w: w.ClearField("uid"), "uid: is empty"),
        (lambda w: w.services["a/b"].ports.add(service_port=70000), "service_port: 70000 is no port"),
        (lambda w: w.services["a/b"].ports.add(target_port=65536), "target_port: 65536 is no port"),
        (lambda w: setattr(w, "tunnel_protocol", 99), "tunnel_protocol: value 99 is unknown"),
        (lambda w: setattr(w, "status", 99), "status: value 99 is unknown"),
        (lambda w: setattr(w, "network_mode", 99), "network_mode: value 99 is unknown"),
        (lambda w: w.waypoint.SetInParent(), "waypoint: has neither a hostname nor an address"),
        (lambda w: setattr(w.waypoint.address, "address", b"1"), "addresses: one is 1 bytes long"),
        (lambda w: setattr(w.network_gateway, "hbone_mtls_port", 1 << 20), "network_gateway.hbone_mtls_port"),
        (lambda w: setattr(w.application_tunnel, "port", 70000), "application_tunnel.port"),
    ],
)
def test_a_workload_that_is_refused(change: Callable[[pb.Workload], None], said: str) -> None:
    message = workload("pod")
    change(message)
    wrapped = resource(message)
    wrapped.name = "Kubernetes//Pod/default/pod"
    with pytest.raises(DecodeError) as refused:
        Decoder().address(wrapped)
    assert str(refused.value).startswith("Workload Kubernetes//Pod/default/pod: ")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.addresses.add(address=b""), "addresses: one is 0 bytes long"),
        (lambda s: s.ClearField("hostname"), "namespace, hostname: both are needed"),
        (lambda s: s.load_balancing.routing_preference.append(0), "routing_preference: value 0 is unknown"),
        (lambda s: setattr(s.load_balancing, "mode", 9), "load_balancing.mode: value 9 is unknown"),
        (lambda s: setattr(s, "ip_families", 9), "ip_families: value 9 is unknown"),
        (lambda s: s.weighted_waypoints.add(weight=1), "weighted_waypoints: has neither"),
    ],
)
def test_a_service_that_is_refused(change: Callable[[pb.Service], None], said: str) -> None:
    message = service("web")
    change(message)
    wrapped = resource(message)
    wrapped.name = key("web")
    with pytest.raises(DecodeError) as refused:
        Decoder().address(wrapped)
    assert str(refused.value).startswith(f"Service {key('web')}: ")
    assert said in str(refused.value)


def test_an_unknown_visibility_is_the_narrower_one() -> None:
    message = service("web")
    message.visibility = pb.Service.Visibility.ValueType(9)
    found = decode(message)
    assert isinstance(found, model.Service)
    assert found.namespace_only


def test_a_resource_under_another_name_is_refused() -> None:
    wrapped = resource(workload("pod"))
    wrapped.name = "10.0.0.1"
    with pytest.raises(DecodeError, match="uid: say 'Kubernetes//Pod/default/pod'"):
        Decoder().address(wrapped)


def test_an_empty_or_mistyped_resource_is_refused() -> None:
    wrapped = xds_pb2.Resource(name="x")
    wrapped.resource.Pack(pb.Address())
    with pytest.raises(DecodeError, match="x: is neither a workload nor a service"):
        Decoder().address(wrapped)
    wrapped.resource.Pack(pb.Workload())
    with pytest.raises(DecodeError, match=r"is of type 'type.googleapis.com/istio.workload.Workload'"):
        Decoder().address(wrapped)


def outcome(wrapped: xds_pb2.Resource) -> str:
    """What the decoder makes of a resource; any other exception than its own is the test's failure."""
    try:
        Decoder().address(wrapped)
    except DecodeError as refused:
        return "refused by name" if wrapped.name in str(refused) else "refused without its name"
    return "understood"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_understood(value: bytes) -> None:
    wrapped = resource(workload("pod"))
    wrapped.resource.value = value
    assert outcome(wrapped) in ("understood", "refused by name")


@given(st.data())
def test_a_damaged_workload_is_refused_or_understood(data: st.DataObject) -> None:
    """Most arbitrary bytes don't parse at all; those of a real message with a few changed get further."""
    wrapped = resource(workload("pod", "10.0.0.1", "fd00::1", services={key("web"): {80: 8080}}))
    value = bytearray(wrapped.resource.value)
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    wrapped.resource.value = bytes(value)
    assert outcome(wrapped) in ("understood", "refused by name")


def test_what_is_remembered_for_sharing_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztunnel.xds.decode._SHARED_MAX", 10)
    decoder = Decoder()
    for number in range(100):
        decoder.address(resource(workload(f"p-{number}", services={key(f"s-{number}"): {80: number}})))
    assert len(decoder._shared_services) <= 10
    assert all(len(shared) <= 10 for shared in decoder._shared.values())


def test_a_small_mesh_that_changes_all_day_remembers_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztunnel.xds.decode._SHARED_MIN", 10)
    decoder = Decoder()
    for number in range(100):
        decoder.expect(2)
        decoder.address(resource(workload("p", services={key(f"s-{number}"): {80: number}})))
    assert len(decoder._shared_services) <= 10
    assert all(len(shared) <= 10 for shared in decoder._shared.values())


def test_a_large_mesh_remembers_enough_to_share() -> None:
    decoder = Decoder()
    decoder.expect(2_000)
    wrapped = [
        resource(workload(f"p-{number}", services={key(f"s-{number % 1000}"): {80: 1}}))
        for number in range(2_000)
    ]
    found = [decoder.address(one) for one in wrapped]
    assert all(
        isinstance(one, model.Workload)
        and isinstance(other, model.Workload)
        and one.services is other.services
        for one, other in zip(found[:1000], found[1000:], strict=True)
    )
