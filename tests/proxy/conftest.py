"""Fixtures of the proxy's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy.ends import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A reactor to be turned by the test, which meets no defect."""
    with Bench(tmp_path) as made:
        yield made
        assert made.defects() == []
