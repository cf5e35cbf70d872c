"""The mesh's certificate authority: checks signing requests and signs what the caller was authorised for."""

import ipaddress
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from ztunnel.durations import told
from ztunnel.identity import ca_files, keys, templates
from ztunnel.identity import chain as chains
from ztunnel.identity.errors import AuthorityError, CertificateError, CsrError
from ztunnel.identity.spiffe import SpiffeId
from ztunnel.identity.templates import PublicKey, SigningKey

DEFAULT_TTL = 24 * 3600  # seconds, for a request that names none
MAX_TTL = 48 * 3600  # seconds; requests for more are refused
LEAST_TTL = 10  # seconds; a shorter life is over before its renewal had a second try
MIN_REMAINING = 60  # seconds: an authority that ends sooner signs no more

SERVER_TTL = 365 * 86400  # seconds

MAX_CSR_SIZE = 16 * 1024  # bytes of PEM; a P-256 request has 0.4 KiB, one for RSA 4096 1.7 KiB
MAX_RSA_BITS = 8192  # verifying costs time, and the requester chooses

_CsrHash = hashes.SHA256 | hashes.SHA384 | hashes.SHA512


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """A TLS server's key and chain (leaf first), PEM; `not_after` in Unix seconds."""

    key_pem: bytes = field(repr=False)
    chain_pem: bytes = field(repr=False)
    not_after: float


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long workload certificates are valid, seconds: what a request that names no time gets, and the most."""

    default: int = DEFAULT_TTL
    most: int = MAX_TTL

    def __post_init__(self) -> None:
        """Raise ValueError for lifetimes that cannot be."""
        if not LEAST_TTL <= self.default <= self.most:
            raise ValueError(
                f"certificates of {told(self.default)} by default and {told(self.most)} at most: both have to be"
                f" at least {told(LEAST_TTL)}, and the default no more than the most"
            )


DEFAULT_LIFETIMES = Lifetimes()


class Authority:
    """A signing certificate with its key, the certificates above it, and the roots that peers trust."""

    def __init__(
        self,
        key: SigningKey,
        certificate: x509.Certificate,
        intermediates: Sequence[x509.Certificate],
        roots: Sequence[x509.Certificate],
        *,
        now: Callable[[], float] = time.time,
        name: str = "certificate authority",
        lifetimes: Lifetimes = DEFAULT_LIFETIMES,
    ) -> None:
        """`intermediates` lie between `certificate` and `roots`; `now` gives Unix seconds.

        `name` stands for the signing certificate in messages (its file's path). Raises AuthorityError if the
        parts do not fit together, are expired, or `certificate` may not sign.
        """
        self.lifetimes = lifetimes
        self.key = key
        self.certificate = certificate
        self.intermediates = tuple(intermediates)
        self.roots = tuple(roots)
        self.root_pem = pem(self.roots)
        self.chain = tuple(one for one in (certificate, *intermediates) if one not in self.roots)
        self.now = now
        self.name = name
        self._hash = templates.hash_for(key.public_key())
        self._check()
        self.issuing_roots = tuple(self._issuing_roots())
        self.issuers = frozenset(map(fingerprint, self.issuing_roots))
        self.trusted = frozenset(map(fingerprint, self.roots))
        self._end = min(
            one.not_valid_after_utc.timestamp() for one in (certificate, *intermediates, *self.issuing_roots)
        )
        self._probe()

    @classmethod
    def create(
        cls, *, now: Callable[[], float] = time.time, lifetimes: Lifetimes = DEFAULT_LIFETIMES
    ) -> Self:
        """A new authority (root and intermediate) that lives in memory only."""
        root_key, key = keys.generate(), keys.generate()
        root = templates.make_root(root_key, now())
        certificate = templates.make_intermediate(key, root_key, root, now())
        return cls(key, certificate, (), (root,), now=now, lifetimes=lifetimes)

    @classmethod
    def load_or_create(
        cls,
        directory: Path,
        *,
        now: Callable[[], float] = time.time,
        lifetimes: Lifetimes = DEFAULT_LIFETIMES,
        create: bool = True,
    ) -> Self:
        """The authority kept in `directory`, made there first if there is none and `create` allows it.

        Files: root-cert.pem, root-key.pem, ca-cert.pem, ca-key.pem (the intermediate that signs), and
        cert-chain.pem where an operator's own CA has more intermediates. An operator may bring root-cert.pem,
        ca-cert.pem and ca-key.pem, or just a self-signed ca-cert.pem and ca-key.pem. Safe to call in several
        processes at once and after one was killed in here. Blocks for milliseconds. Raises AuthorityError.
        """
        files = ca_files.prepare(Path(directory), now, create=create)
        return cls.of(files, now=now, lifetimes=lifetimes)

    @classmethod
    def of(
        cls,
        files: ca_files.CaFiles,
        *,
        now: Callable[[], float] = time.time,
        lifetimes: Lifetimes = DEFAULT_LIFETIMES,
    ) -> Self:
        """The authority of files that were read. Raises AuthorityError."""
        return cls(
            files.key,
            files.certificate,
            files.intermediates,
            files.roots,
            now=now,
            name=str(files.path),
            lifetimes=lifetimes,
        )

    @classmethod
    def from_files(
        cls,
        ca_cert: Path,
        ca_key: Path,
        *,
        root_cert: Path | None = None,
        cert_chain: Path | None = None,
        now: Callable[[], float] = time.time,
    ) -> Self:
        """An operator's authority: `ca_cert` signs with `ca_key`; `cert_chain` holds intermediates above it.

        Without `root_cert`, `ca_cert` has to be self-signed and is the root itself. Nothing is written; a key
        that others can read is warned about. Raises AuthorityError naming the file.
        """
        return cls.of(ca_files.load(Path(ca_cert), Path(ca_key), root_cert, cert_chain), now=now)

    def trusting(self, roots: Sequence[x509.Certificate]) -> Self:
        """The same authority, whose answers tell peers to trust `roots` too, after its own ones."""
        return type(self)(
            self.key,
            self.certificate,
            self.intermediates,
            (*self.roots, *(one for one in roots if one not in self.roots)),
            now=self.now,
            name=self.name,
            lifetimes=self.lifetimes,
        )

    def __repr__(self) -> str:
        return f"<Authority {self.certificate.subject.rfc4514_string()!r} until {templates.utc(self._end)}>"

    @property
    def not_after(self) -> float:
        """When the authority ends (the first of its chain to expire), Unix seconds."""
        return self._end

    def sign(self, csr_pem: bytes, identity: str, ttl: int = 0) -> list[bytes]:
        """Certify the key in `csr_pem` for `identity`, a SPIFFE id that the caller was authorised for.

        Only the key is taken from the request, whose self-signature has to be valid: no name, no extension.
        `ttl` in seconds, 0 for the default; more than the most is refused, as istiod does it, and what goes
        beyond the authority's own end is cut. Returns PEMs: the leaf, each intermediate, last the root (all
        roots in one PEM if there are several).
        Raises CsrError for the request, SpiffeIdError for the identity, AuthorityError if expired.
        """
        name = SpiffeId.parse(identity)
        if ttl < 0:
            raise CsrError(
                f"signing request for {identity}: validity of {ttl} s; 0 (default) or more is needed"
            )
        if ttl > self.lifetimes.most:
            raise CsrError(
                f"signing request for {identity}: requested validity of {told(ttl)} is more than the"
                f" {told(self.lifetimes.most)} that this authority gives at most; ask for less (SECRET_TTL of the"
                " node proxy), or raise MAX_WORKLOAD_CERT_TTL of the control plane"
            )
        public_key = _requested_key(csr_pem, identity)
        leaf = self._leaf(
            public_key,
            [x509.UniformResourceIdentifier(str(name))],
            [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
            ttl or self.lifetimes.default,
        )
        return [*(one.public_bytes(Encoding.PEM) for one in (leaf, *self.chain)), self.root_pem]

    def server_certificate(self, names: Iterable[str], ttl: int = SERVER_TTL) -> ServerCertificate:
        """A new key and its certificate for a TLS server reached by `names` (DNS names and IP addresses).

        Without a SPIFFE id, so that no workload takes its holder for one of the mesh. `ttl` in seconds, capped
        at the authority's own end. Raises AuthorityError for no or malformed names, or if expired.
        """
        general = [_server_name(one) for one in names]
        if not general:
            raise AuthorityError("server certificate: no names; give at least one DNS name or IP address")
        key = keys.generate()
        leaf = self._leaf(key.public_key(), general, [ExtendedKeyUsageOID.SERVER_AUTH], ttl)
        return ServerCertificate(
            keys.to_pem(key), pem((leaf, *self.chain)), leaf.not_valid_after_utc.timestamp()
        )

    def _check(self) -> None:
        where, now = self.name, self.now()
        if self.certificate.public_key() != self.key.public_key():
            raise AuthorityError(f"{where}: its key is another one; give the key that belongs to it")
        if not templates.may_sign(self.certificate):
            raise AuthorityError(
                f"{where}: not a certificate authority (basicConstraints CA:TRUE and, if there is a keyUsage,"
                " keyCertSign are needed)"
            )
        for one in (self.certificate, *self.intermediates):
            if one.not_valid_after_utc.timestamp() <= now:
                raise AuthorityError(
                    f"{where}: {one.subject.rfc4514_string()!r} expired at {one.not_valid_after_utc};"
                    " give a certificate authority that is valid"
                )
            if one.not_valid_before_utc.timestamp() > now:
                raise AuthorityError(
                    f"{where}: {one.subject.rfc4514_string()!r} is valid only from {one.not_valid_before_utc};"
                    " check this machine's clock"
                )
        try:
            chains.verify(self.certificate, self.intermediates, self.roots, now)
        except CertificateError as error:
            raise AuthorityError(
                f"{where}: does not chain to the root certificate: {error}; give the root that issued it,"
                " and in cert-chain.pem any intermediates between them"
            ) from None

    def _issuing_roots(self) -> list[x509.Certificate]:
        """Roots that this chain ends in; others are trusted too but do not bound what is signed."""
        top = self.chain[-1] if self.chain else self.certificate
        return [one for one in self.roots if _issued(top, by=one)] or [self.certificate]

    def _probe(self) -> None:
        """Sign something and verify it as a peer will: path lengths and key usages show only then."""
        if self._end - self.now() < MIN_REMAINING:
            return  # told when something is to be signed
        leaf = self._leaf(
            self.key.public_key(), [x509.DNSName("probe")], [ExtendedKeyUsageOID.CLIENT_AUTH], 60
        )
        try:
            chains.verify(leaf, (self.certificate, *self.intermediates), self.roots, self.now())
        except CertificateError as error:
            raise AuthorityError(
                f"{self.name}: what it signs is refused by peers: {error}; a certificate authority above workload"
                " certificates needs a path length of at least the number of authorities between them, and the key"
                " usage keyCertSign"
            ) from None

    def _leaf(
        self,
        public_key: PublicKey,
        names: Sequence[x509.GeneralName],
        usages: Sequence[x509.ObjectIdentifier],
        ttl: int,
    ) -> x509.Certificate:
        now = self.now()
        if self._end - now < MIN_REMAINING:
            raise AuthorityError(
                f"{self.name}: ends at {templates.utc(self._end)}, nothing more can be signed; put its successor in"
                " place (the control plane renews an intermediate of its own, and its log says why it did not)"
            )
        start = max(now - templates.BACKDATING, self.certificate.not_valid_before_utc.timestamp())
        end = min(now + ttl, self._end)
        if start >= end:
            raise AuthorityError(
                f"{self.name}: is valid only from {self.certificate.not_valid_before_utc}, nothing is signed before;"
                " check this machine's clock"
            )
        return templates.leaf(public_key, self.certificate, start, end, names, usages).sign(
            self.key, self._hash
        )


def _requested_key(csr_pem: bytes, identity: str) -> PublicKey:
    where = f"signing request for {identity}"
    if len(csr_pem) > MAX_CSR_SIZE:
        raise CsrError(f"{where}: {len(csr_pem)} bytes, at most {MAX_CSR_SIZE} are accepted")
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        public_key = csr.public_key()
        algorithm = csr.signature_hash_algorithm
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CsrError(f"{where}: not a PEM certificate request that can be read: {error}") from None
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        if not isinstance(public_key.curve, ec.SECP256R1 | ec.SECP384R1):
            raise CsrError(f"{where}: its key is on curve {public_key.curve.name}; use P-256 or P-384")
    elif isinstance(public_key, rsa.RSAPublicKey):
        if not 2048 <= public_key.key_size <= MAX_RSA_BITS:
            raise CsrError(
                f"{where}: RSA key of {public_key.key_size} bits; use 2048 to {MAX_RSA_BITS}, or P-256"
            )
    else:
        raise CsrError(
            f"{where}: {type(public_key).__name__.lstrip('_')} is not accepted; use P-256, P-384 or RSA"
        )
    if not isinstance(algorithm, _CsrHash):
        raise CsrError(
            f"{where}: signed with {algorithm and algorithm.name}; use SHA-256, SHA-384 or SHA-512"
        )
    try:
        valid = csr.is_signature_valid
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        valid = False
    if not valid:
        raise CsrError(f"{where}: its signature does not verify, so the sender may not hold the key")
    return public_key


def _server_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        if name and not name.isspace():
            return x509.DNSName(name)
    except ValueError:
        pass
    raise AuthorityError(f"server certificate: {name!r} is no DNS name (in ASCII) and no IP address")


def _issued(certificate: x509.Certificate, by: x509.Certificate) -> bool:
    # By the signature: two roots of one operator may have the same name.
    try:
        certificate.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def fingerprint(certificate: x509.Certificate) -> str:
    """The certificate's SHA-256 fingerprint, in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """The certificates as one PEM text."""
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)
