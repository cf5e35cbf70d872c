"""The admin pages of a node's daemon: what it knows and holds, and the few things that can be asked of it."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import trio

from ztunnel import __version__
from ztunnel.admin.debug import debug_pages
from ztunnel.admin.pages import Pages, only
from ztunnel.admin.policies import policy_pages
from ztunnel.admin.server import Answer
from ztunnel.mesh.model import Service, Workload
from ztunnel.mesh.state import MeshState
from ztunnel.telemetry.log import adopt_standard_logging

if TYPE_CHECKING:
    from ztunnel.config import Settings
    from ztunnel.daemon import Daemon
    from ztunnel.identity.revocations import Revocations
    from ztunnel.identity.rotation import CertificateManager
    from ztunnel.proxy.workers import Workers
    from ztunnel.telemetry.log import Logger
    from ztunnel.xds.client import XdsClient

TURN = 5000  # workloads counted before others get their turn: about 1 ms


class Proxy(Protocol):
    """What a node's daemon and a waypoint have in common, as far as it is shown."""

    settings: "Settings"
    logger: "Logger"
    started: float
    state: MeshState
    workers: "Workers"
    xds: "XdsClient"
    certificates: "CertificateManager"
    revocations: "Revocations"

    def not_ready(self) -> str:
        """Why it is not ready; empty if it is."""


def node_pages(daemon: "Daemon") -> Pages:
    """The pages of this daemon; each part of it may add its own."""
    pages = proxy_pages(daemon)
    section = pages.dump.section
    section("agent", lambda: {"socket": daemon.settings.inpod_uds, "connected": daemon.agent_connected})
    section("dns", daemon.dns.describe)
    return pages


def proxy_pages(daemon: Proxy) -> Pages:
    """The pages that each proxy has."""
    pages = Pages()
    show = _Show(daemon)
    pages.page("/config_dump", pages.dump.page, "the whole state (JSON); ?sections=A,B for parts of it")
    pages.page("/healthz/ready", show.ready, "200 once ready, 503 and the reasons before")
    pages.page("/logging", show.logging, "the log levels; POST ?level=L or ?level=L,SCOPE:L changes them")
    pages.page("/quitquitquit", show.quit, "POST: drain and end")
    debug_pages(pages, daemon.settings.node_name, daemon.workers.inspections)
    section = pages.dump.section
    section("version", lambda: __version__)
    section("node", lambda: daemon.settings.node_name)
    section("pid", os.getpid)
    section("time", time.time)
    section("started", lambda: daemon.started)
    section("ready", lambda: daemon.not_ready() or "ready")
    section("xds", show.xds)
    section("pods", show.pods)
    section("listeners", show.listeners)
    section("tunnels", show.tunnels)
    section("certificates", show.certificates)
    section("revocations", daemon.revocations.status)
    section("workers", daemon.workers.describe)
    section("stats", show.stats)
    section("totals", show.totals)
    policy_pages(pages, daemon)
    section("workloads", lambda: (_workload(one) for one in tuple(daemon.state.workloads())))
    section("services", lambda: (_service(one, daemon.state) for one in tuple(daemon.state.services())))
    return pages


class _Show:
    """The pages and sections that take more than an expression."""

    def __init__(self, daemon: Proxy) -> None:
        self.daemon = daemon

    async def ready(self, method: str, query: dict[str, str]) -> Answer:
        reason = self.daemon.not_ready()
        return Answer(f"{reason}\n".encode(), 503) if reason else Answer(b"ready\n")

    async def logging(self, method: str, query: dict[str, str]) -> Answer:
        daemon = self.daemon
        level = query.get("level")
        if level is not None:
            refused = only(method, "POST", "change the level")
            if refused is not None:
                return refused
            try:
                daemon.logger.set_level(level)
            except ValueError as error:
                return Answer(f"{error}\n".encode(), 400)
            adopt_standard_logging(daemon.logger)
            daemon.workers.set_level(level)
        return Answer(f"{daemon.logger.levels}\n".encode())

    async def quit(self, method: str, query: dict[str, str]) -> Answer:
        refused = only(method, "POST", "end the proxy")
        if refused is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return refused or Answer(b"draining\n")

    def xds(self) -> dict[str, Any]:
        client = self.daemon.xds
        return {
            "address": self.daemon.settings.xds_address,
            "connected": client.connected,
            "synced": client.synced.is_set(),
            "version": client.version,
            "policies_version": client.policies.version,
            "last_update": client.last_update,
            "error": client.error,
        }

    def pods(self) -> list[dict[str, Any]]:
        return [
            {"uid": pod.uid, "name": pod.name, "namespace": pod.namespace, "identity": pod.identity}
            for pod in self.daemon.workers.pods.values()
        ]

    def listeners(self) -> Iterator[dict[str, Any]]:
        for pod in tuple(self.daemon.workers.pods.values()):
            ports = sorted({one.getsockname()[1] for group in pod.listeners for one in group})
            yield {"pod": f"{pod.namespace}/{pod.name}", "ports": ports, "workers": len(pod.listeners)}

    async def tunnels(self) -> Iterator[dict[str, Any]]:
        answers = await self.daemon.workers.inspections.ask("tunnels")
        return ({"worker": one.worker} | item for one in answers for part in one.items for item in part)

    def certificates(self) -> Iterator[dict[str, Any]]:
        for one in self.daemon.certificates.status():
            chain = one.certificate.describe() if one.certificate is not None else []
            yield {
                "identity": one.identity,
                "state": one.state.value,
                "not_before": one.not_before,
                "not_after": one.not_after,
                "next_fetch": one.next_fetch,
                "last_error": one.last_error,
                "failures": one.failures,
                "pods": one.references,
                "serial": chain[0]["serial"] if chain else None,
                "chain": chain,
            }

    async def stats(self) -> list[dict[str, Any]]:
        return [msgspec.structs.asdict(stats) for stats in await self.daemon.workers.stats()]

    async def totals(self) -> dict[str, int]:
        state = self.daemon.state
        tunnels: Counter[str] = Counter()
        every = iter(tuple(state.workloads()))
        while some := tuple(islice(every, TURN)):
            tunnels.update(one.tunnel_protocol.name for one in some)
            await trio.lowlevel.checkpoint()
        return {"workloads": state.workload_count, "services": state.service_count, **tunnels}


def _workload(workload: Workload) -> dict[str, Any]:
    return {
        "uid": workload.uid,
        "name": workload.name,
        "namespace": workload.namespace,
        "addresses": [str(ip_address(address)) for address in workload.addresses],
        "protocol": workload.tunnel_protocol.name,
        "identity": workload.identity,
        "node": workload.node,
        "network": workload.network,
        "healthy": workload.healthy,
        "services": list(workload.services),
        "policies": workload.policies,
        "waypoint": str(workload.waypoint or ""),
    }


def _service(service: Service, state: MeshState) -> dict[str, Any]:
    endpoints = state.endpoints(service.key)
    return {
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        "addresses": [str(ip_address(address)) for _, address in service.vips],
        "ports": {str(port.service): port.target for port in service.ports},
        "endpoints": len(endpoints),
        "healthy_endpoints": sum(one.healthy for one in endpoints),
        "waypoint": str(service.waypoint or ""),
    }
