"""The address plan of the simulated nodes: which node and which pod range has which addresses. Pure; no I/O.

| what | IPv4 | IPv6 |
|---|---|---|
| node N on the fabric | 10.99.0.(10+N)/24 | fd00:10:99::(10+N)/64, written as in the IPv4 address |
| pods of node N | 10.244.N.0/24, gateway .1 | fd00:10:244:N::/64, gateway ::1 |
| Services | 10.96.0.0/16 | fd00:10:96::/112 |
| cluster DNS | 10.96.0.10 | |
"""

from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

MAX_NODES = 200
SERVICES4 = IPv4Network("10.96.0.0/16")
SERVICES6 = IPv6Network("fd00:10:96::/112")
DNS_VIP = "10.96.0.10"
CLUSTER_NETWORKS = (IPv4Network("10.244.0.0/16"), IPv6Network("fd00:10:244::/48"), SERVICES4, SERVICES6)


def node_name(number: int) -> str:
    """`node-N`, numbered from 1."""
    return f"node-{number}"


def node_number(name: str) -> int:
    """N of `node-N`. Raises ValueError for other names."""
    prefix, dash, number = name.partition("-")
    if prefix != "node" or not dash or not number.isdecimal() or not 1 <= int(number) <= MAX_NODES:
        raise ValueError(f"{name!r} is not a simulated node's name (node-1 to node-{MAX_NODES})")
    return int(number)


def node_address4(number: int) -> IPv4Interface:
    """Node N's address on the fabric."""
    return IPv4Interface(f"10.99.0.{10 + number}/24")


def node_address6(number: int) -> IPv6Interface:
    """Node N's IPv6 address on the fabric: the same digits as the end of its IPv4 address."""
    return IPv6Interface(f"fd00:10:99::{10 + number}/64")


def pod_range4(number: int) -> IPv4Network:
    """The range node N's pods have their addresses from."""
    return IPv4Network(f"10.244.{number}.0/24")


def pod_range6(number: int) -> IPv6Network:
    """The IPv6 range node N's pods have their addresses from."""
    return IPv6Network(f"fd00:10:244:{number}::/64")


def gateway4(number: int) -> IPv4Interface:
    """The address of node N's bridge, which is its pods' gateway."""
    network = pod_range4(number)
    return IPv4Interface((network[1], network.prefixlen))


def gateway6(number: int) -> IPv6Interface:
    """The IPv6 address of node N's bridge, which is its pods' gateway."""
    network = pod_range6(number)
    return IPv6Interface((network[1], network.prefixlen))
