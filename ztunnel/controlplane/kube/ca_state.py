"""The certificate authority that replicas share, as data: which one signs, which roots are told. Pure functions.

Every replica does what the shared state says and acknowledges it; one of them, the leader, makes the next state. A
change of the root takes the steps of ztunnel/identity/succession.py. There one process remembers what it signed; here
no replica knows what the others signed, so the longest life that a certificate may have decides instead, counted from
when the last replica acknowledged:

1. the old authority signs, and every answer and every namespace's ConfigMap carries both roots;
2. MAX_WORKLOAD_CERT_TTL (and a few seconds) after all replicas do that, no certificate is in use whose holder trusts
   the old root alone: the new authority signs;
3. MAX_WORKLOAD_CERT_TTL after all replicas do that, the old root is told to nobody any more.

A replica that is cut off from the API server goes on with the state that it has. It has not acknowledged the next one,
so nothing goes on without it; only one whose pod is gone is waited for no longer.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ztunnel.identity import ca_files, keys
from ztunnel.identity.ca import Authority, Lifetimes, fingerprint, pem
from ztunnel.identity.errors import AuthorityError
from ztunnel.identity.succession import SETTLE, Succession
from ztunnel.identity.templates import SigningKey

CA_CERT, CA_KEY, ROOT_CERT, CHAIN = (
    ca_files.CA_CERT, ca_files.CA_KEY, ca_files.ROOT_CERT, ca_files.CHAIN,
)  # fmt: skip


REMEDY: Final = (
    "restore it, or delete it: a replica that runs makes it again of what it knows; where none runs, the authority of"
    " cacerts or istio-ca-secret signs at once, which certificates of another one do not survive"
)

VERSION: Final = 1
"""Of the dump. One without a number is of the time before there was one, and lacks `longest` and `ends`."""


class EndedError(AuthorityError):
    """The authority that signed last has ended, and with it all that it signed."""


class State(NamedTuple):
    """What every replica does: `answering` signs and tells all roots. `dump` is its JSON form, with the key."""

    answering: Authority
    succession: Succession
    told: float
    """Unix seconds: replicas that are not there any more may have done something else until then."""
    digest: str
    """Of what there is to do: the chain that signs, and the roots."""
    longest: float
    """Seconds: certificates may be in use that were given out for so long."""
    ends: float
    """Unix seconds: when the last of them ends. 0: they are still given out."""
    revocations: bytes = b""
    """The revocation lists in force, PEM; kept beside the dump."""

    @property
    def dump(self) -> bytes:
        """As it is kept; it holds the signing key."""
        signing = self.succession.signing
        return json.dumps(
            {
                "version": VERSION,
                "authority": {
                    "key": keys.to_pem(signing.key).decode(),
                    "chain": pem([signing.certificate, *signing.intermediates]).decode(),
                    "roots": pem(signing.issuing_roots).decode(),
                },
                "succession": self.succession.dump(complete=False),
                "told": self.told,
                "longest": self.longest,
                "ends": self.ends,
            }
        ).encode()

    @property
    def kept(self) -> tuple[str, float, float, float, bytes]:
        """What is another when the state has to be written."""
        return self.digest, self.told, self.longest, self.ends, self.revocations


class Replica(NamedTuple):
    """What a replica acknowledged: the pod it is, which state, since when (0: since it began), Unix seconds.

    And for how long it gives out certificates at most (seconds).
    """

    name: str
    uid: str
    digest: str
    at: float
    most: float


def first(authority: Authority, now: float) -> State:
    """The state in which `authority` signs and nothing else is known."""
    return _state(Succession(authority, now), 0.0, float(authority.lifetimes.most), 0.0)


def parse(data: bytes, name: str, now: float, lifetimes: Lifetimes) -> State:
    """The state in `data`, which is kept in the Secret `name`. Raises AuthorityError, EndedError.

    No message holds a key.
    """
    where = f"Secret {name}"
    try:
        dumped = _upgraded(json.loads(data), where, now)
        kept = dumped["authority"]
        chain = x509.load_pem_x509_certificates(kept["chain"].encode())
        if min(one.not_valid_after_utc.timestamp() for one in chain) <= now:
            raise EndedError(f"{where}: the authority that signed last has ended")
        authority = _authority(
            {
                CA_CERT: kept["chain"].encode(),
                CA_KEY: kept["key"].encode(),
                ROOT_CERT: kept["roots"].encode(),
            },
            where,
            lifetimes,
        )
        succession = Succession.restore(authority, dumped["succession"], now, settle=SETTLE)
        return _state(succession, float(dumped["told"]), float(dumped["longest"]), float(dumped["ends"]))
    except KeyError as error:
        raise AuthorityError(f"{where}: the state lacks {error.args[0]!r}; {REMEDY}") from None
    except (ValueError, TypeError, AttributeError) as error:
        # What a parser says may quote the key.
        raise AuthorityError(
            f"{where}: no state that can be read ({type(error).__name__}); {REMEDY}"
        ) from None


def _upgraded(dumped: dict[str, Any], where: str, now: float) -> dict[str, Any]:
    """The dump in today's form. Raises AuthorityError for one of a later version; KeyError, TypeError."""
    version = dumped.get("version", 0)
    if version not in range(VERSION + 1):
        raise AuthorityError(
            f"{where}: the state is of version {version!r}, of a later control plane; this one knows versions up to"
            f" {VERSION}: run that one again, for this one might forget roots that are in use"
        )
    if version == 0:
        # Any replica may have done something else until now, and certificates live for as long as the succession says.
        before = {"told": now, "longest": float(dumped["succession"]["most"]), "ends": 0.0}
        return before | dumped
    return dumped


def authority_of(data: Mapping[str, bytes], name: str, lifetimes: Lifetimes) -> Authority:
    """The authority in a Secret's data: ca-cert.pem, ca-key.pem, and where it is not self-signed root-cert.pem.

    cert-chain.pem may hold intermediates, and ca-cert.pem too. Raises AuthorityError naming the Secret and its key.
    """
    try:
        return _authority(data, f"Secret {name}", lifetimes)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AuthorityError(
            f"Secret {name}: a certificate in it cannot be used: {error}; give P-256, P-384 or RSA authorities"
        ) from None


def next_state(
    state: State, wanted: Authority, replicas: Iterable[Replica], now: float
) -> tuple[State, list[str]]:
    """The state that follows, the same where nothing changes; and what is waited for, for people.

    `replicas` are all that there are. Certificates of any that went may be in use: see `without`.
    """
    present = list(replicas)
    late = [one for one in present if one.digest != state.digest]
    told = now if late else max([state.told, *(one.at for one in present)])
    longest, ends = _longest(state, max([float(wanted.lifetimes.most), *(one.most for one in present)]), now)
    dumped = _counted_from(state.succession.dump(complete=False), told, longest)
    succession = Succession.restore(state.succession.signing, dumped, now, settle=SETTLE)
    succession.want(wanted, now)
    succession.advance(now, _anybody)
    following = _state(succession, state.told, longest, ends)._replace(revocations=state.revocations)
    waiting = _waiting(succession, [one.name for one in late], now)
    if following.digest == state.digest:
        following = state._replace(longest=longest, ends=ends)
    return following, waiting


def without(state: State, gone: Iterable[Replica], now: float) -> State:
    """The state once these replicas are not waited for any more: what they did last may count until now."""
    ends = [now if one.digest != state.digest else one.at for one in gone]
    return state._replace(told=max([state.told, *ends]))


def _longest(state: State, most: float, now: float) -> tuple[float, float]:
    """`longest` and `ends` now that certificates are given out for `most` seconds."""
    if most >= state.longest or (state.ends and now >= state.ends):
        return most, 0.0
    return state.longest, state.ends or now + state.longest + SETTLE


def _counted_from(dumped: dict[str, Any], told: float, longest: float) -> dict[str, Any]:
    """The dump, in which nothing of late happened before `told`: then the last replica did it, too.

    A little later, for the replicas' clocks differ, and what they were just signing then had the old roots.
    """
    told += SETTLE
    dumped["most"] = math.ceil(longest)
    for root in dumped["roots"]:
        if root["since"]:
            root["since"] = max(root["since"], told)
        if root["retired"] is not None:
            root["retired"] = max(root["retired"], told)
    return dumped


def phase(state: State, wanted: Authority) -> str:
    """`stable`, `distributing` (the new root is told) or `retiring` (the old root is still told)."""
    signing = state.succession.signing
    if (signing.chain, signing.issuers) != (wanted.chain, wanted.issuers):
        return "distributing"
    return "stable" if set(state.succession.roots) <= wanted.trusted else "retiring"


def _waiting(succession: Succession, late: list[str], now: float) -> list[str]:
    if succession.phase == "stable":
        return []
    why = succession.waiting(now) if succession.phase == "distributing" else succession.retiring(now)
    replicas = f"replicas that have not followed yet: {', '.join(sorted(late)[:5])}" if late else ""
    return [one for one in (replicas, why) if one]


def _state(succession: Succession, told: float, longest: float, ends: float) -> State:
    # In a freshly restored one the roots of the dump are told, not only the authority's own.
    answering = succession.answering
    parts = [fingerprint(one) for one in (*answering.chain, answering.certificate, *succession.bundle)]
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    return State(answering, succession, told, digest, longest, ends)


def _authority(data: Mapping[str, bytes], where: str, lifetimes: Lifetimes) -> Authority:
    above = _certificates(data, CA_CERT, where)
    if not above:
        raise AuthorityError(f"{where}: {CA_CERT} is missing; give the signing certificate, PEM")
    certificate = above[0]
    roots = _certificates(data, ROOT_CERT, where)
    if not roots:
        if certificate.issuer != certificate.subject:
            raise AuthorityError(
                f"{where}: {ROOT_CERT} is missing, and {CA_CERT} is issued by"
                f" {certificate.issuer.rfc4514_string()!r}, not by itself; add that root's certificate"
            )
        roots = [certificate]
    above = [*above[1:], *_certificates(data, CHAIN, where)]
    intermediates = [one for one in dict.fromkeys(above) if one != certificate and one not in roots]
    key = _key(data, where)
    return Authority(key, certificate, intermediates, roots, name=where, lifetimes=lifetimes)


def _certificates(data: Mapping[str, bytes], name: str, where: str) -> list[x509.Certificate]:
    if not data.get(name, b"").strip():
        return []
    try:
        return x509.load_pem_x509_certificates(data[name])
    except ValueError:
        raise AuthorityError(f"{where}: {name} is no PEM certificate that can be read; replace it") from None


def _key(data: Mapping[str, bytes], where: str) -> SigningKey:
    """The key. Messages never repeat the parser's: it may quote the key."""
    text = data.get(CA_KEY, b"")
    if not text.strip():
        raise AuthorityError(f"{where}: {CA_KEY} is missing; give the key of {CA_CERT}, PEM")
    try:
        key = load_pem_private_key(text, None)
    except TypeError:
        raise AuthorityError(f"{where}: {CA_KEY} is encrypted; give it without a passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise AuthorityError(
            f"{where}: {CA_KEY} is no PEM private key that can be read; replace it"
        ) from None
    return ca_files.signing_key(key, Path(f"{where}: {CA_KEY}"))


def _anybody(_node: str, _identity: str) -> bool:
    return True
