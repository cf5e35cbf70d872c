"""The pods of the table, and the way of a policy from its YAML to a verdict, through every part of the mesh that has
a say in it: the store, the control plane's translation, the bytes on the wire, the proxy's decoder and its evaluators.

What is expected stands in the tests and owes nothing to that way.
"""

import re
from functools import cache
from ipaddress import ip_address
from typing import NamedTuple

from tests.controlplane.objects import pod
from ztunnel.controlplane.registry import Registry
from ztunnel.controlplane.translate import Settings
from ztunnel.mesh.policy import Authorization, Connection, Verdict, applying, decide
from ztunnel.mesh.policy_atoms import Atoms
from ztunnel.mesh.policy_index import PolicyIndex, judge
from ztunnel.store.manifest import read_manifest
from ztunnel.store.models import Object
from ztunnel.wire.workload_pb2 import Address
from ztunnel.wire.xds_pb2 import DeltaDiscoveryResponse
from ztunnel.xds.decode_policy import decode_authorization


class Member(NamedTuple):
    """A pod that connections go to."""

    namespace: str
    labels: dict[str, str]
    addresses: tuple[str, ...]


PODS = {
    "web": Member("default", {"app": "web", "tier": "front"}, ("10.244.1.10", "fd00:10:244:1::10")),
    "db": Member("default", {"app": "db", "tier": "back"}, ("10.244.1.11", "fd00:10:244:1::11")),
    "reviews": Member("default", {"app": "reviews"}, ("10.244.1.12",)),
    "api": Member("production", {"app": "api-server"}, ("10.244.2.10",)),
    "batch": Member("production", {"app": "batch"}, ("10.244.2.11",)),
    "old": Member("legacy-apps", {"app": "web"}, ("10.244.3.10",)),
    "gateway": Member("istio-system", {"app": "gateway"}, ("10.244.4.10",)),
}
FROM = "10.244.9.9"  # where connections come from that do not say it

_CONNECTION = re.compile(
    r"(?:(?P<domain>[a-z.]+):)?(?P<source>[\w./-]+?)(?:@(?P<ip>[0-9a-f.:]+))?"
    r" > (?P<pod>\w+)(?:@(?P<to>[0-9a-f.:]+))?:(?P<port>\d+)"
)


class Outcome(NamedTuple):
    """What becomes of a connection, and what would if dry-run policies were enforced (the same if there are none)."""

    verdict: Verdict
    rehearsed: Verdict


class Cast:
    """The pods above under some policies, given as the documents of one YAML text."""

    def __init__(self, text: str) -> None:
        manifest = read_manifest(text)
        assert all(entry.decoded.counts for entry in manifest.entries), manifest.problems
        self.faults = [problem for problem in manifest.problems if problem.severity == "error"]
        registry = Registry(Settings())
        objects: list[Object] = [
            entry.decoded.obj for entry in manifest.entries if entry.decoded.obj is not None
        ]
        objects += [
            pod(name, *member.addresses, namespace=member.namespace, labels=member.labels, mesh=True)
            for name, member in PODS.items()
        ]
        for obj in objects:
            registry.upsert(obj)
        update = registry.flush()
        self.policies: list[Authorization] = []
        for entry in update.policies.values():
            if entry is not None:
                (resource,) = DeltaDiscoveryResponse.FromString(entry.encoded).resources
                self.policies.append(decode_authorization(resource))
        assert not [policy.problem for policy in self.policies if policy.problem], (
            "what is sent is understood"
        )
        self._listed: dict[str, list[str]] = {}
        for entry in update.resources.values():
            if entry is not None:
                (resource,) = DeltaDiscoveryResponse.FromString(entry.encoded).resources
                workload = Address.FromString(resource.resource.value).workload
                self._listed[workload.name] = list(workload.authorization_policies)

    def outcome(self, connection: str) -> Outcome:
        """What becomes of "SOURCE > POD:PORT".

        SOURCE is NAMESPACE/SERVICE_ACCOUNT (before it, with a colon, another trust domain than cluster.local), or
        "plain" for a connection outside of a tunnel; behind it may stand @ADDRESS. POD may have @ADDRESS, too.
        """
        found = _CONNECTION.fullmatch(connection)
        assert found, f"{connection!r} is no connection"
        member = PODS[found["pod"]]
        identity = ""
        if found["source"] != "plain":
            namespace, account = found["source"].split("/")
            identity = f"spiffe://{found['domain'] or 'cluster.local'}/ns/{namespace}/sa/{account}"
        source = ip_address(found["ip"] or FROM).packed
        destination = ip_address(found["to"] or member.addresses[0]).packed
        facts = Connection.of(identity, source, destination, int(found["port"]))
        concerning = applying(self.policies, member.namespace, self._listed[found["pod"]])
        outcome = Outcome(decide(concerning, facts), decide(concerning, facts, with_dry_run=True))
        index = PolicyIndex(Atoms())
        for policy in concerning:
            index.put(policy)
        fast, rehearsed = judge([index], facts)
        assert (fast, rehearsed or fast) == outcome, "the index says what the definition says"
        return outcome


@cache
def cast(text: str) -> Cast:
    """The cast under these policies, made once."""
    return Cast(text)
