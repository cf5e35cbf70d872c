"""The delta ADS client, against a real gRPC server over TLS."""

import trio

from tests.xds.control_plane import TOKEN, FakeControlPlane
from tests.xds.resources import key, resource, service, workload
from ztunnel.mesh.policy_store import PolicyChanges
from ztunnel.mesh.state import MeshState
from ztunnel.xds.client import XdsClient


class Mesh:
    """A client with its state and the tags it published."""

    def __init__(self, control_plane: FakeControlPlane, port: int | None = None) -> None:
        self.state = MeshState()
        self.published: list[frozenset[str]] = []
        self.policies: list[PolicyChanges] = []
        self.client = XdsClient(
            control_plane.config(port), self.state, self.published.append, self.policies.append
        )

    @property
    def names(self) -> set[str]:
        return {workload.name for workload in self.state.workloads()}


async def test_a_first_push_fills_the_state(control_plane: FakeControlPlane, nursery: trio.Nursery) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    assert connection.metadata["authorization"] == f"Bearer {TOKEN}"
    assert connection.metadata["clusterid"] == "Kubernetes"
    first = await connection.request()
    assert first.node.id == "ztunnel~10.99.0.11~ztunnel-x.istio-system~istio-system.svc.cluster.local"
    assert first.node.metadata["NODE_NAME"] == "node-1"
    assert list(first.resource_names_subscribe) == ["*"]
    assert not first.initial_resource_versions
    assert not mesh.client.synced.is_set()

    reviews = service("reviews", "10.96.0.7", ports={80: 8080})
    await connection.push_and_ack(
        reviews, workload("reviews-1", "10.244.1.2", services={key("reviews"): {80: 8080}})
    )
    assert mesh.client.synced.is_set()
    assert mesh.client.connected
    assert mesh.client.version == "1"
    assert mesh.client.last_update is not None
    found = mesh.state.service_by_vip("", bytes([10, 96, 0, 7]))
    assert found is not None
    assert found.hostname == "reviews.default.svc.cluster.local"
    assert [pod.name for pod in mesh.state.endpoints(key("reviews"))] == ["reviews-1"]
    assert frozenset[str]().union(*mesh.published) == {
        "ip:/10.96.0.7", "ip:/10.244.1.2", f"svc:{key('reviews')}",
    }  # fmt: skip


async def test_changes_and_removals_are_applied(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    await connection.push_and_ack(workload("a", "10.244.1.2"), workload("b", "10.244.1.3"))
    mesh.published.clear()
    # The address passes from a, which goes, to c, in one response.
    await connection.push_and_ack(
        workload("c", "10.244.1.2"), removed=["Kubernetes//Pod/default/a", "not-known"]
    )
    assert mesh.names == {"b", "c"}
    owner = mesh.state.workload_by_address("", bytes([10, 244, 1, 2]))
    assert owner is not None
    assert owner.name == "c"
    assert mesh.published == [frozenset({"ip:/10.244.1.2"})]


async def test_an_empty_mesh_is_synced_too(control_plane: FakeControlPlane, nursery: trio.Nursery) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    await connection.push_and_ack()
    assert mesh.client.synced.is_set()


async def test_synced_waits_for_the_last_response_of_the_first_state(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    await connection.push_and_ack(workload("a", "10.244.1.2"), version="7+")
    assert mesh.client.version == "7"
    assert not mesh.client.synced.is_set()
    await connection.push_and_ack(workload("b", "10.244.1.3"), version="7")
    assert mesh.client.synced.is_set()


async def test_a_bad_resource_is_refused_by_name_and_the_others_are_applied(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    await connection.push_and_ack(workload("a", "10.244.1.2"))
    broken = workload("a", "10.244.1.99")
    broken.addresses.append(b"123")
    garbage = resource(workload("b"), "2")
    garbage.resource.value = b"\xff\xff\xff"
    nonce = connection.push(broken, garbage, workload("c", "10.244.1.4"), version="2")
    answer = await connection.request()
    assert answer.response_nonce == nonce
    assert answer.error_detail.code == 3
    message = answer.error_detail.message
    assert "Workload Kubernetes//Pod/default/a: addresses: one is 3 bytes long" in message
    assert "Kubernetes//Pod/default/b" in message
    assert "default/c" not in message
    assert mesh.names == {"a", "c"}
    kept = mesh.state.workload_by_address("", bytes([10, 244, 1, 2]))
    assert kept is not None
    # What was refused is not claimed to be held.
    connection.end()
    again = await (await control_plane.connection()).request()
    assert dict(again.initial_resource_versions) == {
        "Kubernetes//Pod/default/a": "1", "Kubernetes//Pod/default/c": "2",
    }  # fmt: skip


async def test_another_type_is_refused(control_plane: FakeControlPlane, nursery: trio.Nursery) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    connection.push(type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster")
    answer = await connection.request()
    assert "Cluster" in answer.error_detail.message
    assert not mesh.client.synced.is_set()


async def test_a_reconnect_says_what_is_held_and_takes_the_difference(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    await connection.push_and_ack(workload("a", "10.244.1.2"), workload("b", "10.244.1.3"), version="1")
    await connection.push_and_ack(workload("b", "10.244.1.33"), version="2")
    connection.end()
    connection = await control_plane.connection()
    # While the control plane is away, what was known serves on.
    assert mesh.names == {"a", "b"}
    first = await connection.request()
    assert first.node.id
    assert not first.response_nonce
    assert dict(first.initial_resource_versions) == {
        "Kubernetes//Pod/default/a": "1", "Kubernetes//Pod/default/b": "2",
    }  # fmt: skip
    await connection.push_and_ack(workload("c", "10.244.1.4"), removed=["Kubernetes//Pod/default/a"])
    assert mesh.names == {"b", "c"}
