"""The Kubernetes of these tests: one worker runs all modules here (tests/conftest.py), so there is one of each lab."""

import os
from collections.abc import Iterator

import pytest

from tests.kube.lab import Lab


@pytest.fixture(scope="session")
def apiserver() -> Iterator[Lab]:
    """etcd and an API server, no nodes. AMBIENT_LAB=NAME: the lab of that name, which is up already."""
    yield from _lab("api", 0)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Lab]:
    """Two nodes, the project's images on them, and DNS. AMBIENT_LAB=NAME: the lab of that name."""
    yield from _lab("nodes", 2)


def _lab(kind: str, nodes: int) -> Iterator[Lab]:
    name = os.environ.get("AMBIENT_LAB")
    if name:
        yield Lab.attach(name)
        return
    with Lab.up(f"test-{kind}-{os.getpid()}", nodes) as lab:
        yield lab
