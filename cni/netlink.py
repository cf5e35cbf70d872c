"""Talk to one network namespace's kernel over netlink and see every answer; pyroute2's classes encode what is asked.

pyroute2's own sockets run an asyncio loop each, send nftables batches without reading the answers, and reach
other namespaces by forking. A netlink socket belongs to the namespace it was made in, whoever uses it later, so
here the calling thread is in the other namespace only while the socket is made, and all requests are plain
system calls. Everything here blocks (for less than a millisecond as a rule): call it from a thread.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

from pyroute2.netlink import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    nlmsg,
)

from ztunnel.inpod import netns

SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NLM_F_ACK_TLVS = 0x200
NLMSGERR_ATTR_MSG = 1

ANSWER_TIMEOUT = 5.0  # seconds; the kernel answers a dump as fast as it is read
DUMP_ATTEMPTS = 10

NLA_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type

T = TypeVar("T")


class NetlinkError(OSError):
    """The kernel refused a request: `errno`, what it said about it, and `index`, which of the messages it was."""

    def __init__(self, code: int, detail: str, index: int = 0) -> None:
        super().__init__(code, f"{os.strerror(code)}: {detail}" if detail else os.strerror(code))
        self.detail = detail
        self.index = index


class NetlinkSocket:
    """A netlink socket of one protocol in the network namespace open as `namespace` (stays the caller's).

    Raises OSError where the namespace cannot be entered, or the kernel lacks the protocol (EPROTONOSUPPORT).
    """

    def __init__(self, protocol: int, namespace: int) -> None:
        with netns.inside(namespace):
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, request: bytes, sequences: range) -> None:
        """Send encoded messages as one packet and check the kernel's answer to each of `sequences`.

        The messages with those sequence numbers must carry NLM_F_ACK. The kernel works a packet off inside
        the send call, so all answers are there when it returns. Raises NetlinkError for the first message
        refused (its `index` counts from the first of `sequences`).
        """
        self._socket.settimeout(ANSWER_TIMEOUT)
        self._socket.send(request)
        self._socket.settimeout(0)
        answered = set()
        refused: NetlinkError | None = None
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                break
            for kind, flags, sequence, offset, end in _messages(data):
                if kind != NLMSG_ERROR:
                    continue
                answered.add(sequence)
                code, detail = _error(data, flags, offset, end)
                if code and refused is None:
                    refused = NetlinkError(code, detail, max(0, sequence - sequences.start))
        if refused is not None:
            raise refused
        if not answered.issuperset(sequences):
            raise NetlinkError(errno.EPROTO, "the kernel did not acknowledge the whole request")

    def request(self, message: Any, kind: int, flags: int = 0) -> None:
        """Send one pyroute2 message and wait for its acknowledgement. Raises NetlinkError."""
        self.send(encode(message, kind, flags | NLM_F_ACK, 1), range(1, 2))

    def dump(self, request: bytes, read: Callable[[bytes], T]) -> list[T]:
        """What `read` makes of the payload (all after the netlink header) of each object that the kernel lists.

        `request` is a dump request as `dump_request` encodes it. A list that changed while it was read is read again.
        Raises NetlinkError.
        """
        for attempt in range(1, DUMP_ATTEMPTS + 1):
            payloads, interrupted = self._dump(
                request[:8] + struct.pack("=I", attempt) + request[12:], attempt
            )
            if not interrupted:
                return [read(payload) for payload in payloads]
        raise NetlinkError(errno.EAGAIN, "the kernel's list kept changing while it was read")

    def _dump(self, request: bytes, wanted: int) -> tuple[list[bytes], bool]:
        found: list[bytes] = []
        interrupted = False
        self._socket.settimeout(ANSWER_TIMEOUT)
        self._socket.send(request)
        while True:
            data = self._socket.recv(1 << 18)
            for kind, flags, sequence, offset, end in _messages(data):
                if sequence != wanted:
                    continue
                interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                if kind == NLMSG_ERROR:
                    code, detail = _error(data, flags, offset, end)
                    raise NetlinkError(code, detail)
                if kind == NLMSG_DONE:
                    return found, interrupted
                found.append(data[offset:end])


def encode(message: Any, kind: int, flags: int, sequence: int) -> bytes:
    """The bytes of a pyroute2 message with its netlink header filled in (NLM_F_REQUEST is added)."""
    header = message["header"]
    header["type"] = kind
    header["flags"] = flags | NLM_F_REQUEST
    header["sequence_number"] = sequence
    message.encode()
    return bytes(message.data)


def payload_of(message: Any) -> bytes:
    """What follows the netlink header in a pyroute2 message."""
    return encode(message, 0, 0, 0)[_HEADER.size :]


def decoded(kind: type[Any], payload: bytes) -> Any:
    """A payload as a pyroute2 message of class `kind`: slow, some 0.2 ms with a few nested attributes."""
    message = kind(_HEADER.pack(_HEADER.size + len(payload), 0, 0, 0, 0) + payload)
    message.decode()
    return message


def dump_request(message: Any, kind: int) -> bytes:
    """A pyroute2 message as the request that `NetlinkSocket.dump` sends."""
    return encode(message, kind, NLM_F_DUMP, 0)


def raw_attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """The attributes from `offset` on by number, undecoded (netlink(7)); of a kind that comes twice the last."""
    return dict(_raw_pairs(data, offset))


def raw_attribute_list(data: bytes) -> list[bytes]:
    """The attributes of a nested list in order, undecoded, of whatever kind."""
    return [value for _, value in _raw_pairs(data, 0)]


def _raw_pairs(data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        yield kind & NLA_TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3


def number(raw: bytes | None) -> int:
    """An attribute that holds a number in the machine's order; 0 for one that is not there."""
    return int.from_bytes(raw or b"", sys.byteorder)


def attributes(message: Any) -> dict[str, Any]:
    """The attributes of a decoded pyroute2 message by name (the last of a kind where it comes twice)."""
    found: dict[str, Any] = {}
    for attribute in message["attrs"]:
        found[attribute[0]] = attribute[1]
    return found


def message_of(kind: type[Any], fields: dict[str, int], attrs: Sequence[tuple[str, Any]]) -> Any:
    """A pyroute2 message of class `kind` with these header fields and attributes."""
    message: nlmsg = kind()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = [list(pair) for pair in attrs]
    return message


def _messages(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """Split a packet: (type, flags, sequence, start and end of the payload) for each message in it."""
    found = []
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            break
        found.append((kind, flags, sequence, offset + _HEADER.size, min(offset + length, len(data))))
        offset += (length + 3) & ~3
    return found


def _error(data: bytes, flags: int, offset: int, end: int) -> tuple[int, str]:
    """errno (0: accepted) and the kernel's own words, if any, of an NLMSG_ERROR message."""
    code = -struct.unpack_from("=i", data, offset)[0]
    if not flags & NLM_F_ACK_TLVS:
        return code, ""
    # NETLINK_CAP_ACK: the refused message itself is left out, only its header is repeated.
    said = raw_attributes(data[:end], offset + 4 + _HEADER.size).get(NLMSGERR_ATTR_MSG, b"")
    return code, said.rstrip(b"\0").decode(errors="replace")
