"""`python -m perf.scale.up DIR STATE NODES STORE`: `ambient up`, but its control plane follows the objects in STORE.

So that a mesh can be large without anybody running its pods: STORE holds the cluster's own objects (a link to
STATE/objects) beside others that nobody else reads.
"""

import sys
from pathlib import Path

from ztunnel.embedded import supervisor
from ztunnel.embedded.children import Child


class LargeSupervisor(supervisor.Supervisor):
    """A supervisor whose control plane is told of another store."""

    store: Path

    def _controlplane(self) -> Child:
        child = super()._controlplane()
        child.argv[child.argv.index("--store") + 1] = str(self.store)
        return child


def main(directory: Path, state: Path, nodes: int, store: Path) -> int:
    """Run a mesh until SIGTERM; the exit code."""
    LargeSupervisor.store = store
    supervisor.Supervisor = LargeSupervisor  # type: ignore[misc]  # what `run` makes one of
    return supervisor.run(supervisor.UpConfig(dir=directory, state=state, nodes=nodes, xds_port=0))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
