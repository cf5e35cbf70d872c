"""The agent's pages: readiness and metrics on the node's addresses, and on loopback how every pod of the node is."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import msgspec
import trio

from cni.agent import Agent
from cni.counting import Counters, family
from cni.installer import Installer
from cni.keeper import Keeper
from cni.probes import HostProbes
from cni.reporting import Reporter
from ztunnel.admin.server import AddressError, Answer, Handler, Query, serve

READINESS_PORT: Final = 8000
METRICS_PORT: Final = 15014
DEBUG_PORT: Final = 9876
"""Loopback only: names and addresses of pods are nobody's business on the network."""


def outside(keeper: Keeper) -> str:
    """Why a pod that runs and shall be in the mesh is not, "" if it is, or need not be yet."""
    goal = keeper.goal
    if not goal.joined or goal.ending or keeper.joined:
        return ""
    return keeper.failure or ("it is about to join" if goal.started else "")


class Pages:
    """What the node's agent shows."""

    def __init__(
        self,
        agent: Agent,
        installer: Installer,
        probes: HostProbes,
        reporter: Reporter,
        counters: Counters,
        listening: Callable[[], bool],
    ) -> None:
        self._agent = agent
        self._installer = installer
        self._probes = probes
        self._reporter = reporter
        self._counters = counters
        self._listening = listening

    async def run(
        self, *, host: str = "", ports: tuple[int, int, int] = (READINESS_PORT, METRICS_PORT, DEBUG_PORT)
    ) -> None:
        """Serve until cancelled, on all addresses (or `host`). Raises AddressError where a port is taken."""
        ready, metrics, debug = ports
        async with trio.open_nursery() as nursery:
            await self._serve(nursery, host, ready, {"/readyz": self._readyz, "/healthz": self._healthz})
            await self._serve(nursery, host, metrics, {"/metrics": self._metrics})
            pages: Mapping[str, Handler] = {"/": self._index, "/pods": self._pods}
            await nursery.start(partial(serve, f"127.0.0.1:{debug}", pages, loopback_only=True))

    async def _serve(self, nursery: trio.Nursery, host: str, port: int, pages: Mapping[str, Handler]) -> None:
        if host:
            await nursery.start(partial(serve, f"{host}:{port}", pages, loopback_only=False))
            return
        try:
            await nursery.start(partial(serve, f"[::]:{port}", pages, loopback_only=False))
        except AddressError:  # a kernel without IPv6
            await nursery.start(partial(serve, f"0.0.0.0:{port}", pages, loopback_only=False))

    def lacking(self) -> list[str]:
        """What keeps the node from being ready, one sentence each."""
        found = []
        if not self._agent.synced.is_set():
            found.append("the node's pods are not known yet")
        if not self._listening():
            found.append("the CNI plugin is not listened to")
        if not self._installer.ready:
            found.append(self._installer.problem or "the CNI plugin is not in place yet")
        if self._probes.problem:
            found.append(f"rules for health probes: {self._probes.problem}")
        return found

    async def _readyz(self, method: str, query: Query) -> Answer:
        lacking = self.lacking()
        return Answer("".join(f"{line}\n" for line in lacking or ["ok"]).encode(), 503 if lacking else 200)

    async def _healthz(self, method: str, query: Query) -> Answer:
        return Answer(b"ok\n")

    async def _index(self, method: str, query: Query) -> Answer:
        return Answer(b"/pods  how every pod of this node is, and what of the node is not in order (JSON)\n")

    async def _pods(self, method: str, query: Query) -> Answer:
        pods: list[dict[str, Any]] = []
        for keeper in self._agent.states():
            goal = keeper.goal
            pods.append(
                {
                    "namespace": goal.info.namespace,
                    "name": goal.info.name,
                    "uid": goal.uid,
                    "addresses": list(goal.addresses),
                    "wanted": goal.joined,
                    "joined": keeper.joined,
                    "problem": outside(keeper) or keeper.failure,
                }
            )
        for pod, why in self._reporter.unable():
            pods.append(
                {
                    "namespace": pod.namespace,
                    "name": pod.name,
                    "uid": pod.metadata.uid,
                    "addresses": pod.addresses,
                    "wanted": True,
                    "joined": False,
                    "problem": why,
                }
            )
        pods.sort(key=lambda each: (each["namespace"], each["name"]))
        page = {"problems": self.lacking(), "ztunnels": self._agent.server.connections, "pods": pods}
        return Answer(msgspec.json.format(msgspec.json.encode(page)) + b"\n", content_type="application/json")

    async def _metrics(self, method: str, query: Query) -> Answer:
        text = "\n".join(self._lines()) + "\n"
        return Answer(text.encode(), content_type="text/plain; version=0.0.4; charset=utf-8")

    def _lines(self) -> Iterator[str]:
        keepers = list(self._agent.states())
        joined = sum(keeper.joined for keeper in keepers)
        lost = sum(1 for keeper in keepers if outside(keeper))
        yield from self._counters.families()
        for name, told, value in (
            ("istio_cni_install_ready", "Whether the CNI plugin and its configuration are in place.",
             int(self._installer.ready)),
            ("ztunnel_connected", "Connections of ztunnel.", self._agent.server.connections),
            ("istio_cni_pods_in_mesh", "Pods of this node whose traffic ztunnel carries.", joined),
            ("istio_cni_pods_outside_mesh", "Pods of this node that run, shall be in the mesh, and are not.", lost),
            ("istio_cni_pods_not_supported", "Pods of this node that are asked into the mesh and never can be.",
             len(self._reporter.unable())),
        ):  # fmt: skip
            yield from family(name, "gauge", told, [((), value)])
