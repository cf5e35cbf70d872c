"""A workload's certificate: what the authority signed, with the key it is for. Workers import this file.

The bundle is plain PEM so that it crosses a pipe; parsed objects are made where TLS contexts are built.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from ztunnel.identity import chain as chains
from ztunnel.identity import keys
from ztunnel.identity.errors import CertificateError


@dataclass(frozen=True, slots=True)
class WorkloadCertificate:
    """Key, chain and roots of one workload identity.

    `chain_pem` is the leaf followed by its intermediates, `roots_pem` the roots that peers are verified
    against; `not_before` and `not_after` are the leaf's, in Unix seconds. The key stays out of repr().
    """

    identity: str
    key_pem: bytes = field(repr=False)
    chain_pem: bytes = field(repr=False)
    roots_pem: bytes = field(repr=False)
    not_before: float
    not_after: float

    @classmethod
    def from_signed(cls, identity: str, key: keys.PrivateKey, chain: Sequence[bytes], at: float) -> Self:
        """The bundle for what an authority answered to `key`'s signing request.

        `chain` holds PEMs, leaf first, roots (one or several in one PEM) last; `at` is now in Unix seconds.
        Raises CertificateError when the answer is not a valid certificate of `identity` for `key`, so that
        a wrong answer is an error of the fetch and never one of every connection after it.
        """
        where = f"certificate for {identity} from the certificate authority"
        if len(chain) < 2:
            raise CertificateError(f"{where}: {len(chain)} PEMs came, expected a leaf and at least the root")
        try:
            leaf, *intermediates = [one for pem in chain[:-1] for one in x509.load_pem_x509_certificates(pem)]
            roots = x509.load_pem_x509_certificates(chain[-1])
        except ValueError as error:
            raise CertificateError(f"{where}: not PEM certificates: {error}") from None
        if leaf.public_key() != key.public_key():
            raise CertificateError(f"{where}: it is for another key than the one in the signing request")
        uris = uri_names(leaf)
        if uris != [identity]:
            raise CertificateError(f"{where}: its URI SANs are {uris}, expected exactly {identity}")
        not_before = leaf.not_valid_before_utc.timestamp()
        if not_before > at:
            raise CertificateError(
                f"{where}: valid only in {not_before - at:.0f} s; set this node's clock"
                " and the certificate authority's"
            )
        try:
            chains.verify(leaf, intermediates, roots, at)
        except CertificateError as error:
            raise CertificateError(
                f"{where}: does not chain to the root that came with it: {error}"
            ) from None
        return cls(
            identity,
            keys.to_pem(key),
            b"".join(one.public_bytes(Encoding.PEM) for one in (leaf, *intermediates)),
            b"".join(one.public_bytes(Encoding.PEM) for one in roots),
            not_before,
            leaf.not_valid_after_utc.timestamp(),
        )

    def encode(self) -> bytes:
        """The bundle as bytes for a pipe to a worker of ours; it holds the private key."""
        return json.dumps(
            [
                self.identity,
                self.key_pem.decode(),
                self.chain_pem.decode(),
                self.roots_pem.decode(),
                self.not_before,
                self.not_after,
            ],
            separators=(",", ":"),
        ).encode()

    def describe(self) -> list[dict[str, Any]]:
        """What can be said of the chain, leaf first, and of the roots: no key is in it. Times in Unix seconds."""
        certificates = x509.load_pem_x509_certificates(self.chain_pem)
        roots = x509.load_pem_x509_certificates(self.roots_pem)
        return [
            {
                "role": role,
                "subject": one.subject.rfc4514_string(),
                "issuer": one.issuer.rfc4514_string(),
                "serial": f"{one.serial_number:x}",
                "not_before": one.not_valid_before_utc.timestamp(),
                "not_after": one.not_valid_after_utc.timestamp(),
                "sha256": one.fingerprint(hashes.SHA256()).hex(),
                "pem": one.public_bytes(Encoding.PEM).decode(),
            }
            for role, one in (
                *zip(("leaf", *("intermediate",) * (len(certificates) - 1)), certificates, strict=True),
                *(("root", one) for one in roots),
            )
        ]

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Self:
        """What `encode` made. Raises CertificateError on anything else."""
        try:
            identity, key, chain, roots, not_before, not_after = json.loads(bytes(data))
            return cls(
                identity, key.encode(), chain.encode(), roots.encode(), float(not_before), float(not_after)
            )
        except (ValueError, TypeError, AttributeError):
            # Neither the data nor the cause is repeated: both may quote the key.
            raise CertificateError("encoded workload certificate: malformed") from None


def uri_names(certificate: x509.Certificate) -> list[str]:
    """The URI SANs of `certificate`, in its order. Raises CertificateError if its extensions are malformed."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    except (ValueError, x509.DuplicateExtension) as error:
        raise CertificateError(f"malformed extensions: {error}") from None
    return names.get_values_for_type(x509.UniformResourceIdentifier)
