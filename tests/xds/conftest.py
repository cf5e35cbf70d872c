"""Fixtures: an asyncio loop inside trio, and a control plane that serves in it."""

import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio_asyncio

from tests.xds.control_plane import FakeControlPlane, Pki


@pytest.fixture
async def asyncio_loop() -> AsyncIterator[None]:
    async with trio_asyncio.open_loop():
        yield


@pytest.fixture
async def control_plane(asyncio_loop: None, tmp_path: Path) -> AsyncIterator[FakeControlPlane]:
    plane = FakeControlPlane(Pki(tmp_path), tmp_path)
    async with plane.serve():
        yield plane


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A TCP port on 127.0.0.1 that is taken, so nobody else's, but refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
