"""Both directions of the mesh's TLS against friends and every kind of hostile peer, in real handshakes."""

import gc
import logging
import ssl
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
from OpenSSL import SSL

from ztunnel.identity import testing, tls
from ztunnel.identity.ca import Authority
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import (
    AlpnError,
    CertificateError,
    HandshakeError,
    PeerCertificateError,
    PeerError,
    PeerIdentityError,
    TrustDomainError,
)
from ztunnel.identity.spiffe import SpiffeId

# Kind of peer -> what our side raises and says about it.
REFUSALS: dict[str, tuple[type[PeerError], str]] = {
    "other trust domain": (TrustDomainError, "evil.cluster.local.*expected 'cluster.local'"),
    "other authority": (HandshakeError, "issuer is not one of our roots"),
    "self-signed": (HandshakeError, "default/sa/.*self-signed"),
    "expired": (HandshakeError, "default/sa/.*has expired"),
    "not yet valid": (HandshakeError, "default/sa/.*not valid yet"),
    "wrong usage": (HandshakeError, "default/sa/.*extended key usage"),
    "authority": (PeerCertificateError, "certificate authority's"),
    "two identities": (PeerCertificateError, "2 URI SANs"),
    "no identity": (PeerCertificateError, "0 URI SANs"),
    "foreign path": (PeerCertificateError, "the path is not"),
    "TLS 1.2": (HandshakeError, "TLS 1.3"),
    "no ALPN": (AlpnError, "no ALPN protocol, expected 'h2'"),
    "other ALPN": (AlpnError, r"\['http/1.1'\], expected 'h2'"),
    "no certificate": (HandshakeError, "presented no certificate"),
}


def test_every_hostile_kind_has_its_refusal() -> None:
    assert set(REFUSALS) == set(testing.HOSTILE)


def test_both_sides_learn_who_the_other_is(client_context: SSL.Context, server_context: SSL.Context) -> None:
    client, server = testing.handshake(client_context, server_context)
    assert client.get_protocol_version_name() == server.get_protocol_version_name() == "TLSv1.3"
    assert client.get_alpn_proto_negotiated() == server.get_alpn_proto_negotiated() == b"h2"
    assert tls.verify_peer(client, "cluster.local", [testing.SERVER]) == SpiffeId.parse(testing.SERVER)
    assert tls.verify_peer(server, "cluster.local") == SpiffeId.parse(testing.CLIENT)
    client.sendall(b"hello")
    testing.transfer(client, server)
    assert server.recv(100) == b"hello"


@pytest.mark.parametrize("kind", testing.HOSTILE)
def test_the_server_refuses(kind: str, authority: Authority, server_context: SSL.Context) -> None:
    refused, complaint = REFUSALS[kind]
    result = testing.attempt(testing.hostile_context(kind, authority), server_context)
    with pytest.raises(refused, match=complaint):
        if result.server_error is not None:
            raise tls.handshake_error(result.server, result.server_error)
        tls.verify_peer(result.server, "cluster.local")
    if refused is HandshakeError or kind == "other ALPN":
        assert result.client_error is not None, "the client was not told"


@pytest.mark.parametrize("kind", [kind for kind in testing.HOSTILE if kind != "no certificate"])
def test_the_client_refuses(kind: str, authority: Authority, client_context: SSL.Context) -> None:
    refused, complaint = REFUSALS[kind]
    if kind == "other ALPN":  # OpenSSL itself refuses an answer that was not offered (RFC 7301, 3.1)
        refused, complaint = HandshakeError, "bad extension"
    hostile = testing.hostile_context(kind, authority, testing.SERVER, server=True)
    result = testing.attempt(client_context, hostile)
    with pytest.raises(refused, match=complaint):
        if result.client_error is not None:
            raise tls.handshake_error(result.client, result.client_error)
        tls.verify_peer(result.client, "cluster.local", [testing.SERVER])


def test_the_hostile_peers_would_be_let_in_by_a_lax_one(
    authority: Authority, client_context: SSL.Context, server_context: SSL.Context
) -> None:
    """Nothing but our checks refuses them: without the hostile trait the same contexts get through."""
    plain = testing.hostile_context("no ALPN", authority)
    plain.set_alpn_protos([b"h2"])
    result = testing.attempt(plain, server_context)
    assert result.server_error is None
    assert tls.verify_peer(result.server, "cluster.local") == SpiffeId.parse(testing.CLIENT)
    for kind in testing.HOSTILE:
        lax = testing.hostile_context(kind, authority)
        lax_server = testing.hostile_context("no ALPN", authority, testing.SERVER, server=True)
        result = testing.attempt(lax, lax_server)
        assert (result.client_error, result.server_error) == (None, None), kind


def test_handshake_raises_what_the_refusing_side_says(
    authority: Authority, server_context: SSL.Context
) -> None:
    with pytest.raises(HandshakeError, match="has expired"):
        testing.handshake(testing.hostile_context("expired", authority), server_context)
    with pytest.raises(AlpnError, match=r"http/1\.1"):
        testing.handshake(testing.hostile_context("other ALPN", authority), server_context)


def test_an_unexpected_workload_is_refused(client_context: SSL.Context, server_context: SSL.Context) -> None:
    client, _ = testing.handshake(client_context, server_context)
    with pytest.raises(PeerIdentityError, match=r"the peer is .*sa/server, expected .*sa/other"):
        tls.verify_peer(client, "cluster.local", {"spiffe://cluster.local/ns/default/sa/other"})
    with pytest.raises(PeerIdentityError, match="expected nobody"):
        tls.verify_peer(client, "cluster.local", [])
    many = [f"spiffe://cluster.local/ns/default/sa/s{number}" for number in range(10)]
    with pytest.raises(PeerIdentityError, match="or 7 more"):
        tls.verify_peer(client, "cluster.local", many)
    assert tls.verify_peer(client, "cluster.local", frozenset([*many, testing.SERVER]))


def test_one_expected_identity_given_as_text_is_not_searched_for_parts(
    client_context: SSL.Context, server_context: SSL.Context
) -> None:
    client, _ = testing.handshake(client_context, server_context)
    assert tls.verify_peer(client, "cluster.local", testing.SERVER)
    with pytest.raises(PeerIdentityError):
        tls.verify_peer(client, "cluster.local", testing.SERVER + "-2")


def test_nobody_is_verified_before_the_handshake_is_over(
    client_context: SSL.Context, server_context: SSL.Context
) -> None:
    client, server = SSL.Connection(client_context, None), SSL.Connection(server_context, None)
    client.set_connect_state()
    server.set_accept_state()
    for one in (client, server):
        with pytest.raises(HandshakeError, match="not finished"):
            tls.verify_peer(one, "cluster.local")
    for one, other in ((client, server), (server, client)):
        with pytest.raises(SSL.WantReadError):
            one.do_handshake()
        testing.transfer(one, other)
    # The server has answered, the client's certificate is still to come.
    with pytest.raises(HandshakeError, match="not finished"):
        tls.verify_peer(server, "cluster.local")


def test_one_context_is_good_for_both_sides(client_context: SSL.Context, server_context: SSL.Context) -> None:
    """Each calls the other, and itself."""
    for one, other in ((client_context, server_context), (server_context, client_context)):
        client, server = testing.handshake(one, other)
        assert client.get_alpn_proto_negotiated() == server.get_alpn_proto_negotiated() == b"h2"
        assert {str(tls.verify_peer(end, "cluster.local")) for end in (client, server)} == {
            testing.CLIENT,
            testing.SERVER,
        }
    client, server = testing.handshake(client_context, client_context)
    assert str(tls.verify_peer(client, "cluster.local")) == testing.CLIENT


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "plain HTTP"),
        (b"CONNECT 10.0.0.1:80 HTTP/1.1\r\n\r\n", "plain HTTP CONNECT"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "does not speak TLS"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak TLS"),
    ],
)
def test_plain_text_is_named(sent: bytes, told: str, server_context: SSL.Context) -> None:
    server = SSL.Connection(server_context, None)
    server.set_accept_state()
    server.bio_write(sent)
    with pytest.raises(SSL.Error) as caught:
        server.do_handshake()
    assert told in str(tls.handshake_error(server, caught.value))


def test_a_peer_that_goes_away_is_named(server_context: SSL.Context) -> None:
    server = SSL.Connection(server_context, None)
    server.set_accept_state()
    server.bio_shutdown()
    with pytest.raises(SSL.Error) as caught:
        server.do_handshake()
    assert "closed the connection" in str(tls.handshake_error(server, caught.value))


def test_an_unknown_error_is_shown_as_it_is(server_context: SSL.Context) -> None:
    server = SSL.Connection(server_context, None)
    error = SSL.Error([("SSL routines", "", "something new")])
    assert str(tls.handshake_error(server, error)) == "TLS handshake: something new"


def test_several_roots_are_all_trusted(client_context: SSL.Context, authority: Authority) -> None:
    """During a change of roots the bundle holds the old and the new one."""
    other = Authority.create()
    own = testing.workload(other, testing.SERVER)
    both = WorkloadCertificate(
        own.identity,
        own.key_pem,
        own.chain_pem,
        authority.root_pem + other.root_pem,
        own.not_before,
        own.not_after,
    )
    with pytest.raises(HandshakeError):
        testing.handshake(client_context, tls.mesh_context(both))
    mine = testing.workload(authority)
    trusting = WorkloadCertificate(
        mine.identity, mine.key_pem, mine.chain_pem, both.roots_pem, mine.not_before, mine.not_after
    )
    client, server = testing.handshake(tls.mesh_context(trusting), tls.mesh_context(both))
    assert tls.verify_peer(client, "cluster.local", [testing.SERVER])
    assert tls.verify_peer(server, "cluster.local", [testing.CLIENT])


def test_contexts_serve_many_connections_and_refusals_do_not_stick(
    authority: Authority, client_context: SSL.Context, server_context: SSL.Context
) -> None:
    for kind in ("expired", "other ALPN", "no certificate", "TLS 1.2"):
        assert testing.attempt(testing.hostile_context(kind, authority), server_context).server_error
        _, server = testing.handshake(client_context, server_context)
        assert tls.verify_peer(server, "cluster.local")


def test_a_refused_connection_is_not_kept(authority: Authority, server_context: SSL.Context) -> None:
    result = testing.attempt(testing.hostile_context("expired", authority), server_context)
    gone = weakref.ref(result.server)
    del result
    gc.collect()
    assert gone() is None


def test_workers_load_little_with_it() -> None:
    program = "import sys, ztunnel.identity.tls; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"trio", "asyncio", "google", "grpclib", "pyroute2", "msgspec", "scapy"}
    ours = {name for name in done.stdout.split() if name.startswith("ztunnel.identity.")}
    assert not ours & {"ztunnel.identity.rotation", "ztunnel.identity.ca", "ztunnel.identity.ca_files"}


def test_a_bundle_that_does_not_fit_is_refused_without_its_key(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    good, other = testing.workload(authority), testing.workload(authority)
    secret = other.key_pem.decode().splitlines()[1]

    def bundle(key: bytes, chain: bytes, roots: bytes) -> WorkloadCertificate:
        return WorkloadCertificate(good.identity, key, chain, roots, good.not_before, good.not_after)

    for bad, complaint in (
        (bundle(other.key_pem, good.chain_pem, good.roots_pem), "key is malformed or not the leaf's"),
        (bundle(other.key_pem[:-40], good.chain_pem, good.roots_pem), "key is malformed"),
        (bundle(good.key_pem, b"", good.roots_pem), "chain"),
        (bundle(good.key_pem, good.chain_pem, b"nothing"), "roots"),
    ):
        with pytest.raises(CertificateError, match=complaint) as caught:
            tls.mesh_context(bad)
        assert good.identity in str(caught.value)
        assert secret not in str(caught.value)
        assert caught.value.__cause__ is None
        assert secret not in repr(bad)
    assert secret not in caplog.text


class _Stdlib:
    """One end of Python's own TLS over memory BIOs, as a second implementation and witness."""

    def __init__(self, context: ssl.SSLContext, *, server: bool, session: ssl.SSLSession | None = None):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=server, session=session)

    def talk(self, ours: SSL.Connection) -> None:
        """Run both ends until neither has more to say."""
        while True:
            for step in (self.tls.do_handshake, lambda: self.tls.read(1)):
                try:
                    step()
                except ssl.SSLWantReadError:
                    pass
            sent = self.outgoing.read()
            if sent:
                ours.bio_write(sent)
            try:
                ours.do_handshake()
                ours.recv(1)
            except SSL.WantReadError:
                pass
            try:
                answer = ours.bio_read(65536)
            except SSL.WantReadError:
                answer = b""
            self.incoming.write(answer)
            if not sent and not answer:
                return


def _stdlib_context(protocol: int, certificate: WorkloadCertificate, directory: Path) -> ssl.SSLContext:
    (directory / "stdlib.pem").write_bytes(certificate.key_pem + certificate.chain_pem)
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate.roots_pem.decode())
    context.load_cert_chain(directory / "stdlib.pem")
    context.set_alpn_protocols(["h2"])
    return context


def _second_visit(stdlib: ssl.SSLContext, ours: SSL.Context) -> tuple[_Stdlib, SSL.Connection]:
    """A client that visits, keeps every session it is given, and comes back with it."""
    session = None
    for _ in range(2):
        server = SSL.Connection(ours, None)
        server.set_accept_state()
        client = _Stdlib(stdlib, server=False, session=session)
        client.talk(server)
        session = client.tls.session
    return client, server


def test_no_session_is_resumed_by_the_server(
    authority: Authority, server_context: SSL.Context, tmp_path: Path
) -> None:
    stdlib = _stdlib_context(ssl.PROTOCOL_TLS_CLIENT, testing.workload(authority), tmp_path)
    client, server = _second_visit(stdlib, server_context)
    assert client.tls.version() == "TLSv1.3"
    assert not client.tls.session_reused
    assert tls.verify_peer(server, "cluster.local") == SpiffeId.parse(testing.CLIENT)

    # The same visitor is resumed by a server with OpenSSL's defaults, so the check above can fail.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        defaults = SSL.Context(SSL.TLS_METHOD)
        tls.use_certificate(defaults, testing.workload(authority, testing.SERVER))
        defaults.set_session_id(b"defaults")
    client, _ = _second_visit(stdlib, defaults)
    assert client.tls.session_reused


def test_no_session_is_resumed_by_the_client(
    authority: Authority, client_context: SSL.Context, tmp_path: Path
) -> None:
    stdlib = _stdlib_context(ssl.PROTOCOL_TLS_SERVER, testing.workload(authority, testing.SERVER), tmp_path)
    for _ in range(3):
        client = SSL.Connection(client_context, None)
        client.set_connect_state()
        server = _Stdlib(stdlib, server=True)
        server.talk(client)
        assert tls.verify_peer(client, "cluster.local", [testing.SERVER])
        assert server.tls.getpeercert()
        assert not server.tls.session_reused
