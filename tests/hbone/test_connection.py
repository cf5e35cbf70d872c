"""Conversations about the connection itself: greeting, SETTINGS, PING, GOAWAY, and the caller's mistakes."""

import pytest

from tests.hbone.peer import (
    ACK,
    CONNECT,
    END_STREAM,
    OK,
    PREFACE,
    SETTINGS_ACK,
    Talk,
    client,
    data,
    frame,
    goaway,
    headers,
    ping,
    rst,
    server,
    serving,
    settings,
    tunnelling,
)
from ztunnel.hbone import (
    Config,
    Connection,
    ConnectionFailed,
    ConnectRequested,
    ErrorCode,
    Event,
    GoAwayReceived,
    LocalError,
    PingAcknowledged,
    ResponseReceived,
    Role,
    SettingsReceived,
    StreamEnded,
    StreamReset,
)

LARGEST = 2**31 - 1


def may_open(talk: Talk) -> bool:
    return talk.connection.can_open


def is_closed(talk: Talk) -> bool:
    return talk.connection.closed


def failure(events: list[Event]) -> ErrorCode:
    [failed] = events
    assert isinstance(failed, ConnectionFailed)
    return ErrorCode(failed.code)


# Greeting


def test_settings_are_applied_and_acknowledged() -> None:
    talk = server(greet=False)
    talk.says()
    assert talk.hears(PREFACE, settings((3, 7), (0xBEEF, 1))) == [SettingsReceived(7)]
    assert talk.says() == ["SETTINGS ACK"]
    assert not talk.connection.settings_acknowledged
    talk.hears(SETTINGS_ACK)
    assert talk.connection.settings_acknowledged


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX",
        b"\x16\x03\x01\x02\x00",
        PREFACE + ping(),
        PREFACE + headers(1, CONNECT),
        PREFACE + SETTINGS_ACK,
        PREFACE + PREFACE,
    ],
)
def test_what_is_no_http2_ends_the_connection(said: bytes) -> None:
    talk = server(greet=False)
    talk.says()
    assert failure(talk.hears(said)) == ErrorCode.PROTOCOL_ERROR
    assert talk.says() == ["GOAWAY 0 PROTOCOL_ERROR"]


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", ping(), SETTINGS_ACK, headers(1, OK)])
def test_a_server_must_greet_with_settings(said: bytes) -> None:
    talk = client(greet=False)
    assert failure(talk.hears(said)) == ErrorCode.PROTOCOL_ERROR


def test_the_greeting_in_single_bytes() -> None:
    talk = server(greet=False)
    events: list[Event] = []
    for byte in PREFACE + settings((3, 9)) + SETTINGS_ACK + headers(1, CONNECT):
        events += talk.connection.receive(bytes((byte,)))
    assert events == [SettingsReceived(9), ConnectRequested(1, "10.0.0.1:80", ())]


@pytest.mark.parametrize("wrong", [(2, 2), (5, 16_383), (5, 1 << 24), (8, 2)])
def test_settings_out_of_range(wrong: tuple[int, int]) -> None:
    assert failure(server().hears(settings(wrong))) == ErrorCode.PROTOCOL_ERROR


def test_a_server_may_not_enable_push() -> None:
    assert failure(client().hears(settings((2, 1)))) == ErrorCode.PROTOCOL_ERROR
    assert server().hears(settings((2, 1))) == [SettingsReceived(100)]


def test_acknowledging_what_was_not_sent() -> None:
    assert failure(server().hears(SETTINGS_ACK)) == ErrorCode.PROTOCOL_ERROR


def test_any_form_of_bytes_is_taken() -> None:
    for form in (bytes, bytearray, memoryview):
        connection = Connection(Role.SERVER)
        assert connection.receive(form(PREFACE + settings())) == [SettingsReceived(100)]
    assert connection.receive(b"") == []


# Concurrency


def test_the_peers_limit_is_respected() -> None:
    talk = client()
    assert talk.hears(settings((3, 2))) == [SettingsReceived(2)]
    first, second = (talk.connection.open_stream("a:1") for _ in range(2))
    assert not may_open(talk)
    with pytest.raises(LocalError, match="can_open"):
        talk.connection.open_stream("a:1")
    talk.hears(rst(first))
    assert may_open(talk)
    talk.hears(settings((3, 0)))
    assert not may_open(talk)
    talk.hears(headers(second, OK))
    assert talk.connection.open_streams == 1


def test_before_the_peers_settings_a_hundred_streams_are_assumed() -> None:
    connection = Connection(Role.CLIENT)
    for _ in range(100):
        connection.open_stream("a:1")
    assert not connection.can_open


def test_streams_beyond_our_limit_are_refused() -> None:
    talk = server(Config(max_concurrent_streams=2))
    events = talk.hears(headers(1, CONNECT), headers(3, CONNECT), headers(5, CONNECT))
    assert events == [ConnectRequested(1, "10.0.0.1:80", ()), ConnectRequested(3, "10.0.0.1:80", ())]
    assert talk.says() == ["RST_STREAM 5 REFUSED_STREAM"]
    assert talk.hears(data(5, b"x"), rst(3), headers(7, CONNECT)) == [
        StreamReset(3, 8, True),
        ConnectRequested(7, "10.0.0.1:80", ()),
    ]


def test_stream_ids_run_out() -> None:
    talk = client()
    talk.connection._next_id = LARGEST
    assert talk.connection.open_stream("a:1") == LARGEST
    assert not may_open(talk)


# PING


def test_pings_are_answered() -> None:
    talk = server()
    assert talk.hears(ping(b"\0\1\2\3\4\5\6\7")) == []
    assert talk.says() == ["PING ACK \0\1\2\3\4\5\6\7"]


def test_our_pings_are_acknowledged_once() -> None:
    talk = client()
    talk.connection.ping(b"rtt-0001")
    talk.connection.ping(b"rtt-0001")
    assert talk.says() == ["PING rtt-0001"] * 2
    answer = ping(b"rtt-0001", ACK)
    assert talk.hears(answer, answer, answer) == [PingAcknowledged(b"rtt-0001")] * 2
    assert talk.hears(ping(b"nobodys!", ACK)) == []


def test_our_pings_are_bounded() -> None:
    talk = client(Config(max_pings=2))
    talk.connection.ping(b"rtt-0001")
    talk.connection.ping(b"rtt-0002")
    with pytest.raises(LocalError, match="the peer is stuck"):
        talk.connection.ping(b"rtt-0003")
    for payload in (b"", b"123456789", b"draining"):
        with pytest.raises(LocalError, match="must be 8 bytes"):
            talk.connection.ping(payload)


# GOAWAY


def test_a_graceful_shutdown_loses_no_stream() -> None:
    talk = serving()
    talk.connection.go_away(graceful=True)
    assert talk.says() == [f"GOAWAY {LARGEST} NO_ERROR", "PING draining"]
    # The client opened 3 before it read that.
    assert talk.hears(headers(3, CONNECT)) == [ConnectRequested(3, "10.0.0.1:80", ())]
    assert talk.hears(ping(b"draining", ACK)) == []
    assert talk.says() == ["GOAWAY 3 NO_ERROR"]
    assert talk.hears(headers(5, CONNECT)) == []
    assert talk.says() == ["RST_STREAM 5 REFUSED_STREAM"]
    assert not is_closed(talk)
    for stream_id in (1, 3):
        talk.connection.reset_stream(stream_id)
    assert is_closed(talk)


def test_a_shutdown_at_once() -> None:
    talk = serving()
    talk.connection.go_away(ErrorCode.INTERNAL_ERROR, debug=b"bye")
    assert talk.says() == ["GOAWAY 1 INTERNAL_ERROR"]
    talk.connection.go_away()  # said once
    assert talk.says() == []
    assert len(talk.hears(data(1, b"goes on"))) == 1
    talk.connection.send_data(1, b"both ways", end_stream=True)
    assert talk.hears(data(1, b"", END_STREAM)) == [StreamEnded(1)]
    assert is_closed(talk)


def test_a_graceful_shutdown_can_be_cut_short() -> None:
    talk = serving()
    talk.connection.go_away(graceful=True)
    talk.connection.go_away(graceful=True)
    talk.says()
    talk.connection.go_away()
    assert talk.says() == ["GOAWAY 1 NO_ERROR"]
    assert talk.hears(ping(b"draining", ACK)) == []
    assert talk.says() == []


def test_a_client_that_goes_away_opens_no_more() -> None:
    talk = tunnelling()
    talk.connection.go_away(graceful=True)
    assert talk.says() == ["GOAWAY 0 NO_ERROR"]
    assert not may_open(talk)
    assert not is_closed(talk)
    talk.hears(rst(1))
    assert is_closed(talk)


def test_the_server_goes_away() -> None:
    talk = tunnelling()
    talk.connection.open_stream("b:1")
    talk.connection.open_stream("c:1")
    assert talk.hears(goaway(3, 0, b"drain")) == [
        GoAwayReceived(3, 0, b"drain"),
        StreamReset(5, ErrorCode.REFUSED_STREAM, True),
    ]
    assert not may_open(talk)
    assert talk.hears(headers(3, OK)) == [ResponseReceived(3, 200, ())]
    assert len(talk.hears(data(1, b"still here"))) == 1
    assert talk.hears(headers(5, OK)) == []
    talk.hears(rst(1), rst(3))
    assert is_closed(talk)


def test_the_server_goes_away_in_two_steps() -> None:
    talk = tunnelling()
    talk.connection.open_stream("b:1")
    assert talk.hears(goaway(LARGEST)) == [GoAwayReceived(LARGEST, 0, b"")]
    assert talk.hears(goaway(1, 0)) == [
        GoAwayReceived(1, 0, b""),
        StreamReset(3, ErrorCode.REFUSED_STREAM, True),
    ]


def test_the_last_stream_may_not_rise() -> None:
    talk = tunnelling()
    talk.hears(goaway(1))
    assert failure(talk.hears(goaway(3))) == ErrorCode.PROTOCOL_ERROR


def test_a_clients_goaway_leaves_its_streams_alone() -> None:
    talk = serving()
    assert talk.hears(goaway(0, ErrorCode.NO_ERROR)) == [GoAwayReceived(0, 0, b"")]
    assert talk.connection.open_streams == 1
    assert not is_closed(talk)


def test_long_debug_data_is_cut() -> None:
    talk = tunnelling()
    [event] = talk.hears(goaway(1, 0xB, b"d" * 500_000))
    assert event == GoAwayReceived(1, 0xB, b"d" * 1024)
    assert talk.hears(ping()) == []
    assert talk.says() == ["PING ACK 12345678"]


def test_a_failure_names_its_reason_to_the_peer() -> None:
    talk = serving()
    talk.connection.go_away()
    talk.hears(headers(3, CONNECT))  # refused: after GOAWAY
    talk.says()
    talk.hears(frame(6, 0, 0, b"short"))
    assert b"PING of 5 bytes" in talk.connection.data_to_send()


# The caller


def test_output_is_given_once() -> None:
    connection = Connection(Role.CLIENT)
    waiting = [connection.has_output]
    assert connection.data_to_send().startswith(PREFACE)
    waiting.append(connection.has_output)
    assert waiting == [True, False]
    assert connection.data_to_send() == b""


@pytest.mark.parametrize("talk", [serving(), tunnelling()])
def test_methods_on_a_stream_that_is_gone_do_nothing(talk: Talk) -> None:
    talk.hears(rst(1))
    connection = talk.connection
    connection.end_stream(1)
    connection.reset_stream(1)
    connection.acknowledge(1, 5)
    if not talk.is_client:
        connection.respond(1, 200)
    assert connection.sendable(1) == 0
    assert not connection.has_output


def test_methods_after_a_failure_do_nothing() -> None:
    talk = serving()
    talk.hears(data(0, b"x"))
    talk.says()
    connection = talk.connection
    connection.respond(1, 200)
    connection.end_stream(1)
    connection.reset_stream(1)
    connection.go_away()
    connection.ping(b"12345678")
    assert not connection.has_output


def test_the_callers_mistakes() -> None:
    talk = server()
    with pytest.raises(LocalError):
        talk.connection.open_stream("a:1")
    with pytest.raises(LocalError, match="never opened"):
        talk.connection.respond(1, 200)
    with pytest.raises(LocalError, match="never opened"):
        talk.connection.reset_stream(2)
    talk.hears(headers(1, CONNECT))
    for status in (100, 101, 199, 600):
        with pytest.raises(LocalError, match="must be a final one"):
            talk.connection.respond(1, status)
    with pytest.raises(LocalError):
        tunnelling().connection.respond(1, 200)


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial_window_size": 0},
        {"initial_window_size": 1 << 31},
        {"connection_window": 65_534},
        {"max_frame_size": 1 << 24},
        {"max_frame_size": 16_383},
        {"closed_streams": 0},
    ],
)
def test_config_says_what_is_wrong(wrong: dict[str, int]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=f"Config.{name} is {wrong[name]}: must be between"):
        Config(**wrong)
