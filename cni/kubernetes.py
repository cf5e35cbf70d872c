"""The node agent on Kubernetes (`python -m cni --kubernetes`): its parts, put together and ended in order.

It stays in place when its pod ends, so that an upgrade or a reboot opens no gap: the plugin keeps new pods waiting
until the next agent has come. Only where its DaemonSet is deleted does it leave, and takes everything with it.
"""

import argparse
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from cni import conflist, rules
from cni.agent import Agent, Config
from cni.attach import PluginServer
from cni.counting import Counters
from cni.installer import Installer, Plan
from cni.joining import Joining
from cni.pages import DEBUG_PORT, METRICS_PORT, READINESS_PORT, Pages
from cni.parking import Parking
from cni.places import Runtime
from cni.plugin.build import BINARY
from cni.probes import KUBELET_UID, HostProbes
from cni.reporting import Annotations, Events, Reporter
from cni.rules import Settings
from ztunnel.admin.server import AddressError
from ztunnel.inpod.pods import ZdsError
from ztunnel.memory import keep_giving_back, one_heap
from ztunnel.store.kube.api import Api, ApiError
from ztunnel.store.kube.store import KubernetesStore
from ztunnel.store.models import Pod
from ztunnel.store.problems import Problem
from ztunnel.telemetry.log import Logger, adopt_standard_logging, fatal, leaves

log = logging.getLogger(__name__)

EXEMPT: Final = ("istio-system", "kube-system")
"""Namespaces whose pods start without the agent: its own, and those without which a node has no network."""
LEAVING: Final = 20.0  # seconds for pods to leave at an uninstallation; a pod is given 30 to end
ASK_AGAIN: Final = 1.0  # seconds between questions about the DaemonSet
ASKING: Final = 5.0  # seconds for all of them


@dataclass(frozen=True, slots=True)
class Options:
    """Where things are, as this process sees them (the manifest mounts them so), and what is settable."""

    node: str
    namespace: str = "istio-system"
    daemonset: str = "istio-cni-node"
    netns_dir: Path = Path("/var/run/netns")
    zds: Path = Path("/var/run/ztunnel/ztunnel.sock")
    plugin_socket: Path = Path("/var/run/istio-cni/plugin.sock")
    plugin: Path = BINARY
    bin_dir: Path = Path("/host/opt/cni/bin")
    net_dir: Path = Path("/host/etc/cni/net.d")
    exempt: tuple[str, ...] = EXEMPT
    settings: Settings = field(default_factory=Settings)
    kubelet_uid: int = KUBELET_UID
    reconcile_interval: float = 60.0
    ports: tuple[int, int, int] = (READINESS_PORT, METRICS_PORT, DEBUG_PORT)


class NodeAgent:
    """Everything of one node. `run` once."""

    def __init__(self, options: Options, api: Api) -> None:
        self._options = options
        self._api = api
        self.counters = Counters()
        self.probes = HostProbes(kubelet_uid=options.kubelet_uid)
        self.places = Runtime(options.netns_dir)
        self._events = Events(api)
        self._staying = trio.CancelScope()
        self._left_alone = trio.Event()
        annotations = Annotations(api)
        self.reporter = Reporter(self._events, self.counters, self.probes, annotations, options.node)
        self.agent = Agent(
            Config(
                options.node,
                Path(),
                options.netns_dir,
                options.zds,
                options.settings,
                reconcile_interval=options.reconcile_interval,
                check_listeners=True,
            ),
            store=KubernetesStore(
                api, on_problem=_say, field_selectors={Pod: f"spec.nodeName={options.node}"}
            ),
            places=self.places,
            writer=annotations,
            observer=self.reporter,
        )
        joining = Joining(self.agent, api, self.places, self.probes, self.counters)
        self._plugins = PluginServer(options.plugin_socket, joining.handle)
        entry = conflist.entry(socket=str(options.plugin_socket), exempt=(options.namespace, *options.exempt))
        self.installer = Installer(
            Plan(options.plugin, options.bin_dir, options.net_dir, entry),
            on_change=self._installed,
            on_failure=lambda error: self._install_failed(error.reason, str(error)),
        )
        self.pages = Pages(
            self.agent,
            self.installer,
            self.probes,
            self.reporter,
            self.counters,
            lambda: self._plugins.listening,
        )

    def _installed(self, what: str) -> None:
        self.counters.installs["SUCCESS"] += 1
        if self.installer.ready:
            self.counters.repairs[what] += 1

    def _install_failed(self, reason: str, message: str) -> None:
        self.counters.installs[reason] += 1
        self.reporter.install_failed(message)

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises ZdsError, AddressError where a socket or port is taken."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_signal, signals, nursery.cancel_scope)
                nursery.start_soon(keep_giving_back)
                nursery.start_soon(self._events.run)
                nursery.start_soon(lambda: self.pages.run(ports=self._options.ports))
                # Before pods are redirected, or probes of those that are strict fail for a moment.
                await self.probes.reconcile()
                await trio.to_thread.run_sync(rules.prepare, self._options.settings)
                # The plugin's questions are answered before it is put in place.
                await nursery.start(self._plugins.run)
                await nursery.start(self.agent.run)
                nursery.start_soon(Parking(self.agent.server).run)
                nursery.start_soon(self._keep_in_place)

    async def _keep_in_place(self) -> None:
        """Put what is missing on the node, until it is to be left."""
        with self._staying:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.installer.run)
                nursery.start_soon(self._reconcile)
        self._left_alone.set()

    async def _reconcile(self) -> None:
        while True:
            await trio.sleep(self._options.reconcile_interval)
            known = not self.probes.problem
            if await self.probes.reconcile() and known:
                self.counters.repairs["probes"] += 1

    async def _until_signal(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if await self._uninstalled():
                log.info("%s: the DaemonSet %s is deleted; leaving the node", name, self._options.daemonset)
                await self._leave()
            else:
                log.info("%s: ending; everything stays in place for the next agent", name)
            scope.cancel()

    async def _uninstalled(self) -> bool:
        """Whether the agent is to be here no more, and not only this process. False where that cannot be told."""
        with trio.move_on_after(ASKING):
            while True:
                try:
                    found = await trio.to_thread.run_sync(
                        lambda: self._api.get(
                            "apps/v1", "DaemonSet", self._options.namespace, self._options.daemonset
                        )
                    )
                except ApiError as error:
                    # A service account that is deleted is not known any more.
                    if error.status == 401:
                        return True
                    log.warning("is this an uninstallation? %s", error)
                    await trio.sleep(ASK_AGAIN)
                    continue
                return found is None or bool(found["metadata"].get("deletionTimestamp"))
        return False

    async def _leave(self) -> None:
        """Take away everything that was put on the node: first what new pods would wait for."""
        # Or it would be repaired at once.
        self._staying.cancel()
        if self.agent.synced.is_set():
            with trio.move_on_after(ASKING):
                await self._left_alone.wait()
        for error in await trio.to_thread.run_sync(self.installer.remove):
            log.error("%s", error)
        if self.agent.synced.is_set():
            await self.agent.leave(LEAVING)
        await self.probes.remove()


def _say(problem: Problem) -> None:
    log.warning("%s", problem)


def _options(argv: Sequence[str] | None) -> Options:
    environment = os.environ
    parser = argparse.ArgumentParser(
        prog="cni --kubernetes", description="The ambient mesh's node agent on Kubernetes."
    )
    parser.add_argument("--kubernetes", action="store_true", help=argparse.SUPPRESS)

    def add(name: str, variable: str, default: str, told: str) -> None:
        parser.add_argument(name, default=environment.get(variable) or default, help=f"{told} ({variable})")

    defaults = Options("")
    add("--node", "NODE_NAME", "", "the node whose pods it keeps")
    add("--namespace", "POD_NAMESPACE", defaults.namespace, "the namespace that it runs in")
    add("--daemonset", "DAEMONSET_NAME", defaults.daemonset, "the DaemonSet whose end is its own")
    add("--netns-dir", "NETNS_DIR", str(defaults.netns_dir), "the runtime's network namespaces")
    add("--zds", "ZTUNNEL_UDS_ADDRESS", str(defaults.zds), "the socket on which ztunnel is told of its pods")
    add("--plugin-socket", "PLUGIN_SOCKET", str(defaults.plugin_socket), "the socket of the CNI plugin")
    add("--plugin", "PLUGIN_BINARY", str(defaults.plugin), "the CNI plugin to install")
    add("--cni-bin-dir", "CNI_BIN_DIR", str(defaults.bin_dir), "the node's directory of CNI plugins")
    add(
        "--cni-net-dir",
        "CNI_NET_DIR",
        str(defaults.net_dir),
        "the node's directory of network configurations",
    )
    add("--exclude-namespaces", "EXCLUDE_NAMESPACES", ",".join(EXEMPT), "whose pods start without the agent")
    add("--kubelet-uid", "KUBELET_UID", str(KUBELET_UID), "the user that the kubelet runs as")
    add("--reconcile-interval", "RECONCILE_INTERVAL", "60", "seconds between looks at every pod")
    add("--dns-capture", "AMBIENT_DNS_CAPTURE", "true", "redirect pods' DNS to ztunnel: true or false")
    given = parser.parse_args(argv)
    if not given.node:
        parser.error("--node or NODE_NAME is needed: the name of this node")
    try:
        uid, interval = int(given.kubelet_uid), float(given.reconcile_interval)
    except ValueError as error:
        parser.error(f"--kubelet-uid and --reconcile-interval are numbers: {error}")
    return Options(
        node=given.node,
        namespace=given.namespace,
        daemonset=given.daemonset,
        netns_dir=Path(given.netns_dir),
        zds=Path(given.zds),
        plugin_socket=Path(given.plugin_socket),
        plugin=Path(given.plugin),
        bin_dir=Path(given.cni_bin_dir),
        net_dir=Path(given.cni_net_dir),
        exempt=tuple(each.strip() for each in given.exclude_namespaces.split(",") if each.strip()),
        settings=Settings(dns_capture=given.dns_capture.lower() != "false"),
        kubelet_uid=uid,
        reconcile_interval=interval,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent until SIGTERM or SIGINT; the exit code: 0, or 1 after an error that it cannot work around."""
    options = _options(argv)
    one_heap()
    try:
        adopt_standard_logging(Logger.from_environment())
    except ValueError as unusable:
        return fatal(str(unusable))
    try:
        api = Api.in_cluster()
    except ApiError as outside:
        return fatal(str(outside))
    code = 0
    try:
        trio.run(NodeAgent(options, api).run)
    except* (ZdsError, AddressError) as errors:
        for error in leaves(errors):
            log.error("%s", error)
        code = 1
    return code
