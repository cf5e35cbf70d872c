"""What the mesh's certificates look like: root, intermediate, leaf. Shapes only, no policy and no files."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from ztunnel.identity.errors import AuthorityError

ROOT_LIFETIME = 10 * 365 * 86400  # seconds
INTERMEDIATE_LIFETIME = 365 * 86400  # seconds; renewed when the control plane starts with half of it gone
BACKDATING = 120  # seconds that not_before lies in the past, for nodes whose clocks differ

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def make_root(key: SigningKey, now: float) -> x509.Certificate:
    """A self-signed root for `key`, from `now` (Unix seconds) for ROOT_LIFETIME."""
    name = _authority_name("Root CA")
    return _authority(key.public_key(), name, name, key.public_key(), now, now + ROOT_LIFETIME, 1).sign(
        key, hash_for(key.public_key())
    )


def make_intermediate(
    key: SigningKey, root_key: SigningKey, root: x509.Certificate, now: float
) -> x509.Certificate:
    """An intermediate for `key` that signs leaves only, from `now` for INTERMEDIATE_LIFETIME or the root's."""
    end = min(now + INTERMEDIATE_LIFETIME, root.not_valid_after_utc.timestamp())
    name = _authority_name("Intermediate CA")
    return _authority(key.public_key(), name, root.subject, root_key.public_key(), now, end, 0).sign(
        root_key, hash_for(root_key.public_key())
    )


def may_sign(certificate: x509.Certificate) -> bool:
    """Whether `certificate` says that it is a certificate authority's (RFC 5280, 4.2.1.3 and 4.2.1.9)."""
    constraints = usage = None
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.BasicConstraints):
            constraints = extension.value
        elif isinstance(extension.value, x509.KeyUsage):
            usage = extension.value
    return constraints is not None and constraints.ca and (usage is None or usage.key_cert_sign)


def leaf(
    public_key: PublicKey,
    issuer: x509.Certificate,
    not_before: float,
    not_after: float,
    names: Sequence[x509.GeneralName],
    usages: Sequence[x509.ObjectIdentifier],
    *,
    is_authority: bool = False,
) -> x509.CertificateBuilder:
    """A leaf without a subject, to be signed with `issuer`'s key; times in Unix seconds.

    `is_authority` is for tests: no leaf of the mesh may sign (SPIFFE X509-SVID, section 5.2).
    """
    usage = _key_usage(
        digital_signature=True,
        key_encipherment=isinstance(public_key, rsa.RSAPublicKey),
        key_cert_sign=is_authority,
    )
    return (
        _builder(public_key, x509.Name([]), issuer.subject, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        # Critical, because the subject is empty (RFC 5280, 4.2.1.6).
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .add_extension(issuer_key(issuer), critical=False)
    )


def hash_for(public_key: PublicKey) -> hashes.SHA256 | hashes.SHA384:
    """The hash that a signature by `public_key`'s owner is made with."""
    if isinstance(public_key, ec.EllipticCurvePublicKey) and public_key.key_size >= 384:
        return hashes.SHA384()
    return hashes.SHA256()


def utc(at: float) -> datetime:
    """`at` (Unix seconds) as certificates carry it."""
    # In whole seconds; rounding down keeps a leaf inside its authority's lifetime.
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=int(at))


def _authority(
    public_key: PublicKey,
    subject: x509.Name,
    issuer: x509.Name,
    issuer_key: PublicKey,
    now: float,
    not_after: float,
    path_length: int,
) -> x509.CertificateBuilder:
    return (
        _builder(public_key, subject, issuer, now - BACKDATING, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _builder(
    public_key: PublicKey, subject: x509.Name, issuer: x509.Name, not_before: float, not_after: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc(not_before))
        .not_valid_after(utc(not_after))
    )


def _key_usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    key_cert_sign: bool = False,
    crl_sign: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def issuer_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """The issuer's own key identifier, which need not be the hash that we would compute."""
    for extension in issuer.extensions:
        if isinstance(extension.value, x509.SubjectKeyIdentifier):
            return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(extension.value)
    public_key = issuer.public_key()
    if not isinstance(public_key, PublicKey):
        raise AuthorityError("certificate authority: its key is neither elliptic-curve nor RSA")
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key)


def _authority_name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ambient mesh"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )
