"""The running mesh as the verbs see it: where it is, its objects, its pods by the names that people use."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ztunnel.cli.errors import UserError

if TYPE_CHECKING:
    from ztunnel.cli.nodes import Node
    from ztunnel.cli.target import Which
    from ztunnel.embedded.client import MeshClient
    from ztunnel.store.directory import DirectoryStore
    from ztunnel.store.models import K, Key, Object, Pod
    from ztunnel.store.problems import Problem


def not_running(state: Path) -> UserError:
    """The error for a state directory on which no mesh runs."""
    return UserError(f"no mesh is running on {state}", "start one with: ambient up DIR")


class Objects(Protocol):
    """The objects of a mesh."""

    def list(self, kind: "type[K]", namespace: str | None = None) -> "list[K]":
        """Those of a kind, of all namespaces or of one."""

    def get(self, kind: "type[K]", namespace: str, name: str) -> "K | None":
        """One of them."""

    def find(self, key: "Key") -> "Object | None":
        """One, by its key."""


class Mesh(Protocol):
    """A running mesh, embedded here or in a cluster."""

    @property
    def objects(self) -> Objects:
        """Its objects as they are now."""

    @property
    def default_namespace(self) -> str:
        """The namespace of what is named without one."""

    def nodes(self) -> "list[Node]":
        """The nodes with a proxy, whether it answers or not."""

    def control_planes(self) -> "list[Node]":
        """The processes of the control plane: in a cluster there may be several, each with proxies of its own."""

    def pod(self, namespace: str, target: str) -> "Pod":
        """The pod that `target` means, as `pod_named` does. Raises UserError."""

    def data(self, obj: "Object") -> "dict[str, Any]":
        """An object of it as plain data, with all that it has."""

    def problems(self) -> "list[Problem]":
        """What is wrong with the objects as such, before the control plane looks at them."""


def find(which: "Which") -> Mesh:
    """The mesh that a verb's options mean. Raises UserError where none runs there."""
    from ztunnel.cli.target import Embedded

    target = which.target()
    if isinstance(target, Embedded):
        return EmbeddedMesh.find(target.state)
    from ztunnel.cli.kube.mesh import ClusterMesh

    return ClusterMesh.find(target)


def answering(planes: "Iterable[Node]", *sections: str) -> "dict[str, Any]":
    """These sections of the first process of the control plane that answers. Raises NodeError where none does."""
    from ztunnel.cli.nodes import NodeError

    failure: NodeError | None = None
    for plane in planes:
        try:
            return plane.dump(*sections)
        except NodeError as error:
            failure = failure or error
    raise failure or NodeError("the control plane has no process", "see: ambient status")


@dataclass
class EmbeddedMesh:
    """A mesh on this machine: its control socket, the user's directory and the objects that were made of it."""

    state: Path
    directory: Path
    client: "MeshClient"
    source: "DirectoryStore"
    objects: "DirectoryStore"
    default_namespace: str = "default"

    @classmethod
    def find(cls, state: Path) -> "EmbeddedMesh":
        """The mesh that runs on the state directory. Raises UserError where none does."""
        from ztunnel.embedded.client import MeshClient, MeshNotRunning
        from ztunnel.store.directory import DirectoryStore

        try:
            client = MeshClient.connect(state)
            record = json.loads((state / "supervisor.json").read_bytes())
        except (MeshNotRunning, FileNotFoundError) as error:
            raise not_running(state) from error
        except PermissionError as error:
            raise UserError(
                f"the mesh on {state} belongs to another user", "run this as that user, e.g. with sudo"
            ) from error
        directory = Path(record["dir"])
        return cls(state, directory, client, DirectoryStore(directory), DirectoryStore(state / "objects"))

    def nodes(self) -> "list[Node]":
        """As of `Mesh`."""
        from ztunnel.cli.nodes import nodes

        return nodes(self.state)

    def control_planes(self) -> "list[Node]":
        """As of `Mesh`: always one."""
        from ztunnel.cli.nodes import control_plane

        return [control_plane(self.state)]

    def pod(self, namespace: str, target: str) -> "Pod":
        """As of `Mesh`."""
        return pod_named(self.objects, namespace, target)

    def data(self, obj: "Object") -> "dict[str, Any]":
        """As of `Mesh`."""
        from ztunnel.store.models import to_dict

        return to_dict(obj)

    def problems(self) -> "list[Problem]":
        """What the mesh finds wrong with the user's objects now."""
        import msgspec

        from ztunnel.store.problems import Problem

        try:
            return msgspec.json.decode((self.state / "problems.json").read_bytes(), type=list[Problem])
        except FileNotFoundError:
            return []


def pod_named(objects: Objects, namespace: str, target: str) -> "Pod":
    """The pod that `target` means: its name, deploy/NAME, or an unambiguous beginning of its name.

    Of a Deployment's pods the first one that runs is taken. Raises UserError.
    """
    from ztunnel.store.models import Pod

    kind, slash, name = target.rpartition("/")
    if slash and kind.lower() in ("po", "pod", "pods"):
        slash, target = "", name
    elif slash and kind.lower() not in ("deploy", "deployment", "deployments"):
        raise UserError(f"{target}: only pods have programs", "give POD, deploy/NAME, or node/NAME")
    pods = sorted(objects.list(Pod, namespace), key=lambda pod: pod.name)
    if slash:
        return _first_running([pod for pod in pods if owner(pod) == name], f"Deployment {namespace}/{name}")
    found = [pod for pod in pods if pod.name == target]
    if not found:
        found = [pod for pod in pods if pod.name.startswith(target)]
        owners = {owner(pod) for pod in found}
        if target in owners:
            return _first_running([pod for pod in found if owner(pod) == target], target)
    if not found:
        names = ", ".join(pod.name for pod in pods[:8]) + (", ..." if len(pods) > 8 else "")
        remedy = f"its pods are: {names}" if names else "there are no pods in it; see: ambient get pods -A"
        raise UserError(f'no pod "{target}" in namespace {namespace}', remedy)
    if len(found) > 1:
        raise UserError(
            f'"{target}" could be {", ".join(pod.name for pod in found)}', "write more of the name"
        )
    return found[0]


def owner(obj: "Object") -> str:
    """The name of the Deployment that an object belongs to, "" if none.

    In a cluster there is a ReplicaSet between a Deployment and its pods, named for it and for their template.
    """
    for ref in obj.metadata.owner_references:
        if ref.kind == "Deployment":
            return ref.name
        suffix = obj.metadata.labels.get("pod-template-hash", "")
        if ref.kind == "ReplicaSet" and suffix and ref.name.endswith(f"-{suffix}"):
            return ref.name.removesuffix(f"-{suffix}")
    return ""


def _first_running(pods: "list[Pod]", of: str) -> "Pod":
    if not pods:
        raise UserError(f"{of} has no pods", "see: ambient get deployments,pods")
    return next((pod for pod in pods if pod.status.phase == "Running"), pods[0])


def container_of(pod: "Pod", container: str | None) -> str:
    """The name of the container asked for, by default the first one. Raises UserError where there is none such."""
    names = [each.name for each in pod.spec.containers]
    if container is None and names:
        return names[0]
    if container not in names:
        raise UserError(
            f'pod {pod.name} has no container "{container or ""}"', f"it has: {', '.join(names) or 'none'}"
        )
    return container
