"""The node agent: follows the pods of one node in the store and keeps each in the mesh, or out of it.

`python -m cni.agent --node NAME --store DIR --netns-dir DIR --zds PATH`. It may be killed at any moment: what is
redirected stays so (fail closed), and the next start reads from the kernel how far each pod is.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import trio

from cni.goals import Goal, goal_of
from cni.keeper import GRACE, PROXY_PATIENCE, Keeper, KernelError, Node, Observer, StoreWriter, Writer
from cni.places import Directory, Places
from cni.rules import Settings
from cni.zds import ZdsServer
from ztunnel.inpod.pods import ZdsError
from ztunnel.store.base import Store
from ztunnel.store.models import Key, Namespace, Pod, key_of
from ztunnel.store.problems import Problem
from ztunnel.telemetry.log import Logger, adopt_standard_logging, fatal, leaves

log = logging.getLogger(__name__)

RECONCILE_INTERVAL = 60.0  # seconds between looks at every pod, whether or not anything has changed
STORE_POLL = 0.2  # seconds between looks for a store that is not there
PROMISED = 10.0  # seconds for which a watch may be behind what the API server has answered


@dataclass(frozen=True, slots=True)
class Config:
    """Which node, and where: its objects, the files of its pods' network namespaces, ztunnel's socket.

    Times in seconds: between looks at every pod; for which a pod that has left is still served by ztunnel; after
    which ztunnel's silence is reported.
    """

    node: str
    store: Path
    netns_dir: Path
    zds: Path
    settings: Settings = field(default_factory=Settings)
    reconcile_interval: float = RECONCILE_INTERVAL
    grace: float = GRACE
    patience: float = PROXY_PATIENCE
    check_listeners: bool = False


class Agent:
    """The agent of one node. `run` once.

    `store`, `places` and `writer` default to those of the embedded mesh, which `config` names.
    """

    def __init__(
        self,
        config: Config,
        *,
        store: Store | None = None,
        places: Places | None = None,
        writer: Writer | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self.server = ZdsServer(config.zds, on_synced=self._wake_all)
        self._node = Node(
            writer or StoreWriter(_directory(config.store)),
            self.server,
            places or Directory(config.netns_dir),
            observer=observer,
            grace=config.grace,
            patience=config.patience,
            check_listeners=config.check_listeners,
        )
        self._observer = self._node.observer
        self._namespaces: dict[str, Namespace] = {}
        self._pods: dict[str, Pod] = {}  # by uid, only this node's
        self._uids: dict[Key, str] = {}  # of those pods
        self._keepers: dict[str, tuple[Keeper, trio.CancelScope]] = {}
        self._promised: dict[str, bool] = {}  # by uid: in the mesh or not, whatever the store has told so far
        self._unheard: set[str] = (
            set()
        )  # uids of pods that were admitted, and of which the store has told nothing
        self._leaving = False
        self._nursery: trio.Nursery | None = None
        self.synced = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; the rules stay. Raises ZdsError where ztunnel's socket cannot be listened on."""
        store: Store | None = self._store
        if store is None:
            await self._wait_for_store()
            store = _directory(self._config.store)
        async with aclosing(store.watch(Pod, Namespace)) as changes, trio.open_nursery() as nursery:
            self._nursery = nursery
            async for change in changes:
                touched: Iterable[str] = ()
                if isinstance(change.obj, Pod):
                    self._unheard.discard(change.obj.metadata.uid)
                    touched = self._take_pod(change.obj, gone=change.op == "deleted")
                elif isinstance(change.obj, Namespace):
                    touched = self._take_namespace(change.obj, gone=change.op == "deleted")
                elif change.op == "synced" and not self.synced.is_set():
                    self.synced.set()
                    touched = list(self._pods)
                    # Before ztunnel may connect: pods missing from its snapshot are pods it drops.
                    await self._offer_all()
                    await nursery.start(self.server.run)
                    nursery.start_soon(self._reconcile)
                    log.info("follows the pods of node %s", self._config.node)
                    task_status.started()
                if change.obj is not None:
                    self._observer.heard(change.op, change.obj)
                if self.synced.is_set():
                    for uid in touched:
                        self._aim(uid)

    async def _wait_for_store(self) -> None:
        if not self._config.store.is_dir():
            log.error("store %s is not there yet; waiting for it", self._config.store)
        while not self._config.store.is_dir():
            await trio.sleep(STORE_POLL)

    async def _reconcile(self) -> None:
        while True:
            await trio.sleep(self._config.reconcile_interval)
            self._wake_all()

    def _wake_all(self) -> None:
        for uid, (keeper, _) in self._keepers.items():
            if uid in self._pods:
                keeper.aim(self._goal(uid))
                keeper.wake()

    def _take_namespace(self, namespace: Namespace, *, gone: bool) -> list[str]:
        """Take note of it; the uids of the pods in it."""
        if gone:
            self._namespaces.pop(namespace.name, None)
        else:
            self._namespaces[namespace.name] = namespace
        return [uid for uid, pod in self._pods.items() if pod.namespace == namespace.name]

    def _take_pod(self, pod: Pod, *, gone: bool) -> list[str]:
        """Take note of it; its uid, if it is or was on this node, and that of another one that had its name."""
        touched = []
        uid = pod.metadata.uid
        known = self._uids.get(pod.key)
        if gone and known is not None and known != uid:
            return []  # its successor has been taken note of already (see `admit`)
        # A pod of the same name and another uid is another pod.
        if known is not None:
            del self._uids[pod.key]
            del self._pods[known]
            touched.append(known)
        if not gone and pod.spec.node_name == self._config.node and uid and not pod.spec.host_network:
            self._pods[uid] = pod
            self._uids[pod.key] = uid
            if uid != known:
                touched.append(uid)
        return touched

    def namespace(self, name: str) -> Namespace | None:
        """A namespace as it was last heard of, None if it is not known."""
        return self._namespaces.get(name)

    def pod(self, namespace: str, name: str) -> Pod | None:
        """A pod of this node as it was last heard of, None if it is not known."""
        uid = self._uids.get(key_of(Pod, namespace, name))
        return self._pods.get(uid) if uid else None

    def states(self) -> Iterator[Keeper]:
        """What is known of each pod of the node, but of those on the host's network."""
        return (keeper for uid, (keeper, _) in self._keepers.items() if uid in self._pods)

    def admit(self, pod: Pod, namespace: Namespace) -> Keeper:
        """Keep a pod that is about to start, as these objects say, which may be newer than what the store has told.

        They hold for PROMISED seconds, or until the store says the same. Its network is new: all of the way into the
        mesh is gone again, and at once, as none of its programs runs.
        """
        assert self._nursery is not None, "the agent runs"  # noqa: S101
        uid = pod.metadata.uid
        joined = goal_of(pod, namespace, self._config.settings).joined
        if uid not in self._pods:
            self._unheard.add(uid)
            for other in self._take_pod(pod, gone=False):
                if other != uid:
                    self._aim(other)
        self._promised[uid] = joined
        self._aim(uid)
        self._nursery.start_soon(self._release, uid)
        keeper, _ = self._keepers[uid]
        if keeper.goal.joined:
            keeper.anew()
        return keeper

    async def _release(self, uid: str) -> None:
        await trio.sleep(PROMISED)
        if self._promised.pop(uid, None) is not None and uid in self._pods:
            self._aim(uid)

    def end_soon(self, uid: str) -> None:
        """The pod's network is being taken down: ztunnel lets go of it. To be called while `run` runs."""
        if self._nursery is not None:
            self._nursery.start_soon(self._end, uid)

    async def _end(self, uid: str) -> None:
        if uid in self._unheard:
            # It may have been deleted before it was admitted, and then nobody will ever tell.
            self._unheard.discard(uid)
            pod = self._pods.pop(uid)
            del self._uids[pod.key]
            self._aim(uid)
            return
        try:
            await self.server.delete(uid)
        except ZdsError as error:
            log.warning("pod %s: %s", uid, error)
        if uid in self._keepers:
            self._keepers[uid][0].wake()

    async def leave(self, limit: float) -> None:
        """Take every pod out of the mesh, as if no label asked for it; what does not end in `limit` seconds is cut."""
        self._leaving = self._node.leaving = True
        keepers = list(self.states())
        for uid in list(self._pods):
            self._aim(uid)
        with trio.move_on_after(limit):
            for keeper in keepers:
                while not keeper.at_rest and keeper in self.states():
                    await keeper.changed()
        for keeper in keepers:
            if not keeper.at_rest:
                await keeper.cut()

    def _goal(self, uid: str) -> Goal:
        pod = self._pods[uid]
        goal = goal_of(pod, self._namespaces.get(pod.namespace), self._config.settings)
        if self._leaving:
            return goal._replace(joined=False)
        promised = self._promised.get(uid, goal.joined)
        if promised == goal.joined or goal.ended:
            self._promised.pop(uid, None)
            return goal
        return goal._replace(joined=promised)

    async def _offer_all(self) -> None:
        for goal in map(self._goal, list(self._pods)):
            if not goal.joined:
                continue
            try:
                path = await self._node.namespace(goal)
                if path is not None:
                    self.server.offer(goal.uid, goal.info, path)
            except (ZdsError, KernelError) as error:
                log.warning("%s: %s", goal.pod, error)

    def _aim(self, uid: str) -> None:
        """Have the pod kept as it shall be now, or no longer."""
        assert self._nursery is not None, "the agent runs"  # noqa: S101
        if uid not in self._pods:
            if uid in self._keepers:
                _, scope = self._keepers.pop(uid)
                scope.cancel()
        elif uid in self._keepers:
            self._keepers[uid][0].aim(self._goal(uid))
        else:
            keeper, scope = Keeper(self._node, self._goal(uid)), trio.CancelScope()
            self._keepers[uid] = keeper, scope
            self._nursery.start_soon(self._keep, keeper, scope)

    async def _keep(self, keeper: Keeper, scope: trio.CancelScope) -> None:
        """Keep one pod until it is no more; ztunnel drops it then, and its namespace goes with it."""
        with scope:
            await keeper.run()
        keeper.end()
        goal = keeper.goal
        if goal.uid in self._keepers:  # it is here again already
            return
        self._promised.pop(goal.uid, None)
        self._node.places.forget(goal.uid)
        await self._observer.left(goal.uid)
        try:
            await self.server.delete(goal.uid)
        except ZdsError as error:
            log.warning("%s is gone: %s", goal.pod, error)
        else:
            log.info("%s is gone", goal.pod, extra={"fields": {"uid": goal.uid}})


def _directory(path: Path) -> Store:
    """A directory of objects. What reads YAML is loaded only where there is one: it costs memory on every node."""
    from ztunnel.store.directory import DirectoryStore

    return DirectoryStore(path, on_problem=_say)


def _say(problem: Problem) -> None:
    log.warning("%s", problem)


async def _until_signal(agent: Agent) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.run)
            async for number in signals:
                log.info("%s: ending; what is redirected stays so", signal.Signals(number).name)
                nursery.cancel_scope.cancel()


def _arguments(argv: Sequence[str] | None) -> Config:
    parser = argparse.ArgumentParser(prog="cni.agent", description="The ambient mesh's node agent.")
    parser.add_argument("--node", required=True, help="the node whose pods it keeps")
    parser.add_argument("--store", required=True, type=Path, help="directory of the cluster's objects")
    parser.add_argument(
        "--netns-dir",
        required=True,
        type=Path,
        help="directory with a file per pod uid, its network namespace",
    )
    parser.add_argument(
        "--zds", required=True, type=Path, help="Unix socket on which ztunnel is told of its pods"
    )
    parser.add_argument(
        "--dns-capture",
        action=argparse.BooleanOptionalAction,
        default=os.environ.get("AMBIENT_DNS_CAPTURE", "true").lower() != "false",
        help="redirect pods' DNS to ztunnel, unless their annotation ambient.istio.io/dns-capture says otherwise "
        "(default: AMBIENT_DNS_CAPTURE, true)",
    )
    given = parser.parse_args(argv)
    settings = Settings(dns_capture=given.dns_capture)
    return Config(given.node, given.store, given.netns_dir, given.zds, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent until SIGTERM or SIGINT; the exit code: 0, or 1 after an error that it cannot work around."""
    config = _arguments(argv)
    try:
        adopt_standard_logging(Logger.from_environment())
    except ValueError as unusable:
        return fatal(str(unusable))
    code = 0
    try:
        trio.run(_until_signal, Agent(config))
    except* ZdsError as errors:
        for error in leaves(errors):
            log.error("%s", error)
        code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
