"""EndpointSlices: what stands behind Services that select no pods, and which pods they name beside that.

An endpoint that is a pod (it says so, or has a pod's address) adds the Service to that pod's workload, which knows
more. Any other becomes a workload of its own: an address outside of the mesh, spoken to in plaintext. The slices that
Kubernetes makes for Services with selectors need not be shown to the registry (see `store.endpointslice`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from ztunnel.controlplane import translate
from ztunnel.controlplane.claims import Owner
from ztunnel.controlplane.translate import Settings
from ztunnel.store.endpointslice import Endpoint, EndpointSlice
from ztunnel.store.models import Node, Service
from ztunnel.store.problems import Problem
from ztunnel.wire import workload_pb2 as pb

_T = TypeVar("_T")


class _Read(NamedTuple):
    """An endpoint with its addresses packed; `pod` is the one it says it is."""

    endpoint: Endpoint
    addresses: tuple[bytes, ...]
    pod: Owner | None


class _Known(NamedTuple):
    obj: EndpointSlice
    service: Owner
    endpoints: tuple[_Read, ...]
    problems: tuple[Problem, ...]


class EndpointSlices:
    """The slices, by what they are found by."""

    def __init__(self) -> None:
        self._slices: dict[Owner, _Known] = {}
        self._by_service: dict[Owner, set[Owner]] = defaultdict(set)
        self._by_pod: dict[Owner, set[Owner]] = defaultdict(set)
        self._by_address: dict[bytes, set[Owner]] = defaultdict(set)
        self.served: dict[Owner, frozenset[str]] = {}  # the names of the workloads that a slice was made into

    def change(self, owner: Owner, obj: EndpointSlice | None) -> tuple[set[Owner], set[bytes]]:
        """Take note of a slice (None: gone); the pods and the addresses that it names now or named before."""
        pods: set[Owner] = set()
        addresses: set[bytes] = set()
        for known, put in ((self._slices.pop(owner, None), False), (_read(obj), True)):
            if known is None:
                continue
            if put:
                self._slices[owner] = known
            _move(self._by_service, known.service, owner, put)
            for each in known.endpoints:
                if each.pod is not None:
                    pods.add(each.pod)
                    _move(self._by_pod, each.pod, owner, put)
                for address in each.addresses:
                    addresses.add(address)
                    _move(self._by_address, address, owner, put)
        return pods, addresses

    def of_service(self, service: Owner) -> Iterable[Owner]:
        """The slices of a Service."""
        return self._by_service.get(service, ())

    def at(self, addresses: Iterable[bytes]) -> Iterator[Owner]:
        """The slices that name any of the addresses."""
        for address in addresses:
            yield from self._by_address.get(address, ())

    def on(self, node: str) -> Iterator[Owner]:
        """The slices with endpoints on a node."""
        for owner, known in self._slices.items():
            if any(each.endpoint.node_name == node for each in known.endpoints):
                yield owner

    def pods_of(self, slice_: Owner) -> Iterator[Owner]:
        """The pods that a slice says its endpoints are."""
        known = self._slices.get(slice_)
        for each in known.endpoints if known is not None else ():
            if each.pod is not None:
                yield each.pod

    def addresses_of(self, slice_: Owner) -> Iterator[bytes]:
        """The addresses that a slice names."""
        known = self._slices.get(slice_)
        for each in known.endpoints if known is not None else ():
            yield from each.addresses

    def ports_of(
        self,
        pod: Owner,
        addresses: Iterable[bytes],
        find: Callable[[Owner], Service | None],
    ) -> dict[Owner, list[pb.Port]]:
        """The Services that slices add to a pod at these addresses, with the pod's ports behind theirs."""
        found: dict[Owner, list[pb.Port]] = {}
        for slice_ in sorted({*self._by_pod.get(pod, ()), *self.at(addresses)}):
            known = self._slices[slice_]
            service = find(known.service)
            if service is None or not translate.is_service(service):
                continue
            ports = found.setdefault(known.service, [])
            seen = {port.service_port for port in ports}
            ports += [port for port in _ports(known.obj, service) if port.service_port not in seen]
        return found

    def workloads(
        self,
        owner: Owner,
        find: Callable[[Owner], Service | None],
        holder: Callable[[bytes], Owner | None],
        nodes: Mapping[str, Node],
        settings: Settings,
    ) -> tuple[dict[str, pb.Workload], list[Problem]]:
        """The workloads that a slice stands for, by name: its endpoints that are no pods (`holder` of an address)."""
        known = self._slices.get(owner)
        if known is None:
            return {}, []
        problems = list(known.problems)
        service = find(known.service)
        if service is None or not translate.is_service(service):
            return {}, problems
        made: dict[str, pb.Workload] = {}
        ports = pb.PortList(ports=_ports(known.obj, service))
        for each in known.endpoints:
            outside = [address for address in each.addresses if holder(address) is None]
            if each.pod is not None or not outside:
                continue
            message = _workload(owner, each.endpoint, outside, nodes.get(each.endpoint.node_name), settings)
            message.services[translate.service_key(*known.service)].CopyFrom(ports)
            made.setdefault(message.uid, message)
        return made, problems


def uid(owner: Owner, address: bytes, settings: Settings) -> str:
    """The uid of the workload of an address in a slice: `CLUSTER/discovery.k8s.io/EndpointSlice/NS/NAME/ADDRESS`."""
    text = translate.address_key(address, settings).rpartition("/")[2]
    return f"{settings.cluster_id}/discovery.k8s.io/EndpointSlice/{owner.namespace}/{owner.name}/{text}"


def _read(obj: EndpointSlice | None) -> _Known | None:
    if obj is None or not obj.service:
        return None
    endpoints, problems = [], []
    if obj.address_type == "FQDN":
        problems.append(
            Problem(
                obj.ref,
                "",
                "addressType: FQDN is not supported, so its endpoints are left out",
                "write their addresses, with addressType IPv4 or IPv6",
                "warning",
            )
        )
    for index, endpoint in enumerate(obj.endpoints if obj.address_type != "FQDN" else ()):
        target = endpoint.target_ref
        pod = None
        if target is not None and target.kind == "Pod" and target.name:
            pod = Owner(target.namespace or obj.namespace, target.name)
        addresses = []
        for text in endpoint.addresses:
            try:
                addresses.append(translate.host_address(text))
            except ValueError as error:
                where = f"endpoints[{index}].addresses: {text!r} {error}, so it is left out"
                problems.append(Problem(obj.ref, "", where, "use one that others can reach"))
        endpoints.append(_Read(endpoint, tuple(addresses), pod))
    return _Known(obj, Owner(obj.namespace, obj.service), tuple(endpoints), tuple(problems))


def _ports(obj: EndpointSlice, service: Service) -> list[pb.Port]:
    """The Service's ports with the endpoints' own, which are found by the port's name."""
    targets = {port.name: port.port for port in obj.ports if port.protocol == "TCP"}
    return [
        pb.Port(
            service_port=port.port,
            target_port=targets[port.name] or port.port,
            app_protocol=translate.app_protocol(port),
        )
        for port in service.spec.ports
        if port.protocol == "TCP" and port.name in targets
    ]


def _workload(
    owner: Owner, endpoint: Endpoint, addresses: list[bytes], node: Node | None, settings: Settings
) -> pb.Workload:
    message = pb.Workload(
        uid=uid(owner, addresses[0], settings),
        name=owner.name,
        namespace=owner.namespace,
        addresses=addresses,
        network=settings.network,
        trust_domain=settings.trust_domain,
        node=endpoint.node_name,
        status=pb.HEALTHY if endpoint.ready else pb.UNHEALTHY,
        cluster_id=settings.cluster_id,
        # Nothing is known of whose the address is, and several slices may name it: it is no name of this workload.
        network_mode=pb.HOST_NETWORK,
    )
    translate.set_locality(message, node)
    return message


def _move(index: dict[_T, set[Owner]], key: _T, owner: Owner, put: bool) -> None:
    if put:
        index[key].add(owner)
        return
    index[key].discard(owner)
    if not index[key]:
        del index[key]
