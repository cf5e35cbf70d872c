"""The waypoint's settings, read from the environment: those of a node's daemon, and who it is."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ztunnel import durations
from ztunnel.config import SettingError, Settings

CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True, kw_only=True, slots=True)
class WaypointSettings:
    """`common` is what each proxy is told; durations in seconds.

    `name` is that of the Gateway, and of its Service. While `minimum_drain` is not over after a SIGTERM, who has not
    heard yet that this pod goes is still served.
    """

    common: Settings
    name: str
    namespace: str
    service_account: str
    root_namespace: str
    minimum_drain: float

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "WaypointSettings":
        """Read the settings. Raises SettingError."""
        common = Settings.from_environment({"POD_NAMESPACE": "default", **environment})
        name = environment.get("WAYPOINT_NAME", "")
        if not name:
            raise SettingError(
                "WAYPOINT_NAME: is not set: the name of the Gateway, as in the label "
                "gateway.networking.k8s.io/gateway-name of this pod"
            )
        try:
            minimum = durations.parse(environment.get("MINIMUM_DRAIN_DURATION", "5s"))
        except ValueError as error:
            raise SettingError(f"MINIMUM_DRAIN_DURATION: {error}") from None
        return cls(
            common=common,
            name=name,
            namespace=common.pod_namespace,
            service_account=environment.get("SERVICE_ACCOUNT", name),
            root_namespace=environment.get("ROOT_NAMESPACE", "istio-system"),
            minimum_drain=minimum,
        )

    @property
    def key(self) -> str:
        """The key of the waypoint's Service in the mesh: "namespace/hostname"."""
        return f"{self.namespace}/{self.name}.{self.namespace}.svc.{CLUSTER_DOMAIN}"

    @property
    def identity(self) -> str:
        """The SPIFFE id that it serves, and connects, as."""
        return f"spiffe://{self.common.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"
