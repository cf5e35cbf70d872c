"""The policies that target waypoints: what a waypoint subscribes to where a node subscribes to its pods' policies.

Rule: as for a node's policies, what is not understood keeps closed. A policy whose targets cannot be read is for the
waypoint as a whole.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError as ProtobufError

from ztunnel.mesh.policy_store import PolicyChanges
from ztunnel.wire.waypoint_pb2 import Policy
from ztunnel.wire.xds_pb2 import DeltaDiscoveryRequest, Resource
from ztunnel.xds.decode import DecodeError
from ztunnel.xds.decode_policy import AUTHORIZATION_TYPE, ROOT_NAMESPACE
from ztunnel.xds.subscription import Policies

WAYPOINT_POLICY_TYPE: Final = "type.googleapis.com/ambient.waypoint.Policy"


class Target(NamedTuple):
    """What a policy is for: a Gateway, a GatewayClass or a Service (whose name is its hostname)."""

    kind: str
    namespace: str
    name: str


EVERYTHING: Final = Target("", "", "")
"""Stands for the whole waypoint."""

Targets = tuple[Target, ...]


class TargetedPolicies(Policies):
    """Policies with what they target (`targets`, by the policy's key "namespace/name")."""

    type_url = WAYPOINT_POLICY_TYPE
    what = "waypoint policies"

    def __init__(
        self, on_change: Callable[[PolicyChanges], None], root_namespace: str = ROOT_NAMESPACE
    ) -> None:
        super().__init__(on_change, root_namespace)
        self.targets: dict[str, Targets] = {}
        self._coming_targets: dict[str, Targets] = {}

    def first_request(self) -> DeltaDiscoveryRequest:
        """As for any subscription; what came of an incomplete state will come again."""
        self._coming_targets.clear()
        return super().first_request()

    def _upsert(self, resource: Resource) -> None:
        body = resource.resource
        problem = ""
        inner = b"\xff"  # parses as nothing: the policy is taken for one that denies everything
        targets: Targets = (EVERYTHING,)
        try:
            if body.type_url != WAYPOINT_POLICY_TYPE:
                problem = f"is of type {body.type_url!r}: expected {WAYPOINT_POLICY_TYPE}"
            else:
                message = Policy.FromString(body.value)
                inner = message.authorization.SerializeToString()
                targets = tuple(Target(one.kind, one.namespace, one.name) for one in message.targets)
                targets = targets or (EVERYTHING,)
        except ProtobufError:
            problem = "is no ambient.waypoint.Policy: its bytes don't parse"
        self._coming_targets[resource.name] = targets
        super()._upsert(
            Resource(
                name=resource.name,
                version=resource.version,
                resource=Any(type_url=AUTHORIZATION_TYPE, value=inner),
            )
        )
        if problem:
            raise DecodeError(f"Policy {resource.name}: {problem}")

    def _remove(self, name: str) -> None:
        self._coming_targets[name] = ()
        super()._remove(name)

    def _complete(self) -> None:
        coming, self._coming_targets = self._coming_targets, {}
        for name, targets in coming.items():
            if targets:
                self.targets[name] = targets
            else:
                self.targets.pop(name, None)
        super()._complete()
