"""Control planes side by side: which one may go, and who serves then what it has served."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from ztunnel.cli.errors import UserError
from ztunnel.cli.install import render
from ztunnel.cli.install.render import Object
from ztunnel.cli.install.settings import NAMESPACE
from ztunnel.cli.install.survey import OURS, Survey, survey
from ztunnel.cli.install.waiting import Deadline, wait_for

if TYPE_CHECKING:
    from ztunnel.cli.install.progress import Progress
    from ztunnel.store.kube.api import Api

_STRATEGIC: Final = "application/strategic-merge-patch+json"
_WEBHOOKS: Final = ("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration")
_GATEWAY: Final = ("gateway.networking.k8s.io/v1", "Gateway")


@dataclass
class Leaving:
    """A control plane that is to be removed. `heir` serves then whoever named none ("": it is the last one).

    `users` name it by label, and would be without a control plane.
    """

    api: "Api"
    name: str
    found: Survey
    heir: str
    users: list[tuple[str, str]] = field(default_factory=list)

    @property
    def moves_nodes(self) -> bool:
        """Whether the node proxies follow it, and have to follow the heir."""
        return bool(self.heir) and self.found.node_revision == self.name

    def check(self, *, force: bool) -> None:
        """Raise UserError where it must not go, or not yet."""
        if self.name not in self.found.planes and self.name not in self.found.records:
            have = ", ".join(self.found.planes) or "none"
            raise UserError(f"there is no control plane {self.name!r}", f"control planes are: {have}")
        if force:
            return
        if not self.heir:
            raise UserError(
                f"{self.name} is the only control plane: without it node proxies get no certificates and no news",
                "remove everything with: ambient uninstall --purge, install another one first, or give --force",
            )
        if self.users:
            told, command = self.users[0]
            raise UserError(
                f"{told} is served by control plane {self.name} (label {render.REVISION})",
                f"move it with: {command.format(heir=self.heir)}",
                detail="\n".join(f"error: {other}: the same" for other, _ in self.users[1:]),
            )

    def hand_over(self, progress: "Progress", limit: float) -> None:
        """Let the heir serve whoever named none, and the nodes follow it, which loses no connection."""
        if not self.heir:
            return
        if self.found.default == self.name:
            with progress.step(f"Whoever names no revision: from {self.name} to {self.heir}"):
                self._hand_over_webhook()
                for name, plane in self.found.planes.items():
                    if name != self.name:
                        self._set(plane, {render.SERVES_UNLABELLED: self.heir})
                        wait_for(self.api, plane, Deadline(limit), progress)
        if self.moves_nodes and self.found.proxies is not None:
            with progress.step(f"Node proxies: from {self.name} to {self.heir}"):
                self._hand_over_nodes(self.found.proxies)
                self._hand_over_record()
                wait_for(self.api, self.found.proxies, Deadline(limit), progress)

    def _hand_over_webhook(self) -> None:
        for live in self.api.list(*_WEBHOOKS, label_selector=f"{OURS},{render.REVISION}={self.heir}"):
            webhooks = render.with_unlabelled(live["webhooks"])
            self.api.patch(*_WEBHOOKS, "", live["metadata"]["name"], {"webhooks": webhooks})

    def _hand_over_nodes(self, proxies: Object) -> None:
        """The proxies' address, not more: their version stays what it is."""
        container = render.container_of(proxies)
        theirs = f"https://{render.service_name(self.name)}.{NAMESPACE}.svc:15012"
        own = f"https://{render.service_name(self.heir)}.{NAMESPACE}.svc:15012"
        moved = {
            each["name"]: own
            for each in container.get("env", ())
            if each["name"] in ("XDS_ADDRESS", "CA_ADDRESS") and each.get("value") == theirs
        }
        self._set(proxies, moved, {render.REVISION: self.heir})

    def _set(
        self, workload: Object, variables: Mapping[str, str], labels: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Set environment of a workload in the cluster, and labels of the workload itself."""
        env = [{"name": name, "value": value} for name, value in variables.items()]
        pods = {"containers": [{"name": render.container_of(workload)["name"], "env": env}]}
        patch = {"metadata": {"labels": dict(labels)}, "spec": {"template": {"spec": pods}}}
        path = self.api.path(
            workload["apiVersion"], workload["kind"], NAMESPACE, workload["metadata"]["name"]
        )
        self.api.request("PATCH", path, body=json.dumps(patch).encode(), content_type=_STRATEGIC)

    def _hand_over_record(self) -> None:
        """An heir that was installed for the nodes to stay with the other one is to keep them at its next upgrade."""
        record = self.found.records.get(self.heir)
        values = record.spec.get("values") if record is not None else None
        proxies = values.get("ztunnel") if isinstance(values, dict) else None
        if record is None or not isinstance(proxies, dict) or proxies.get("revision") != self.name:
            return
        kept = {key: value for key, value in proxies.items() if key != "revision"}
        spec = {**record.spec, "values": {**record.spec["values"], "ztunnel": kept}}
        self.api.apply(replace(record, spec=spec).object())


def leaving(api: "Api", name: str) -> Leaving:
    """What the removal of a control plane means. Raises ApiError."""
    found = survey(api)
    users: list[tuple[str, str]] = []
    label = f"{render.REVISION}={name}"
    for namespace in api.list("v1", "Namespace", label_selector=label):
        own = namespace["metadata"]["name"]
        users.append(
            (f"Namespace {own}", f"kubectl label namespace {own} {render.REVISION}={{heir}} --overwrite")
        )
    if api.serves(*_GATEWAY):
        for gateway in api.list(*_GATEWAY, label_selector=label):
            space, own = gateway["metadata"]["namespace"], gateway["metadata"]["name"]
            users.append((
                f"Gateway {space}/{own}",
                f"kubectl label gateway -n {space} {own} {render.REVISION}={{heir}} --overwrite",
            ))  # fmt: skip
    return Leaving(api, name, found, found.newest(name), users)
