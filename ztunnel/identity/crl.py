"""Certificate revocation lists: read, checked, described, and asked about a chain. OpenSSL is who judges.

A text without any list is one that revokes nothing. A list whose time is over still counts: what it revokes stays
revoked, and a warning tells that its successor is missing. Workers import this file: keep its imports few.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import ExtensionOID
from OpenSSL import crypto

from ztunnel.identity.errors import CertificateError

MAX_SIZE = 16 * 1024 * 1024  # bytes: 400,000 revocations
REVOKED = 23  # OpenSSL's X509_V_ERR_CERT_REVOKED
MISSING = 3  # X509_V_ERR_UNABLE_TO_GET_CRL: this issuer has given no list
EXPIRED = 12  # X509_V_ERR_CRL_HAS_EXPIRED

# What a verification has to say of lists before it refuses a certificate; see `tolerated`.
_TOLERATED = frozenset({MISSING, EXPIRED})
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME
_BEGIN = b"-----BEGIN X509 CRL-----"
_END = b"-----END X509 CRL-----"

List = x509.CertificateRevocationList


def read(path: Path) -> bytes:
    """The lists in a file, as PEM; a file in DER is taken too. Raises OSError, CertificateError."""
    with path.open("rb") as file:
        data = file.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise CertificateError(f"it has more than {MAX_SIZE} bytes")
    return decode(data)


def decode(data: bytes) -> bytes:
    """The lists in `data`, PEM or one in DER, as PEM. Raises CertificateError."""
    if data[:1] == b"\x30":
        from cryptography.hazmat.primitives.serialization import Encoding

        try:
            data = x509.load_der_x509_crl(data).public_bytes(Encoding.PEM)
        except ValueError as error:
            raise CertificateError(f"no revocation list that can be read: {error}") from None
    parse(data)
    return data


def parse(text: bytes) -> list[List]:
    """The lists in a PEM text. Raises CertificateError where there is something else but none of them."""
    blocks = text.split(_BEGIN)[1:]
    if not blocks and text.strip():
        raise CertificateError(
            "no revocation list in PEM is in it; give one, or an empty file if nothing is revoked"
        )
    lists = []
    for number, block in enumerate(blocks, 1):
        body, end, _ = block.partition(_END)
        try:
            if not end:
                raise ValueError("its end is missing")
            lists.append(x509.load_pem_x509_crl(_BEGIN + body + _END))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise CertificateError(f"revocation list {number} cannot be read: {error}") from None
    return lists


def check(lists: Iterable[List], issuers: Iterable[x509.Certificate]) -> None:
    """Raise CertificateError for a list that none of `issuers` signed: nobody could use it."""
    candidates = list(issuers)
    for one in lists:
        named = [issuer for issuer in candidates if issuer.subject == one.issuer]
        if not any(_signed(one, issuer) for issuer in named):
            raise CertificateError(
                f"the list of {one.issuer.rfc4514_string()!r} is "
                + ("not signed by it" if named else "by none of the mesh's certificate authorities")
            )


def describe(text: bytes) -> list[dict[str, Any]]:
    """Each list's issuer, number of revocations, and times (Unix seconds), for people."""
    return [
        {
            "issuer": one.issuer.rfc4514_string(),
            "revoked": len(one),
            "last_update": one.last_update_utc.timestamp(),
            "next_update": one.next_update_utc.timestamp() if one.next_update_utc is not None else None,
            "number": _number(one),
        }
        for one in parse(text)
    ]


def use(store: crypto.X509Store, lists: Sequence[List]) -> None:
    """Have verifications with `store` look whether a certificate of the chain is revoked."""
    if lists:
        for one in lists:
            store.add_crl(one)
        store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL)


def tolerated(code: int) -> bool:
    """Whether a verification goes on after this error of OpenSSL's: no list of this issuer, or an old one.

    Authorities without a list have revoked nothing (ztunnel of Istio takes it so, too); an old list is the last word
    there is, and refusing everybody when it was not replaced in time would end the whole mesh.
    """
    return code in _TOLERATED


def revoked(chain: Sequence[crypto.X509], roots: Sequence[x509.Certificate], lists: Sequence[List]) -> str:
    """The name of the first certificate of a verified chain (leaf first) that is revoked by now, "" if none is."""
    if not lists:
        return ""
    store = crypto.X509Store()
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    for one in lists:
        store.add_crl(one)
    # Each by itself: without a callback a missing list would end the look at the chain.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN | crypto.X509StoreFlags.CRL_CHECK | _NO_CHECK_TIME)
    for depth, certificate in enumerate(chain):
        try:
            crypto.X509StoreContext(store, certificate, list(chain[depth + 1 :])).verify_certificate()
        except crypto.X509StoreContextError as error:
            if error.errors[0] == REVOKED:
                parsed = error.certificate.to_cryptography()
                return parsed.subject.rfc4514_string() or f"serial {parsed.serial_number:x}"
    return ""


def _signed(one: List, issuer: x509.Certificate) -> bool:
    try:
        return one.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False


def _number(one: List) -> int | None:
    try:
        value = one.extensions.get_extension_for_oid(ExtensionOID.CRL_NUMBER).value
    except (ValueError, x509.ExtensionNotFound):
        return None
    return value.crl_number if isinstance(value, x509.CRLNumber) else None
