"""Which of several replicas writes: a Lease (coordination.k8s.io/v1) that one of them holds at a time.

The holder renews the lease every `retry` seconds. Its writers are cancelled `deadline` seconds after the beginning of
the last renewal that succeeded, which is before anybody else may take the lease: that is `duration` seconds after the
last renewal that was seen. Others measure that with their own clock from when they saw it, so clocks may differ.
An orderly end stops the writers first and then gives the lease back.
"""

import datetime
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import msgspec
import trio

from ztunnel.store.kube.api import Api
from ztunnel.store.kube.errors import ApiError
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane.leader")

LEASE: Final = "istio-leader"
FIRST_PAUSE: Final = 1.0  # seconds until a writer that failed is tried again, then twice as long each time
LONGEST_PAUSE: Final = 60.0
_VERSION: Final = "coordination.k8s.io/v1"


class Timing(NamedTuple):
    """Seconds: how long a lease lasts, how long its holder believes in it, how often it is tried for."""

    duration: int = 15
    deadline: float = 10.0
    retry: float = 2.0

    @property
    def timeout(self) -> float:
        """Of one request: what a writer has sent is answered, or given up, before another may hold the lease."""
        return (self.duration - self.deadline) * 0.8


class Leader:
    """Tries to hold a lease, and runs what only its holder may run."""

    def __init__(
        self, api: Api, namespace: str, *, name: str = LEASE, identity: str = "", timing: Timing | None = None
    ) -> None:
        """`identity` is how people know this process (a pod's name); it is made unique for each start."""
        self._timing = timing or Timing()
        self._claim = _Claim(api, namespace, name, f"{identity}_{uuid.uuid4().hex[:8]}", self._timing)
        self._until = -float("inf")  # on trio's clock: until when the lease is surely ours
        self._sure_until = -float("inf")  # the same in monotonic seconds, for threads
        self._won = trio.Event()
        self._scopes: set[trio.CancelScope] = set()
        self._idle = trio.Event()
        self._idle.set()
        self._problem = ""

    @property
    def identity(self) -> str:
        """What stands in the lease if we hold it."""
        return self._claim.identity

    @property
    def leading(self) -> bool:
        """Whether the lease is ours now."""
        return trio.current_time() < self._until

    def limit(self, timeout: float) -> float:
        """Of `timeout` seconds those that a writer's request may take now; for `Api.while_allowed`, from any thread.

        What a thread began is so over before another may hold the lease, even if nobody waits for it any more. Raises
        ApiError where the lease is not ours.
        """
        left = self._sure_until - time.monotonic()
        if left <= 0:
            raise ApiError(0, "NotLeading", "this replica leads no more, so it does not write")
        return min(timeout, left + self._timing.timeout)

    def describe(self) -> dict[str, Any]:
        """For the admin pages."""
        return {
            "lease": f"{self._claim.namespace}/{self._claim.name}",
            "identity": self.identity,
            "leading": self.leading,
            "holder": self._claim.holder,
            "problem": self._problem,
        }

    async def run(self) -> None:
        """Try for the lease, and renew it, until cancelled."""
        try:
            while True:
                began, sure = trio.current_time(), time.monotonic() + self._timing.deadline
                try:
                    ours = await trio.to_thread.run_sync(self._claim.try_once)
                except ApiError as error:
                    self._fail(error)
                else:
                    self._problem = ""
                    if ours:
                        self._hold(began + self._timing.deadline, sure)
                    else:
                        self._lose("another holds it")
                if not self.leading:
                    self._lose("it could not be renewed in time")
                await trio.sleep(self._timing.retry * random.uniform(1.0, 1.2))  # noqa: S311 (not all at once)
        finally:
            await self._give_back()

    async def run_while_leading(self, run: Callable[[], Awaitable[None]], what: str) -> None:
        """Run `run` whenever the lease is ours, cancelled when it is not any more; never returns.

        Where it fails it is run again after a while; `what` it does is said in the log. It may run again in this
        process at any time, so it begins by looking at what is there.
        """
        while True:
            await self._won.wait()
            with trio.CancelScope(deadline=self._until) as scope:
                if not self._scopes:
                    self._idle = trio.Event()
                self._scopes.add(scope)
                try:
                    await self._repeat(run, what)
                finally:
                    self._scopes.discard(scope)
                    if not self._scopes:
                        self._idle.set()
            if not self.leading:
                self._lose("it could not be renewed in time")

    async def _repeat(self, run: Callable[[], Awaitable[None]], what: str) -> None:
        pause, told = FIRST_PAUSE, ""
        while True:
            began = trio.current_time()
            try:
                await run()
                logger.debug("%s: done", what)
                await trio.sleep_forever()
            except Exception as error:  # one writer's fault is not the others': they and the serving go on
                if trio.current_time() - began > LONGEST_PAUSE:
                    pause = FIRST_PAUSE
                problem = _in_words(error)
                if problem is None:
                    logger.exception("internal error: %s failed", what)
                elif problem != told:
                    logger.error("cannot %s: %s", what, problem)
                told = problem or ""
            await trio.sleep(pause * random.uniform(1.0, 1.2))  # noqa: S311 (not all at once)
            pause = min(pause * 2, LONGEST_PAUSE)

    def _hold(self, until: float, sure: float) -> None:
        self._until, self._sure_until = until, sure
        for scope in self._scopes:
            scope.deadline = until
        if not self._won.is_set():
            logger.info(
                "leading: this replica writes", extra=fields(lease=self._claim.name, identity=self.identity)
            )
            self._won.set()

    def _lose(self, why: str) -> None:
        self._until = self._sure_until = -float("inf")
        for scope in self._scopes:
            scope.cancel()
        if self._won.is_set():
            self._won = trio.Event()
            logger.warning(
                "leading no more: %s", why, extra=fields(lease=self._claim.name, holder=self._claim.holder)
            )

    def _fail(self, error: ApiError) -> None:
        if self._problem != str(error):
            self._problem = str(error)
            logger.error("cannot try for the lease, so this replica does not write: %s", error)

    async def _give_back(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._timing.deadline):
            ours = self._won.is_set()
            self._until = self._sure_until = -float("inf")
            for scope in self._scopes:
                scope.cancel()
            await self._idle.wait()
            if ours:
                try:
                    await trio.to_thread.run_sync(self._claim.give_back)
                    logger.info("lease given back", extra=fields(lease=self._claim.name))
                except ApiError as error:
                    logger.warning("cannot give the lease back; it ends by itself: %s", error)


class _Claim:
    """The lease as one candidate sees it; blocking, used by one thread at a time."""

    def __init__(self, api: Api, namespace: str, name: str, identity: str, timing: Timing) -> None:
        self._api = api
        self.namespace = namespace
        self.name = name
        self.identity = identity
        self.holder = ""
        self._timing = timing
        self._seen: tuple[Any, ...] = ()
        self._seen_at = -float("inf")
        self._lasts = float(timing.duration)
        self._path = f"/apis/{_VERSION}/namespaces/{namespace}/leases"

    def try_once(self) -> bool:
        """Renew it or take it; whether it is ours. Raises ApiError."""
        for _ in range(3):
            try:
                return self._try()
            except ApiError as error:
                if not error.conflict:
                    raise
        return False

    def give_back(self) -> None:
        """Let another have it at once. Raises ApiError."""
        lease = self._get()
        spec = lease.get("spec") or {} if lease is not None else {}
        if lease is not None and spec.get("holderIdentity") == self.identity:
            lease["spec"] = spec | {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
            self._put(lease)

    def _try(self) -> bool:
        lease = self._get()
        if lease is None:
            # If somebody held it just now he does not know yet that it was deleted, and will make it again.
            if self.holder not in ("", self.identity) and not self._over():
                return False
            self._create()
            return True
        spec = lease.get("spec") or {}
        self._look(spec)
        if self.holder == self.identity:
            new = spec | {"renewTime": _now(), "leaseDurationSeconds": self._timing.duration}
        elif self.holder == "" or self._over():
            new = {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": self._timing.duration,
                "acquireTime": _now(),
                "renewTime": _now(),
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1,
            }
        else:
            return False
        lease["spec"] = new
        self._put(lease)
        self._look(new)
        return True

    def _look(self, spec: dict[str, Any]) -> None:
        seen = (spec.get("holderIdentity") or "", spec.get("renewTime"), spec.get("leaseTransitions"))
        if seen != self._seen:
            self._seen, self._seen_at = seen, time.monotonic()
            self.holder = str(seen[0])
            self._lasts = float(spec.get("leaseDurationSeconds") or self._timing.duration)

    def _over(self) -> bool:
        return time.monotonic() - self._seen_at > self._lasts

    def _get(self) -> dict[str, Any] | None:
        try:
            answer = self._api.request("GET", f"{self._path}/{self.name}", timeout=self._timing.timeout)
        except ApiError as error:
            if error.not_found:
                return None
            raise
        try:
            return msgspec.json.decode(answer, type=dict[str, Any])
        except msgspec.DecodeError:
            raise ApiError(
                0, "Garbled", f"Lease {self.namespace}/{self.name}: the answer is no JSON object"
            ) from None

    def _put(self, lease: dict[str, Any]) -> None:
        # With the resourceVersion that was read: refused (409) if anybody else wrote meanwhile.
        self._api.request("PUT", f"{self._path}/{self.name}", body=lease, timeout=self._timing.timeout)

    def _create(self) -> None:
        spec = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._timing.duration,
            "acquireTime": _now(),
            "renewTime": _now(),
            "leaseTransitions": 0,
        }
        lease = {
            "apiVersion": _VERSION,
            "kind": "Lease",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": spec,
        }
        self._api.request("POST", self._path, body=lease, timeout=self._timing.timeout)
        self._look(spec)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _in_words(error: BaseException) -> str | None:
    """What to tell of a failure; None if it is a fault of ours."""
    if isinstance(error, BaseExceptionGroup):
        told = [_in_words(one) for one in error.exceptions]
        return None if None in told else "; ".join(dict.fromkeys(one for one in told if one))
    return str(error) if isinstance(error, ApiError | OSError) else None
