"""A worker process: moves the bytes of the node's pods, and knows nothing but what the control process tells it.

Rule: no library of the control process is imported here (a contract checks it), so a worker is small, and no push
of configuration, no signing and no query stalls a byte. When the control process ends without a word, the worker
gives way to the next one's (orphan.py), lets open connections go on for the grace period, and ends.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from ztunnel.config import WorkerSettings
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import IdentityError
from ztunnel.identity.tls import mesh_context
from ztunnel.inpod import sockets
from ztunnel.memory import keep_giving_back
from ztunnel.mesh.route import Route
from ztunnel.proxy import messages, tls
from ztunnel.proxy.accepting import Listeners
from ztunnel.proxy.channel import Channel, ChannelClosed
from ztunnel.proxy.context import WAIT_TIMEOUT, Context, Pod
from ztunnel.proxy.enforcement import Enforcement
from ztunnel.proxy.errors import Draining
from ztunnel.proxy.inbound import Inbounds
from ztunnel.proxy.inspect import Inspector
from ztunnel.proxy.limits import raise_open_files
from ztunnel.proxy.orphan import PATIENCE, Orphan
from ztunnel.proxy.outbound import Outbounds
from ztunnel.proxy.peers import Questions
from ztunnel.proxy.pool import Pool
from ztunnel.proxy.reactor import OUT, Deadlines
from ztunnel.proxy.reporting import Reporter
from ztunnel.proxy.scheduling import Scheduling
from ztunnel.proxy.validity import Validity
from ztunnel.telemetry.log import Logger

TICK = 0.25  # seconds between sweeps of the deadlines
PENDING_ROUTES = 65536  # questions to the control process under way; more are refused at once

Answer = Callable[[Route | None], None]


class Worker:
    """One worker: its channel, and the parts that serve connections."""

    def __init__(self, channel: Channel[messages.ToWorker], logger: Logger, settings: WorkerSettings) -> None:
        self.channel = channel
        self.context = context = Context(logger, settings.buffer_limit)
        context.congestion_control = settings.congestion_control.encode()
        context.reactor.spin = settings.spin
        context.trust_domain = settings.trust_domain
        self._scheduling = Scheduling(settings.gather)
        self.grace = settings.termination_grace
        self.pool = Pool(context, self.connection_ended, settings.streams_per_tunnel, settings.tunnel_idle)
        self.outbounds = Outbounds(context, self.pool, self.ask_route, self.connection_ended)
        self.enforcement = self.make_enforcement()
        self.inspector = Inspector(context, self._send, lambda: channel.queued, self.enforcement.recent)
        self.reporter = Reporter(context, self._send)
        self.questions = Questions(self._send)
        self.inbounds = self.make_inbounds()
        self.validity = Validity(context, self.inbounds)
        self._questions: dict[int, tuple[Pod, bytes, list[Answer]]] = {}
        self._asked: dict[tuple[int, bytes], int] = {}
        self._next_question = 1
        self._unanswered: Deadlines[int] = Deadlines(WAIT_TIMEOUT, self._no_answer)
        context.pod_connections = settings.pod_connections
        self.listeners = Listeners(context, settings.pod_connections, settings.pod_handshakes)
        self._orphaned: Orphan | None = None
        self._stop_at: float | None = None
        self._stopped = trio.Event()
        context.reactor.register(channel.sock.fileno(), self.on_channel)

    # What another kind of proxy than a node's has in their place (waypoint/worker.py).

    def make_enforcement(self) -> Enforcement:
        """What judges connections; called once."""
        return Enforcement(self.context, self._accept_inbound)

    def make_inbounds(self) -> Inbounds:
        """What serves those who come; called once."""
        return Inbounds(self.context, self.enforcement, self.connection_ended, self.questions)

    # The channel.

    def on_channel(self, event: int) -> None:
        """Messages from the control process."""
        try:
            if event & OUT:
                self.channel.flush()
            received = self.channel.receive()
        except ChannelClosed as closed:
            self._orphan(str(closed))
            return
        for message, fds in received:
            # One by one: what one message breaks must not cost the next ones, which nobody sends again.
            self.context.reactor.guard(_HANDLERS[type(message)], self, message, fds)
        if self.channel.more:
            self.context.reactor.again(self._on_more)
        if self.channel.ended:
            self._orphan("it closed the channel")  # the end came with messages: no other edge says so

    def _on_more(self) -> None:
        if self._orphaned is None:
            self.on_channel(0)

    def _send(self, message: messages.Message) -> None:
        if self._orphaned is not None:
            return
        try:
            self.channel.send(message)
        except ChannelClosed as closed:
            self._orphan(str(closed))

    def _orphan(self, reason: str) -> None:
        if self._orphaned is not None:
            return
        context = self.context
        self._orphaned = Orphan(context.pods, time.monotonic(), self._leave)
        context.reactor.unregister(self.channel.sock.fileno())
        self.channel.close()
        for question in list(self._questions):
            self._no_answer(question)
        if context.draining:
            return
        context.logger.warn(
            "worker", "the control process is gone; waiting for the next one", reason=reason,
            wait_seconds=PATIENCE,
        )  # fmt: skip
        for pod in context.pods.values():
            self.listeners.hold(pod, sockets.OUTBOUND_PORT)

    def add_pod(self, message: messages.AddPod, fds: list[int]) -> None:
        """Take over a pod and its listeners."""
        netns, descriptors = sockets.OWN, fds
        if len(fds) > len(message.ports):
            netns, *descriptors = fds
        listeners = {
            port: socket.socket(fileno=fd) for port, fd in zip(message.ports, descriptors, strict=True)
        }
        if self.context.draining:
            for listener in listeners.values():
                listener.close()
            if netns != sockets.OWN:
                os.close(netns)
            self._send(messages.PodAdded(message.pod, "the proxy is shutting down"))
            return
        identity = self.context.identity(message.identity)
        pod = Pod(
            message.pod, message.uid, message.name, message.namespace, identity, netns, listeners,
            frozenset(message.siblings),
        )  # fmt: skip
        pod.counts = self.reporter.counts()
        self.context.pods[message.pod] = pod
        accepted = {
            sockets.OUTBOUND_PORT: self.outbounds.accepted,
            sockets.INBOUND_HBONE_PORT: self.inbounds.accepted_hbone,
            sockets.INBOUND_PLAINTEXT_PORT: self.inbounds.accepted_plaintext,
        }
        for port in listeners:
            self.listeners.add(pod, port, accepted[port])
        if sockets.OUTBOUND_PORT in listeners:
            self.listeners.accept(pod, sockets.OUTBOUND_PORT)
        if self.enforcement.knows(pod.number):
            self._accept_inbound(pod)
        self._send(messages.PodAdded(message.pod))

    def _accept_inbound(self, pod: Pod) -> None:
        """Accept what comes to a pod; before its policies are known it waits in the backlog."""
        for port in pod.listeners:
            if port != sockets.OUTBOUND_PORT:
                self.listeners.accept(pod, port)

    def pod_waypoints(self, message: messages.PodWaypoints, fds: list[int]) -> None:
        """Who may name the original source of a connection to the pod."""
        pod = self.context.pods.get(message.pod)
        if pod is not None:
            pod.waypoints = frozenset(message.identities)

    def delete_pod(self, message: messages.DeletePod, fds: list[int]) -> None:
        """Accept no more; what is open goes on."""
        pod = self.context.pods.get(message.pod)
        if pod is not None:
            self._stop_accepting(pod)
            self._release(pod)
            self.context.reactor.flush()  # what the tunnels' other ends are told is on its way
        self._send(messages.PodLeft(message.pod))
        if pod is None:
            self._send(messages.PodIdle(message.pod))
        else:
            self._close_if_over(pod)

    def _release(self, pod: Pod) -> None:
        """Let the pod's tunnels end with what they carry now."""
        self.inbounds.drain(pod)
        self.pool.release(pod)

    def drop_pod(self, message: messages.DropPod, fds: list[int]) -> None:
        """The pod's network is gone, and so are its connections."""
        pod = self.context.pods.get(message.pod)
        if pod is None:
            return
        self._stop_accepting(pod)
        self._cut(pod, Draining(f"pod {pod.namespace}/{pod.name} is gone"))
        self._close_if_over(pod)

    def _cut(self, pod: Pod, error: Draining) -> None:
        for item in [*pod.connections, *pod.tunnels]:
            self.context.reactor.guard(item.fail, error)

    def _leave(self, pod: Pod, migrates: bool) -> None:
        """Another proxy listens in the pod."""
        self._stop_accepting(pod, serve_backlog=not migrates)
        self._release(pod)
        self._close_if_over(pod)

    def _stop_accepting(self, pod: Pod, *, serve_backlog: bool = True) -> None:
        """Close the listeners; whom the kernel has let in already is served, as closing would reset him.

        Not what came in before the pod's policies were known.
        """
        pod.accepting = False
        known = self.enforcement.knows(pod.number)
        self.listeners.close(pod, lambda port: serve_backlog and (known or port == sockets.OUTBOUND_PORT))

    def connection_ended(self, pod: Pod) -> None:
        """One connection or tunnel less."""
        if not pod.accepting:
            self._close_if_over(pod)

    def _close_if_over(self, pod: Pod) -> None:
        if pod.accepting or pod.connections or pod.tunnels or pod.closed:
            return
        self.context.pods.pop(pod.number, None)
        self.reporter.pod_left(pod)
        self.enforcement.forget(pod)
        pod.close()
        self._send(messages.PodIdle(pod.number))

    # Certificates.

    def use_certificate(self, message: messages.UseCertificate, fds: list[int]) -> None:
        """Make a TLS context of a new certificate."""
        identity = self.context.identity(message.identity)
        try:
            certificate = WorkloadCertificate.decode(message.certificate)
            context = tls.prepare(mesh_context(certificate, self.context.revocations))
        except IdentityError as error:
            self.context.logger.error(
                "identity", "unusable certificate", identity=message.identity, error=str(error)
            )
            return
        for resume in identity.use(context, context, certificate.not_after, certificate.roots_pem):
            self.context.reactor.guard(resume)

    def use_revocations(self, message: messages.UseRevocations, fds: list[int]) -> None:
        """Honour other revocation lists."""
        self.validity.use(message.lists)

    def forget_certificate(self, message: messages.ForgetCertificate, fds: list[int]) -> None:
        """The certificate ended."""
        self.context.identity(message.identity).forget(message.reason)

    # Routes.

    def ask_route(self, pod: Pod, key: bytes, address: bytes, port: int, answer: Answer) -> None:
        """Ask the control process once for all who wait for the same route."""
        asked = self._asked.get((pod.number, key))
        if asked is not None:
            self._questions[asked][2].append(answer)
            return
        if self._orphaned is not None or len(self._questions) >= PENDING_ROUTES:
            answer(None)
            return
        question = self._next_question
        self._next_question += 1
        self._questions[question] = (pod, key, [answer])
        self._asked[pod.number, key] = question
        self._unanswered.add(question, self.context.reactor.now)
        self._send(messages.AskRoute(question, pod.uid, address, port))

    def route_answer(self, message: messages.RouteAnswer, fds: list[int]) -> None:
        """A route came: remember it, and go on with the connections that wait for it."""
        question = self._questions.pop(message.query, None)
        if question is None:
            return
        pod, key, answers = question
        self._asked.pop((pod.number, key), None)
        self._unanswered.discard(message.query)
        if message.remember:
            pod.routes.remember(key, message.route)
        for answer in answers:
            self.context.reactor.guard(answer, message.route)

    def _no_answer(self, question: int) -> None:
        pod, key, answers = self._questions.pop(question, (None, b"", []))
        if pod is not None:
            self._asked.pop((pod.number, key), None)
        self._unanswered.discard(question)
        for answer in answers:
            self.context.reactor.guard(answer, None)

    def forget_routes(self, message: messages.ForgetRoutes, fds: list[int]) -> None:
        """What was remembered of these may be wrong now."""
        for pod in self.context.pods.values():
            pod.peers.forget(message.tags)
            if not message.tags:
                pod.routes.clear()
            for tag in message.tags:
                pod.routes.forget(tag)

    # Life.

    def on_drain(self, message: messages.Drain, fds: list[int]) -> None:
        """An orderly end."""
        self.drain(message.grace)

    def drain(self, grace: float) -> None:
        """Accept no more, tell the peers, and stop once nothing is open or after `grace` seconds."""
        context = self.context
        if context.draining:
            return
        context.draining = True
        self._stop_at = time.monotonic() + grace
        for pod in list(context.pods.values()):
            self._stop_accepting(pod)
            self._release(pod)
            self._close_if_over(pod)
        context.reactor.wake()

    def set_level(self, message: messages.SetLevel, fds: list[int]) -> None:
        """Change the log level."""
        self.context.logger.set_level(message.level)

    def stats(self, message: messages.AskStats, fds: list[int]) -> None:
        """Count."""
        context = self.context
        pods = context.pods.values()
        totals = context.totals
        self._send(
            messages.Stats(
                query=message.query,
                pid=os.getpid(),
                pods=len(pods),
                connections=sum(len(pod.connections) for pod in pods),
                tunnels_out=sum(len(pod.tunnels) for pod in pods) - len(self.inbounds.tunnels),
                tunnels_in=len(self.inbounds.tunnels),
                routes=sum(len(pod.routes) for pod in pods),
                buffered=context.buffers.held + sum(tunnel.unsent for pod in pods for tunnel in pod.tunnels),
                opened=totals.opened,
                closed=totals.closed,
                failed=totals.failed,
                bytes_sent=totals.bytes_sent,
                bytes_received=totals.bytes_received,
            )
        )

    def inspect(self, message: messages.Inspect, fds: list[int]) -> None:
        """Show something of this process."""
        self.inspector.inspect(message)

    def tap(self, message: messages.Tap, fds: list[int]) -> None:
        """Report connections, or no more."""
        self.inspector.tap(message.on)

    async def tick(self) -> None:
        """Sweep the deadlines; stop when drained."""
        context = self.context
        while True:
            await trio.sleep(TICK)
            now = time.monotonic()
            context.reactor.now = now
            self._scheduling.adapt(context.reactor.turns, context.reactor.events)
            context.connecting.sweep(now)
            context.closing.sweep(now)
            context.grown.sweep(now)
            self._unanswered.sweep(now)
            self.pool.idle.sweep(now)
            self.validity.sweep(now)
            context.reactor.flush()
            if self._orphaned is not None and not context.draining and self._orphaned.over(now):
                context.logger.info("worker", "draining", grace_seconds=self.grace)
                self.drain(self.grace)
            self.listeners.resume()
            if self._stop_at is not None and self._drained(now):
                self._stopped.set()

    def _drained(self, now: float) -> bool:
        pods = list(self.context.pods.values())
        if self._stop_at is not None and now >= self._stop_at:
            for pod in pods:
                self._cut(pod, Draining("the proxy shut down and its grace period ended"))
            return True
        return not pods

    async def run(self) -> None:
        """Work until told to drain, by the control process or a signal."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.context.reactor.run)
            nursery.start_soon(self.tick)
            nursery.start_soon(self.inspector.run)
            nursery.start_soon(self._signals)
            nursery.start_soon(self.reporter.run)
            nursery.start_soon(keep_giving_back)
            await self._stopped.wait()
            self.reporter.report()
            nursery.cancel_scope.cancel()

    async def _signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for _ in received:
                self.drain(self.grace)


def _take_policies(worker: Worker, message: Any, fds: list[int]) -> None:
    worker.enforcement.take(message)


_HANDLERS: dict[type, Callable[..., None]] = {
    messages.AddPod: Worker.add_pod,
    messages.PodWaypoints: Worker.pod_waypoints,
    messages.DeletePod: Worker.delete_pod,
    messages.DropPod: Worker.drop_pod,
    messages.UseCertificate: Worker.use_certificate,
    messages.ForgetCertificate: Worker.forget_certificate,
    messages.UseRevocations: Worker.use_revocations,
    messages.RouteAnswer: Worker.route_answer,
    messages.ForgetRoutes: Worker.forget_routes,
    messages.Drain: Worker.on_drain,
    messages.SetLevel: Worker.set_level,
    messages.AskStats: Worker.stats,
    messages.Policies: _take_policies,
    messages.ForgetPolicies: _take_policies,
    messages.PodPolicies: _take_policies,
    messages.PoliciesSettled: lambda worker, message, fds: worker.enforcement.settle(),
    messages.Inspect: Worker.inspect,
    messages.Tap: Worker.tap,
    messages.AskTraffic: lambda worker, message, fds: worker.reporter.asked(message, fds),
    messages.PeerAnswer: lambda worker, message, fds: worker.questions.answered(message, fds),
}


def run(sock: socket.socket, logger: Logger, kind: type[Worker] = Worker) -> None:
    """Be a worker of this kind until told to end: `sock` is its end of the channel."""
    with contextlib.suppress(OSError):  # the command line of one that was forked is the control process's
        Path("/proc/self/comm").write_text(f"zt-worker-{logger.context['worker']}")
    raise_open_files()
    logger.never_wait()
    channel: Channel[messages.ToWorker] = Channel(sock, messages.ToWorker)
    worker = kind(channel, logger, WorkerSettings.from_environment())
    # What is alive now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    try:
        trio.run(worker.run)
    finally:
        logger.flush()


def main() -> None:
    """`python -m ztunnel.proxy.worker FD NUMBER`: the channel's descriptor and the worker's number."""
    run(socket.socket(fileno=int(sys.argv[1])), Logger.from_environment(worker=sys.argv[2]))


if __name__ == "__main__":
    main()
