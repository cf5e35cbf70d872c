"""The one copy of the mesh that a node holds: workloads, services, and who an address belongs to.

Rule: an upsert leaves every index consistent and says what it may have changed; lookups are O(1) and never fail.
Workloads and services may come in any order: an endpoint waits for its service.

100,000 workloads and 10,000 services take 2.3 s to decode and index and about 1 KB of memory a workload (2 cores,
CPython 3.11): tests/xds/measure_push.py measures it.
"""

from collections.abc import Callable, Collection
from typing import Final, Generic, NamedTuple, TypeVar

from ztunnel.mesh.model import Service, Workload, address_tag, ip_text, service_tag

T = TypeVar("T")

NOTHING: Final[frozenset[str]] = frozenset()


class VipConflict(NamedTuple):
    """Several services claim one virtual IP; `holder` and `others` are service keys."""

    network: str
    ip: bytes
    holder: str
    others: tuple[str, ...]

    def __str__(self) -> str:
        others = ", ".join(self.others)
        return (
            f"Service {self.holder}: addresses: {ip_text(self.ip)} is also claimed by {others}; connections go to "
            f"{self.holder}: give each Service an address of its own"
        )


class MeshState:
    """Workloads and services with their indexes. Not for several threads."""

    def __init__(self, node: str = "") -> None:
        """`node` is the name of this node, whose workloads can be found by name; "" if nobody will ask."""
        self._workloads: dict[str, Workload] = {}
        self._services: dict[str, Service] = {}
        self._hostnames: dict[str, tuple[Service, ...]] = {}
        # Of services too that are not (yet) known: service key, then workload uid.
        self._endpoints: dict[str, dict[str, Workload]] = {}
        self._addresses: _AddressIndex[Workload] = _AddressIndex(_workload_rank, newest=True)
        self._vips: _AddressIndex[Service] = _AddressIndex(_service_rank, newest=False)
        self._node = node
        self._local: dict[tuple[str, str], Workload] = {}
        self.local_changes = 0
        """Counts the changes of this node's own workloads."""

    def upsert_workload(self, workload: Workload) -> frozenset[str]:
        """Add a workload or replace the one of its uid. Returns the tags whose routes may have changed."""
        old = self._workloads.get(workload.uid)
        if old == workload:
            return NOTHING
        # Replaced in place, not removed and added: an endpoint keeps its position, an address its owner.
        self._workloads[workload.uid] = workload
        self._index_workload(old, workload)
        return _workload_tags(workload) if old is None else _workload_tags(old) | _workload_tags(workload)

    def upsert_service(self, service: Service) -> frozenset[str]:
        """Add a service or replace the one of its key. Returns the tags whose routes may have changed."""
        key = service.key
        old = self._services.get(key)
        if old == service:
            return NOTHING
        self._services[key] = service
        self._index_hostname(service.hostname, old, service)
        self._vips.replace(old, old.vips if old else (), service, service.vips)
        return _service_tags(key, service) if old is None else _service_tags(key, service, old)

    def remove(self, resource_name: str) -> frozenset[str]:
        """Forget the workload of this uid or the service of this key, if known. Returns the tags as above."""
        workload = self._workloads.pop(resource_name, None)
        if workload is not None:
            self._index_workload(workload, None)
            return _workload_tags(workload)
        service = self._services.pop(resource_name, None)
        if service is not None:
            self._index_hostname(service.hostname, service, None)
            self._vips.replace(service, service.vips, None, ())
            return _service_tags(resource_name, service)
        return NOTHING

    def workload_by_uid(self, uid: str) -> Workload | None:
        """The workload of this uid."""
        return self._workloads.get(uid)

    def local_workload(self, namespace: str, name: str) -> Workload | None:
        """The workload of this name that is on this node."""
        return self._local.get((namespace, name))

    def workload_by_address(self, network: str, ip: bytes) -> Workload | None:
        """The workload that owns a packed address; never one of the host network, whose address is its node's.

        Where several claim the address, a pod comes before anything else, then one that takes tunnels, then the
        newest: the likeliest truth while an address passes from one pod to the next.
        """
        return self._addresses.get(network, ip)

    def service_by_vip(self, network: str, ip: bytes) -> Service | None:
        """The service behind a packed virtual IP. Of several a canonical one, else the first to claim it."""
        return self._vips.get(network, ip)

    def service(self, key: str) -> Service | None:
        """The service of key "namespace/hostname"."""
        return self._services.get(key)

    def services_by_hostname(self, hostname: str) -> tuple[Service, ...]:
        """The services of this name (lower case; `*.example.com` is a name too), in order of arrival."""
        return self._hostnames.get(hostname, ())

    def endpoints(self, key: str) -> Collection[Workload]:
        """The workloads, healthy or not, that list the service "namespace/hostname", in order of arrival."""
        found = self._endpoints.get(key)
        return found.values() if found is not None else ()

    def workloads(self) -> Collection[Workload]:
        """All workloads (a view: copy it before you wait for anything)."""
        return self._workloads.values()

    def services(self) -> Collection[Service]:
        """All services (a view: copy it before you wait for anything)."""
        return self._services.values()

    @property
    def workload_count(self) -> int:
        """How many workloads there are."""
        return len(self._workloads)

    @property
    def service_count(self) -> int:
        """How many services there are."""
        return len(self._services)

    def conflicts(self) -> list[VipConflict]:
        """The virtual IPs that more than one service claims; the text of each is for operators."""
        found: list[VipConflict] = []
        for (network, ip), claimants in self._vips.contested.items():
            holder = self._vips.get(network, ip)
            others = tuple(service.key for service in claimants if service is not holder)
            found.append(VipConflict(network, ip, holder.key if holder else "", others))
        return found

    def _index_hostname(self, hostname: str, old: Service | None, new: Service | None) -> None:
        """`old` and `new` are two versions of one service, so of one hostname."""
        name = hostname.lower()
        services = [new if service is old else service for service in self._hostnames.get(name, ())]
        if old is None:
            services.append(new)
        left = tuple(service for service in services if service is not None)
        if left:
            self._hostnames[name] = left
        else:
            del self._hostnames[name]

    def _index_workload(self, old: Workload | None, new: Workload | None) -> None:
        if self._node:
            self._index_local(old, new)
        self._addresses.replace(old, _owned(old), new, _owned(new))
        if old is not None:
            for key in old.services:
                if new is None or key not in new.services:
                    endpoints = self._endpoints[key]
                    del endpoints[old.uid]
                    if not endpoints:
                        del self._endpoints[key]
        if new is not None:
            for key in new.services:
                self._endpoints.setdefault(key, {})[new.uid] = new

    def _index_local(self, old: Workload | None, new: Workload | None) -> None:
        node = self._node
        if old is not None and old.node == node:
            self.local_changes += 1
            if self._local.get((old.namespace, old.name)) is old:
                del self._local[old.namespace, old.name]
        if new is not None and new.node == node:
            self.local_changes += 1
            self._local[new.namespace, new.name] = new


class _AddressIndex(Generic[T]):
    """(network, packed address) -> the one who holds it, of those who claim it.

    Nearly every address has one claimant, so only contested ones keep a list (in order of arrival). A dict per
    network saves a tuple per address: 64 bytes, 6 MB of 100,000.
    """

    def __init__(self, rank: Callable[[T], int], *, newest: bool) -> None:
        self.contested: dict[tuple[str, bytes], list[T]] = {}
        self._holders: dict[str, dict[bytes, T]] = {}
        self._rank = rank
        self._newest = newest

    def get(self, network: str, ip: bytes) -> T | None:
        of_network = self._holders.get(network)
        return of_network.get(ip) if of_network is not None else None

    def replace(
        self,
        old: T | None,
        old_addresses: Collection[tuple[str, bytes]],
        new: T | None,
        new_addresses: Collection[tuple[str, bytes]],
    ) -> None:
        """Let `new` claim its addresses, and `old` (its former value) no more; a claim in both keeps its place."""
        if old is not None:
            # dict.fromkeys: a message may name one address twice.
            for address in dict.fromkeys(old_addresses):
                if new is not None and address in new_addresses:
                    self._swap(address, old, new)
                else:
                    self._withdraw(address, old)
        if new is not None:
            for address in dict.fromkeys(new_addresses):
                if address not in old_addresses:
                    self._claim(address, new)

    def _claim(self, address: tuple[str, bytes], claimant: T) -> None:
        network, ip = address
        holders = self._holders.setdefault(network, {})
        holder = holders.setdefault(ip, claimant)
        if holder is not claimant:
            self.contested.setdefault(address, [holder]).append(claimant)
            self._elect(address)

    def _swap(self, address: tuple[str, bytes], old: T, new: T) -> None:
        claimants = self.contested.get(address)
        if claimants is None:
            self._holders[address[0]][address[1]] = new
        else:
            claimants[_position(claimants, old)] = new
            self._elect(address)

    def _withdraw(self, address: tuple[str, bytes], claimant: T) -> None:
        network, ip = address
        claimants = self.contested.get(address)
        if claimants is None:
            holders = self._holders[network]
            del holders[ip]
            if not holders:
                del self._holders[network]
            return
        del claimants[_position(claimants, claimant)]
        self._elect(address)
        if len(claimants) == 1:
            del self.contested[address]

    def _elect(self, address: tuple[str, bytes]) -> None:
        claimants = self.contested[address]
        # max() takes the first of equals.
        best = max(reversed(claimants) if self._newest else claimants, key=self._rank)
        self._holders[address[0]][address[1]] = best


def _position(claimants: list[T], claimant: T) -> int:
    """Where this very object is in the list (equal ones are others)."""
    return next(index for index, other in enumerate(claimants) if other is claimant)


def _owned(workload: Workload | None) -> list[tuple[str, bytes]]:
    if workload is None or workload.host_network:
        return []
    return [(workload.network, ip) for ip in workload.addresses]


def _workload_rank(workload: Workload) -> int:
    # A pod's address comes from the node that runs it; others (ServiceEntry, EndpointSlice) are what users write.
    return 2 * ("//Pod/" in workload.uid or "//v1/Pod/" in workload.uid) + workload.hbone


def _service_rank(service: Service) -> int:
    return int(service.canonical)


def _workload_tags(workload: Workload) -> frozenset[str]:
    tags = [address_tag(workload.network, ip) for ip in workload.addresses]
    tags += [service_tag(key) for key in workload.services]
    return frozenset(tags)


def _service_tags(key: str, *versions: Service) -> frozenset[str]:
    tags = {service_tag(key)}
    for service in versions:
        tags.update(address_tag(network, ip) for network, ip in service.vips)
    return frozenset(tags)
