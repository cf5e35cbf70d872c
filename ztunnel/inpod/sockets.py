"""TCP sockets inside pods' network namespaces: listeners for captured traffic, connections with the proxy's mark.

Only system calls: the proxy's workers import this file. A thread that makes such sockets stays in the namespace it
used last, which saves half of the setns(2) calls (about 1 us each); it must not make other network sockets.

What is made for each connection is of the class in C that `socket.socket` adds methods in Python to: 2 us less for
one that is accepted, 0.7 for one that connects.
"""

import contextlib
import errno
import os
import secrets
import socket
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ztunnel.inpod.netns import setns

Socket = socket.SocketType
"""What connections are. Has all methods that need no Python (not: accept, makefile, with)."""

MARK = 0x539
"""The packet mark by which the redirection rules know what the proxy itself sends (of the bits 0xfff)."""

OUTBOUND_PORT = 15001
INBOUND_PLAINTEXT_PORT = 15006
INBOUND_HBONE_PORT = 15008
MESH_PORTS = frozenset({15001, 15006, 15008, 15053, 15080})
"""Ports of the mesh's own in each pod, refused as destinations: no loops."""

OWN = -1
"""Instead of a namespace's descriptor: the one that this process is in, where nothing is redirected. Sockets there
bear no mark, and to make them needs no privileges."""

SO_ORIGINAL_DST = 80
IP6T_SO_ORIGINAL_DST = 80
SOL_IP = socket.SOL_IP
SOL_IPV6 = 41
_TCP_INFO_QUEUED = 24  # offset of tcpi_unacked in struct tcp_info
IPV6_TRANSPARENT = 75
IP_TRANSPARENT = 19
BACKLOG = 4096

# A peer that vanished without a word is noticed after 60 s + 3 x 20 s. Istio's ztunnel waits 180 s; shorter, since
# it is what frees the sockets of a client whose kernel forgot a connection in FIN_WAIT2 (after 60 s).
KEEPALIVE_IDLE = 60
KEEPALIVE_INTERVAL = 20
KEEPALIVE_PROBES = 3

_NONBLOCKING = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
_OPTIONS = (  # of every connection
    (int(socket.IPPROTO_TCP), socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (int(socket.IPPROTO_TCP), socket.TCP_KEEPIDLE, KEEPALIVE_IDLE),
    (int(socket.IPPROTO_TCP), socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL),
    (int(socket.IPPROTO_TCP), socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
)
_MARKED = (*_OPTIONS, (socket.SOL_SOCKET, socket.SO_MARK, MARK))
# SO_REUSEADDR: a port may serve several destinations at once; connect(2) checks the whole 4-tuple.
_REUSED = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
_TRANSPARENT4 = (*_MARKED, (socket.SOL_IP, IP_TRANSPARENT, 1), _REUSED)
_TRANSPARENT6 = (*_MARKED, (SOL_IPV6, IPV6_TRANSPARENT, 1), _REUSED)
_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EALREADY})

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What the process or the machine has too little of to accept a connection now."""

SOURCE_PORTS = (10240, 32767)  # first and last; the kernel's ephemeral range begins at 32768
SOURCE_PORT_ATTEMPTS = 256

_current = -1
_source_port = secrets.randbelow(SOURCE_PORTS[1] - SOURCE_PORTS[0]) + SOURCE_PORTS[0]  # the one used last


def enter(fd: int) -> None:
    """Move this thread into the namespace open as `fd`, if it was not the last one entered. Raises OSError.

    A process that uses OWN enters no other.
    """
    global _current
    if fd != _current:
        setns(fd)
        _current = fd


def left(fd: int) -> None:
    """To be called before `fd` is closed: its number may come back for another namespace."""
    global _current
    if fd == _current:
        _current = -1


def listen(port: int) -> socket.socket:
    """A listener on `port` of both families in the thread's namespace, one of several by SO_REUSEPORT.

    IPv4 only where the namespace has no IPv6. Raises OSError (EADDRINUSE: another program of the pod has the port).
    """
    sock = None
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        sock.setsockopt(SOL_IPV6, socket.IPV6_V6ONLY, 0)
        address: tuple[str, int] = ("::", port)
        _listen(sock, address)
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            _listen(sock, ("0.0.0.0", port))  # noqa: S104 - inside a pod, where the redirected traffic comes
        except OSError:
            sock.close()
            raise
    return sock


def _listen(sock: socket.socket, address: tuple[str, int]) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # No mark here: answers belong to connections that the rules have seen, and a mark on packets that loop back to
    # the pod's own programs would mark their connections as ones that entered through the proxy.
    sock.setblocking(False)
    for option in _OPTIONS:  # inherited by what is accepted
        sock.setsockopt(*option)
    sock.bind(address)
    sock.listen(BACKLOG)


def acceptor(listener: socket.socket) -> Callable[[], tuple[Socket, tuple[str, int]]]:
    """What accepts the listener's next connection, non-blocking: the socket, and address and port of its peer.

    It raises OSError as accept(2) does: BlockingIOError if nobody waits.
    """
    family = int(listener.family)
    stream = int(socket.SOCK_STREAM)
    take: Any = getattr(listener, "_accept", None)  # what socket.accept itself is made of
    if take is None:
        take = _taker(listener)

    def accept() -> tuple[Socket, tuple[str, int]]:
        fd, peer = take()
        sock = Socket(family, stream, 0, fd)
        sock.setblocking(False)
        return sock, peer

    return accept


def _taker(listener: socket.socket) -> Callable[[], tuple[int, tuple[str, int]]]:
    def take() -> tuple[int, tuple[str, int]]:
        sock, peer = listener.accept()
        return sock.detach(), peer

    return take


def queued(listener: socket.socket) -> int:
    """How many connections wait to be accepted; 0.5 us, where an accept(2) that finds none takes 5. Raises OSError.

    The kernel says it in `tcpi_unacked` of a listener (tcp_get_info).
    """
    raw = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_QUEUED + 4)
    return int.from_bytes(raw[_TCP_INFO_QUEUED:], sys.byteorder)


def connect(netns: int, address: str, port: int, source: str = "") -> Socket:
    """Begin a connection to `address`:`port` in a namespace; non-blocking, so it may still be under way. It bears
    the mark, except in OWN.

    With `source`, an address that need not be the pod's own: the connection comes from there (IP_TRANSPARENT; the
    rules of the pod bring the answers back). Raises OSError.
    """
    enter(netns)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if source and (":" in source) == (family == socket.AF_INET6):
        return _connect_as(source, family, address, port)
    sock = Socket(family, _NONBLOCKING)
    try:
        for option in _MARKED if netns != OWN else _OPTIONS:
            sock.setsockopt(*option)
        code = sock.connect_ex((address, port))
        if code and code not in _UNDER_WAY:
            raise OSError(code, os.strerror(code))
    except OSError:
        sock.close()
        raise
    return sock


def connected(sock: Socket, address: str, port: int) -> bool:
    """Whether the connection that `connect` began is made by now; to be asked once. Raises OSError if it failed.

    One to a program of the same machine is, or has failed, when connect(2) says that it is in progress; a second
    connect(2) says which (0.8 us), and there is no need to wait for the reactor's next turn.
    """
    code = sock.connect_ex((address, port))
    if code and code not in _UNDER_WAY and code != errno.EISCONN:
        raise OSError(code, os.strerror(code))
    return code not in _UNDER_WAY


def _connect_as(source: str, family: int, address: str, port: int) -> Socket:
    """Connect from `source`, an address of somebody else's, and a port that he does not use himself.

    The client's own connections to this pod are in the same connection tracking table, from ports of the usual
    ephemeral range. Were ours taken from there too (as the kernel would), one in thirty among a thousand would have
    the 4-tuple of a captured connection and be taken for it. So ours come from below that range.

    They are counted up. One that is taken lies in a block of them, another worker's or ours of long ago: a thousand
    connections that stay open have a thousand ports in a row. So the next one to try is anywhere.
    """
    global _source_port
    options = _TRANSPARENT6 if family == socket.AF_INET6 else _TRANSPARENT4
    for attempt in range(SOURCE_PORT_ATTEMPTS):
        _source_port += 1
        if _source_port > SOURCE_PORTS[1]:
            _source_port = SOURCE_PORTS[0]
        sock = Socket(family, _NONBLOCKING)
        try:
            for option in options:
                sock.setsockopt(*option)
            sock.bind((source, _source_port))
            code = sock.connect_ex((address, port))
            if code and code not in _UNDER_WAY:
                raise OSError(code, os.strerror(code))
        except OSError as error:
            sock.close()
            if (
                error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
                or attempt == SOURCE_PORT_ATTEMPTS - 1
            ):
                raise
            _source_port = secrets.randbelow(SOURCE_PORTS[1] - SOURCE_PORTS[0]) + SOURCE_PORTS[0]
        else:
            return sock
    raise AssertionError("the last attempt returns or raises")


def original_destination(sock: Socket, ipv4: bool) -> bytes:
    """Where a redirected connection was going: 2 bytes port, packed address. Raises OSError if it was not redirected.

    `parse_destination` reads it.
    """
    if ipv4:
        return sock.getsockopt(SOL_IP, SO_ORIGINAL_DST, 16)[2:8]
    raw = sock.getsockopt(SOL_IPV6, IP6T_SO_ORIGINAL_DST, 28)
    return raw[2:4] + raw[8:24]


def parse_destination(destination: bytes) -> tuple[bytes, int]:
    """The packed address and the port of an `original_destination`."""
    return destination[2:], int.from_bytes(destination[:2], "big")


@lru_cache(maxsize=1024)
def plain_address(address: str) -> str:
    """`::ffff:a.b.c.d`, as a socket of both families names an IPv4 peer, without the prefix; others unchanged."""
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def peer_name(peer: tuple[str, int]) -> tuple[str, str]:
    """The address of a peer, and the same with its port."""
    address = plain_address(peer[0])
    return address, f"[{address}]:{peer[1]}" if ":" in address else f"{address}:{peer[1]}"


def host_port(address: str, port: int) -> str:
    """`a.b.c.d:port` or `[v6]:port`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def is_local(netns: int, address: str) -> bool:
    """Whether `address` is one of the namespace's own: the kernel says so by letting a datagram socket bind it."""
    enter(netns)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


_LINGER_ZERO = struct.pack("ii", 1, 0)


def reset(sock: Socket) -> None:
    """Close with a TCP RST: what the other end of an aborted connection must see."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    sock.close()
