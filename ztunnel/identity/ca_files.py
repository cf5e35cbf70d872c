"""The certificate authority's files: made, completed and read. The only file that writes keys to disk.

Every file appears whole (written under another name, synced, renamed), keys with mode 0600 from the first
byte, all under a lock on the directory. They are made in the order root key, root, key, certificate, and each
from those before it, so that whoever comes after a kill only makes what is missing.
"""

import contextlib
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from ztunnel.identity import keys, templates
from ztunnel.identity.errors import AuthorityError
from ztunnel.identity.templates import SigningKey

ROOT_CERT, ROOT_KEY, CA_CERT, CA_KEY = "root-cert.pem", "root-key.pem", "ca-cert.pem", "ca-key.pem"
CHAIN = "cert-chain.pem"

DIRECTORY_MODE, KEY_MODE, CERT_MODE = 0o700, 0o600, 0o644

_log = logging.getLogger(__name__)


class CaFiles(NamedTuple):
    """What was read; `path` is the signing certificate's file."""

    path: Path
    key: SigningKey
    certificate: x509.Certificate
    intermediates: list[x509.Certificate]
    roots: list[x509.Certificate]


def prepare(directory: Path, now: Callable[[], float], *, create: bool = True) -> CaFiles:
    """Read the authority in `directory`, first making what is missing of one of our own. Raises AuthorityError.

    Without `create` nothing is made but a new intermediate of our own for one that ends soon: files that are
    missing may be those of an operator who is replacing them.
    """
    try:
        if create:
            directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        with locked(directory):
            _restrict(directory, DIRECTORY_MODE)
            for name in (ROOT_KEY, CA_KEY):
                if (directory / name).exists():
                    _restrict(directory / name, KEY_MODE)
            for name in (ROOT_KEY, ROOT_CERT, CA_KEY, CA_CERT):
                left = _unfinished(directory / name)  # of a run that was killed: a key that nobody needs
                if left.exists():
                    left.unlink()
            if not create:
                _check_whole(directory)
            _complete(directory, now())
            chain = directory / CHAIN
            return load(
                directory / CA_CERT,
                directory / CA_KEY,
                directory / ROOT_CERT,
                chain if chain.exists() else None,
            )
    except OSError as error:
        raise AuthorityError(f"certificate authority in {directory}: {error}") from error


def load(ca_cert: Path, ca_key: Path, root_cert: Path | None, cert_chain: Path | None) -> CaFiles:
    """Read an authority from files of any place; see Authority.from_files. Raises AuthorityError."""
    certificate = _read_certificates(ca_cert)[0]
    key = _read_key(ca_key)
    if root_cert is not None:
        roots = _read_certificates(root_cert)
    elif certificate.issuer == certificate.subject:
        roots = [certificate]
    else:
        raise AuthorityError(
            f"{ca_cert}: issued by {certificate.issuer.rfc4514_string()!r}, not by itself;"
            " give that root's certificate too"
        )
    # Operators put the whole chain into either file; the signing certificate and the roots are no part of it.
    chain = _read_certificates(cert_chain) if cert_chain is not None else []
    above = [*_read_certificates(ca_cert)[1:], *chain]
    intermediates = [one for one in dict.fromkeys(above) if one != certificate and one not in roots]
    return CaFiles(ca_cert, key, certificate, intermediates, roots)


def _complete(directory: Path, now: float) -> None:
    """Make what is missing of our own authority; an operator's (without root-key.pem) is only checked."""
    root_key_file, root_file = directory / ROOT_KEY, directory / ROOT_CERT
    key_file, certificate_file = directory / CA_KEY, directory / CA_CERT
    present = {one.name for one in (root_key_file, root_file, key_file, certificate_file) if one.exists()}
    if present and ROOT_KEY not in present:
        _complete_operators(directory, present)
        return

    if root_key_file.exists():
        root_key = _read_key(root_key_file)
    else:
        root_key = keys.generate()
        write(root_key_file, keys.to_pem(root_key), KEY_MODE)
    if root_file.exists():
        root = _own_root(root_file, root_key, now)
    else:
        root = templates.make_root(root_key, now)
        write(root_file, root.public_bytes(Encoding.PEM), CERT_MODE)

    if key_file.exists():
        key = _read_key(key_file)
    else:
        # First, or a kill between the two writes would leave a certificate beside another's key.
        certificate_file.unlink(missing_ok=True)
        key = keys.generate()
        write(key_file, keys.to_pem(key), KEY_MODE)
    if not certificate_file.exists() or _due(_read_certificates(certificate_file)[0], root, now):
        # A renewal keeps the key, so that one rename is the whole change.
        certificate = templates.make_intermediate(key, root_key, root, now)
        write(certificate_file, certificate.public_bytes(Encoding.PEM), CERT_MODE)


def _check_whole(directory: Path) -> None:
    """Raise AuthorityError unless there is a whole authority: the files that say who signs, and a root."""
    missing = [name for name in (CA_CERT, CA_KEY, ROOT_CERT) if not (directory / name).exists()]
    if missing and not (missing == [ROOT_CERT] and not (directory / ROOT_KEY).exists()):
        raise AuthorityError(
            f"certificate authority in {directory}: {', '.join(missing)} is missing; put it there, and until then the"
            " last whole authority stays in force"
        )


def renew_root(directory: Path, now: float) -> None:
    """Replace an authority of our own by a new one, root and all, in its directory. Raises AuthorityError.

    After a kill at any moment the directory holds an authority that can be completed: the old root's key or
    the new one's, and what is missing is made from it.
    """
    try:
        with locked(directory):
            if not (directory / ROOT_KEY).exists():
                raise AuthorityError(
                    f"certificate authority in {directory}: its root's key is not here, so it is an operator's: put its"
                    f" successor's {CA_CERT}, {CA_KEY}, {ROOT_CERT} (and {CHAIN}) there instead"
                )
            for name in (CA_CERT, CA_KEY, ROOT_CERT, CHAIN):
                (directory / name).unlink(missing_ok=True)
            write(directory / ROOT_KEY, keys.to_pem(keys.generate()), KEY_MODE)
            _complete(directory, now)
    except OSError as error:
        raise AuthorityError(f"certificate authority in {directory}: {error}") from error


def _complete_operators(directory: Path, present: set[str]) -> None:
    missing = {CA_CERT, CA_KEY} - present
    if missing:
        raise AuthorityError(
            f"certificate authority in {directory}: there is {', '.join(sorted(present))} but not"
            f" {', '.join(sorted(missing))}; add what is missing, or empty the directory to have a new"
            " authority made"
        )
    if ROOT_CERT not in present:
        # Clients are pointed at root-cert.pem, so a self-signed authority gets it too.
        root = load(directory / CA_CERT, directory / CA_KEY, None, None).roots[0]
        write(directory / ROOT_CERT, root.public_bytes(Encoding.PEM), CERT_MODE)


def _own_root(path: Path, key: SigningKey, now: float) -> x509.Certificate:
    root = _read_certificates(path)[0]
    if root.public_key() != key.public_key():
        raise AuthorityError(
            f"{path}: belongs to another key than {ROOT_KEY}; restore the matching pair, or remove {ROOT_KEY} if"
            " the root is an operator's"
        )
    if root.not_valid_after_utc.timestamp() <= now:
        raise AuthorityError(
            f"{path}: expired at {root.not_valid_after_utc}; empty {path.parent} to have a new authority made"
            " (workloads trust it once their certificates are issued anew)"
        )
    return root


def _due(certificate: x509.Certificate, root: x509.Certificate, now: float) -> bool:
    """Whether the intermediate should be issued anew: half of its life is gone, and the root allows for more."""
    start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return (
        now > (start + end) / 2
        and end < root.not_valid_after_utc.timestamp()
        and certificate.issuer == root.subject
    )


def _read_certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise AuthorityError(f"{path}: {error.strerror}; give a PEM certificate") from None
    except ValueError as error:
        raise AuthorityError(f"{path}: no PEM certificate that can be read: {error}") from None


def _read_key(path: Path) -> SigningKey:
    """The key in `path`. Messages never repeat the parser's: it may quote the key."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            pem = file.read()
    except OSError as error:
        raise AuthorityError(f"{path}: {error.strerror}; give a PEM private key") from None
    if mode & 0o077:
        _log.warning("%s: a private key that others may access (mode %04o); chmod it to 0600", path, mode)
    try:
        key = load_pem_private_key(pem, None)
    except TypeError:
        raise AuthorityError(f"{path}: the key is encrypted; give it without a passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise AuthorityError(f"{path}: no PEM private key that can be read") from None
    return signing_key(key, path)


def signing_key(key: object, path: Path) -> SigningKey:
    """`key`, which came from `path`, if it can sign certificates. Raises AuthorityError."""
    if isinstance(key, ec.EllipticCurvePrivateKey) or (
        isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048
    ):
        return key
    raise AuthorityError(f"{path}: neither an elliptic-curve key nor RSA with 2048 bits or more")


def _restrict(path: Path, mode: int) -> None:
    """Take the rights from others that `path` gives them beyond `mode`; say so, for they may have been used."""
    had = stat.S_IMODE(path.stat().st_mode)
    if not had & ~mode:
        return
    try:
        path.chmod(had & mode)
    except OSError as error:
        # A read-only mount or another owner's directory: usable, and theirs to mend.
        _log.warning("%s: mode %04o lets others in and cannot be changed: %s", path, had, error.strerror)
    else:
        _log.warning("%s: mode %04o let others in; changed to %04o", path, had, had & mode)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What is another when the file at `path` is another or has other content; None if it cannot be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def write(path: Path, data: bytes, mode: int) -> None:
    """Make or replace `path` with `data`, at once and lastingly, never readable beyond `mode`. Raises OSError."""
    temporary = _unfinished(path)
    temporary.unlink(missing_ok=True)  # of a run that was killed; the lock makes it ours
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        temporary.rename(path)
    except OSError:
        # On a full disk, say: half a file would take the place that the next try needs.
        temporary.unlink(missing_ok=True)
        raise
    with _opened(path.parent) as directory:
        os.fsync(directory)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    # The directory itself is the lock file: nothing to create, works on a read-only mount, ends with the process.
    with _opened(directory) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
