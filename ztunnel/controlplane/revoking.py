"""Revocation lists as an authority's operator gives them: which are taken, and what they mean for who signs."""

from OpenSSL import crypto

from ztunnel.identity import crl
from ztunnel.identity.succession import Succession


def judge(revocations: bytes, succession: Succession) -> None:
    """Raise CertificateError for lists (PEM) that none of our authorities issued, or that are none."""
    issuers = [*succession.bundle]
    for authority in (succession.signing, succession.wanted):
        issuers += [authority.certificate, *authority.intermediates, *authority.roots]
    crl.check(crl.parse(revocations), issuers)


def revoked_signer(revocations: bytes, succession: Succession) -> str:
    """What to say if the authority that signs is itself revoked; "" if it is not."""
    signing = succession.signing
    chain = [signing.certificate, *signing.intermediates, *signing.issuing_roots]
    name = crl.revoked(
        [crypto.X509.from_cryptography(one) for one in chain], signing.roots, crl.parse(revocations)
    )
    return (
        f"{name!r}, which signs or is above what signs, is revoked: peers refuse all that it certified"
        if name
        else ""
    )


def counted(revocations: bytes) -> dict[str, int]:
    """How many lists there are, and how much they revoke, for a log line."""
    described = crl.describe(revocations)
    return {"lists": len(described), "revoked": sum(one["revoked"] for one in described)}
