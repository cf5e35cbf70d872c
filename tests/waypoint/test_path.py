"""Client's node proxy, waypoint, server's node proxy: real processes in real namespaces."""

import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.waypoint.lab import HOSTNAME, IDENTITY, LIMIT, VIP, WaypointLab, authorization
from ztunnel.embedded.testing import LabPod, until
from ztunnel.mesh.model import packed_ip
from ztunnel.mesh.policy import (
    Action,
    Authorization,
    Clause,
    Match,
    MatchKind,
    PolicyScope,
    Rule,
    StringMatch,
)
from ztunnel.store.models import AuthorizationPolicy, Pod

pytestmark = pytest.mark.e2e

CLIENT_IDENTITY = "spiffe://cluster.local/ns/default/sa/client"
BULK = 8 << 20


class Echo:
    """A server in a pod that says who it sees, then sends back what it gets until the client's end."""

    def __init__(self, pod: LabPod, port: int, family: int = socket.AF_INET) -> None:
        self.pod = pod
        self.peers: list[str] = []
        self.listener = pod.listen(port, family)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self.listener.accept()
            except OSError:
                return
            self.peers.append(peer[0])
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                sock.sendall(self.pod.name.encode() + b"\n")
                while data := sock.recv(1 << 16):
                    sock.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self.listener.close()


class Path:
    """The lab with its actors."""

    def __init__(self, lab: WaypointLab) -> None:
        self.lab = lab
        lab.start_plane()
        lab.base()
        self.client = lab.join(lab.pod("client", 1, service_account="client"))
        self.server = lab.pod("server", 2, service_account="server")
        self.echo = Echo(self.server, 8080)
        lab.join(self.server)
        lab.server(self.server)
        self.first = lab.replica("waypoint-1", 1)

    def ask(self, address: str = VIP, port: int = 80, timeout: float = 20) -> str:
        """The name of the server that answers, "" if the connection is refused."""
        try:
            with self.client.connect(address, port, timeout) as sock:
                return line(sock)
        except ConnectionError:
            return ""


def line(sock: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n"):
        part = sock.recv(100)
        if not part:
            return ""
        data += part
    return data.decode().strip()


def told(log: list[dict[str, Any]], error: str) -> bool:
    """Whether one of the lines has this error."""
    return any(error in one.get("error", "") for one in log)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with WaypointLab(tmp_path_factory.mktemp("waypoint")) as lab:
        made = Path(lab)
        yield made
        made.echo.close()
        assert [node.errors() for node in lab.nodes.values()] == [[], []]
        assert all("internal error" not in one.log and "Traceback" not in one.log for one in lab.replicas)


def test_a_connection_passes_the_waypoint_with_its_identity_and_keeps_its_source(path: Path) -> None:
    assert path.ask() == "server", path.first.log
    assert path.echo.peers[-1] == path.client.ip4
    passed = until(lambda: path.first.access_log()[-1:], "the waypoint logs", LIMIT)[0]
    assert (passed["direction"], passed["src.identity"]) == ("waypoint", CLIENT_IDENTITY)
    assert (passed["dst.workload"], passed["dst.service"]) == ("server", "web.default.svc.cluster.local")
    assert (passed["src.workload"], passed["dst.addr"]) == ("client", f"{path.server.ip4}:8080")
    inbound = until(lambda: path.lab.nodes[2].access_log()[-1:], "the server's node logs", LIMIT)[0]
    assert (inbound["direction"], inbound["src.identity"]) == ("inbound", IDENTITY)
    outbound = until(lambda: path.lab.nodes[1].access_log()[-1:], "the client's node logs", LIMIT)[0]
    assert (outbound["dst.addr"], outbound["dst.workload"]) == (f"{VIP}:80", "waypoint-1")


def test_a_pods_own_address_is_behind_the_waypoint_too(path: Path) -> None:
    before = len(path.first.access_log())
    assert path.ask(path.server.ip4, 8080) == "server"
    until(lambda: len(path.first.access_log()) > before, "the waypoint logs", LIMIT)
    assert path.echo.peers[-1] == path.client.ip4


def test_bulk_and_ends_cross_as_what_they_are(path: Path) -> None:
    payload = os.urandom(1 << 16)
    with path.client.connect(VIP, 80, 60) as sock:
        assert line(sock) == "server"
        sent = threading.Thread(target=sock.sendall, args=(payload * (BULK >> 16),))
        sent.start()
        received = bytearray()
        while len(received) < BULK:
            part = sock.recv(1 << 18)
            assert part
            received += part
        sent.join()
        assert received == payload * (BULK >> 16)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    with path.client.connect(VIP, 80, 60) as sock:
        assert line(sock) == "server"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: told(path.first.access_log(), "reset the stream"), "the reset is told", LIMIT)


def test_the_servers_policies_see_the_waypoint(path: Path) -> None:
    """A policy that allows the client and not the waypoint closes; one that allows the waypoint opens."""

    def allow(identity: str) -> Authorization:
        principals = (StringMatch(MatchKind.EXACT, identity.removeprefix("spiffe://")),)
        return Authorization(
            name="who",
            namespace="default",
            scope=PolicyScope.NAMESPACE,
            action=Action.ALLOW,
            rules=(Rule((Clause((Match(principals=principals),)),)),),
        )

    path.lab.policies(allow(CLIENT_IDENTITY))
    assert path.ask() == ""
    path.lab.policies(allow(IDENTITY))
    assert path.ask() == "server"
    path.lab.policies(removed=("default/who",))


def test_policies_that_target_the_service_are_enforced_by_the_waypoint(path: Path) -> None:
    target = {"targetRefs": [{"kind": "Service", "group": "", "name": "web"}]}
    principal = {"from": [{"source": {"principals": [CLIENT_IDENTITY.removeprefix("spiffe://")]}}]}
    with path.client.connect(VIP, 80, 60) as sock:
        assert line(sock) == "server"
        path.lab.apply(authorization("deny", {**target, "action": "DENY", "rules": [principal]}))
        # The connection that is open is closed, and no other opens.
        with pytest.raises(ConnectionResetError):
            while sock.recv(1):
                pass
    until(lambda: path.ask() == "", "the policy is enforced", LIMIT)
    assert any(one.get("response_flags") == "DENY" for one in path.first.access_log())
    path.lab.apply(authorization("deny", {**target, "rules": [principal]}))
    until(lambda: path.ask() == "server", "an ALLOW policy that names the client lets it through", LIMIT)
    path.lab.apply(authorization("deny", {**target, "rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]}))
    until(lambda: path.ask() == "", "what is asked of HTTP allows nothing", LIMIT)
    path.lab.store.delete(AuthorizationPolicy, "default", "deny")
    until(lambda: path.ask() == "server", "without the policy it is open again", LIMIT)


def test_pages_and_metrics(path: Path) -> None:
    assert path.ask() == "server"
    assert path.first.page(15021, "/healthz/ready") == (200, "ready\n")

    labels = (
        'reporter="waypoint"',
        f'source_principal="{CLIENT_IDENTITY}"',
        'destination_workload="server"',
        'destination_service="web.default.svc.cluster.local"',
    )

    def counted() -> bool:
        lines = path.first.page(15020, "/stats/prometheus")[1].splitlines()
        opened = [one for one in lines if one.startswith("istio_tcp_connections_opened_total")]
        return any(all(label in one for label in labels) for one in opened)

    until(counted, "the connection is counted", LIMIT)
    assert f'"service":"default/{HOSTNAME}"' in path.first.page(15000, "/config_dump")[1].replace(" ", "")


def test_an_endpoint_outside_the_mesh_is_reached_in_plain_tcp(path: Path) -> None:
    outside = path.lab.pod("outside", 2)
    echo = Echo(outside, 8080)
    path.lab.server(outside, mesh=False)
    try:
        until(lambda: path.ask() == "outside", "the endpoint outside is chosen", LIMIT)
        assert echo.peers[-1] == path.first.pod.ip4
    finally:
        path.lab.store.delete(Pod, "default", "outside")
        path.lab.change(path.lab.state.remove("Kubernetes//Pod/default/outside"))
        echo.close()
    until(lambda: path.ask() == "server", "the other one again", LIMIT)


def test_replicas_share_and_one_that_drains_loses_nothing(path: Path) -> None:
    second = path.lab.replica("waypoint-2", 2)
    until(
        lambda: path.ask() == "server" and bool(second.access_log()), "the second replica is used, too", LIMIT
    )
    with path.client.connect(VIP, 80, 60) as sock:
        assert line(sock) == "server"
        second.process.send_signal(signal.SIGTERM)
        until(lambda: not second.ready(), "it says that it goes", LIMIT)
        assert path.ask() == "server"  # whoever has not heard is served
        path.lab.known(second, False)
        sock.sendall(b"still there\n")
        assert line(sock) == "still there"
    assert all(path.ask() == "server" for _ in range(10))
    assert second.process.wait(LIMIT) == 0


def test_one_that_is_killed_is_another_ones_turn_and_without_any_nobody_gets_through(path: Path) -> None:
    third = path.lab.replica("waypoint-3", 2)
    until(lambda: path.ask() == "server" and bool(third.access_log()), "the third is used", LIMIT)
    third.process.kill()
    path.lab.known(third, False)
    assert all(path.ask() == "server" for _ in range(5))
    path.lab.known(path.first, False)
    assert path.ask() == ""
    until(
        lambda: told(path.lab.nodes[1].access_log(), "its traffic must pass a waypoint"), "it is told", LIMIT
    )
    path.lab.known(path.first, True)
    assert path.ask() == "server"


def test_what_is_not_behind_the_waypoint_is_not_reached_through_it(path: Path) -> None:
    """Also by somebody who has a certificate of the mesh and asks for it."""
    stranger = path.lab.join(path.lab.pod("stranger", 2, service_account="stranger"))
    echo = Echo(stranger, 8080)
    try:
        # A node that believes it to be behind the waypoint; the control plane says nothing of it.
        workload = path.lab.state.workload_by_address("", packed_ip(path.server.ip4))
        assert workload is not None
        assert workload.waypoint is not None
        claimed = path.lab.workload(stranger, True, waypoint=workload.waypoint)
        path.lab.change(path.lab.state.upsert_workload(claimed))
        assert path.ask(stranger.ip4, 8080) == ""
        assert echo.peers == []
        until(lambda: told(path.first.access_log(), "is not behind this waypoint"), "it is told", LIMIT)
    finally:
        echo.close()
