"""The revocation list that this node honours: a file, followed while the proxy runs. Control process only.

It fails closed: a proxy that is told of a list starts only with it. Once there is one, a file that is gone or cannot
be read changes nothing, and neither does the end of a list's time: what it revokes stays revoked, and a warning tells.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import trio

from ztunnel.durations import told
from ztunnel.identity import crl
from ztunnel.identity.ca_files import stamp
from ztunnel.identity.errors import CertificateError

CHECK_INTERVAL: Final = 2.0  # seconds

_log = logging.getLogger(__name__)


class Revocations:
    """The list in force; without a path there is none."""

    def __init__(self, path: Path | None, now: Callable[[], float] = time.time) -> None:
        """Read the list. Raises CertificateError, which says what to do, if there is a path but no list."""
        self.path = path
        self.pem = b""
        self.problem = ""
        self._now = now
        self._loaded: float | None = None
        self._stamp: object = None
        self._warned: set[str] = set()
        if path is not None:
            self._stamp = stamp(path)
            try:
                self.pem = crl.read(path)
            except (OSError, CertificateError) as error:
                raise CertificateError(
                    f"CRL_PATH: {path}: {getattr(error, 'strerror', None) or error}; an empty file says that nothing is"
                    " revoked, and without CRL_PATH nobody looks"
                ) from None
            self._loaded = now()
            self._warn()

    async def run(self, on_change: Callable[[bytes], None]) -> None:
        """Follow the file until cancelled; `on_change` gets each new list (PEM)."""
        if self.path is None:
            return
        while True:
            await trio.sleep(CHECK_INTERVAL)
            await self.check(on_change)

    async def check(self, on_change: Callable[[bytes], None]) -> None:
        """Look once."""
        if self.path is None:
            return
        found = await trio.to_thread.run_sync(stamp, self.path)
        if found != self._stamp:
            try:
                pem = await trio.to_thread.run_sync(crl.read, self.path)
            except (OSError, CertificateError) as error:
                problem = (
                    f"{self.path}: {getattr(error, 'strerror', None) or error}; the last list stays in force"
                )
                if problem != self.problem:
                    _log.error("revocation list: %s", problem)
                self.problem = problem  # and looked at again: it may be half written
            else:
                self._stamp, self.problem, self._loaded = found, "", self._now()
                if pem != self.pem:
                    self.pem = pem
                    on_change(pem)
        self._warn()

    def status(self) -> dict[str, Any] | None:
        """For the admin page; None if nobody looks."""
        if self.path is None:
            return None
        return {
            "path": str(self.path),
            "loaded": self._loaded,
            "error": self.problem or None,
            "lists": crl.describe(self.pem),
        }

    def _warn(self) -> None:
        for one in crl.describe(self.pem):
            end = one["next_update"]
            name = f"{one['issuer']} {end}"
            if end is not None and end < self._now() and name not in self._warned:
                self._warned.add(name)
                _log.warning(
                    "revocation list of %s: ended %s ago and no other followed; what it revokes stays revoked",
                    one["issuer"],
                    told(self._now() - end),
                )


async def follow(path: Path, on_change: Callable[[], None], interval: float = CHECK_INTERVAL) -> None:
    """Call `on_change` whenever the file at `path` is another, once it rested for `interval` seconds."""
    known = seen = await trio.to_thread.run_sync(_content, path)
    while True:
        await trio.sleep(interval)
        before, seen = seen, await trio.to_thread.run_sync(_content, path)
        if seen not in (known, None) and seen == before:
            known = seen
            on_change()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
