"""Fixtures: an asyncio loop inside trio, and a running control plane process."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio_asyncio

from tests.controlplane.process import ControlPlane


@pytest.fixture
async def asyncio_loop() -> AsyncIterator[None]:
    async with trio_asyncio.open_loop():
        yield


@pytest.fixture
async def stopped(asyncio_loop: None, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    """A control plane that the test starts itself; it is ended at the latest with the test."""
    plane = ControlPlane(tmp_path)
    try:
        yield plane
    finally:
        if plane.process is not None and plane.process.poll() is None:
            plane.process.kill()
            with trio.CancelScope(shield=True):
                await plane.ended()


@pytest.fixture
async def plane(stopped: ControlPlane) -> ControlPlane:
    """A control plane that serves an empty cluster."""
    await stopped.start()
    return stopped
