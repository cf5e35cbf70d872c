"""TLS over memory BIOs, through pyOpenSSL's public calls and through its binding: the same to the caller."""

import os
import subprocess
import sys

import pytest
from OpenSSL import SSL

from ztunnel.identity.ca import Authority
from ztunnel.identity.testing import CLIENT, SERVER, hostile_context, workload
from ztunnel.identity.tls import mesh_context, verify_peer
from ztunnel.proxy import tls

AUTHORITY = Authority.create()


@pytest.fixture(params=[tls.PublicEngine, tls.BindingEngine], ids=["public", "binding"])
def kind(request: pytest.FixtureRequest) -> type[tls.PublicEngine]:
    engine: type[tls.PublicEngine] = request.param
    return engine


def contexts() -> tuple[SSL.Context, SSL.Context]:
    return (
        tls.prepare(mesh_context(workload(AUTHORITY, CLIENT))),
        tls.prepare(mesh_context(workload(AUTHORITY, SERVER))),
    )


def move(source: tls.PublicEngine, target: tls.PublicEngine) -> int:
    """Take the ciphertext of one and feed it to the other; the number of bytes."""
    total = 0
    while size := len(view := source.take()):
        tls.received[:size] = view
        target.feed(size)
        total += size
    return total


def shake(client: tls.PublicEngine, server: tls.PublicEngine) -> None:
    done = [False, False]
    for _ in range(10):
        for number, (one, other) in enumerate(((client, server), (server, client))):
            done[number] = one.handshake()
            move(one, other)
        if all(done):
            return
    raise AssertionError("the handshake does not end")


@pytest.fixture
def joined(kind: type[tls.PublicEngine]) -> tuple[tls.PublicEngine, tls.PublicEngine]:
    client_tls, server_tls = contexts()
    client, server = kind(client_tls, False), kind(server_tls, True)
    shake(client, server)
    assert client.read() == server.read() == 0
    return client, server


Joined = tuple[tls.PublicEngine, tls.PublicEngine]


def test_the_binding_is_used_where_it_is_there() -> None:
    assert tls.Engine is tls.BindingEngine
    chosen = subprocess.run(
        [sys.executable, "-c", "from ztunnel.proxy import tls; print(tls.Engine.__name__)"],
        env={"AMBIENT_TLS": "public"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert chosen.stdout == "PublicEngine\n"


def test_both_know_each_other(joined: Joined) -> None:
    client, server = joined
    assert str(verify_peer(client.connection, "cluster.local", (SERVER,))) == SERVER
    assert str(verify_peer(server.connection, "cluster.local")) == CLIENT


@pytest.mark.parametrize("size", [0, 1, 16384, 16385, 300_000, 2_000_000])
def test_bytes_cross(joined: Joined, size: int) -> None:
    client, server = joined
    data = os.urandom(size)
    for source, target in ((client, server), (server, client)):
        received = bytearray()
        for start in range(0, size, 256 * 1024):
            buffer = bytearray(data[start : start + 256 * 1024])
            source.write(memoryview(buffer))
            move(source, target)
            while count := target.read():
                assert count <= tls.PLAIN
                received += tls.plain[:count]
        assert received == data
        assert target.read() == 0


def test_a_record_in_pieces(joined: Joined) -> None:
    client, server = joined
    client.write(b"hello")
    sealed = bytes(client.take())
    for byte in sealed[:-1]:
        tls.received[0] = byte
        server.feed(1)
        assert server.read() == 0
    tls.received[0] = sealed[-1]
    server.feed(1)
    assert server.read() == 5
    assert bytes(tls.plain[:5]) == b"hello"


def test_an_orderly_end_comes_after_the_data(joined: Joined) -> None:
    client, server = joined
    client.write(b"x" * 20_000)
    client.close()
    move(client, server)
    total = 0
    with pytest.raises(tls.TlsClosed):
        while True:
            total += server.read()
    assert total == 20_000
    with pytest.raises(tls.TlsError):
        server.read()


@pytest.mark.parametrize("before", [0, 32_768, 40_000])
def test_a_forged_record_is_an_error_with_its_reason(joined: Joined, before: int) -> None:
    """Also behind good ones that are read in the same call: OpenSSL says why only once."""
    client, server = joined
    client.write(b"x" * before) if before else None
    client.write(b"hello")
    sealed = bytearray(client.take())
    sealed[-1] ^= 1
    tls.received[: len(sealed)] = sealed
    server.feed(len(sealed))
    total = 0
    with pytest.raises(tls.TlsError, match="bad record mac") as caught:
        while True:
            total += server.read()
    assert total == before
    assert not isinstance(caught.value, tls.TlsClosed)
    with pytest.raises(tls.TlsError):
        server.read()
    # It disturbs no other connection.
    client_tls, server_tls = contexts()
    shake(type(client)(client_tls, False), type(server)(server_tls, True))


def test_a_refusal_leaves_an_alert_to_be_sent(kind: type[tls.PublicEngine]) -> None:
    """The peer learns why: the alert stands in the BIO after the handshake failed."""
    _, server_tls = contexts()
    hostile = kind(tls.prepare(hostile_context("expired", AUTHORITY)), False)
    server = kind(server_tls, True)
    with pytest.raises(tls.TlsError, match="has expired"):
        shake(hostile, server)
    assert move(server, hostile) > 0
    with pytest.raises(tls.TlsError, match="expired"):
        hostile.handshake()
        hostile.read()


@pytest.mark.parametrize("role", ["client", "server"])
def test_garbage_instead_of_a_handshake(kind: type[tls.PublicEngine], role: str) -> None:
    client_tls, server_tls = contexts()
    engine = kind(server_tls if role == "server" else client_tls, role == "server")
    assert engine.handshake() is False
    tls.received[:40] = b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n12345"
    engine.feed(40)
    with pytest.raises(tls.TlsError):
        engine.handshake()
