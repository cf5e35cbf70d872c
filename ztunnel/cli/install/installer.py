"""Bringing an installation into a cluster: server-side apply in the order in which things are needed.

Every object is looked at first: what belongs to somebody else is refused before anything is changed, and what is
already as it should be is told as unchanged. A run that was broken off is gone on with by the next one.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from ztunnel import __version__
from ztunnel.cli.errors import UserError
from ztunnel.cli.install import removal, render
from ztunnel.cli.install.render import Object
from ztunnel.cli.install.settings import NAMESPACE, Settings
from ztunnel.cli.install.survey import Record, Ref, Survey, ours, ref_of, survey, told
from ztunnel.cli.install.waiting import Deadline, until, wait_for

if TYPE_CHECKING:
    from ztunnel.cli.install.progress import Progress
    from ztunnel.store.kube.api import Api

_MOUNTED: Final = ("istio-ca-root-cert", "istio-ca-crl")
_GATEWAY_API: Final = "gateway.networking.k8s.io"
_VOLATILE: Final = ("managedFields", "resourceVersion", "generation", "creationTimestamp", "uid")


class Change(NamedTuple):
    """What became of an object: "created", "configured", "unchanged", "kept" (another's, used as it is), "deleted"."""

    ref: Ref
    how: str


class Installer:
    """One installation. `run` once; `dry_run` changes nothing and has the API server check what it can."""

    def __init__(
        self,
        api: "Api",
        settings: Settings,
        progress: "Progress",
        *,
        wait: bool = True,
        timeout: float = 300.0,
        dry_run: bool = False,
    ) -> None:
        self.api = api
        self.settings = settings
        self.progress = progress
        self.wait = wait and not dry_run
        self.deadline = Deadline(timeout)
        self.dry_run = dry_run
        self.changes: list[Change] = []
        self.first = False
        """Whether nothing was installed before."""
        self._live: dict[Ref, Object | None] = {}

    def run(self) -> list[Change]:
        """Install; what became of each object. Raises UserError, ApiError."""
        found = survey(self.api)
        self.first = not found.records
        self._check_revisions(found)
        objects = render.render(self.settings, default=self._default(found))
        objects = self._with_gateway_api(objects)
        self._look(objects)
        objects = self._without_others(objects)
        before = found.records.get(self.settings.revision)
        record = Record(
            self.settings.revision, self.settings.spec, __version__, tuple(ref_of(obj) for obj in objects)
        )
        components = _by_component(objects)
        with self.progress.step("Namespace and definitions"):
            self._put(components["Base"])
            # Before anything that an interruption could leave without a trace of where it came from.
            old = before.objects if before is not None else ()
            self._put_record(replace(record, objects=tuple(dict.fromkeys((*record.objects, *old)))))
            self._await(render.definitions(components["Base"]))
        if components["Pilot"]:
            with self.progress.step("Control plane (istiod)"):
                self._put(components["Pilot"])
                self._await_workload(components["Pilot"], "Deployment")
        self._install_nodes(components, found)
        self._prune(record, before, found)
        self._put_record(record)
        return self.changes

    def _install_nodes(self, components: dict[str, list[Object]], found: Survey) -> None:
        """The nodes' parts. An agent that is there already is replaced before its proxy, not together with it."""
        if components["Cni"]:
            with self.progress.step("Node agents (istio-cni-node)"):
                self._put(components["Cni"])
                if found.agents is not None:
                    self._await_workload(components["Cni"], "DaemonSet")
        if components["Ztunnel"]:
            with self.progress.step("Node proxies (ztunnel)"):
                if components["Pilot"]:
                    self._await_mounted()
                self._put(components["Ztunnel"])
                self._await_workload(components["Ztunnel"], "DaemonSet")
                self._await_workload(components["Cni"], "DaemonSet")

    # What must hold before anything is changed.

    def _check_revisions(self, found: Survey) -> None:
        follow = self.settings.node_revision
        if self.settings.enabled("pilot") and follow == self.settings.revision:
            return
        if self.settings.enabled("ztunnel") and follow not in found.planes:
            have = ", ".join(found.planes) or "none"
            raise UserError(
                f"spec.values.ztunnel.revision: there is no control plane {follow!r} for the node proxies to follow",
                f"control planes are: {have}",
            )

    def _default(self, found: Survey) -> str:
        """The revision that serves whoever names none: the one that does, else this one if there is no other."""
        others = set(found.planes) - {self.settings.revision}
        return found.default or (found.newest(self.settings.revision) if others else self.settings.revision)

    def _with_gateway_api(self, objects: list[Object]) -> list[Object]:
        """With minimal definitions of the Gateway API, unless the cluster has some that are not ours."""
        if not self.settings.enabled("base"):
            return objects
        kind = ("apiextensions.k8s.io/v1", "CustomResourceDefinition")
        present = [live for live in self.api.list(*kind) if live["spec"]["group"] == _GATEWAY_API]
        if any(not ours(live) for live in present):
            return objects
        last = max(index for index, obj in enumerate(objects) if obj["kind"] == kind[1]) + 1
        return [*objects[:last], *render.gateway_api(), *objects[last:]]

    def _look(self, objects: Iterable[Object]) -> None:
        for obj in objects:
            self._live[ref_of(obj)] = self.api.get(*ref_of(obj))

    def _without_others(self, objects: list[Object]) -> list[Object]:
        """The objects without those that another installation has brought and that are used as they are.

        Raises UserError for those that cannot be shared.
        """
        mine, taken = [], []
        for obj in objects:
            live = self._live[ref_of(obj)]
            if live is None or ours(live):
                mine.append(obj)
            elif obj["kind"] in ("Namespace", "CustomResourceDefinition"):
                self._keep(obj, live)
            else:
                taken.append(told(ref_of(obj)))
        if taken:
            raise UserError(
                f"{taken[0]}: is there already, and not of this mesh (has it the label {render.PART_OF}?)",
                "remove the other installation first, for example with: istioctl uninstall --purge",
                detail="\n".join(f"error: {each}: the same" for each in taken[1:]),
            )
        return mine

    def _keep(self, obj: Object, live: Object) -> None:
        ref = ref_of(obj)
        self.changes.append(Change(ref, "kept"))
        self.progress.changed(told(ref), "kept")
        if obj["kind"] == "Namespace":
            level = (live["metadata"].get("labels") or {}).get(
                "pod-security.kubernetes.io/enforce", "privileged"
            )
            if level != "privileged":
                self.progress.warn(
                    f"{told(ref)}: its Pod Security level is {level}, which refuses the nodes' parts; set the label "
                    "pod-security.kubernetes.io/enforce=privileged"
                )
            return
        served = {version["name"] for version in live["spec"]["versions"] if version.get("served")}
        wanted = [version["name"] for version in obj["spec"]["versions"]]
        if not served & set(wanted):
            self.progress.warn(
                f"{told(ref)}: serves {', '.join(sorted(served))}, of which this version reads none; it reads "
                f"{', '.join(wanted)}; upgrade the definition"
            )

    # Applying.

    def _put(self, objects: Iterable[Object]) -> None:
        for obj in objects:
            ref = ref_of(obj)
            live = self._live.get(ref)
            if obj["kind"] == "ValidatingWebhookConfiguration" and live is not None:
                _keep_failure_policies(obj, live)
            how = self._apply(obj, live)
            self.changes.append(Change(ref, how))
            self.progress.changed(told(ref), how)

    def _apply(self, obj: Object, live: Object | None) -> str:
        from ztunnel.store.kube.api import ApiError

        try:
            if self.dry_run and live is None and not self._can_be_checked(obj):
                return "created"
            result = self.api.apply(obj, dry_run=self.dry_run)
        except ApiError as error:
            if error.status == 422:
                raise UserError(
                    str(error),
                    "if a field of it cannot be changed any more, delete the object and run this again",
                ) from error
            raise
        if live is None:
            return "created"
        return "unchanged" if _content(result) == _content(live) else "configured"

    def _can_be_checked(self, obj: Object) -> bool:
        """Whether an API server that has not made the objects before this one can look at it."""
        namespace = obj["metadata"].get("namespace", "")
        if namespace and self._live.get(("v1", "Namespace", "", namespace), obj) is None:
            return False
        return self.api.serves(obj["apiVersion"], obj["kind"])

    def _put_record(self, record: Record) -> None:
        obj = record.object()
        ref = ref_of(obj)
        live = self.api.get(*ref)
        how = self._apply(obj, live)
        before = next((change for change in self.changes if change.ref == ref), None)
        if before is None:
            self.changes.append(Change(ref, how))
        elif before.how == "unchanged":
            self.changes[self.changes.index(before)] = Change(ref, how)

    def _await(self, objects: Iterable[Object]) -> None:
        if self.wait:
            for obj in objects:
                wait_for(self.api, obj, self.deadline, self.progress)
        for version in {
            f"{obj['spec']['group']}/{v['name']}" for obj in objects for v in obj["spec"]["versions"]
        }:
            self.api.forget(version)

    def _await_workload(self, objects: Iterable[Object], kind: str) -> None:
        if self.wait:
            for obj in objects:
                if obj["kind"] == kind:
                    wait_for(self.api, obj, self.deadline, self.progress)

    def _await_mounted(self) -> None:
        """Until istiod has written the ConfigMaps that node proxies mount: kubelet retries ever more slowly."""
        if not self.wait:
            return

        def look() -> str:
            missing = [one for one in _MOUNTED if self.api.get("v1", "ConfigMap", NAMESPACE, one) is None]
            return f"ConfigMap {NAMESPACE}/{missing[0]}: not written by istiod yet" if missing else ""

        if missing := until(look, self.deadline, self.progress):
            raise UserError(
                f"{missing} after {self.deadline.seconds:.0f}s",
                f"see its log: kubectl logs -n {NAMESPACE} deploy/istiod",
            )

    def _prune(self, record: Record, before: Record | None, found: Survey) -> None:
        """Remove what an earlier installation of this revision had and this one has not; never definitions."""
        if before is None:
            return
        needed = set(record.objects)
        for revision, other in found.records.items():
            if revision != record.revision:
                needed |= set(other.objects)
        stale = [
            ref
            for ref in before.objects
            if ref not in needed and ref[1] not in ("Namespace", "CustomResourceDefinition")
        ]
        if not stale:
            return
        with self.progress.step("What is no longer wanted"):
            for ref in removal.in_order(stale):
                if not self.dry_run and not removal.remove(self.api, ref, self.deadline, self.progress):
                    continue
                self.changes.append(Change(ref, "deleted"))
                self.progress.changed(told(ref), "deleted")


def _by_component(objects: list[Object]) -> dict[str, list[Object]]:
    """Objects by their component; definitions go with the base, wherever they are from."""
    found: dict[str, list[Object]] = {"Base": [], "Pilot": [], "Cni": [], "Ztunnel": []}
    for obj in objects:
        found[obj["metadata"]["labels"][render.COMPONENT]].append(obj)
    return found


def _keep_failure_policies(obj: Object, live: Object) -> None:
    """Whether a webhook that does not answer refuses is istiod's to say, once it is ready."""
    present = {each["name"]: each.get("failurePolicy") for each in live.get("webhooks") or ()}
    for each in obj["webhooks"]:
        each["failurePolicy"] = present.get(each["name"]) or each["failurePolicy"]


def _content(obj: Object) -> Object:
    """An object without what changes by itself."""
    metadata = {key: value for key, value in obj["metadata"].items() if key not in _VOLATILE}
    return {
        **{key: value for key, value in obj.items() if key not in ("status", "metadata")},
        "metadata": metadata,
    }
