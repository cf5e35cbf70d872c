"""The Kubernetes objects that the mesh reads and writes, as typed, immutable structs.

Only shape lives here: field names and types are those of the Kubernetes API (core/v1, apps/v1), fields that the
mesh does not use are left out and ignored when read. To change an object, `msgspec.structs.replace` it.
"""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, field

PortNumber = Annotated[int, Meta(ge=1, le=65535)]
IPFamily = Literal["IPv4", "IPv6"]
Protocol = Literal["TCP", "UDP", "SCTP"]
Phase = Literal["", "Pending", "Running", "Succeeded", "Failed", "Unknown"]


class Key(NamedTuple):
    """What identifies an object among all others; `namespace` is "" for objects of the whole cluster."""

    group: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return reference(self.kind, self.namespace, self.name)


def reference(kind: str, namespace: str, name: str) -> str:
    """How people are told of an object: "Service default/reviews", "Namespace default"."""
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}".rstrip()


class Model(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True, frozen=True):
    """The base of all structs here: camelCase on the wire, defaults left out, unknown fields ignored."""


class OwnerReference(Model, frozen=True, kw_only=True):
    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False
    block_owner_deletion: bool = False


class ObjectMeta(Model, frozen=True, kw_only=True):
    name: str = ""
    generate_name: str = ""
    namespace: str = ""
    uid: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    owner_references: list[OwnerReference] = []
    creation_timestamp: str = ""
    deletion_timestamp: str = ""
    deletion_grace_period_seconds: int | None = None
    generation: int = 0


class Object(Model, frozen=True, kw_only=True):
    """The base of every kind. `KIND`, `API_VERSION`, `PLURAL`, `SHORT` and `NAMESPACED` describe the kind.

    `API_VERSIONS` are older ones that are read, too. An object of a kind that `RESTRICTS` traffic counts although
    its spec is wrong: leaving it out would open what it closes.
    """

    KIND: ClassVar[str] = ""
    API_VERSION: ClassVar[str] = ""
    API_VERSIONS: ClassVar[tuple[str, ...]] = ()
    RESTRICTS: ClassVar[bool] = False
    PLURAL: ClassVar[str] = ""
    SHORT: ClassVar[tuple[str, ...]] = ()
    NAMESPACED: ClassVar[bool] = True

    metadata: ObjectMeta = ObjectMeta()

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """The namespace, "default" where none is written, "" for objects of the whole cluster."""
        return (self.metadata.namespace or "default") if self.NAMESPACED else ""

    @property
    def key(self) -> Key:
        return key_of(type(self), self.namespace, self.name)

    @property
    def ref(self) -> str:
        """How people are told of it: "Service default/reviews"."""
        return reference(self.KIND, self.namespace, self.name)


K = TypeVar("K", bound=Object)


def group_of(api_version: str) -> str:
    """The API group in an apiVersion: "apps/v1" gives "apps", "v1" gives "" (the core group)."""
    group, slash, _ = api_version.partition("/")
    return group if slash else ""


def key_of(kind: type[Object], namespace: str, name: str) -> Key:
    """The key of an object of a kind; the namespace is normalized as `Object.namespace` does."""
    return Key(
        group_of(kind.API_VERSION), kind.KIND, (namespace or "default") if kind.NAMESPACED else "", name
    )


class Namespace(Object, frozen=True, kw_only=True):
    KIND = "Namespace"
    API_VERSION = "v1"
    PLURAL = "namespaces"
    SHORT = ("ns",)
    NAMESPACED = False


class ServiceAccount(Object, frozen=True, kw_only=True):
    KIND = "ServiceAccount"
    API_VERSION = "v1"
    PLURAL = "serviceaccounts"
    SHORT = ("sa",)


class NodeAddress(Model, frozen=True, kw_only=True):
    type: str
    address: str


class NodeSpec(Model, frozen=True, kw_only=True):
    pod_cidr: str = field(name="podCIDR", default="")
    pod_cidrs: list[str] = field(name="podCIDRs", default_factory=list)
    unschedulable: bool = False


class NodeStatus(Model, frozen=True, kw_only=True):
    addresses: list[NodeAddress] = []


class Node(Object, frozen=True, kw_only=True):
    KIND = "Node"
    API_VERSION = "v1"
    PLURAL = "nodes"
    SHORT = ("no",)
    NAMESPACED = False

    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class ServicePort(Model, frozen=True, kw_only=True):
    """`target_port` is a number, the name of a container port, or None: the same as `port`."""

    port: PortNumber
    name: str = ""
    protocol: Protocol = "TCP"
    target_port: PortNumber | str | None = None
    node_port: int | None = None
    app_protocol: str = ""


class ServiceSpec(Model, frozen=True, kw_only=True):
    """`cluster_ip` "" means: give it one; "None" means headless."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    cluster_ip: str = field(name="clusterIP", default="")
    cluster_ips: list[str] = field(name="clusterIPs", default_factory=list)
    ports: list[ServicePort] = []
    selector: dict[str, str] = {}
    ip_families: list[IPFamily] = []
    ip_family_policy: Literal["", "SingleStack", "PreferDualStack", "RequireDualStack"] = ""
    external_name: str = ""
    publish_not_ready_addresses: bool = False
    internal_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    traffic_distribution: str = ""


class Service(Object, frozen=True, kw_only=True):
    KIND = "Service"
    API_VERSION = "v1"
    PLURAL = "services"
    SHORT = ("svc",)

    spec: ServiceSpec = ServiceSpec()

    @property
    def headless(self) -> bool:
        return self.spec.cluster_ip == "None" or self.spec.cluster_ips[:1] == ["None"]

    @property
    def addresses(self) -> list[str]:
        """The virtual addresses as text, none if headless, an ExternalName, or not resolved yet."""
        if self.headless or self.spec.type == "ExternalName":
            return []
        return list(self.spec.cluster_ips) or ([self.spec.cluster_ip] if self.spec.cluster_ip else [])


class ObjectFieldSelector(Model, frozen=True, kw_only=True):
    field_path: str


class EnvVarSource(Model, frozen=True, kw_only=True):
    field_ref: ObjectFieldSelector | None = None
    config_map_key_ref: dict[str, Any] | None = None
    secret_key_ref: dict[str, Any] | None = None
    resource_field_ref: dict[str, Any] | None = None


class EnvVar(Model, frozen=True, kw_only=True):
    name: str
    value: str = ""
    value_from: EnvVarSource | None = None


class ContainerPort(Model, frozen=True, kw_only=True):
    container_port: PortNumber
    name: str = ""
    protocol: Protocol = "TCP"


class Container(Model, frozen=True, kw_only=True):
    """One program of a pod. `image` is informational on one machine: `command` is what runs."""

    name: str
    image: str = ""
    command: list[str] = []
    args: list[str] = []
    env: list[EnvVar] = []
    ports: list[ContainerPort] = []
    working_dir: str = ""
    restart_policy: str = ""
    """"Always" makes an init container one that runs beside the others: a sidecar."""


class PodSpec(Model, frozen=True, kw_only=True):
    containers: list[Container] = []
    init_containers: list[Container] = []
    node_name: str = ""
    service_account_name: str = ""
    host_network: bool = False
    restart_policy: Literal["Always", "OnFailure", "Never"] = "Always"
    termination_grace_period_seconds: int = 30
    hostname: str = ""
    subdomain: str = ""


class PodIP(Model, frozen=True, kw_only=True):
    ip: str


class PodCondition(Model, frozen=True, kw_only=True):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str = ""
    message: str = ""
    last_transition_time: str = ""


class ContainerStateRunning(Model, frozen=True, kw_only=True):
    started_at: str = ""


class ContainerStateWaiting(Model, frozen=True, kw_only=True):
    reason: str = ""
    message: str = ""


class ContainerStateTerminated(Model, frozen=True, kw_only=True):
    exit_code: int
    signal: int = 0
    reason: str = ""
    message: str = ""
    started_at: str = ""
    finished_at: str = ""


class ContainerState(Model, frozen=True, kw_only=True):
    """At most one of the three is set."""

    running: ContainerStateRunning | None = None
    waiting: ContainerStateWaiting | None = None
    terminated: ContainerStateTerminated | None = None


class ContainerStatus(Model, frozen=True, kw_only=True):
    name: str
    ready: bool = False
    restart_count: int = 0
    state: ContainerState = ContainerState()
    last_state: ContainerState = ContainerState()
    image: str = ""
    started: bool = False


class PodStatus(Model, frozen=True, kw_only=True):
    phase: Phase = ""
    reason: str = ""
    message: str = ""
    pod_ip: str = field(name="podIP", default="")
    pod_ips: list[PodIP] = field(name="podIPs", default_factory=list)
    host_ip: str = field(name="hostIP", default="")
    start_time: str = ""
    conditions: list[PodCondition] = []
    container_statuses: list[ContainerStatus] = []


class Pod(Object, frozen=True, kw_only=True):
    KIND = "Pod"
    API_VERSION = "v1"
    PLURAL = "pods"
    SHORT = ("po",)

    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def service_account(self) -> str:
        return self.spec.service_account_name or "default"

    @property
    def ready(self) -> bool:
        """The pod's Ready condition, as the kubelet reports it."""
        return any(c.type == "Ready" and c.status == "True" for c in self.status.conditions)

    @property
    def addresses(self) -> list[str]:
        """The pod's addresses as text, IPv4 first; none before it was placed."""
        return [ip.ip for ip in self.status.pod_ips] or ([self.status.pod_ip] if self.status.pod_ip else [])


class LabelSelectorRequirement(Model, frozen=True, kw_only=True):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []


class LabelSelector(Model, frozen=True, kw_only=True):
    match_labels: dict[str, str] = {}
    match_expressions: list[LabelSelectorRequirement] = []

    @property
    def empty(self) -> bool:
        return not self.match_labels and not self.match_expressions

    def matches(self, labels: dict[str, str]) -> bool:
        """Whether an object with these labels is selected; an empty selector selects everything."""
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            _requirement_met(requirement, labels) for requirement in self.match_expressions
        )


def _requirement_met(requirement: LabelSelectorRequirement, labels: dict[str, str]) -> bool:
    present = requirement.key in labels
    match requirement.operator:
        case "In":
            return present and labels[requirement.key] in requirement.values
        case "NotIn":
            return not present or labels[requirement.key] not in requirement.values
        case "Exists":
            return present
        case "DoesNotExist":
            return not present


class PodTemplate(Model, frozen=True, kw_only=True):
    metadata: ObjectMeta = ObjectMeta()
    spec: PodSpec = PodSpec()


class DeploymentSpec(Model, frozen=True, kw_only=True):
    selector: LabelSelector
    template: PodTemplate
    replicas: Annotated[int, Meta(ge=0)] = 1


class DeploymentStatus(Model, frozen=True, kw_only=True):
    replicas: int = 0
    ready_replicas: int = 0
    updated_replicas: int = 0


class Deployment(Object, frozen=True, kw_only=True):
    KIND = "Deployment"
    API_VERSION = "apps/v1"
    PLURAL = "deployments"
    SHORT = ("deploy",)

    spec: DeploymentSpec
    status: DeploymentStatus = DeploymentStatus()


class Condition(Model, frozen=True, kw_only=True):
    """What somebody who acts on an object has found of it (Kubernetes' metav1.Condition)."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str = ""
    message: str = ""
    last_transition_time: str = ""
    observed_generation: int = 0


class PolicyStatus(Model, frozen=True, kw_only=True):
    conditions: list[Condition] = []


class Policy(Object, frozen=True, kw_only=True):
    """A policy of security.istio.io: its `spec` is kept as it is written, what it means is read elsewhere."""

    API_VERSION = "security.istio.io/v1"
    API_VERSIONS = ("security.istio.io/v1beta1",)
    RESTRICTS = True

    spec: Any = {}
    status: PolicyStatus = PolicyStatus()


class AuthorizationPolicy(Policy, frozen=True, kw_only=True):
    """`store.authorization.read` says what its `spec` means."""

    KIND = "AuthorizationPolicy"
    PLURAL = "authorizationpolicies"
    SHORT = ("ap",)


class PeerAuthentication(Policy, frozen=True, kw_only=True):
    """`store.peerauth.read` says what its `spec` means."""

    KIND = "PeerAuthentication"
    PLURAL = "peerauthentications"
    SHORT = ("pa",)


def to_dict(obj: Object) -> dict[str, Any]:
    """The object as plain data for YAML or JSON: apiVersion, kind, metadata, then the rest."""
    fields: dict[str, Any] = msgspec.to_builtins(obj)
    metadata = fields.pop("metadata", {})
    return {"apiVersion": obj.API_VERSION, "kind": obj.KIND, "metadata": metadata, **fields}


def to_json(obj: Object) -> bytes:
    """The object as the JSON text of a file (indented, newline at its end)."""
    return msgspec.json.format(msgspec.json.encode(to_dict(obj)), indent=2) + b"\n"
