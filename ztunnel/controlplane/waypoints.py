"""Deploys waypoints: keeps, for every Gateway of class istio-waypoint, its objects and its status as they are to be.

Rule: level-triggered. Whatever changes among Gateways, their classes or what belongs to them, the Gateway is looked at
again as a whole; objects are applied (server-side) where they are not what they should be, and a Gateway that cannot
be deployed says so in its status. Its objects go with it, by their ownerReferences. One process of a revision does
this, the leader.
"""

import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import trio

from ztunnel.controlplane import waypoint_objects as made
from ztunnel.controlplane.waypoint_objects import Manifest
from ztunnel.controlplane.waypoint_registry import GATEWAY_NAME, MANAGED, MANAGED_BY_MESH
from ztunnel.store.decode import decode
from ztunnel.store.gateways import MESH_CONTROLLER, WAYPOINT_CLASS, Gateway
from ztunnel.store.kube.api import Api, ApiError, Stream
from ztunnel.store.kube.errors import NoSuchKind
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane.waypoints")

API_VERSION: Final = Gateway.API_VERSION
MANAGER: Final = "istio.io-mesh-controller"
REVISION: Final = "istio.io/rev"
RESYNC: Final = 60.0  # seconds after which everything is looked at again: parameters are not watched
ABSENT: Final = 30.0  # seconds between looks for the Gateway API, where the cluster has none
RETRY: Final = (
    2.0  # seconds after which what failed is tried again, then twice as long each time, up to RESYNC
)
TOGETHER: Final = 0.1  # seconds: changes that come within them are looked at once
_WATCH: Final = 240  # seconds after which the server is to end a watch

_CHILDREN: Final = (("apps/v1", "Deployment"), ("v1", "Service"), ("v1", "ServiceAccount"))

_NOTHING: Final = (b"", "")  # applied, and there

Owner = tuple[str, str]


class Deployer:
    """See above; `run` is one leader's time."""

    def __init__(self, api: Api, deployment: made.Deployment) -> None:
        self._api = api
        self._deployment = deployment
        self._wake = trio.Event()
        self._told: dict[Owner, str] = {}
        self._applied: dict[tuple[str, str, str], tuple[bytes, str]] = {}

    async def run(self) -> None:
        """Deploy until cancelled. Raises ApiError for what concerns all Gateways."""
        await self._served()
        await trio.to_thread.run_sync(self._make_class)
        self._applied.clear()
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            try:
                token.run_sync_soon(self._look, idempotent=True)
            except trio.RunFinishedError:
                return

        watched = [(API_VERSION, "Gateway", ""), (API_VERSION, "GatewayClass", "")]
        watched += [(version, kind, f"{MANAGED}={MANAGED_BY_MESH}") for version, kind in _CHILDREN]
        watches = [_Watch(self._api, *one, wake) for one in watched]
        try:
            for one in watches:
                one.start()
            pause = RETRY
            while True:
                self._wake = trio.Event()
                good = await trio.to_thread.run_sync(self._reconcile)
                with trio.move_on_after(RESYNC if good else pause):
                    await self._wake.wait()
                pause = RETRY if good else min(pause * 2, RESYNC)
                await trio.sleep(TOGETHER)
        finally:
            for one in watches:
                one.stop()

    def _look(self) -> None:
        self._wake.set()

    async def _served(self) -> None:
        """Wait until the cluster has the Gateway API."""
        told = False
        while not await trio.to_thread.run_sync(self._api.serves, API_VERSION, "Gateway"):
            if not told:
                told = True
                logger.warning(
                    "this cluster has no Gateway API, so there are no waypoints; install its definitions, or "
                    "`kubectl apply -k manifests/gateway-api`"
                )
            await trio.sleep(ABSENT)
            self._api.forget(API_VERSION)

    def _make_class(self) -> None:
        """The class of waypoints, which says that they are ours."""
        existing = self._api.get(API_VERSION, "GatewayClass", "", WAYPOINT_CLASS)
        if existing is not None and _controller(existing) != MESH_CONTROLLER:
            logger.warning(
                "GatewayClass %s: spec.controllerName is %r: its Gateways are left to that one",
                WAYPOINT_CLASS, _controller(existing),
            )  # fmt: skip
            return
        if existing is None:
            spec = {
                "controllerName": MESH_CONTROLLER,
                "description": "The default waypoint of the ambient mesh",
            }
            self._apply(
                {
                    "apiVersion": API_VERSION,
                    "kind": "GatewayClass",
                    "metadata": {"name": WAYPOINT_CLASS},
                    "spec": spec,
                }
            )
            logger.info("GatewayClass %s made", WAYPOINT_CLASS)
            existing = self._api.get(API_VERSION, "GatewayClass", "", WAYPOINT_CLASS) or {}
        conditions = (existing.get("status") or {}).get("conditions") or []
        if not any(one.get("type") == "Accepted" and one.get("status") == "True" for one in conditions):
            accepted = {
                "type": "Accepted",
                "status": "True",
                "reason": "Accepted",
                "message": "Handled by the mesh's controller",
                "observedGeneration": (existing.get("metadata") or {}).get("generation", 1),
                "lastTransitionTime": _now(),
            }
            self._api.patch(
                API_VERSION, "GatewayClass", "", WAYPOINT_CLASS, {"status": {"conditions": [accepted]}}, "status"
            )  # fmt: skip

    # One look (in a thread).

    def _reconcile(self) -> bool:
        """Look at every Gateway; False if something has to be tried again."""
        existing = self._api.get(API_VERSION, "GatewayClass", "", WAYPOINT_CLASS)
        if existing is not None and _controller(existing) != MESH_CONTROLLER:
            return True
        good = True
        seen = set()
        for data in self._api.list(API_VERSION, "Gateway"):
            if (data.get("spec") or {}).get("gatewayClassName") != WAYPOINT_CLASS:
                continue
            gateway = decode({"apiVersion": API_VERSION, "kind": "Gateway", **data}).obj
            if not isinstance(gateway, Gateway) or gateway.metadata.deletion_timestamp:
                continue
            owner = (gateway.namespace, gateway.name)
            seen.add(owner)
            try:
                if self._ours(gateway):
                    self._deploy(gateway, data)
            except ApiError as error:
                if error.not_found or (error.forbidden and "being terminated" in str(error)):
                    continue  # the namespace, or the Gateway, goes
                good = False
                self._say(owner, f"{gateway.ref}: cannot be deployed: {error}; trying again")
            else:
                self._told.pop(owner, None)
        for key in [key for key in self._applied if (key[1], key[2]) not in seen]:
            del self._applied[key]
        return good

    def _ours(self, gateway: Gateway) -> bool:
        """Whether the Gateway is for this revision: its own label, else its namespace's."""
        revision = gateway.metadata.labels.get(REVISION)
        if revision is None:
            namespace = self._api.get("v1", "Namespace", "", gateway.namespace) or {}
            revision = ((namespace.get("metadata") or {}).get("labels") or {}).get(REVISION)
        return (revision or self._deployment.default_revision) == self._deployment.revision

    def _deploy(self, gateway: Gateway, data: Manifest) -> None:
        wrong = made.faults(gateway)
        seen = made.Seen()
        if not wrong:
            overlays, problem = self._parameters(gateway)
            if problem:
                wrong = [made.Fault("InvalidParameters", problem)]
            else:
                try:
                    seen = self._make(gateway, overlays)
                except ApiError as error:
                    if error.not_found:
                        raise
                    self._write_status(gateway, data, [], made.Seen(problem=str(error)))
                    raise
        self._write_status(gateway, data, wrong, seen)

    def _make(self, gateway: Gateway, overlays: dict[str, Any]) -> made.Seen:
        """Apply what is not as it should be; what is there then."""
        wanted = made.objects(gateway, self._deployment, overlays)
        # Before anything is made: of what cannot be whole nothing is begun.
        live = {obj["kind"]: self._present(gateway, obj) for obj in wanted}
        for obj in wanted:
            live[obj["kind"]] = self._make_one(gateway, obj, live[obj["kind"]])
        for kind, version in made.OPTIONAL.items():
            if kind not in live:
                self._drop(gateway, version, kind)
        deployment, service = live["Deployment"] or {}, live["Service"] or {}
        spec = service.get("spec") or {}
        addresses = tuple(one for one in spec.get("clusterIPs") or () if one != "None")
        return made.Seen(
            int((deployment.get("status") or {}).get("readyReplicas") or 0),
            int((deployment.get("spec") or {}).get("replicas") or 0),
            addresses,
        )

    def _present(self, gateway: Gateway, obj: Manifest) -> Manifest | None:
        """What there is of an object. Raises ApiError if it is somebody else's."""
        kind = obj["kind"]
        live = self._api.get(obj["apiVersion"], kind, gateway.namespace, gateway.name)
        if live is not None and not _belongs(live, gateway):
            raise ApiError(
                409, "Conflict",
                f"{kind} {gateway.namespace}/{gateway.name}: is there already and belongs to somebody else: give the "
                "Gateway another name",
            )  # fmt: skip
        return live

    def _make_one(self, gateway: Gateway, obj: Manifest, live: Manifest | None) -> Manifest:
        kind = obj["kind"]
        key = (kind, gateway.namespace, gateway.name)
        text = msgspec.json.encode(obj, order="sorted")
        version = ((live or {}).get("metadata") or {}).get("resourceVersion", "")
        if live is not None and self._applied.get(key) == (text, version):
            return live
        applied = self._apply(obj)
        self._applied[key] = (text, applied["metadata"]["resourceVersion"])
        if live is None:
            logger.info("%s made", kind, extra=fields(object=gateway.ref))
        return applied

    def _drop(self, gateway: Gateway, version: str, kind: str) -> None:
        """Remove what parameters asked for once and ask for no more: looked for once, and after it was made."""
        key = (kind, gateway.namespace, gateway.name)
        if self._applied.get(key) == _NOTHING:
            return
        live = self._api.get(version, kind, gateway.namespace, gateway.name)
        if live is not None and _belongs(live, gateway):
            self._api.delete(version, kind, gateway.namespace, gateway.name)
        self._applied[key] = _NOTHING

    def _parameters(self, gateway: Gateway) -> tuple[dict[str, Any], str]:
        """What the ConfigMap that the Gateway names says, and what is wrong with it."""
        infrastructure = gateway.spec.infrastructure
        reference = infrastructure.parameters_ref if infrastructure is not None else None
        if reference is None:
            return {}, ""
        field = "spec.infrastructure.parametersRef"
        if (reference.group, reference.kind) != ("", "ConfigMap"):
            return {}, f"{field}: {reference.group}/{reference.kind} is not known: name a ConfigMap"
        found = self._api.get("v1", "ConfigMap", gateway.namespace, reference.name)
        if found is None:
            return {}, f"{field}: ConfigMap {gateway.namespace}/{reference.name} does not exist: make it"
        import yaml

        overlays = {}
        for key, text in (found.get("data") or {}).items():
            where = f"{field}: ConfigMap {gateway.namespace}/{reference.name}: data.{key}"
            if key not in made.OVERLAYS:
                return {}, f"{where}: is not known: use {', '.join(made.OVERLAYS)}"
            try:
                overlay = yaml.safe_load(text)
            except yaml.YAMLError as error:
                return {}, f"{where}: is not YAML: {' '.join(str(error).split())}"
            if not isinstance(overlay, dict) or not isinstance(overlay.get("spec", {}), dict):
                return {}, f"{where}: expected an object with spec or metadata"
            overlays[key] = overlay
        return overlays, ""

    def _write_status(
        self, gateway: Gateway, data: Manifest, wrong: list[made.Fault], seen: made.Seen
    ) -> None:
        wanted = made.status(gateway, wrong, seen, _now())
        before = data.get("status") or {}
        if {key: before.get(key) for key in wanted} == wanted:
            return
        patch = {"status": wanted, "metadata": {"uid": gateway.metadata.uid}}
        self._api.patch(API_VERSION, "Gateway", gateway.namespace, gateway.name, patch, "status")
        programmed = next(one for one in wanted["conditions"] if one["type"] == "Programmed")
        logger.info(
            "Programmed: %s, %s",
            programmed["status"],
            programmed["message"],
            extra=fields(object=gateway.ref),
        )

    def _apply(self, obj: Manifest) -> Manifest:
        return self._api.apply(obj, field_manager=MANAGER)

    def _say(self, owner: Owner, problem: str) -> None:
        if self._told.get(owner) != problem:
            self._told[owner] = problem
            logger.error("%s", problem)


class _Watch:
    """A thread that says when objects of a kind change. It knows nothing of them: whoever is woken lists."""

    def __init__(
        self, api: Api, api_version: str, kind: str, selector: str, changed: Callable[[], None]
    ) -> None:
        self._api = api
        self._kind = (api_version, kind)
        self._selector = selector
        self._changed = changed
        self._ended = threading.Event()
        self._stream: Stream | None = None
        self._thread = threading.Thread(target=self._run, name=f"waypoints-{kind}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the watch; its thread ends by itself."""
        self._ended.set()
        stream = self._stream
        if stream is not None:
            stream.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                self._follow()
                if time.monotonic() - began < RETRY:
                    self._ended.wait(RETRY)  # a server that ends watches as soon as they begin
            except (ApiError, OSError, ValueError) as error:
                if not self._ended.is_set():
                    logger.debug("watch of %s ended: %s", self._kind[1], error)
                    self._ended.wait(RETRY)

    def _follow(self) -> None:
        try:
            path = self._api.path(*self._kind)
        except NoSuchKind:
            self._api.forget(self._kind[0])
            self._ended.wait(ABSENT)
            return
        query = {"labelSelector": self._selector} if self._selector else {}
        version = self._api.get_json(path, limit="1", **query)["metadata"]["resourceVersion"]
        self._changed()  # what happened before
        query |= {"watch": "1", "resourceVersion": version, "timeoutSeconds": str(_WATCH)}
        stream = self._stream = self._api.stream(path, query, silence=_WATCH + 60)
        with contextlib.closing(stream):
            if self._ended.is_set():
                return
            for _ in stream:
                self._changed()


def _belongs(live: Manifest, gateway: Gateway) -> bool:
    metadata = live.get("metadata") or {}
    owners = metadata.get("ownerReferences") or []
    return any(one.get("uid") == gateway.metadata.uid for one in owners) or (
        not owners and (metadata.get("labels") or {}).get(GATEWAY_NAME) == gateway.name
    )


def _controller(gateway_class: Manifest) -> str:
    return str((gateway_class.get("spec") or {}).get("controllerName") or "")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def own_image(api: Api, namespace: str, pod: str) -> tuple[str, str, tuple[str, ...]]:
    """Image, pull policy and pull secrets for waypoints: those of this control plane's own pod.

    WAYPOINT_IMAGE in the environment is another image. Raises ApiError.
    """
    image = os.environ.get("WAYPOINT_IMAGE", "")
    found = (api.get("v1", "Pod", namespace, pod) or {}).get("spec") or {}
    container: Manifest = (found.get("containers") or [{}])[0]
    secrets = tuple(str(one.get("name")) for one in found.get("imagePullSecrets") or ())
    return (
        image or str(container.get("image") or ""),
        str(container.get("imagePullPolicy") or "IfNotPresent"),
        secrets,
    )


async def run(api: Api, settings: made.Deployment, namespace: str, pod: str) -> None:
    """Deploy waypoints until cancelled, of the image of the control plane's pod if `settings` name none."""
    if not settings.image:
        image, policy, secrets = await trio.to_thread.run_sync(own_image, api, namespace, pod)
        if not image:
            raise ApiError(
                404, "NotFound",
                f"Pod {namespace}/{pod}: is not this control plane's, so it is not known which image waypoints have: "
                "set WAYPOINT_IMAGE",
            )  # fmt: skip
        settings = settings._replace(image=image, pull_policy=policy, pull_secrets=secrets)
    await Deployer(api, settings).run()
