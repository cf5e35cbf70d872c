"""The proof's detector: finds a marker wherever it lies in a capture, and says what it could not see.

Frames are made by scapy and go through a capture file, as real ones would.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet
from scapy.utils import RawPcapReader, wrpcap

from ztunnel.cli.demo.detector import Detector
from ztunnel.cli.wire.frames import parse

MARKER = b"AMBIENT-MARKER-0123456789abcdef"
ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
START = 0xFFFFFFF0  # sequence numbers wrap within the first bytes


def segment(
    payload: bytes, sequence: int, flags: str = "PA", *, six: bool = False, port: int = 9080
) -> Packet:
    addresses = (
        IPv6(src="fd00:10:244:1::2", dst="fd00:10:244:2::2")
        if six
        else IP(src="10.244.1.2", dst="10.244.2.2")
    )
    tcp = TCP(sport=40000, dport=port, seq=sequence & 0xFFFFFFFF, flags=flags)
    return ETHER / addresses / tcp / payload


def stream(pieces: Sequence[bytes], *, six: bool = False) -> list[Packet]:
    """A SYN and the pieces of a stream, one segment each."""
    found = [segment(b"", START, "S", six=six)]
    sequence = START + 1
    for piece in pieces:
        found.append(segment(piece, sequence, six=six))
        sequence += len(piece)
    return found


def captured(packets: Iterable[Packet], marker: bytes = MARKER) -> Detector:
    detector = Detector(marker)
    for packet in packets:
        detector.frame(bytes(packet))
    detector.finish()
    return detector


def cut(data: bytes, *places: int) -> list[bytes]:
    return [data[a:b] for a, b in itertools.pairwise([0, *places, len(data)])]


def test_a_capture_file_is_searched_and_counted(tmp_path: Path) -> None:
    packets = [
        *stream([b"GET / HTTP/1.1\r\nx-marker: " + MARKER + b"\r\n\r\n"]),
        *stream([b"nothing"], six=True),
    ]
    wrpcap(str(tmp_path / "link.pcap"), packets)
    detector = Detector(MARKER)
    frames = [frame for frame, _ in RawPcapReader(str(tmp_path / "link.pcap"))]
    for frame in frames:
        detector.frame(frame)
    detector.finish()
    assert (detector.packets, detector.sightings, detector.gaps) == (4, 1, 0)
    assert detector.bytes == sum(map(len, frames))
    assert detector.ports == {9080: 4}


def test_a_link_without_the_marker_has_no_sightings() -> None:
    almost = MARKER[:-1]
    detector = captured(stream([almost, b"x", almost + b"y" + MARKER[1:]]))
    assert (detector.packets, detector.sightings) == (4, 0)


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("place", [1, 7, len(MARKER) - 1])
def test_a_marker_spread_over_two_segments_is_found(six: bool, place: int) -> None:
    pieces = cut(b"before" + MARKER + b"after", 6 + place)
    detector = captured(stream(pieces, six=six))
    assert (detector.in_frames, detector.across) == (0, 1)


def test_a_marker_sent_byte_by_byte_is_found() -> None:
    assert captured(stream([bytes([byte]) for byte in b"ab" + MARKER + b"cd"])).sightings == 1


def test_segments_that_overtake_one_another_are_put_in_order() -> None:
    head, *rest = stream(cut(b"before" + MARKER + b"after", 8, 14, 20, 30))
    for order in itertools.permutations(rest):
        # The connection's first segment tells where the stream starts, so it is the one that cannot come late.
        assert captured([head, *order]).sightings == 1


def test_bytes_sent_again_do_not_hide_the_marker_nor_count_twice() -> None:
    syn, first, second, third = stream(cut(MARKER + b"tail", 5, 12))
    assert captured([syn, first, first, second, first, third, second]).sightings == 1
    overlapping = segment(MARKER[2:20], START + 1 + 2)
    assert captured([syn, first, overlapping, third]).sightings == 1


def test_a_missing_segment_is_a_gap_and_what_follows_is_searched() -> None:
    syn, first, _lost, third, fourth = stream([b"start", b"lost", MARKER[:9], MARKER[9:]])
    detector = captured([syn, first, fourth, third])
    assert (detector.sightings, detector.gaps) == (1, 1)


def test_a_stream_picked_up_in_its_middle_is_searched() -> None:
    _syn, _first, *rest = stream([b"unseen", MARKER[:4], MARKER[4:]])
    assert captured(rest).sightings == 1


def test_directions_and_connections_do_not_mix() -> None:
    there, back = segment(MARKER[:10], 100), segment(MARKER[10:], 110)
    back[TCP].sport, back[TCP].dport = 9080, 40000
    assert captured([there, back]).sightings == 0
    again = [segment(MARKER[:10], 100), segment(b"", 109, "S"), segment(MARKER[10:], 110)]
    assert captured(again).sightings == 0


def test_other_protocols_are_searched_frame_by_frame() -> None:
    udp = ETHER / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2) / (b"q" + MARKER)
    path = ETHER / Dot1Q(vlan=7) / IP(src="10.0.0.1", dst="10.0.0.2")
    first = path / TCP(sport=50000, dport=80, flags="A", seq=0) / MARKER[:9]
    second = path / TCP(sport=50000, dport=80, flags="A", seq=9) / MARKER[9:]
    options = ETHER / IPv6() / IPv6ExtHdrDestOpt() / TCP(sport=50000, dport=80)
    detector = captured([udp, first, second, options])
    assert (detector.in_frames, detector.across, detector.ports) == (1, 1, {80: 3})


def test_a_short_frame_padded_by_the_link_keeps_its_stream_straight() -> None:
    syn, first, second = stream([MARKER[:2], MARKER[2:]])
    padded = bytes(first) + b"\0" * 6  # Ethernet frames have at least 60 bytes
    assert captured([syn, padded, second]).sightings == 1


def test_a_segment_that_a_full_queue_lost_is_no_gap_when_it_comes_again_a_window_later() -> None:
    piece = bytes(60000)
    detector = Detector(MARKER)
    detector.frame(bytes(segment(b"", START, "S")))
    lost = segment(piece[:-7] + MARKER[:7], START + 1)
    for number in range(32 * 2**20 // len(piece)):
        payload = MARKER[7:] + piece[len(MARKER) - 7 :] if number == 0 else piece
        detector.frame(bytes(segment(payload, START + 1 + len(piece) * (number + 1))))
    assert detector.pending > 31 * 2**20
    assert (detector.across, detector.gaps) == (0, 0)
    detector.frame(bytes(lost))
    assert (detector.across, detector.gaps, detector.pending) == (1, 0, 0)


def test_memory_stays_bounded_when_a_segment_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztunnel.cli.demo.detector.MOST_PENDING", 1 << 20)
    detector = Detector(MARKER)
    detector.frame(bytes(segment(b"", START, "S")))
    payload = random.Random(1).randbytes(1400)
    for number in range(1, 3000):
        detector.frame(bytes(segment(payload, START + 1 + number * 1400)))
        assert detector.pending <= 1 << 20
    assert detector.gaps == 1


def test_what_waited_in_a_flow_that_ends_is_given_back() -> None:
    detector = Detector(MARKER)
    for flags in ("R", "S"):
        for packet in (segment(b"", START, "S"), segment(b"early", START + 100)):
            detector.frame(bytes(packet))
        assert detector.pending == 5
        detector.frame(bytes(segment(b"", START, flags)))
        assert detector.pending == 0


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_without_an_exception(data: bytes) -> None:
    detector = Detector(b"marker")
    detector.frame(data)
    whole = bytes(segment(b"x" * 20, 1))
    detector.frame(whole[: len(data)] + data)
    detector.finish()
    assert detector.packets == 2


@given(
    st.lists(st.integers(0, len(MARKER) + 12), max_size=6),
    st.randoms(use_true_random=False),
)
def test_however_a_stream_is_cut_ordered_and_repeated_the_marker_is_found_or_counted(
    places: list[int], rng: random.Random
) -> None:
    pieces = [piece for piece in cut(b"before" + MARKER + b"after!", *sorted(places)) if piece]
    syn, *rest = stream(pieces)
    for piece in rng.sample(rest, k=len(rest) // 2):
        rest.insert(rng.randrange(len(rest) + 1), piece)
    rng.shuffle(rest)
    assert captured([syn, *rest]).sightings >= 1


def test_parse_agrees_with_scapy() -> None:
    for six in (False, True):
        frame = bytes(segment(b"hello", 77, "PA", six=six))
        found = parse(frame)
        assert found is not None
        assert (found.key[1], found.key[3], found.sequence, found.flags, found.payload) == (
            40000,
            9080,
            77,
            0x18,
            b"hello",
        )
