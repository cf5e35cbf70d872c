"""Joining and leaving while programs run, and what becomes of connections, workers and tunnels meanwhile."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_ends import Pair
from tests.proxy.meshlab import MeshLab, tcp_sockets
from ztunnel.embedded.testing import LabPod, until
from ztunnel.proxy.messages import Stats
from ztunnel.proxy.served import PodError

pytestmark = pytest.mark.e2e


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[MeshLab]:
    with MeshLab(tmp_path, workers=2) as made:
        yield made
        for node in made.nodes.values():
            assert node.errors() == []


@pytest.fixture
def pods(lab: MeshLab) -> tuple[LabPod, LabPod]:
    """(client, server), described, and not in the mesh yet."""
    client, server = lab.pod("client", 1), lab.pod("server", 2)
    for pod in (client, server):
        lab.describe(pod, hbone=False)
    return client, server


def all_stats(lab: MeshLab) -> list[Stats]:
    return [stats for node in lab.nodes.values() for stats in node.stats()]


def talk(pair: Pair, times: int = 3) -> None:
    for number in range(times):
        for one, other in ((pair.client, pair.server), (pair.server, pair.client)):
            one.sendall(b"%04d" % number)
            assert other.recv(4) == b"%04d" % number


@pytest.mark.parametrize("family", [4, 6])
def test_connections_survive_joining_and_leaving(
    lab: MeshLab, pods: tuple[LabPod, LabPod], family: int
) -> None:
    client, server = pods
    with Pair(client, server, family) as before:
        lab.join(server)
        lab.join(client)
        talk(before)
        with Pair(client, server, family) as inside:
            talk(inside)
            assert any(one.remote_port == 15008 for one in tcp_sockets(client))
            lab.leave(client)
            lab.leave(server)
            with Pair(client, server, family) as after:
                for pair in (before, inside, after):
                    talk(pair)
                assert sum(s.connections for s in all_stats(lab)) == 2  # `inside`, both ends
            talk(inside)
        until(
            lambda: (
                not any(
                    s.connections or s.tunnels_in or s.tunnels_out
                    for n in lab.nodes.values()
                    for s in n.stats()
                )
            ),
            "the last tunnel is closed with its last connection",
        )


def test_a_pod_may_come_back_while_its_old_connections_are_open(
    lab: MeshLab, pods: tuple[LabPod, LabPod]
) -> None:
    client, server = pods
    lab.join(server)
    lab.join(client)
    with Pair(client, server, 4) as first:
        lab.leave(client)
        lab.join(client)
        with Pair(client, server, 4) as second:
            talk(first)
            talk(second)
        talk(first)


def test_a_pods_connections_end_with_its_network(lab: MeshLab, pods: tuple[LabPod, LabPod]) -> None:
    client, server = pods
    lab.join(server)
    lab.join(client)
    with Pair(client, server, 4) as pair:
        node = lab.nodes[2]
        node.call(node.workers.delete_pod, server.uid)
        talk(pair)
        lab.network.detach(server.uid, server.node_name)
        until(lambda: not any(s.connections for s in node.stats()), "nothing is left of the pod")
        # The client's end is alone now; its keepalive, or its next write, finds out.


def test_a_killed_worker_costs_its_own_connections_only(lab: MeshLab, pods: tuple[LabPod, LabPod]) -> None:
    client, server = pods
    lab.join(server)
    lab.join(client)
    node = lab.nodes[1]
    pairs: list[Pair] = []
    try:
        # The kernel spreads connections over the workers' listeners by their ports.
        def both_work() -> bool:
            pairs.append(Pair(client, server, 4))
            return all(stats.connections for stats in node.stats())

        until(both_work, "both workers have connections")
        for pair in pairs:
            talk(pair)
        victim = node.workers.describe()[0]["pid"]
        expected = {s.pid: s.connections for s in node.stats()}
        os.kill(victim, signal.SIGKILL)
        alive = dead = 0
        for pair in pairs:
            try:
                talk(pair, 1)
                alive += 1
            except (ConnectionError, OSError, AssertionError):
                dead += 1
        assert dead == expected[victim]
        assert alive == sum(expected.values()) - expected[victim] > 0
        until(lambda: node.workers.alive == 2, "another worker took its place", 5)
        for _ in range(20):
            with Pair(client, server, 4) as pair:
                talk(pair, 1)
    finally:
        for pair in pairs:
            pair.client.close()
            pair.server.close()


def test_while_the_proxy_is_down_nothing_flows_in_plaintext(
    lab: MeshLab, pods: tuple[LabPod, LabPod]
) -> None:
    client, server = pods
    lab.join(server)
    lab.join(client)
    lab.nodes[1].stop()
    with server.listen(0) as listener:
        listener.settimeout(1)
        port = listener.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            client.connect(server.ip4, port)
        with pytest.raises(TimeoutError):
            listener.accept()
    del lab.nodes[1]


def test_a_destination_whose_proxy_is_down_is_not_reached_in_plaintext(
    lab: MeshLab, pods: tuple[LabPod, LabPod]
) -> None:
    client, server = pods
    lab.join(server)
    lab.join(client)
    lab.nodes[2].stop()
    del lab.nodes[2]
    with server.listen(0) as listener:
        listener.settimeout(1)
        port = listener.getsockname()[1]
        with pytest.raises(ConnectionResetError), client.connect(server.ip4, port) as connection:
            connection.recv(1)
        with pytest.raises(TimeoutError):
            listener.accept()
    errors = [event["error"] for event in lab.nodes[1].access_log() if "error" in event]
    assert any("15008" in error and "nothing listens there" in error for error in errors), errors


def test_a_tunnel_that_died_unnoticed_is_replaced(lab: MeshLab, pods: tuple[LabPod, LabPod]) -> None:
    """The peer's workers are killed and come back: connections made then work, on new tunnels."""
    client, server = pods
    lab.join(server)
    lab.join(client)
    with Pair(client, server, 4) as pair:
        talk(pair)
    node = lab.nodes[2]
    for one in node.workers.describe():
        os.kill(one["pid"], signal.SIGKILL)
    until(
        lambda: node.workers.alive == 2 and all(one["restarts"] for one in node.workers.describe()),
        "they are back",
        5,
    )
    with Pair(client, server, 4) as pair:
        talk(pair)


def test_a_port_that_a_program_of_the_pod_holds_is_named(lab: MeshLab) -> None:
    pod = lab.pod("squatter", 1)
    squatter = pod.new_socket(socket.AF_INET6)
    with squatter:
        squatter.bind(("::", 15008))
        squatter.listen()
        with pytest.raises(PodError, match=r"default/squatter: cannot listen on port 15008"):
            lab.join(pod)
    lab.join(pod)
