"""Keeps a node's picture of the mesh what the control plane says it is: a delta ADS stream, reconnected for as long
as it runs.

Rule: nothing is forgotten because the control plane is away. What was received serves on; a reconnect says what is
held (initial_resource_versions) and receives the difference, removals included.
"""

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import trio
import trio_asyncio
from google.protobuf.message import DecodeError as ProtobufError
from grpclib.client import Stream
from h2.exceptions import StreamClosedError

from ztunnel.mesh.policy_store import PolicyChanges
from ztunnel.mesh.state import MeshState
from ztunnel.wire.xds_grpc import AggregatedDiscoveryServiceStub
from ztunnel.wire.xds_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status
from ztunnel.xds.channel import (
    CONNECT_TIMEOUT,
    CallError,
    ControlPlane,
    asyncio_loop,
    call_errors,
    open_channel,
)
from ztunnel.xds.subscription import Addresses, Policies, Subscription

log = logging.getLogger(__name__)

# Seconds. A connection refused on the same host is over in no time, so the first waits are short.
FIRST_BACKOFF: Final = 0.05
MAX_BACKOFF: Final = 3.0

# Reasons in one NACK: it is for a person to read.
_NACK_REASONS: Final = 20

_INVALID_ARGUMENT: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeInfo:
    """Who this proxy is to the control plane (the xDS node)."""

    node_name: str
    pod_name: str
    pod_namespace: str = "istio-system"
    instance_ip: str = "127.0.0.1"
    network: str = ""
    role: str = "ztunnel"
    metadata: dict[str, str] = field(default_factory=dict)

    def message(self, cluster_id: str) -> Node:
        """The node message of a stream's first request."""
        namespace = self.pod_namespace
        node = Node(
            id=f"{self.role}~{self.instance_ip}~{self.pod_name}.{namespace}~{namespace}.svc.cluster.local"
        )
        node.metadata.update(
            {
                "NAME": self.pod_name,
                "NAMESPACE": namespace,
                "NODE_NAME": self.node_name,
                "INSTANCE_IPS": self.instance_ip,
                "CLUSTER_ID": cluster_id,
                "NETWORK": self.network,
                **self.metadata,
            }
        )
        return node


@dataclass(frozen=True, kw_only=True, slots=True)
class XdsConfig:
    """Where the control plane is and who asks."""

    server: ControlPlane
    node: NodeInfo


class XdsClient:
    """Subscribes to every workload and service, and to every policy, and applies what comes.

    `on_change` is called, after each slice that has been applied, with the tags whose routes may have changed;
    `on_policies` with each complete change of the policies, and with the first state even if it is empty.
    `synced` is set once the first complete state of both has been applied, and stays set.
    """

    def __init__(
        self,
        config: XdsConfig,
        state: MeshState,
        on_change: Callable[[frozenset[str]], None],
        on_policies: Callable[[PolicyChanges], None],
        policies: Policies | None = None,
    ) -> None:
        """`policies` is another subscription than a node's; it tells whom it was made to tell."""
        self._config = config
        self.addresses = Addresses(state, on_change)
        self.policies = policies or Policies(on_policies, config.node.pod_namespace)
        # In this order they are asked for, and served: a workload may list a policy by name, which is there by then.
        self._subscriptions: dict[str, Subscription] = {
            one.type_url: one for one in (self.policies, self.addresses)
        }
        self._backoff = FIRST_BACKOFF
        #: For the metrics: responses by type, and ends of connections by reason.
        self.received: Counter[str] = Counter()
        self.terminations: Counter[str] = Counter()
        self.synced = trio.Event()
        self.connected = False
        #: Why there is no connection, empty while there is one.
        self.error = ""

    @property
    def version(self) -> str:
        """The server's version of the last response with addresses, for people to compare."""
        return self.addresses.version

    @property
    def last_update(self) -> float | None:
        """When the last response was applied, in seconds of the epoch; None before the first."""
        return max((one.last_update for one in self._subscriptions.values() if one.last_update), default=None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, and again whenever the connection ends, until cancelled."""
        server = self._config.server
        async with asyncio_loop():
            task_status.started()
            while True:
                try:
                    await self._stream()
                except CallError as error:
                    self.error = str(error)
                    self.terminations["Error" if self.connected else "ConnectionError"] += 1
                finally:
                    self.connected = False
                wait = random.uniform(0.5, 1.0) * self._backoff  # noqa: S311 - to spread reconnects, not a secret
                self._backoff = min(2 * self._backoff, MAX_BACKOFF)
                log.warning("xDS stream to %s ended, again in %.2f s: %s", server.address, wait, self.error)
                await trio.sleep(wait)

    async def _stream(self) -> None:
        """One connection and its stream, until it ends. Raises CallError."""
        server = self._config.server
        with call_errors(server):
            async with open_channel(server) as channel:
                service = AggregatedDiscoveryServiceStub(channel)
                call = service.DeltaAggregatedResources.open(metadata=server.metadata())
                async with trio_asyncio.aio_as_trio(call) as stream:
                    send = trio_asyncio.aio_as_trio(stream.send_message)
                    with trio.fail_after(CONNECT_TIMEOUT):
                        for request in self._first_requests():
                            await send(request)
                    while True:
                        response = await _receive(server, stream)
                        self.received[response.type_url] += 1
                        self._established()
                        errors = await self._apply(response)
                        await send(_answer(response, errors))
                        # Not to hold megabytes while waiting for the next.
                        del response

    def _first_requests(self) -> list[DeltaDiscoveryRequest]:
        requests = [one.first_request() for one in self._subscriptions.values()]
        for request in requests:
            request.node.CopyFrom(self._config.node.message(self._config.server.cluster_id))
        return requests

    def _established(self) -> None:
        # Only what the server answers shows that it is one: a port may accept and then hang up.
        if not self.connected:
            log.info("xDS stream to %s established", self._config.server.address)
        self.connected = True
        self.error = ""
        self._backoff = FIRST_BACKOFF

    async def _apply(self, response: DeltaDiscoveryResponse) -> list[str]:
        """Apply a response; returns what is wrong with resources in it."""
        subscription = self._subscriptions.get(response.type_url)
        if subscription is None:
            return [f"type {response.type_url!r} was not asked for"]
        errors = await subscription.apply(response)
        for error in errors[:_NACK_REASONS]:
            log.error("xDS resource refused: %s", error)
        if all(one.synced.is_set() for one in self._subscriptions.values()):
            self.synced.set()
        return errors


async def _receive(
    server: ControlPlane, stream: Stream[Any, DeltaDiscoveryResponse]
) -> DeltaDiscoveryResponse:
    """The next response. Raises CallError for what is none, and (or GRPCError) if the stream has ended."""
    try:
        response: DeltaDiscoveryResponse | None = await trio_asyncio.aio_as_trio(stream.recv_message)()
    except (ProtobufError, AssertionError, NotImplementedError) as error:
        # The last two are grpclib's: a message cut short, a compressed one.
        raise CallError(f"control plane {server.address}: sent what is no response: {error!r}") from error
    if response is None:
        # The trailers say why: an error status raises. grpclib gives them out only once our side has ended too.
        with contextlib.suppress(StreamClosedError):  # the server has reset it meanwhile
            await trio_asyncio.aio_as_trio(stream.end)()
        await trio_asyncio.aio_as_trio(stream.recv_trailing_metadata)()
        raise CallError(f"control plane {server.address}: ended the stream")
    return response


def _answer(response: DeltaDiscoveryResponse, errors: list[str]) -> DeltaDiscoveryRequest:
    """The ACK of a response or, with errors, its NACK."""
    request = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
    if errors:
        more = f"; and {len(errors) - _NACK_REASONS} more" if len(errors) > _NACK_REASONS else ""
        message = "; ".join(errors[:_NACK_REASONS]) + more
        request.error_detail.CopyFrom(Status(code=_INVALID_ARGUMENT, message=message))
    return request
