"""What a client holds of one xDS type, and how what comes is applied: the client's half of the incremental protocol.

Requests and responses, no streams and no clock but the log's. What the control plane says is removed is gone; what it
does not mention stays; a resource that cannot be used is named in the answer (NACK).
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, Final

import trio

from ztunnel.mesh.model import Workload
from ztunnel.mesh.policy import Authorization
from ztunnel.mesh.policy_store import PolicyChanges
from ztunnel.mesh.state import MeshState
from ztunnel.wire.xds_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource
from ztunnel.xds.decode import ADDRESS_TYPE, DecodeError, Decoder
from ztunnel.xds.decode_policy import AUTHORIZATION_TYPE, decode_authorization

log = logging.getLogger("ztunnel.xds.client")

# Addresses applied between two checkpoints: about 2 ms, the longest that a push keeps others waiting.
SLICE: Final = 100
# Policies decoded between two: about 2 ms too, if each has ten rules.
POLICY_SLICE: Final = 10

# Ends the system_version_info of a response that others of the same state follow, so that "synced" waits for the
# last. An addition of this project's control plane; to anyone else's client the field is an opaque text.
MORE_FOLLOWS: Final = "+"

# Bytes. gRPC servers (istiod too) refuse requests of more than 4 MiB unless told otherwise; that is what some
# 40,000 resource names and versions take.
MAX_REQUEST: Final = 3_500_000


class Subscription:
    """Everything of one type (wildcard). `synced` is set once the first complete state is applied, and stays set."""

    type_url: ClassVar[str]
    what: ClassVar[str]  # in the log
    slice: ClassVar[int]  # steps of `_changes` between two checkpoints

    def __init__(self) -> None:
        self.synced = trio.Event()
        #: The server's version of the last response, for people to compare.
        self.version = ""
        #: When the last response was applied, in seconds of the epoch; None before the first.
        self.last_update: float | None = None
        # Resource name -> version, of what is held.
        self._versions: dict[str, str] = {}
        # Names held before this stream that its first complete state must name again.
        self._unconfirmed: set[str] = set()
        # Of the state that is coming in one response or several: their number, their resources, when the first came.
        self._responses = self._resources = 0
        self._began = 0.0
        self._first_state = True  # of this stream

    def first_request(self) -> DeltaDiscoveryRequest:
        """What a new stream begins with: the subscription, and what is held already."""
        request = DeltaDiscoveryRequest(
            type_url=self.type_url,
            resource_names_subscribe=["*"],
            initial_resource_versions=self._versions,
        )
        self._unconfirmed = set()
        self._responses = self._resources = 0
        self._first_state = True
        if request.ByteSize() > MAX_REQUEST:
            # The server will send everything: what it doesn't is gone.
            self._unconfirmed = set(self._versions)
            request.initial_resource_versions.clear()
        return request

    async def apply(self, response: DeltaDiscoveryResponse) -> list[str]:
        """Apply a response slice by slice; returns what is wrong with resources in it."""
        errors: list[str] = []
        if not self._responses:
            self._began = time.monotonic()
        self._responses += 1
        self._resources += len(response.resources) + len(response.removed_resources)
        last = not response.system_version_info.endswith(MORE_FOLLOWS)
        # Removals first: an address may pass from a resource that goes to one that comes.
        for steps, _ in enumerate(self._steps(response, errors, last), start=1):
            if steps % self.slice == 0:
                self._publish()
                await trio.lowlevel.checkpoint()
        if last:
            self._complete()
        self._publish()
        self.version = response.system_version_info.removesuffix(MORE_FOLLOWS)
        self.last_update = time.time()
        if last:
            self.synced.set()
        return errors

    def _steps(self, response: DeltaDiscoveryResponse, errors: list[str], last: bool) -> Iterator[None]:
        """Apply one removal or resource a step."""
        self._expect(len(self._versions) + len(response.resources))
        for name in response.removed_resources:
            self._remove(name)
            yield None
        for resource in response.resources:
            self._unconfirmed.discard(resource.name)
            try:
                self._upsert(resource)
            except DecodeError as error:
                errors.append(str(error))
            yield None
        if last:
            gone, self._unconfirmed = self._unconfirmed, set()
            for name in gone:
                self._remove(name)
                yield None

    def _complete(self) -> None:
        """The last response of a state has been applied: worth a line if it was the first state, or a large one."""
        if self._first_state or self._responses > 1:
            took = time.monotonic() - self._began
            log.info("xDS %s complete: %d resources in %.2f s", self.what, self._resources, took)
        self._first_state = False
        self._responses = self._resources = 0

    def _expect(self, resources: int) -> None:
        """So many there will be."""

    def _remove(self, name: str) -> None:
        """A resource is gone."""
        raise NotImplementedError

    def _upsert(self, resource: Resource) -> None:
        """A resource came or changed. Raises DecodeError if there is something wrong with it."""
        raise NotImplementedError

    def _publish(self) -> None:
        """Tell of what was applied since the last time."""
        raise NotImplementedError


class Addresses(Subscription):
    """Workloads and services, applied to a MeshState as they come."""

    type_url = ADDRESS_TYPE
    what = "state"
    slice = SLICE

    def __init__(self, state: MeshState, on_change: Callable[[frozenset[str]], None]) -> None:
        """`on_change` is called, after each slice, with the tags whose routes may have changed."""
        super().__init__()
        self._state = state
        self._on_change = on_change
        self._decoder = Decoder()
        self._tags: set[str] = set()

    def _expect(self, resources: int) -> None:
        self._decoder.expect(resources)

    def _remove(self, name: str) -> None:
        self._versions.pop(name, None)
        self._tags |= self._state.remove(name)

    def _upsert(self, resource: Resource) -> None:
        decoded = self._decoder.address(resource)
        if isinstance(decoded, Workload):
            # The uid is the resource's name: one string object for both.
            self._versions[decoded.uid] = sys.intern(resource.version)
            self._tags |= self._state.upsert_workload(decoded)
        else:
            self._versions[resource.name] = sys.intern(resource.version)
            self._tags |= self._state.upsert_service(decoded)

    def _publish(self) -> None:
        if self._tags:
            tags, self._tags = frozenset(self._tags), set()
            self._on_change(tags)


class Policies(Subscription):
    """Connection policies. Those of one state, in one response or several, take effect together.

    So nobody is judged by half a change: a policy gone and the one in its place not there yet.
    """

    type_url = AUTHORIZATION_TYPE
    what = "policies"
    slice = POLICY_SLICE

    def __init__(self, on_change: Callable[[PolicyChanges], None], root_namespace: str) -> None:
        """`on_change` is called after each complete state that changed something, and after the first in any case."""
        super().__init__()
        self._on_change = on_change
        self._root_namespace = root_namespace
        self._coming: dict[str, tuple[str, Authorization] | None] = {}

    def first_request(self) -> DeltaDiscoveryRequest:
        """As above; what came of an incomplete state will come again."""
        self._coming.clear()
        return super().first_request()

    def _remove(self, name: str) -> None:
        self._coming[name] = None

    def _upsert(self, resource: Resource) -> None:
        policy = decode_authorization(resource, self._root_namespace)
        # What was refused is in effect as the strictest that it can have meant, so it is held; but as no version that
        # the server knows, and it is sent again on the next stream.
        self._coming[resource.name] = ("" if policy.problem else sys.intern(resource.version), policy)
        if policy.problem:
            raise DecodeError(policy.problem)

    def _complete(self) -> None:
        first = not self.synced.is_set()
        coming, self._coming = self._coming, {}
        changes: dict[str, Authorization | None] = {}
        for name, held in coming.items():
            if held is None:
                if self._versions.pop(name, None) is not None:
                    changes[name] = None
            else:
                self._versions[name], changes[name] = held
        super()._complete()
        if changes or first:
            self._on_change(changes)

    def _publish(self) -> None:
        """Only complete states are told of."""
