"""The nodes of a running mesh, its control plane, and their admin pages, for the verbs that show what they do."""

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ztunnel.cli.errors import UserError

if TYPE_CHECKING:
    from ztunnel.cli.session import Mesh
    from ztunnel.store.models import Pod

ANSWER = 30.0  # seconds for a daemon to answer


class NodeError(UserError):
    """A process does not answer, or not with what was asked for; the message names the node, or the control plane."""


Connect = Callable[[float | None], http.client.HTTPConnection]
"""An HTTP connection to a process's admin pages, with a limit in seconds for each answer."""


@dataclass(frozen=True)
class Node:
    """A node, by the admin pages of its proxy; or the control plane, by those of its own.

    `process` is what people call it, `where` its pages are told to be, `remedy` what to do if it does not answer.
    """

    name: str
    process: str
    where: str
    remedy: str
    connect: Connect = field(repr=False, compare=False)

    def get(self, path: str, method: str = "GET", *, timeout: float = ANSWER) -> bytes:
        """A page's body. Raises NodeError where the process is not there, does not answer in time, or refuses."""
        with self._connection(timeout) as connection:
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
        if answer.status >= 400:
            told = body.decode(errors="replace").strip()
            raise NodeError(f"{self.name}: {path}: {told or answer.reason} (HTTP {answer.status})")
        return body

    def json(self, path: str, *, timeout: float = ANSWER) -> Any:
        """A page of JSON. Raises NodeError."""
        body = self.get(path, timeout=timeout)
        try:
            return json.loads(body)
        except ValueError as error:
            raise NodeError(f"{self.name}: {path}: not JSON: {error}") from error

    def dump(self, *sections: str, timeout: float = ANSWER) -> dict[str, Any]:
        """These sections of /config_dump, all of them if none is named. Raises NodeError."""
        chosen = f"?sections={','.join(sections)}" if sections else ""
        found: dict[str, Any] = self.json("/config_dump" + chosen, timeout=timeout)
        return found

    def stream(self, path: str) -> Iterator[bytes]:
        """The lines of a page that has no end, as they come, until it ends anyway. Raises NodeError."""
        with self._connection(None) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise NodeError(f"{self.name}: {path}: {answer.read().decode(errors='replace').strip()}")
            while line := answer.readline():
                yield line

    @contextlib.contextmanager
    def _connection(self, timeout: float | None) -> Iterator[http.client.HTTPConnection]:
        """A connection for the block, whose failures become NodeErrors."""
        from ztunnel.store.problems import StoreError

        try:
            with contextlib.closing(self.connect(timeout)) as connection:
                yield connection
        except StoreError as error:  # of the way there: the API server refuses, or is not reached
            raise NodeError(f"{self.name}: {self.process} cannot be asked: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise self.absent(error) from error

    def absent(self, error: Exception) -> NodeError:
        """The error for a process that does not answer."""
        if isinstance(error, PermissionError):
            return NodeError(
                f"{self.name}: {self.where} belongs to another user", "run this as that user, e.g. with sudo"
            )
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return NodeError(f"{self.name}: {self.process} does not answer on {self.where}: {why}", self.remedy)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect. Raises OSError."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def nodes(state: Path) -> list[Node]:
    """The nodes of the mesh that runs on a state directory, whether their daemons run or not. Raises UserError."""
    from ztunnel.cli.session import not_running
    from ztunnel.embedded.addresses import node_name
    from ztunnel.embedded.statedir import State

    directory = State(state)
    count = directory.read_record().get("nodes", 0)
    if not count:
        raise not_running(state)
    names = [node_name(number) for number in range(1, count + 1)]
    return [_embedded(name, directory.node(name) / "admin.sock", f"ztunnel-{name}") for name in names]


def control_plane(state: Path) -> Node:
    """The control plane of the mesh that runs on a state directory, whether it runs or not."""
    from ztunnel.embedded.statedir import State

    return _embedded("control plane", State(state).control_admin, "controlplane")


def _embedded(name: str, admin: Path, process: str) -> Node:
    remedy = f"it may be starting; see: ambient status, ambient logs mesh/{process}"
    return Node(name, process, str(admin), remedy, partial(UnixConnection, admin))


def node(state: Path, name: str) -> Node:
    """The node of this name (`node-1`, or `1`). Raises UserError where there is none."""
    found = nodes(state)
    for each in found:
        if name in (each.name, each.name.removeprefix("node-"), f"node/{each.name}"):
            return each
    raise UserError(f"there is no node {name!r}", f"the nodes are: {_names(found)}")


def _names(found: Iterable[Node]) -> str:
    return ", ".join(each.name for each in found)


def chosen(mesh: "Mesh", target: str | None, namespace: str) -> tuple[list[Node], "Pod | None"]:
    """The nodes that a verb's TARGET means: all, one by its name, or the one of a pod, and that pod.

    A pod is named as in `Mesh.pod`; `NAMESPACE/POD` names one of another namespace. Raises UserError.
    """
    everyone = mesh.nodes()
    if not target:
        return everyone, None
    for each in everyone:
        if target in (each.name, f"node/{each.name}"):
            return [each], None
    if target.startswith("node/"):
        raise UserError(f"there is no node {target[5:]!r}", f"the nodes are: {_names(everyone)}")
    where, slash, name = target.partition("/")
    if slash and where not in ("pod", "pods", "po", "deploy", "deployment", "deployments"):
        namespace, target = where, name
    pod = mesh.pod(namespace, target)
    found = [each for each in everyone if each.name == pod.spec.node_name]
    if not pod.spec.node_name:
        raise UserError(f"pod {pod.namespace}/{pod.name} is on no node yet", "see: ambient get pods -A")
    if not found:
        raise UserError(
            f"node {pod.spec.node_name} of pod {pod.namespace}/{pod.name} has no proxy", "see: ambient status"
        )
    return found, pod
