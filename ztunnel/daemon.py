"""The node daemon's control process: puts the rooms together.

It keeps the one copy of the mesh model (xDS), the certificates (CA), and the list of this node's pods (ZDS), and
answers the workers, which move the bytes. Nothing here is on the path of a byte.
"""

import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import trio
import trio_asyncio

from ztunnel import __version__, process1
from ztunnel.admin.metrics import metrics_pages, node_metrics
from ztunnel.admin.node import node_pages
from ztunnel.admin.server import serve
from ztunnel.config import Settings
from ztunnel.control import live
from ztunnel.dns.server import DnsServer
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import CertificateUnavailableError
from ztunnel.identity.revocations import Revocations, follow
from ztunnel.identity.rotation import CertificateManager
from ztunnel.inpod import zds
from ztunnel.inpod.pods import WorkloadInfo
from ztunnel.memory import keep_giving_back
from ztunnel.mesh.model import pod_uid
from ztunnel.mesh.routing import resolve, waypoints_of
from ztunnel.mesh.state import MeshState
from ztunnel.proxy import messages
from ztunnel.proxy.context import WAIT_TIMEOUT
from ztunnel.proxy.parting import until_succeeded
from ztunnel.proxy.prefork import Forked
from ztunnel.proxy.served import PodError
from ztunnel.proxy.trusted import NOBODY, Trust
from ztunnel.proxy.workers import Workers
from ztunnel.telemetry.log import Logger
from ztunnel.xds.ca import CaClient
from ztunnel.xds.channel import ControlPlane
from ztunnel.xds.client import NodeInfo, XdsClient, XdsConfig

CERTIFICATE_WAIT = 20.0  # seconds that a new pod waits for its first certificate before the agent hears of it
RouteAnswerer = Callable[..., None]


class Daemon:
    """One node's daemon. It is the ZDS client's `Pods`."""

    def __init__(self, settings: Settings, logger: Logger, forked: Sequence[Forked] = ()) -> None:
        self.settings = settings
        self.logger = logger
        self.started = time.time()
        self.state = MeshState(settings.node_name)
        self._local_changes = 0
        self.agent_connected = False
        self.draining = False
        self.ending = False  # told to end, and serving on
        self.pending = 0  # pods on their way in
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
            pod_namespace=settings.pod_namespace,
            instance_ip=settings.instance_ip,
            network=settings.network,
        )
        self.workers = Workers(
            settings.workers,
            logger,
            self.answer_route,
            forked,
            workload=self.state.local_workload,
            trust=self._trust,
        )
        self.xds = XdsClient(
            XdsConfig(server=plane, node=node), self.state, self._changed, self.workers.policies.update
        )
        self.certificates = CertificateManager(
            CaClient(authority).sign, ttl=settings.secret_ttl, on_update=self._certified
        )
        self.dns = DnsServer(
            self.state,
            synced=self.xds.synced.is_set,
            network=settings.network,
            cluster_id=settings.cluster_id,
            servers=settings.dns_upstream,
        )
        self.revocations = Revocations(settings.crl_path)
        self._identities: dict[str, str] = {}  # by pod uid
        self._unsynced: deque[tuple[float, messages.AskRoute, RouteAnswerer]] = deque()
        self._agent_scope = trio.CancelScope()
        self.pages = node_pages(self)
        self.metrics = node_metrics(self)

    # Pods (ZDS).

    async def add(self, uid: str, info: WorkloadInfo, netns_fd: int) -> None:
        """Serve a pod once it has a certificate. Raises PodError, CertificateUnavailableError."""
        self.pending += 1
        try:
            await self._add(uid, info, netns_fd)
        finally:
            self.pending -= 1

    async def _add(self, uid: str, info: WorkloadInfo, netns_fd: int) -> None:
        if self.draining:
            os.close(netns_fd)
            raise PodError("this ztunnel is draining; new pods are for its successor")
        identity = f"spiffe://{self.settings.trust_domain}/ns/{info.namespace}/sa/{info.service_account}"
        try:
            self.certificates.want(identity)
        except BaseException:
            os.close(netns_fd)
            raise
        try:
            try:
                await self._certificate(identity)
                if self.settings.dns_capture:
                    self.dns.add(uid, info.name, info.namespace, netns_fd)
            except BaseException:
                os.close(netns_fd)
                raise
            await self.workers.add_pod(uid, info.name, info.namespace, identity, netns_fd)
        except BaseException:
            self._release(identity)
            if uid not in self.workers.pods:
                self._forget(uid)
            raise
        before = self._identities.get(uid)
        self._identities[uid] = identity
        if before is not None:
            self._release(before)
        self.logger.info(
            "inpod", "pod added", pod=f"{info.namespace}/{info.name}", uid=uid, identity=identity
        )

    async def _certificate(self, identity: str) -> None:
        """Wait for the identity's certificate; the CA may learn of the pod a moment after we do."""
        deadline = trio.current_time() + CERTIFICATE_WAIT
        while True:
            try:
                with trio.fail_at(deadline):
                    await self.certificates.wait(identity)
            except CertificateUnavailableError:
                if trio.current_time() + 0.25 >= deadline:
                    raise
                await trio.sleep(0.1)
            except trio.TooSlowError:
                raise PodError(
                    f"no certificate for {identity} within {CERTIFICATE_WAIT:.0f} s: is the certificate authority "
                    f"at {self.settings.ca_address} reachable?"
                ) from None
            else:
                return

    async def delete(self, uid: str) -> None:
        """Accept no more for a pod. What is open goes on with the certificates of its handshakes."""
        await self.workers.delete_pod(uid)
        self._forget(uid)
        self.logger.info("inpod", "pod removed", uid=uid)

    def _forget(self, uid: str) -> None:
        self.dns.delete(uid)
        identity = self._identities.pop(uid, None)
        if identity is not None:
            self._release(identity)

    def _release(self, identity: str) -> None:
        self.certificates.release(identity)
        if identity not in self._identities.values():
            self.workers.forget_certificate(identity, "no pod of this node has this identity")

    def known(self) -> set[str]:
        """The pods served now."""
        return set(self.workers.pods)

    def _certified(self, certificate: WorkloadCertificate) -> None:
        self.workers.use_certificate(certificate.identity, certificate.encode())

    def _changed(self, tags: frozenset[str]) -> None:
        """The mesh changed."""
        self.workers.forget_routes(tags)
        if self.state.local_changes != self._local_changes:
            self._local_changes = self.state.local_changes
            self.workers.policies.workloads_changed()

    # Routes.

    def answer_route(self, question: messages.AskRoute, answer: RouteAnswerer) -> None:
        """Decide where a connection goes. Before the first complete state nobody can: the question waits."""
        if not self.xds.synced.is_set():
            now = trio.current_time()
            while self._unsynced and self._unsynced[0][0] <= now:
                self._unsynced.popleft()  # its worker has given up
            self._unsynced.append((now + WAIT_TIMEOUT, question, answer))
            return
        pod = self.workers.pods.get(question.uid)
        source = None
        if pod is not None:
            uid = pod_uid(self.settings.cluster_id, pod.namespace, pod.name)
            source = self.state.workload_by_uid(uid)
        answer(resolve(self.state, source, self.settings.network, question.address, question.port))

    def _trust(self, namespace: str, name: str) -> Trust:
        workload = self.state.local_workload(namespace, name)
        return waypoints_of(self.state, workload, self.settings.network) if workload is not None else NOBODY

    async def _answer_when_synced(self) -> None:
        await self.xds.synced.wait()
        self.logger.info(
            "xds", "synced", workloads=self.state.workload_count, services=self.state.service_count
        )  # fmt: skip
        while self._unsynced:
            _, question, answer = self._unsynced.popleft()
            self.answer_route(question, answer)

    # Readiness.

    def not_ready(self) -> str:
        """Why the daemon is not ready; empty if it is."""
        reasons = []
        if self.draining or self.ending:
            reasons.append("draining" if self.draining else "ending")
        if self.workers.alive < self.settings.workers:
            reasons.append(f"{self.workers.alive} of {self.settings.workers} workers run")
        if not self.xds.synced.is_set():
            reasons.append(f"no state from the control plane yet ({self.xds.error or 'waiting'})")
        if self.xds.synced.is_set() and not self.agent_connected:
            reasons.append(f"not connected to the node agent ({self.settings.inpod_uds})")
        return "; ".join(reasons)

    # Life.

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async with trio_asyncio.open_loop(), trio.open_nursery() as nursery:
                nursery.start_soon(self._end_on_signal, received, nursery.cancel_scope)
                await self._start(nursery)

    async def _start(self, nursery: trio.Nursery) -> None:
        if process1.restarts():
            self.logger.error(
                "daemon", "the control process died and was started again; its workers serve on meanwhile",
                restarts=process1.restarts(), reason=os.environ.get(process1.LAST_END),
            )  # fmt: skip
        await nursery.start(partial(serve, self.settings.admin_address, self.pages, loopback_only=True))
        ready = {"/healthz/ready": self.pages["/healthz/ready"]}
        await nursery.start(partial(serve, self.settings.readiness_address, ready, loopback_only=False))
        scraped = metrics_pages(self.metrics)
        self.pages.page("/metrics", scraped["/metrics"], "the metrics for Prometheus, as on METRICS_ADDR")
        await nursery.start(partial(serve, self.settings.metrics_address, scraped, loopback_only=False))
        if self.revocations.path is not None:
            self.workers.use_revocations(self.revocations.pem)
            nursery.start_soon(self.revocations.run, self.workers.use_revocations)
        # Another root, or one less: certificates that are asked for now come with all that are to be trusted.
        nursery.start_soon(follow, self.settings.ca_root_ca, self.certificates.refresh)
        await nursery.start(self.certificates.run)
        await nursery.start(self.workers.run)
        await nursery.start(self.xds.run)
        await nursery.start(self.dns.run)
        nursery.start_soon(self._answer_when_synced)
        nursery.start_soon(self._follow_agent)
        nursery.start_soon(keep_giving_back)
        self.logger.info(
            "daemon", "started", version=__version__, node=self.settings.node_name,
            workers=self.settings.workers, control_plane=self.settings.xds_address,
        )  # fmt: skip

    async def _follow_agent(self) -> None:
        # Not before pods can be served: a predecessor may be serving them still, and from the moment that we listen
        # beside it half of the connections are ours.
        await self.xds.synced.wait()
        with self._agent_scope:
            await zds.run(self.settings.inpod_uds, self, on_state=self._agent_state)

    def _agent_state(self, connected: bool) -> None:
        self.agent_connected = connected
        if self.draining and not connected:
            self._agent_scope.cancel()  # whoever connects last is the one whose word counts with the agent

    async def _end_on_signal(self, received: AsyncIterator[int], all_of_it: trio.CancelScope) -> None:
        number = await anext(received)
        name = signal.Signals(number).name
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end, name, nursery.cancel_scope)
            await anext(received)  # a second signal ends the wait
            nursery.cancel_scope.cancel()
        all_of_it.cancel()

    async def _end(self, name: str, scope: trio.CancelScope) -> None:
        grace = self.settings.termination_grace
        succeeded = True
        if self.settings.awaits_successor:
            self.ending = True
            self.logger.info(
                "daemon", "ending once another proxy serves the pods", signal=name, grace_seconds=grace
            )
            succeeded, why, grace = await until_succeeded(self.workers, grace)
            name = f"{name}; {why}"
        self.draining = True
        # The agent has to be able to say that a pod is gone. Those that come are the successor's, who hears of all.
        # Without one it had better know at once that nobody serves the pods now.
        if not self.agent_connected or not succeeded:
            self._agent_scope.cancel()
        self.logger.info("daemon", "draining", signal=name, grace_seconds=round(grace, 1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.dns.drain)
            await self.workers.drain(grace)
        scope.cancel()


def run(settings: Settings, logger: Logger, forked: list[Forked]) -> int:
    """Be the daemon, whose first workers are `forked`; the exit code: 0 after an orderly end, 2 for bad settings."""
    return live(lambda: Daemon(settings, logger, forked), logger, forked)
