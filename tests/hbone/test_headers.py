"""Conversations about field sections: what is malformed, HPACK, CONTINUATION, sizes (RFC 9113, 4.3, 6.10, 8.2-8.5)."""

import hpack
import pytest

from tests.hbone.peer import (
    CONNECT,
    END_HEADERS,
    END_STREAM,
    OK,
    PADDED,
    PREFACE,
    PRIORITY,
    SETTINGS_ACK,
    Field,
    block,
    client,
    continuation,
    data,
    frame,
    headers,
    ping,
    server,
    settings,
)
from ztunnel.hbone import (
    Config,
    ConnectionFailed,
    ConnectRequested,
    ErrorCode,
    LocalError,
    ResponseReceived,
    StreamReset,
)

METHOD = (":method", "CONNECT")
AUTHORITY = (":authority", "10.0.0.1:80")


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [AUTHORITY],
        [METHOD],
        [METHOD, (":authority", "")],
        [METHOD, (":authority", "user@host:1")],
        [METHOD, (":authority", "host:1/path")],
        [METHOD, (":authority", "ho st:1")],
        [METHOD, AUTHORITY, (":scheme", "https")],
        [METHOD, AUTHORITY, (":path", "/")],
        [METHOD, AUTHORITY, (":scheme", "https"), (":path", "/"), (":protocol", "websocket")],
        [METHOD, AUTHORITY, (":protocol", "connect-tcp")],
        [METHOD, METHOD, AUTHORITY],
        [METHOD, AUTHORITY, AUTHORITY],
        [METHOD, ("a", "b"), AUTHORITY],
        [METHOD, AUTHORITY, (":status", "200")],
        [METHOD, AUTHORITY, (":unknown", "x")],
        [METHOD, AUTHORITY, ("Upper", "x")],
        [METHOD, AUTHORITY, ("", "x")],
        [METHOD, AUTHORITY, ("sp ace", "x")],
        [METHOD, AUTHORITY, ("co:lon", "x")],
        [METHOD, AUTHORITY, ("a", "new\nline")],
        [METHOD, AUTHORITY, ("a", "car\rriage")],
        [METHOD, AUTHORITY, ("a", "nul\0")],
        [METHOD, AUTHORITY, ("a", " leading")],
        [METHOD, AUTHORITY, ("a", "trailing\t")],
        [METHOD, AUTHORITY, ("connection", "close")],
        [METHOD, AUTHORITY, ("proxy-connection", "close")],
        [METHOD, AUTHORITY, ("keep-alive", "1")],
        [METHOD, AUTHORITY, ("transfer-encoding", "chunked")],
        [METHOD, AUTHORITY, ("upgrade", "h2c")],
        [METHOD, AUTHORITY, ("te", "gzip")],
        [(":method", "GET"), (":scheme", "https"), AUTHORITY],
        [(":method", "GET"), (":path", "/"), AUTHORITY],
    ],
    ids=str,
)
def test_malformed_requests_are_stream_errors(fields: list[Field]) -> None:
    talk = server()
    assert talk.hears(headers(1, fields)) == []
    assert talk.says() == ["RST_STREAM 1 PROTOCOL_ERROR"]
    assert talk.hears(data(1, b"late"), headers(3, CONNECT)) == [ConnectRequested(3, "10.0.0.1:80", ())]


@pytest.mark.parametrize(
    "field",
    [
        ("te", "trailers"),
        ("a", ""),
        ("a", "b c\td"),
        ("a", "\xe4\xff"),
        ("x!#$%&'*+-.^_`|~9", "v"),
        ("host", "x"),
    ],
)
def test_fields_that_are_fine(field: Field) -> None:
    talk = server()
    encoded = (field[0].encode("latin-1"), field[1].encode("latin-1"))
    said = hpack.Encoder().encode([METHOD, AUTHORITY, encoded])
    assert talk.hears(frame(1, END_HEADERS, 1, b"\x20" + said)) == [
        ConnectRequested(1, "10.0.0.1:80", (field,))
    ]


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [(":status", "")],
        [(":status", "20")],
        [(":status", "2000")],
        [(":status", "abc")],
        [(":status", "099")],
        [(":status", "101")],
        [(":status", "200"), (":status", "200")],
        [("a", "b"), (":status", "200")],
        [(":status", "200"), (":path", "/")],
        [(":status", "200"), ("transfer-encoding", "chunked")],
    ],
    ids=str,
)
def test_malformed_responses_are_stream_errors(fields: list[Field]) -> None:
    talk = client()
    talk.connection.open_stream("a:1")
    talk.says()
    [reset] = talk.hears(headers(1, fields))
    assert isinstance(reset, StreamReset)
    assert (reset.code, reset.remote) == (ErrorCode.PROTOCOL_ERROR, False)
    assert talk.says() == ["RST_STREAM 1 PROTOCOL_ERROR"]


def test_other_methods_get_405() -> None:
    talk = server()
    get = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]
    assert talk.hears(headers(1, get, END_STREAM)) == []
    assert talk.says() == ["HEADERS 1 :status=405 allow=CONNECT END_STREAM"]
    post = [(":method", "POST"), *get[1:]]
    assert talk.hears(headers(3, post), data(3, b"body")) == []
    assert talk.says() == ["HEADERS 3 :status=405 allow=CONNECT END_STREAM", "RST_STREAM 3 NO_ERROR"]
    assert talk.connection.open_streams == 0


def test_padding_and_priority_of_headers_are_stripped() -> None:
    talk = server()
    said = block(CONNECT)
    padded = frame(1, END_HEADERS | PADDED | PRIORITY, 1, b"\x07" + bytes(5) + said + bytes(7))
    assert talk.hears(padded) == [ConnectRequested(1, "10.0.0.1:80", ())]


def test_padding_larger_than_the_payload_is_a_connection_error() -> None:
    talk = server()
    [failed] = talk.hears(frame(1, END_HEADERS | PADDED, 1, b"\x09" + bytes(8)))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.PROTOCOL_ERROR


def test_a_block_in_many_frames() -> None:
    talk = server()
    said = block([*CONNECT, ("a", "b" * 500)])
    events = talk.hears(
        frame(1, END_STREAM, 1, said[:1]),
        *(continuation(1, said[pos : pos + 20]) for pos in range(1, len(said), 20)),
        continuation(1, b"", END_HEADERS),
    )
    assert events[0] == ConnectRequested(1, "10.0.0.1:80", (("a", "b" * 500),))
    assert len(events) == 2


@pytest.mark.parametrize(
    "between",
    [
        data(1, b"x"),
        headers(3, CONNECT),
        continuation(3, b""),
        ping(),
        settings(),
        frame(0xFA, 0, 1),
    ],
    ids=["DATA", "HEADERS", "CONTINUATION of another", "PING", "SETTINGS", "unknown"],
)
def test_a_block_may_not_be_interrupted(between: bytes) -> None:
    talk = server()
    [failed] = talk.hears(frame(1, 0, 1, b""), between)
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.PROTOCOL_ERROR


def test_too_many_continuations_are_a_flood() -> None:
    talk = server(Config(max_continuations=3))
    [failed] = talk.hears(frame(1, 0, 1), *[continuation(1, b"\x82")] * 4)
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.ENHANCE_YOUR_CALM


def test_a_block_that_grows_too_large_ends_the_connection_before_it_is_there() -> None:
    talk = server(Config(max_header_list_size=4096))
    [failed] = talk.hears(frame(1, 0, 1, bytes(3000)), continuation(1, bytes(3000))[:9])
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.ENHANCE_YOUR_CALM


def test_too_many_fields_get_431() -> None:
    talk = server(Config(max_header_list_size=1000))
    assert talk.hears(headers(1, [*CONNECT, ("a", "b" * 900)], END_STREAM)) == []
    assert talk.says() == ["HEADERS 1 :status=431 END_STREAM"]


def test_a_bomb_ends_the_connection() -> None:
    talk = server(Config(max_header_list_size=1000), greet=False)
    bomb = (
        b"\x40\x01a\x7f\x81\x03" + b"b" * 512 + b"\xbe" * 400
    )  # one field of 512 bytes, then 400 references
    failed = talk.hears(PREFACE, settings(), frame(1, END_HEADERS, 1, bomb))[-1]
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.ENHANCE_YOUR_CALM


def test_a_response_with_too_many_fields_is_a_stream_error() -> None:
    talk = client(Config(max_header_list_size=1000))
    talk.connection.open_stream("a:1")
    talk.says()
    [reset] = talk.hears(headers(1, [*OK, ("a", "b" * 950)]))
    assert isinstance(reset, StreamReset)
    assert talk.says() == ["RST_STREAM 1 PROTOCOL_ERROR"]


@pytest.mark.parametrize(
    "wrong", [b"\xff\xff\xff\xff\xff\xff\xff", b"\x80", b"\xbf", b"\x00\x85", b"\x40\x81\xff"]
)
def test_hpack_errors_end_the_connection(wrong: bytes) -> None:
    talk = server()
    [failed] = talk.hears(frame(1, END_HEADERS, 1, b"\x20" + wrong))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.COMPRESSION_ERROR


def test_the_dynamic_table_works_until_our_settings_are_acknowledged() -> None:
    talk = server(greet=False)
    encoder = hpack.Encoder()
    fields = [*CONNECT, ("traceparent", "00-1"), ("baggage", "service.name=x")]
    talk.hears(PREFACE, settings())
    for stream_id in (1, 3):
        said = encoder.encode(fields)
        assert talk.hears(frame(1, END_HEADERS, stream_id, said)) == [
            ConnectRequested(stream_id, "10.0.0.1:80", tuple(fields[2:]))
        ]
    assert len(said) < 10  # the second block was references into the table
    talk.hears(SETTINGS_ACK)
    encoder.header_table_size = 0
    for stream_id in (5, 7, 9):
        said = encoder.encode(fields)
        assert talk.hears(frame(1, END_HEADERS, stream_id, said)) == [
            ConnectRequested(stream_id, "10.0.0.1:80", tuple(fields[2:]))
        ]


def test_a_peer_that_keeps_its_table_after_acknowledging_is_wrong() -> None:
    talk = server()
    [failed] = talk.hears(frame(1, END_HEADERS, 1, hpack.Encoder().encode(CONNECT)))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.COMPRESSION_ERROR


def test_references_into_the_empty_table_are_wrong() -> None:
    talk = server()
    talk.hears(headers(1, CONNECT))
    [failed] = talk.hears(frame(1, END_HEADERS, 3, b"\xbe"))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.COMPRESSION_ERROR


def test_blocks_of_reset_streams_still_feed_the_table() -> None:
    talk = server(greet=False)
    encoder = hpack.Encoder()
    talk.hears(PREFACE, settings())
    talk.hears(frame(1, END_HEADERS, 1, encoder.encode([*CONNECT, ("transfer-encoding", "x"), ("a", "b")])))
    assert talk.hears(frame(1, END_HEADERS, 3, encoder.encode([*CONNECT, ("a", "b")]))) == [
        ConnectRequested(3, "10.0.0.1:80", (("a", "b"),))
    ]


def test_our_blocks_never_use_the_table() -> None:
    talk = client(greet=False)
    talk.says()
    talk.hears(settings((1, 0)), SETTINGS_ACK)
    talk.says()
    blocks = []
    for _ in range(3):
        talk.connection.open_stream("10.0.0.1:80", [("x-unusual", "value")])
        blocks.append(talk.connection.data_to_send()[9:])
    assert blocks[0] == b"\x20" + blocks[1]  # the table is closed once, first (RFC 7541, 4.2)
    assert blocks[1] == blocks[2]
    decoder = hpack.Decoder()
    decoder.header_table_size = decoder.max_allowed_table_size = 0
    assert [(str(name), str(value)) for name, value in decoder.decode(blocks[2])] == [
        METHOD,
        AUTHORITY,
        ("x-unusual", "value"),
    ]


def test_our_long_blocks_are_continued() -> None:
    talk = client()
    value = "v" * 40_000
    talk.connection.open_stream("a:1", [("a", value)])
    sent = talk.connection.data_to_send()
    kinds = []
    said = b""
    while sent:
        length = int.from_bytes(sent[:3], "big")
        kinds.append((sent[3], sent[4]))
        said += sent[9 : 9 + length]
        sent = sent[9 + length :]
    assert kinds == [(1, 0), (9, 0), (9, END_HEADERS)]
    assert str(list(talk.decoder.decode(said))[-1][1]) == value


@pytest.mark.parametrize(
    "fields",
    [
        [("Upper", "x")],
        [("", "x")],
        [(":path", "/")],
        [("a", "x\r\ny: z")],
        [("a", " x")],
        [("a", "\u20ac")],
        [("connection", "close")],
    ],
    ids=str,
)
def test_fields_that_we_may_not_send(fields: list[Field]) -> None:
    talk = client()
    with pytest.raises(LocalError):
        talk.connection.open_stream("a:1", fields)
    assert talk.connection.open_stream("a:1") == 1
    assert talk.says() == ["HEADERS 1 :method=CONNECT :authority=a:1"]


@pytest.mark.parametrize("authority", ["", "a b:1", "h\r\nx:1", "caf\xe9:1", "u@h:1"])
def test_authorities_that_we_may_not_send(authority: str) -> None:
    with pytest.raises(LocalError):
        client().connection.open_stream(authority)


def test_answers_repeat_from_the_cache() -> None:
    talk = client()
    for stream_id in (1, 3, 5):
        talk.connection.open_stream("a:1")
        assert talk.hears(headers(stream_id, [*OK, ("server", "x")])) == [
            ResponseReceived(stream_id, 200, (("server", "x"),))
        ]
