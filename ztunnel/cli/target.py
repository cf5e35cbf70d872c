"""Which mesh a verb acts on: one embedded on this machine, or that of a Kubernetes cluster.

The rule, in this order:

1. `--kubeconfig` or `--context`: that cluster.
2. `--state`, or AMBIENT_STATE in the environment: the mesh embedded there.
3. A mesh runs embedded at the default place: that one. Who has started it here means it, and a change that was meant
   for a mesh on this machine must never end up in a cluster because a kubeconfig lies about.
4. A kubeconfig (KUBECONFIG, else ~/.kube/config), or the service account of the pod that this runs in: that cluster.

Nothing here asks a cluster anything.
"""

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ztunnel.cli.errors import UserError

if TYPE_CHECKING:
    from ztunnel.store.kube.api import Api

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Embedded(NamedTuple):
    """A mesh on this machine, by its state directory."""

    state: Path

    def __str__(self) -> str:
        return f"the mesh on {self.state}"


class Cluster(NamedTuple):
    """A Kubernetes cluster: a kubeconfig (None: the usual ones) and a context in it (None: its current one)."""

    kubeconfig: Path | None = None
    context: str | None = None

    def __str__(self) -> str:
        words = [f"context {self.context}"] if self.context else []
        words += [f"kubeconfig {self.kubeconfig}"] if self.kubeconfig else []
        return "the cluster" + (f" ({', '.join(words)})" if words else "")

    def api(self) -> "Api":
        """Access to its API server; asks it nothing yet. Raises ApiError, which `ambient` shows as an error."""
        from ztunnel.store.kube.api import Api

        if self.kubeconfig is None and self.context is None and not _kubeconfigs() and _in_pod():
            return Api.in_cluster()
        return Api.from_kubeconfig(self.kubeconfig, self.context)


Target = Embedded | Cluster


class Which(NamedTuple):
    """What the options said; `target` applies the rule above to it."""

    state: Path | None = None
    kubeconfig: Path | None = None
    context: str | None = None

    def target(self) -> Target:
        """The mesh that is meant. Raises UserError where there is none."""
        from ztunnel.cli.options import default_state

        if self.kubeconfig is not None or self.context is not None:
            if self.state is not None:
                raise UserError(
                    "--state names a mesh on this machine, --kubeconfig and --context a cluster",
                    "give only one of them",
                )
            return Cluster(self.kubeconfig, self.context)
        if self.state is not None:
            return Embedded(self.state)
        state = default_state().absolute()
        if os.environ.get("AMBIENT_STATE") or _runs(state):
            return Embedded(state)
        if _kubeconfigs() or _in_pod():
            return Cluster()
        raise UserError(
            f"no mesh runs on {state}, and there is no kubeconfig",
            "start one here with: ambient up DIR; or name a cluster with --kubeconfig FILE",
        )

    def cluster_or_none(self) -> Cluster | None:
        """The cluster that is meant; None where it is this machine, also one that runs no mesh yet."""
        try:
            target = self.target()
        except UserError:
            if self.state is not None and (self.kubeconfig is not None or self.context is not None):
                raise
            return None
        return target if isinstance(target, Cluster) else None

    def state_or_default(self) -> Path:
        """The state directory that is meant if it is a mesh on this machine."""
        from ztunnel.cli.options import default_state

        return (self.state or default_state()).absolute()


def _runs(state: Path) -> bool:
    """Whether a supervisor answers there, be it another user's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(state / "ambient.sock"))
        except PermissionError:
            return True
        except OSError:
            return False
    return True


def _kubeconfigs() -> list[Path]:
    """The files that kubectl would read and that exist."""
    given = os.environ.get("KUBECONFIG")
    names = given.split(os.pathsep) if given else [str(Path.home() / ".kube" / "config")]
    return [path for path in (Path(name).expanduser() for name in names if name) if path.is_file()]


def _in_pod() -> bool:
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and SERVICE_ACCOUNT.is_file()
