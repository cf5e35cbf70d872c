"""Simulated ztunnels: delta xDS streams that take everything, acknowledge it, and note when what came.

Of each resource they keep its name and version, to be told after a reconnect. All run in one asyncio loop.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from perf.controlplane.cluster import SYSTEM, node_name
from ztunnel.wire.xds_grpc import AggregatedDiscoveryServiceStub
from ztunnel.wire.xds_pb2 import DeltaDiscoveryRequest, Node

ADDRESS: Final = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION: Final = "type.googleapis.com/istio.security.Authorization"
SERVER: Final = "istiod.istio-system.svc"
_PAUSE: Final = 0.1  # seconds until a client that lost its server connects again


class Client:
    """One node's stream, made again when it ends. `held` is what it has: of addresses, name to version."""

    def __init__(
        self, number: int, token: str, on_news: Callable[["Client", Sequence[str], float], None]
    ) -> None:
        self.number = number
        self.held: dict[str, str] = {}
        self.received = 0  # addresses received since it was last set to 0
        self.bytes = 0
        self.streams = 0
        self.answered = False  # something has come on the present stream
        self.error = ""  # why the last stream ended
        self._token = token
        self._on_news = on_news

    async def run(self, port: int, context: ssl.SSLContext) -> None:
        """Until cancelled."""
        while True:
            channel = Channel(
                "127.0.0.1", port, ssl=context, config=Configuration(ssl_target_name_override=SERVER)
            )
            try:
                await self._stream(channel)
            except (OSError, GRPCError, ProtocolError, StreamTerminatedError) as error:
                self.error = repr(error)
            finally:
                channel.close()
            self.answered = False
            await asyncio.sleep(_PAUSE)

    async def _stream(self, channel: Channel) -> None:
        stub = AggregatedDiscoveryServiceStub(channel)
        metadata = {"authorization": f"Bearer {self._token}", "clusterid": "Kubernetes"}
        async with stub.DeltaAggregatedResources.open(metadata=metadata) as stream:
            self.streams += 1
            node = Node(
                id=f"ztunnel~192.0.2.{self.number + 1}~ztunnel-{self.number}.{SYSTEM}~{SYSTEM}.svc.cluster.local"
            )
            node.metadata.update({"NODE_NAME": node_name(self.number), "NAME": f"ztunnel-{self.number}"})
            first = DeltaDiscoveryRequest(node=node, type_url=ADDRESS, initial_resource_versions=self.held)
            await stream.send_message(first)
            await stream.send_message(DeltaDiscoveryRequest(type_url=AUTHORIZATION))
            while (response := await stream.recv_message()) is not None:
                now = time.monotonic()
                if response.type_url == ADDRESS:
                    self._take(response, now)
                await stream.send_message(
                    DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
                )

    def _take(self, response: Any, now: float) -> None:
        names = []
        for resource in response.resources:
            self.held[resource.name] = resource.version
            names.append(resource.name)
        for name in response.removed_resources:
            self.held.pop(name, None)
        self.received += len(names)
        self.bytes += response.ByteSize()
        self.answered = True
        self._on_news(self, names, now)


class Fleet:
    """All clients, and who waits for what of them."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._news = asyncio.Event()
        self._wanted = ""
        self._arrived: dict[int, float] = {}
        self.clients = [Client(number, token, self._take) for number, token in enumerate(tokens)]

    async def until(self, true: Callable[[], bool], limit: float) -> float:
        """Until something is true of the clients; the moment (monotonic). Raises TimeoutError."""
        try:
            async with asyncio.timeout(limit):
                while not true():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            told = next((client.error for client in self.clients if client.error), "no stream has ended")
            raise TimeoutError(f"the clients did not get everything within {limit:.0f} s: {told}") from None
        return time.monotonic()

    async def arrivals(self, resource: str, change: Callable[[], None], limit: float) -> list[float]:
        """Have `change` called in a thread; the moments when the clients have been sent the resource."""
        self._wanted, self._arrived = resource, {}
        await asyncio.get_running_loop().run_in_executor(None, change)
        await self.until(lambda: len(self._arrived) == len(self.clients), limit)
        self._wanted = ""
        return list(self._arrived.values())

    def _take(self, client: Client, names: Sequence[str], now: float) -> None:
        if self._wanted and self._wanted in names:
            self._arrived.setdefault(client.number, now)
        self._news.set()
