"""What TCP connections on a link carry, told from the first bytes that each side sends. Pure: bytes in, words out.

Bounded: of each direction of a flow at most FIRST bytes are kept, and only until they have been recognised; the flow
that was silent for longest is forgotten for one too many.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address

from ztunnel.cli.wire.frames import ACK, FIN, RST, SYN, Segment

FIRST = 4096  # bytes
MOST_FLOWS = 4096
HBONE_PORT = 15008
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n"
METHODS = (b"GET ", b"POST ", b"PUT ", b"HEAD ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"CONNECT ", b"TRACE ")
HANDSHAKE, CLIENT_HELLO, SERVER_HELLO = 22, 1, 2
TLS_RECORDS = range(20, 25)
EXTENSION_SNI, EXTENSION_ALPN, EXTENSION_VERSIONS = 0, 16, 43
VERSIONS = {0x0301: "1.0", 0x0302: "1.1", 0x0303: "1.2", 0x0304: "1.3"}
GREASE = 0x0A0A  # RFC 8701: values of this form mean nothing

TLS, PLAINTEXT, UNKNOWN, EMPTY = "TLS", "plaintext", "unknown", "no data"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a direction's first bytes are: `kind` is TLS, plaintext or unknown; `detail` says more."""

    kind: str
    detail: str = ""


def recognise(data: bytes) -> Verdict | None:
    """What the first bytes of a stream are; None if more of them are needed to tell."""
    if not data:
        return None
    if data[0] in TLS_RECORDS and data[1:2] in (b"", b"\x03"):
        return _tls(data)
    for start in (HTTP2_PREFACE, *METHODS, b"HTTP/1.", b"SSH-"):
        if data[: len(start)] == start[: len(data)]:
            return _text(data, start)
    if _printable(data[:64]):
        return Verdict(PLAINTEXT, "text")
    return Verdict(UNKNOWN, f"binary, begins with {data[:8].hex(' ')}")


def _text(data: bytes, start: bytes) -> Verdict | None:
    if len(data) < len(start):
        return None
    if start == HTTP2_PREFACE:
        return Verdict(PLAINTEXT, "HTTP/2 without TLS")
    line, newline, _ = data.partition(b"\r\n")
    if not newline and len(data) < FIRST:
        return None
    told = line[:80].decode("ascii", "replace")
    return Verdict(PLAINTEXT, told if told.isprintable() else repr(told))


def _printable(data: bytes) -> bool:
    return all(32 <= byte < 127 or byte in b"\t\r\n" for byte in data)


def _tls(data: bytes) -> Verdict | None:
    if len(data) < 6:
        return None
    kind, _, version, size = data[0], data[1], data[2], int.from_bytes(data[3:5], "big")
    if version > 4 or size > 0x4800:
        return Verdict(UNKNOWN, f"binary, begins with {data[:8].hex(' ')}")
    if kind != HANDSHAKE:
        names = {20: "change cipher spec", 21: "alert", 23: "application data"}
        return Verdict(TLS, f"{names.get(kind, 'record')}; the handshake was before the capture")
    if len(data) < 5 + size and len(data) < FIRST:
        return None
    body = data[5 : 5 + size]
    try:
        if body[0] == CLIENT_HELLO:
            return Verdict(TLS, _client_hello(body[4:]))
        if body[0] == SERVER_HELLO:
            return Verdict(TLS, _server_hello(body[4:]))
    except (IndexError, struct.error):
        return Verdict(TLS, "a handshake that is cut off or malformed")
    return Verdict(TLS, "handshake")


def _client_hello(body: bytes) -> str:
    """RFC 8446, 4.1.2."""
    at = 34  # version, random
    at += 1 + body[at]  # session id
    at += 2 + int.from_bytes(body[at : at + 2], "big")  # cipher suites
    at += 1 + body[at]  # compression methods
    found = dict(_extensions(body, at))
    words = []
    name = found.get(EXTENSION_SNI)
    words.append(f"SNI {name[5:].decode('ascii', 'replace')}" if name else "no SNI")
    protocols = found.get(EXTENSION_ALPN)
    words.append(f"ALPN {','.join(_protocols(protocols))}" if protocols else "no ALPN")
    versions = found.get(EXTENSION_VERSIONS, b"")
    offered = [int.from_bytes(versions[i : i + 2], "big") for i in range(1, len(versions), 2)]
    known = [VERSIONS.get(one, hex(one)) for one in offered if one & 0x0F0F != GREASE]
    words.append(f"offers TLS {', '.join(known) if known else '1.2 at most'}")
    return "; ".join(words)


def _server_hello(body: bytes) -> str:
    """RFC 8446, 4.1.3."""
    at = 34
    at += 1 + body[at]
    at += 3  # cipher suite, compression method
    found = dict(_extensions(body, at))
    chosen = found.get(EXTENSION_VERSIONS)
    version = int.from_bytes(chosen or body[:2], "big")
    return f"chose TLS {VERSIONS.get(version, hex(version))}"


def _extensions(body: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    if at + 2 > len(body):
        return
    end = at + 2 + int.from_bytes(body[at : at + 2], "big")
    at += 2
    while at + 4 <= min(end, len(body)):
        kind, size = struct.unpack_from("!HH", body, at)
        yield kind, body[at + 4 : at + 4 + size]
        at += 4 + size


def _protocols(data: bytes) -> Iterator[str]:
    at = 2
    while at < len(data):
        yield data[at + 1 : at + 1 + data[at]].decode("ascii", "replace")
        at += 1 + data[at]


@dataclass(slots=True)
class _Side:
    """One direction."""

    expected: int | None = None
    first: bytes = b""
    verdict: Verdict | None = None
    packets: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Flow:
    """A TCP connection: `client` opened it as far as is known, each an address and port."""

    client: str
    server: str
    port: int
    seen: float = 0.0
    begun: bool = False  # its SYN was seen
    ended: bool = False
    told: str = ""
    sides: tuple[_Side, _Side] = field(default_factory=lambda: (_Side(), _Side()))

    @property
    def verdict(self) -> Verdict:
        """TLS if either side speaks it, plaintext if one of them does, else unknown, or that there was no data."""
        found = [side.verdict for side in self.sides if side.verdict is not None]
        for kind in (PLAINTEXT, TLS, UNKNOWN):
            of_kind = [one for one in found if one.kind == kind]
            if of_kind:
                return Verdict(kind, "; ".join(dict.fromkeys(one.detail for one in of_kind if one.detail)))
        waiting = [side for side in self.sides if side.first]
        return Verdict(UNKNOWN, "too little data to tell") if waiting else Verdict(EMPTY)

    @property
    def hbone(self) -> bool:
        """Whether it is a tunnel of the mesh, by its port."""
        return self.port == HBONE_PORT

    def describe(self) -> dict[str, object]:
        """For JSON."""
        verdict = self.verdict
        return {
            "client": self.client,
            "server": self.server,
            "security": verdict.kind,
            "detail": verdict.detail,
            "hbone": self.hbone,
            "whole": self.begun,
            "ended": self.ended,
            "packets": sum(side.packets for side in self.sides),
            "bytes_sent": self.sides[0].bytes,
            "bytes_recv": self.sides[1].bytes,
        }


class Flows:
    """The flows of a link; `add` takes its segments in order."""

    def __init__(self) -> None:
        self._flows: OrderedDict[tuple[bytes, int, bytes, int], Flow] = OrderedDict()
        self.forgotten = 0

    def __iter__(self) -> Iterator[Flow]:
        return iter(self._flows.values())

    def add(self, segment: Segment, now: float) -> Flow | None:
        """Take a segment; the flow if what it carries has become known by it, or known better."""
        _, source_port, _, port = segment.key
        backwards = segment.key[2:] + segment.key[:2]
        opening = bool(segment.flags & SYN) and not segment.flags & ACK
        flow = self._flows.get(segment.key)
        side = 0
        if flow is None:
            flow = self._flows.get(backwards)
            side = 1
        if opening and flow is not None and (flow.ended or side == 1):
            del self._flows[segment.key if side == 0 else backwards]
            flow = None
        if flow is None:
            # Without its SYN, the lower port is taken for the server's.
            answered = bool(segment.flags & SYN and segment.flags & ACK)
            side = 1 if not opening and (answered or source_port < port) else 0
            flow = self._new(segment, backwards, side)
            flow.begun = opening
        else:
            self._flows.move_to_end(segment.key if side == 0 else backwards)
        flow.seen = now
        one = flow.sides[side]
        one.packets += 1
        self._take(one, segment)
        if segment.flags & (FIN | RST):
            flow.ended = True
        told = f"{flow.verdict.kind} {flow.verdict.detail}"
        if told != flow.told and flow.verdict.kind != EMPTY and any(each.verdict for each in flow.sides):
            flow.told = told
            return flow
        return None

    def _new(self, segment: Segment, backwards: tuple[bytes, int, bytes, int], side: int) -> Flow:
        key = segment.key if side == 0 else backwards
        flow = Flow(_end(key[0], key[1]), _end(key[2], key[3]), key[3])
        self._flows[key] = flow
        if len(self._flows) > MOST_FLOWS:
            self._flows.popitem(last=False)
            self.forgotten += 1
        return flow

    def _take(self, side: _Side, segment: Segment) -> None:
        sequence = segment.sequence
        if segment.flags & SYN:
            side.expected = (sequence + 1) & 0xFFFFFFFF
        payload = segment.payload
        side.bytes += len(payload)
        if side.verdict is not None or not payload:
            return
        if side.expected is None:
            side.expected = sequence
        # What was sent again or came early is no part of the beginning.
        if sequence != side.expected:
            return
        side.expected = (sequence + len(payload)) & 0xFFFFFFFF
        side.first = (side.first + payload)[:FIRST]
        side.verdict = recognise(side.first)
        if side.verdict is None and len(side.first) >= FIRST:
            side.verdict = Verdict(UNKNOWN, "too long a beginning")
        if side.verdict is not None:
            side.first = b""


def _end(address: bytes, port: int) -> str:
    text = str(ip_address(address))
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"
