"""The sockets of one node's ztunnels (admin, readiness, metrics): while one takes over there are two of each.

Each process listens on names of its own; `admin.sock`, `ready.sock` and `metrics.sock` are links to those of the one
that counts.
"""

import os
from pathlib import Path

from ztunnel.embedded import probes

GENERATIONS = 100  # names; that many successors do not drain at once
PAGES = {"ADMIN_ADDR": "admin", "READINESS_ADDR": "ready", "METRICS_ADDR": "metrics"}


class Generations:
    """Names the sockets in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _path(self, name: str, generation: int) -> Path:
        return self._directory / f"{name}-{generation % GENERATIONS}.sock"

    def settings(self, generation: int) -> dict[str, str]:
        """The environment that tells a ztunnel its sockets."""
        return {key: f"unix:{self._path(name, generation)}" for key, name in PAGES.items()}

    async def ready(self, generation: int) -> bool:
        """Whether the ztunnel of this generation is. Raises OSError, trio.BrokenResourceError."""
        return await probes.http_ok(self._path("ready", generation), "/healthz/ready")

    def in_place(self, generation: int) -> None:
        """Have the links name the sockets of this generation, at once and without a moment in which they are not."""
        for name in PAGES.values():
            link = self._directory / f"{name}.sock"
            new = link.with_suffix(".new")
            new.unlink(missing_ok=True)
            new.symlink_to(self._path(name, generation).name)
            os.replace(new, link)
