"""The control plane process in a cluster: its parts put together.

The order of the start: readiness answers (503) from the first moment; then the authority, the store, and the listeners.
Nothing of that fails for good because the API server is away: it is tried until it is there. Once ready the process
stays ready: an API server that goes away later is no reason to take the last state from the node proxies.
"""

import logging
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio
import trio_asyncio

from ztunnel.admin.pages import Pages
from ztunnel.admin.server import AddressError, Answer, Handler, Query
from ztunnel.admin.server import serve as serve_pages
from ztunnel.controlplane import waypoint_objects, waypoints
from ztunnel.controlplane.kube import webhook_config
from ztunnel.controlplane.kube.authority import SharedAuthority
from ztunnel.controlplane.kube.ca_secrets import connect
from ztunnel.controlplane.kube.ca_state import State
from ztunnel.controlplane.kube.options import ClusterOptions
from ztunnel.controlplane.kube.roots import RootPublisher
from ztunnel.controlplane.kube.tokenreview import TokenReviews
from ztunnel.controlplane.leader import Leader
from ztunnel.controlplane.metrics import MetricsPage, control_metrics, webhook_metrics
from ztunnel.controlplane.options import Options, StartError, bind
from ztunnel.controlplane.plane import Plane, log_loop_error, stopped
from ztunnel.controlplane.policy_registry import PolicyObject
from ztunnel.controlplane.policy_status import INVALID, Finding
from ztunnel.controlplane.stores import cluster_store
from ztunnel.controlplane.tls import SERVER_NAMES, ServerIdentity
from ztunnel.controlplane.webhook import LARGEST, MalformedError, Webhook
from ztunnel.identity.errors import AuthorityError
from ztunnel.store.kube.api import Api
from ztunnel.store.kube.errors import ApiError
from ztunnel.store.kube.store import KubernetesStore
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane")

FIRST_PAUSE: Final = 0.5  # seconds until the start is tried again, then twice as long each time
LONGEST_PAUSE: Final = 15.0

Writer = tuple[str, Callable[[], Awaitable[None]]]
"""What it does, in words that follow "cannot", and what to run while this replica leads."""


class Readiness:
    """Whether this replica may be sent clients, and what it waits for."""

    def __init__(self) -> None:
        self.waiting = "starting"

    async def page(self, _method: str, _query: Query) -> Answer:
        """200 once it is ready, else 503 with the reason."""
        if self.waiting:
            return Answer(f"not ready: {self.waiting}\n".encode(), 503)
        return Answer(b"ready\n")


async def serve_cluster(
    options: Options, cluster: ClusterOptions, *, task_status: trio.TaskStatus[int]
) -> None:
    """Run the control plane of a cluster until SIGTERM or SIGINT; started, with its port, once it serves.

    Raises StartError, alone or in a group, for what the operator has to change.
    """
    listener = bind(options)
    try:
        if cluster.kubeconfig is not None or cluster.context is not None:
            api = Api.from_kubeconfig(cluster.kubeconfig, cluster.context)
        else:
            api = Api.in_cluster()
    except ApiError as error:
        raise StartError(f"--kubernetes: {error} (outside of a pod: --kubeconfig FILE)") from None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio_asyncio.open_loop() as loop, trio.open_nursery() as nursery:
            loop.set_exception_handler(log_loop_error)
            process = _Process(options, cluster, api, nursery)
            await process.listen("--ready", cluster.ready, {"/ready": process.readiness.page})
            nursery.start_soon(partial(process.start, listener, task_status))
            await stopped(signals)
            process.readiness.waiting = "stopping"
            await process.end()
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await process.leave()
    logger.info("stopped")


class _Process:
    def __init__(self, options: Options, cluster: ClusterOptions, api: Api, nursery: trio.Nursery) -> None:
        self.readiness = Readiness()
        self._options = options
        self._cluster = cluster
        self._api = api
        self._nursery = nursery
        self._plane: Plane | None = None
        self._shared: SharedAuthority | None = None
        self._store: KubernetesStore | None = None

    async def start(self, listener: Any, task_status: trio.TaskStatus[int]) -> None:
        """Bring everything up, in its order."""
        options, cluster, api, nursery = self._options, self._cluster, self._api, self._nursery
        self.readiness.waiting = "the certificate authority is not read yet"
        state = await self._authority_state()
        shared = self._shared = SharedAuthority(
            api,
            cluster.namespace,
            state,
            replica=cluster.replica,
            uid=cluster.uid,
            lifetimes=options.lifetimes,
        )
        await nursery.start(shared.run)
        self.readiness.waiting = "the cluster's objects are not read yet"
        store = self._store = cluster_store(api)
        reviews = TokenReviews(api, node_proxies=cluster.node_proxies)
        names = (*SERVER_NAMES, *cluster.server_names)
        try:
            plane = Plane(
                options.settings,
                store,
                shared,
                reviews,
                host=options.host,
                server_names=names,
                node_proxies=cluster.node_proxies,
                write_status=False,
            )
            webhook_identity = ServerIdentity(shared, "", names, ("http/1.1",))
        except (AuthorityError, OSError) as error:
            raise StartError(f"the server's certificate: {error}") from None
        await plane.read(nursery)
        nursery.start_soon(webhook_identity.run)
        webhook = Webhook()
        meters = control_metrics(plane.discovery, plane.certificates, lambda: shared.authority, time.time)
        webhook_metrics(meters, webhook)
        leader = Leader(api, cluster.namespace, name=cluster.lease, identity=cluster.replica)
        meters.read_gauge(
            "istiod_leading", "Whether this replica writes", lambda: [((), float(leader.leading))]
        )
        await self.listen(
            "--metrics",
            cluster.metrics,
            {"/metrics": MetricsPage(meters).page, "/ready": self.readiness.page},
        )
        await self.listen(
            "--webhook", cluster.webhook, {"/validate": _validate(webhook)}, tls=webhook_identity.context
        )
        if options.admin:
            pages = plane.pages()
            pages.dump.section("leader", leader.describe)
            pages.dump.section("revision", lambda: cluster.revision)
            await self._listen_admin(options.admin, pages)
        for what, run in self._writers(plane, shared, api.while_allowed(leader.limit)):
            nursery.start_soon(leader.run_while_leading, run, what)
        nursery.start_soon(leader.run)
        port = await plane.listen(listener)
        self._plane = plane
        if options.port_file is not None:
            from ztunnel.controlplane.server import write_whole

            write_whole(options.port_file, f"{port}\n")
        self.readiness.waiting = ""
        task_status.started(port)

    def _writers(self, plane: Plane, shared: SharedAuthority, api: Api) -> list[Writer]:
        """What only the leader does, by an `api` that writes for nobody else."""
        cluster = self._cluster
        roots = RootPublisher(api, lambda: shared.bundle, lambda: shared.revocations)
        config = webhook_config.WebhookConfig(
            api, cluster.webhook_config, cluster.namespace, cluster.revision, lambda: shared.bundle
        )
        plane.follower.statuses.store = KubernetesStore(api)
        plane.follower.statuses.told = partial(_tell_of_faults, api)
        shared.on_change(roots.changed)
        shared.on_change(config.roots_changed)
        return [
            ("lead changes of the certificate authority through", shared.lead),
            ("write roots and revocation lists into the namespaces", roots.run),
            ("write the status of policies", plane.follower.statuses.run),
            ("keep the validating webhook's configuration", config.run),
            (
                "deploy waypoints",
                partial(waypoints.run, api, self._waypoints(), cluster.namespace, cluster.replica),
            ),
        ]

    def _waypoints(self) -> waypoint_objects.Deployment:
        """What waypoints are made with."""
        cluster, settings = self._cluster, self._options.settings
        return waypoint_objects.Deployment(
            image=os.environ.get("WAYPOINT_IMAGE", ""),
            pull_policy=os.environ.get("WAYPOINT_PULL_POLICY", "IfNotPresent"),
            xds_address=f"https://{cluster.service}.{cluster.namespace}.svc:15012",
            revision=cluster.revision,
            cluster_id=settings.cluster_id,
            trust_domain=settings.trust_domain,
            network=settings.network,
            root_namespace=settings.root_namespace,
            resources=cluster.waypoint_resources,
            default_revision=cluster.default_revision,
        )

    async def _authority_state(self) -> State:
        """The state of the authority, once the API server gives it."""
        pause, told = FIRST_PAUSE, ""
        read = partial(connect, self._api, self._cluster.namespace, lifetimes=self._options.lifetimes)
        while True:
            try:
                return await trio.to_thread.run_sync(read, abandon_on_cancel=True)
            except (ApiError, AuthorityError) as error:
                self.readiness.waiting = f"the certificate authority cannot be read: {error}"
                if str(error) != told:
                    told = str(error)
                    logger.error("cannot read the certificate authority; trying again: %s", error)
            await trio.sleep(pause * random.uniform(1.0, 1.5))  # noqa: S311 (not all at once)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def listen(self, flag: str, address: str, pages: dict[str, Handler], **how: Any) -> None:
        """Serve pages to the network."""
        if how:
            how["largest_body"] = LARGEST
        try:
            told = await self._nursery.start(partial(serve_pages, address, pages, loopback_only=False, **how))
        except AddressError as error:
            raise StartError(f"{flag} {error}") from None
        logger.info("listening", extra=fields(address=told, pages=" ".join(pages)))

    async def _listen_admin(self, address: str, pages: Pages) -> None:
        try:
            await self._nursery.start(partial(serve_pages, address, pages, loopback_only=True))
        except AddressError as error:
            raise StartError(f"--admin {error}") from None

    async def end(self) -> None:
        """Send clients elsewhere."""
        if self._plane is not None:
            await self._plane.end()

    async def leave(self) -> None:
        """After everything else: nothing is signed any more."""
        if self._shared is not None:
            await self._shared.leave()
        if self._store is not None:
            await trio.to_thread.run_sync(self._store.close)


def _tell_of_faults(api: Api, policy: PolicyObject, finding: Finding) -> None:
    """An Event on a policy that has faults: what `kubectl describe` and `kubectl get events` show. Raises ApiError."""
    if finding.reason == INVALID:
        reference = {
            "apiVersion": policy.API_VERSION,
            "kind": policy.KIND,
            "namespace": policy.namespace,
            "name": policy.name,
            "uid": policy.metadata.uid,
        }
        api.event(reference, reason="InvalidPolicy", message=finding.message, component="istiod")


def _validate(webhook: Webhook) -> Handler:
    async def page(method: str, query: Query) -> Answer:
        if method != "POST":
            return Answer(b"use POST with an AdmissionReview\n", 405)
        try:
            # An object of 1 MB takes a third of a second; xDS and certificates do not wait for it.
            answer = await trio.to_thread.run_sync(webhook.answer, query.body)
        except MalformedError as error:
            logger.warning("a malformed review: %s", error)
            return Answer(f"{error}\n".encode(), 400)
        return Answer(answer, content_type="application/json")

    return page
