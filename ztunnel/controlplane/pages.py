"""The control plane's admin pages: who is connected and how far, what is served, how long the authority lasts."""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ztunnel import __version__
from ztunnel.admin.pages import Pages
from ztunnel.admin.server import Answer
from ztunnel.controlplane.resources import ResourceSet
from ztunnel.controlplane.xds import DiscoveryService
from ztunnel.debug import tasks
from ztunnel.identity.ca import Authority
from ztunnel.store.problems import Problem


class Keeper(Protocol):
    """Where the authority comes from."""

    @property
    def authority(self) -> Authority:
        """The authority that signs now."""
        ...

    def status(self) -> dict[str, Any]:
        """What is to be told of it; no key is in it."""
        ...


def control_pages(
    discovery: DiscoveryService,
    resource_sets: Iterable[ResourceSet],
    keeper: Keeper,
    problems: Callable[[], list[Problem]],
) -> Pages:
    """The pages of this control plane; `problems` are what it finds wrong with objects now."""
    pages = Pages()
    started = time.time()
    served = tuple(resource_sets)
    pages.page("/config_dump", pages.dump.page, "the whole state (JSON); ?sections=A,B for parts of it")
    pages.page("/debug/tasks", _tasks, "the tree of tasks")
    section = pages.dump.section
    section("version", lambda: __version__)
    section("pid", os.getpid)
    section("started", lambda: started)
    section("time", time.time)
    section("clients", discovery.describe)
    section(
        "types",
        lambda: {one.type_url: {"version": str(one.revision), "resources": len(one)} for one in served},
    )
    section("problems", problems)
    section("authority", lambda: _authority(keeper))
    return pages


def _authority(keeper: Keeper) -> dict[str, Any]:
    return {"not_after": keeper.authority.not_after, **keeper.status()}


async def _tasks(method: str, query: dict[str, str]) -> Answer:
    return Answer(tasks.as_text(await tasks.describe()).encode())
