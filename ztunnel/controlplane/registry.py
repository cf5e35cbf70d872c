"""The cluster as the control plane knows it: objects in, changed xDS resources out.

Translates only what a change touches: a pod by itself, a Service with the pods it selects or selected, a node with
its pods. Synchronous and in memory; who watches the store and who publishes is said elsewhere (follow.py).
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Final, NamedTuple

from ztunnel.controlplane import translate
from ztunnel.controlplane.claims import AddressClaims, Owner
from ztunnel.controlplane.endpoint_slices import EndpointSlices
from ztunnel.controlplane.policy_registry import PolicyObject, PolicyRegistry
from ztunnel.controlplane.policy_status import Finding
from ztunnel.controlplane.resources import ADDRESS_TYPE, Entry, entry
from ztunnel.controlplane.selectors import Selectors
from ztunnel.controlplane.translate import Settings
from ztunnel.controlplane.waypoint_policies import SERVICE
from ztunnel.controlplane.waypoint_registry import WaypointRegistry
from ztunnel.store.endpointslice import EndpointSlice
from ztunnel.store.gateways import Gateway, GatewayClass
from ztunnel.store.models import (
    AuthorizationPolicy,
    Namespace,
    Node,
    Object,
    PeerAuthentication,
    Pod,
    Service,
)
from ztunnel.store.problems import Problem
from ztunnel.telemetry.log import fields
from ztunnel.wire.workload_pb2 import Address, PortList

logger = logging.getLogger("controlplane.registry")

KINDS: Final[tuple[type[Object], ...]] = (
    Namespace, PeerAuthentication, AuthorizationPolicy, GatewayClass, Gateway, Service, EndpointSlice, Pod, Node
)  # fmt: skip
"""What the registry needs to see of the store; what pods are translated with before them."""

_NOT_A_TIME: Final = "~"  # sorts after every timestamp


class Update(NamedTuple):
    """What a `Registry.flush` found: resources to replace (None: to remove), problems that are new, and gone.

    `resources` are addresses, `policies` authorizations, `targeted` those for waypoints; `findings` are for the status
    of changed policies.
    """

    resources: dict[str, Entry | None]
    new_problems: list[Problem]
    solved_problems: list[Problem]
    policies: dict[str, Entry | None]
    findings: list[tuple[PolicyObject, Finding]]
    targeted: dict[str, Entry | None]


class Registry:
    """Pods, Services, Nodes and policies, indexed by what depends on what."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._pods: dict[str, dict[str, Pod]] = defaultdict(dict)  # by namespace, then name
        self._services: dict[str, dict[str, Service]] = defaultdict(dict)
        self._selectors = Selectors()
        self._nodes: dict[str, Node] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._slices = EndpointSlices()
        self._pods_of_node: dict[str, set[Owner]] = defaultdict(set)
        self._pod_claims = AddressClaims()
        self._service_claims = AddressClaims()
        self.policies = PolicyRegistry(settings.root_namespace)
        self.waypoints = WaypointRegistry(settings.network, self.policies.targets.concern)
        self._dirty_gateways: dict[Owner, None] = {}
        self._dirty_pods: dict[Owner, None] = {}
        self._dirty_services: dict[Owner, None] = {}
        self._dirty_slices: dict[Owner, None] = {}
        self._problems: dict[str, tuple[Problem, ...]] = {}

    @property
    def problems(self) -> list[Problem]:
        """Everything that is wrong with the objects now."""
        return [problem for problems in self._problems.values() for problem in problems]

    def upsert(self, obj: Object) -> None:
        """Take note of an object that was added or modified; kinds other than `KINDS` are ignored."""
        match obj:
            case Pod():
                self._change_pod(Owner(obj.namespace, obj.name), obj)
            case Service():
                self._change_service(Owner(obj.namespace, obj.name), obj)
            case Node():
                self._change_node(obj.name, obj)
            case EndpointSlice():
                self._change_slice(Owner(obj.namespace, obj.name), obj)
            case Namespace():
                self._change_namespace(obj.name, obj)
            case AuthorizationPolicy() | PeerAuthentication():
                self.policies.change(Owner(obj.namespace, obj.name), type(obj), obj)
            case Gateway() | GatewayClass():
                self._change_waypoints(obj, obj)

    def remove(self, obj: Object) -> None:
        """Take note of an object that was deleted."""
        match obj:
            case Pod():
                self._change_pod(Owner(obj.namespace, obj.name), None)
            case Service():
                self._change_service(Owner(obj.namespace, obj.name), None)
            case Node():
                self._change_node(obj.name, None)
            case EndpointSlice():
                self._change_slice(Owner(obj.namespace, obj.name), None)
            case Namespace():
                self._change_namespace(obj.name, None)
            case AuthorizationPolicy() | PeerAuthentication():
                self.policies.change(Owner(obj.namespace, obj.name), type(obj), None)
            case Gateway() | GatewayClass():
                self._change_waypoints(obj, None)

    def namespace(self, name: str) -> Namespace | None:
        """A namespace, for what its labels and annotations say of everything in it."""
        return self._namespaces.get(name)

    def runs_on(self, node: str, namespace: str, service_account: str) -> bool:
        """Whether a pod of this service account, not run to its end, is on this node."""
        for owner in self._pods_of_node.get(node, ()):
            if owner.namespace == namespace:
                pod = self._pods[namespace][owner.name]
                if pod.service_account == service_account and pod.status.phase not in ("Succeeded", "Failed"):
                    return True
        return False

    def has_pod(self, namespace: str, name: str) -> bool:
        """Whether there is such a pod that has not run to its end."""
        pod = self._pods[namespace].get(name) if namespace in self._pods else None
        return pod is not None and pod.status.phase not in ("Succeeded", "Failed")

    def flush(self) -> Update:
        """Translate what changed since the last call."""
        self._look_at_targets()
        self._dirty_pods.update(dict.fromkeys(self.policies.touched(self._pods)))
        policies, findings, targeted = self.policies.flush()
        pods, self._dirty_pods = self._dirty_pods, {}
        services, self._dirty_services = self._dirty_services, {}
        resources: dict[str, Entry | None] = {}
        appeared: list[Problem] = []
        solved: list[Problem] = []
        for owner in services:
            name = translate.service_key(*owner)
            service = self._services[owner.namespace].get(owner.name)
            ref = f"Service {owner.namespace}/{owner.name}"
            try:
                resources[name], problems = self._service_entry(name, service)
            except Exception as error:
                resources[name], problems = None, [_untranslatable(ref, error)]
            self._note_problems(ref, problems, appeared, solved)
        for owner in pods:
            name = translate.workload_uid(*owner, self.settings)
            pod = self._pods[owner.namespace].get(owner.name)
            ref = f"Pod {owner.namespace}/{owner.name}"
            try:
                resources[name], problems = self._pod_entry(name, pod)
            except Exception as error:
                resources[name], problems = None, [_untranslatable(ref, error)]
            self._note_problems(ref, problems, appeared, solved)
        self._flush_slices(resources, appeared, solved)
        gateways, self._dirty_gateways = self._dirty_gateways, {}
        for owner in gateways:
            ref = f"Gateway {owner.namespace}/{owner.name}"
            self._note_problems(ref, self.waypoints.problems(owner), appeared, solved)
        return Update(resources, appeared, solved, policies, findings, targeted)

    def _change_pod(self, owner: Owner, new: Pod | None) -> None:
        pods = self._pods[owner.namespace]
        old = pods.get(owner.name)
        if old is not None:
            self._pods_of_node[old.spec.node_name].discard(owner)
            if not self._pods_of_node[old.spec.node_name]:
                del self._pods_of_node[old.spec.node_name]
        if new is None:
            pods.pop(owner.name, None)
        else:
            pods[owner.name] = new
            self._pods_of_node[new.spec.node_name].add(owner)
        self._dirty_pods[owner] = None
        for pod in (old, new):
            if pod is not None:
                self._dirty_slices.update(dict.fromkeys(self._slices.at(translate.parse_addresses(pod)[0])))
        if new is None or new.spec.host_network or not translate.is_workload(new):
            others = self._pod_claims.release(owner)
        else:
            # A pod on its way out may still name an address that its successor has already been given.
            rank = (new.metadata.deletion_timestamp != "", new.metadata.creation_timestamp or _NOT_A_TIME)
            others = self._pod_claims.claim(owner, rank, translate.parse_addresses(new)[0])
        self._dirty_pods.update(dict.fromkeys(others))

    def _change_service(self, owner: Owner, new: Service | None) -> None:
        services = self._services[owner.namespace]
        old = services.get(owner.name)
        if new is None:
            services.pop(owner.name, None)
        else:
            services[owner.name] = new
        self._selectors.replace(old, new)
        self._dirty_services[owner] = None
        if new is None or not translate.is_service(new):
            others = self._service_claims.release(owner)
        else:
            rank = (False, new.metadata.creation_timestamp or _NOT_A_TIME)
            others = self._service_claims.claim(owner, rank, translate.parse_addresses(new)[0])
        self._dirty_services.update(dict.fromkeys(others))
        if old is None or new is None or _endpoints_differ(old, new):
            for slice_ in self._slices.of_service(owner):
                self._dirty_slices[slice_] = None
                self._dirty_pods_at(self._slices.pods_of(slice_), self._slices.addresses_of(slice_))
            for name, pod in self._pods[owner.namespace].items():
                if any(service is not None and translate.selects(service, pod) for service in (old, new)):
                    self._dirty_pods[Owner(owner.namespace, name)] = None

    def _change_node(self, name: str, new: Node | None) -> None:
        old = self._nodes.get(name)
        if new is None:
            self._nodes.pop(name, None)
        else:
            self._nodes[name] = new
        if (old and translate.locality(old)) != (new and translate.locality(new)):
            self._dirty_pods.update(dict.fromkeys(self._pods_of_node.get(name, ())))
            self._dirty_slices.update(dict.fromkeys(self._slices.on(name)))

    def _change_slice(self, owner: Owner, new: EndpointSlice | None) -> None:
        self._dirty_slices[owner] = None
        self._dirty_pods_at(*self._slices.change(owner, new))

    def _change_namespace(self, name: str, new: Namespace | None) -> None:
        old = self._namespaces.get(name)
        moved = self.waypoints.change_namespace(name, new)
        if new is None:
            self._namespaces.pop(name, None)
        else:
            self._namespaces[name] = new
        if old is not None and new is not None and _same_marks(old, new) and not moved:
            return
        self._dirty_pods.update(dict.fromkeys(Owner(name, pod) for pod in self._pods.get(name, ())))
        self._dirty_services.update(dict.fromkeys(Owner(name, each) for each in self._services.get(name, ())))

    def _dirty_pods_at(self, pods: Iterable[Owner], addresses: Iterable[bytes]) -> None:
        """Have these pods looked at again, and those whose these addresses are."""
        for owner in pods:
            if owner.name in self._pods.get(owner.namespace, ()):
                self._dirty_pods[owner] = None
        for address in addresses:
            if (holder := self._pod_claims.holder(address)) is not None:
                self._dirty_pods[holder] = None

    def _find_service(self, owner: Owner) -> Service | None:
        return self._services.get(owner.namespace, {}).get(owner.name)

    def _flush_slices(
        self, resources: dict[str, Entry | None], appeared: list[Problem], solved: list[Problem]
    ) -> None:
        slices, self._dirty_slices = self._dirty_slices, {}
        for owner in slices:
            ref = f"EndpointSlice {owner.namespace}/{owner.name}"
            try:
                made, problems = self._slices.workloads(
                    owner, self._find_service, self._pod_claims.holder, self._nodes, self.settings
                )
            except Exception as error:
                made, problems = {}, [_untranslatable(ref, error)]
            before = self._slices.served.pop(owner, frozenset())
            resources.update(dict.fromkeys(before - made.keys()))
            for name, workload in made.items():
                message = Address(workload=workload)
                resources[name] = entry(name, message, ADDRESS_TYPE, (), tuple(workload.services))
            if made:
                self._slices.served[owner] = frozenset(made)
            self._note_problems(ref, problems, appeared, solved)

    def _change_waypoints(self, obj: Gateway | GatewayClass, new: Object | None) -> None:
        """A Gateway or GatewayClass came, went or changed: others may have another waypoint now."""
        if isinstance(obj, Gateway):
            owner = Owner(obj.namespace, obj.name)
            self._dirty_gateways[owner] = None
            changed = self.waypoints.change_gateway(owner, new if isinstance(new, Gateway) else None)
        else:
            changed = self.waypoints.change_class(obj.name, new if isinstance(new, GatewayClass) else None)
        if changed:
            self._dirty_all()

    def _look_at_targets(self) -> None:
        """What is closed where its waypoint is missing hangs on which policies there are for it."""
        for target in self.policies.moved_targets():
            if target.kind != SERVICE:
                self._dirty_all()
                return
            owner = Owner(target.namespace, target.name.partition(".")[0])
            if self._find_service(owner) is not None:
                self._dirty_services[owner] = None

    def _dirty_all(self) -> None:
        for space, services in self._services.items():
            self._dirty_services.update(dict.fromkeys(Owner(space, name) for name in services))
        for space, pods in self._pods.items():
            self._dirty_pods.update(dict.fromkeys(Owner(space, name) for name in pods))

    def _pod_entry(self, name: str, pod: Pod | None) -> tuple[Entry | None, list[Problem]]:
        if pod is None or not translate.is_workload(pod):
            return None, []
        owner = Owner(pod.namespace, pod.name)
        addresses, problems = translate.parse_addresses(pod)
        if not pod.spec.host_network:
            addresses = self._granted(pod, owner, addresses, self._pod_claims, problems)
        if not addresses:
            return None, problems
        services = self._selectors.of(pod)
        node = self._nodes.get(pod.spec.node_name)
        assigned = self.waypoints.of_pod(pod)
        if assigned.problem is not None:
            problems.append(assigned.problem)
        workload = translate.workload(
            pod, services, node, addresses, self.settings, self.policies.names_of(pod), assigned.gateway
        )
        reached = () if pod.spec.host_network else addresses
        for service, ports in self._slices.ports_of(owner, reached, self._find_service).items():
            if ports and (key := translate.service_key(*service)) not in workload.services:
                workload.services[key].CopyFrom(PortList(ports=ports))
        # The address of a host network pod is its node's: shared, so no name of this one.
        aliases = () if pod.spec.host_network else self._aliases(addresses)
        return entry(
            name, Address(workload=workload), ADDRESS_TYPE, aliases, tuple(workload.services)
        ), problems

    def _service_entry(self, name: str, service: Service | None) -> tuple[Entry | None, list[Problem]]:
        if service is None:
            return None, []
        if not translate.is_service(service):
            return None, [_alias(service)]
        addresses, problems = translate.parse_addresses(service)
        owner = Owner(service.namespace, service.name)
        addresses = self._granted(service, owner, addresses, self._service_claims, problems)
        assigned = self.waypoints.of_service(service)
        if assigned.problem is not None:
            problems.append(assigned.problem)
        message, more = translate.service(service, addresses, self.settings, assigned.gateway)
        return entry(name, Address(service=message), ADDRESS_TYPE, self._aliases(addresses)), problems + more

    def _granted(
        self,
        obj: Object,
        owner: Owner,
        addresses: tuple[bytes, ...],
        claims: AddressClaims,
        problems: list[Problem],
    ) -> tuple[bytes, ...]:
        """Those of the addresses that no other object has a better claim to; adds a problem for each lost one."""
        granted = []
        for address in addresses:
            holder = claims.holder(address)
            if holder == owner or holder is None:
                granted.append(address)
                continue
            text = translate.address_key(address, self.settings).rpartition("/")[2]
            problems.append(
                Problem(
                    obj.ref,
                    "",
                    f"address {text} is already that of {obj.KIND} {holder.namespace}/{holder.name}, which keeps it",
                    "give this one an address of its own",
                )
            )
        return tuple(granted)

    def _aliases(self, addresses: tuple[bytes, ...]) -> tuple[str, ...]:
        return tuple(translate.address_key(address, self.settings) for address in addresses)

    def _note_problems(
        self, ref: str, problems: list[Problem], appeared: list[Problem], solved: list[Problem]
    ) -> None:
        old = self._problems.pop(ref, ())
        if problems:
            self._problems[ref] = tuple(problems)
        appeared.extend(problem for problem in problems if problem not in old)
        solved.extend(problem for problem in old if problem not in problems)


def _endpoints_differ(old: Service, new: Service) -> bool:
    """Whether the change of a Service can change the workloads it selects."""
    return (old.spec.selector, old.spec.ports, old.spec.type) != (
        new.spec.selector,
        new.spec.ports,
        new.spec.type,
    )


def _same_marks(old: Namespace, new: Namespace) -> bool:
    """Whether a namespace says the same of what is in it."""
    return (old.metadata.labels, old.metadata.annotations) == (new.metadata.labels, new.metadata.annotations)


def _alias(service: Service) -> Problem:
    return Problem(
        service.ref,
        "",
        "is an ExternalName, a DNS alias only, so the mesh has no such Service",
        f"nothing to do: its clients reach {service.spec.external_name} as they reach any host outside",
        "warning",
    )


def _untranslatable(ref: str, error: Exception) -> Problem:
    """Whatever one object holds, the others are served: the last resort behind the checks that name a field."""
    logger.error("cannot translate an object", exc_info=error, extra=fields(object=ref))
    return Problem(
        ref,
        "",
        f"cannot be translated, so the mesh does not see it: {error}",
        "compare it with a similar one",
    )
