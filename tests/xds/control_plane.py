"""A control plane for tests: a real grpclib server over TLS that does what the test says, and a line to cut."""

import asyncio
import datetime
import ipaddress
import ssl
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio
import trio_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpclib.const import Status
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from tests.xds.resources import policy_resource, resource
from ztunnel.wire import authorization_pb2, citadel_grpc, citadel_pb2, workload_pb2, xds_grpc, xds_pb2
from ztunnel.xds.channel import ControlPlane
from ztunnel.xds.client import NodeInfo, XdsConfig
from ztunnel.xds.decode import ADDRESS_TYPE
from ztunnel.xds.decode_policy import AUTHORIZATION_TYPE

TOKEN = "token-of-node-1"


class Pki:
    """A root, its PEM file, and a server certificate with the names of an Istio control plane."""

    def __init__(
        self, folder: Path, names: Iterable[str] = ("localhost", "istiod.istio-system.svc", "127.0.0.1")
    ):
        self.root_file = folder / "root-cert.pem"
        self._root_key = ec.generate_private_key(ec.SECP256R1())
        self._root = self._certificate("root", self._root_key.public_key(), ca=True, names=())
        self.root_file.write_bytes(self._root.public_bytes(serialization.Encoding.PEM))
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._certificate("istiod", key.public_key(), ca=False, names=names)
        server_file = folder / "server.pem"
        server_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + leaf.public_bytes(serialization.Encoding.PEM)
        )
        self.server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server_context.load_cert_chain(server_file)
        self.server_context.set_alpn_protocols(["h2"])

    def _certificate(
        self, name: str, key: ec.EllipticCurvePublicKey, *, ca: bool, names: Iterable[str]
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        issuer = self._root.subject if not ca else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(list(map(_san, names))), critical=False
            )
        return builder.sign(self._root_key, hashes.SHA256())


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@dataclass
class Connection:
    """One client's stream: what it sent, and a way to send to it."""

    metadata: dict[str, str]
    requests: "trio.MemoryReceiveChannel[xds_pb2.DeltaDiscoveryRequest]"
    policy_requests: "trio.MemoryReceiveChannel[xds_pb2.DeltaDiscoveryRequest]"
    _outgoing: "asyncio.Queue[xds_pb2.DeltaDiscoveryResponse | bytes | None]"
    _sent: int = 0

    async def request(self) -> xds_pb2.DeltaDiscoveryRequest:
        """The client's next request that is not about policies."""
        with trio.fail_after(20):
            return await self.requests.receive()

    async def policy_request(self) -> xds_pb2.DeltaDiscoveryRequest:
        """The client's next request about policies."""
        with trio.fail_after(20):
            return await self.policy_requests.receive()

    def push(
        self,
        *messages: workload_pb2.Workload | workload_pb2.Service | xds_pb2.Resource,
        removed: Iterable[str] = (),
        version: str = "1",
        type_url: str = ADDRESS_TYPE,
    ) -> str:
        """Send a response; returns its nonce."""
        self._sent += 1
        nonce = f"nonce-{self._sent}"
        resources = [
            message if isinstance(message, xds_pb2.Resource) else resource(message, version)
            for message in messages
        ]
        self._outgoing.put_nowait(
            xds_pb2.DeltaDiscoveryResponse(
                system_version_info=version,
                resources=resources,
                removed_resources=removed,
                type_url=type_url,
                nonce=nonce,
            )
        )
        return nonce

    async def push_and_ack(
        self,
        *messages: workload_pb2.Workload | workload_pb2.Service | xds_pb2.Resource,
        removed: Iterable[str] = (),
        version: str = "1",
    ) -> None:
        """Send a response and wait until the client has acknowledged it."""
        nonce = self.push(*messages, removed=removed, version=version)
        answer = await self.request()
        assert answer.response_nonce == nonce
        assert not answer.HasField("error_detail"), answer.error_detail.message

    async def push_and_ack_after_first(self, *messages: workload_pb2.Workload) -> None:
        """Take the stream's first request, then push."""
        await self.request()
        await self.push_and_ack(*messages)

    def push_policies(
        self,
        *messages: authorization_pb2.Authorization | xds_pb2.Resource,
        removed: Iterable[str] = (),
        version: str = "1",
    ) -> str:
        """Send a response with policies; returns its nonce."""
        resources = [
            message if isinstance(message, xds_pb2.Resource) else policy_resource(message, version)
            for message in messages
        ]
        return self.push(*resources, removed=removed, version=version, type_url=AUTHORIZATION_TYPE)

    async def push_policies_and_ack(
        self,
        *messages: authorization_pb2.Authorization | xds_pb2.Resource,
        removed: Iterable[str] = (),
        version: str = "1",
    ) -> None:
        """Send a response with policies and wait until the client has acknowledged it."""
        nonce = self.push_policies(*messages, removed=removed, version=version)
        while (answer := await self.policy_request()).response_nonce != nonce:
            pass
        assert not answer.HasField("error_detail"), answer.error_detail.message

    def push_bytes(self, message: bytes) -> None:
        """Send something in place of a response."""
        self._outgoing.put_nowait(message)

    def end(self) -> None:
        """End the stream properly, status OK."""
        self._outgoing.put_nowait(None)


class _Codec(ProtoCodec):  # type: ignore[misc] # grpclib is not typed
    """Sends bytes as they are, also those that are no message."""

    def encode(self, message: object, message_type: object) -> bytes:
        encoded: bytes = message if isinstance(message, bytes) else super().encode(message, message_type)
        return encoded


@dataclass
class FakeControlPlane(xds_grpc.AggregatedDiscoveryServiceBase, citadel_grpc.IstioCertificateServiceBase):
    """Serves on `port` of 127.0.0.1 for as long as `serve` runs.

    To the question for policies it answers that there are none, unless `no_policies` is False.
    """

    pki: Pki
    folder: Path
    port: int = 0
    tokens: set[str] = field(default_factory=lambda: {TOKEN})
    chain: list[str] = field(default_factory=list)
    no_policies: bool = True
    signed: list[citadel_pb2.IstioCertificateRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._arrive, self._arrived = trio.open_memory_channel[Connection](100)
        self.token_file = self.folder / "token"
        self.token_file.write_text(TOKEN + "\n")

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        """Listen until the block ends; needs an open asyncio loop."""
        server = Server([self], codec=_Codec())

        async def start() -> int:
            await server.start("127.0.0.1", 0, ssl=self.pki.server_context)
            assert server._server is not None
            port: int = server._server.sockets[0].getsockname()[1]
            return port

        async def stop() -> None:
            server.close()
            if sys.version_info < (3, 12):  # later ones wait for the clients too, which end with the test
                await server.wait_closed()

        self.port = await trio_asyncio.aio_as_trio(start)()
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio_asyncio.aio_as_trio(stop)()

    async def connection(self) -> Connection:
        """The next stream that a client opens."""
        with trio.fail_after(20):
            return await self._arrived.receive()

    def address(self, port: int | None = None, host: str = "127.0.0.1") -> ControlPlane:
        """How a client reaches this control plane, or something in front of it on another port."""
        return ControlPlane(
            address=f"https://{host}:{port or self.port}", root_ca=self.pki.root_file, token=self.token_file
        )

    def config(self, port: int | None = None) -> XdsConfig:
        """The configuration of node-1's client."""
        node = NodeInfo(node_name="node-1", pod_name="ztunnel-x", instance_ip="10.99.0.11")
        return XdsConfig(server=self.address(port), node=node)

    def _authenticate(self, metadata: dict[str, str]) -> None:
        if metadata.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            raise GRPCError(Status.UNAUTHENTICATED, "the token is not known")

    async def DeltaAggregatedResources(
        self, stream: "Stream[xds_pb2.DeltaDiscoveryRequest, xds_pb2.DeltaDiscoveryResponse]"
    ) -> None:
        metadata = {name: str(value) for name, value in (stream.metadata or {}).items()}
        self._authenticate(metadata)
        send, receive = trio.open_memory_channel[xds_pb2.DeltaDiscoveryRequest](1000)
        send_policies, receive_policies = trio.open_memory_channel[xds_pb2.DeltaDiscoveryRequest](1000)
        outgoing: asyncio.Queue[xds_pb2.DeltaDiscoveryResponse | bytes | None] = asyncio.Queue()
        connection = Connection(metadata, receive, receive_policies, outgoing)
        self._arrive.send_nowait(connection)

        async def read() -> None:
            async for request in stream:
                if request.type_url != AUTHORIZATION_TYPE:
                    send.send_nowait(request)
                    continue
                send_policies.send_nowait(request)
                if self.no_policies and not request.response_nonce:
                    connection.push_policies()

        reader = asyncio.create_task(read())
        try:
            while (response := await outgoing.get()) is not None:
                await stream.send_message(response)
        finally:
            reader.cancel()

    async def StreamAggregatedResources(self, stream: object) -> None:
        raise GRPCError(Status.UNIMPLEMENTED)

    async def CreateCertificate(
        self, stream: "Stream[citadel_pb2.IstioCertificateRequest, citadel_pb2.IstioCertificateResponse]"
    ) -> None:
        self._authenticate({name: str(value) for name, value in (stream.metadata or {}).items()})
        request = await stream.recv_message()
        assert request is not None
        self.signed.append(request)
        await stream.send_message(citadel_pb2.IstioCertificateResponse(cert_chain=self.chain))

    def __mapping__(self) -> dict[str, object]:
        return {
            **xds_grpc.AggregatedDiscoveryServiceBase.__mapping__(self),
            **citadel_grpc.IstioCertificateServiceBase.__mapping__(self),
        }


class Line:
    """A TCP line to a port, which can be cut at a byte or go dead: what a server killed or unplugged looks like."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self.port = 0
        #: Bytes still let through towards the client before both ends are reset; None for no limit.
        self.remaining: int | None = None
        #: True: nothing passes any more, either way, and nobody is told.
        self.dead = False
        self._alive = trio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Carry connections to `port` (the former one, opened again) until the block ends, and them with it."""
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, self._carry, self.port, host="127.0.0.1"))
            self.port = listeners[0].socket.getsockname()[1]
            yield
            nursery.cancel_scope.cancel()

    async def _carry(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self._to_port)
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, client, server, False, nursery.cancel_scope)
            nursery.start_soon(self._copy, server, client, True, nursery.cancel_scope)

    async def _copy(
        self, source: trio.SocketStream, sink: trio.SocketStream, limited: bool, both: trio.CancelScope
    ) -> None:
        try:
            async for data in source:
                if self.dead:
                    await trio.sleep_forever()
                if limited and self.remaining is not None:
                    data = data[: self.remaining]
                    self.remaining -= len(data)
                await sink.send_all(data)
                if limited and self.remaining == 0:
                    self.remaining = None
                    break
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        both.cancel()
