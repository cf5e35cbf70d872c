"""Which authority signs while one takes over from another, and which roots peers are told to trust meanwhile.

A pure state machine: files, clocks and requests are its callers'. A change of the root goes through three phases:

1. the old authority signs, and every answer carries both roots;
2. once no certificate is in use whose holder trusts the old root alone, the new authority signs;
3. once no certificate of the old authority is in use, its root is told to nobody any more.

So at every moment any two valid certificates are verified by each other's holders. What is in use is known from
the certificates that were signed here: one is out of use when its holder got another, when it ended, or when its
workload is gone. Before that is known (after a start without memory) the longest life of a certificate decides.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Self

from cryptography import x509

from ztunnel.durations import told
from ztunnel.identity.ca import MIN_REMAINING, Authority, fingerprint, pem
from ztunnel.identity.templates import utc

SETTLE: Final = 12.0  # seconds from the last answer with a new root to its use: a lost one is asked for again


LONG_PAUSE: Final = 60.0  # seconds between looks at all certificates in use, tens of thousands of them
SHORT_PAUSE: Final = 4.0  # the same while they are waited for

Holder = tuple[str, str]
"""Who has a certificate: the node, and the identity."""


class Issued(NamedTuple):
    """The last certificate of a holder: when it ends (Unix seconds), who issued it, what its holder trusts."""

    not_after: float
    issuers: frozenset[str]
    trusted: frozenset[str]


class Root(NamedTuple):
    """A root that peers are told of: since when, and when it was last what new certificates end in (None: now).

    Unix seconds.
    """

    certificate: x509.Certificate
    since: float
    retired: float | None = None


class Succession:
    """The authority that signs, the one that is to sign, and the roots."""

    def __init__(
        self, authority: Authority, now: float, *, memory: bool = False, settle: float = SETTLE
    ) -> None:
        """`authority` signs from the beginning; `now` in Unix seconds.

        With `memory` there are no certificates in use but those that `issued` will hear of; without, there may be any,
        of authorities that signed before.
        """
        self.signing = authority
        self.wanted = authority
        self.settle = settle
        self.roots = {fingerprint(one): Root(one, 0.0) for one in authority.roots}
        self._issued: dict[Holder, Issued] = {}
        # Until when certificates may be in use that nobody remembers.
        self.most = authority.lifetimes.most
        self.unknown_until = 0.0 if memory else now + self.most
        self._started = now
        self._completed_at = 0.0
        self._looked_at = 0.0
        self._answering = authority

    # What happens.

    def want(self, authority: Authority, now: float) -> bool:
        """`authority` is to sign from now on, as soon as it may; whether anything changed by that."""
        if _same(authority, self.wanted) and authority.root_pem == self.wanted.root_pem:
            return False
        self.wanted = authority
        self._advance(now)
        return True

    def issued(self, authority: Authority, node: str, identity: str, not_after: float, now: float) -> None:
        """`authority`, which was `answering`, just signed this holder a certificate that ends at `not_after`."""
        before = self._issued.get((node, identity))
        self._issued[node, identity] = Issued(not_after, authority.issuers, authority.trusted)
        if before is not None and before.trusted != authority.trusted:
            self._completed_at = now

    def advance(self, now: float, in_use: Callable[[str, str], bool]) -> bool:
        """Go on as far as possible; whether anything changed.

        `in_use(node, identity)` says whether a workload of that identity still runs there. Often enough is every
        second: nothing is looked at that cannot have changed.
        """
        pause = LONG_PAUSE if self.phase == "stable" else SHORT_PAUSE
        if not 0 <= now - self._looked_at < pause:
            self._looked_at = now
            self._forget(now, in_use)
        return self.phase != "stable" and self._advance(now)

    def _advance(self, now: float) -> bool:
        before = (self.signing, tuple(self.roots))
        if not _same(self.wanted, self.signing) and self.waiting(now) == "":
            self._retire(self.signing, now)
        issuing = {fingerprint(one): one for one in self.signing.issuing_roots}
        wanted = {fingerprint(one): one for one in self.wanted.roots}
        needed = self._needed(now)
        kept = {name: root.certificate for name, root in self.roots.items() if name in needed}
        roots = {}
        # The root that signs comes first: that its file changed tells proxies to ask for certificates again.
        for name, certificate in (issuing | wanted | kept).items():
            old = self.roots.get(name)
            retired = old.retired if old is not None and name not in issuing else None
            roots[name] = Root(certificate, old.since if old is not None else now, retired)
        self.roots = roots
        if before == (self.signing, tuple(self.roots)):
            return False
        self._answering = self._with_roots()
        return True

    # What is.

    @property
    def answering(self) -> Authority:
        """The authority that signs, with all roots that are to be told."""
        return self._answering

    @property
    def bundle(self) -> list[x509.Certificate]:
        """The roots to trust, the one that signs first."""
        return [root.certificate for root in self.roots.values()]

    @property
    def phase(self) -> str:
        """`stable`, `distributing` (phase 1) or `retiring` (phase 3)."""
        if not _same(self.wanted, self.signing):
            return "distributing"
        return "stable" if set(self.roots) <= self.wanted.trusted else "retiring"

    def waiting(self, now: float) -> str:
        """What the authority that is wanted waits for; "" if it may sign now."""
        new = self.wanted.issuers
        if new & self.signing.issuers:
            return ""  # another intermediate below a root that all know
        if self.signing.not_after - now < MIN_REMAINING:
            return ""  # the old one cannot sign any more: the new one's root comes with each new certificate
        since = min((self.roots[name].since for name in new if name in self.roots), default=None)
        if since is None:
            return "its root is not told yet"
        # What we do not know of was given out before we began to remember: without this root only if that was
        # before it was told, too.
        until = min(self.unknown_until, since + self.most)
        if now < until:
            return f"certificates given out before {utc(self._started)} may be in use until {utc(until)}"
        without = [one for one in self._issued.values() if not one.trusted & new]
        if without:
            last = max(one.not_after for one in without)
            return f"certificates of proxies that have not got its root yet: {len(without)}, the last ends {utc(last)}"
        ready = max(since, self._completed_at) + self.settle
        return f"settling for another {told(math.ceil(ready - now))}" if now < ready else ""

    def retiring(self, now: float) -> str:
        """What the old roots are still needed for; "" if there are none."""
        if self.phase != "retiring":
            return ""
        old = [one for one in self._issued.values() if not one.issuers <= self.wanted.trusted]
        if old:
            last = max(one.not_after for one in old)
            return f"certificates in use of the old authority: {len(old)}, the last ends {utc(last)}"
        return f"certificates given out before {utc(self._started)} may be in use until {utc(self.unknown_until)}"

    # Memory over restarts.

    def dump(self, *, complete: bool) -> dict[str, Any]:
        """What a successor of this process has to know, as JSON; certificates in use only if `complete`."""
        return {
            "roots": [
                {"pem": pem([root.certificate]).decode(), "since": root.since, "retired": root.retired}
                for root in self.roots.values()
            ],
            "unknown_until": self.unknown_until,
            "most": self.most,
            "issued": [
                [*holder, one.not_after, sorted(one.issuers), sorted(one.trusted)]
                for holder, one in self._issued.items()
            ]
            if complete
            else None,
        }

    @classmethod
    def restore(
        cls, authority: Authority, dumped: Mapping[str, Any], now: float, *, settle: float = SETTLE
    ) -> Self:
        """Go on where another process's `dump` ended, with `authority` signing. Raises ValueError if malformed."""
        try:
            made = cls(authority, now, memory=dumped["issued"] is not None, settle=settle)
            for one in dumped["roots"]:
                certificate = x509.load_pem_x509_certificate(one["pem"].encode())
                retired = None if one["retired"] is None else float(one["retired"])
                made.roots[fingerprint(certificate)] = Root(certificate, float(one["since"]), retired)
            made.most = max(made.most, int(dumped["most"]))  # what was given out before may live so long
            made.unknown_until = now + made.most
            if dumped["issued"] is not None:
                made.unknown_until = float(dumped["unknown_until"])
            for node, identity, not_after, issuers, trusted in dumped["issued"] or ():
                made._issued[node, identity] = Issued(
                    float(not_after), frozenset(issuers), frozenset(trusted)
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a dump of a succession: {error!r}") from None
        made._answering = made._with_roots()
        return made

    # Inside.

    def _retire(self, old: Authority, now: float) -> None:
        self.signing = self.wanted
        for name in old.issuers - self.wanted.issuers:
            self.roots[name] = self.roots[name]._replace(retired=now)

    def _needed(self, now: float) -> set[str]:
        """Roots that certificates in use end in."""
        needed = set(self.signing.issuers).union(*(one.issuers for one in self._issued.values()))
        for name, root in self.roots.items():
            # Of one that signed before we remember: as long as what it signed then may live.
            if root.retired is not None and now < min(self.unknown_until, root.retired + self.most):
                needed.add(name)
        return needed

    def _forget(self, now: float, in_use: Callable[[str, str], bool]) -> None:
        for holder, one in list(self._issued.items()):
            if one.not_after <= now or not in_use(*holder):
                del self._issued[holder]

    def _with_roots(self) -> Authority:
        # As one list, in its order: the authority's own roots that are not told any more are left out.
        signing = self.signing
        return Authority(
            signing.key,
            signing.certificate,
            signing.intermediates,
            self.bundle,
            now=signing.now,
            name=signing.name,
            lifetimes=self.wanted.lifetimes,
        )


def _same(one: Authority, other: Authority) -> bool:
    return one.chain == other.chain and one.issuers == other.issuers
