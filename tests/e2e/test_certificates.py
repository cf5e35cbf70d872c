"""Certificates that are revoked or end while tunnels are open, in real workers."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import HTTP, Mesh, until
from tests.e2e.hostile import HboneClient, Refused
from tests.proxy.meshlab import identity_of
from ztunnel import hbone
from ztunnel.embedded.testing import LabPod
from ztunnel.identity.testing import revoke, workload
from ztunnel.identity.tls import mesh_context

pytestmark = pytest.mark.e2e
LIMIT = 30.0
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def revoke_all(mesh: Mesh, pod: LabPod, *, ends: float = 3600) -> bytes:
    """A list with every certificate that the pod was given: an open tunnel may be of any of them."""
    return revoke(mesh.lab.authority, mesh.lab.certificates[identity_of(pod)], ends=ends)


def honour(mesh: Mesh, number: int, lists: bytes) -> None:
    """Have a node honour revocation lists."""
    node = mesh.lab.nodes[number]
    node.call_sync(node.workers.use_revocations, lists)


def requested(mesh: Mesh) -> bool:
    """Whether a request of the client's over a new connection is answered."""
    with contextlib.suppress(OSError):
        connection = mesh.client.connect(mesh.server.ip4, HTTP)
        with connection:
            connection.settimeout(LIMIT)
            connection.sendall(REQUEST)
            return connection.recv(4) == b"HTTP"
    return False


def logged(mesh: Mesh, node: int, *words: str) -> list[dict[str, Any]]:
    return [
        event
        for event in mesh.lab.nodes[node].access_log()
        if all(word in str(event.get("error", "")) for word in words)
    ]


@pytest.fixture
def pardoned(mesh: Mesh) -> Iterator[Mesh]:
    yield mesh
    for pod in (mesh.client, mesh.server):
        honour(mesh, pod.node, b"")
        mesh.lab.certify(pod)
    until(lambda: requested(mesh), "the mesh is as it was", LIMIT)


@pytest.mark.parametrize("whose", ["client", "server"])
def test_a_revoked_peer_loses_its_tunnels_and_gets_no_other(pardoned: Mesh, whose: str) -> None:
    mesh = pardoned
    judged, judge = (mesh.client, mesh.server) if whose == "client" else (mesh.server, mesh.client)
    with mesh.client.connect(mesh.server.ip4, HTTP) as connection:
        connection.settimeout(LIMIT)
        connection.sendall(REQUEST)
        assert connection.recv(4) == b"HTTP"

        # A list that revokes somebody else changes nothing for this one.
        honour(mesh, judge.node, revoke(mesh.lab.authority, [workload(mesh.lab.authority)]))
        assert requested(mesh)
        connection.sendall(REQUEST)
        assert connection.recv(1)

        honour(mesh, judge.node, revoke_all(mesh, judged))
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(65536):
                pass
    until(
        lambda: bool(logged(mesh, judge.node, "revoked", "while the tunnel was open")), "it is logged", LIMIT
    )
    assert not requested(mesh)
    until(lambda: bool(logged(mesh, judge.node, "TLS handshake", "it is revoked")), "it is logged", LIMIT)
    assert {one["response_flags"] for one in logged(mesh, judge.node, "revoked")} == {"CERT_REVOKED"}
    if whose == "client":
        until(
            lambda: bool(logged(mesh, judged.node, "the peer found our certificate")), "it knows why", LIMIT
        )
    # Another certificate of the same identity is another matter.
    mesh.lab.certify(judged)
    until(lambda: requested(mesh), "the next certificate serves", LIMIT)


def test_an_old_list_counts_and_a_missing_one_does_not(pardoned: Mesh) -> None:
    mesh = pardoned
    honour(mesh, mesh.server.node, revoke(mesh.lab.authority, [], ends=-60))
    assert requested(mesh)
    honour(mesh, mesh.server.node, revoke_all(mesh, mesh.client, ends=-60))
    until(lambda: not requested(mesh), "the revoked one is refused", LIMIT)


def test_a_new_worker_knows_what_is_revoked(pardoned: Mesh) -> None:
    mesh = pardoned
    honour(mesh, mesh.server.node, revoke_all(mesh, mesh.client))
    node = mesh.lab.nodes[mesh.server.node]
    before = {one.pid for one in node.stats()}
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len({one.pid for one in node.stats()} - before) == 2, "new workers run", LIMIT)
    assert not requested(mesh)
    mesh.lab.certify(mesh.client)
    until(lambda: requested(mesh), "the next certificate serves", LIMIT)


def test_a_tunnel_does_not_outlive_its_certificate(mesh: Mesh) -> None:
    """GOAWAY before the end, no new stream after it; the stream that is open goes on."""
    life = 6
    certificate = workload(mesh.lab.authority, identity_of(mesh.client), life)
    ends = certificate.not_after
    with HboneClient(mesh.outside_client, mesh.server.ip4, mesh_context(certificate)) as client:
        client.start()
        target = f"{mesh.server.ip4}:{HTTP}"
        assert client.connect(target) == 200
        told = False
        while not told:
            told = any(isinstance(event, hbone.GoAwayReceived) for event in client.receive())
        assert time.time() < ends + 1.5, "told only when it was over"
        while time.time() < ends + 1.1:
            time.sleep(ends + 1.1 - time.time())
        client.h2.send_data(1, REQUEST)
        client.send(client.h2.data_to_send())
        while not any(isinstance(event, hbone.DataReceived) for event in client.receive()):
            pass
    late = workload(mesh.lab.authority, identity_of(mesh.client), 1)
    time.sleep(max(0.0, late.not_after - time.time() + 1.1))
    with (
        HboneClient(mesh.outside_client, mesh.server.ip4, mesh_context(late)) as client,
        pytest.raises(Refused),
    ):
        client.start()
        client.connect(target)
