"""A real control plane process for tests, and a client of it that is driven by hand."""

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import trio
import trio_asyncio
from google.protobuf.struct_pb2 import Struct
from grpclib.client import Channel
from grpclib.exceptions import StreamTerminatedError
from h2.exceptions import StreamClosedError

from tests.telemetry.written import whole_lines
from ztunnel.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Object, to_dict
from ztunnel.wire.authorization_pb2 import Authorization
from ztunnel.wire.citadel_grpc import IstioCertificateServiceStub
from ztunnel.wire.citadel_pb2 import IstioCertificateRequest
from ztunnel.wire.workload_pb2 import Address
from ztunnel.wire.xds_grpc import AggregatedDiscoveryServiceStub
from ztunnel.wire.xds_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status

LIMIT = 20.0  # seconds for whatever is waited for, on a machine with other things to do


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for the condition, looking often."""
    with trio.move_on_after(LIMIT):
        while not condition():
            await trio.sleep(0.005)
        return
    raise AssertionError(f"not within {LIMIT} s: {what}")


class ControlPlane:
    """The process, its directories (objects, tokens, ca) and its log."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("objects", "tokens"):
            (directory / name).mkdir()
        for node in ("node-1", "node-2"):
            (directory / "tokens" / node).write_text(f"token of {node}\n")
        self.store = DirectoryStore(directory / "objects")
        # Bound and never listening: while no process listens there, nobody else's connection gets this port either.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        weakref.finalize(self, self._reserved.close)
        self.port: int = self._reserved.getsockname()[1]
        self.authentication = ["--tokens", str(directory / "tokens")]
        self.process: subprocess.Popen[bytes] | None = None

    def apply(self, *objects: Object) -> None:
        for obj in objects:
            self.store.apply(obj)

    def write_all(self, objects: Iterable[Object]) -> None:
        """Write many objects as one file."""
        items = {"apiVersion": "v1", "kind": "List", "items": [to_dict(obj) for obj in objects]}
        (self.directory / "objects" / "all.json").write_text(json.dumps(items))

    def command(self, *extra: str) -> list[str]:
        named = {"--store": "objects", "--ca-dir": "ca", "--port-file": "port"}
        paths = [word for flag, name in named.items() for word in (flag, str(self.directory / name))]
        return [sys.executable, "-m", "ztunnel.controlplane", *paths, *self.authentication, *extra]

    async def start(self, level: str = "info", **environ: str) -> None:
        """Start it, always on the same port, and wait until it serves."""
        port_file = self.directory / "port"
        port_file.unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command("--listen", f"127.0.0.1:{self.port}"),
                stderr=log,
                env={"LOG_FORMAT": "json", "LOG_LEVEL": level, **environ},
            )
        process = self.process
        await until(lambda: port_file.exists() or process.poll() is not None, "the control plane's start")
        assert process.poll() is None, self.log
        assert int(port_file.read_text()) == self.port

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal and return its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        assert self.process is not None
        with trio.fail_after(LIMIT):
            return await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def lines(self, **values: object) -> list[dict[str, Any]]:
        """The log's lines that have these values."""
        lines = [json.loads(line) for line in whole_lines(self.directory / "log")]
        return [line for line in lines if values.items() <= line.items()]

    async def logged(self, **values: object) -> dict[str, Any]:
        await until(lambda: bool(self.lines(**values)), f"a log line with {values}")
        return self.lines(**values)[-1]

    @property
    def root_ca(self) -> Path:
        return self.directory / "ca" / "published" / "root-cert.pem"

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.root_ca)
        context.set_alpn_protocols(["h2"])
        return context

    @asynccontextmanager
    async def channel(self, host: str = "127.0.0.1") -> AsyncIterator[Channel]:
        """A gRPC channel to it; needs an asyncio loop."""
        channel = Channel(host, self.port, ssl=self.tls())
        try:
            yield channel
        finally:
            channel.close()

    @asynccontextmanager
    async def stream(self, token: str = "token of node-1") -> AsyncIterator["HandStream"]:
        """A delta xDS stream of a node."""
        async with self.channel() as channel:
            method = AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources
            metadata = {"authorization": f"Bearer {token}"} if token else {}
            stream = method.open(metadata=metadata)
            await trio_asyncio.aio_as_trio(stream.__aenter__)()
            yield HandStream(stream)

    async def create_certificate(
        self, csr: bytes, identity: str | None, ttl: int = 3600, token: str = "token of node-1"
    ) -> list[str]:
        """Ask for a certificate. Raises GRPCError."""
        metadata = Struct()
        if identity is not None:
            metadata["ImpersonatedIdentity"] = identity
        request = IstioCertificateRequest(csr=csr.decode(), validity_duration=ttl, metadata=metadata)
        async with self.channel() as channel:
            call = IstioCertificateServiceStub(channel).CreateCertificate
            with trio.fail_after(LIMIT):
                headers = {"authorization": f"Bearer {token}"} if token else {}
                response = await trio_asyncio.aio_as_trio(call)(request, metadata=headers)
        return list(response.cert_chain)


class HandStream:
    """A stream whose every request is written by the test; keeps versions as a proxy does."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.held: dict[str, str] = {}
        self.addresses: dict[str, Address] = {}
        self.policies: dict[str, Authorization] = {}

    async def send(
        self,
        type_url: str = ADDRESS_TYPE,
        *,
        subscribe: Iterable[str] = (),
        unsubscribe: Iterable[str] = (),
        held: Mapping[str, str] | None = None,
        nonce: str = "",
        error: str = "",
    ) -> None:
        request = DeltaDiscoveryRequest(
            node=Node(id="ztunnel~10.99.0.11~ztunnel-x.istio-system~istio-system.svc.cluster.local"),
            type_url=type_url,
            resource_names_subscribe=list(subscribe),
            resource_names_unsubscribe=list(unsubscribe),
            initial_resource_versions=held or {},
            response_nonce=nonce,
            error_detail=Status(code=3, message=error) if error else None,
        )
        await trio_asyncio.aio_as_trio(self._stream.send_message)(request)

    async def receive(self, acknowledge: bool = True) -> DeltaDiscoveryResponse:
        """The next response. Raises GRPCError where the server ended the stream instead."""
        try:
            with trio.fail_after(LIMIT):
                response: DeltaDiscoveryResponse | None = await trio_asyncio.aio_as_trio(
                    self._stream.recv_message
                )()
                if response is None:
                    # The library gives the status only to a client that has ended its own side.
                    with contextlib.suppress(StreamClosedError):  # the server has reset it meanwhile
                        await trio_asyncio.aio_as_trio(self._stream.end)()
                    await trio_asyncio.aio_as_trio(self._stream.recv_trailing_metadata)()
        except StreamTerminatedError as error:
            # Raises the status, if one came before the reset.
            await trio_asyncio.aio_as_trio(self._stream.__aexit__)(type(error), error, error.__traceback__)
            raise
        assert response is not None, "the server ended the stream"
        for resource in response.resources:
            self.held[resource.name] = resource.version
            if response.type_url == AUTHORIZATION_TYPE:
                self.policies[resource.name] = Authorization.FromString(resource.resource.value)
            else:
                self.addresses[resource.name] = Address.FromString(resource.resource.value)
        for name in response.removed_resources:
            self.held.pop(name, None)
            self.addresses.pop(name, None)
            self.policies.pop(name, None)
        if acknowledge:
            await self.send(response.type_url, nonce=response.nonce)
        return response

    async def names(self) -> tuple[set[str], set[str]]:
        """The names in the next response, sent and removed."""
        response = await self.receive()
        return {resource.name for resource in response.resources}, set(response.removed_resources)

    async def end(self) -> None:
        """Half-close, as a client does that is done."""
        await trio_asyncio.aio_as_trio(self._stream.end)()

    async def cancel(self) -> Self:
        """Reset the stream, as a client does that goes away."""
        await trio_asyncio.aio_as_trio(self._stream.cancel)()
        return self
