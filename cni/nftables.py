"""nftables as data: the conditions and actions of rules as the kernel's expressions, and rules, chains, tables.

Pure: no sockets, no messages. Every statement that the redirection needs is a small function here that returns the
kernel's expressions for it (linux/netfilter/nf_tables.h), in the form pyroute2 encodes. Values that the kernel
keeps in host order (marks, zones) and in network order (addresses, ports) are told apart here and nowhere else.
"""

import ipaddress
import struct
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_IPV4, NFPROTO_IPV6, Cmp, Meta
from pyroute2.nftables.expressions import genex, verdict

Expression = dict[str, Any]
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

NF_ACCEPT = 1

REGISTER = 1  # one register is enough: every statement loads, changes and compares or stores one value
NETWORK_HEADER = 1
TRANSPORT_HEADER = 2
CT_MARK = 3
CT_ZONE = 17
PORT_GIVEN = "NF_NAT_RANGE_PROTO_SPECIFIED"
ADDRESS_GIVEN = "NF_NAT_RANGE_MAP_IPS"

PREROUTING = 0
OUTPUT = 3
POSTROUTING = 4
RAW = -300
MANGLE = -150
DSTNAT = -100
SRCNAT = 100

# What nft calls the types of keys (its own numbers, include/datatype.h); the kernel only keeps them.
TYPE_IPV4, TYPE_IPV6, TYPE_PORT = 7, 8, 13

TCP = 6
UDP = 17
_TCP_FLAGS_OFFSET = 13
_FIN_SYN_RST_ACK = 0x17
_SYN = 0x02


class Rule(NamedTuple):
    """One rule: a comment that says in words what it decides (shown by `nft list`), and its expressions."""

    comment: str
    expressions: tuple[Expression, ...]


class Chain(NamedTuple):
    """A base chain: its type (nat, route, filter), hook and priority, and its rules in order."""

    name: str
    kind: str
    hook: int
    priority: int
    rules: tuple[Rule, ...]


class SetElement(NamedTuple):
    """A member of a set; of one of intervals the first of an interval, or (`end`) the first after it."""

    key: bytes
    end: bool = False


class Set(NamedTuple):
    """A named set that rules look things up in. `key_type` is what `nft` prints its keys as."""

    name: str
    key_type: int
    key_length: int
    interval: bool
    elements: tuple[SetElement, ...]


class Table(NamedTuple):
    """A table of the inet family, which sees IPv4 and IPv6 alike."""

    name: str
    chains: tuple[Chain, ...]
    sets: tuple[Set, ...] = ()


# Sets.


def port_set(name: str, ports: Iterable[int]) -> Set:
    """A set of TCP or UDP ports."""
    return Set(name, TYPE_PORT, 2, False, tuple(SetElement(struct.pack("!H", port)) for port in ports))


def address_set(name: str, version: int, addresses: Iterable[IpAddress]) -> Set:
    """A set of single addresses of one IP version."""
    kind, length = (TYPE_IPV4, 4) if version == 4 else (TYPE_IPV6, 16)
    return Set(name, kind, length, False, tuple(SetElement(address.packed) for address in addresses))


def range_set(name: str, version: int, networks: Iterable[IpNetwork]) -> Set:
    """A set of address ranges of one IP version, which must not overlap or touch (collapse_addresses)."""
    length = 4 if version == 4 else 16
    elements = []
    for network in networks:
        elements.append(SetElement(network.network_address.packed))
        after = int(network.broadcast_address) + 1
        if after < 1 << 8 * length:
            elements.append(SetElement(after.to_bytes(length, "big"), end=True))
    return Set(name, TYPE_IPV4 if version == 4 else TYPE_IPV6, length, True, tuple(elements))


# Statements. Each returns the expressions for one condition or action.


def _expression(name: str, **parts: Any) -> Expression:
    return genex(name, parts)  # type: ignore[no-any-return]


def _host(value: int, size: int) -> bytes:
    return value.to_bytes(size, sys.byteorder)


def _data(value: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", value)]}


def _compare(value: bytes, *, equal: bool = True) -> Expression:
    operator = Cmp.NFT_CMP_EQ if equal else Cmp.NFT_CMP_NEQ
    return _expression("cmp", sreg=REGISTER, op=int(operator), data=_data(value))


def _meta(key: Meta) -> Expression:
    return _expression("meta", key=int(key), dreg=REGISTER)


def _payload(base: int, offset: int, length: int) -> Expression:
    return _expression("payload", dreg=REGISTER, base=base, offset=offset, len=length)


def _bitwise(mask: bytes, flip: bytes) -> Expression:
    """(register & mask) ^ flip."""
    parts = {"len": len(mask), "op": 0, "mask": _data(mask), "xor": _data(flip)}
    return _expression("bitwise", sreg=REGISTER, dreg=REGISTER, **parts)


def _lookup(name: str) -> Expression:
    return _expression("lookup", set=name, sreg=REGISTER, flags=set())


def protocol(number: int) -> list[Expression]:
    """`meta l4proto` is this transport protocol (TCP, UDP)."""
    return [_meta(Meta.NFT_META_L4PROTO), _compare(bytes([number]))]


def destination_port(port: int, *, equal: bool = True) -> list[Expression]:
    """The TCP or UDP destination port is (or is not) `port`; after `protocol`."""
    return [_payload(TRANSPORT_HEADER, 2, 2), _compare(struct.pack("!H", port), equal=equal)]


def source_port(port: int) -> list[Expression]:
    """The TCP or UDP source port is `port`; after `protocol`."""
    return [_payload(TRANSPORT_HEADER, 0, 2), _compare(struct.pack("!H", port))]


def destination_port_in(name: str) -> list[Expression]:
    """The TCP or UDP destination port is in the set of this name; after `protocol`."""
    return [_payload(TRANSPORT_HEADER, 2, 2), _lookup(name)]


def destination_in(name: str, version: int) -> list[Expression]:
    """The packet is of this IP version and its destination in the set of this name."""
    loopback = ipaddress.ip_address("127.0.0.1" if version == 4 else "::1")
    offset, length = (16, 4) if version == 4 else (24, 16)
    return [*family(loopback), _payload(NETWORK_HEADER, offset, length), _lookup(name)]


def first_packet() -> list[Expression]:
    """The packet opens a TCP connection: of the flags FIN, SYN, RST and ACK only SYN is set."""
    return [
        _payload(TRANSPORT_HEADER, _TCP_FLAGS_OFFSET, 1),
        _bitwise(bytes([_FIN_SYN_RST_ACK]), b"\0"),
        _compare(bytes([_SYN])),
    ]


def family(address: IpAddress) -> list[Expression]:
    """The packet is of the address's IP version."""
    version = NFPROTO_IPV4 if address.version == 4 else NFPROTO_IPV6
    return [_meta(Meta.NFT_META_NFPROTO), _compare(bytes([version]))]


def source(address: IpAddress) -> list[Expression]:
    """The packet's source is `address`; includes the check of the IP version."""
    offset = 12 if address.version == 4 else 8
    return [*family(address), _payload(NETWORK_HEADER, offset, len(address.packed)), _compare(address.packed)]


def destination(address: IpAddress) -> list[Expression]:
    """The packet's destination is `address`; includes the check of the IP version."""
    offset = 16 if address.version == 4 else 24
    return [*family(address), _payload(NETWORK_HEADER, offset, len(address.packed)), _compare(address.packed)]


def not_to_loopback(version: int) -> list[Expression]:
    """The packet is IPv4 and not for 127.0.0.0/8, or (version 6) IPv6 and not for ::1."""
    loopback = ipaddress.ip_address("127.0.0.1" if version == 4 else "::1")
    if version == 4:
        return [*family(loopback), _payload(NETWORK_HEADER, 16, 1), _compare(b"\x7f", equal=False)]
    return [*family(loopback), _payload(NETWORK_HEADER, 24, 16), _compare(loopback.packed, equal=False)]


def leaves_by(interface: str, *, equal: bool = True) -> list[Expression]:
    """The packet leaves by this interface (or by any other)."""
    name = interface.encode().ljust(16, b"\0")
    return [_meta(Meta.NFT_META_OIFNAME), _compare(name, equal=equal)]


def socket_owner(uid: int) -> list[Expression]:
    """The packet comes from a socket of this very namespace, which a process of this user made."""
    return [_meta(Meta.NFT_META_SKUID), _compare(_host(uid, 4))]


def packet_mark(mark: int, mask: int, *, equal: bool = True) -> list[Expression]:
    """(packet mark & mask) is (or is not) `mark`."""
    return [
        _meta(Meta.NFT_META_MARK),
        _bitwise(_host(mask, 4), _host(0, 4)),
        _compare(_host(mark, 4), equal=equal),
    ]


def connection_mark(mark: int, mask: int) -> list[Expression]:
    """(conntrack mark & mask) is `mark`."""
    return [
        _expression("ct", dreg=REGISTER, key=CT_MARK),
        _bitwise(_host(mask, 4), _host(0, 4)),
        _compare(_host(mark, 4)),
    ]


def set_connection_mark(mark: int, mask: int) -> list[Expression]:
    """Set the bits of `mask` in the connection's mark to `mark`, keep the others."""
    return [
        _expression("ct", dreg=REGISTER, key=CT_MARK),
        _bitwise(_host(~mask & 0xFFFFFFFF, 4), _host(mark, 4)),
        _expression("ct", key=CT_MARK, sreg=REGISTER),
    ]


def restore_mark() -> list[Expression]:
    """Set the packet's mark to its connection's."""
    return [
        _expression("ct", dreg=REGISTER, key=CT_MARK),
        _expression("meta", key=int(Meta.NFT_META_MARK), sreg=REGISTER),
    ]


def set_zone(zone: int) -> list[Expression]:
    """Track the packet in this conntrack zone (only at raw priority, before conntrack has seen it)."""
    return [
        _expression("immediate", dreg=REGISTER, data=_data(_host(zone, 2))),
        _expression("ct", key=CT_ZONE, sreg=REGISTER),
    ]


def redirect(port: int) -> list[Expression]:
    """Deliver the connection to this port of the namespace itself (nat chains only)."""
    return [
        _expression("immediate", dreg=REGISTER, data=_data(struct.pack("!H", port))),
        _expression("redir", reg_proto_min=REGISTER, reg_proto_max=REGISTER, flags={PORT_GIVEN}),
    ]


def source_nat(address: IpAddress) -> list[Expression]:
    """Have the connection come from this address (nat chains of postrouting only)."""
    parts = {
        "type": 0,  # NFT_NAT_SNAT
        "family": NFPROTO_IPV4 if address.version == 4 else NFPROTO_IPV6,
        "reg_addr_min": REGISTER,
        "reg_addr_max": REGISTER,
        "flags": {ADDRESS_GIVEN},
    }
    return [_expression("immediate", dreg=REGISTER, data=_data(address.packed)), _expression("nat", **parts)]


def accept() -> list[Expression]:
    """End this chain for the packet."""
    return verdict(NF_ACCEPT)  # type: ignore[no-any-return]


def rule(comment: str, *statements: list[Expression]) -> Rule:
    """A rule of these statements, all conditions before the action."""
    return Rule(comment, tuple(expression for statement in statements for expression in statement))


def redirects(of: Rule) -> bool:
    """Whether the rule's action is a redirection."""
    return any(
        name == "NFTA_EXPR_NAME" and value == "redir" for e in of.expressions for name, value in e["attrs"]
    )
