"""Chain verification by OpenSSL, outside of a handshake; no other file judges a chain."""

from collections.abc import Iterable
from datetime import UTC, datetime

from cryptography import x509
from OpenSSL import crypto

from ztunnel.identity.errors import CertificateError


def verify(
    certificate: x509.Certificate,
    intermediates: Iterable[x509.Certificate],
    roots: Iterable[x509.Certificate],
    at: float,
) -> None:
    """Raise CertificateError unless `certificate` chains to one of `roots` at the time `at` (Unix seconds)."""
    store = crypto.X509Store()
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    store.set_time(datetime.fromtimestamp(at, UTC))
    untrusted = [crypto.X509.from_cryptography(one) for one in intermediates]
    try:
        crypto.X509StoreContext(
            store, crypto.X509.from_cryptography(certificate), untrusted
        ).verify_certificate()
    except crypto.X509StoreContextError as error:
        subject = error.certificate.to_cryptography().subject.rfc4514_string() or "the leaf"
        raise CertificateError(f"{error} (certificate {subject!r})") from None
