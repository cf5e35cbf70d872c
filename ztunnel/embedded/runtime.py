"""The kubelet in small: every Pod object of the cluster becomes a network namespace with programs in it.

A pod that belongs to the mesh starts its programs only after the node agent has said that its traffic is
redirected: no program ever sends a byte past the proxy because it was faster.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import trio

from ztunnel.embedded.addresses import DNS_VIP, node_address4, node_number
from ztunnel.embedded.network import Network, NetworkError
from ztunnel.embedded.programs import Program, now
from ztunnel.embedded.sandbox import Sandbox, SandboxError, etc_files
from ztunnel.embedded.view import View
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.membership import in_mesh, redirection_error, wants_mesh
from ztunnel.store.models import Key, Namespace, Pod, key_of
from ztunnel.store.problems import NotFound, Problem, StoreError

log = logging.getLogger(__name__)

Report = Callable[[str, Problem | None], None]

GRACE = 5.0  # seconds between SIGTERM and SIGKILL at most
RETRY = 1.0
ANNOTATION = "metadata.annotations["  # how the node agent begins to tell what is wrong with one
WAITING = "waiting for redirection"
SETTLE = 0.005  # seconds
AT_ONCE = 2  # pods that are given a network: each takes 10 ms, most of it Python
GOODBYE = (
    2.0  # seconds for the node's proxy to tell the peers of a pod that has ended, before its network goes
)
LONG_WAIT = 5.0  # seconds of waiting for the mesh after which it is a problem


class PodRunner:
    """One pod from its first to its last moment. `run` is cancelled to end it."""

    def __init__(self, runtime: "Runtime", pod: Pod) -> None:
        self.runtime = runtime
        self.pod = pod
        self.gone = trio.Event()
        self.cancel = trio.CancelScope()
        self.sandbox: Sandbox | None = None
        logs, prefix = runtime.state / "logs" / "pods", f"{pod.namespace}_{pod.name}"
        self.programs = [
            Program(c, logs / f"{prefix}_{c.name}.log", self._changed) for c in pod.spec.containers
        ]
        self._phase = "Pending"
        self._waiting = ""
        self._refusal = ""  # why the node agent could not redirect it, or stop to
        self._started = now()
        self._dirty = trio.Event()
        self._seen: tuple[Pod, Namespace | None] = (pod, None)
        self._news = trio.Event()
        self.admitted = False  # its programs may send: it is redirected, or does not belong to the mesh

    @property
    def uid(self) -> str:
        return self.pod.metadata.uid

    @property
    def _etc(self) -> Path:
        return self.runtime.state / "pods" / self.uid

    @property
    def message(self) -> str:
        """What is wrong or awaited, "" if nothing."""
        return (
            self._not_redirected or self._waiting or next((p.message for p in self.programs if p.message), "")
        )

    def _fault(self) -> str:
        """What the people who started the mesh are told: not that it takes a moment, and each thing once."""
        if self._not_redirected:
            return self._not_redirected
        if self._waiting:
            return "" if self._waiting == WAITING else self._waiting
        return next((p.fault for p in self.programs if p.fault), "")

    @property
    def _not_redirected(self) -> str:
        if not self._refusal or self._refusal.startswith(ANNOTATION):
            return self._refusal  # it is redirected, if not as its annotations ask
        return f"redirection failed{', its programs wait' if self._waiting else ''}: {self._refusal}"

    def refused(self, reason: str) -> None:
        """The node agent says why it could not do what the labels ask for; "" once it could."""
        if reason != self._refusal:
            self._refusal = reason
            self._changed()

    def see(self, pod: Pod, namespace: Namespace | None) -> None:
        """This is what its object and its namespace's are now."""
        self._seen = (pod, namespace)
        self._news.set()
        self.refused(redirection_error(pod))

    @property
    def restarts(self) -> int:
        """How often programs of the pod were started again."""
        return sum(program.status.restart_count for program in self.programs)

    async def run(self) -> None:
        """Bring the pod up, keep it, and when cancelled take it down."""
        try:
            with self.cancel:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_status)
                    await self._live()
        finally:
            with trio.CancelScope(shield=True):
                await self._terminate()
            self.gone.set()

    async def _live(self) -> None:
        await self._predecessors()
        await self._attach()
        await self._wait_for_mesh()
        self.admitted = True
        sandbox = self.sandbox
        assert sandbox is not None  # noqa: S101  made by _attach
        restart = self.pod.spec.restart_policy
        codes = []

        async def keep(program: Program) -> None:
            codes.append(await program.run(self.pod, sandbox, restart))

        self._phase = "Running"
        self._changed()
        async with trio.open_nursery() as nursery:
            for program in self.programs:
                nursery.start_soon(keep, program)
        self._phase = "Failed" if any(codes) else "Succeeded"
        self._changed()
        await trio.sleep_forever()

    async def _predecessors(self) -> None:
        """Wait until pods that had this one's name or address have gone."""
        for other in list(self.runtime.runners):
            same = other.uid == self.uid or set(other.pod.addresses) & set(self.pod.addresses)
            if other is not self and other.cancel.cancel_called and same:
                await other.gone.wait()

    async def _attach(self) -> None:
        """Network and namespaces; tried again until it works, the reason being the pod's message meanwhile."""
        while True:
            try:
                self.sandbox = await trio.to_thread.run_sync(self._make_sandbox, limiter=self.runtime.makers)
            except (NetworkError, SandboxError, OSError) as error:
                self._waiting = str(error)
                self._changed()
                await trio.sleep(RETRY)
            else:
                self._waiting = ""
                return

    def _make_sandbox(self) -> Sandbox:
        pod, network = self.pod, self.runtime.network
        if pod.spec.host_network:
            path = network.path(pod.spec.node_name)
        else:
            network.attach(self.uid, pod.spec.node_name, pod.addresses)
            path = network.path(self.uid)
        hostname = pod.spec.hostname or pod.name
        etc = etc_files(self._etc, hostname, pod.namespace, pod.addresses, DNS_VIP)
        return Sandbox(path, hostname, etc)

    async def _wait_for_mesh(self) -> None:
        since = trio.current_time()
        while True:
            self._news = trio.Event()
            pod, namespace = self._seen  # without a namespace nobody knows whether the pod belongs
            if namespace is not None and (not wants_mesh(pod, namespace) or in_mesh(pod)):
                self._waiting = ""
                self._changed()
                return
            late = trio.current_time() - since > LONG_WAIT
            self._waiting = WAITING
            if late:
                log = self.runtime.state / "logs" / f"agent-{pod.spec.node_name}.log"
                self._waiting += f": its programs start once the node agent has redirected it; see {log}"
            self._changed()
            with trio.move_on_after(math.inf if late else LONG_WAIT):
                await self._news.wait()

    async def _terminate(self) -> None:
        """SIGTERM, some seconds, SIGKILL to everything in the pod, then its network, its files and its object.

        Its traffic is carried until the last program has ended. Then the mesh hears of it, and the network goes when
        the proxy has told the other ends.
        """
        grace = min(GRACE, self.pod.spec.termination_grace_period_seconds)
        with trio.move_on_after(grace):
            async with trio.open_nursery() as nursery:
                for program in self.programs:
                    nursery.start_soon(program.terminate)
        for program in self.programs:
            await program.clean_up()
        if self.sandbox is not None:
            with trio.move_on_after(GRACE):
                while await trio.to_thread.run_sync(self.sandbox.kill):
                    await trio.sleep(0.005)
            self.sandbox.close()
        if self.cancel.cancel_called:  # else the whole mesh ends
            await self._say_goodbye()
        if not self.pod.spec.host_network:
            with contextlib.suppress(NetworkError):  # the node may be gone before
                await trio.to_thread.run_sync(self.runtime.network.detach, self.uid, self.pod.spec.node_name)
        shutil.rmtree(self._etc, ignore_errors=True)
        self.runtime.report(self._problem_key, None)

    async def _say_goodbye(self) -> None:
        """Write that the programs have ended, and wait until the node agent has taken the pod out of the mesh."""
        pod, view = self.pod, self.runtime.view
        phase = "Failed" if any(program.failed for program in self.programs) else "Succeeded"
        with contextlib.suppress(NotFound, StoreError):
            self.runtime.store.patch(Pod, pod.namespace, pod.name, {"status": {"phase": phase}}, uid=self.uid)
        with trio.move_on_after(GOODBYE):
            while True:
                version = view.version
                now = view.pods.get(pod.key)
                if now is None or now.metadata.uid != self.uid or not in_mesh(now):
                    return
                await view.changed(version)

    # Status.

    @property
    def _problem_key(self) -> str:
        return f"pod/{self.uid}"

    def _changed(self) -> None:
        self._dirty.set()

    async def _write_status(self) -> None:
        written: dict[str, Any] | None = None
        told = ""
        while True:
            await self._dirty.wait()
            await trio.sleep(SETTLE)  # what changes in one go is written once
            self._dirty = trio.Event()
            status = self._status()
            if status != written:
                with contextlib.suppress(NotFound, StoreError):  # deleted meanwhile
                    self.runtime.store.patch(
                        Pod, self.pod.namespace, self.pod.name, {"status": status}, uid=self.uid
                    )
                written = status
            fault = self._fault()
            if fault != told:
                told = fault
                self.runtime.report(
                    self._problem_key, Problem(self.pod.ref, "", fault, "", "warning") if fault else None
                )

    def _status(self) -> dict[str, Any]:
        """The fields of the pod's status that are ours; the addresses are the resolver's."""
        ready = bool(self.programs) and all(program.status.ready for program in self.programs)
        return {
            "phase": self._phase,
            "message": self.message or None,
            "hostIP": str(node_address4(node_number(self.pod.spec.node_name)).ip),
            "startTime": self._started,
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True" if ready else "False"},
            ],
            "containerStatuses": [msgspec.to_builtins(program.status) for program in self.programs],
        }


class Runtime:
    """Makes what runs agree with the Pods in the view.

    `report(key, problem)` hears of what is wrong with a pod, and with None that it is right again.
    """

    def __init__(
        self, state: Path, store: DirectoryStore, view: View, network: Network, report: Report
    ) -> None:
        self.state = state
        self.store = store
        self.view = view
        self.network = network
        self.report = report
        self.runners: set[PodRunner] = set()
        self.makers = trio.CapacityLimiter(AT_ONCE)
        self._current: dict[Key, _Kept] = {}

    def runner(self, namespace: str, name: str) -> PodRunner | None:
        """The runner of a pod, None if there is no such pod."""
        kept = self._current.get(key_of(Pod, namespace, name))
        return kept.runner if kept is not None else None

    async def run(self) -> None:
        """Follow the view for ever; when cancelled, every pod is ended in order."""
        async with trio.open_nursery() as nursery:
            while True:
                version = self.view.version
                self._reconcile(nursery)
                await self.view.changed(version)

    def _reconcile(self, nursery: trio.Nursery) -> None:
        """Look at what is another object than the last time: of hundreds of pods most are not."""
        for key in self._current.keys() - self.view.pods.keys():
            self._current.pop(key).runner.cancel.cancel()
        for key, pod in self.view.pods.items():
            namespace = self.view.namespaces.get(pod.namespace)
            kept = self._current.get(key)
            if kept is None or kept.pod is not pod or kept.namespace is not namespace:
                self._take(pod, namespace, kept, nursery)

    def _take(
        self, pod: Pod, namespace: Namespace | None, kept: "_Kept | None", nursery: trio.Nursery
    ) -> None:
        """Start a pod, end it, start it anew, or tell it what its object is now."""
        if kept is not None and not (runnable(pod) and _same_shape(kept.pod, pod)):
            kept.runner.cancel.cancel()
            del self._current[pod.key]
            kept = None
        if not runnable(pod):
            if pod.metadata.deletion_timestamp and all(each.uid != pod.metadata.uid for each in self.runners):
                self.remove(pod)  # it never ran
            return
        runner = kept.runner if kept is not None else PodRunner(self, pod)
        self._current[pod.key] = _Kept(pod, namespace, runner)
        runner.see(pod, namespace)
        if kept is None:
            self.runners.add(runner)
            nursery.start_soon(self._run_one, runner)

    def remove(self, pod: Pod) -> None:
        """Remove the object of a pod that has ended, if it shall go and is still this pod's."""
        with contextlib.suppress(StoreError):
            now = self.store.get(Pod, pod.namespace, pod.name)
            if now is not None and now.metadata.uid == pod.metadata.uid and now.metadata.deletion_timestamp:
                self.store.delete_key(pod.key)

    async def _run_one(self, runner: PodRunner) -> None:
        try:
            await runner.run()
        except Exception as error:  # whatever is wrong with one pod, the others go on
            log.exception("%s", runner.pod.ref)
            message = f"an error of the mesh itself ended it: {error!r}"
            self.report(
                f"pod/{runner.uid}", Problem(runner.pod.ref, "", message, "change it to start it anew")
            )
        finally:
            self.runners.discard(runner)
            if runner.cancel.cancel_called:
                self.remove(runner.pod)


def runnable(pod: Pod) -> bool:
    """Whether the pod has been placed, given addresses, and has programs to run, none without a command."""
    return bool(
        pod.metadata.uid
        and pod.spec.node_name
        and pod.addresses
        and pod.spec.containers
        and all(c.command for c in pod.spec.containers)
        and not pod.metadata.deletion_timestamp
    )


def _same_shape(one: Pod, other: Pod) -> bool:
    """Whether both say of the same pod what programs it has, and where."""
    return (one.metadata.uid, one.addresses, one.spec) == (other.metadata.uid, other.addresses, other.spec)


class _Kept(NamedTuple):
    """A pod that runs: its object and its namespace's as they were last seen."""

    pod: Pod
    namespace: Namespace | None
    runner: PodRunner
