"""Metrics of real connections: right values on both nodes, however they end, also while a worker is killed."""

import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import HTTP, Mesh, address, start_nginx
from tests.proxy.meshlab import MeshLab, identity_of
from tests.telemetry.scraped import Scraped
from ztunnel.embedded.testing import LabPod, until
from ztunnel.mesh.model import Port
from ztunnel.mesh.policy import Action, Authorization, PolicyScope
from ztunnel.telemetry import labels

pytestmark = pytest.mark.e2e

OPENED = "istio_tcp_connections_opened_total"
CLOSED = "istio_tcp_connections_closed_total"
FAILED = "istio_tcp_connections_failed_total"
SENT = "istio_tcp_sent_bytes_total"
RECEIVED = "istio_tcp_received_bytes_total"
LIMIT = 30.0


def scrape(mesh: Mesh, node: int) -> Scraped:
    return Scraped(mesh.lab.nodes[node].scrape())


class Change:
    """What was counted on a node since this was made."""

    def __init__(self, mesh: Mesh, node: int, **wanted: str) -> None:
        self.mesh, self.node, self.wanted = mesh, node, wanted
        self.before = self._read()

    def _read(self) -> dict[str, float]:
        found = scrape(self.mesh, self.node)
        return {name: found.sum(name, **self.wanted) for name in (OPENED, CLOSED, FAILED, SENT, RECEIVED)}

    def now(self) -> dict[str, float]:
        read = self._read()
        return {name: read[name] - self.before[name] for name in read}

    def until(self, condition: Callable[[dict[str, float]], bool], what: str) -> dict[str, float]:
        """Wait for it; returns what is counted then."""
        last: dict[str, float] = {}

        def check() -> bool:
            nonlocal last
            last = self.now()
            return condition(last)

        try:
            until(check, what, LIMIT, 0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}; counted: {last}") from None
        return last


def exchange(client: LabPod, server: LabPod, up: int, down: int, family: int = 4) -> None:
    """One connection with so many bytes each way, which ends in order."""
    with server.listen(0, socket.AF_INET6 if family == 6 else socket.AF_INET) as listener:
        listener.settimeout(LIMIT)
        done = threading.Thread(target=_serve, args=(listener, up, down))
        done.start()
        with client.connect(address(server, family), listener.getsockname()[1]) as sock:
            sock.settimeout(LIMIT)
            sock.sendall(b"u" * up)
            sock.shutdown(socket.SHUT_WR)
            assert _drain(sock) == down
        done.join(LIMIT)
        assert not done.is_alive()


def _serve(listener: socket.socket, up: int, down: int) -> None:
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(LIMIT)
        assert _drain(sock) == up
        sock.sendall(b"d" * down)


def _drain(sock: socket.socket) -> int:
    size = 0
    while data := sock.recv(65536):
        size += len(data)
    return size


@pytest.mark.parametrize("family", [4, 6])
def test_both_ends_count_the_same_bytes_as_the_client_sees_them(mesh: Mesh, family: int) -> None:
    pair = {"source_principal": identity_of(mesh.client), "destination_principal": identity_of(mesh.server)}
    source, destination = Change(mesh, 1, **pair), Change(mesh, 2, **pair)
    sizes = [(1, 1), (70_000, 3), (0, 123_456), (1_000_000, 2_000_000)]
    for up, down in sizes:
        exchange(mesh.client, mesh.server, up, down, family)
    expected = {
        OPENED: len(sizes),
        CLOSED: len(sizes),
        FAILED: 0,
        SENT: sum(up for up, _ in sizes),
        RECEIVED: sum(down for _, down in sizes),
    }
    assert source.until(lambda now: now[CLOSED] == len(sizes), "the client's node counts them") == expected
    assert destination.until(lambda now: now[CLOSED] == len(sizes), "so does the server's") == expected


def test_labels_are_those_of_the_mesh_and_none_is_missing(mesh: Mesh) -> None:
    lab = mesh.lab
    described = {"canonical_name": "shop", "canonical_revision": "v2", "workload_name": "shop-deploy"}
    hostname = "metrics.default.svc.cluster.local"
    ports = (Port(80, HTTP),)
    lab.service("metrics", "10.96.0.77", *ports)
    try:
        lab.change(
            lab.state.upsert_workload(
                lab.workload(
                    mesh.server,
                    True,
                    services={f"default/{hostname}": ports},
                    cluster_id="Kubernetes",
                    **described,
                )
            )
        )
        source = Change(mesh, 1, destination_service=hostname)
        destination = Change(mesh, 2, destination_service=hostname)
        with mesh.client.connect("10.96.0.77", 80) as sock:
            sock.settimeout(LIMIT)
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert _drain(sock) > 0
        source.until(lambda now: now[CLOSED] == 1, "the client's node counts it")
        destination.until(lambda now: now[CLOSED] == 1, "the server's node counts it")
        common = {
            "source_workload": "client",
            "source_workload_namespace": "default",
            "source_principal": identity_of(mesh.client),
            "destination_service": hostname,
            "destination_service_name": "metrics",
            "destination_service_namespace": "default",
            "destination_workload": "shop-deploy",
            "destination_workload_namespace": "default",
            "destination_canonical_service": "shop",
            "destination_canonical_revision": "v2",
            "destination_app": "shop",
            "destination_version": "v2",
            "destination_cluster": "Kubernetes",
            "destination_principal": identity_of(mesh.server),
            "request_protocol": "tcp",
            "response_flags": "-",
            "connection_security_policy": "mutual_tls",
            "source_canonical_service": "unknown",
            "source_canonical_revision": "unknown",
            "source_app": "unknown",
            "source_version": "unknown",
            "source_cluster": "unknown",
        }
        for node, reporter in ((1, "source"), (2, "destination")):
            for name in (OPENED, CLOSED, SENT, RECEIVED):
                (line,) = scrape(mesh, node).find(name, destination_service=hostname)
                assert line.labels == common | {"reporter": reporter}
                assert set(line.labels) == set(labels.TCP)

        def logged() -> bool:
            return any(
                line.get("dst.service") == hostname and line["src.workload"] == "client"
                for line in lab.nodes[2].access_log()
            )

        until(logged, "the server's log names the client's pod and the service", LIMIT)
    finally:
        lab.change(lab.state.remove(f"default/{hostname}"))
        lab.describe(mesh.server, hbone=True)


def test_plaintext_is_told_from_mutual_tls(mesh: Mesh) -> None:
    """By whom a STRICT policy would cut off."""
    change = Change(mesh, 2, connection_security_policy="unknown", destination_workload="server")
    exchange(mesh.outside_client, mesh.server, 10, 20)
    counted = change.until(lambda now: now[CLOSED] == 1, "the plaintext connection is counted")
    assert (counted[SENT], counted[RECEIVED], counted[FAILED]) == (10, 20, 0)
    (line,) = [
        one
        for one in scrape(mesh, 2).find(CLOSED, connection_security_policy="unknown")
        if one.labels["source_workload"] == "outside-client"
    ]
    # The mesh knows whose address it is; that it is he, nobody has proved.
    assert line.labels["source_principal"] == "unknown"
    assert line.labels["source_workload_namespace"] == "default"


def test_a_connection_counts_while_it_is_open(mesh: Mesh) -> None:
    pair = {"source_principal": identity_of(mesh.client), "destination_principal": identity_of(mesh.server)}
    source, destination = Change(mesh, 1, **pair), Change(mesh, 2, **pair)
    with mesh.server.listen(0) as listener:
        listener.settimeout(LIMIT)
        with mesh.client.connect(mesh.server.ip4, listener.getsockname()[1]) as sock:
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(LIMIT)
                for rounds in (1, 2, 3):
                    sock.sendall(b"x" * 1000)
                    received = 0
                    while received < 1000:
                        received += len(accepted.recv(1000 - received))
                    for change in (source, destination):
                        counted = change.until(lambda now, n=rounds: now[SENT] == 1000 * n, "its bytes")  # type: ignore[misc]
                        assert (counted[OPENED], counted[CLOSED]) == (1, 0)
    for change in (source, destination):
        counted = change.until(lambda now: now[CLOSED] == 1, "its end")
        assert (counted[OPENED], counted[SENT]) == (1, 3000)


def _refused(mesh: Mesh) -> None:
    with mesh.server.listen(0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionResetError), mesh.client.connect(mesh.server.ip4, port) as sock:
        sock.settimeout(LIMIT)
        sock.recv(1)


def _reset(mesh: Mesh) -> None:
    with mesh.server.listen(0) as listener:
        listener.settimeout(LIMIT)
        sock = mesh.client.connect(mesh.server.ip4, listener.getsockname()[1])
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(LIMIT)
            sock.sendall(b"hello")
            assert accepted.recv(1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            with pytest.raises(ConnectionResetError):
                while accepted.recv(100):
                    pass


def _mesh_port(mesh: Mesh) -> None:
    with pytest.raises(ConnectionResetError), mesh.client.connect(mesh.server.ip4, 15008) as sock:
        sock.settimeout(LIMIT)
        sock.recv(1)


@pytest.mark.parametrize(
    ("way", "flag"), [(_refused, "H2_HANDSHAKE_FAILURE"), (_reset, "-"), (_mesh_port, "CONNECT")]
)
def test_a_failure_is_counted_once_with_its_flag(mesh: Mesh, way: Callable[[Mesh], None], flag: str) -> None:
    change = Change(mesh, 1, source_workload="client", reporter="source")
    flagged = Change(mesh, 1, source_workload="client", reporter="source", response_flags=flag)
    lines = len(mesh.lab.nodes[1].access_log())
    way(mesh)
    counted = change.until(lambda now: now[FAILED] >= 1, "the failure is counted")
    assert (counted[OPENED], counted[CLOSED], counted[FAILED]) == (1, 1, 1), mesh.lab.nodes[1].access_log()[
        lines:
    ]
    assert flagged.now()[FAILED] == 1
    logged = mesh.lab.nodes[1].access_log()[lines:]
    assert len(logged) == 1
    assert logged[0].get("response_flags", "-") == flag
    assert logged[0]["error"]


def test_a_policys_refusal_and_what_it_cuts_are_counted_by_both_sides(mesh: Mesh) -> None:
    """One connection is open when the policy comes, one is made afterwards."""
    labels = {"source_principal": identity_of(mesh.client), "destination_principal": identity_of(mesh.server)}
    source, destination = (Change(mesh, node, response_flags="DENY", **labels) for node in (1, 2))
    deny = Authorization(
        name="deny-all", namespace="istio-system", scope=PolicyScope.GLOBAL, action=Action.ALLOW
    )
    with mesh.server.listen(0) as listener:
        listener.settimeout(LIMIT)
        port = listener.getsockname()[1]
        with mesh.client.connect(mesh.server.ip4, port) as sock:
            sock.settimeout(LIMIT)
            accepted, _ = listener.accept()
            with accepted:
                sock.sendall(b"x")
                assert accepted.recv(1) == b"x"
                mesh.lab.policies(deny)
                try:
                    with pytest.raises(ConnectionResetError):
                        sock.recv(1)
                    with (
                        pytest.raises(ConnectionResetError),
                        mesh.client.connect(mesh.server.ip4, port) as other,
                    ):
                        other.settimeout(LIMIT)
                        other.recv(1)
                finally:
                    mesh.lab.policies(removed=("istio-system/deny-all",))
    counted = destination.until(lambda now: now[FAILED] == 2, "the server's side counts both")
    assert counted[CLOSED] == 2
    # Of the one that was open the client's side knows only that its peer reset it.
    source.until(lambda now: now[FAILED] == 1, "the client's side counts the one that was refused")


def test_a_handshake_that_fails_is_counted_by_the_server(mesh: Mesh) -> None:
    change = Change(mesh, 2, reporter="destination", response_flags="TLS_FAILURE")
    with mesh.outside_client.connect(mesh.server.ip4, 15008) as sock:
        sock.settimeout(LIMIT)
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while True:
            try:
                if not sock.recv(4096):
                    break
            except ConnectionResetError:
                break
    counted = change.until(lambda now: now[FAILED] == 1, "the handshake is counted")
    assert counted[CLOSED] == 1


def test_a_log_that_nobody_reads_stops_no_traffic(tmp_path: Path) -> None:
    """Its pipe takes 64 KiB; what is beyond is dropped and counted, and whole lines come again once it is read."""
    os.mkfifo(tmp_path / "ztunnel-node-1.log")
    reader = os.open(tmp_path / "ztunnel-node-1.log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with MeshLab(tmp_path, nodes=1) as lab:
            server, client = lab.join(lab.pod("server", 1)), lab.join(lab.pod("client", 1))
            start_nginx(server, tmp_path)
            node = lab.nodes[1]

            def get() -> None:
                with client.connect(server.ip4, HTTP) as sock:
                    sock.settimeout(LIMIT)
                    sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    assert _drain(sock) > 0

            for _ in range(200):
                get()
            dropped = until(
                lambda: node.scrape() and node.workers.collection.dropped, "lines are dropped", LIMIT
            )
            lines = _lines(reader)
            assert len(lines) > 50
            for _ in range(3):
                get()

            def again() -> bool:
                lines.extend(_lines(reader))
                return sum(b"connection complete" in line for line in lines[-6:]) == 6

            until(again, "lines come again", LIMIT)
            for line in lines:
                json.loads(line)
            assert dropped + len(lines) >= 400
            until(
                lambda: Scraped(node.scrape()).sum(CLOSED, reporter="source") == 203, "all are counted", LIMIT
            )
    finally:
        os.close(reader)


def _lines(reader: int) -> list[bytes]:
    found = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reader, 1 << 20):
            found += data
    return found.splitlines()


def test_what_a_dead_worker_reported_stays_and_its_connections_are_closed(mesh: Mesh) -> None:
    """Scraped all the time: every page is whole, and no counter ever goes back."""
    node = mesh.lab.nodes[1]
    everything = Change(mesh, 1)
    sockets = []
    pages: list[Scraped] = []
    stop = threading.Event()

    def scrape_on() -> None:
        while not stop.is_set():
            pages.append(scrape(mesh, 1))

    scraper = threading.Thread(target=scrape_on)
    with mesh.server.listen(0) as listener:
        listener.settimeout(LIMIT)
        accepted = []
        for _ in range(8):
            sockets.append(mesh.client.connect(mesh.server.ip4, listener.getsockname()[1]))
            accepted.append(listener.accept()[0])
        try:
            everything.until(lambda now: now[OPENED] - now[CLOSED] == 8, "all are open")
            scraper.start()
            for worker in node.call_sync(node.workers.describe):
                os.kill(worker["pid"], signal.SIGKILL)
            counted = everything.until(lambda now: now[OPENED] == now[CLOSED], "all are closed")
            assert counted[FAILED] >= 8
            until(
                lambda: all(one["pid"] for one in node.call_sync(node.workers.describe)),
                "other workers run",
                LIMIT,
            )
            exchange(mesh.client, mesh.server, 5, 6)
            after = everything.until(lambda now: now[OPENED] == now[CLOSED] == 9, "another one is counted")
            assert after[SENT] == counted[SENT] + 5
        finally:
            stop.set()
            if scraper.ident is not None:
                scraper.join(LIMIT)
            for one in [*sockets, *accepted]:
                one.close()
    assert len(pages) > 1
    for before, later in itertools.pairwise(pages):
        for line in before.lines:
            if line.name.endswith("_total"):
                (now,) = later.find(line.name, **line.labels)
                assert now.value >= line.value
