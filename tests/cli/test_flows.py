"""What flows on a link carry, told from their first bytes: real TLS handshakes, plaintext, pieces, and nonsense."""

import os
import ssl

import pytest

from ztunnel.cli.wire import flows
from ztunnel.cli.wire.flows import EMPTY, PLAINTEXT, TLS, UNKNOWN, Flows, recognise
from ztunnel.cli.wire.frames import ACK, FIN, SYN, Segment

CLIENT, SERVER = b"\x0a\0\0\1", b"\x0a\0\0\2"


def client_hello(name: str | None, *protocols: str) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    outgoing = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def test_a_client_hello_names_what_it_asks_for() -> None:
    verdict = recognise(client_hello("reviews.example", "h2", "http/1.1"))
    assert verdict is not None
    assert verdict.kind == TLS
    assert "SNI reviews.example" in verdict.detail
    assert "ALPN h2,http/1.1" in verdict.detail
    assert "1.3" in verdict.detail
    bare = recognise(client_hello(None))
    assert bare is not None
    assert bare.detail.startswith("no SNI; no ALPN")


def test_a_hello_is_recognised_once_it_is_whole() -> None:
    hello = client_hello("a.example")
    assert all(recognise(hello[:size]) is None for size in range(len(hello)))
    assert recognise(hello) is not None


@pytest.mark.parametrize(
    ("data", "kind", "detail"),
    [
        (b"GET /x HTTP/1.1\r\nHost: a\r\n", PLAINTEXT, "GET /x HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n", PLAINTEXT, "HTTP/1.1 200 OK"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", PLAINTEXT, "HTTP/2 without TLS"),
        (b"SSH-2.0-OpenSSH_9\r\n", PLAINTEXT, "SSH-2.0-OpenSSH_9"),
        (b"hello there\n", PLAINTEXT, "text"),
        (b"\x00\x01\x02\x03\xff\xfe", UNKNOWN, "binary, begins with 00 01 02"),
        (b"\x17\x03\x03\x00\x20" + bytes(32), TLS, "application data; the handshake was before"),
        (b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", TLS, "malformed"),
        (b"\x16\x03\x09\x00\x04zzzz", UNKNOWN, "binary"),
    ],
)
def test_beginnings(data: bytes, kind: str, detail: str) -> None:
    verdict = recognise(data)
    assert verdict is not None
    assert verdict.kind == kind
    assert detail in verdict.detail


def test_anything_at_all_is_recognised_or_waited_for_and_never_fails() -> None:
    for size in (1, 2, 5, 6, 40, 300, 4096):
        for start in (
            b"",
            b"\x16\x03\x01\x01\x00",
            b"\x16\x03\x01\x01\x00\x01",
            b"\x16\x03\x03\x00\x30\x02",
            b"GET ",
        ):
            for _ in range(50):
                verdict = recognise((start + os.urandom(size))[: flows.FIRST])
                assert verdict is None or verdict.kind in (TLS, PLAINTEXT, UNKNOWN)


class Dialogue:
    """Segments of one connection, in both directions."""

    def __init__(self, port: int = 15008) -> None:
        self.flows = Flows()
        self.port = port
        self.next = [1000, 5000]

    def send(self, side: int, data: bytes = b"", flags: int = ACK, sequence: int | None = None) -> object:
        key = (CLIENT, 40000, SERVER, self.port) if side == 0 else (SERVER, self.port, CLIENT, 40000)
        at = self.next[side] if sequence is None else sequence
        if sequence is None:
            self.next[side] += len(data) + (1 if flags & (SYN | FIN) else 0)
        return self.flows.add(Segment(key, at, flags, data), 0)


def test_a_tunnel_from_its_first_packet_to_its_last() -> None:
    talk = Dialogue()
    assert talk.send(0, flags=SYN) is None
    assert talk.send(1, flags=SYN | ACK) is None
    hello = client_hello(None, "h2")
    assert talk.send(0, hello[:100]) is None
    told = talk.send(0, hello[100:])
    (flow,) = talk.flows
    assert told is flow
    assert talk.send(0, hello[100:], sequence=1101) is None  # sent again
    assert talk.send(1, b"\x17\x03\x03\x00\x20" + bytes(32)) is flow
    talk.send(0, flags=FIN | ACK)
    found = flow.describe()
    assert (found["client"], found["server"]) == ("10.0.0.1:40000", "10.0.0.2:15008")
    assert found["security"] == "TLS"
    assert found["hbone"] is found["whole"] is found["ended"] is True
    assert "ALPN h2" in str(found["detail"])
    assert found["packets"] == 7


def test_plaintext_of_either_side_is_plaintext() -> None:
    talk = Dialogue(8080)
    talk.send(0, flags=SYN)
    talk.send(1, b"\x00\x01\x02\x03binary\x00", sequence=9)
    talk.send(0, b"GET / HTTP/1.0\r\n\r\n")
    (flow,) = talk.flows
    assert flow.verdict.kind == PLAINTEXT
    assert not flow.hbone


def test_a_connection_that_was_open_before_has_the_lower_port_for_its_server() -> None:
    talk = Dialogue(80)
    talk.send(1, b"HTTP/1.1 200 OK\r\n")
    (flow,) = talk.flows
    assert flow.server == "10.0.0.2:80"
    assert not flow.begun
    assert flow.verdict.kind == PLAINTEXT


def test_a_connection_without_data_and_one_that_takes_its_place() -> None:
    talk = Dialogue()
    talk.send(0, flags=SYN)
    assert [flow.verdict.kind for flow in talk.flows] == [EMPTY]
    talk.send(0, flags=FIN | ACK)
    talk.next = [70_000, 80_000]
    talk.send(0, flags=SYN)
    talk.send(0, b"hello\n")
    (flow,) = talk.flows
    assert (flow.sides[0].packets, flow.verdict.kind, flow.ended) == (2, PLAINTEXT, False)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MOST_FLOWS", 10)
    many = Flows()
    for port in range(100):
        many.add(Segment((CLIENT, 20000 + port, SERVER, 80), 1, SYN, b""), 0)
    assert len(list(many)) == 10
    assert many.forgotten == 90
    one = Dialogue(80)
    one.send(0, flags=SYN)
    for _ in range(100):
        one.send(0, b"GET /" + b"x" * 1000)  # a line without an end
    (flow,) = one.flows
    assert flow.sides[0].verdict is not None
    assert flow.sides[0].first == b""
