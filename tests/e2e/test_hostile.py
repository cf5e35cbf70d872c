"""Peers that must not get in: each is refused, the refusal is in the log, and nobody else notices."""

import os
from typing import Any

import pytest

from tests.e2e.conftest import HTTP, Mesh
from tests.e2e.hostile import HBONE_PORT, HboneClient, Refused
from tests.proxy.meshlab import identity_of
from ztunnel.embedded.testing import until
from ztunnel.identity.testing import HOSTILE, hostile_context, workload
from ztunnel.identity.tls import mesh_context

pytestmark = pytest.mark.e2e


def _errors_of(mesh: Mesh) -> list[dict[str, Any]]:
    return [event for event in mesh.lab.nodes[2].access_log() if "error" in event]


def _new_error(mesh: Mesh, before: int, words: str = "") -> str:
    """The first new error with these words; the end of an earlier test's connection may be told late."""

    def found() -> list[str]:
        return [event["error"] for event in _errors_of(mesh)[before:] if words in event["error"]]

    error: str = until(found, f"the refusal is in the log: {words}")[0]
    return error


def _others_are_served(mesh: Mesh) -> None:
    result = mesh.client.check(["curl", "-sS", "-m", "5", f"http://{mesh.server.ip4}:{HTTP}/"])
    assert result.stdout == "hello world\n", result.stderr


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_client_without_a_right_certificate_is_refused(mesh: Mesh, kind: str) -> None:
    before = len(_errors_of(mesh))
    context = hostile_context(kind, mesh.lab.authority, server=False)
    with HboneClient(mesh.outside_client, mesh.server.ip4, context) as client:
        with pytest.raises(Refused):
            client.start()
            client.connect(f"{mesh.server.ip4}:{HTTP}")
        assert _new_error(mesh, before)
    _others_are_served(mesh)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        os.urandom(4096),
    ],
    ids=["zeros", "http", "h2 without TLS", "random"],
)
def test_garbage_is_refused(mesh: Mesh, data: bytes) -> None:
    before = len(_errors_of(mesh))
    with mesh.outside_client.connect(mesh.server.ip4, HBONE_PORT) as connection:
        connection.sendall(data)
        try:
            while connection.recv(4096):
                pass
        except ConnectionResetError:
            pass
    assert _new_error(mesh, before, "TLS")
    _others_are_served(mesh)


@pytest.mark.parametrize(
    ("authority", "status"),
    [
        ("{outside}:8080", 400),
        ("127.0.0.1:8080", 400),
        ("[::1]:8080", 400),
        ("0.0.0.0:8080", 400),
        ("{server}:15008", 400),
        ("{server}:15001", 400),
        ("{server}:0", 400),
        ("{server}:99999", 400),
        ("{server}", 400),
        ("server.default.svc.cluster.local:8080", 400),
        ("{server}:9", 503),
        ("{server}:8080", 200),
    ],
)
def test_a_connect_is_answered_for_the_pods_own_addresses_only(
    mesh: Mesh, authority: str, status: int
) -> None:
    before = len(_errors_of(mesh))
    wanted = authority.format(server=mesh.server.ip4, outside=mesh.outside_server.ip4)
    context = mesh_context(workload(mesh.lab.authority, identity_of(mesh.client)))
    with HboneClient(mesh.outside_client, mesh.server.ip4, context) as client:
        client.start()
        assert client.connect(wanted) == status
        if status != 200:
            assert _new_error(mesh, before)
        # The connection goes on: one bad stream harms no other.
        assert client.connect(f"{mesh.server.ip4}:{HTTP}") == 200


def test_a_frame_that_breaks_the_protocol_ends_one_connection(mesh: Mesh) -> None:
    before = len(_errors_of(mesh))
    context = mesh_context(workload(mesh.lab.authority, identity_of(mesh.client)))
    with HboneClient(mesh.outside_client, mesh.server.ip4, context) as client:
        client.start()
        assert client.connect(f"{mesh.server.ip4}:{HTTP}") == 200
        client.send(b"\xff" * 100)
        with pytest.raises(Refused):
            while True:
                client.receive()
    assert _new_error(mesh, before, "HTTP/2")
    _others_are_served(mesh)


def test_a_silent_client_is_disconnected(mesh: Mesh) -> None:
    """Who never finishes TLS holds nothing for longer than the handshake's time limit."""
    before = len(_errors_of(mesh))
    with mesh.outside_client.connect(mesh.server.ip4, HBONE_PORT, timeout=20) as connection:
        try:
            assert connection.recv(1) == b""
        except ConnectionResetError:
            pass
    assert _new_error(mesh, before, "timed out")


def test_capture_ports_take_redirected_connections_only(mesh: Mesh) -> None:
    for port in (15001, 15006):
        with pytest.raises(ConnectionError), mesh.outside_client.connect(mesh.server.ip4, port) as connection:
            connection.sendall(b"hello")
            assert connection.recv(1) == b""
            raise AssertionError("it ended in order")


def test_a_server_of_another_identity_is_not_talked_to(mesh: Mesh) -> None:
    """Somebody who took over a pod's address has no certificate of its identity: no byte is sent to him."""
    lab = mesh.lab
    impostor = lab.pod("impostor", 2, service_account="impostor")
    try:
        lab.join(impostor)
        # The model says that this address is the server account's.
        lab.change(
            lab.state.upsert_workload(
                lab.workload(impostor, hbone=True, service_account="server"),
            )
        )
        with impostor.listen(8080) as listener:
            listener.settimeout(1)
            with pytest.raises(ConnectionError), mesh.client.connect(impostor.ip4, 8080) as connection:
                connection.sendall(b"secret")
                assert connection.recv(1) == b""
            with pytest.raises(TimeoutError):
                listener.accept()
        wrong = [e["error"] for e in lab.nodes[1].access_log() if "error" in e and "impostor" in e["error"]]
        assert wrong, "the log says who answered"
    finally:
        lab.leave(impostor)
        lab.remove(impostor)
