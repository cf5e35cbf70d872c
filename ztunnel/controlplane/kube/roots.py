"""ConfigMaps that every namespace has: the roots that workloads are to trust, and what is revoked. Run by the leader.

| ConfigMap | key | what |
|---|---|---|
| `istio-ca-root-cert` | `root-cert.pem` | the roots |
| `istio-ca-crl` | `ca-crl.pem` | the revocation lists in force; empty: nothing is revoked |

Made within moments in a new namespace, written again when somebody changes or deletes one, and when the content is to
be another.
"""

import logging
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple

import trio

from ztunnel.controlplane.kube.mirror import Mirror, Name
from ztunnel.store.kube.api import Api
from ztunnel.store.kube.errors import ApiError

logger = logging.getLogger("controlplane.ca")

NAME: Final = "istio-ca-root-cert"
KEY: Final = "root-cert.pem"
REVOCATIONS: Final = "istio-ca-crl"
REVOCATIONS_KEY: Final = "ca-crl.pem"
LABELS: Final = {"istio.io/config": "true"}
AT_ONCE: Final = 8  # requests under way
TIMEOUT: Final = 4.0  # seconds for one of them
FIRST_PAUSE: Final = 0.1  # seconds before a namespace is tried again, then twice as long each time
LONGEST_PAUSE: Final = 30.0
AT_ONCE_AGAIN: Final = 3  # times that a ConfigMap is put right without a pause
CALM: Final = 60.0  # seconds without a change, after which it counts from the beginning


class Kind(NamedTuple):
    """One of the ConfigMaps: its key, and what gives the key's value."""

    key: str
    value: Callable[[], bytes]


Target = tuple[str, str]
"""Namespace and name of a ConfigMap."""


class RootPublisher:
    """Keeps the ConfigMaps as they have to be."""

    def __init__(self, api: Api, bundle: Callable[[], bytes], revocations: Callable[[], bytes]) -> None:
        """`bundle` gives the roots, `revocations` the lists, as PEM; tell `changed` when they give others."""
        self._api = api
        self._kinds = {NAME: Kind(KEY, bundle), REVOCATIONS: Kind(REVOCATIONS_KEY, revocations)}
        self._waiting: dict[Target, None] = {}
        self._wake = trio.Event()
        self._busy: dict[Target, bool] = {}  # being written: whether it changed meanwhile
        self._failures: dict[Target, int] = {}
        self._repairs: dict[
            Target, tuple[int, float]
        ] = {}  # how often in a row it was written, and when last
        self._told = ""
        self.failing: dict[Target, str] = {}
        self._namespaces = Mirror(api, "/api/v1/namespaces", {}, "namespaces", self._namespaces_changed)
        self._maps = {
            name: Mirror(
                api,
                "/api/v1/configmaps",
                {"fieldSelector": f"metadata.name={name}"},
                f"ConfigMaps {name}",
                self._put,
            )
            for name in self._kinds
        }

    def changed(self) -> None:
        """Look at all of them again."""
        self._namespaces_changed(self._namespaces.objects)

    async def run(self) -> None:
        """Follow until cancelled."""
        limiter = trio.CapacityLimiter(AT_ONCE)
        self._busy.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._namespaces.run)
            for mirror in self._maps.values():
                nursery.start_soon(mirror.run)
            # Without all the lists everything would look as if it were missing.
            while not all(one.synced for one in (self._namespaces, *self._maps.values())):
                await trio.sleep(0.05)
            self.changed()
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                waiting, self._waiting = self._waiting, {}
                for target in waiting:
                    if target in self._busy:
                        self._busy[target] = True
                    elif self._missing(target) is not None:
                        self._busy[target] = False
                        nursery.start_soon(self._write, target, limiter)

    def _namespaces_changed(self, names: Iterable[Name]) -> None:
        self._put((namespace, name) for _, namespace in names for name in self._kinds)

    def _put(self, targets: Iterable[Target]) -> None:
        self._waiting.update(dict.fromkeys(targets))
        if self._waiting:
            self._wake.set()

    def _missing(self, target: Target) -> dict[str, Any] | None:
        """The ConfigMap to be written; None where it is right, or the namespace is going."""
        namespace, name = target
        found = self._namespaces.objects.get(("", namespace))
        if (
            found is None
            or found["metadata"].get("deletionTimestamp")
            or (found.get("status") or {}).get("phase") == "Terminating"
        ):
            for kept in (self._failures, self._repairs, self.failing):
                kept.pop(target, None)
            return None
        kind = self._kinds[name]
        data = {kind.key: kind.value().decode()}
        there = self._maps[name].objects.get(target)
        if there is not None:
            labels = there["metadata"].get("labels") or {}
            if (there.get("data") or {}).get(kind.key) == data[kind.key] and labels.items() >= LABELS.items():
                return None
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": namespace, "labels": LABELS},
            "data": data,
        }

    async def _write(self, target: Target, limiter: trio.CapacityLimiter) -> None:
        pause = 0.0
        try:
            async with limiter:
                wanted = self._missing(target)
                if wanted is not None:
                    there = target in self._maps[target[1]].objects
                    await trio.to_thread.run_sync(partial(self._send, target, wanted, there=there))
        except ApiError as error:
            pause = self._failed(target, error)
        else:
            self._failures.pop(target, None)
            self.failing.pop(target, None)
            if wanted is not None:
                pause = self._repaired(target)
        await trio.sleep(pause)
        if self._busy.pop(target, False) or pause:
            self._put([target])

    def _send(self, target: Target, wanted: dict[str, Any], *, there: bool) -> None:
        namespace, name = target
        path = f"/api/v1/namespaces/{namespace}/configmaps"
        if there:
            self._api.request(
                "PATCH",
                f"{path}/{name}",
                body={"metadata": {"labels": LABELS}, "data": wanted["data"]},
                content_type="application/merge-patch+json",
                timeout=TIMEOUT,
            )
        else:
            self._api.request("POST", path, body=wanted, timeout=TIMEOUT)

    def _repaired(self, target: Target) -> float:
        """Seconds for which it is let be: somebody else, another mesh perhaps, may write it again and again."""
        now = trio.current_time()
        count, at = self._repairs.get(target, (0, -CALM))
        count = count + 1 if now - at < CALM else 1
        self._repairs[target] = count, now
        if count <= AT_ONCE_AGAIN:
            return 0.0
        if count == AT_ONCE_AGAIN + 1:
            logger.warning(
                "ConfigMap %s/%s: somebody else changes it again and again; it is written less often", *target
            )
        return min(FIRST_PAUSE * 2.0 ** min(count - AT_ONCE_AGAIN, 20), LONGEST_PAUSE)

    def _failed(self, target: Target, error: ApiError) -> float:
        """Seconds after which to try again."""
        failures = self._failures[target] = self._failures.get(target, 0) + 1
        # These are what a change looks like that we have not heard of yet.
        if not (error.conflict or error.not_found or "being terminated" in str(error)):
            self.failing[target] = str(error)
            if error.reason != self._told:
                self._told = error.reason
                logger.error(
                    "cannot write ConfigMap %s of namespace %s, and maybe others: %s",
                    target[1],
                    target[0],
                    error,
                )
        pause: float = min(FIRST_PAUSE * 2.0 ** min(failures - 1, 20), LONGEST_PAUSE)
        return pause * random.uniform(1.0, 1.5)  # noqa: S311 (not all at once)
