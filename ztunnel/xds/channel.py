"""A gRPC channel to the control plane: TLS, the bearer token, keepalive, and asyncio inside a trio program.

grpclib is asyncio: everything that touches it runs through trio_asyncio. The daemon's main opens the asyncio loop
once for all its clients; code run without one (a test, a tool) gets its own for as long as `asyncio_loop` lasts.
"""

import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import trio
import trio_asyncio
from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import H2Protocol

# Servers that follow gRPC's keepalive rules close on clients that ping too often; istiod allows one in 15 s.
_KEEPALIVE: Final = {
    "_keepalive_time": 20,
    "_keepalive_timeout": 10,
    "_http2_max_pings_without_data": 0,
    "_http2_min_sent_ping_interval_without_data": 15,
}

# Seconds. A connection, a TLS handshake and a request should take milliseconds.
CONNECT_TIMEOUT: Final = 10.0

# Seconds that a closing connection waits for the peer's close_notify: asyncio's 30 would keep one to a dead peer.
_CLOSE_TIMEOUT: Final = 1.0


class ConfigError(ValueError):
    """A setting can't be used; the message names it and says what would be right."""


class CallError(Exception):
    """A call to the control plane failed; the message says which, why, and what to look at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlPlane:
    """How to reach a control plane and to say who asks.

    `address` is https://HOST:PORT; the server's certificate must be valid for HOST under the roots in the PEM file
    `root_ca`. The file `token` holds the bearer token. Both files are read anew for each connection, since they
    are rotated in place.
    """

    address: str
    root_ca: Path
    token: Path
    cluster_id: str = "Kubernetes"

    def __post_init__(self) -> None:
        self.host_and_port()

    def host_and_port(self) -> tuple[str, int]:
        """What to connect to. Raises ConfigError where the address has another form."""
        try:
            parts = urlsplit(self.address)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"address {self.address!r}: {error}: give https://HOST:PORT") from None
        if parts.scheme != "https" or not host or port is None or parts.path.strip("/"):
            raise ConfigError(f"address {self.address!r}: give https://HOST:PORT")
        return host, port

    def metadata(self) -> dict[str, str]:
        """A call's metadata, with the token as it is in its file now. Raises CallError."""
        try:
            token = self.token.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CallError(f"token file {self.token}: {error}") from None
        if not token:
            raise CallError(f"token file {self.token}: is empty: it must hold a bearer token")
        return {"authorization": f"Bearer {token}", "clusterid": self.cluster_id}

    def tls(self) -> ssl.SSLContext:
        """A context that verifies the server's chain and name. Raises CallError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        try:
            context.load_verify_locations(cafile=self.root_ca)
        except OSError as error:
            reason = "holds no PEM certificate" if isinstance(error, ssl.SSLError) else error
            raise CallError(f"root certificate file {self.root_ca}: {reason}") from None
        return context


@asynccontextmanager
async def asyncio_loop() -> AsyncIterator[None]:
    """Have an asyncio loop for trio_asyncio: the one that is open, else one of our own."""
    if trio_asyncio.current_loop.get() is not None:
        yield
        return
    async with trio_asyncio.open_loop():
        yield


@asynccontextmanager
async def open_channel(server: ControlPlane) -> AsyncIterator[Channel]:
    """A channel (it connects at its first call); leaving closes it. Needs `asyncio_loop`. Raises CallError."""
    host, port = server.host_and_port()
    tls = server.tls()

    async def create() -> Channel:
        return _Channel(host, port, ssl=tls, config=Configuration(**_KEEPALIVE))

    async def close() -> None:
        channel.close()

    channel: Channel = await trio_asyncio.aio_as_trio(create)()
    try:
        yield channel
    finally:
        with trio.CancelScope(shield=True):
            await trio_asyncio.aio_as_trio(close)()


class _Channel(Channel):  # type: ignore[misc] # grpclib is not typed
    """Lets go of a dead peer at once: what closes a connection on a missing keepalive answer is grpclib's."""

    async def _create_connection(self) -> H2Protocol:
        transport, protocol = await self._loop.create_connection(
            self._protocol_factory, self._host, self._port, ssl=self._ssl, ssl_shutdown_timeout=_CLOSE_TIMEOUT
        )
        # Without it a segment that nobody acknowledges (a node unplugged) is sent again for 15 minutes; tcp(7).
        silence = int(1000 * (_KEEPALIVE["_keepalive_time"] + _KEEPALIVE["_keepalive_timeout"]))
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence)
        return protocol


@contextmanager
def call_errors(server: ControlPlane) -> Iterator[None]:
    """Turn whatever ends a call into a CallError for operators."""
    where = f"control plane {server.address}"
    try:
        yield
    except GRPCError as error:
        remedy = ""
        if error.status in (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED):
            remedy = f": check the token in {server.token}"
        status = error.status.name if isinstance(error.status, Status) else error.status
        raise CallError(f"{where}: {status}: {error.message or 'no message'}{remedy}") from error
    except ssl.SSLCertVerificationError as error:
        raise CallError(
            f"{where}: its certificate is refused: {error.verify_message}: compare it with {server.root_ca}"
        ) from error
    except ConnectionRefusedError as error:
        raise CallError(f"{where}: connection refused: is the control plane running?") from error
    except trio.TooSlowError as error:
        raise CallError(f"{where}: no answer in time: is a firewall or NetworkPolicy in between?") from error
    except (OSError, StreamTerminatedError, ProtocolError) as error:
        raise CallError(f"{where}: {error or type(error).__name__}") from error
