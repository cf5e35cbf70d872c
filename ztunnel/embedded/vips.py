"""The virtual addresses of Services: as written, as they were before, else new ones. Pure; no I/O.

Both families unless the Service says otherwise (ipFamilies, ipFamilyPolicy: SingleStack, or an address given). Of two
Services that want one address, the one that has it keeps it, else the first by name; the other is left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address

import msgspec

from ztunnel.embedded.addresses import CLUSTER_NETWORKS, DNS_VIP, node_address4, node_address6
from ztunnel.embedded.findings import Finding
from ztunnel.embedded.ipam import Address, Exhausted, ServiceAddresses
from ztunnel.store.models import IPFamily, Key, Service

_NODES = (node_address4(1).network, node_address6(1).network)
_PODS = CLUSTER_NETWORKS[:2]


def resolve(
    services: Iterable[Service], current: Mapping[Key, Service]
) -> tuple[list[Service], list[Finding]]:
    """The Services with their addresses written out, and those that cannot have theirs.

    `current` are the Services as resolved before. A Service whose change cannot be met stays as it was, unless its
    old addresses have become another's at the same time.
    """
    wanted = {service.key: service for service in services}
    given = {key: _given(service) for key, service in wanted.items()}
    owners: dict[Address, Key] = {}
    findings: dict[Key, Finding] = {}
    resolved: dict[Key, Service] = {}
    pool = ServiceAddresses()

    def claim(key: Key, addresses: Sequence[Address]) -> None:
        owners.update(dict.fromkeys(addresses, key))
        pool.keep(addresses)

    kept = {key: _kept(service, given[key], current.get(key)) for key, service in wanted.items()}
    for key in sorted(wanted):
        # What somebody else has from before him (a damaged state directory) is as if he had nothing.
        kept[key] = [address for address in kept[key] if address not in owners]
        claim(key, kept[key])
    for key in sorted(wanted):
        for address in given[key]:
            if finding := _refused(wanted[key], address, owners.get(address)):
                findings[key] = finding
                before = _addresses(current[key].addresses) if key in current else []
                if key in current and all(owners.get(held, key) == key for held in before):
                    claim(key, before)
                    resolved[key] = current[key]
                break
        else:
            claim(key, given[key])
    for key, service in sorted(wanted.items()):
        if key in findings:
            continue
        try:
            resolved[key] = _written(service, given[key], kept[key], pool)
        except Exhausted as error:
            findings[key] = Finding(key, f"no address: {error}", "remove Services that are not needed")
    return list(resolved.values()), list(findings.values())


def families(service: Service) -> list[IPFamily]:
    """The IP families of a Service, the first being that of its clusterIP."""
    spec = service.spec
    given = [_family(address) for address in _given(service)]
    chosen = list(spec.ip_families) or given or ["IPv4"]
    both = spec.ip_family_policy in ("PreferDualStack", "RequireDualStack") or (
        not spec.ip_family_policy and not spec.ip_families and not given
    )
    if both and len(chosen) == 1:
        chosen.append("IPv6" if chosen[0] == "IPv4" else "IPv4")
    return chosen if spec.ip_family_policy != "SingleStack" else chosen[:1]


def _given(service: Service) -> list[Address]:
    """The addresses that the user has written."""
    return _addresses(service.addresses)


def _addresses(texts: Iterable[str]) -> list[Address]:
    return [ip_address(text) for text in texts]


def _family(address: Address) -> IPFamily:
    return "IPv4" if address.version == 4 else "IPv6"


def _kept(service: Service, given: list[Address], current: Service | None) -> list[Address]:
    """The addresses from before that the Service still wants: of its families, one each, none against its word."""
    if current is None or service.headless or service.spec.type == "ExternalName":
        return []
    open_families = set(families(service)) - {_family(address) for address in given}
    return [
        address
        for address in _addresses(current.addresses)
        if address in given or _family(address) in open_families
    ]


def _refused(service: Service, address: Address, owner: Key | None) -> Finding | None:
    key = service.key
    remedy = "choose another clusterIP, or leave it out to be given one"
    if owner is not None and owner != key:
        return Finding(key, f"clusterIP {address} is the address of {owner}", remedy)
    if str(address) == DNS_VIP:
        return Finding(key, f"clusterIP {address} is the cluster's DNS", remedy)
    if any(address in network for network in _NODES):
        return Finding(key, f"clusterIP {address} is in the range of nodes", remedy)
    if any(address in network for network in _PODS):
        return Finding(key, f"clusterIP {address} is in the range of pods", remedy)
    if _family(address) not in families(service):
        names = ", ".join(families(service))
        return Finding(key, f"clusterIP {address} does not fit ipFamilies ({names})", "make the two agree")
    return None


def _written(service: Service, given: list[Address], kept: list[Address], pool: ServiceAddresses) -> Service:
    """The Service with addresses and families in its spec."""
    spec = service.spec
    if spec.type == "ExternalName":
        return service
    wanted = families(service)
    policy = spec.ip_family_policy or ("SingleStack" if len(wanted) == 1 else "PreferDualStack")
    if service.headless:
        texts = ["None"]
    else:
        have: dict[str, str] = {}
        for address in [*kept, *given]:
            have[_family(address)] = str(address)
        missing = [family for family in wanted if family not in have]
        if missing:
            fresh = pool.take(f"{service.namespace}/{service.name}", missing)
            have |= {family: str(address) for family, address in zip(missing, fresh, strict=True)}
        # As the user wrote them, where he did.
        written = {str(ip_address(text)): text for text in service.addresses}
        texts = [written.get(have[family], have[family]) for family in wanted]
    return msgspec.structs.replace(
        service,
        spec=msgspec.structs.replace(
            spec, cluster_ip=texts[0], cluster_ips=texts, ip_families=wanted, ip_family_policy=policy
        ),
    )
