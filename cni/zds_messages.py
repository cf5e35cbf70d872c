"""ZDS's messages, as far as the agent writes and reads them (ztunnel/wire/proto/zds.proto), in protobuf's encoding.

Written out, because the protobuf library is 3 MB of an agent for nine fields of text. Pure: bytes in, bytes out.
https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator
from typing import NamedTuple

from ztunnel.inpod.pods import WorkloadInfo, ZdsError

V1 = 1
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_LONGEST_VARINT = 10  # bytes
_VERSION = 1  # of ZdsHello
_ACK, _ERROR = 1, 1  # of WorkloadResponse, of Ack


class Request(NamedTuple):
    """A WorkloadRequest: which one, as the protocol calls it, and its bytes."""

    name: str
    data: bytes


SNAPSHOT_SENT = Request("snapshot_sent", b"\x1a\0")


def add(uid: str, info: WorkloadInfo) -> Request:
    """A pod whose network namespace comes beside it."""
    who = _text(1, info.name) + _text(2, info.namespace) + _text(3, info.service_account)
    return Request("add", _field(1, _text(1, uid) + _field(2, who)))


def keep(uid: str) -> Request:
    """A pod that this proxy has."""
    return Request("keep", _field(5, _text(1, uid)))


def delete(uid: str) -> Request:
    """A pod that is no more."""
    return Request("del", _field(2, _text(2, uid)))


def hello_version(data: bytes) -> int:
    """The version that a ZdsHello names, 0 for none. Raises ZdsError where it is none."""
    version = 0
    for number, value in _fields(data, "ZdsHello"):
        if number == _VERSION and isinstance(value, int):
            version = value
    return version


def answer(data: bytes) -> str | None:
    """The error in a WorkloadResponse, "" for none; None where it holds no answer. Raises ZdsError where it is none."""
    what = "WorkloadResponse"
    acks = [value for number, value in _fields(data, what) if number == _ACK and isinstance(value, bytes)]
    if not acks:
        return None
    error = b""
    for number, value in _fields(b"".join(acks), what):  # of a message that comes twice, both are one
        if number == _ERROR and isinstance(value, bytes):
            error = value
    try:
        return error.decode()
    except UnicodeDecodeError as problem:
        raise ZdsError(f"malformed packet, expected {what}: {problem}") from None


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _varint(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _field(number, value.encode()) if value else b""


def _fields(data: bytes, what: str) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message, those too that are not known here. Raises ZdsError."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = 0
        for index, byte in enumerate(data[place : place + _LONGEST_VARINT]):
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                place += index + 1
                return value
        raise ZdsError(f"malformed packet, expected {what}: a number without an end")

    while place < len(data):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT and number:
            yield number, varint()
            continue
        size = varint() if kind == _BYTES else {_FIXED_64: 8, _FIXED_32: 4}.get(kind, -1)
        if not number or not 0 <= size <= len(data) - place:
            raise ZdsError(f"malformed packet, expected {what}: no field of protobuf at byte {place}")
        place += size
        yield number, data[place - size : place]
