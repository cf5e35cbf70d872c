"""The control process's side of its workers: starts them, gives them pods, certificates and routes, replaces the dead.

It holds what a new worker must be told. Each worker has listening sockets of its own for every pod (SO_REUSEPORT):
they are kept open here while a worker is being replaced, so that new connections wait in the backlog instead of
being refused.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

import trio

from ztunnel.inpod import netns, sockets
from ztunnel.mesh.model import Workload
from ztunnel.mesh.route import Route
from ztunnel.proxy import messages
from ztunnel.proxy.channel import Channel, ChannelClosed
from ztunnel.proxy.collecting import Collection
from ztunnel.proxy.distribution import Distribution, PolicyDistribution
from ztunnel.proxy.inspections import Inspections
from ztunnel.proxy.prefork import Forked, ForkedWorker
from ztunnel.proxy.served import PORTS, PodError, ServedPod, has_network
from ztunnel.proxy.trusted import NOBODY, Trust, TrustedWaypoints
from ztunnel.telemetry.log import Logger

ADD_TIMEOUT = 5.0  # seconds for the workers to take a pod
LEAVE_TIMEOUT = 1.0  # seconds for the workers to tell the peers of a pod that it goes
CHECK_INTERVAL = 1.0  # seconds between looks at the networks of pods that left
BACKOFF = (0.05, 2.0)  # seconds before a dead worker is replaced: the first time, at most
LEAN = "no_debug_ranges"  # python -X
MOST_QUEUED = (
    128 * 1024 * 1024
)  # bytes that wait for a worker to read them, after which it is taken for stuck

Process = trio.Process | ForkedWorker


def _interpreter() -> list[str]:
    """The command that runs Python as it runs here: with or without docstrings, assertions and columns of code."""
    optimized = [f"-{'O' * sys.flags.optimize}"] if sys.flags.optimize else []
    return [sys.executable, *optimized, *(["-X", LEAN] if LEAN in sys._xoptions else [])]


class _Slot:
    """The place of one worker; the process in it may change."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.channel: Channel[messages.FromWorker] | None = None
        self.pid = 0
        self.restarts = 0
        self.flushing = False
        self.waiting: dict[int, tuple[trio.Event, list[str]]] = {}
        self.leaving: dict[int, trio.Event] = {}
        self.stats: dict[int, tuple[trio.Event, list[messages.Stats]]] = {}


class Workers:
    """N worker processes and what they serve."""

    def __init__(
        self,
        count: int,
        logger: Logger,
        ask: Callable[[messages.AskRoute, Callable[..., None]], None],
        forked: Sequence[Forked] = (),
        *,
        workload: Callable[[str, str], Workload | None],
        trust: Callable[[str, str], Trust] = lambda namespace, name: NOBODY,
        program: str = "ztunnel.proxy.worker",
    ) -> None:
        """`ask(question, answer)` finds a route and calls `answer(route, remember)`, at once or later.

        `forked` are workers that run already; they become ours. `workload(namespace, name)` is what is known of a
        pod of this node, `trust(namespace, name)` which waypoints it has. `program` is the workers' module.
        """
        self.logger = logger
        self.pods: dict[str, ServedPod] = {}
        self._ask = ask
        self.collection = Collection()
        self._slots = [_Slot(number) for number in range(count)]
        self.inspections = Inspections(count, self._send_to)
        self.policies: Distribution = PolicyDistribution(logger, self.send_all, workload)
        self.trusted = TrustedWaypoints(self.send_all, trust)
        self._program = program
        self._forked = dict(enumerate(forked))
        self._certificates: dict[str, messages.Message] = {}
        self._revocations: messages.Message | None = None
        self._leaving: list[ServedPod] = []
        self._stopping = False
        self._query = 0
        self._number = 0
        self._nursery: trio.Nursery | None = None

    @property
    def alive(self) -> int:
        """Workers that run now."""
        return sum(slot.channel is not None for slot in self._slots)

    def describe(self) -> list[dict[str, int]]:
        """Number, pid and restarts of each worker."""
        return [{"worker": slot.number, "pid": slot.pid, "restarts": slot.restarts} for slot in self._slots]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the workers running until cancelled or drained; `started` once all of them run."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for slot in self._slots:
                    await nursery.start(self._keep, slot)
                nursery.start_soon(self._watch_leaving)
                nursery.start_soon(self.policies.run)
                task_status.started()
        finally:
            for pod in [*self.pods.values(), *self._leaving]:
                pod.close()

    async def _keep(self, slot: _Slot, *, task_status: trio.TaskStatus[None]) -> None:
        """Run one worker after another in this place; `started` once the first one runs, or none is to run any more."""
        waiting = True

        def started() -> None:
            nonlocal waiting
            if waiting:
                waiting = False
                task_status.started()

        await self._one_after_another(slot, started)
        started()

    async def _one_after_another(self, slot: _Slot, started: Callable[[], None]) -> None:
        delay, longest = BACKOFF
        while self._running():
            began = trio.current_time()
            try:
                process, ours = await self._spawn(slot)
            except OSError as error:
                if slot.restarts == 0:
                    raise
                pid, reason = 0, f"it cannot be started: {error.strerror}"
            else:
                pid = process.pid
                await self._serve(slot, process, ours, started)
                reason = _how_it_ended(process.returncode)
            if not self._running():
                return
            if trio.current_time() - began > 10:
                delay = BACKOFF[0]
            slot.restarts += 1
            self.logger.error(
                "worker", "a worker ended; its connections are lost, another takes its place",
                worker=slot.number, pid=pid, reason=reason, again_in_seconds=delay,
            )  # fmt: skip
            await trio.sleep(delay)
            delay = min(delay * 2, longest)

    async def _spawn(self, slot: _Slot) -> tuple[Process, socket.socket]:
        forked = self._forked.pop(slot.number, None)
        if forked is not None:
            return forked
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await trio.lowlevel.open_process(
                    [*_interpreter(), "-m", self._program, str(theirs.fileno()), str(slot.number)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stderr=self.logger.fd,
                    env=os.environ | self.logger.environment(),
                )
            except BaseException:
                ours.close()
                raise
        return process, ours

    async def _serve(
        self, slot: _Slot, process: Process, ours: socket.socket, started: Callable[[], None]
    ) -> None:
        """Talk to one worker until it ends."""
        slot.pid = process.pid
        try:
            slot.channel = Channel(ours, messages.FromWorker)
            self._introduce(slot)
            started()
            await self._listen(slot)
        except trio.Cancelled:
            process.kill()
            raise
        finally:
            self._left(slot)
            await self._reap(process)

    def _running(self) -> bool:
        return not self._stopping

    async def _reap(self, process: Process) -> None:
        """The worker closed its channel, so it ends now; or we are being cancelled, and it must."""
        try:
            with trio.move_on_after(1):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    def _introduce(self, slot: _Slot) -> None:
        """Tell a new worker what it must know."""
        self.inspections.introduce(slot.number)
        if self._revocations is not None:
            self._send(slot, self._revocations)
        for certificate in self._certificates.values():
            self._send(slot, certificate)
        for message in self.policies.introduce(frozenset(pod.number for pod in self.pods.values())):
            self._send(slot, message)
        for pod in self.pods.values():
            try:
                self._send_pod(slot, pod, [])
            except OSError as error:
                self.logger.error(
                    "worker", "a new worker cannot be given a pod", worker=slot.number,
                    pod=f"{pod.namespace}/{pod.name}", error=f"{error.strerror}; raise the limit of open files",
                )  # fmt: skip

    async def _listen(self, slot: _Slot) -> None:
        channel = slot.channel
        while channel is not None:
            await trio.lowlevel.wait_readable(channel.sock)
            try:
                received = channel.receive()
            except ChannelClosed:
                return
            for message, _ in received:
                try:
                    self._handle(slot, channel, message)
                except Exception as error:  # one worker's question must not end the daemon
                    self.logger.error(
                        "worker", "internal error; a worker's message is not answered",
                        message_type=type(message).__name__, error=f"{type(error).__name__}: {error}",
                    )  # fmt: skip

    def _handle(
        self, slot: _Slot, channel: Channel[messages.FromWorker], message: messages.FromWorker
    ) -> None:
        if isinstance(message, messages.AskRoute):
            query = message.query

            def answer(route: Route, remember: bool = True) -> None:
                # Another worker in this place has questions of its own, with the same numbers.
                if slot.channel is channel:
                    self._send(slot, messages.RouteAnswer(query, route, remember))

            self._ask(message, answer)
        elif isinstance(message, messages.AskPeer):
            self._send(slot, self.collection.name_peer(message))
        elif isinstance(message, messages.Traffic):
            self.collection.received(slot.number, message)
        elif isinstance(message, messages.PodLeft):
            left = slot.leaving.pop(message.pod, None)
            if left is not None:
                left.set()
        elif isinstance(message, messages.PodAdded):
            waiting = slot.waiting.pop(message.pod, None)
            if waiting is not None:
                if message.error:
                    waiting[1].append(message.error)
                waiting[0].set()
        elif isinstance(message, messages.PodIdle):
            for pod in self._leaving:
                if pod.number == message.pod:
                    pod.idle.add(slot.number)
        elif isinstance(message, messages.Inspected | messages.Tapped):
            self.inspections.take(slot.number, message)
        else:
            stats = slot.stats.pop(message.query, None)
            if stats is not None:
                stats[1].append(message)
                stats[0].set()

    def _left(self, slot: _Slot) -> None:
        if slot.channel is not None:
            slot.channel.close()
        slot.channel = None
        slot.flushing = False
        slot.pid = 0
        self.collection.left(slot.number)
        for event, _ in slot.waiting.values():
            event.set()  # the next one is told of the pod before anything else; its listeners are open meanwhile
        slot.waiting.clear()
        for left in slot.leaving.values():
            left.set()
        slot.leaving.clear()
        for stats_event, _ in slot.stats.values():
            stats_event.set()
        slot.stats.clear()
        self.inspections.left(slot.number)
        for pod in self._leaving:
            pod.idle.add(slot.number)

    def _send(self, slot: _Slot, message: messages.Message, fds: Iterable[int] = ()) -> None:
        channel = slot.channel
        if channel is None:
            return
        try:
            channel.send(message, fds)
        except ChannelClosed:
            return  # its reader finds out
        if channel.queued > MOST_QUEUED:
            self.logger.error(
                "worker",
                "a worker does not read its messages; it is replaced",
                worker=slot.number,
                pid=slot.pid,
            )
            os.kill(slot.pid, signal.SIGKILL)
        elif channel.waiting and not slot.flushing and self._nursery is not None:
            slot.flushing = True
            self._nursery.start_soon(self._flush, slot, channel)

    async def _flush(self, slot: _Slot, channel: Channel[messages.FromWorker]) -> None:
        try:
            with contextlib.suppress(ChannelClosed, trio.ClosedResourceError):
                while slot.channel is channel and not channel.flush():
                    await trio.lowlevel.wait_writable(channel.sock)
                    await trio.sleep(0.001)  # it may be writable, and refuse more descriptors for now
        finally:
            if slot.channel is channel:
                slot.flushing = False

    def _send_to(self, worker: int, message: messages.Message) -> bool:
        slot = self._slots[worker]
        self._send(slot, message)
        return slot.channel is not None

    def send_all(self, message: messages.Message) -> list[int]:
        """Tell all workers that run; returns their numbers."""
        for slot in self._slots:
            self._send(slot, message)
        return [slot.number for slot in self._slots if slot.channel is not None]

    # Pods.

    async def add_pod(
        self,
        uid: str,
        name: str,
        namespace: str,
        identity: str,
        netns_fd: int,
        ports: tuple[int, ...] = PORTS,
    ) -> None:
        """Serve a pod; returns once every worker accepts its connections. `netns_fd` becomes ours.

        A pod that is served already, with the same namespace, is left as it is. Raises PodError.
        """
        inode = netns.inode(netns_fd) if netns_fd != sockets.OWN else 0
        old = self.pods.get(uid)
        if old is not None:
            if old.inode == inode and old.identity == identity:
                os.close(netns_fd)
                return
            await self.delete_pod(uid)
        self._number += 1
        pod = ServedPod(self._number, uid, name, namespace, identity, netns_fd, inode, ports)
        pod.listen(len(self._slots))
        self.pods[uid] = pod
        self.policies.add(pod.number, namespace, name)
        errors: list[str] = []
        try:
            events = [self._send_pod(slot, pod, errors) for slot in self._slots if slot.channel is not None]
        except OSError as error:
            await self.delete_pod(uid)
            raise PodError(
                f"pod {namespace}/{name}: {error.strerror}; raise the limit of open files"
            ) from None
        with trio.move_on_after(ADD_TIMEOUT) as waited:
            for event in events:
                await event.wait()
        if errors:
            await self.delete_pod(uid)
            raise PodError(f"pod {namespace}/{name}: {'; '.join(errors)}")
        self.trusted.add(pod.number, namespace, name)
        if waited.cancelled_caught:
            self.logger.warn("worker", "a worker is slow to take a pod", pod=f"{namespace}/{name}")

    def _send_pod(self, slot: _Slot, pod: ServedPod, errors: list[str]) -> trio.Event:
        """Give a pod to a worker; the event comes with its answer, which adds to `errors` if it refuses."""
        event = trio.Event()
        slot.waiting[pod.number] = (event, errors)
        group = pod.listeners[slot.number]
        message = messages.AddPod(
            pod.number, pod.uid, pod.name, pod.namespace, pod.identity, pod.ports, pod.siblings()
        )
        namespace = [] if pod.netns_fd == sockets.OWN else [pod.netns_fd]
        self._send(slot, message, [*namespace, *(listener.fileno() for listener in group)])
        waypoints = self.trusted.introduce(pod.number)
        if waypoints is not None:
            self._send(slot, waypoints)
        return event

    async def delete_pod(self, uid: str) -> None:
        """Accept no more for a pod; its open connections go on while it has a network. Unknown pods are no error.

        Returns when its peers have been told to open no more connections to it.
        """
        pod = self.pods.pop(uid, None)
        if pod is None:
            return
        pod.close_listeners()
        self.trusted.remove(pod.number)
        pod.idle = {slot.number for slot in self._slots if slot.channel is None}
        self._leaving.append(pod)
        events = []
        for slot in self._slots:
            if slot.channel is not None:
                slot.leaving[pod.number] = event = trio.Event()
                events.append(event)
        self.send_all(messages.DeletePod(pod.number))
        with trio.move_on_after(LEAVE_TIMEOUT):
            for event in events:
                await event.wait()

    async def _watch_leaving(self) -> None:
        """Let go of pods that left: once they are idle, or their network is gone (the pod was deleted)."""
        while True:
            await trio.sleep(CHECK_INTERVAL)
            for pod in list(self._leaving):
                if len(pod.idle) == len(self._slots):
                    self._leaving.remove(pod)
                    self.policies.remove(pod.number)
                    pod.close()
                elif not has_network(pod.netns_fd):
                    self.send_all(messages.DropPod(pod.number))

    # Certificates, routes, the rest.

    def use_certificate(self, identity: str, encoded: bytes) -> None:
        """Give the workers a certificate; `encoded` holds its key."""
        message = messages.UseCertificate(identity, encoded)
        self._certificates[identity] = message
        self.send_all(message)

    def use_revocations(self, lists: bytes) -> None:
        """Have the workers honour these revocation lists (PEM, checked)."""
        self._revocations = messages.UseRevocations(lists)
        for message in (self._revocations, *self._certificates.values()):
            self.send_all(message)

    def forget_certificate(self, identity: str, reason: str) -> None:
        """The certificate ended, or no pod needs it any more."""
        self._certificates.pop(identity, None)
        self.send_all(messages.ForgetCertificate(identity, reason))

    def forget_routes(self, tags: Iterable[str]) -> None:
        """The mesh changed where these tags point."""
        wanted = tuple(tags)
        if wanted:
            self.send_all(messages.ForgetRoutes(wanted))
            self.trusted.changed(wanted)

    def set_level(self, level: str) -> None:
        """Change the workers' log level."""
        self.send_all(messages.SetLevel(level))

    async def stats(self) -> list[messages.Stats]:
        """What each worker holds now; a worker that does not answer within a second is left out."""
        self._query += 1
        query = self._query
        results: list[messages.Stats] = []
        events = []
        for slot in self._slots:
            if slot.channel is not None:
                event = trio.Event()
                slot.stats[query] = (event, results)
                events.append(event)
                self._send(slot, messages.AskStats(query))
        with trio.move_on_after(1):
            for event in events:
                await event.wait()
        for slot in self._slots:
            slot.stats.pop(query, None)
        return results

    async def collect(self) -> None:
        """Have the workers report what they counted; who does not within a second is left out."""
        await self.collection.collect(self.send_all)

    async def drain(self, grace: float) -> None:
        """End the workers in order: no new connections, the open ones for `grace` seconds at most."""
        self._stopping = True
        self.inspections.drain()
        self.send_all(messages.Drain(grace))
        for pod in self.pods.values():
            pod.close_listeners()
        with trio.move_on_after(grace + 2):
            while self.alive:
                await trio.sleep(0.02)
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()


def _how_it_ended(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
