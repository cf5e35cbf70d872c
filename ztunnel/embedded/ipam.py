"""Who gets which address: pods from their node's range, Services from the cluster's. Pure; no I/O.

An address that was given back is given out again as late as possible: packets and connections of its last holder
may still be on their way.
"""

import hashlib
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import ClassVar

from ztunnel.embedded.addresses import DNS_VIP, SERVICES4, SERVICES6, pod_range4, pod_range6
from ztunnel.store.models import IPFamily

Address = IPv4Address | IPv6Address

# The gateway has 1, IPv4's broadcast 255; IPv6 uses the same numbers, so that a pod's two addresses look alike.
_FIRST_POD, _LAST_POD = 2, 254
PODS_PER_NODE = _LAST_POD - _FIRST_POD + 1


class Exhausted(Exception):
    """Every address of a range is in use."""


class PodAddresses:
    """The pod addresses of one node. `last` is the number given out last (0: unknown), kept by the caller."""

    def __init__(self, node: int, last: int = 0) -> None:
        self._ranges = (pod_range4(node), pod_range6(node))
        self._taken = set[int]()
        self.last = last

    def keep(self, addresses: Sequence[str]) -> bool:
        """Mark a pod's addresses as in use; False if they are not one of this node's pairs, or in use already."""
        number = self._number(addresses)
        if number is None or number in self._taken:
            return False
        self._taken.add(number)
        return True

    @property
    def full(self) -> bool:
        """Whether no address is left."""
        return len(self._taken) >= PODS_PER_NODE

    def take(self) -> list[str]:
        """An IPv4 and an IPv6 address, the ones after the last given out that are free. Raises Exhausted."""
        last = self.last or max(self._taken, default=_FIRST_POD - 1)
        for step in range(1, PODS_PER_NODE + 1):
            number = _FIRST_POD + (last - _FIRST_POD + step) % PODS_PER_NODE
            if number not in self._taken:
                self._taken.add(number)
                self.last = number
                return self._pair(number)
        raise Exhausted(f"all {PODS_PER_NODE} addresses of {self._ranges[0]} are in use")

    def _pair(self, number: int) -> list[str]:
        # As text, node 1's pod 10.244.1.23 is fd00:10:244:1::23.
        four, six = self._ranges
        return [str(four[number]), str(six[int(str(number), 16)])]

    def _number(self, addresses: Sequence[str]) -> int | None:
        try:
            number = int(ip_address(addresses[0])) - int(self._ranges[0][0])
        except (ValueError, IndexError):
            return None
        if not _FIRST_POD <= number <= _LAST_POD or list(addresses) != self._pair(number):
            return None
        return number


class ServiceAddresses:
    """The virtual addresses of Services, of both families. A name always asks for the same number first."""

    _RANGES: ClassVar[dict[IPFamily, IPv4Network | IPv6Network]] = {"IPv4": SERVICES4, "IPv6": SERVICES6}
    _SIZE = 1 << 16

    def __init__(self) -> None:
        reserved = int(ip_address(DNS_VIP)) - int(SERVICES4[0])
        # The first is where Kubernetes has its API server, the last is IPv4's broadcast address.
        self._taken = {0, 1, reserved, self._SIZE - 1}

    def keep(self, addresses: Iterable[Address]) -> None:
        """Mark addresses as in use; those outside of the ranges need no mark."""
        for address in addresses:
            for network in self._RANGES.values():
                if address in network:
                    self._taken.add(int(address) - int(network[0]))

    def take(self, name: str, families: Iterable[IPFamily]) -> list[Address]:
        """A free address of each family, with one number for all. Raises Exhausted."""
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2])
        for step in range(self._SIZE):
            candidate = (number + step) % self._SIZE
            if candidate not in self._taken:
                self._taken.add(candidate)
                return [self._address(family, candidate) for family in families]
        raise Exhausted(f"all addresses of {SERVICES4} are in use")

    def _address(self, family: IPFamily, number: int) -> Address:
        return ip_address(int(self._RANGES[family][0]) + number)
