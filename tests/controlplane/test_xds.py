"""The real process, its xDS over TLS: a client driven by hand, and the node proxy's own."""

import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from grpclib import GRPCError
from grpclib.const import Status

from tests.controlplane.objects import authorization, node, pod, service
from tests.controlplane.process import ControlPlane, HandStream, until
from ztunnel.controlplane import delta
from ztunnel.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.mesh.state import MeshState
from ztunnel.store.models import AuthorizationPolicy, Condition, Pod, Service, ServicePort
from ztunnel.xds import subscription
from ztunnel.xds.channel import ControlPlane as ControlPlaneAddress
from ztunnel.xds.client import NodeInfo, XdsClient, XdsConfig

WEB = "default/web.default.svc.cluster.local"
STRICT = "istio-system/istio_converted_static_strict"
SELECTS_WEB = {"selector": {"matchLabels": {"app": "web"}}}
GRPC_LIMIT = 4 * 1024 * 1024


def uid(name: str) -> str:
    return f"Kubernetes//Pod/default/{name}"


def bookshop(pods: int = 2) -> list[Pod | Service]:
    return [
        service("web", "10.96.0.1", "fd00:10:96::1"),
        *(
            pod(f"web-{number}", f"10.244.{number >> 8}.{number & 255}",
                labels={"app": "web"}, mesh=True)
            for number in range(1, pods + 1)
        ),
    ]  # fmt: skip


async def test_a_wildcard_client_follows_the_directory(stopped: ControlPlane) -> None:
    stopped.apply(*bookshop())
    await stopped.start()
    async with stopped.stream() as stream:
        await stream.send()
        assert await stream.names() == ({WEB, uid("web-1"), uid("web-2")}, set())
        assert stream.addresses[uid("web-1")].workload.services[WEB].ports[0].target_port == 80

        edited = time.monotonic()
        stopped.apply(pod("web-1", "10.244.0.1", labels={"app": "web"}, mesh=True, ready=False))
        assert await stream.names() == ({uid("web-1")}, set())
        stopped.store.delete(Pod, "default", "web-2")
        assert await stream.names() == (set(), {uid("web-2")})
        stopped.apply(pod("new", "10.244.0.9"))
        assert await stream.names() == ({uid("new")}, set())
        assert time.monotonic() - edited < 3.0, "three edits, each within a second"

        stopped.apply(service("web", "10.96.0.1", selector={"app": "other"}))
        assert await stream.names() == ({WEB, uid("web-1")}, set())
        assert not stream.addresses[uid("web-1")].workload.services


async def test_authorization_is_answered_after_all_addresses(stopped: ControlPlane) -> None:
    """Whoever is ready once each type has been answered must have every workload by then."""
    stopped.write_all(bookshop(9000))
    await stopped.start()
    async with stopped.stream() as stream:
        await stream.send(ADDRESS_TYPE, subscribe=["*"])
        await stream.send(AUTHORIZATION_TYPE)
        responses = 0
        while (response := await stream.receive()).type_url == ADDRESS_TYPE:
            responses += 1
            assert response.ByteSize() < GRPC_LIMIT
        assert response.type_url == AUTHORIZATION_TYPE
        assert [resource.name for resource in response.resources] == [STRICT], (
            "nothing else: there are no policies"
        )
        assert not response.removed_resources
        assert responses > 1
        assert len(stream.addresses) == 9001


async def test_policies_come_before_the_workloads_that_list_them_and_go_after(stopped: ControlPlane) -> None:
    """Otherwise a change from one policy to another would for a moment be one to none."""
    stopped.apply(pod("web-1", "10.244.0.1", labels={"app": "web"}))
    await stopped.start()
    async with stopped.stream() as stream:
        await stream.send(ADDRESS_TYPE, subscribe=["*"])
        assert await stream.names() == ({uid("web-1")}, set())
        await stream.send(AUTHORIZATION_TYPE)
        assert await stream.names() == ({STRICT}, set())

        stopped.apply(authorization("deny", {**SELECTS_WEB, "action": "DENY", "rules": [{}]}))
        assert await stream.names() == ({"default/deny"}, set())
        assert await stream.names() == ({uid("web-1")}, set())
        assert list(stream.addresses[uid("web-1")].workload.authorization_policies) == ["default/deny"]
        assert len(stream.policies["default/deny"].rules) == 1

        stopped.store.delete(AuthorizationPolicy, "default", "deny")
        assert await stream.names() == ({uid("web-1")}, set())
        assert not stream.addresses[uid("web-1")].workload.authorization_policies
        assert await stream.names() == (set(), {"default/deny"})


async def test_after_a_reconnect_too_policies_that_are_gone_come_last(stopped: ControlPlane) -> None:
    """The client held a policy that its workload listed; meanwhile the workload lists another one."""
    stopped.apply(
        pod("web-1", "10.244.0.1", labels={"app": "web"}),
        authorization("new", {**SELECTS_WEB, "action": "DENY", "rules": [{}]}),
    )
    await stopped.start()
    async with stopped.stream() as stream:
        await stream.send(ADDRESS_TYPE, subscribe=["*"], held={uid("web-1"): "1"})
        await stream.send(AUTHORIZATION_TYPE, held={"default/old": "1"})
        assert await stream.names() == ({uid("web-1")}, set())
        assert await stream.names() == ({"default/new", STRICT}, set())
        assert await stream.names() == (set(), {"default/old"})


async def test_the_status_of_a_policy_says_what_is_enforced(stopped: ControlPlane) -> None:
    stopped.apply(authorization("deny", {"action": "DENY", "rules": [{}]}))
    await stopped.start()

    def conditions(name: str) -> list[Condition]:
        found = stopped.store.get(AuthorizationPolicy, "default", name)
        return found.status.conditions if found is not None else []

    await until(lambda: conditions("deny"), "the status is written")
    (first,) = conditions("deny")
    assert (first.type, first.status, first.reason) == ("ZtunnelAccepted", "True", "Accepted")
    assert first.last_transition_time
    stopped.apply(authorization("deny", {"action": "DROP"}))
    await until(lambda: [c.status for c in conditions("deny")] == ["False"], "and changes with the object")
    (second,) = conditions("deny")
    assert second.reason == "Invalid"
    assert "denies everything" in second.message
    assert "spec.action" in second.message


async def test_on_demand(stopped: ControlPlane) -> None:
    stopped.apply(*bookshop(), pod("lonely", "10.244.7.7"))
    await stopped.start()
    async with stopped.stream() as stream:
        await stream.send(subscribe=["*"], unsubscribe=["*"])
        assert await stream.names() == (set(), set())
        await stream.send(subscribe=["/10.244.7.7"])
        assert await stream.names() == ({uid("lonely")}, set())
        await stream.send(subscribe=["/10.96.0.1", "/192.0.2.1"])
        assert await stream.names() == ({WEB, uid("web-1"), uid("web-2")}, {"/192.0.2.1"})


async def test_a_rejected_resource_is_logged_and_waits_for_a_change(stopped: ControlPlane) -> None:
    stopped.apply(*bookshop(1))
    await stopped.start()
    async with stopped.stream() as stream:
        await stream.send()
        response = await stream.receive(acknowledge=False)
        await stream.send(nonce=response.nonce, error="workload has no name\nforged line")
        line = await stopped.logged(scope="controlplane.xds", level="warn")
        assert line["error"] == "workload has no name\nforged line"
        assert set(line["resources"].split(", ")) == {WEB, uid("web-1")}
        assert line["node"] == "node-1"
        stopped.apply(pod("web-1", "10.244.0.1", mesh=False))
        assert await stream.names() == ({uid("web-1")}, set())


async def test_an_unknown_type_is_answered_with_nothing(plane: ControlPlane) -> None:
    async with plane.stream() as stream:
        await stream.send("type.googleapis.com/envoy.config.cluster.v3.Cluster")
        response = await stream.receive()
        assert response.type_url == "type.googleapis.com/envoy.config.cluster.v3.Cluster"
        assert not response.resources
        await plane.logged(type=response.type_url, node="node-1")


async def test_one_stream_has_a_bounded_number_of_types(plane: ControlPlane) -> None:
    async with plane.stream() as stream:
        for number in range(65):
            await stream.send(f"type.googleapis.com/unknown.Type{number}")
        with pytest.raises(GRPCError) as ended:
            while True:
                await stream.receive(acknowledge=False)
    assert ended.value.status is Status.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("token", "message"),
    [("", "no token"), ("wrong", "not that of a node")],
)
async def test_without_a_valid_token_nothing_is_served(plane: ControlPlane, token: str, message: str) -> None:
    async with plane.stream(token) as stream:
        await stream.send()
        with pytest.raises(GRPCError) as refused:
            await stream.receive()
    assert refused.value.status is Status.UNAUTHENTICATED
    assert message in str(refused.value.message)
    assert "wrong" not in plane.log
    await plane.logged(level="warn", scope="controlplane.xds")


async def test_the_node_proxys_own_client_says_why_it_is_refused(
    plane: ControlPlane, nursery: trio.Nursery
) -> None:
    (plane.directory / "stale").write_text("stale")
    client = XdsClient(
        client_config(plane, plane.directory / "stale"), MeshState(), lambda tags: None, lambda changes: None
    )
    await nursery.start(client.run)
    await until(lambda: bool(client.error), "an error")
    assert "UNAUTHENTICATED: the token is not that of a node" in client.error


async def test_a_token_is_known_as_soon_as_its_file_is(plane: ControlPlane) -> None:
    (plane.directory / "tokens" / "node-3").write_text("fresh")
    async with plane.stream("fresh") as stream:
        await stream.send()
        await stream.receive()
    await plane.logged(message="client connected", node="node-3")


async def test_a_killed_control_plane_comes_back_with_the_same_versions(stopped: ControlPlane) -> None:
    stopped.apply(*bookshop(3))
    await stopped.start()
    async with stopped.stream() as stream:
        await stream.send()
        await stream.receive()
        held = dict(stream.held)
    await stopped.stop(signal.SIGKILL)
    stopped.apply(pod("web-1", "10.244.0.1", ready=False))
    stopped.store.delete(Pod, "default", "web-2")
    await stopped.start()
    async with stopped.stream() as stream:
        await stream.send(held=held)
        assert await stream.names() == ({uid("web-1")}, {uid("web-2")})


async def test_sigterm_tells_the_clients_to_come_again(plane: ControlPlane) -> None:
    async with plane.stream() as stream:
        await stream.send()
        await stream.receive()
        assert await plane.stop() == 0
        with pytest.raises(GRPCError) as ended:
            await stream.receive()
    assert ended.value.status is Status.UNAVAILABLE
    assert not plane.lines(level="error")


GARBAGE = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\xff" + bytes(255), bytes(100), b"\xff" * 1000]


@pytest.mark.parametrize("tls", [False, True], ids=["instead-of-tls", "inside-tls"])
async def test_garbage_on_the_port_hurts_nobody(plane: ControlPlane, tls: bool) -> None:
    async with plane.stream() as stream:
        await stream.send()
        await stream.receive()
        for garbage in GARBAGE:
            raw = await trio.open_tcp_stream("127.0.0.1", plane.port)
            connection = trio.SSLStream(raw, plane.tls(), server_hostname="127.0.0.1") if tls else raw
            with trio.fail_after(20):
                await connection.send_all(garbage)
                with suppress(trio.BrokenResourceError):
                    while await connection.receive_some():
                        pass
            await raw.aclose()
        plane.apply(pod("web-1", "10.244.0.1"))
        assert await stream.names() == ({uid("web-1")}, set())
    assert not plane.lines(level="error")


async def test_clients_that_go_are_forgotten(plane: ControlPlane) -> None:
    async with plane.stream() as first:
        await first.send()
        await first.receive()
        await first.cancel()
        await plane.logged(message="client gone", clients=0)
        async with plane.stream("token of node-2") as second:
            await second.send()
            await second.receive()
            await second.end()
            await until(lambda: len(plane.lines(message="client gone")) == 2, "the second client's end")


async def test_bad_objects_leave_the_others_alone(plane: ControlPlane) -> None:
    async with plane.stream() as stream:
        await stream.send()
        await stream.receive()
        (plane.directory / "objects" / "bad.yaml").write_text(
            "apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec: {ports: [{port: 0}]}\n---\n"
            "apiVersion: v1\nkind: Service\nmetadata: {name: good}\n"
            "spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}\n"
        )
        assert await stream.names() == ({"default/good.default.svc.cluster.local"}, set())
        plane.apply(service("taker", "10.96.0.9"), pod("nowhere", "10.0.0.999"), pod("fine", "10.0.0.1"))
        while uid("fine") not in stream.held:
            await stream.receive()
        assert uid("nowhere") not in stream.held
        (plane.directory / "objects" / "broken.yaml").write_text("{{{")
        plane.apply(pod("last", "10.0.0.2"))
        while uid("last") not in stream.held:
            await stream.receive()
    warnings = " ".join(line["message"] for line in plane.lines(level="warn"))
    for words in (
        "Service default/bad",
        "Service default/taker: address 10.96.0.9",
        "Pod default/nowhere",
        "broken",
    ):
        assert words in warnings


async def test_a_slow_client_gets_the_latest_state_only(plane: ControlPlane) -> None:
    """It reads nothing while a pod changes again and again; then the last change is what it gets."""
    async with plane.stream() as slow, plane.stream("token of node-2") as quick:
        for stream in (slow, quick):
            await stream.send()
            await stream.receive()
        rounds = 30
        for number in range(rounds):
            plane.apply(pod("web-1", "10.244.0.1", account=f"account-{number}"))
            await until_account(quick, f"account-{number}")
        responses = 0
        while account(slow) != f"account-{rounds - 1}":
            await slow.receive()
            responses += 1
        assert responses < rounds / 2


def account(stream: HandStream) -> str:
    found = stream.addresses.get(uid("web-1"))
    return found.workload.service_account if found else ""


async def until_account(stream: HandStream, name: str) -> None:
    while account(stream) != name:
        await stream.receive()


async def test_the_node_proxys_own_client(stopped: ControlPlane, nursery: trio.Nursery) -> None:
    """It syncs, follows, and outlives a kill: it holds what it had and gets the difference."""
    stopped.apply(*bookshop())
    await stopped.start()
    state = MeshState()
    client = XdsClient(
        client_config(stopped, stopped.directory / "tokens" / "node-1"),
        state,
        lambda tags: None,
        lambda changes: None,
    )
    await nursery.start(client.run)
    with trio.fail_after(20):
        await client.synced.wait()
    found = state.service_by_vip("", bytes((10, 96, 0, 1)))
    assert found is not None
    assert {workload.name for workload in state.endpoints(WEB)} == {"web-1", "web-2"}
    assert all(
        workload.identity == "spiffe://cluster.local/ns/default/sa/default"
        for workload in state.endpoints(WEB)
    )

    await stopped.stop(signal.SIGKILL)
    await until(lambda: not client.connected, "the client to notice")
    assert len(list(state.endpoints(WEB))) == 2
    stopped.apply(pod("web-3", "10.244.0.3", labels={"app": "web"}))
    await stopped.start(level="debug")
    await until(lambda: len(list(state.endpoints(WEB))) == 3, "the new pod")
    push = await stopped.logged(message="push")
    assert (push["sent"], push["removed"]) == (1, 0)
    stopped.store.delete(Service, "default", "web")
    await until(lambda: state.service_by_vip("", bytes((10, 96, 0, 1))) is None, "the Service to go")


async def test_the_node_proxys_own_client_accepts_every_shape(
    stopped: ControlPlane, nursery: trio.Nursery
) -> None:
    named = [
        ServicePort(port=80, name="http", target_port="http"),
        ServicePort(port=53, name="dns", protocol="UDP"),
    ]
    stopped.write_all(
        [
            node("node-1", region="r", zone="z", subzone="s"),
            service("dual", "10.96.0.1", "fd00:10:96::1", ip_families=["IPv4", "IPv6"], ports=named),
            service("headless", selector={"app": "dual"}, publish_not_ready_addresses=True),
            service("local", "10.96.0.2", internal_traffic_policy="Local"),
            service("close", "fd00:10:96::2", traffic_distribution="PreferClose"),
            service("same-node", "10.96.0.3", traffic_distribution="PreferSameNode"),
            service("no-ports", ports=[]),
            pod(
                "dual-1",
                "10.244.1.2",
                "fd00:10:244:1::2",
                labels={"app": "dual"},
                ports={"http": 9080},
                mesh=True,
            ),
            pod("dual-2", "10.244.1.3", labels={"app": "dual"}, ready=False),
            pod("host", "10.99.0.11", host_network=True),
            pod("last", "10.244.1.4", labels={"app": "no-ports"}, owner=("ReplicaSet", "last-5d8")),
        ]
    )
    await stopped.start(level="debug")
    state = MeshState()
    client = XdsClient(
        client_config(stopped, stopped.directory / "tokens" / "node-1"),
        state,
        lambda tags: None,
        lambda changes: None,
    )
    await nursery.start(client.run)
    with trio.fail_after(20):
        await client.synced.wait()
    assert {workload.name for workload in state.workloads()} == {"dual-1", "dual-2", "host", "last"}
    dual = {workload.name for workload in state.endpoints("default/dual.default.svc.cluster.local")}
    assert dual == {"dual-1"}, "dual-2 has no port of the name"
    stopped.apply(service("one-more", "10.96.0.9"))
    await until(lambda: state.service("default/one-more.default.svc.cluster.local") is not None, "the change")
    assert not stopped.lines(level="warn")


def test_both_sides_mean_the_same_by_more_follows() -> None:
    assert delta.MORE_FOLLOWS == subscription.MORE_FOLLOWS


def client_config(plane: ControlPlane, token: Path) -> XdsConfig:
    address = ControlPlaneAddress(
        address=f"https://127.0.0.1:{plane.port}", root_ca=plane.root_ca, token=token
    )
    return XdsConfig(server=address, node=NodeInfo(node_name="node-1", pod_name="ztunnel-node-1"))
