"""The certificate authority as the control plane runs it: its files followed, changes of the root led through.

Beside the authority's own files (ztunnel/identity/ca_files.py), which say who *is to* sign, its directory holds:

| file | what |
|---|---|
| `signing-state.json` | who signs now, with its key (0600), and which roots are told since when |
| `ca-crl.pem` | the operator's certificate revocation list, if there is one |
| `published/root-cert.pem` | the roots that everybody is to trust now, for XDS_ROOT_CA and CA_ROOT_CA of node proxies |
| `published/ca-crl.pem` | the revocation list in force, for CRL_PATH of node proxies; empty: nothing is revoked |
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ztunnel.controlplane.revoking import counted, judge, revoked_signer
from ztunnel.identity import ca_files, crl, keys
from ztunnel.identity.ca import DEFAULT_LIFETIMES, Authority, Lifetimes, fingerprint, pem
from ztunnel.identity.errors import AuthorityError, CertificateError
from ztunnel.identity.succession import SETTLE, Succession
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane.ca")

STATE: Final = "signing-state.json"
CRL: Final = "ca-crl.pem"
PUBLISHED: Final = "published"

CHECK_INTERVAL: Final = (
    1.0  # seconds between looks at the files; changed ones are read once they rested for one
)
RENEWAL_INTERVAL: Final = 12 * 3600  # seconds after which an own intermediate is looked at, for its renewal
SOON: Final = 30 * 86400  # seconds: an operator's authority that ends within them is warned about

Stamp = tuple[tuple[int, int, int] | None, ...]
InUse = Callable[[str, str], bool]


class _Read(NamedTuple):
    """What was read from the files, in a thread."""

    authority: Authority | AuthorityError
    revocations: bytes | CertificateError | None  # None: there is no such file


class AuthorityKeeper:
    """Follows the files of an authority; `succession` decides what they mean for what is signed now."""

    def __init__(
        self,
        directory: Path,
        *,
        lifetimes: Lifetimes = DEFAULT_LIFETIMES,
        now: Callable[[], float] = time.time,
        settle: float = SETTLE,
        published: Path | None = None,
    ) -> None:
        """Read the authority in `directory`, made if there is none, and publish its roots. Blocks for milliseconds.

        `published` is the directory for node proxies to read, by default one below. Raises AuthorityError, also where
        nothing can be written that has to be.
        """
        self.directory = directory
        self.published = directory / PUBLISHED if published is None else published
        self._lifetimes = lifetimes
        self._now = now
        self._settle = settle
        self._problem = ""  # why the files are not followed now
        self._crl_problem = ""
        self._pending = False  # something is to be written and told
        fresh = not (directory / ca_files.CA_CERT).exists()
        stamp = self._stamp()
        wanted = Authority.load_or_create(directory, now=now, lifetimes=lifetimes)
        self._seen = self._read_stamp = stamp
        self.succession = self._restore(wanted, fresh)
        self.succession.want(wanted, now())
        self.revocations = self._first_revocations()
        self._read_at = now()
        self._on_change: list[Callable[[], None]] = []
        self._warn(wanted)
        self._write(complete=False, must=True)

    @property
    def authority(self) -> Authority:
        """The authority that signs now, with the roots to be told."""
        return self.succession.answering

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call this whenever another authority signs, or other roots are told."""
        self._on_change.append(callback)

    def issued(self, authority: Authority, node: str, identity: str, not_after: float) -> None:
        """A certificate was given out that `authority` signed."""
        self.succession.issued(authority, node, identity, not_after, self._now())

    async def run(self, in_use: InUse) -> None:
        """Follow the files until cancelled; `in_use(node, identity)` says whether such a pod runs there."""
        try:
            while True:
                await trio.sleep(CHECK_INTERVAL)
                await self.check(in_use)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(lambda: self._write(complete=True))

    async def check(self, in_use: InUse) -> None:
        """Look once: read changed files, and go on with what waits."""
        stamp = await trio.to_thread.run_sync(self._stamp)
        rested, self._seen = stamp == self._seen, stamp
        due = self._now() - self._read_at > RENEWAL_INTERVAL or self._now() < self._read_at
        read: _Read | None = None
        if (stamp != self._read_stamp and rested) or due:
            self._read_stamp, self._read_at = stamp, self._now()
            read = await trio.to_thread.run_sync(self._read)
        before = self.succession.phase
        try:
            if read is not None:
                self._take(read)
            changed = self.succession.advance(self._now(), in_use)
        except AuthorityError as error:
            self._tell(str(error))
            return
        if changed or self._pending:
            self._pending = False
            self._log_phase(before)
            await trio.to_thread.run_sync(lambda: self._write(complete=False))
            for callback in self._on_change:
                callback()

    def status(self) -> dict[str, Any]:
        """What `ambient ca status` shows, as JSON; no key is in it."""
        succession, now = self.succession, self._now()
        return {
            "at": now,
            "phase": succession.phase,
            "waiting": succession.waiting(now)
            if succession.phase == "distributing"
            else succession.retiring(now),
            "signing": _described(succession.signing.certificate),
            "wanted": _described(succession.wanted.certificate),
            "roots": [
                {**_described(root.certificate), "since": root.since or None, "retired": root.retired}
                for root in succession.roots.values()
            ],
            "lifetimes": {"default": self._lifetimes.default, "most": self._lifetimes.most},
            "revocations": crl.describe(self.revocations),
            "problems": [one for one in (self._problem, self._crl_problem, self._revoked()) if one],
        }

    def _revoked(self) -> str:
        return revoked_signer(self.revocations, self.succession)

    # Reading.

    def _stamp(self) -> Stamp:
        names = (
            ca_files.ROOT_CERT,
            ca_files.ROOT_KEY,
            ca_files.CA_CERT,
            ca_files.CA_KEY,
            ca_files.CHAIN,
            CRL,
        )
        return tuple(map(ca_files.stamp, (self.directory / name for name in names)))

    def _read(self) -> _Read:
        authority: Authority | AuthorityError
        try:
            authority = Authority.load_or_create(
                self.directory, now=self._now, lifetimes=self._lifetimes, create=False
            )
        except AuthorityError as error:
            authority = error
        return _Read(authority, self._read_revocations())

    def _read_revocations(self) -> bytes | CertificateError | None:
        path = self.directory / CRL
        try:
            return crl.read(path)
        except FileNotFoundError:
            return None
        except (OSError, CertificateError) as error:
            return CertificateError(f"{path}: {getattr(error, 'strerror', None) or error}")

    def _take(self, read: _Read) -> None:
        if isinstance(read.authority, AuthorityError):
            self._tell(str(read.authority))
        else:
            if self._problem:
                self._problem = ""
                logger.info("the certificate authority's files can be used again")
            if self.succession.want(read.authority, self._now()):
                self._pending = True
                self._warn(read.authority)
        if isinstance(read.revocations, CertificateError):
            self._crl_problem = f"{read.revocations}; the last list stays in force"
            logger.error("%s", self._crl_problem)
        elif read.revocations is not None:
            self._judge(read.revocations)
        elif self.revocations.strip() and not self._crl_problem:
            path = self.directory / CRL
            self._crl_problem = (
                f"{path}: it is gone, the last list stays in force; an empty file withdraws it"
            )
            logger.warning("%s", self._crl_problem)

    def _judge(self, revocations: bytes) -> None:
        """Take a revocation list if authorities of ours issued it."""
        try:
            judge(revocations, self.succession)
        except CertificateError as error:
            self._crl_problem = f"{self.directory / CRL}: {error}; the last list stays in force"
            logger.error("%s", self._crl_problem)
            return
        self._crl_problem = ""
        if revocations != self.revocations:
            self.revocations = revocations
            self._pending = True
            logger.info("revocation list changed", extra=fields(**counted(revocations)))
            if revoked := self._revoked():
                logger.error("%s", revoked)

    def _first_revocations(self) -> bytes:
        """The list in the directory, or where it cannot be used, the one that was published last."""
        try:
            self.revocations = crl.read(self.published / CRL)
        except (OSError, CertificateError):
            self.revocations = b""
        found = self._read_revocations()
        if isinstance(found, CertificateError):
            if not self.revocations:
                raise AuthorityError(f"{found}; mend it, or put an empty file there if nothing is revoked")
            self._crl_problem = f"{found}; the last list stays in force"
            logger.error("%s", self._crl_problem)
        elif found is not None:
            self._judge(found)
            if self._crl_problem and not self.revocations:
                raise AuthorityError(self._crl_problem.removesuffix("; the last list stays in force"))
        return self.revocations

    def _restore(self, wanted: Authority, fresh: bool) -> Succession:
        """Where the last process of this directory ended."""
        path = self.directory / STATE
        try:
            dumped = json.loads(path.read_bytes())
            signing = self._authority_of(dumped["authority"])
            return Succession.restore(signing, dumped["succession"], self._now(), settle=self._settle)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AuthorityError) as error:
            # The old authority has ended, most likely, and with it all that it signed.
            told = type(error).__name__ if isinstance(error, KeyError | TypeError) else str(error)
            logger.warning("%s: not used: %s", path, told)
        return Succession(wanted, self._now(), memory=fresh, settle=self._settle)

    def _authority_of(self, dumped: dict[str, str]) -> Authority:
        certificate, *intermediates = x509.load_pem_x509_certificates(dumped["chain"].encode())
        key = load_pem_private_key(dumped["key"].encode(), None)
        return Authority(
            ca_files.signing_key(key, self.directory / STATE),
            certificate,
            intermediates,
            x509.load_pem_x509_certificates(dumped["roots"].encode()),
            now=self._now,
            name=str(self.directory / STATE),
            lifetimes=self._lifetimes,
        )

    # Writing.

    def _write(self, *, complete: bool, must: bool = False) -> None:
        """Bring what others read up to date. Raises AuthorityError if it `must` be and cannot."""
        signing = self.succession.signing
        state = {
            "authority": {
                "key": keys.to_pem(signing.key).decode(),
                "chain": pem([signing.certificate, *signing.intermediates]).decode(),
                "roots": pem(signing.issuing_roots).decode(),
            },
            "succession": self.succession.dump(complete=complete),
        }
        try:
            self.published.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._write_changed(self.published / ca_files.ROOT_CERT, pem(self.succession.bundle))
            self._write_changed(self.published / CRL, self.revocations)
        except OSError as error:
            told = f"{self.published}: cannot be written: {error.strerror}"
            if must:
                raise AuthorityError(
                    f"{told}; make room, let this user write there, or give another place with --publish DIR"
                ) from None
            self._pending = True  # again at the next look
            self._tell(told)
        try:
            self._write_changed(self.directory / STATE, json.dumps(state).encode() + b"\n", ca_files.KEY_MODE)
        except OSError as error:
            # What is signed goes on; only a restart in the midst of a change of roots would forget the old key.
            self._tell(f"{self.directory / STATE}: cannot be written: {error.strerror}")

    def _write_changed(self, path: Path, data: bytes, mode: int = ca_files.CERT_MODE) -> None:
        try:
            if path.read_bytes() == data:
                return
        except FileNotFoundError:
            pass
        ca_files.write(path, data, mode)

    # Telling.

    def _tell(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            logger.error("%s; what signed until now goes on", problem)

    def _warn(self, authority: Authority) -> None:
        left = authority.not_after - self._now()
        if left < SOON and not (self.directory / ca_files.ROOT_KEY).exists():
            logger.warning(
                "the certificate authority ends soon: give its successor in time",
                extra=fields(not_after=int(authority.not_after), path=authority.name),
            )

    def _log_phase(self, before: str) -> None:
        succession = self.succession
        if succession.phase == before == "stable":
            return
        logger.info(
            "the certificate authority changes",
            extra=fields(
                phase=succession.phase,
                signing=fingerprint(succession.signing.certificate)[:16],
                roots=len(succession.roots),
                waiting=succession.waiting(self._now()) or None,
            ),
        )


def _described(certificate: x509.Certificate) -> dict[str, Any]:
    return {
        "subject": certificate.subject.rfc4514_string(),
        "serial": f"{certificate.serial_number:x}",
        "not_before": certificate.not_valid_before_utc.timestamp(),
        "not_after": certificate.not_valid_after_utc.timestamp(),
        "sha256": fingerprint(certificate),
    }
