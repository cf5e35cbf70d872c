"""Which store the control plane reads: a cluster's API server, or a directory of files."""

import logging
from pathlib import Path
from typing import Final

from ztunnel.store.directory import DirectoryStore
from ztunnel.store.endpointslice import MANAGED_BY_LABEL, OF_SELECTORS, EndpointSlice
from ztunnel.store.kube.api import Api
from ztunnel.store.kube.store import KubernetesStore
from ztunnel.store.models import Object
from ztunnel.store.problems import Problem

logger = logging.getLogger("controlplane.store")

# What the API server need not send: slices that say what their pods and Services say anyway.
LABELS: Final[dict[type[Object], str]] = {EndpointSlice: f"{MANAGED_BY_LABEL}!={OF_SELECTORS}"}


def directory_store(path: Path) -> DirectoryStore:
    """The store of a directory; its problems are logged as they appear."""
    return DirectoryStore(path, on_problem=_say)


def cluster_store(api: Api) -> KubernetesStore:
    """The store of a cluster; its problems are logged as they appear."""
    return KubernetesStore(api, on_problem=_say, label_selectors=LABELS)


def _say(problem: Problem) -> None:
    logger.warning("%s", problem)
