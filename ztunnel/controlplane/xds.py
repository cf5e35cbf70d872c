"""The aggregated discovery service (delta): one stream a client, any number of resource types on it.

This file moves messages; what is sent to whom is decided in delta.py.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError
from grpclib import GRPCError
from grpclib.const import Status

from ztunnel.controlplane.authn import (
    Authenticator,
    Caller,
    UnauthenticatedError,
    UndecidedError,
    authenticate,
)
from ztunnel.controlplane.delta import Rejection, Response, Subscription
from ztunnel.controlplane.resources import AUTHORIZATION_TYPE, Changes, ResourceSet
from ztunnel.telemetry.log import fields
from ztunnel.wire.xds_grpc import AggregatedDiscoveryServiceBase
from ztunnel.wire.xds_pb2 import DeltaDiscoveryRequest

if TYPE_CHECKING:
    from google.protobuf.message import Message

logger = logging.getLogger("controlplane.xds")

# Types we know nothing of cost a subscription each; a sane client asks for a handful.
_MAX_TYPES: Final = 64
_NAMES_LOGGED: Final = 10


class PreencodedCodec:
    """grpclib's protobuf codec, except that a message may already be bytes, which are sent as they are."""

    __content_subtype__ = "proto"

    def encode(self, message: "Message | bytes", message_type: type["Message"]) -> bytes:
        """The message's bytes."""
        if isinstance(message, bytes):
            return message
        if not isinstance(message, message_type):
            raise TypeError(f"a {type(message).__name__} where a {message_type.__name__} is to be sent")
        return message.SerializeToString()

    def decode(self, data: bytes, message_type: type["Message"]) -> "Message":
        """The message of `message_type` in `data`. Raises protobuf's DecodeError."""
        return message_type.FromString(data)


class DiscoveryService(AggregatedDiscoveryServiceBase):
    """Serves resource sets to authenticated node proxies."""

    def __init__(self, authenticator: Authenticator, resource_sets: Iterable[ResourceSet]) -> None:
        self._authenticator = authenticator
        self._resource_sets = {resources.type_url: resources for resources in resource_sets}
        self._sessions: set[_Session] = set()
        self._closing = False
        self.pushes: Counter[str] = Counter()  # responses sent, by type
        self.rejects: Counter[str] = Counter()  # and refused by clients

    @property
    def clients(self) -> int:
        """How many streams are open."""
        return len(self._sessions)

    def describe(self) -> list[dict[str, Any]]:
        """Every client: who it is, since when it is connected (Unix seconds), and how far it is with each type."""
        return [session.describe() for session in sorted(self._sessions, key=lambda one: one.since)]

    def close(self) -> None:
        """End every stream, telling the client to come again, and refuse new ones."""
        self._closing = True
        for session in self._sessions:
            session.end(GRPCError(Status.UNAVAILABLE, "the control plane is stopping; connect again"))

    async def DeltaAggregatedResources(self, stream: Any) -> None:  # noqa: N802
        """One client's stream, until either side ends it."""
        caller = await identify(self._authenticator, stream)
        if self._closing:
            raise GRPCError(Status.UNAVAILABLE, "the control plane is stopping; connect again")
        session = _Session(caller, stream, self._resource_sets, self)
        self._sessions.add(session)
        logger.info("client connected", extra=fields(node=caller.node, clients=len(self._sessions)))
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            logger.info("client gone", extra=fields(node=caller.node, clients=len(self._sessions)))

    async def StreamAggregatedResources(self, stream: Any) -> None:  # noqa: N802
        """The state-of-the-world variant, which mesh proxies do not use."""
        await identify(self._authenticator, stream)
        raise GRPCError(
            Status.UNIMPLEMENTED, "only the incremental protocol is served: DeltaAggregatedResources"
        )


async def identify(authenticator: Authenticator, stream: Any) -> Caller:
    """The caller of a gRPC method. Raises GRPCError UNAUTHENTICATED or UNAVAILABLE, after a line in the log."""
    try:
        return await authenticate(authenticator, stream.metadata)
    except UnauthenticatedError as error:
        peer = stream.peer.addr()
        logger.warning("refused: %s", error, extra=fields(peer=f"{peer[0]}:{peer[1]}" if peer else "unknown"))
        raise GRPCError(Status.UNAUTHENTICATED, str(error)) from None
    except UndecidedError as error:
        logger.warning("cannot tell who calls: %s", error)
        raise GRPCError(Status.UNAVAILABLE, str(error)) from None


class _Session:
    """One stream: a task reads requests while this one's own task writes responses."""

    def __init__(
        self,
        caller: Caller,
        stream: Any,
        resource_sets: dict[str, ResourceSet],
        service: DiscoveryService,
    ) -> None:
        self._caller = caller
        self._stream = stream
        self._resource_sets = resource_sets
        self._service = service
        self._subscriptions: dict[str, Subscription] = {}  # in the order of the first requests
        self._unlisten: list[Any] = []
        self._wake = asyncio.Event()
        self._settled = False  # the client has been sent all that there was at first
        self._ended = False
        self._failure: BaseException | None = None
        # Nonces of another stream must never look like one of this one's.
        self._nonce_prefix = secrets.token_hex(4)
        self._nonces = 0
        self.since = time.time()
        self._id = ""  # how the client calls itself
        self._sent: dict[str, float] = {}  # when, by type
        self._answered: dict[str, float] = {}

    def describe(self) -> dict[str, Any]:
        """For the page of the clients."""
        peer = self._stream.peer.addr()
        return {
            "node": self._caller.node,
            "account": self._caller.account,
            "id": self._id,
            "peer": f"{peer[0]}:{peer[1]}" if peer else "",
            "since": self.since,
            "types": {
                name: self._described(name, subscription)
                for name, subscription in self._subscriptions.items()
            },
        }

    def _described(self, name: str, subscription: Subscription) -> dict[str, Any]:
        standing = subscription.standing
        rejected = standing.rejected
        return {
            "status": standing.word,
            "sent": standing.sent,
            "acknowledged": standing.acknowledged,
            "pending": standing.pending,
            "unacknowledged": standing.unacknowledged,
            "rejected": None
            if rejected is None
            else {"names": rejected.names[:10], "error": rejected.message},
            "sent_at": self._sent.get(name),
            "answered_at": self._answered.get(name),
        }

    def end(self, failure: BaseException | None) -> None:
        """Make the stream end with this failure, None for an orderly end."""
        self._failure = self._failure or failure
        self._ended = True
        self._wake.set()

    async def run(self) -> None:
        """Serve until the client ends the stream, `end` is called or a message cannot be read."""
        reader = asyncio.create_task(self._read())
        try:
            while True:
                response = self._next()
                if response is not None:
                    # Waits while the client's flow-control window is used up; changes add up meanwhile.
                    await self._stream.send_message(response.message)
                elif self._ended:
                    break
                else:
                    await self._wake.wait()
                    self._wake.clear()
        finally:
            reader.cancel()
            for unlisten in self._unlisten:
                unlisten()
            await asyncio.gather(reader, return_exceptions=True)
        if self._failure is not None:
            raise self._failure

    async def _read(self) -> None:
        try:
            async for request in self._stream:
                self._take(request)
                self._wake.set()
        except DecodeError as error:
            self.end(GRPCError(Status.INVALID_ARGUMENT, f"not a DeltaDiscoveryRequest: {error}"))
        except Exception as error:
            self.end(error)
        else:
            self.end(None)

    def _take(self, request: DeltaDiscoveryRequest) -> None:
        subscription = self._subscriptions.get(request.type_url)
        if subscription is None:
            subscription = self._subscribe(request.type_url)
        if request.HasField("node"):
            self._id = request.node.id
        if request.response_nonce:
            self._answered[request.type_url] = time.time()
        rejection = subscription.request(request)
        if rejection is not None:
            self._log_rejection(request.type_url, rejection)

    def _subscribe(self, type_url: str) -> Subscription:
        if len(self._subscriptions) >= _MAX_TYPES:
            raise GRPCError(Status.INVALID_ARGUMENT, f"more than {_MAX_TYPES} resource types on one stream")
        resources = self._resource_sets.get(type_url)
        if resources is None:
            logger.warning(
                "unknown resource type, answered with nothing",
                extra=fields(type=type_url, node=self._caller.node),
            )
            resources = ResourceSet(type_url)
        subscription = self._subscriptions[type_url] = Subscription(resources)

        def changed(changes: Changes) -> None:
            subscription.changed(changes)
            self._wake.set()

        self._unlisten.append(resources.listen(changed))
        return subscription

    def _next(self) -> Response | None:
        """The next response.

        At first the types go in the order in which the client asked for them, and a type waits until those before it
        have nothing left to send: a client that is ready once each type has had a first response thereby has all of
        the first types by then. Later, policies go before the workloads that list them. Policies that are gone always
        come last, after the workloads that listed them: no change opens for a moment what is closed before and after.
        """
        if self._failure is not None:
            return None
        everything = list(self._subscriptions.values())
        policies = self._subscriptions.get(AUTHORIZATION_TYPE)
        if self._settled and policies is not None:
            everything.remove(policies)
            everything.insert(0, policies)
        for subscription in everything:
            response = self._from(subscription, removals=subscription is not policies)
            if response is not None:
                return response
            if not subscription.idle and (subscription is not policies or policies.grows):
                return None
        response = self._from(policies) if policies is not None else None
        if everything and all(each.idle for each in everything):
            self._settled = True
        return response

    def _from(self, subscription: Subscription, *, removals: bool = True) -> Response | None:
        nonce = f"{self._nonce_prefix}{self._nonces:x}"
        response = subscription.next_response(nonce, removals=removals)
        if response is not None:
            self._nonces += 1
            self._sent[subscription.type_url] = time.time()
            self._service.pushes[subscription.type_url] += 1
            logger.debug(
                "push",
                extra=fields(
                    type=subscription.type_url,
                    node=self._caller.node,
                    sent=len(response.sent),
                    removed=len(response.removed),
                    bytes=len(response.message),
                    nonce=response.nonce,
                ),
            )
        return response

    def _log_rejection(self, type_url: str, rejection: Rejection) -> None:
        self._service.rejects[type_url] += 1
        names = ", ".join(rejection.names[:_NAMES_LOGGED])
        if len(rejection.names) > _NAMES_LOGGED:
            names += f" and {len(rejection.names) - _NAMES_LOGGED} more"
        logger.warning(
            "client rejects resources; they are sent again when they change",
            extra=fields(type=type_url, node=self._caller.node, resources=names, error=rejection.message),
        )
