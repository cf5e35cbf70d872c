"""SPIFFE ids of workloads, parsed strictly; pure text, no certificates."""

import re
from typing import NamedTuple, Self

from ztunnel.identity.errors import SpiffeIdError

SCHEME = "spiffe://"
MAX_LENGTH = 2048  # bytes of a whole id, SPIFFE-ID section 2.3
MAX_TRUST_DOMAIN_LENGTH = 255

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+\Z")
_SEGMENT = re.compile(r"[a-zA-Z0-9._-]+\Z")


class SpiffeId(NamedTuple):
    """The identity of a Kubernetes workload: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`."""

    trust_domain: str
    namespace: str
    service_account: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """The workload identity that `text` spells.

        Strict as SPIFFE-ID section 2 asks: the scheme and trust domain in lower case, no user, port, query,
        fragment or percent-encoding, no empty, `.` or `..` segment, no trailing slash; and the path has to be
        Kubernetes' `/ns/NAMESPACE/sa/SERVICE_ACCOUNT`. Raises SpiffeIdError.
        """
        if len(text) > MAX_LENGTH:
            raise SpiffeIdError(
                f"SPIFFE id of {len(text)} characters ({text[:60]!r}...): at most {MAX_LENGTH} are allowed"
            )
        if not text.startswith(SCHEME):
            raise SpiffeIdError(f"SPIFFE id {text!r}: does not begin with {SCHEME!r}")
        trust_domain, *path = text[len(SCHEME) :].split("/")
        check_trust_domain(trust_domain, text)
        for segment in path:
            if segment in ("", ".", ".."):
                raise SpiffeIdError(f"SPIFFE id {text!r}: path segment {segment!r} is not allowed")
            if not _SEGMENT.match(segment):
                raise SpiffeIdError(
                    f"SPIFFE id {text!r}: path segment {segment!r} has characters other than"
                    " letters, digits, '.', '-' and '_'"
                )
        if len(path) != 4 or path[0] != "ns" or path[2] != "sa":
            raise SpiffeIdError(f"SPIFFE id {text!r}: the path is not /ns/NAMESPACE/sa/SERVICE_ACCOUNT")
        return cls(trust_domain, path[1], path[3])

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"


def check_trust_domain(trust_domain: str, where: str = "") -> None:
    """Raise SpiffeIdError unless `trust_domain` is one (SPIFFE-ID section 2.1); `where` is named if given."""
    of = f"SPIFFE id {where!r}: " if where else ""
    if len(trust_domain) > MAX_TRUST_DOMAIN_LENGTH:
        raise SpiffeIdError(
            f"{of}trust domain of {len(trust_domain)} characters: at most"
            f" {MAX_TRUST_DOMAIN_LENGTH} are allowed"
        )
    if not _TRUST_DOMAIN.match(trust_domain):
        raise SpiffeIdError(
            f"{of}trust domain {trust_domain!r} is not made of lower-case letters, digits, '.', '-' and '_'"
        )
