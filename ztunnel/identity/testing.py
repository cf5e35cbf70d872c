"""For tests: throw-away authorities, certificates of any kind, hostile contexts, handshakes in memory.

Not for the product's own paths: `forge` signs whatever it is told to.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL

from ztunnel.identity import keys, templates, tls
from ztunnel.identity.ca import Authority
from ztunnel.identity.certs import WorkloadCertificate

CLIENT = "spiffe://cluster.local/ns/default/sa/client"
SERVER = "spiffe://cluster.local/ns/default/sa/server"

HOSTILE = (
    "other trust domain",  # the same authority, another trust domain
    "other authority",
    "self-signed",
    "expired",
    "not yet valid",
    "wrong usage",  # the extended key usage of the other side of TLS
    "authority",  # a certificate that may sign certificates
    "two identities",
    "no identity",
    "foreign path",  # a SPIFFE id, but no Kubernetes workload's
    "TLS 1.2",
    "no ALPN",
    "other ALPN",
    "no certificate",  # clients only
)
"""Kinds of `hostile_context`. All of them have to be refused by a mesh peer of the authority."""


class Attempt(NamedTuple):
    """Both ends of a handshake in memory and what each of them raised, None where it succeeded."""

    client: SSL.Connection
    server: SSL.Connection
    client_error: SSL.Error | None
    server_error: SSL.Error | None


def workload(authority: Authority, identity: str = CLIENT, ttl: int = 3600) -> WorkloadCertificate:
    """A certificate for `identity` from `authority`, the way a proxy gets one; `ttl` in seconds."""
    key = keys.generate()
    chain = authority.sign(keys.csr(key, identity), identity, ttl)
    return WorkloadCertificate.from_signed(identity, key, chain, time.time())


def forge(
    authority: Authority,
    names: Sequence[x509.GeneralName | str] = (CLIENT,),
    *,
    not_before: float | None = None,
    not_after: float | None = None,
    usages: Sequence[x509.ObjectIdentifier] = (
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    ),
    is_authority: bool = False,
) -> WorkloadCertificate:
    """A certificate that `authority` itself would never sign; `names` are URIs where they are strings.

    Times in Unix seconds, by default an hour from now. Its identity is the first URI, or "".
    """
    now = time.time()
    key = keys.generate()
    builder = templates.leaf(
        key.public_key(),
        authority.certificate,
        now - templates.BACKDATING if not_before is None else not_before,
        now + 3600 if not_after is None else not_after,
        [x509.UniformResourceIdentifier(one) if isinstance(one, str) else one for one in names],
        usages,
        is_authority=is_authority,
    )
    leaf = builder.sign(authority.key, authority._hash)
    return WorkloadCertificate(
        next((one for one in names if isinstance(one, str)), ""),
        keys.to_pem(key),
        b"".join(one.public_bytes(Encoding.PEM) for one in (leaf, *authority.chain)),
        authority.root_pem,
        leaf.not_valid_before_utc.timestamp(),
        leaf.not_valid_after_utc.timestamp(),
    )


def revoke(
    authority: Authority,
    revoked: Sequence[WorkloadCertificate | x509.Certificate],
    *,
    ends: float = 3600,
    key: templates.SigningKey | None = None,
    issuer: x509.Certificate | None = None,
) -> bytes:
    """A revocation list (PEM) of `authority`'s, or of `issuer` with its `key`; it ends in `ends` seconds."""
    now = time.time()
    certificate = authority.certificate if issuer is None else issuer
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(certificate.subject)
        .last_update(templates.utc(now - 7200))
        .next_update(templates.utc(now + ends))
        .add_extension(templates.issuer_key(certificate), critical=False)
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    for one in revoked:
        leaf = x509.load_pem_x509_certificate(one.chain_pem) if isinstance(one, WorkloadCertificate) else one
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(leaf.serial_number)
            .revocation_date(templates.utc(now - 7200))
            .build()
        )
    signing = authority.key if key is None else key
    return builder.sign(signing, templates.hash_for(signing.public_key())).public_bytes(Encoding.PEM)


def hostile_certificate(
    kind: str, authority: Authority, identity: str, *, server: bool
) -> WorkloadCertificate:
    """The certificate that a hostile `kind` of peer shows; of `identity` where the kind leaves it one."""
    now = time.time()
    match kind:
        case "other trust domain":
            return forge(authority, [identity.replace("spiffe://", "spiffe://evil.", 1)])
        case "other authority":
            # It knows the true root, so that it would go on with the handshake.
            return _with_roots(workload(Authority.create(), identity), authority)
        case "self-signed":
            return _with_roots(_self_signed(identity), authority)
        case "expired":
            return forge(authority, [identity], not_before=now - 7200, not_after=now - 60)
        case "not yet valid":
            return forge(authority, [identity], not_before=now + 3600, not_after=now + 7200)
        case "wrong usage":
            side = ExtendedKeyUsageOID.CLIENT_AUTH if server else ExtendedKeyUsageOID.SERVER_AUTH
            return forge(authority, [identity], usages=[side])
        case "authority":
            return forge(authority, [identity], is_authority=True)
        case "two identities":
            return forge(authority, [identity, SERVER + "-2"])
        case "no identity":
            return forge(authority, [x509.DNSName("client.default.svc.cluster.local")])
        case "foreign path":
            return forge(authority, ["spiffe://cluster.local/vm/client"])
        case _ if kind in HOSTILE:
            return workload(authority, identity)
    raise ValueError(f"hostile kind {kind!r}: known are {', '.join(HOSTILE)}")


def hostile_context(
    kind: str, authority: Authority, identity: str = CLIENT, *, server: bool = False
) -> SSL.Context:
    """The TLS context of a peer that has to be refused, for one of the kinds in HOSTILE.

    It verifies nobody itself, so that only the other side can end the handshake. For `SSL.Connection` in
    memory or on a socket.
    """
    certificate = hostile_certificate(kind, authority, identity, server=server)
    context = SSL.Context(SSL.TLS_METHOD)
    if kind == "TLS 1.2":
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
    if kind != "no certificate" or server:
        tls.use_certificate(context, certificate)
    alpn = {"no ALPN": None, "other ALPN": b"http/1.1"}.get(kind, tls.ALPN)
    if alpn is not None and server:
        context.set_alpn_select_callback(lambda _connection, _offered: alpn)
    elif alpn is not None:
        context.set_alpn_protos([alpn])
    # The server asks for the client's certificate as every mesh server does, and takes any.
    context.set_verify(SSL.VERIFY_PEER if server else SSL.VERIFY_NONE, lambda *_verdict: True)
    return context


def attempt(client_context: SSL.Context, server_context: SSL.Context) -> Attempt:
    """Run a handshake in memory, whatever comes of it, until both ends have read what the other sent.

    In TLS 1.3 a client has finished before the server has judged its certificate: the server's refusal is
    read afterwards, as an alert, and is the client's error here.
    """
    client, server = SSL.Connection(client_context, None), SSL.Connection(server_context, None)
    client.set_connect_state()
    server.set_accept_state()
    return resume(client, server)


def resume(client: SSL.Connection, server: SSL.Connection) -> Attempt:
    """`attempt` with connections over memory BIOs that the caller has prepared."""
    errors: dict[SSL.Connection, SSL.Error] = {}
    moved = True
    while moved:
        moved = False
        for one, other in ((client, server), (server, client)):
            if one not in errors:
                try:
                    one.do_handshake()
                    one.recv(1)  # reads session tickets and alerts; nobody sends data here
                except SSL.WantReadError:
                    pass
                except SSL.Error as error:
                    errors[one] = error
            moved |= transfer(one, other) > 0
    for one in (client, server):
        if one not in errors and one.get_peer_finished() is None:
            errors[one] = SSL.SysCallError(-1, "the peer gave up without an alert")
    return Attempt(client, server, errors.get(client), errors.get(server))


def handshake(
    client_context: SSL.Context, server_context: SSL.Context
) -> tuple[SSL.Connection, SSL.Connection]:
    """Client and server connection after a successful handshake in memory.

    Raises HandshakeError (or AlpnError) as the proxy would tell it, of the side that refused.
    """
    result = attempt(client_context, server_context)
    # The side that refused knows why; the other one only got an alert.
    for connection, error in ((result.server, result.server_error), (result.client, result.client_error)):
        if error is not None and "alert" not in str(error):
            raise tls.handshake_error(connection, error)
    for connection, error in ((result.server, result.server_error), (result.client, result.client_error)):
        if error is not None:
            raise tls.handshake_error(connection, error)
    return result.client, result.server


def transfer(source: SSL.Connection, target: SSL.Connection) -> int:
    """Carry the ciphertext that `source` has ready to `target`; returns how many bytes."""
    total = 0
    while True:
        try:
            data = source.bio_read(65536)
        except SSL.WantReadError:
            return total
        target.bio_write(data)
        total += len(data)


def _self_signed(identity: str) -> WorkloadCertificate:
    now = time.time()
    key = keys.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "nobody")])
    leaf = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(templates.utc(now - 60))
        .not_valid_after(templates.utc(now + 3600))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=False
        )
        .sign(key, templates.hash_for(key.public_key()))
    )
    pem = leaf.public_bytes(Encoding.PEM)
    return WorkloadCertificate(identity, keys.to_pem(key), pem, pem, now - 60, now + 3600)


def _with_roots(certificate: WorkloadCertificate, authority: Authority) -> WorkloadCertificate:
    return WorkloadCertificate(
        certificate.identity,
        certificate.key_pem,
        certificate.chain_pem,
        authority.root_pem,
        certificate.not_before,
        certificate.not_after,
    )
