"""Decides what the CNI plugin is answered: a pod starts once it is in the mesh, if that is where it belongs.

The API server is asked, not only what has been heard: a pod may start a moment after its namespace was labelled.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec
import trio

from cni.agent import Agent
from cni.attach import TRY_LATER, Answer, Question, error
from cni.counting import Counters
from cni.keeper import Keeper
from cni.places import PlacesError, Runtime
from cni.probes import HostProbes
from ztunnel.store.kube.api import Api, ApiError
from ztunnel.store.models import Namespace, Pod

log = logging.getLogger(__name__)

API_PATIENCE = 3.0  # seconds for the API server to answer
JOIN_PATIENCE = 20.0  # seconds for a pod to be in the mesh; the plugin waits for 30
MIRRORED = "kubernetes.io/config.mirror"
"""On the API server's copy of a static pod: the uid that the kubelet knows it by."""

REMEDY = "the kubelet tries again"


class Refused(Exception):
    """The pod has to wait; the message says what for."""


class Known(NamedTuple):
    """A pod and its namespace."""

    pod: Pod
    namespace: Namespace


class Stopwatch:
    """How long an answer takes, and the steps to it: seconds."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}
        self._began = time.monotonic()

    @property
    def total(self) -> float:
        """Until now."""
        return time.monotonic() - self._began

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take down how long the block takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.steps[name] = time.monotonic() - began

    def fields(self) -> dict[str, float]:
        """For the log: milliseconds."""
        taken = {f"{name}_ms": seconds for name, seconds in (*self.steps.items(), ("all", self.total))}
        return {name: round(seconds * 1000, 1) for name, seconds in taken.items()}


class Joining:
    """Answers the plugins of a node."""

    def __init__(
        self, agent: Agent, api: Api, places: Runtime, probes: HostProbes, counters: Counters
    ) -> None:
        self._agent = agent
        self._api = api
        self._places = places
        self._probes = probes
        self._counters = counters
        self._askers = trio.CapacityLimiter(32)

    async def handle(self, question: Question) -> Answer:
        """Never raises."""
        command = question.command
        if command == "DEL":
            await self._delete(question)
            return Answer()
        if command != "ADD":
            return Answer()
        watch = Stopwatch()
        namespace, name = question.argument("K8S_POD_NAMESPACE"), question.argument("K8S_POD_NAME")
        if not namespace or not name:
            return Answer()
        result = "failed"
        try:
            result = await self._add(question, namespace, name, watch)
        except Refused as problem:
            message = f"pod {namespace}/{name} waits for the mesh: {problem}"
            log.warning("%s", message)
            return error(question, TRY_LATER, message, REMEDY)
        finally:
            self._counters.added(result, watch.total, watch.steps)
        log.debug("pod %s/%s starts: %s", namespace, name, result, extra={"fields": watch.fields()})
        return Answer()

    async def _add(self, question: Question, namespace: str, name: str, watch: "Stopwatch") -> str:
        """Bring the pod in, if it belongs there: "joined" or "outside". Raises Refused."""
        if not self._agent.synced.is_set():
            raise Refused("the node agent starts")
        with watch.step("labels"):
            known = await self._known(namespace, name, question.argument("K8S_POD_UID"))
        uid = known.pod.metadata.uid
        try:
            path = self._places.file_of(question.namespace_file)
        except PlacesError as problem:
            raise Refused(str(problem)) from problem
        self._places.tell(uid, path, question.sandbox)
        keeper = self._agent.admit(known.pod, known.namespace)
        if not keeper.goal.joined:
            return "outside"

        async def admit() -> None:
            with watch.step("probes"):
                await self._probes.admit(uid, question.addresses)

        # They are needed by the first probe, and nothing here needs them.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(admit)
            missing = await self._joined(keeper)
        watch.steps |= keeper.took
        if missing:
            raise Refused(missing)
        return "joined"

    async def _joined(self, keeper: Keeper) -> str:
        """Wait for the pod to be in the mesh; why it is not, "" if it is, or need not be."""
        with trio.move_on_after(JOIN_PATIENCE):
            while not keeper.joined and not keeper.failure:
                if not keeper.goal.joined:  # its label has changed meanwhile
                    return ""
                await keeper.changed()
            if keeper.joined:
                return ""
            return keeper.failure.removeprefix(f"pod {keeper.goal.info.namespace}/{keeper.goal.info.name}: ")
        return f"it was not in the mesh within {JOIN_PATIENCE:.0f} s"

    async def _known(self, namespace: str, name: str, uid: str) -> Known:
        """As the API server has it; as it was heard of, where that is away. Raises Refused."""
        found: list[Pod | None] = [None]
        around: list[Namespace | None] = [None]
        problems: list[ApiError] = []

        async def ask_pod() -> None:
            path = f"/api/v1/namespaces/{namespace}/pods/{name}"
            try:
                found[0] = msgspec.json.decode(await self._get(path), type=Pod)
            except ApiError as problem:
                problems.append(problem)

        async def ask_namespace() -> None:
            try:
                around[0] = msgspec.json.decode(
                    await self._get(f"/api/v1/namespaces/{namespace}"), type=Namespace
                )
            except ApiError as problem:
                problems.append(problem)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_pod)
                nursery.start_soon(ask_namespace)
        except* msgspec.DecodeError as broken:
            raise Refused(f"the API server's answer cannot be read: {broken.exceptions[0]}") from None
        for problem in problems:
            if problem.not_found:
                raise Refused(f"the API server does not know it: {problem.message}")
        pod = found[0] or self._agent.pod(namespace, name)
        within = around[0] or self._agent.namespace(namespace)
        if pod is None or within is None:
            raise Refused(f"whether it belongs to the mesh is not known: {problems[0].message}")
        if problems:
            log.warning("pod %s/%s starts as it was last heard of: %s", namespace, name, problems[0].message)
        if uid and uid not in (pod.metadata.uid, pod.metadata.annotations.get(MIRRORED)):
            raise Refused(
                f"the API server knows another pod of this name (uid {pod.metadata.uid}, not {uid})"
            )
        return Known(pod, within)

    async def _get(self, path: str) -> bytes:
        return await trio.to_thread.run_sync(
            lambda: self._api.request("GET", path, timeout=API_PATIENCE), limiter=self._askers
        )

    async def _delete(self, question: Question) -> None:
        uid = question.argument("K8S_POD_UID")
        pod = self._agent.pod(question.argument("K8S_POD_NAMESPACE"), question.argument("K8S_POD_NAME"))
        if pod is not None and uid in ("", pod.metadata.annotations.get(MIRRORED)):
            uid = pod.metadata.uid
        if uid and self._places.end(uid, question.namespace_file, question.sandbox):
            self._agent.end_soon(uid)
