"""Keeps the ValidatingWebhookConfiguration right: our roots as its caBundle, and when it may refuse. Run by the leader.

`failurePolicy` is Ignore in the manifests: until the webhook works nobody may be kept from writing. Once the API server
was seen to ask it and to obey (a dry run of a policy that is wrong was refused by us) it becomes Fail: from then on no
policy is written that nobody has looked at.
"""

import base64
import logging
from collections.abc import Callable
from typing import Any, Final

import trio

from ztunnel.controlplane.kube.mirror import Mirror
from ztunnel.store.kube.api import Api
from ztunnel.store.kube.errors import ApiError

logger = logging.getLogger("controlplane.webhook")

TIMEOUT: Final = 4.0  # seconds for one request, but for the dry run
PROBE_TIMEOUT: Final = 15.0  # longer than the API server waits for the webhook
FIRST_PAUSE: Final = 1.0  # seconds before the next dry run, then twice as long each time
LONGEST_PAUSE: Final = 60.0

_PATH: Final = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
_PROBE: Final = "istio-validator-probe"
_POLICIES: Final = "/apis/security.istio.io/v1/namespaces/{}/authorizationpolicies"


class WebhookConfig:
    """Follows the configuration."""

    def __init__(
        self, api: Api, name: str, namespace: str, revision: str, bundle: Callable[[], bytes]
    ) -> None:
        """`bundle` gives the roots as PEM; `roots_changed` is to be called when it gives others."""
        self._api = api
        self._name = name
        self._namespace = namespace
        self._revision = revision
        self._bundle = bundle
        self._wake = trio.Event()
        self._mirror = Mirror(
            api,
            _PATH,
            {"fieldSelector": f"metadata.name={name}"},
            f"ValidatingWebhookConfiguration {name}",
            lambda names: self.roots_changed(),
        )
        self.problem = ""

    def roots_changed(self) -> None:
        """Look again."""
        self._wake.set()

    async def run(self) -> None:
        """Keep it right until cancelled. Raises ApiError."""
        pause = FIRST_PAUSE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mirror.run)
            while True:
                with trio.move_on_after(pause if self.problem else float("inf")):
                    await self._wake.wait()
                    pause = FIRST_PAUSE
                self._wake = trio.Event()
                obj = self._mirror.objects.get(("", self._name))
                if obj is None:
                    self.problem = ""
                    continue
                if not self._right(obj, fail=False):
                    await self._write(obj, fail=False)
                    continue  # it comes back by the watch
                if self._right(obj, fail=True):
                    self.problem = ""
                    continue
                self._tell(await trio.to_thread.run_sync(self._probe))
                if self.problem:
                    pause = min(pause * 2, LONGEST_PAUSE)
                else:
                    await self._write(obj, fail=True)

    def _right(self, obj: dict[str, Any], *, fail: bool) -> bool:
        return obj.get("webhooks") == self._wanted(obj, fail=fail)

    def _wanted(self, obj: dict[str, Any], *, fail: bool) -> list[dict[str, Any]]:
        bundle = base64.b64encode(self._bundle()).decode()
        return [
            {
                **one,
                "clientConfig": {**(one.get("clientConfig") or {}), "caBundle": bundle},
                **({"failurePolicy": "Fail"} if fail else {}),
            }
            for one in obj.get("webhooks") or []
        ]

    async def _write(self, obj: dict[str, Any], *, fail: bool) -> None:
        new = {**obj, "webhooks": self._wanted(obj, fail=fail)}
        new |= {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
        new["metadata"] = {name: value for name, value in obj["metadata"].items() if name != "managedFields"}
        try:
            await trio.to_thread.run_sync(self._put, new)
        except ApiError as error:
            if not (error.conflict or error.not_found):  # then the next version is on its way here
                raise
        else:
            what = "failurePolicy Fail: it works" if fail else "its caBundle"
            logger.info("ValidatingWebhookConfiguration %s: wrote %s", self._name, what)

    def _put(self, obj: dict[str, Any]) -> None:
        # With the resourceVersion that was read: refused if somebody else wrote meanwhile.
        self._api.request("PUT", f"{_PATH}/{self._name}", body=obj, timeout=TIMEOUT)

    def _probe(self) -> str:
        """Have the API server ask for a policy that is wrong, as a dry run: why that was not refused by us, or ""."""
        policy = {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {
                "name": _PROBE,
                "namespace": self._namespace,
                "labels": {"istio.io/rev": self._revision},
            },
            "spec": {"rules": [{"to": [{"operation": {"ports": [_PROBE]}}]}]},
        }
        path = _POLICIES.format(self._namespace)
        try:
            self._api.request("POST", path, query={"dryRun": "All"}, body=policy, timeout=PROBE_TIMEOUT)
        except ApiError as error:
            if "denied the request" in str(error) and _PROBE in str(error):
                return ""
            return str(error)
        return "the API server does not ask it, or cannot reach it: check that port 15017 is open to it"

    def _tell(self, problem: str) -> None:
        if problem and problem != self.problem:
            logger.warning(
                "ValidatingWebhookConfiguration %s stays with failurePolicy Ignore: %s", self._name, problem
            )
        self.problem = problem
