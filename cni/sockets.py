"""Which of the proxy's sockets are in a pod's namespace, from the kernel's socket diagnosis.

A namespace that left the mesh keeps its drained rules until this is zero (sock_diag(7), linux/inet_diag.h).
"""

import errno
import socket
from collections.abc import Callable
from typing import TypeVar

from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, inet_diag_req

from cni.netlink import NetlinkError, NetlinkSocket, dump_request, message_of, number, raw_attributes
from cni.rules import Settings

T = TypeVar("T")

NETLINK_SOCK_DIAG = 4
# linux/inet_diag.h, inet_diag_msg: family, state, timer, retrans, then source port, in network byte order, and 66 more.
_SOURCE_PORT = slice(4, 6)
_SOCKET_SIZE = 72
INET_DIAG_MARK = 15
# Every TCP state but those in which nothing more is to be translated (linux: net/tcp_states.h).
_TIME_WAIT, _CLOSE, _LISTEN = 6, 7, 10
_OPEN_STATES = 0xFFF & ~(1 << _TIME_WAIT | 1 << _CLOSE | 1 << _LISTEN | 1)


_LISTENING = 1 << _LISTEN


class SocketsError(Exception):
    """The kernel would not list the namespace's sockets."""


def proxy_connections(namespace: int, settings: Settings) -> int:
    """The number of TCP connections, listeners not counted, with the proxy's mark or on one of its ports.

    Raises SocketsError where the kernel has no socket diagnosis (CONFIG_INET_DIAG) or refuses it.
    """
    ports = {settings.outbound_port, settings.inbound_port, settings.hbone_port, settings.dns_port}

    def proxys(payload: bytes) -> bool:
        mark = number(raw_attributes(payload, _SOCKET_SIZE).get(INET_DIAG_MARK)) & settings.mask
        return mark == settings.mark or int.from_bytes(payload[_SOURCE_PORT]) in ports

    return sum(_sockets(namespace, _OPEN_STATES, proxys))


def missing_listeners(namespace: int, settings: Settings) -> list[int]:
    """The ports on which ztunnel listens in every pod that it serves, and nobody does here. Raises SocketsError."""
    wanted = {settings.outbound_port, settings.inbound_port, settings.hbone_port}
    return sorted(wanted.difference(_sockets(namespace, _LISTENING, _source_port)))


def _source_port(payload: bytes) -> int:
    return int.from_bytes(payload[_SOURCE_PORT])


def _sockets(namespace: int, states: int, read: Callable[[bytes], T]) -> list[T]:
    """What `read` makes of each TCP socket in one of these states (bits). Raises SocketsError."""
    found: list[T] = []
    try:
        with NetlinkSocket(NETLINK_SOCK_DIAG, namespace) as diagnosis:
            for family in (socket.AF_INET, socket.AF_INET6):
                fields = {
                    "sdiag_family": family,
                    "sdiag_protocol": socket.IPPROTO_TCP,
                    "idiag_states": states,
                }
                ask = dump_request(message_of(inet_diag_req, fields, ()), SOCK_DIAG_BY_FAMILY)
                found += diagnosis.dump(ask, read)
    except NetlinkError as error:
        lacking = "; the kernel needs CONFIG_INET_DIAG and CONFIG_INET_TCP_DIAG"
        raise SocketsError(
            f"list TCP sockets: {error}{lacking if error.errno == errno.ENOENT else ''}"
        ) from error
    except OSError as error:
        raise SocketsError(f"list TCP sockets: {error}") from error
    return found
