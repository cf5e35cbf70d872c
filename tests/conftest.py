"""How the tests are spread over workers: a module is one worker's, and everything on Kubernetes is one worker's."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

KUBERNETES = "tests/kube"


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Like --dist loadscope, with all of tests/kube as one scope, because it shares clusters; that one first, because
    nothing else takes as long."""

    def _split_scope(self, nodeid: str) -> str:
        return KUBERNETES if nodeid.startswith(f"{KUBERNETES}/") else super()._split_scope(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        if KUBERNETES in self.workqueue:
            self.workqueue.move_to_end(KUBERNETES, last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """In place of --dist loadscope."""
    return Scheduling(config, log) if config.getvalue("dist") == "loadscope" else None
