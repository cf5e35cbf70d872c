"""Private keys (P-256), their PEM form, and certificate signing requests."""

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from ztunnel.identity.spiffe import SpiffeId

PrivateKey = ec.EllipticCurvePrivateKey


def generate() -> PrivateKey:
    """A new P-256 key, which every TLS 1.3 peer has to support (RFC 8446, section 9.1)."""
    return ec.generate_private_key(ec.SECP256R1())


def to_pem(key: PrivateKey | rsa.RSAPrivateKey) -> bytes:
    """`key` as an unencrypted PKCS #8 PEM block. Never log it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def csr(key: PrivateKey, identity: str) -> bytes:
    """A PEM signing request for `identity` (a SPIFFE id), signed with `key`. Raises SpiffeIdError.

    The subject is empty and the identity is the one URI SAN. An authority decides itself what it certifies;
    the name in here lets it (and Istio's) compare.
    """
    uri = x509.UniformResourceIdentifier(str(SpiffeId.parse(identity)))
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([uri]), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
