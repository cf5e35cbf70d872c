"""The mesh of a cluster: which pods it consists of, and how their pages are reached."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ztunnel.cli.errors import UserError
from ztunnel.cli.kube.objects import ClusterObjects
from ztunnel.cli.kube.sockets import PodConnection, PodPort
from ztunnel.cli.nodes import Node, NodeError
from ztunnel.cli.session import pod_named
from ztunnel.cli.tables import pod_ready, pod_status
from ztunnel.store.models import Pod

if TYPE_CHECKING:
    import http.client

    from ztunnel.cli.target import Cluster
    from ztunnel.store.kube.api import Api
    from ztunnel.store.models import Object
    from ztunnel.store.problems import Problem

FRESH = 5.0  # seconds for which it is believed which pod serves a node

SYSTEM = "istio-system"
"""The namespace of the mesh's own parts."""

CONTROL_PLANE = ("app", "istiod")
PROXY = ("app", "ztunnel")
AGENT = ("k8s-app", "istio-cni-node")
"""The labels of the pods of each part."""

PROXY_ADMIN = 15000
CONTROL_ADMIN = 9876
AGENT_ADMIN = 9876
"""Ports of the admin pages, on loopback in the pods."""


@dataclass
class ClusterMesh:
    """One cluster, for one run of a verb."""

    target: "Cluster"
    api: "Api"
    objects: ClusterObjects

    @classmethod
    def find(cls, target: "Cluster") -> "ClusterMesh":
        """The cluster; that the mesh is installed there is found out when it is asked for. Raises ApiError."""
        api = target.api()
        return cls(target, api, ClusterObjects(api))

    @property
    def default_namespace(self) -> str:
        """The context's."""
        return self.api.namespace

    def __str__(self) -> str:
        return f"{self.target} at {self.api.server}"

    def part(self, label: tuple[str, str]) -> list[Pod]:
        """The pods of a part, by the node they are on. Raises ApiError."""
        found = self.api.list("v1", "Pod", SYSTEM, label_selector="=".join(label))
        pods = [pod for item in found if (pod := self.objects.typed(Pod, item)) is not None]
        return sorted(pods, key=lambda pod: (pod.spec.node_name, pod.name))

    def nodes(self) -> list[Node]:
        """The nodes with a proxy; of two, while one is replaced, the one that serves. Raises UserError."""
        by_node: dict[str, list[Pod]] = {}
        for pod in self.part(PROXY):
            if pod.spec.node_name:
                by_node.setdefault(pod.spec.node_name, []).append(pod)
        if not by_node:
            raise self.not_installed("ztunnel")
        return [
            self._node(name, "ztunnel", PROXY, serving(pods), PROXY_ADMIN)
            for name, pods in sorted(by_node.items())
        ]

    def agents(self) -> list[Node]:
        """The node agents. Raises UserError where there is none."""
        pods = [pod for pod in self.part(AGENT) if pod.spec.node_name and not pod.metadata.deletion_timestamp]
        if not pods:
            raise self.not_installed("istio-cni-node")
        return [self._node(pod.spec.node_name, "agent", AGENT, pod, AGENT_ADMIN) for pod in pods]

    def control_planes(self) -> list[Node]:
        """The replicas, of all revisions, that are not ending; those that only start if there is no other.

        Raises UserError where there is none.
        """
        pods = [pod for pod in self.part(CONTROL_PLANE) if not pod.metadata.deletion_timestamp]
        if not pods:
            raise self.not_installed("istiod")
        pods = [pod for pod in pods if pod.status.phase == "Running"] or pods
        several = len(pods) > 1
        return [
            self._node(
                f"control plane {pod.name}" if several else "control plane",
                "istiod",
                CONTROL_PLANE,
                pod,
                CONTROL_ADMIN,
            )
            for pod in pods
        ]

    def pod(self, namespace: str, target: str) -> Pod:
        """As of `session.Mesh`."""
        return pod_named(self.objects, namespace, target)

    def data(self, obj: "Object") -> "dict[str, Any]":
        """As of `session.Mesh`: as the API server has it."""
        return self.objects.raw[obj.key]

    def problems(self) -> "list[Problem]":
        """What is wrong with the policies as such, and what is there for a mesh but not acted on. Raises ApiError."""
        from ztunnel.cli.kube.unused import unused
        from ztunnel.store.kinds import KINDS

        for kind in KINDS.values():
            if kind.RESTRICTS:
                self.objects.list(kind)
        return [
            *(problem for found in self.objects.problems.values() for problem in found),
            *unused(self.api),
        ]

    def not_installed(self, part: str) -> UserError:
        """The error for a cluster without a part of the mesh."""
        return UserError(
            f"{self}: no {part} pods in namespace {SYSTEM}",
            "install the mesh with: ambient install; or choose another cluster with --context",
        )

    def _node(self, name: str, process: str, label: tuple[str, str], pod: Pod, port: int) -> Node:
        """A process by its pod; one that is asked again later may have been replaced by another on its node."""
        known = _Known(pod, time.monotonic())

        def connect(timeout: float | None) -> "http.client.HTTPConnection":
            if time.monotonic() - known.at > FRESH and process != "istiod":
                pods = [each for each in self.part(label) if each.spec.node_name == pod.spec.node_name]
                known.pod, known.at = serving(pods or [known.pod]), time.monotonic()
            now = known.pod
            if now.status.phase != "Running":
                why = now.status.message or pod_status(now)
                raise NodeError(f"{name}: pod {now.namespace}/{now.name} does not run: {why}", remedy)
            return PodConnection(self.api.access, PodPort(now.namespace, now.name, port), timeout)

        remedy = f"see: ambient logs {part_of(process, pod.spec.node_name)}, ambient status"
        return Node(name, process, str(PodPort(pod.namespace, pod.name, port)), remedy, connect)


@dataclass
class _Known:
    pod: Pod
    at: float


def part_of(process: str, node: str) -> str:
    """What `ambient logs` calls a process of the mesh."""
    return "mesh/controlplane" if process == "istiod" else f"mesh/{process}-{node}"


def serving(pods: Iterable[Pod]) -> Pod:
    """The one of a node's pods of a part that serves: ready, not ending, the newest."""
    return max(
        pods,
        key=lambda pod: (
            not pod.metadata.deletion_timestamp,
            pod_ready(pod),
            pod.status.phase == "Running",
            pod.metadata.creation_timestamp,
        ),
    )
