"""Whether some program listens on a port: asked of the kernel's socket diagnosis, without connecting.

/proc/PID/net/tcp says it too, and walks the whole machine's table of connections to do so: 5 ms, where this takes 0.05.
Names and numbers: sock_diag(7), linux/inet_diag.h.
"""

import errno
import os
import socket
import struct
from pathlib import Path

from ztunnel.inpod import netns

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST_DUMP = 0x301
LISTEN = 10  # the number of the state

_HEADER = struct.Struct("=IHHII")
# inet_diag_req_v2: family, protocol, two unused, states; inet_diag_sockid: source port, and 46 bytes that say "any".
_REQUEST = struct.Struct("=BBBBI")
_SOURCE_PORT = struct.Struct("!H")


def listens(pid: int, port: int, protocol: str) -> bool:
    """Whether some program has the port ("TCP", "UDP") in the network namespace that `pid` lives in.

    False where there is no such process.
    """
    try:
        if protocol == "TCP":
            return _tcp_listens(pid, port)
        return _in_table(pid, port, protocol)
    except FileNotFoundError:
        return False


def _tcp_listens(pid: int, port: int) -> bool:
    namespace = netns.open_path(f"/proc/{pid}/ns/net")
    try:
        with netns.inside(namespace):
            kernel = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
            )
    finally:
        os.close(namespace)
    with kernel:
        kernel.settimeout(1)
        try:
            return any(_listed(kernel, family, port) for family in (socket.AF_INET, socket.AF_INET6))
        except OSError:  # a kernel without CONFIG_INET_DIAG
            return _in_table(pid, port, "TCP")


def _listed(kernel: socket.socket, family: int, port: int) -> bool:
    """Whether the kernel lists a listener. Raises OSError where it lists nothing at all."""
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << LISTEN) + _SOURCE_PORT.pack(port) + bytes(46)
    kernel.send(_HEADER.pack(_HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 0, 0) + body)
    found = False
    while True:
        answer = kernel.recv(65536)
        while len(answer) >= _HEADER.size:
            length, kind, *_ = _HEADER.unpack_from(answer)
            if kind == NLMSG_DONE:
                return found
            if kind == NLMSG_ERROR:
                raise OSError(errno.EOPNOTSUPP, "no socket diagnosis")
            found = True
            answer = answer[length + -length % 4 :]


def _in_table(pid: int, port: int, protocol: str) -> bool:
    wanted = f":{port:04X}"
    for version in "", "6":
        try:
            lines = Path(f"/proc/{pid}/net/{protocol.lower()}{version}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split(maxsplit=4)
            if words[1].endswith(wanted) and (int(words[3], 16) == LISTEN or protocol == "UDP"):
                return True
    return False
