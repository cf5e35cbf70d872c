"""A pod whose DNS is answered: its sockets, and where its captured queries were going."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from ztunnel.dns.conntrack import Conntrack
from ztunnel.dns.counters import Labels
from ztunnel.inpod import netns
from ztunnel.inpod.sockets import MARK, original_destination, parse_destination
from ztunnel.mesh.model import ip_text, packed_ip

PORT = 15053
DNS_PORT = 53
RECEIVE_BUFFER = 1 << 20  # bytes, for what comes while the process is busy with a push
BACKLOG = 128
LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
SO_RCVBUFFORCE = 33

Address = tuple[str, int]
"""Address as text, and port."""


class UpstreamUnknown(Exception):
    """Nobody says which server the program asked."""


@lru_cache(maxsize=1)
def _home() -> int:
    """The namespace of this process, held open: to open it for each query takes as long as the rest of one."""
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@dataclass(eq=False)
class DnsPod:
    """`netns_fd` is its own. `asking` are the source addresses of queries passed on for it now, by protocol.

    `names()` gives the pod's canonical service and revision, and whether they are known already.
    """

    uid: str
    name: str
    namespace: str
    netns_fd: int
    names: Callable[[], tuple[str, str, bool]]
    port: int = PORT
    datagrams: list[socket.socket] = field(default_factory=list)
    listeners: list[socket.socket] = field(default_factory=list)
    asking: set[tuple[str, str, int]] = field(default_factory=set)
    _conntrack: Conntrack | None = None
    _labels: dict[tuple[str, str], Labels] = field(default_factory=dict)

    def open(self) -> None:
        """Make the sockets: UDP and TCP on the loopback addresses, where redirected queries arrive.

        Nobody outside of the pod reaches them. Raises OSError (EADDRINUSE: a program of the pod has the port).
        """
        try:
            with netns.inside(self.netns_fd):
                for family, address in LOOPBACK:
                    try:
                        self.datagrams.append(self._bound(family, address, socket.SOCK_DGRAM))
                    except OSError as error:
                        if family == socket.AF_INET6 and error.errno in (
                            errno.EAFNOSUPPORT,
                            errno.EADDRNOTAVAIL,
                        ):
                            continue  # the pod has no IPv6
                        raise
                    self.listeners.append(self._bound(family, address, socket.SOCK_STREAM))
        except BaseException:
            self.close()
            raise

    def _bound(self, family: int, address: str, kind: int) -> socket.socket:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                with contextlib.suppress(OSError):  # without the capability the host's limit holds
                    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
            sock.bind((address, self.port))
            if kind == socket.SOCK_STREAM:
                sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Close everything."""
        for sock in (*self.datagrams, *self.listeners):
            sock.close()
        self.datagrams, self.listeners = [], []
        if self._conntrack is not None:
            self._conntrack.close()
            self._conntrack = None
        if self.netns_fd >= 0:
            os.close(self.netns_fd)
            self.netns_fd = -1

    def labels(self, query_type: str, protocol: str) -> Labels:
        """What a query is counted under."""
        found = self._labels.get((query_type, protocol))
        if found is None:
            service, revision, known = self.names()
            found = Labels(query_type, protocol, service, revision)
            if known:
                self._labels[query_type, protocol] = found
        return found

    def socket_to(self, server: Address, kind: int) -> socket.socket:
        """A marked, non-blocking socket in the pod's namespace for this server. Raises OSError."""
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        home = _home()
        netns.setns(self.netns_fd)
        try:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        finally:
            netns.setns(home)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        except BaseException:
            sock.close()
            raise
        return sock

    def server_of_datagram(self, own: socket.socket, peer: Address) -> Address:
        """Where the datagram was going that came from `peer`. Raises UpstreamUnknown."""
        try:
            if self._conntrack is None:
                self._conntrack = Conntrack(self.netns_fd)
            at = "::1" if own.family == socket.AF_INET6 else "127.0.0.1"
            found = self._conntrack.original_destination(
                packed_ip(at), self.port, packed_ip(peer[0]), peer[1]
            )
        except OSError as error:
            raise UpstreamUnknown(f"the kernel's connection tracking does not tell: {error}") from None
        return self._checked(found)

    def server_of_connection(self, connection: socket.socket) -> Address:
        """Where the TCP connection was going. Raises UpstreamUnknown."""
        try:
            destination = original_destination(connection, connection.family == socket.AF_INET)
        except OSError as error:
            raise UpstreamUnknown(str(error)) from None
        return self._checked(parse_destination(destination))

    def _checked(self, found: tuple[bytes, int] | None) -> Address:
        # What was sent to us and not redirected has us for its destination.
        if found is None or found[1] == self.port:
            raise UpstreamUnknown("the query was not redirected")
        return ip_text(found[0]), found[1]
