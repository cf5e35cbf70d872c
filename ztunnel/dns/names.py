"""Which services a name means to a pod, and their addresses. Pure.

The rules are Istio's: a service is known under its hostname, under what Kubernetes' short forms of it expand to
(`web`, `web.shop`, `web.shop.svc`), and under any of these with one of the pod's search domains at its end, as a
resolver asks that tries its search list first. The last are answered with an alias (CNAME) of the name without the
search domain, so that the search ends with the first query and not with the fourth.
"""

import random
from collections.abc import Iterator
from typing import Final, NamedTuple

from ztunnel.dns.packets import HEADER, A
from ztunnel.mesh.model import Service
from ztunnel.mesh.state import MeshState

CLUSTER_DOMAIN: Final = "cluster.local"


class Found(NamedTuple):
    """The addresses of the type asked for, in random order, none if the name has none of that type.

    `cut` and `zone` are offsets in the query's message: where the search domain begins that was taken off (0: none),
    and the name that the answer's authority belongs to.
    """

    addresses: list[bytes]
    cut: int
    zone: int


def lookup(
    state: MeshState, namespace: str, network: str, name: str, qtype: int, domain: str = CLUSTER_DOMAIN
) -> Found | None:
    """What the mesh says of `name` (as in a Query) to a pod of a namespace and a network; None: others must say.

    That is any name of no service that the pod may see, and a service whose addresses only others know: one without
    virtual addresses outside of the cluster's domain, and a headless one of which no ready endpoint is known (it may
    have ports that a mesh of TCP tunnels does not carry).
    """
    for alias, taken in _aliases(name, namespace, domain):
        for candidate in _wildcards(alias):
            service = _choose(state.services_by_hostname(candidate), namespace, domain)
            if service is None:
                continue
            addresses = _addresses(state, service, network)
            if addresses is None:
                return None
            size = 4 if qtype == A else 16
            wanted = [ip for ip in addresses if len(ip) == size]
            if len(wanted) > 1:
                random.shuffle(wanted)
            cut = HEADER + len(name) - taken + 1 if taken and candidate is alias else 0
            zone = HEADER + len(name) - len(domain) if name.endswith("." + domain) else HEADER
            return Found(wanted, cut, zone)
    return None


def _aliases(name: str, namespace: str, domain: str) -> Iterator[tuple[str, int]]:
    """The names that may be meant, the likeliest first, with how many characters were taken off the end of `name`."""
    yield name, 0
    for expanded in _expanded(name, namespace, domain):
        yield expanded, 0
    for search in (f".{namespace}.svc.{domain}", f".svc.{domain}", f".{domain}"):
        if name.endswith(search):
            short = name[: -len(search)]
            yield short, len(search)
            for expanded in _expanded(short, namespace, domain):
                yield expanded, len(search)


def _expanded(name: str, namespace: str, domain: str) -> tuple[str, ...]:
    """The Service's full name that a short form stands for."""
    dots = name.count(".")
    if dots == 0:
        return (f"{name}.{namespace}.svc.{domain}",) if name else ()
    if dots == 1:
        return (f"{name}.svc.{domain}",)
    if dots == 2 and name.endswith(".svc"):
        return (f"{name}.{domain}",)
    return ()


def _wildcards(name: str) -> Iterator[str]:
    """The name itself, then the wildcards that cover it, from narrow to wide."""
    yield name
    dot = name.find(".")
    while dot >= 0:
        yield f"*{name[dot:]}"
        dot = name.find(".", dot + 1)


def _choose(services: tuple[Service, ...], namespace: str, domain: str) -> Service | None:
    """Of several services of one name: the pod's namespace's, else the one that owns the name, else the first."""
    best = None
    for service in services:
        if not service.vips and not service.hostname.endswith(f".svc.{domain}"):
            continue
        if service.namespace == namespace:
            return service
        if not service.namespace_only and (best is None or (service.canonical and not best.canonical)):
            best = service
    return best


def _addresses(state: MeshState, service: Service, network: str) -> list[bytes] | None:
    """The service's virtual addresses; of a headless one those of its ready endpoints, None if there are none."""
    if service.vips:
        return [ip for of, ip in service.vips if of == network and service.ip_families.accepts(ip)]
    found: dict[bytes, None] = {}
    for workload in state.endpoints(service.key):
        if (workload.healthy or service.load_balancing.allow_unhealthy) and workload.network == network:
            families: dict[int, bytes] = {}
            for ip in workload.addresses:
                if service.ip_families.accepts(ip):
                    families.setdefault(len(ip), ip)
            found.update(dict.fromkeys(families.values()))
    return list(found) or None
