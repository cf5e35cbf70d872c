"""Conversations about the life of a stream: CONNECT, answer, half-close, reset, late frames (RFC 9113, 5.1, 8.5)."""

import pytest

from tests.hbone.peer import (
    CONNECT,
    END_HEADERS,
    END_STREAM,
    OK,
    client,
    continuation,
    data,
    frame,
    headers,
    rst,
    server,
    serving,
    tunnelling,
    window_update,
)
from ztunnel.hbone import (
    Config,
    ConnectionFailed,
    ConnectRequested,
    DataReceived,
    ErrorCode,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)


def test_a_tunnel_from_request_to_half_close_both_ways() -> None:
    talk = server()
    assert talk.hears(headers(1, [*CONNECT, ("forwarded", "for=10.1.1.1")])) == [
        ConnectRequested(1, "10.0.0.1:80", (("forwarded", "for=10.1.1.1"),))
    ]
    talk.connection.respond(1, 200, [("x-answer", "yes")])
    assert talk.says() == ["HEADERS 1 :status=200 x-answer=yes"]
    [piece] = talk.hears(data(1, b"hello"))
    assert isinstance(piece, DataReceived)
    assert (piece.stream_id, bytes(piece.data), piece.credit) == (1, b"hello", 5)
    talk.connection.send_data(1, b"world")
    assert talk.says() == ["DATA 1 5"]
    assert talk.hears(data(1, b"", END_STREAM)) == [StreamEnded(1)]
    assert talk.connection.open_streams == 1
    talk.connection.send_data(1, b"more")
    talk.connection.end_stream(1)
    assert talk.says() == ["DATA 1 4", "DATA 1 0 END_STREAM"]
    assert talk.connection.open_streams == 0


def test_the_client_side_of_the_same() -> None:
    talk = client()
    assert talk.connection.open_stream("[fd00::1]:443", [("baggage", "service.name=web")]) == 1
    assert talk.says() == [
        "HEADERS 1 :method=CONNECT :authority=[fd00::1]:443 baggage=service.name=web",
    ]
    assert talk.hears(headers(1, [*OK, ("server", "x")])) == [ResponseReceived(1, 200, (("server", "x"),))]
    talk.connection.send_data(1, b"last words", end_stream=True)
    assert talk.says() == ["DATA 1 10 END_STREAM"]
    events = talk.hears(data(1, b"answer", END_STREAM))
    assert events[1:] == [StreamEnded(1)]
    assert talk.connection.open_streams == 0
    assert talk.connection.open_stream("a:1") == 3


def test_a_refusal_ends_with_its_answer() -> None:
    talk = client()
    talk.connection.open_stream("a:1")
    assert talk.hears(headers(1, [(":status", "503")], END_STREAM)) == [
        ResponseReceived(1, 503, ()),
        StreamEnded(1),
    ]
    talk.connection.end_stream(1)
    assert talk.connection.open_streams == 0


def test_the_server_may_refuse_and_end_at_once() -> None:
    talk = server()
    talk.hears(headers(1, CONNECT, END_STREAM))
    talk.connection.respond(1, 401, end_stream=True)
    assert talk.says() == ["HEADERS 1 :status=401 END_STREAM"]
    assert talk.connection.open_streams == 0


def test_informational_answers_are_not_reported() -> None:
    talk = client()
    talk.connection.open_stream("a:1")
    assert talk.hears(headers(1, [(":status", "103"), ("link", "x")]), headers(1, OK)) == [
        ResponseReceived(1, 200, ())
    ]


def test_informational_answer_with_end_stream_is_malformed() -> None:
    talk = client()
    talk.connection.open_stream("a:1")
    talk.says()
    [reset] = talk.hears(headers(1, [(":status", "100")], END_STREAM))
    assert isinstance(reset, StreamReset)
    assert talk.says() == ["RST_STREAM 1 PROTOCOL_ERROR"]


def test_trailers_end_a_stream_that_is_no_tunnel_yet() -> None:
    talk = client()
    talk.connection.open_stream("a:1")
    talk.hears(headers(1, [(":status", "502")]), data(1, b"sorry"))
    assert talk.hears(headers(1, [("why", "because")], END_STREAM)) == [StreamEnded(1)]


def test_trailers_without_end_stream_are_malformed() -> None:
    talk = client()
    talk.connection.open_stream("a:1")
    [_, reset] = talk.hears(headers(1, [(":status", "502")]), headers(1, [("why", "because")]))
    assert reset == StreamReset(1, ErrorCode.PROTOCOL_ERROR, False, "trailers without END_STREAM")


def test_trailers_with_pseudo_header_fields_are_malformed() -> None:
    talk = client()
    talk.connection.open_stream("a:1")
    [_, reset] = talk.hears(headers(1, [(":status", "502")]), headers(1, [(":status", "200")], END_STREAM))
    assert isinstance(reset, StreamReset)
    assert reset.code == ErrorCode.PROTOCOL_ERROR


@pytest.mark.parametrize("talk_of", [serving, tunnelling])
def test_headers_on_a_connected_stream_are_a_stream_error(talk_of) -> None:  # type: ignore[no-untyped-def]
    # 8.5: frames other than DATA and stream management MUST NOT be sent on a connected stream
    talk = talk_of()
    [reset] = talk.hears(headers(1, [("grpc-status", "0")], END_STREAM))
    assert (reset.stream_id, reset.code, reset.remote) == (1, ErrorCode.PROTOCOL_ERROR, False)
    assert talk.says() == ["RST_STREAM 1 PROTOCOL_ERROR"]


def test_data_before_the_answer_is_malformed() -> None:
    talk = client()
    talk.connection.open_stream("a:1")
    talk.says()
    [reset] = talk.hears(data(1, b"early"))
    assert isinstance(reset, StreamReset)
    assert talk.says() == ["RST_STREAM 1 PROTOCOL_ERROR"]


def test_data_before_our_answer_is_delivered() -> None:
    talk = server()
    events = talk.hears(headers(1, CONNECT), data(1, b"early"))
    assert [type(event) for event in events] == [ConnectRequested, DataReceived]


def test_data_after_end_stream_is_a_stream_error() -> None:
    talk = serving()
    talk.hears(data(1, b"", END_STREAM))
    [reset] = talk.hears(data(1, b"more"))
    assert (reset.code, reset.remote) == (ErrorCode.STREAM_CLOSED, False)  # type: ignore[union-attr]
    assert talk.says() == ["RST_STREAM 1 STREAM_CLOSED"]


def test_headers_after_end_stream_are_a_stream_error() -> None:
    talk = serving()
    talk.hears(data(1, b"", END_STREAM))
    talk.hears(headers(1, CONNECT))
    assert talk.says() == ["RST_STREAM 1 STREAM_CLOSED"]


def test_window_update_and_reset_after_end_stream_are_fine() -> None:
    talk = serving()
    assert talk.hears(data(1, b"", END_STREAM), window_update(1, 5)) == [StreamEnded(1)]
    assert talk.hears(rst(1, 8)) == [StreamReset(1, 8, True)]


def test_the_peer_resets() -> None:
    talk = serving()
    assert talk.hears(rst(1, ErrorCode.CONNECT_ERROR)) == [StreamReset(1, ErrorCode.CONNECT_ERROR, True)]
    assert talk.connection.open_streams == 0
    assert not talk.connection.has_output


def test_a_reset_may_carry_any_code() -> None:
    assert serving().hears(rst(1, 0xFFFFFFFF)) == [StreamReset(1, 0xFFFFFFFF, True)]


def test_we_reset_and_late_frames_are_ignored() -> None:
    talk = serving()
    talk.connection.reset_stream(1, ErrorCode.CANCEL)
    assert talk.says() == ["RST_STREAM 1 CANCEL"]
    late = [
        data(1, b"late"),
        window_update(1, 9),
        headers(1, [("a", "b")], END_STREAM),
        rst(1),
        data(1, b"x", 1),
    ]
    assert talk.hears(*late) == []
    assert not talk.connection.has_output


def test_late_data_on_a_reset_stream_counts_for_the_connection() -> None:
    talk = serving(Config(connection_window=100_000, initial_window_size=65_535))
    talk.connection.reset_stream(1)
    talk.says()
    talk.hears(data(1, bytes(40_000)), data(1, bytes(20_000)))
    assert talk.says() == ["WINDOW_UPDATE 0 60000"]


def test_data_after_the_peers_own_reset_is_a_stream_error() -> None:
    talk = serving()
    talk.hears(rst(1))
    assert talk.hears(data(1, b"x")) == []
    assert talk.says() == ["RST_STREAM 1 STREAM_CLOSED"]


@pytest.mark.parametrize("late", [data(1, b"x"), headers(1, CONNECT)])
def test_frames_on_a_stream_that_both_sides_ended_are_a_connection_error(late: bytes) -> None:
    talk = serving()
    talk.hears(data(1, b"", END_STREAM))
    talk.connection.end_stream(1)
    talk.says()
    [failed] = talk.hears(late)
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.STREAM_CLOSED
    assert talk.says() == ["GOAWAY 1 STREAM_CLOSED"]


def test_window_update_and_reset_on_an_ended_stream_are_ignored() -> None:
    talk = serving()
    talk.hears(data(1, b"", END_STREAM))
    talk.connection.end_stream(1)
    talk.says()
    assert talk.hears(window_update(1, 5), rst(1)) == []
    assert not talk.connection.has_output


def test_data_on_a_stream_closed_long_ago_is_a_stream_error() -> None:
    talk = server(Config(closed_streams=4))
    for stream_id in range(1, 41, 2):
        talk.hears(headers(stream_id, CONNECT), rst(stream_id))
    talk.says()
    assert talk.hears(data(1, b"x")) == []
    assert talk.says() == ["RST_STREAM 1 STREAM_CLOSED"]


def test_memory_of_closed_streams_is_bounded() -> None:
    talk = server(Config(closed_streams=4, max_wasted_streams=1000))
    for stream_id in range(1, 401, 2):
        talk.hears(headers(stream_id, CONNECT))
        talk.connection.reset_stream(stream_id)
    assert len(talk.connection._closed_streams) <= 8


def test_a_client_gets_late_answers_to_what_it_reset_long_ago() -> None:
    talk = client(Config(closed_streams=1))
    for _ in range(5):
        talk.connection.reset_stream(talk.connection.open_stream("a:1"))
    talk.says()
    assert talk.hears(headers(1, OK)) == []
    assert talk.says() == ["RST_STREAM 1 STREAM_CLOSED"]


def test_stream_ids_must_grow() -> None:
    talk = server()
    talk.hears(headers(5, CONNECT))
    [failed] = talk.hears(headers(3, CONNECT))
    assert isinstance(failed, ConnectionFailed)
    assert talk.says() == ["GOAWAY 5 PROTOCOL_ERROR"]


@pytest.mark.parametrize(
    "wrong",
    [
        data(7, b"x"),
        rst(7),
        window_update(7, 1),
        headers(2, CONNECT),
        data(2, b"x"),
        headers(0, CONNECT),
        data(0, b"x"),
        rst(0),
        frame(2, 0, 0, bytes(5)),
        continuation(1, b"", END_HEADERS),
        frame(5, END_HEADERS, 1, bytes(4)),
        frame(4, 0, 1),
        frame(6, 0, 1, bytes(8)),
        frame(7, 0, 1, bytes(8)),
    ],
    ids=[
        "DATA on idle",
        "RST_STREAM on idle",
        "WINDOW_UPDATE on idle",
        "HEADERS on even",
        "DATA on even",
        "HEADERS on 0",
        "DATA on 0",
        "RST_STREAM on 0",
        "PRIORITY on 0",
        "CONTINUATION alone",
        "PUSH_PROMISE",
        "SETTINGS on a stream",
        "PING on a stream",
        "GOAWAY on a stream",
    ],
)
def test_frames_where_they_may_not_be_end_the_connection(wrong: bytes) -> None:
    talk = serving()
    [failed] = talk.hears(wrong)
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.PROTOCOL_ERROR
    assert talk.says() == ["GOAWAY 1 PROTOCOL_ERROR"]
    assert talk.connection.closed
    assert talk.connection.open_streams == 0


@pytest.mark.parametrize(
    "wrong",
    [headers(3, OK), headers(2, OK), data(3, b"x"), frame(5, 4, 1, bytes(4)), rst(3), window_update(2, 1)],
)
def test_a_server_may_not_open_streams_nor_use_idle_ones(wrong: bytes) -> None:
    talk = tunnelling()
    [failed] = talk.hears(wrong)
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.PROTOCOL_ERROR


def test_nothing_is_heard_after_a_failure() -> None:
    talk = serving()
    talk.hears(data(0, b"x"), headers(3, CONNECT))
    talk.says()
    assert talk.hears(headers(5, CONNECT)) == []
    assert not talk.connection.has_output
    assert not talk.connection.can_open


def test_the_reserved_bit_of_stream_ids_is_ignored() -> None:
    talk = serving()
    [event] = talk.hears(data(1 | 1 << 31, b"abc"))
    assert isinstance(event, DataReceived)
    assert event.stream_id == 1


def test_priority_and_unknown_frames_are_ignored() -> None:
    talk = serving()
    unknown = frame(0xFA, 0xFF, 1, bytes(1000))
    assert talk.hears(frame(2, 0, 1, bytes(5)), frame(2, 0, 9, bytes(5)), unknown, frame(0xFB, 0, 0)) == []
    assert not talk.connection.has_output


def test_priority_of_a_wrong_size() -> None:
    talk = serving()
    [reset] = talk.hears(frame(2, 0, 1, bytes(40)))
    assert isinstance(reset, StreamReset)
    assert talk.says() == ["RST_STREAM 1 FRAME_SIZE_ERROR"]
    [failed] = talk.hears(frame(2, 0, 9, bytes(4)))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.FRAME_SIZE_ERROR


@pytest.mark.parametrize(
    "wrong",
    [
        frame(3, 0, 1, bytes(5)),
        frame(8, 0, 1, bytes(3)),
        frame(6, 0, 0, bytes(7)),
        frame(6, 0, 0, bytes(900)),
        frame(7, 0, 0, bytes(7)),
        frame(4, 0, 0, bytes(5)),
        frame(4, 1, 0, bytes(6)),
        frame(0, 8, 1),
        frame(1, 8, 3),
        frame(1, 0x24, 3, bytes(4)),
        bytes.fromhex("100001 00 00 00000001"),
        bytes.fromhex("100001 fa 00 00000001"),
    ],
)
def test_wrong_sizes_are_frame_size_errors(wrong: bytes) -> None:
    talk = serving()
    [failed] = talk.hears(wrong)
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.FRAME_SIZE_ERROR


def test_views_are_not_copies() -> None:
    talk = serving()
    record = memoryview(bytearray(data(1, bytes(1000))))
    [event] = talk.connection.receive(record)
    assert isinstance(event, DataReceived)
    assert event.data.obj is record.obj


@pytest.mark.parametrize("step", [1, 2, 7, 8, 9, 10, 11, 100])
def test_a_conversation_in_pieces_of_any_size(step: int) -> None:
    talk = server()
    said = (
        headers(1, CONNECT) + data(1, b"x" * 50) + data(1, b"y" * 20, pad=30) + frame(0xFA, 0, 0, bytes(33))
    )
    said += (
        frame(1, 0, 3, b"")
        + continuation(3, headers(3, CONNECT)[9:], END_HEADERS)
        + data(1, b"z", END_STREAM, pad=0)
    )
    received = b""
    kinds = []
    for pos in range(0, len(said), step):
        for event in talk.hears(said[pos : pos + step]):
            if isinstance(event, DataReceived):
                received += event.data
            else:
                kinds.append(event)
    assert received == b"x" * 50 + b"y" * 20 + b"z"
    assert kinds == [
        ConnectRequested(1, "10.0.0.1:80", ()),
        ConnectRequested(3, "10.0.0.1:80", ()),
        StreamEnded(1),
    ]


def test_pieces_of_a_frame_whose_stream_we_reset_meanwhile_are_dropped() -> None:
    talk = serving()
    whole = data(1, bytes(100), END_STREAM)
    assert len(talk.hears(whole[:50])) == 1
    talk.connection.reset_stream(1)
    assert talk.hears(whole[50:]) == []
    assert talk.hears(headers(3, CONNECT)) == [ConnectRequested(3, "10.0.0.1:80", ())]
