"""Certificates of this node's workloads: fetched when wanted, renewed at half of their life. Control process only.

One task per identity does all fetching for it, so never two at once; the trio clock paces it, while what is
valid is decided by the wall clock (`now`), as certificates are.
"""

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Never

import trio

from ztunnel.identity import keys
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import CertificateUnavailableError, IdentityError
from ztunnel.identity.spiffe import SpiffeId

Sign = Callable[[bytes, str, int], Awaitable[list[bytes]]]

FETCH_TIMEOUT = 30.0  # seconds an authority may take to answer
MAX_FETCHES = 8  # at once: a restarted node asks for all of its identities
REFRESH_PACE, REFRESH_SPREAD = (
    0.25,
    15.0,
)  # seconds: so many for each certificate to be asked for anew, so many at most
FIRST_RETRY, LAST_RETRY = 0.25, 30.0  # seconds; doubled from the one to the other
MIN_RENEWAL = 1.0  # seconds between renewals of a certificate however short its life
CLOCK_PRECISION = 0.001  # seconds; floating-point wall clock times are not exact, a rest may never pass
CLOCK_CHECK = 60.0  # seconds: the trio clock stands still while a machine is suspended, so look again

_log = logging.getLogger(__name__)


class CertificateState(Enum):
    """Where an identity's certificate stands."""

    PENDING = "pending"  # the first fetch is under way
    VALID = "valid"
    FAILING = "failing"  # valid still, but its renewal fails
    UNAVAILABLE = "unavailable"  # none that is valid, and the last fetch failed


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """One line of the admin page's list of certificates; times in Unix seconds, None where there is none.

    `certificate` is for its chain (config dumps); `next_fetch` is when it is renewed or tried again.
    """

    identity: str
    state: CertificateState
    references: int
    not_before: float | None
    not_after: float | None
    next_fetch: float | None
    failures: int
    last_error: str
    certificate: WorkloadCertificate | None


class _Entry:
    __slots__ = (
        "certificate",
        "changed",
        "failures",
        "fetching",
        "identity",
        "last_error",
        "next_fetch",
        "poke",
        "references",
        "running",
        "scope",
    )

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.references = 0
        self.running = False
        self.scope = trio.CancelScope()
        self.changed = trio.Event()
        self.poke = trio.Event()
        self.forget()

    def forget(self) -> None:
        self.certificate: WorkloadCertificate | None = None
        self.last_error = ""
        self.failures = 0
        self.fetching = False
        self.next_fetch: float | None = None
        self.tell()

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class CertificateManager:
    """Holds a valid certificate for every identity that somebody on this node wants.

    `run()` has to be running for anything to be fetched. All methods are for one trio run; none blocks
    except `wait`.
    """

    def __init__(
        self,
        sign: Sign,
        ttl: int = 0,
        *,
        on_update: Callable[[WorkloadCertificate], None] | None = None,
        now: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        max_fetches: int = MAX_FETCHES,
        fetch_timeout: float = FETCH_TIMEOUT,
    ) -> None:
        """`sign(csr_pem, identity, ttl)` asks the authority and returns PEMs, leaf first, root last.

        `ttl` in seconds is what is asked for, 0 for what the authority gives by itself. `on_update` is called
        with each new certificate; it must not block. `now` gives Unix seconds. At most `max_fetches`
        requests are under way at once, each for at most `fetch_timeout` seconds.
        """
        self._sign = sign
        self._ttl = ttl
        self._on_update = on_update
        self._now = now
        self._rng = rng or random.SystemRandom()
        self._limit = trio.CapacityLimiter(max_fetches)
        self._fetch_timeout = fetch_timeout
        self._entries: dict[str, _Entry] = {}
        self._nursery: trio.Nursery | None = None
        self._roots = b""  # PEM; what the authority told last, for all identities
        self._roots_asked = 0.0  # when that was asked for, by the trio clock

    def want(self, identity: str) -> None:
        """Have a certificate for `identity` (a SPIFFE id) until as many `release` calls. Raises SpiffeIdError."""
        entry = self._entries.get(identity)
        if entry is None:
            SpiffeId.parse(identity)
            entry = self._entries[identity] = _Entry(identity)
        entry.references += 1
        self._start(entry)

    def release(self, identity: str) -> None:
        """Undo one `want`; the last one drops key and certificate. Raises IdentityError if there was none."""
        entry = self._wanted(identity)
        entry.references -= 1
        if entry.references:
            return
        entry.forget()
        if entry.running:
            entry.scope.cancel()  # its task removes the entry, unless it is wanted again by then
        else:
            del self._entries[identity]

    def current(self, identity: str) -> WorkloadCertificate | None:
        """The valid certificate of `identity`, or None if there is none (now, or at all)."""
        entry = self._entries.get(identity)
        return self._valid(entry) if entry is not None else None

    async def wait(self, identity: str, *, persist: bool = False) -> WorkloadCertificate:
        """The valid certificate of `identity`, waiting for a fetch that is under way.

        Raises CertificateUnavailableError with the last error if there is none and fetching failed; with
        `persist` it waits on through failures instead. Raises IdentityError if nobody wants `identity`
        (any more).
        """
        await trio.lowlevel.checkpoint()
        while True:
            entry = self._wanted(identity)
            certificate = self._valid(entry)
            if certificate is not None:
                return certificate
            if entry.last_error and not entry.fetching and not persist:
                raise CertificateUnavailableError(identity, entry.last_error)
            if not entry.last_error and not entry.fetching:
                entry.poke.set()  # it ran out unnoticed (a suspended machine): fetch now
            await entry.changed.wait()

    def refresh(self) -> None:
        """Ask for all certificates anew, one after another: the authority has news, most likely other roots."""
        if self._nursery is not None:
            spread = min(REFRESH_SPREAD, REFRESH_PACE * len(self._entries))
            for entry in self._entries.values():
                self._nursery.start_soon(self._refresh, entry, self._rng.uniform(0, spread))

    async def _refresh(self, entry: _Entry, delay: float) -> None:
        await trio.sleep(delay)
        while entry.fetching:  # it may have been asked for before the news
            await entry.changed.wait()
        entry.poke.set()

    def status(self) -> list[CertificateStatus]:
        """Every wanted identity, by name."""
        return [
            self._status(entry)
            for entry in sorted(self._entries.values(), key=lambda one: one.identity)
            if entry.references
        ]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> Never:
        """Fetch and renew until cancelled. Owns every task of the manager."""
        if self._nursery is not None:
            raise RuntimeError("the certificate manager runs already")
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for entry in list(self._entries.values()):
                    self._start(entry)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None
        raise AssertionError("unreachable: the nursery ends by cancellation")

    def _start(self, entry: _Entry) -> None:
        if self._nursery is not None and not entry.running:
            entry.running = True
            self._nursery.start_soon(self._keep, entry)

    async def _keep(self, entry: _Entry) -> None:
        """The one task of `entry`; goes on if it was released and is wanted again before this could end."""
        try:
            while entry.references:
                with trio.CancelScope() as entry.scope:
                    while True:
                        await self._fetch(entry)
                        await self._pause(entry)
        finally:
            entry.running = False
            entry.fetching = False
            if not entry.references:
                del self._entries[entry.identity]

    async def _fetch(self, entry: _Entry) -> None:
        entry.fetching = True
        try:
            async with self._limit:
                asked = trio.current_time()
                certificate = await self._request(entry.identity)
        except Exception as error:
            if not entry.references:
                return  # released meanwhile: nobody is left to tell
            entry.failures += 1
            entry.last_error = _told(error)
            delay = min(LAST_RETRY, FIRST_RETRY * 2 ** min(entry.failures - 1, 20))
            delay *= self._rng.uniform(0.5, 1.0)
            _log.warning(
                "certificate of %s: fetch failed (%d in a row), next in %.1f s: %s",
                entry.identity,
                entry.failures,
                delay,
                entry.last_error,
            )
        else:
            if not entry.references:
                return
            entry.certificate = certificate
            entry.failures = 0
            entry.last_error = ""
            # From now and not from not_before, which is backdated: a short life would be over its half at once.
            half = (certificate.not_after - self._now()) / 2
            delay = max(MIN_RENEWAL, half * self._rng.uniform(0.9, 1.1))
            self._update(certificate)
            self._trust(certificate.roots_pem, asked)
        finally:
            entry.fetching = False
        entry.next_fetch = self._now() + delay
        entry.poke = trio.Event()
        entry.tell()

    def _trust(self, roots_pem: bytes, asked: float) -> None:
        """Have all identities trust what the authority told last: one of them hears first of another root."""
        if asked < self._roots_asked:
            return  # overtaken by a later question's answer
        self._roots_asked = asked
        if roots_pem == self._roots:
            return
        self._roots = roots_pem
        for entry in self._entries.values():
            held = entry.certificate
            if entry.references and held is not None and held.roots_pem != roots_pem:
                entry.certificate = replace(held, roots_pem=roots_pem)
                self._update(entry.certificate)

    async def _request(self, identity: str) -> WorkloadCertificate:
        key = keys.generate()
        try:
            with trio.fail_after(self._fetch_timeout):
                chain = await self._sign(keys.csr(key, identity), identity, self._ttl)
        except trio.TooSlowError:
            raise IdentityError(
                f"the certificate authority did not answer within {self._fetch_timeout:g} s"
            ) from None
        return WorkloadCertificate.from_signed(identity, key, chain, self._now())

    def _update(self, certificate: WorkloadCertificate) -> None:
        if self._on_update is None:
            return
        try:
            self._on_update(certificate)
        except Exception:
            # A listener's defect must not end the rotation of every identity.
            _log.exception("certificate of %s: passing it on failed", certificate.identity)

    async def _pause(self, entry: _Entry) -> None:
        """Until `next_fetch` by either clock: the wall clock may be set back, the trio clock may stand still."""
        if entry.next_fetch is None:
            return
        deadline = trio.current_time() + entry.next_fetch - self._now()
        while not entry.poke.is_set():
            left = min(deadline - trio.current_time(), entry.next_fetch - self._now())
            if left < CLOCK_PRECISION:
                return
            with trio.move_on_after(min(left, CLOCK_CHECK)):
                await entry.poke.wait()

    def _wanted(self, identity: str) -> _Entry:
        entry = self._entries.get(identity)
        if entry is None or not entry.references:
            raise IdentityError(f"certificate of {identity}: nobody on this node wants it")
        return entry

    def _valid(self, entry: _Entry) -> WorkloadCertificate | None:
        certificate = entry.certificate
        return certificate if certificate is not None and self._now() < certificate.not_after else None

    def _status(self, entry: _Entry) -> CertificateStatus:
        certificate = entry.certificate
        if self._valid(entry) is not None:
            state = CertificateState.FAILING if entry.last_error else CertificateState.VALID
        else:
            state = CertificateState.UNAVAILABLE if entry.last_error else CertificateState.PENDING
        return CertificateStatus(
            entry.identity,
            state,
            entry.references,
            certificate.not_before if certificate else None,
            certificate.not_after if certificate else None,
            entry.next_fetch,
            entry.failures,
            entry.last_error,
            certificate,
        )


def _told(error: BaseException) -> str:
    """One line for an operator, also where `error` is a group from somebody's nursery."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_told(one) for one in error.exceptions)
    return str(error) or type(error).__name__
