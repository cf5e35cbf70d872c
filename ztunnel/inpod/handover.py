"""How listeners of one proxy give way to those of its successor in a pod's namespace, and no connection is lost.

Both listen on the same ports (SO_REUSEPORT), and the kernel spreads connections over all listeners of a port. A
connection belongs to one of them from its first packet on: closing that one resets those that nobody has accepted
yet, and those whose handshake is under way. With the setting `net.ipv4.tcp_migrate_req` of the namespace (Linux 5.14;
it is for IPv6, too) the kernel gives them to another listener of the port instead.

Only system calls: workers import this file.
"""

import contextlib
import ctypes
import os
import socket
import struct
from pathlib import Path

from ztunnel.inpod.sockets import enter

MIGRATE = Path("/proc/sys/net/ipv4/tcp_migrate_req")  # of the reading thread's namespace

# sock_diag(7), linux/inet_diag.h, linux/netlink.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_DONE, _ERROR = 3, 2
_LISTEN = 1 << 10
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBxI")  # inet_diag_req_v2: family, protocol, extensions, states; the id follows
_ID = struct.Struct("!H46x")  # inet_diag_sockid: source port first
_INODE = struct.Struct("=I")
_INODE_AT = 68  # offset of idiag_inode in inet_diag_msg

_libc = ctypes.CDLL(None, use_errno=True)

# mount_setattr(2)'s family: linux/mount.h, the same numbers on all machines.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_CREATE = 6  # FSCONFIG_CMD_CREATE


def migrate_on_close() -> bool:
    """Have connections that wait at a listener given to another one of its port when it is closed.

    In the calling thread's namespace; False where the kernel does not know it, or does not let us.
    """
    if not migrates():
        with contextlib.suppress(OSError):
            try:
                MIGRATE.write_text("1")
            except OSError:
                _write_in_container("1")
    return migrates()


def _write_in_container(value: str) -> None:
    """Write it where /proc/sys is mounted read-only, as container runtimes do. Raises OSError.

    Whoever may enter a pod's namespace may mount a proc file system of his own. This one is never attached to a
    directory: nobody else sees it, and it goes with its descriptor.
    """
    context = _call(_FSOPEN, b"proc", _CLOEXEC)
    try:
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        proc = _call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        setting = os.open(MIGRATE.relative_to("/proc"), os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
    finally:
        os.close(proc)
    try:
        os.write(setting, value.encode())
    finally:
        os.close(setting)


def _call(number: int, *arguments: bytes | int | None) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def migrates() -> bool:
    """Whether they are, in the calling thread's namespace."""
    try:
        return MIGRATE.read_text().strip() == "1"
    except OSError:
        return False


def listening(netns: int, port: int) -> set[int]:
    """The inodes of all sockets that listen on a TCP port in a namespace. Raises OSError.

    The calling thread stays in it (see `sockets.enter`).
    """
    enter(netns)
    return listening_here(port)


def listening_here(port: int) -> set[int]:
    """As `listening`, in the calling thread's namespace. Raises OSError."""
    found: set[int] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diagnosis:
        diagnosis.settimeout(1)
        for family in (socket.AF_INET, socket.AF_INET6):
            body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _LISTEN) + _ID.pack(port)
            header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _DUMP, 0, 0)
            diagnosis.send(header + body)
            while not _take(diagnosis.recv(65536), found):
                pass
    return found


def _take(data: bytes, found: set[int]) -> bool:
    """Add the sockets of one packet of the dump; True at its end. Raises OSError."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if kind == _DONE:
            return True
        if kind == _ERROR:
            (code,) = struct.unpack_from("=i", data, at + _HEADER.size)
            raise OSError(-code, "the kernel lists no listening sockets")
        found.update(_INODE.unpack_from(data, at + _HEADER.size + _INODE_AT))
        at += (length + 3) & ~3
    return False
