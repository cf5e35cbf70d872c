"""What of a pod's traffic is captured: its annotations read, in the form that Istio gives them. Pure.

What cannot be read is as if it was not there, and reported: everything is captured that is not excluded in words that
can be understood.
"""

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, TypeVar

from cni.nftables import IpNetwork

PREFIX: Final = "traffic.sidecar.istio.io/"
EXCLUDE_OUTBOUND_RANGES: Final = PREFIX + "excludeOutboundIPRanges"
INCLUDE_OUTBOUND_RANGES: Final = PREFIX + "includeOutboundIPRanges"
EXCLUDE_OUTBOUND_PORTS: Final = PREFIX + "excludeOutboundPorts"
EXCLUDE_INBOUND_PORTS: Final = PREFIX + "excludeInboundPorts"
BYPASS_INBOUND: Final = "ambient.istio.io/bypass-inbound-capture"
DNS_CAPTURE: Final = "ambient.istio.io/dns-capture"
MOST_ENTRIES: Final = 1000
"""Of one annotation: what an nft set of a pod may cost."""

T = TypeVar("T")


class Capture(NamedTuple):
    """What the annotations ask for.

    `dns` None: as on the node. `include_ranges` None: all. The ranges overlap nowhere and are in order.
    """

    dns: bool | None = None
    bypass_inbound: bool = False
    exclude_ranges: tuple[IpNetwork, ...] = ()
    include_ranges: tuple[IpNetwork, ...] | None = None
    exclude_ports: tuple[int, ...] = ()
    exclude_inbound_ports: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()


def capture_of(annotations: Mapping[str, str]) -> Capture:
    """Read a pod's annotations; one sentence for each part of them that cannot be used."""
    problems: list[str] = []

    def each(name: str, read: Callable[[str], T]) -> list[T]:
        """The entries of a list that can be read."""
        found = []
        entries = [entry.strip() for entry in annotations.get(name, "").split(",") if entry.strip()]
        if len(entries) > MOST_ENTRIES:
            problems.append(_problem(name, f"has {len(entries)} entries", f"give at most {MOST_ENTRIES}"))
            return []
        for entry in entries:
            try:
                found.append(read(entry))
            except ValueError as error:
                problems.append(_problem(name, f"{entry!r} {error}, so it is not excluded", "correct it"))
        return found

    def flag(name: str) -> bool | None:
        value = annotations.get(name)
        if value is None or value in ("true", "false"):
            return None if value is None else value == "true"
        problems.append(_problem(name, f"{value!r} is not known, so it is ignored", 'use "true" or "false"'))
        return None

    return Capture(
        dns=flag(DNS_CAPTURE),
        bypass_inbound=flag(BYPASS_INBOUND) or False,
        exclude_ranges=_joined(each(EXCLUDE_OUTBOUND_RANGES, _range)),
        include_ranges=_included(annotations, problems),
        exclude_ports=tuple(sorted(set(each(EXCLUDE_OUTBOUND_PORTS, _port)))),
        exclude_inbound_ports=tuple(sorted(set(each(EXCLUDE_INBOUND_PORTS, _port)))),
        problems=tuple(problems),
    )


def _included(annotations: Mapping[str, str], problems: list[str]) -> tuple[IpNetwork, ...] | None:
    """The ranges to capture; all (None) where any of them cannot be read, as to leave one out would capture less."""
    name = INCLUDE_OUTBOUND_RANGES
    value = annotations.get(name, "*").strip()
    if value == "*":
        return None
    entries = [entry.strip() for entry in value.split(",") if entry.strip()]
    if len(entries) > MOST_ENTRIES:
        problems.append(
            _problem(
                name, f"has {len(entries)} entries, so everything is captured", f"give at most {MOST_ENTRIES}"
            )
        )
        return None
    found = []
    for entry in entries:
        try:
            found.append(_range(entry))
        except ValueError as error:
            problems.append(
                _problem(name, f"{entry!r} {error}, so everything is captured", 'correct it, or use "*"')
            )
    return _joined(found) if len(found) == len(entries) else None


def _problem(name: str, what: str, remedy: str) -> str:
    return f"metadata.annotations[{name}]: {what}: {remedy}"


def _range(text: str) -> IpNetwork:
    """A network in CIDR form, or a single address. Raises ValueError."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("is not an IP range such as 10.0.0.0/8 or fd00::/8") from None


def _port(text: str) -> int:
    """A port's number. Raises ValueError."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):
        raise ValueError("is not a port from 1 to 65535")
    return int(text)


def _joined(networks: Iterable[IpNetwork]) -> tuple[IpNetwork, ...]:
    """The same addresses in as few ranges as possible, IPv4 before IPv6."""
    given = list(networks)
    four = ipaddress.collapse_addresses(one for one in given if isinstance(one, ipaddress.IPv4Network))
    six = ipaddress.collapse_addresses(one for one in given if isinstance(one, ipaddress.IPv6Network))
    return (*four, *six)
