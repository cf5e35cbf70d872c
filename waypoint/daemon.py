"""The waypoint's control process: puts the rooms together, as the node daemon's does.

It keeps the mesh model and the policies (xDS) and the certificate of its own service account (CA), and answers the
workers, which move the bytes. Nothing here is on the path of a byte.
"""

import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial

import trio
import trio_asyncio

from waypoint.config import WaypointSettings
from waypoint.destinations import Destinations
from waypoint.policies import WaypointPolicies
from ztunnel import __version__
from ztunnel.admin.metrics import metrics_pages, proxy_metrics
from ztunnel.admin.node import proxy_pages
from ztunnel.admin.pages import Pages
from ztunnel.admin.server import serve
from ztunnel.control import live
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import CertificateUnavailableError
from ztunnel.identity.revocations import Revocations, follow
from ztunnel.identity.rotation import CertificateManager
from ztunnel.inpod import sockets
from ztunnel.memory import keep_giving_back
from ztunnel.mesh.model import Workload, pod_uid
from ztunnel.mesh.state import MeshState
from ztunnel.proxy import messages
from ztunnel.proxy.context import WAIT_TIMEOUT
from ztunnel.proxy.prefork import Forked
from ztunnel.proxy.served import PodError
from ztunnel.proxy.workers import Workers
from ztunnel.telemetry.log import Logger
from ztunnel.xds.ca import CaClient
from ztunnel.xds.channel import ControlPlane
from ztunnel.xds.client import NodeInfo, XdsClient, XdsConfig
from ztunnel.xds.targeted import TargetedPolicies

SWEEP = 0.25  # seconds between looks for questions that waited long enough
RETRY = 1.0  # seconds between attempts to serve


class WaypointDaemon:
    """One pod of a waypoint."""

    def __init__(self, own: WaypointSettings, logger: Logger, forked: Sequence[Forked] = ()) -> None:
        settings = self.settings = own.common
        self.own = own
        self.logger = logger
        self.started = time.time()
        self.state = MeshState()
        self.draining = False
        self.serving = False
        self._uid = pod_uid(settings.cluster_id, own.namespace, settings.pod_name)
        plane = ControlPlane(
            address=settings.xds_address,
            root_ca=settings.xds_root_ca,
            token=settings.auth_token,
            cluster_id=settings.cluster_id,
        )
        authority = ControlPlane(
            address=settings.ca_address,
            root_ca=settings.ca_root_ca,
            token=settings.auth_token,
            cluster_id=settings.cluster_id,
        )
        node = NodeInfo(
            node_name=settings.node_name,
            pod_name=settings.pod_name,
            pod_namespace=own.namespace,
            instance_ip=settings.instance_ip,
            network=settings.network,
            role="waypoint",
            metadata={"GATEWAY_NAME": own.name, "SERVICE_ACCOUNT": own.service_account},
        )
        self.workers = Workers(
            settings.workers,
            logger,
            self.answer_route,
            forked,
            workload=lambda namespace, name: None,
            program="waypoint.worker",
        )
        targeted = TargetedPolicies(self._policies_changed, own.root_namespace)
        self.policies = WaypointPolicies(own, self.workers.send_all, targeted.targets)
        self.workers.policies = self.policies
        self.xds = XdsClient(
            XdsConfig(server=plane, node=node), self.state, self._changed, self._policies_changed, targeted
        )
        self.destinations = Destinations(
            self.state, own.key, settings.network, self.workload, self.policies.subject, trio.current_time
        )
        self.certificates = CertificateManager(
            CaClient(authority, impersonate=False).sign, ttl=settings.secret_ttl, on_update=self._certified
        )
        self.revocations = Revocations(settings.crl_path)
        self._unsynced: deque[tuple[float, messages.AskRoute, Callable[..., None]]] = deque()
        self.pages = self._make_pages()
        self.metrics = proxy_metrics(self)

    def workload(self) -> Workload | None:
        """This pod, as far as the mesh knows it."""
        return self.state.workload_by_uid(self._uid)

    def _make_pages(self) -> Pages:
        pages = proxy_pages(self)
        own = self.own
        pages.dump.section(
            "waypoint",
            lambda: {
                "name": own.name,
                "namespace": own.namespace,
                "service": own.key,
                "identity": own.identity,
            },
        )
        return pages

    def _certified(self, certificate: WorkloadCertificate) -> None:
        self.workers.use_certificate(certificate.identity, certificate.encode())

    def _policies_changed(self, changes: Mapping[str, object]) -> None:
        self.workers.policies.update(changes)  # type: ignore[arg-type]

    def _changed(self, tags: frozenset[str]) -> None:
        """The mesh changed."""
        self.workers.forget_routes(tags)
        self.destinations.changed(tags)

    # Routes.

    def answer_route(self, question: messages.AskRoute, answer: Callable[..., None]) -> None:
        """Decide where a connection goes. Before the first complete state nobody can: the question waits."""
        if self.xds.synced.is_set():
            self.destinations.answer(question, answer)
            return
        now = trio.current_time()
        while self._unsynced and self._unsynced[0][0] <= now:
            self._unsynced.popleft()  # its worker has given up
        self._unsynced.append((now + WAIT_TIMEOUT, question, answer))

    async def _serve(self) -> None:
        """Accept connections once there is a certificate, and all is known of the mesh."""
        identity = self.own.identity
        self.certificates.want(identity)
        await self.xds.synced.wait()
        self.logger.info(
            "xds", "synced", workloads=self.state.workload_count, services=self.state.service_count
        )  # fmt: skip
        while True:
            try:
                await self.certificates.wait(identity)
                await self.workers.add_pod(
                    self._uid,
                    self.settings.pod_name,
                    self.own.namespace,
                    identity,
                    sockets.OWN,
                    (sockets.INBOUND_HBONE_PORT,),
                )
            except (CertificateUnavailableError, PodError) as error:
                self.logger.error("daemon", "cannot serve yet", error=str(error), again_in_seconds=RETRY)
                await trio.sleep(RETRY)
            else:
                break
        self.serving = True
        self.logger.info("daemon", "serving", identity=identity, port=sockets.INBOUND_HBONE_PORT)
        while self._unsynced:
            _, question, answer = self._unsynced.popleft()
            self.answer_route(question, answer)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP)
            self.destinations.sweep()

    # Readiness.

    def not_ready(self) -> str:
        """Why the waypoint is not ready; empty if it is."""
        reasons = []
        if self.draining:
            reasons.append("draining")
        if self.workers.alive < self.settings.workers:
            reasons.append(f"{self.workers.alive} of {self.settings.workers} workers run")
        if not self.xds.synced.is_set():
            reasons.append(f"no state from the control plane yet ({self.xds.error or 'waiting'})")
        elif not self.serving:
            status = [one.last_error for one in self.certificates.status() if one.last_error]
            reasons.append(f"no certificate for {self.own.identity} yet ({'; '.join(status) or 'waiting'})")
        return "; ".join(reasons)

    # Life.

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async with trio_asyncio.open_loop(), trio.open_nursery() as nursery:
                nursery.start_soon(self._end_on_signal, received, nursery.cancel_scope)
                await self._start(nursery)

    async def _start(self, nursery: trio.Nursery) -> None:
        await nursery.start(partial(serve, self.settings.admin_address, self.pages, loopback_only=True))
        ready = {"/healthz/ready": self.pages["/healthz/ready"]}
        await nursery.start(partial(serve, self.settings.readiness_address, ready, loopback_only=False))
        scraped = metrics_pages(self.metrics)
        self.pages.page("/metrics", scraped["/metrics"], "the metrics for Prometheus, as on METRICS_ADDR")
        await nursery.start(partial(serve, self.settings.metrics_address, scraped, loopback_only=False))
        if self.revocations.path is not None:
            self.workers.use_revocations(self.revocations.pem)
            nursery.start_soon(self.revocations.run, self.workers.use_revocations)
        nursery.start_soon(follow, self.settings.ca_root_ca, self.certificates.refresh)
        await nursery.start(self.certificates.run)
        await nursery.start(self.workers.run)
        await nursery.start(self.xds.run)
        nursery.start_soon(self._serve)
        nursery.start_soon(self._sweep)
        nursery.start_soon(keep_giving_back)
        self.logger.info(
            "daemon", "started", version=__version__, waypoint=f"{self.own.namespace}/{self.own.name}",
            workers=self.settings.workers, control_plane=self.settings.xds_address,
        )  # fmt: skip

    async def _end_on_signal(self, received: AsyncIterator[int], all_of_it: trio.CancelScope) -> None:
        number = await anext(received)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end, signal.Signals(number).name, nursery.cancel_scope)
            await anext(received)  # a second signal ends the wait
            nursery.cancel_scope.cancel()
        all_of_it.cancel()

    async def _end(self, name: str, scope: trio.CancelScope) -> None:
        grace = self.settings.termination_grace
        self.draining = True
        self.logger.info("daemon", "draining", signal=name, grace_seconds=grace)
        # The mesh hears that this pod goes while it is still served: nobody finds the door closed.
        minimum = min(self.own.minimum_drain, grace)
        await trio.sleep(minimum)
        await self.workers.drain(grace - minimum)
        scope.cancel()


def run(settings: WaypointSettings, logger: Logger, forked: list[Forked]) -> int:
    """Be the waypoint, whose first workers are `forked`; the exit code: 0 after an orderly end, 2 for bad settings."""
    return live(lambda: WaypointDaemon(settings, logger, forked), logger, forked)
