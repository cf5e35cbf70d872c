"""What a control plane is wherever its objects and its authority come from: they are read, translated and served."""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from functools import partial
from typing import Any, Final, Protocol

import trio
import trio_asyncio
from grpclib.server import Server

from ztunnel.admin.pages import Pages
from ztunnel.controlplane.authn import NODE_PROXIES, Authenticator
from ztunnel.controlplane.ca import CertificateService
from ztunnel.controlplane.follow import Follower
from ztunnel.controlplane.pages import control_pages
from ztunnel.controlplane.registry import Registry
from ztunnel.controlplane.resources import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    WAYPOINT_POLICY_TYPE,
    ResourceSet,
)
from ztunnel.controlplane.tls import SERVER_NAMES, ServerIdentity
from ztunnel.controlplane.translate import Settings
from ztunnel.controlplane.xds import DiscoveryService, PreencodedCodec
from ztunnel.identity.ca import Authority
from ztunnel.identity.spiffe import SpiffeId
from ztunnel.store.base import Store
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane")

GOODBYE: Final = 2.0  # seconds that clients have to read why their stream ends
POD_PATIENCE: Final = 1.0  # seconds that a certificate request waits for its pod to be heard of


class Keeper(Protocol):
    """Where the authority comes from."""

    @property
    def authority(self) -> Authority:
        """The authority that signs now, with the roots to be told."""
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call this whenever another authority signs, or other roots are told."""
        ...

    def issued(self, authority: Authority, holder: str, identity: str, not_after: float) -> None:
        """A certificate was given out that `authority` signed."""
        ...

    def status(self) -> dict[str, Any]:
        """What is to be told of it; no key is in it."""
        ...


class Plane:
    """xDS and certificates over a store and an authority. Used inside trio with an asyncio loop."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        keeper: Keeper,
        authenticator: Authenticator,
        *,
        host: str,
        server_names: Iterable[str] = SERVER_NAMES,
        node_proxies: Collection[str] = NODE_PROXIES,
        write_status: bool = True,
    ) -> None:
        """`host` and `server_names` are what clients call the server.

        Without `write_status` the status of objects is written only while somebody runs `follower.statuses`. Raises
        AuthorityError, OSError.
        """
        self.keeper = keeper
        self.identity = ServerIdentity(keeper, host, server_names)
        self.registry = Registry(settings)
        self.addresses, self.authorizations = ResourceSet(ADDRESS_TYPE), ResourceSet(AUTHORIZATION_TYPE)
        self.targeted = ResourceSet(WAYPOINT_POLICY_TYPE)
        self.follower = Follower(
            store,
            self.registry,
            self.addresses,
            self.authorizations,
            self.targeted,
            write_status=write_status,
        )
        self.discovery = DiscoveryService(authenticator, (self.addresses, self.authorizations, self.targeted))
        self.certificates = CertificateService(
            authenticator,
            lambda: keeper.authority,
            trio_asyncio.trio_as_aio(partial(self.follower.wait_runs_on, patience=POD_PATIENCE)),
            settings.trust_domain,
            keeper.issued,
            node_proxies=node_proxies,
        )
        self._settings = settings
        self._server: Server | None = None

    async def read(self, nursery: trio.Nursery) -> None:
        """Read the store, and follow it from then on."""
        # Nobody is served before the store is read: what is missing at first would count as removed.
        # The collector would walk all that has been read again and again: half of the time for 100,000 objects.
        gc.disable()
        try:
            await nursery.start(self.follower.run)
            gc.freeze()
        finally:
            gc.enable()
        nursery.start_soon(self.identity.run)

    async def listen(self, listener: socket.socket) -> int:
        """Serve on a bound socket; the port."""
        self._server = Server([self.discovery, self.certificates], codec=PreencodedCodec())
        await trio_asyncio.aio_as_trio(
            partial(self._server.start, sock=listener, ssl=self.identity.context)
        )()
        logger.info(
            "listening", extra=fields(address=where(listener), trust_domain=self._settings.trust_domain)
        )
        port: int = listener.getsockname()[1]
        return port

    async def end(self) -> None:
        """Let clients know that they have to go elsewhere, and stop serving."""
        self.discovery.close()
        with trio.move_on_after(GOODBYE):
            await trio_asyncio.aio_as_trio(_drained)(self.discovery)
        if self._server is not None:
            self._server.close()

    def pages(self) -> Pages:
        """The admin pages."""
        return control_pages(
            self.discovery,
            (self.addresses, self.authorizations, self.targeted),
            self.keeper,
            lambda: self.registry.problems,
        )

    def in_use(self, holder: str, identity: str) -> bool:
        """Whether that to which `holder` (see ca.Issued) asked for this identity is still there."""
        kind, _, name = holder.partition("/")
        if kind == "pod" and name:
            return self.registry.has_pod(*name.split("/", 1))
        if kind == "account" and name:
            return True  # nobody knows: until the certificate ends
        named = SpiffeId.parse(identity)
        return self.registry.runs_on(holder, named.namespace, named.service_account)


async def stopped(signals: AsyncIterator[int]) -> None:
    """Wait for a signal that ends the process."""
    async for number in signals:
        logger.info("stopping", extra=fields(signal=signal.Signals(number).name))
        return


def log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a connection did wrong outside of any request (a failed TLS handshake, mostly) is its own end only."""
    error = context.get("exception")
    logger.warning(
        "connection failed: %s", context.get("message", "unknown error"), extra=fields(error=repr(error))
    )


def where(listener: socket.socket) -> str:
    """The address that a socket listens on."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _drained(discovery: DiscoveryService) -> None:
    while discovery.clients:
        await asyncio.sleep(0.01)
    # The streams' last frames are handed to the transports in the loop's next turns.
    await asyncio.sleep(0.01)
