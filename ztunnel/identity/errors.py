"""Every error of the identity room; each message says what was expected, what came, and what to do."""

from OpenSSL import SSL


class IdentityError(Exception):
    """Base of everything this room raises on purpose."""


class SpiffeIdError(IdentityError, ValueError):
    """A text that is no SPIFFE id of a workload."""


class CertificateError(IdentityError, ValueError):
    """A key, certificate or bundle that cannot be used: malformed, mismatching, or for someone else."""


class CertificateUnavailableError(IdentityError):
    """No valid certificate for a workload of ours; `identity` says whose, the message why."""

    def __init__(self, identity: str, reason: str) -> None:
        super().__init__(f"no certificate for {identity}: {reason}")
        self.identity = identity
        self.reason = reason


class AuthorityError(IdentityError):
    """The certificate authority's own files or certificates cannot be used."""


class CsrError(IdentityError, ValueError):
    """A certificate signing request that the authority refuses to sign."""


class PeerError(IdentityError):
    """The other side of a TLS connection is not who it has to be; the connection must be closed."""


class HandshakeError(PeerError):
    """The TLS handshake failed; the message names the cause as an operator needs it."""


class RevokedError(HandshakeError):
    """One side's certificate, or an authority's above it, is revoked; whose, the message says."""


class AlpnError(PeerError, SSL.Error):
    """The peer does not speak `h2` over TLS (no ALPN, or another protocol).

    Also an `SSL.Error`, because the server's handshake raises it from inside OpenSSL's ALPN callback.
    """


class PeerCertificateError(PeerError):
    """The peer's certificate is missing or is no X.509 SVID (SPIFFE X509-SVID, section 5)."""


class TrustDomainError(PeerError):
    """The peer's identity belongs to another trust domain."""


class PeerIdentityError(PeerError):
    """The peer is a workload of the mesh, but not one of those expected here."""
