"""TLS contexts of the mesh and the check of who the peer is. Workers import this file: keep its imports few.

Contexts are made once per certificate and used for any number of connections, as
`SSL.Connection(context, None)` over memory BIOs or on a socket. Chains are verified by OpenSSL in the
handshake; what OpenSSL cannot know (the protocol, the SPIFFE identity) is checked by `verify_peer` right
after it, and no byte may be passed on before that.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from ztunnel.identity import crl
from ztunnel.identity.certs import WorkloadCertificate, uri_names
from ztunnel.identity.errors import (
    AlpnError,
    CertificateError,
    HandshakeError,
    PeerCertificateError,
    PeerIdentityError,
    RevokedError,
    SpiffeIdError,
    TrustDomainError,
)
from ztunnel.identity.spiffe import SpiffeId

ALPN = b"h2"

# Longest chain that is looked at, leaf and root not counted: a hostile peer may send many certificates.
MAX_INTERMEDIATES = 8

# OpenSSL's SSL_MODE_RELEASE_BUFFERS, which pyOpenSSL does not name: an idle connection gives its record buffers
# back. Measured: 87 instead of 111 KiB for both ends of a connection; 3 % of the time of a 100-byte record
# there and back, nothing on bulk.
_MODE_RELEASE_BUFFERS = 0x10

# What to tell an operator for OpenSSL's X509_V_ERR_* numbers (x509_vfy.h); others are shown as their number.
_CHAIN_ERRORS = {
    7: "its signature does not verify",
    8: "its issuer's revocation list has a signature that does not verify",
    9: "it is not valid yet (compare the clocks of both nodes)",
    10: "it has expired (its proxy could not renew it; look at that node's certificates)",
    18: "it is self-signed and not one of our roots",
    19: "its chain ends in a root that is not ours (another certificate authority?)",
    20: "its issuer is not one of our roots (another certificate authority, or an intermediate is missing)",
    21: "its issuer is not one of our roots (another certificate authority, or an intermediate is missing)",
    22: "its chain is too long",
    23: "it is revoked",
    24: "it was issued by a certificate that is not a certificate authority",
    25: "its chain is longer than its certificate authority permits",
    26: "its key usage or extended key usage does not permit this side of TLS",
    35: "its issuer signed a revocation list and may not",
    79: "it was issued by a certificate that is not a certificate authority",
}

# What to tell an operator for OpenSSL's reasons: ours, then the alerts a peer sends.
_REASONS = {
    "peer did not return a certificate": "the client presented no certificate; HBONE needs mutual TLS",
    "unsupported protocol": "the peer does not support TLS 1.3",
    "wrong version number": "the peer does not speak TLS (plain text on an HBONE port?)",
    "http request": "the peer sent plain HTTP to an HBONE port",
    "https proxy request": "the peer sent a plain HTTP CONNECT to an HBONE port",
    "packet length too long": "the peer does not speak TLS (plain text on an HBONE port?)",
    "unexpected eof while reading": "the peer closed the connection during the handshake",
    "no application protocol": "the peer refused our ALPN protocol h2 (not an HBONE port?)",
    "protocol version": "the peer refused TLS 1.3",
    "unknown ca": "the peer does not trust our certificate's authority",
    "bad certificate": "the peer refused our certificate",
    "certificate expired": "the peer found our certificate expired",
    "certificate required": "the peer asked for a certificate and got none",
    "unsupported certificate": "the peer refused our certificate for its (extended) key usage",
}

# Why OpenSSL refused a peer's chain, until `handshake_error` asks; pyOpenSSL's own error does not say.
_refusals: WeakKeyDictionary[SSL.Connection, HandshakeError] = WeakKeyDictionary()


class Peer(NamedTuple):
    """Who is at the other end, and until when its certificate says so (Unix seconds)."""

    identity: SpiffeId
    not_after: float


def mesh_context(certificate: WorkloadCertificate, revocations: Sequence[crl.List] = ()) -> SSL.Context:
    """The context of HBONE's clients and servers with `certificate`: TLS 1.3, `h2`, and a peer with a certificate.

    A peer is refused whose certificate, or one above it, is in `revocations` (see `crl.tolerated` for what is not
    known of).

    A client that offers ALPN without `h2` is refused in the handshake, by AlpnError out of
    `do_handshake`; one that offers no ALPN only by `verify_peer` (OpenSSL has no hook for it).
    Names are not checked here: `verify_peer` compares the peer's identity with the one expected.
    One for both sides, as each is 32 KiB: what is set for one side only does nothing on the other.
    Raises CertificateError if the bundle is malformed.
    """
    context = _context(certificate, revocations)
    context.set_alpn_protos([ALPN])  # a client's
    context.set_alpn_select_callback(_select_protocol)  # a server's
    # For clients that offer a session: without it they would fail instead of doing a full handshake.
    context.set_session_id(b"hbone")
    return context


def verify_peer(
    connection: SSL.Connection, trust_domain: str, expected: Collection[str] | None = None
) -> SpiffeId:
    """The identity of `check_peer`'s answer."""
    return check_peer(connection, trust_domain, expected).identity


def check_peer(
    connection: SSL.Connection, trust_domain: str, expected: Collection[str] | None = None
) -> Peer:
    """The identity of `connection`'s peer, whose chain OpenSSL verified in the finished handshake.

    The peer has to have agreed on `h2`, its certificate has to be an X.509 SVID (exactly one URI SAN, not a
    certificate authority: SPIFFE X509-SVID, sections 2 and 5) of `trust_domain`, and its SPIFFE id one of
    `expected` unless that is None (an empty collection permits nobody).
    Raises HandshakeError, AlpnError, PeerCertificateError, TrustDomainError or PeerIdentityError.
    """
    if connection.get_peer_finished() is None:
        raise HandshakeError("the TLS handshake is not finished: the peer is not known yet")
    protocol = connection.get_alpn_proto_negotiated()
    if protocol != ALPN:
        negotiated = (
            f"ALPN protocol {protocol.decode(errors='replace')!r}" if protocol else "no ALPN protocol"
        )
        raise AlpnError(f"the peer negotiated {negotiated}, expected 'h2'")
    certificate = connection.get_peer_certificate(as_cryptography=True)
    if certificate is None:
        raise PeerCertificateError("the peer presented no certificate; HBONE needs mutual TLS")
    peer = _svid_identity(certificate)
    if peer.trust_domain != trust_domain:
        raise TrustDomainError(
            f"the peer is {peer}, of trust domain {peer.trust_domain!r}; expected {trust_domain!r}"
        )
    if isinstance(expected, str):  # `in` would accept any part of it
        expected = (expected,)
    if expected is not None and str(peer) not in expected:
        raise PeerIdentityError(f"the peer is {peer}, expected {_listed(expected)}")
    return Peer(peer, certificate.not_valid_after_utc.timestamp())


def handshake_error(connection: SSL.Connection, error: SSL.Error) -> HandshakeError | AlpnError:
    """`error`, which `connection.do_handshake()` or a later read raised, in an operator's words."""
    if isinstance(error, AlpnError):
        return error
    refusal = _refusals.pop(connection, None)
    if refusal is not None:
        return refusal
    if isinstance(error, SSL.ZeroReturnError | SSL.SysCallError):
        return HandshakeError("TLS handshake: the peer closed the connection")
    reasons = [entry[2] for entry in error.args[0]] if error.args and isinstance(error.args[0], list) else []
    for reason in reasons:
        if "certificate revoked" in reason.lower():
            return RevokedError(
                "TLS handshake: the peer found our certificate, or one of its authorities, revoked"
            )
        for known, told in _REASONS.items():
            if known in reason.lower():
                return HandshakeError(f"TLS handshake: {told}")
    return HandshakeError(f"TLS handshake: {', '.join(reasons) or error or type(error).__name__}")


def use_certificate(context: SSL.Context, certificate: WorkloadCertificate) -> None:
    """Give `context` the key and chain of `certificate`, nothing else. Raises CertificateError."""
    where = f"certificate bundle of {certificate.identity}"
    try:
        leaf, *intermediates = x509.load_pem_x509_certificates(certificate.chain_pem)
    except ValueError as error:
        raise CertificateError(f"{where}: its chain is not PEM certificates: {error}") from None
    context.use_certificate(leaf)
    for one in intermediates:
        context.add_extra_chain_cert(one)
    try:
        context.use_privatekey(load_pem_private_key(certificate.key_pem, None))  # type: ignore[arg-type]
        context.check_privatekey()
    except (SSL.Error, ValueError, TypeError):
        # The cause is left out: it may quote the key.
        raise CertificateError(f"{where}: the key is malformed or not the leaf's") from None


def _context(certificate: WorkloadCertificate, revocations: Sequence[crl.List]) -> SSL.Context:
    where = f"certificate bundle of {certificate.identity}"
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_mode(_MODE_RELEASE_BUFFERS)
    # Every connection verifies its peer anew. pyOpenSSL cannot set the number of TLS 1.3 tickets to 0; with
    # OP_NO_TICKET they are references into the session cache, which is off, so none is ever honoured.
    context.set_options(SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    use_certificate(context, certificate)
    try:
        roots = x509.load_pem_x509_certificates(certificate.roots_pem)
    except ValueError as error:
        raise CertificateError(f"{where}: its roots are not PEM certificates: {error}") from None
    store = context.get_cert_store()
    if store is None:
        raise CertificateError(f"{where}: OpenSSL has no certificate store")
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    # A root of ours may itself be issued by somebody whom we need not know.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    crl.use(store, revocations)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _note_refusal)
    context.set_verify_depth(MAX_INTERMEDIATES)
    return context


def _select_protocol(_connection: SSL.Connection, offered: list[bytes]) -> bytes:
    if ALPN in offered:
        return ALPN
    # Returning NO_OVERLAPPING_PROTOCOLS would go on without ALPN (pyOpenSSL maps it to SSL_TLSEXT_ERR_NOACK);
    # only an exception sends the alert no_application_protocol.
    names = [one[:32].decode(errors="replace") for one in offered[:8]]
    raise AlpnError(f"the client offers the ALPN protocols {names}, expected 'h2'")


def _note_refusal(
    connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int, verified: int
) -> bool:
    """OpenSSL's verdict, but for lists that are missing or old; its reason is kept for `handshake_error`."""
    if verified or crl.tolerated(code):
        return True
    parsed = certificate.to_cryptography()
    try:
        names = uri_names(parsed)
    except CertificateError:
        names = []
    name = names[0] if names else parsed.subject.rfc4514_string()
    told = _CHAIN_ERRORS.get(code, f"X.509 verification error {code}")
    kind = RevokedError if code == crl.REVOKED else HandshakeError
    _refusals[connection] = kind(f"the peer's certificate {name[:300]!r} (depth {depth}) was refused: {told}")
    return False


def _svid_identity(certificate: x509.Certificate) -> SpiffeId:
    try:
        uris = uri_names(certificate)
        extensions = certificate.extensions
    except CertificateError as error:
        raise PeerCertificateError(f"the peer's certificate: {error}") from None
    if len(uris) != 1:
        raise PeerCertificateError(
            f"the peer's certificate has {len(uris)} URI SANs ({_listed(uris)}), expected exactly one SPIFFE id"
        )
    for extension in extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            raise PeerCertificateError(f"the peer's certificate ({uris[0]}) is a certificate authority's")
        if isinstance(value, x509.KeyUsage) and (value.key_cert_sign or value.crl_sign):
            raise PeerCertificateError(f"the peer's certificate ({uris[0]}) may sign certificates or CRLs")
    try:
        return SpiffeId.parse(uris[0])
    except SpiffeIdError as error:
        raise PeerCertificateError(f"the peer's certificate: {error}") from None


def _listed(names: Collection[str]) -> str:
    some = sorted(names)[:3]
    more = len(names) - len(some)
    return (", ".join(some) or "nobody") + (f" or {more} more" if more else "")
