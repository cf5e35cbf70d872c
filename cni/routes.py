"""The way back: policy routing that hands answers to the proxy's transparent connections to the proxy itself.

The proxy connects to its pod's programs from the original client's address. Their answers are for that foreign
address and would leave the pod; with the mark that the rules restore on them they are routed by a table of their
own, which delivers everything locally. For IPv4, and for IPv6 where the namespace has it.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pyroute2.netlink import NETLINK_ROUTE, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE
from pyroute2.netlink.rtnl import (
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    rt_scope,
    rt_type,
)
from pyroute2.netlink.rtnl.fibmsg import FR_ACT_TO_TBL, fibmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cni.netlink import NetlinkError, NetlinkSocket, dump_request, message_of, number, raw_attributes
from ztunnel.inpod import netns

LOOPBACK_INDEX = 1  # the loopback device is the first of every namespace
RTPROT_STATIC = 4
FAMILIES = ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6"))
# linux/fib_rules.h: family, dst_len, src_len, tos, table, two unused, action, flags; and its attributes.
_RULE = struct.Struct("=8BI")
FRA_PRIORITY, FRA_FWMARK, FRA_TABLE, FRA_FWMASK = 6, 10, 15, 16
# linux/rtnetlink.h: family, dst_len, src_len, tos, table, protocol, scope, type, flags; and its attributes.
_ROUTE = struct.Struct("=8BI")
RTA_OIF, RTA_TABLE = 4, 15
_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV)


class RoutesError(Exception):
    """The kernel would not take, or show, the policy routing; the message says which part, why, and what helps."""


@dataclass(frozen=True, slots=True)
class ReturnPath:
    """Packets with this mark (under the mask) are looked up in `table`, which delivers everything locally."""

    mark: int = 0x111
    mask: int = 0xFFF
    table: int = 100
    priority: int = 32764


def has_ipv6(namespace: int) -> bool:
    """Whether the namespace's loopback device takes IPv6 (the kernel has it and it is not disabled there)."""
    with netns.inside(namespace):
        try:
            with open("/proc/sys/net/ipv6/conf/lo/disable_ipv6") as setting:
                return setting.read().strip() == "0"
        except FileNotFoundError:
            return False


def _families(namespace: int) -> list[tuple[int, str]]:
    return [each for each in FAMILIES if each[0] == socket.AF_INET or has_ipv6(namespace)]


def _rule(family: int, path: ReturnPath) -> Any:
    fields = {"family": family, "table": path.table, "action": FR_ACT_TO_TBL}
    attrs = [
        ("FRA_PRIORITY", path.priority),
        ("FRA_FWMARK", path.mark),
        ("FRA_FWMASK", path.mask),
        ("FRA_TABLE", path.table),
    ]
    return message_of(fibmsg, fields, attrs)


def _route(family: int, path: ReturnPath) -> Any:
    fields = {
        "family": family,
        "table": path.table,
        "type": rt_type["local"],
        "scope": rt_scope["host"] if family == socket.AF_INET else rt_scope["universe"],
        "proto": RTPROT_STATIC,
    }
    return message_of(rtmsg, fields, [("RTA_OIF", LOOPBACK_INDEX), ("RTA_TABLE", path.table)])


def _open(namespace: int) -> NetlinkSocket:
    try:
        return NetlinkSocket(NETLINK_ROUTE, namespace)
    except OSError as error:
        raise RoutesError(
            f"routing: open a netlink socket in the pod's namespace: {error}{_remedy(error)}"
        ) from error


def _rules(rtnetlink: NetlinkSocket, family: int, path: ReturnPath) -> int:
    """How many rules of exactly this mark, mask, table and priority there are."""

    def ours(payload: bytes) -> bool:
        fields = _RULE.unpack_from(payload)
        found = raw_attributes(payload, _RULE.size)
        return (fields[0], fields[7]) == (family, FR_ACT_TO_TBL) and [
            number(found.get(kind)) for kind in (FRA_PRIORITY, FRA_FWMARK, FRA_FWMASK, FRA_TABLE)
        ] == [path.priority, path.mark, path.mask, path.table]

    return sum(rtnetlink.dump(_listing(fibmsg, family, RTM_GETRULE), ours))


def _routes(rtnetlink: NetlinkSocket, family: int, path: ReturnPath) -> int:
    """How many default routes that deliver locally over loopback the table has."""

    def ours(payload: bytes) -> bool:
        fields = _ROUTE.unpack_from(payload)
        found = raw_attributes(payload, _ROUTE.size)
        return (
            (fields[0], fields[1], fields[7]) == (family, 0, rt_type["local"])
            and number(found.get(RTA_OIF)) == LOOPBACK_INDEX
            and number(found.get(RTA_TABLE)) == path.table
        )

    return sum(rtnetlink.dump(_listing(rtmsg, family, RTM_GETROUTE), ours))


@lru_cache(maxsize=8)
def _listing(kind: type[Any], family: int, operation: int) -> bytes:
    return dump_request(message_of(kind, {"family": family}, ()), operation)


def _each(namespace: int, path: ReturnPath) -> Iterator[tuple[NetlinkSocket, int, str, str, str]]:
    rule = f"fwmark {path.mark:#x}/{path.mask:#x} lookup {path.table} pref {path.priority}"
    with _open(namespace) as rtnetlink:
        for family, name in _families(namespace):
            destination = "0.0.0.0/0" if family == socket.AF_INET else "::/0"
            yield rtnetlink, family, name, rule, f"local {destination} dev lo table {path.table}"


def verify(namespace: int, path: ReturnPath) -> list[str]:
    """What is missing or twice, one sentence each; empty where all is right. Raises RoutesError."""
    differences = []
    try:
        for rtnetlink, family, name, rule, route in _each(namespace, path):
            for what, count in (
                (f"{name} ip rule {rule}", _rules(rtnetlink, family, path)),
                (f"{name} route {route}", _routes(rtnetlink, family, path)),
            ):
                if count != 1:
                    differences.append(f"{what} is {'missing' if not count else f'there {count} times'}")
    except NetlinkError as error:
        raise RoutesError(f"routing: list rules and routes: {error}") from error
    return differences


def present(namespace: int, path: ReturnPath) -> bool:
    """Whether any part of the return path is there. Raises RoutesError."""
    try:
        return any(
            _rules(rtnetlink, family, path) or _routes(rtnetlink, family, path)
            for rtnetlink, family, *_ in _each(namespace, path)
        )
    except NetlinkError as error:
        raise RoutesError(f"routing: list rules and routes: {error}") from error


def ensure(namespace: int, path: ReturnPath) -> None:
    """Make the return path complete; applying it again changes nothing. Raises RoutesError.

    The route comes before the rule that sends packets to it.
    """
    for rtnetlink, family, name, rule, route in _each(namespace, path):
        try:
            step = f"{name} route {route}"
            rtnetlink.request(_route(family, path), RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE)
            step = f"{name} ip rule {rule}"
            have = _rules(rtnetlink, family, path)
            for _ in range(have - 1):
                rtnetlink.request(_rule(family, path), RTM_DELRULE)
            if not have:
                with suppress(FileExistsError):
                    rtnetlink.request(_rule(family, path), RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL)
        except NetlinkError as error:
            raise RoutesError(f"routing: add {step}: {error}{_remedy(error)}") from error


def remove(namespace: int, path: ReturnPath) -> None:
    """Take the return path out, however often it is there. Raises RoutesError; nothing there is no error."""
    for rtnetlink, family, name, rule, route in _each(namespace, path):
        for step, have, message, operation in (
            (f"{name} ip rule {rule}", _rules, _rule, RTM_DELRULE),
            (f"{name} route {route}", _routes, _route, RTM_DELROUTE),
        ):
            try:
                for _ in range(have(rtnetlink, family, path)):
                    rtnetlink.request(message(family, path), operation)
            except NetlinkError as error:
                if error.errno not in _GONE:
                    raise RoutesError(f"routing: remove {step}: {error}{_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "; run the node agent as root, or with CAP_NET_ADMIN and CAP_SYS_ADMIN"
    if error.errno == errno.ENETDOWN:
        return "; the pod's loopback device is down, set it up (ip link set lo up) before the pod joins"
    if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
        return "; the node's kernel needs CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES"
    return ""
