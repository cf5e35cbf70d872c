"""Finds a marker in the frames of a link, wherever it lies: bytes in, counts out; no sockets and no clock here.

Every frame is searched as it is, whatever its protocol. TCP streams are put in order as well (RFC 9293, 3.4), so
that a marker which is spread over segments, sent again or overtaken by another is found too.
"""

import heapq
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from ztunnel.cli.wire.frames import FIN, RST, SYN, FlowKey, Segment, parse

MOST_FLOWS = 65536  # directions of connections followed at a time; the longest unused is forgotten
# Bytes kept while an earlier segment is missing, all flows together. A segment that the link lost comes again after
# up to a window of others, and kernels let windows grow to net.ipv4.tcp_rmem: 6 MiB by default, 32 MiB where tuned.
MOST_PENDING = 64 << 20


@dataclass(slots=True)
class Flow:
    """One direction of a TCP connection: the next byte expected, the last ones seen, those that came early.

    Places are counted from the first byte seen and do not wrap: `expected` is the sequence number at `place`.
    """

    expected: int
    place: int = 0
    tail: bytes = b""
    early: dict[int, bytes] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)  # the places of `early`, as a heap


class Detector:
    """Counts the frames and bytes of a link, its TCP connections by port, and the sightings of `marker`.

    `in_frames` counts occurrences within one frame, each time the frame is seen; `across` those that only the
    stream in its order shows. `gaps` counts places of TCP streams where the capture lacks bytes.
    """

    def __init__(self, marker: bytes) -> None:
        if not marker:
            raise ValueError("an empty marker is everywhere")
        self.marker = marker
        self.packets = 0
        self.bytes = 0
        self.in_frames = 0
        self.across = 0
        self.gaps = 0
        self.ports: Counter[int] = Counter()
        self._pending = 0
        self._flows: OrderedDict[FlowKey, Flow] = OrderedDict()

    @property
    def pending(self) -> int:
        """Bytes that wait for an earlier segment."""
        return self._pending

    @property
    def sightings(self) -> int:
        """How often the marker was readable on the link."""
        return self.in_frames + self.across

    def frame(self, frame: bytes) -> None:
        """Take in one Ethernet frame, in the order of capture."""
        self.packets += 1
        self.bytes += len(frame)
        self.in_frames += frame.count(self.marker)
        segment = parse(frame)
        if segment is not None:
            # Servers listen below the range that clients take their ports from (net.ipv4.ip_local_port_range).
            self.ports[min(segment.key[1], segment.key[3])] += 1
            self._segment(segment)

    def finish(self) -> None:
        """Search what still waits for missing segments; to be called after the last frame."""
        for flow in self._flows.values():
            while flow.early:
                self._skip_gap(flow)

    def _segment(self, segment: Segment) -> None:
        key, sequence = segment.key, segment.sequence
        if segment.flags & SYN:
            sequence = (sequence + 1) & 0xFFFFFFFF
            self._forget(self._flows.pop(key, None))
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = Flow(expected=sequence)
            if len(self._flows) > MOST_FLOWS:
                self._forget(self._flows.popitem(last=False)[1])
        else:
            self._flows.move_to_end(key)
        if segment.payload:
            self._place(flow, sequence, segment.payload)
        if segment.flags & RST or (segment.flags & FIN and not flow.early):
            self._forget(self._flows.pop(key))

    def _forget(self, flow: Flow | None) -> None:
        if flow is not None:
            self._pending -= sum(map(len, flow.early.values()))

    def _place(self, flow: Flow, sequence: int, payload: bytes) -> None:
        distance = _distance(flow.expected, sequence)
        if distance > 0:
            place = flow.place + distance
            known = flow.early.get(place, b"")
            if not known:
                heapq.heappush(flow.order, place)
            if len(payload) > len(known):
                flow.early[place] = payload
                self._pending += len(payload) - len(known)
            if self._pending > MOST_PENDING:
                self._skip_gap(flow)
            return
        if distance + len(payload) <= 0:
            return  # all of it was seen before
        self._append(flow, payload[-distance:] if distance else payload)
        self._append_early(flow)

    def _append_early(self, flow: Flow) -> None:
        while flow.order and flow.order[0] <= flow.place:
            place = heapq.heappop(flow.order)
            payload = flow.early.pop(place)
            self._pending -= len(payload)
            seen = flow.place - place
            if seen < len(payload):
                self._append(flow, payload[seen:])

    def _skip_gap(self, flow: Flow) -> None:
        self.gaps += 1
        distance = flow.order[0] - flow.place
        flow.place += distance
        flow.expected = (flow.expected + distance) & 0xFFFFFFFF
        flow.tail = b""
        self._append_early(flow)

    def _append(self, flow: Flow, payload: bytes) -> None:
        """Take the next bytes of the stream; what lies within one segment was counted with its frame."""
        keep = len(self.marker) - 1
        if flow.tail:
            self.across += (flow.tail + payload[:keep]).count(self.marker)
        flow.tail = (flow.tail + payload)[-keep:] if keep else b""
        flow.place += len(payload)
        flow.expected = (flow.expected + len(payload)) & 0xFFFFFFFF


def _distance(start: int, end: int) -> int:
    """How far `end` lies after `start` in sequence numbers, negative if before (modulo 2^32)."""
    return ((end - start + 0x80000000) & 0xFFFFFFFF) - 0x80000000
