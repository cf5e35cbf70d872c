"""Ethernet frames and the TCP segments in them: bytes in, values out; no sockets and no clock here."""

import struct
from dataclasses import dataclass

ETHERNET_HEADER = 14
IPV4, IPV6, VLAN, SERVICE_VLAN = 0x0800, 0x86DD, 0x8100, 0x88A8
TCP = 6
IPV6_EXTENSIONS = {0, 43, 60}  # hop-by-hop, routing, destination options: each (next header, length / 8 - 1)
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

FlowKey = tuple[bytes, int, bytes, int]

_tcp_header = struct.Struct("!HHIIBB")


@dataclass(slots=True, frozen=True)
class Segment:
    """A TCP segment as found in a frame."""

    key: FlowKey
    sequence: int
    flags: int
    payload: bytes


def parse(frame: bytes) -> Segment | None:
    """The TCP segment in an Ethernet frame; None where there is none (or only a fragment, or a cut-off one)."""
    try:
        return _parse(frame)
    except (struct.error, IndexError):
        return None


def _parse(frame: bytes) -> Segment | None:
    offset = ETHERNET_HEADER
    ethertype = int.from_bytes(frame[12:14], "big")
    while ethertype in (VLAN, SERVICE_VLAN):
        ethertype = int.from_bytes(frame[offset + 2 : offset + 4], "big")
        offset += 4
    if ethertype == IPV4:
        header = (frame[offset] & 0x0F) * 4
        length, fragment = struct.unpack_from("!H2xH", frame, offset + 2)
        if frame[offset + 9] != TCP or fragment & 0x3FFF:
            return None
        source, destination = frame[offset + 12 : offset + 16], frame[offset + 16 : offset + 20]
        # Length 0 is what a kernel writes into a segment of more than 64 KiB that its device will cut.
        end = offset + length if length else len(frame)
        offset += header
    elif ethertype == IPV6:
        length, following = struct.unpack_from("!HB", frame, offset + 4)
        source, destination = frame[offset + 8 : offset + 24], frame[offset + 24 : offset + 40]
        offset += 40
        end = offset + length if length else len(frame)
        while following in IPV6_EXTENSIONS:
            following, size = frame[offset], frame[offset + 1] * 8 + 8
            offset += size
        if following != TCP:
            return None
    else:
        return None
    source_port, destination_port, sequence, _, data, flags = _tcp_header.unpack_from(frame, offset)
    payload = frame[offset + (data >> 4) * 4 : min(end, len(frame))]
    return Segment((source, source_port, destination, destination_port), sequence, flags, payload)
