"""What the cluster's DNS says: a query's bytes and the cluster's objects in, the answer's bytes out. No I/O.

Names are those of the Kubernetes DNS specification (version 1.1.0):

    SERVICE.NAMESPACE.svc.cluster.local            A, AAAA: its addresses; headless: its ready pods'
    HOSTNAME.SERVICE.NAMESPACE.svc.cluster.local   A, AAAA of one pod of a headless Service
    _PORT._PROTOCOL.SERVICE.NAMESPACE.svc...       SRV of a named port
    10-244-1-2.NAMESPACE.pod.cluster.local         A: the address in the name
    4.3.2.1.in-addr.arpa, ...ip6.arpa              PTR of a Service's address
"""

import random
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from dnslib import AAAA, CNAME, EDNS0, PTR, QTYPE, RCODE, RR, SOA, SRV, A, DNSRecord
from dnslib.dns import DNSError

from ztunnel.embedded.addresses import CLUSTER_NETWORKS
from ztunnel.embedded.endpoints import serving, target_port
from ztunnel.embedded.view import View
from ztunnel.store.models import Pod, Service, key_of

ZONE = "cluster.local"
TTL = 5
PLAIN_UDP_SIZE = 512


class Reply(NamedTuple):
    """What to do with a query: send `data` back, or ask the host's resolvers if `forward`."""

    data: bytes
    forward: bool = False


def reply(view: View, query: bytes, size: int | None = PLAIN_UDP_SIZE) -> Reply | None:
    """Answer a query; None for what is no query at all, which deserves no answer.

    `size` is how large a UDP answer may be unless the query allows more; None for TCP. Where the name is not
    the cluster's, `forward` is set and `data` is the answer in case nobody else knows.
    """
    try:
        asked = DNSRecord.parse(query)
    except (DNSError, ValueError, IndexError):
        return _malformed(query)
    if asked.header.qr:
        return None
    answer = asked.reply(ra=1, aa=1)
    if asked.header.opcode != 0:
        answer.header.rcode = RCODE.NOTIMP
        return Reply(answer.pack())
    if len(asked.questions) != 1:
        answer.header.rcode = RCODE.FORMERR
        return Reply(answer.pack())
    allowed = [record.edns_len for record in asked.ar if record.rtype == QTYPE.OPT]
    if allowed:
        answer.add_ar(EDNS0(udp_len=1232))
        size = size and max(size, min(allowed[0], 1232))
    name = ".".join(label.decode("ascii", "replace") for label in asked.q.qname.label).lower()
    if not owned(name):
        answer.header.aa = 0
        answer.header.rcode = RCODE.SERVFAIL
        return Reply(answer.pack(), forward=True)
    _fill(view, name, asked, answer)
    data = answer.pack()
    if size is not None and len(data) > size:
        data = answer.truncate().pack()
    return Reply(bytes(data))


def _malformed(query: bytes) -> Reply | None:
    if len(query) < 12 or query[2] & 0x80:
        return None
    header = query[:2] + bytes([0x80 | query[2] & 0x79, 0x80 | RCODE.FORMERR])
    return Reply(header + bytes(8))


def _fill(view: View, name: str, asked: DNSRecord, answer: DNSRecord) -> None:
    found = lookup(view, name)
    if found is None:
        answer.header.rcode = RCODE.NXDOMAIN
    else:
        wanted = [r for r in found if asked.q.qtype in (r.rtype, QTYPE.ANY) or r.rtype == QTYPE.CNAME]
        random.shuffle(wanted)  # clients take the first
        for record in wanted:
            record.rname = asked.q.qname
            answer.add_answer(record)
    if not answer.rr:
        times = (1, 7200, 1800, 86400, TTL)
        authority = SOA(f"ns.dns.{ZONE}", f"hostmaster.{ZONE}", times)
        answer.add_auth(RR(ZONE, QTYPE.SOA, ttl=TTL, rdata=authority))


def owned(name: str) -> bool:
    """Whether the cluster is who answers for this name (lower case, no dot at its end)."""
    return name == ZONE or name.endswith("." + ZONE) or _reversed(name) is not None


def lookup(view: View, name: str) -> list[RR] | None:
    """The records of a name that is `owned`, of every type; [] if it exists without any; None if not."""
    address = _reversed(name)
    if address is not None:
        return _pointer(view, address)
    labels = name.removesuffix(ZONE).rstrip(".").split(".")
    match labels:
        case [""] | ["svc"] | ["pod"] | ["dns"] | ["ns", "dns"]:
            return []
        case [namespace, "svc"] | [namespace, "pod"]:
            return [] if namespace in view.namespaces else None
        case [dashed, namespace, "pod"]:
            return _dashed(dashed) if namespace in view.namespaces else None
        case [*rest, service_name, namespace, "svc"]:
            service = view.services.get(key_of(Service, namespace, service_name))
            return _service(view, service, rest) if service else None
    return None


def _service(view: View, service: Service, rest: list[str]) -> list[RR] | None:
    if service.spec.type == "ExternalName":
        return None if rest else [_record(QTYPE.CNAME, CNAME(service.spec.external_name))]
    pods = serving(service, view.pods.values()) if service.headless else []
    match rest:
        case []:
            addresses = service.addresses or [a for pod in pods for a in pod.addresses]
            return [address_record(address) for address in addresses]
        case [port, protocol] if port.startswith("_") and protocol in ("_tcp", "_udp"):
            return _ports(service, pods, port[1:], protocol[1:].upper())
        case [protocol] if protocol in ("_tcp", "_udp"):
            return []
        case [hostname]:
            found = [a for pod in pods for a in pod.addresses if hostname in _hostnames(service, pod, a)]
            return [address_record(address) for address in found] or None
    return None


def _hostnames(service: Service, pod: Pod, address: str) -> list[str]:
    """What a pod of a headless Service is called within it; the first is what SRV records name."""
    own = [pod.spec.hostname] if pod.spec.hostname and pod.spec.subdomain == service.name else []
    return [*own, address.replace(".", "-").replace(":", "-")]


def _ports(service: Service, pods: list[Pod], name: str, protocol: str) -> list[RR] | None:
    host = f"{service.name}.{service.namespace}.svc.{ZONE}"
    found = []
    for port in service.spec.ports:
        if port.name != name or port.protocol != protocol:
            continue
        if not service.headless:
            found.append(_record(QTYPE.SRV, SRV(0, 100, port.port, host)))
        for pod in pods:
            number = target_port(port, pod)
            for address in pod.addresses if number is not None else ():
                target = f"{_hostnames(service, pod, address)[0]}.{host}"
                found.append(_record(QTYPE.SRV, SRV(0, 100, number, target)))
    known = any(port.name == name and port.protocol == protocol for port in service.spec.ports)
    return found if known else None


def _dashed(text: str) -> list[RR] | None:
    for separator in ".", ":":
        try:
            return [address_record(str(ip_address(text.replace("-", separator))))]
        except ValueError:
            continue
    return None


def _pointer(view: View, address: IPv4Address | IPv6Address) -> list[RR] | None:
    text = str(address)
    for service in view.services.values():
        if text in (str(ip_address(own)) for own in service.addresses):
            return [_record(QTYPE.PTR, PTR(f"{service.name}.{service.namespace}.svc.{ZONE}"))]
    return None


def _reversed(name: str) -> IPv4Address | IPv6Address | None:
    """The address a reverse name stands for, if it lies in a range of the cluster's."""
    address: IPv4Address | IPv6Address
    try:
        if name.endswith(".in-addr.arpa"):
            address = IPv4Address(".".join(reversed(name.removesuffix(".in-addr.arpa").split("."))))
        elif name.endswith(".ip6.arpa"):
            digits = "".join(reversed(name.removesuffix(".ip6.arpa").split(".")))
            address = IPv6Address(int(digits, 16)) if len(digits) == 32 else IPv6Address("::")
        else:
            return None
    except ValueError:
        return None
    return address if any(address in network for network in CLUSTER_NETWORKS) else None


def address_record(address: str) -> RR:
    """A or AAAA."""
    if ":" in address:
        return _record(QTYPE.AAAA, AAAA(address))
    return _record(QTYPE.A, A(address))


def _record(kind: int, data: object) -> RR:
    return RR(ZONE, kind, ttl=TTL, rdata=data)
