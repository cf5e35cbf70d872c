"""Which kinds of objects there are: those the mesh acts on, and those it knows but does not act on yet.

The second list exists so that nobody believes a policy to be in force which is not: such an object gets a warning,
an unknown kind an error.
"""

from typing import NamedTuple

from ztunnel.store.endpointslice import EndpointSlice
from ztunnel.store.gateways import Gateway, GatewayClass
from ztunnel.store.models import (
    AuthorizationPolicy,
    Deployment,
    Namespace,
    Node,
    Object,
    PeerAuthentication,
    Pod,
    Service,
    ServiceAccount,
    group_of,
)

KINDS: dict[str, type[Object]] = {
    kind.KIND: kind
    for kind in (
        Namespace, ServiceAccount, Node, Service, EndpointSlice, Pod, Deployment, PeerAuthentication,
        AuthorizationPolicy, Gateway, GatewayClass,
    )
}  # fmt: skip


# Namespaces that exist without anybody writing them down.
IMPLIED_NAMESPACES = ("default", "istio-system", "kube-system")


class Foreign(NamedTuple):
    """A kind that this version reads over: its API group, versions, scope, and what ignoring it means."""

    group: str
    versions: tuple[str, ...]
    kind: str
    namespaced: bool
    consequence: str
    named: bool = True


_NOT_ENFORCED = "is not enforced by this version"
_NOT_USED = "is not acted on by this version"
_NOT_RUN = "is not run by this version"
_CERTIFICATE_LIVES = (
    "sets how long certificates live when the mesh starts (values.pilot.env: DEFAULT_WORKLOAD_CERT_TTL,"
    " MAX_WORKLOAD_CERT_TTL); nothing else of it is acted on by this version"
)

_FOREIGN: list[tuple[str, str, str, str]] = [
    ("security.istio.io", "v1 v1beta1", "RequestAuthentication", _NOT_ENFORCED),
    ("policy.linkerd.io", "v1alpha1 v1beta1 v1beta2 v1beta3",
     "AuthorizationPolicy Server ServerAuthorization MeshTLSAuthentication NetworkAuthentication HTTPRoute "
     "HTTPLocalRateLimitPolicy EgressNetwork", _NOT_ENFORCED),
    ("access.smi-spec.io", "v1alpha1 v1alpha2 v1alpha3", "TrafficTarget", _NOT_ENFORCED),
    ("networking.k8s.io", "v1", "NetworkPolicy", _NOT_ENFORCED),
    ("networking.k8s.io", "v1", "Ingress IngressClass*", _NOT_USED),
    ("policy", "v1", "PodDisruptionBudget", _NOT_USED),
    ("networking.istio.io", "v1 v1beta1 v1alpha3",
     "VirtualService DestinationRule Gateway ServiceEntry WorkloadEntry WorkloadGroup Sidecar", _NOT_USED),
    ("networking.istio.io", "v1alpha3", "EnvoyFilter", _NOT_USED),
    ("networking.istio.io", "v1beta1", "ProxyConfig", _NOT_USED),
    ("telemetry.istio.io", "v1 v1alpha1", "Telemetry", _NOT_USED),
    ("extensions.istio.io", "v1alpha1", "WasmPlugin", _NOT_USED),
    ("install.istio.io", "v1alpha1", "IstioOperator?", _CERTIFICATE_LIVES),
    ("gateway.networking.k8s.io", "v1 v1beta1 v1alpha2 v1alpha3",
     "HTTPRoute GRPCRoute TLSRoute TCPRoute UDPRoute ReferenceGrant BackendTLSPolicy", _NOT_USED),
    ("linkerd.io", "v1alpha1 v1alpha2", "ServiceProfile", _NOT_USED),
    ("multicluster.linkerd.io", "v1alpha1 v1alpha2 v1alpha3", "Link", _NOT_USED),
    ("split.smi-spec.io", "v1alpha1 v1alpha2 v1alpha3 v1alpha4", "TrafficSplit", _NOT_USED),
    ("specs.smi-spec.io", "v1alpha1 v1alpha2 v1alpha3 v1alpha4", "HTTPRouteGroup TCPRoute UDPRoute", _NOT_USED),
    ("flagger.app", "v1beta1", "Canary MetricTemplate AlertProvider", _NOT_USED),
    ("autoscaling", "v1 v2", "HorizontalPodAutoscaler", _NOT_USED),
    ("", "v1", "ConfigMap Secret Endpoints PersistentVolume* PersistentVolumeClaim LimitRange ResourceQuota Event",
     _NOT_USED),
    ("", "v1", "ReplicationController", _NOT_RUN),
    ("apps", "v1", "ReplicaSet StatefulSet DaemonSet", _NOT_RUN),
    ("batch", "v1", "Job CronJob", _NOT_RUN),
    ("rbac.authorization.k8s.io", "v1", "Role RoleBinding ClusterRole* ClusterRoleBinding*", _NOT_ENFORCED),
    ("apiextensions.k8s.io", "v1", "CustomResourceDefinition*", _NOT_USED),
    ("admissionregistration.k8s.io", "v1",
     "MutatingWebhookConfiguration* ValidatingWebhookConfiguration* ValidatingAdmissionPolicy*", _NOT_USED),
    ("monitoring.coreos.com", "v1", "ServiceMonitor PodMonitor PrometheusRule", _NOT_USED),
    ("storage.k8s.io", "v1", "StorageClass*", _NOT_USED),
    ("scheduling.k8s.io", "v1", "PriorityClass*", _NOT_USED),
]  # fmt: skip

# A star marks a kind of the whole cluster, a question mark one whose objects need no name.
FOREIGN: dict[tuple[str, str], Foreign] = {
    (group, word.strip("*?")): Foreign(
        group, tuple(versions.split()), word.strip("*?"), not word.endswith("*"), consequence, not word.endswith("?")
    )
    for group, versions, words, consequence in _FOREIGN
    for word in words.split()
}  # fmt: skip

_BY_WORD: dict[str, type[Object]] = {
    word: kind
    for kind in KINDS.values()
    for word in (kind.KIND.lower(), kind.PLURAL, *kind.SHORT)
}  # fmt: skip


def kind_named(word: str) -> type[Object] | None:
    """The kind that people mean by "Service", "services", "svc" (any case), or None."""
    return _BY_WORD.get(word.lower())


def kind_words() -> list[str]:
    """The words for kinds that `kind_named` knows, for a message: the plurals."""
    return [kind.PLURAL for kind in KINDS.values()]


def api_versions_of(kind: str) -> list[str]:
    """Every apiVersion under which a kind of this name is known, the mesh's own first; none if unknown."""
    versions = [KINDS[kind].API_VERSION, *KINDS[kind].API_VERSIONS] if kind in KINDS else []
    for foreign in FOREIGN.values():
        if foreign.kind == kind:
            versions += [f"{foreign.group}/{version}".lstrip("/") for version in foreign.versions]
    return versions


def typed_kind(api_version: str, kind: str) -> type[Object] | None:
    """The kind the mesh acts on that an object's apiVersion and kind name, or None."""
    found = KINDS.get(kind)
    if found is not None and (api_version == found.API_VERSION or api_version in found.API_VERSIONS):
        return found
    return None


def foreign_kind(api_version: str, kind: str) -> Foreign | None:
    """The kind known but not acted on that an object's apiVersion and kind name, or None."""
    found = FOREIGN.get((group_of(api_version), kind))
    return found if found is not None and api_version.rpartition("/")[2] in found.versions else None


_OF_MESHES = (".istio.io", "gateway.networking.k8s.io", "linkerd.io", "smi-spec.io", "flagger.app")
_SETTINGS = ("install.istio.io", "IstioOperator")


def of_a_mesh(group: str) -> bool:
    """Whether who writes an object of this API group expects a mesh to act on it: others are Kubernetes' own."""
    return group.endswith(_OF_MESHES) and group != _SETTINGS[0]


def settings_of_installation(api_version: object, kind: object) -> bool:
    """Whether it is no object of a mesh but what one is installed with."""
    return (group_of(str(api_version)), kind) == _SETTINGS
