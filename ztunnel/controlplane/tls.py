"""The control plane's own TLS certificate, from its own authority, renewed while it runs."""

import logging
import os
import ssl
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import trio

from ztunnel.identity.ca import Authority, ServerCertificate
from ztunnel.identity.errors import AuthorityError
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane.ca")

SERVER_NAMES: Final = ("127.0.0.1", "::1", "localhost", "istiod.istio-system.svc")
RENEWAL_INTERVAL: Final = 12 * 3600  # seconds; certificates and intermediates live far longer


class Keeper(Protocol):
    """Where the authority comes from."""

    @property
    def authority(self) -> Authority:
        """The authority that signs now."""
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call this whenever another authority signs, or other roots are told."""
        ...


class ServerIdentity:
    """The TLS context of the server, its certificate always one of the authority that signs now.

    `context` stays the same object: what is loaded into it counts for the connections accepted from then on.
    """

    def __init__(
        self,
        keeper: Keeper,
        host: str,
        names: Iterable[str] = SERVER_NAMES,
        protocols: Iterable[str] = ("h2",),
    ) -> None:
        """`host` is what the server listens on, which is in the certificate beside `names`.

        `protocols` are those of ALPN. Raises AuthorityError.
        """
        self._keeper = keeper
        self._names = tuple(dict.fromkeys((*names, *({host} - {"0.0.0.0", "::", ""}))))  # noqa: S104
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.set_alpn_protocols(list(protocols))
        _load(self.context, keeper.authority.server_certificate(self._names))
        keeper.on_change(self._renew_or_tell)

    def renew(self) -> None:
        """Take a new certificate. Raises AuthorityError; what there was stays in force then."""
        certificate = self._keeper.authority.server_certificate(self._names)
        _load(self.context, certificate)
        logger.info("server certificate renewed", extra=fields(not_after=int(certificate.not_after)))

    def _renew_or_tell(self) -> None:
        try:
            self.renew()
        except (AuthorityError, OSError) as error:
            logger.error("cannot renew the server certificate: %s", error)

    async def run(self) -> None:
        """Renew twice a day until cancelled."""
        while True:
            await trio.sleep(RENEWAL_INTERVAL)
            self._renew_or_tell()


def _load(context: ssl.SSLContext, certificate: ServerCertificate) -> None:
    # The ssl module reads certificates from files only; this one lives in memory and never touches a disk.
    descriptor = os.memfd_create("server-certificate", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(certificate.key_pem + certificate.chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
