"""The delta ADS client and policies: when it is synced, what takes effect together, what is refused."""

import trio

from tests.xds.control_plane import FakeControlPlane
from tests.xds.resources import policy_resource, workload
from tests.xds.test_client import Mesh
from ztunnel.mesh.policy import Action
from ztunnel.wire import authorization_pb2 as pb
from ztunnel.xds.decode import ADDRESS_TYPE
from ztunnel.xds.decode_policy import AUTHORIZATION_TYPE


def policy(name: str, *ports: int, namespace: str = "default") -> pb.Authorization:
    match = pb.Match(destination_ports=ports)
    rules = [pb.Rule(clauses=[pb.Clause(matches=[match])])]
    return pb.Authorization(name=name, namespace=namespace, scope=pb.NAMESPACE, action=pb.DENY, rules=rules)


async def test_synced_takes_the_first_state_of_both_types(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    control_plane.no_policies = False
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    asked = await connection.policy_request()
    assert (asked.type_url, list(asked.resource_names_subscribe)) == (AUTHORIZATION_TYPE, ["*"])
    assert asked.node.metadata["NODE_NAME"] == "node-1"
    assert (await connection.request()).type_url == ADDRESS_TYPE
    await connection.push_and_ack(workload("a", "10.244.1.2"))
    assert not mesh.client.synced.is_set()
    await connection.push_policies_and_ack(policy("p"), version="1+")
    assert not mesh.client.synced.is_set()
    assert mesh.policies == []
    await connection.push_policies_and_ack(policy("q"), version="1")
    assert mesh.client.synced.is_set()
    # Both responses are one state.
    assert [set(changes) for changes in mesh.policies] == [{"default/p", "default/q"}]


async def test_no_policies_are_a_state_too(control_plane: FakeControlPlane, nursery: trio.Nursery) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.request()
    await connection.push_and_ack()
    with trio.fail_after(20):
        await mesh.client.synced.wait()
    assert mesh.policies == [{}]


async def test_changes_and_removals_come_together(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.push_policies_and_ack(policy("p", 1), policy("q", 1))
    mesh.policies.clear()
    await connection.push_policies_and_ack(
        policy("q", 2), removed=["default/p", "default/unknown"], version="2"
    )
    (changes,) = mesh.policies
    assert set(changes) == {"default/p", "default/q"}
    assert changes["default/p"] is None
    changed = changes["default/q"]
    assert changed is not None
    assert changed.rules[0].clauses[0].matches[0].destination_ports == (2,)


async def test_a_bad_policy_is_refused_by_name_and_field_and_in_effect_as_its_strictest(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.push_policies_and_ack(policy("p", 1))
    mesh.policies.clear()
    garbage = policy_resource(policy("r"), "2")
    garbage.resource.value = b"\xff\xff\xff"
    nonce = connection.push_policies(policy("p", 70000), policy("q", 2), garbage, version="2")
    answer = await connection.policy_request()
    while answer.response_nonce != nonce:
        answer = await connection.policy_request()
    message = answer.error_detail.message
    assert answer.error_detail.code == 3
    assert "default/p: rules[0].clauses[0].matches[0].destination_ports[0]: 70000 is no port" in message
    assert "default/r: is no istio.security.Authorization" in message
    assert "default/q" not in message
    (changes,) = mesh.policies
    for name in ("default/p", "default/r"):
        closed = changes[name]
        assert closed is not None
        assert closed.action is Action.DENY
        assert closed.problem
    # It is sent again on the next stream, and its removal is heard of.
    connection.end()
    connection = await control_plane.connection()
    held = (await connection.policy_request()).initial_resource_versions
    assert dict(held) == {"default/p": "", "default/q": "2", "default/r": ""}
    mesh.policies.clear()
    await connection.push_policies_and_ack(removed=["default/p", "default/r"], version="3")
    assert mesh.policies == [{"default/p": None, "default/r": None}]


async def test_half_a_state_is_forgotten_with_its_stream(
    control_plane: FakeControlPlane, nursery: trio.Nursery
) -> None:
    mesh = Mesh(control_plane)
    await nursery.start(mesh.client.run)
    connection = await control_plane.connection()
    await connection.push_policies_and_ack(policy("p", 1))
    mesh.policies.clear()
    await connection.push_policies_and_ack(policy("p", 2), version="2+")
    connection.end()
    connection = await control_plane.connection()
    assert dict((await connection.policy_request()).initial_resource_versions) == {"default/p": "1"}
    await connection.push_policies_and_ack(policy("q", 1), version="3")
    assert [set(changes) for changes in mesh.policies] == [{"default/q"}]
