"""Where a captured datagram was going: asked of the kernel's connection tracking over netlink.

A redirected TCP connection tells its original destination itself (SO_ORIGINAL_DST), a datagram does not. Its entry in
the tracking table does, found by the answer's direction: from our socket to the program's. 12 us a question, plain
system calls and fixed messages (linux/netfilter/nfnetlink_conntrack.h).
"""

import errno
import os
import socket
import struct
from typing import Final

from ztunnel.inpod import netns

NETLINK_NETFILTER: Final = 12
_GET: Final = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_NEW: Final = 1 << 8
_NLMSG_ERROR: Final = 2
_NLM_F_REQUEST: Final = 1
_NESTED: Final = 0x8000
_TYPE: Final = 0x3FFF
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY = 1, 2
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_ADDRESS_KINDS: Final = {4: (1, 2), 16: (3, 4)}  # CTA_IP_V4_SRC and _DST, CTA_IP_V6_SRC and _DST

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
# After the header nfgenmsg: family, version, resource id.
_PAYLOAD = _HEADER.size + 4


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)


def request(
    source: bytes, source_port: int, destination: bytes, destination_port: int, sequence: int = 1
) -> bytes:
    """The question for the UDP entry whose answers go from `source` (packed address) to `destination`."""
    of_source, of_destination = _ADDRESS_KINDS[len(source)]
    addresses = _attribute(of_source, source) + _attribute(of_destination, destination)
    ports = (
        _attribute(_CTA_PROTO_NUM, bytes([socket.IPPROTO_UDP]))
        + _attribute(_CTA_PROTO_SRC_PORT, source_port.to_bytes(2, "big"))
        + _attribute(_CTA_PROTO_DST_PORT, destination_port.to_bytes(2, "big"))
    )
    inner = _attribute(_CTA_TUPLE_IP | _NESTED, addresses) + _attribute(_CTA_TUPLE_PROTO | _NESTED, ports)
    body = _attribute(_CTA_TUPLE_REPLY | _NESTED, inner)
    family = socket.AF_INET if len(source) == 4 else socket.AF_INET6
    header = _HEADER.pack(_PAYLOAD + len(body), _GET, _NLM_F_REQUEST, sequence, 0)
    return header + struct.pack("=BBH", family, 0, 0) + body


def original(reply: bytes) -> tuple[bytes, int] | None:
    """The destination (packed address, port) of the entry in the kernel's answer; None if it has none."""
    if len(reply) < _PAYLOAD:
        return None
    length, kind, *_ = _HEADER.unpack_from(reply)
    if kind != _NEW:
        return None
    parts = _attributes(_attributes(reply[_PAYLOAD:length]).get(_CTA_TUPLE_ORIG, b""))
    addresses = _attributes(parts.get(_CTA_TUPLE_IP, b""))
    port = _attributes(parts.get(_CTA_TUPLE_PROTO, b"")).get(_CTA_PROTO_DST_PORT, b"")
    for _, of_destination in _ADDRESS_KINDS.values():
        if of_destination in addresses and len(port) == 2:
            return addresses[of_destination], int.from_bytes(port, "big")
    return None


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


class Conntrack:
    """The tracking table of one network namespace, open as `namespace` (stays the caller's). Raises OSError."""

    def __init__(self, namespace: int) -> None:
        with netns.inside(namespace):
            self._socket = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                NETLINK_NETFILTER,
            )
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def original_destination(
        self, own: bytes, own_port: int, peer: bytes, peer_port: int
    ) -> tuple[bytes, int] | None:
        """Where the datagram was going that came to our socket from a peer (packed addresses); None if unknown.

        The kernel answers inside the send call. Raises OSError where it has no such table (ENOENT is "unknown").
        """
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        self._socket.send(request(own, own_port, peer, peer_port, self._sequence))
        while True:
            try:
                reply = self._socket.recv(4096)
            except BlockingIOError:
                return None
            _, kind, _, sequence, _ = _HEADER.unpack_from(reply)
            if sequence == self._sequence:
                break
        if kind == _NLMSG_ERROR:
            code = -struct.unpack_from("=i", reply, _HEADER.size)[0]
            if code in (0, errno.ENOENT):
                return None
            raise OSError(code, os.strerror(code))
        return original(reply)
