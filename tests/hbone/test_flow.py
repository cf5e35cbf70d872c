"""Conversations about flow control, both ways, and frame sizes (RFC 9113, 5.2, 6.9)."""

import pytest

from tests.hbone.peer import (
    CONNECT,
    END_STREAM,
    OK,
    PREFACE,
    SETTINGS_ACK,
    Talk,
    client,
    data,
    headers,
    server,
    serving,
    settings,
    tunnelling,
    window_update,
)
from ztunnel.hbone import (
    Allowance,
    Config,
    ConnectionFailed,
    ConnectRequested,
    DataReceived,
    ErrorCode,
    LocalError,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    WindowOpened,
)

INITIAL_WINDOW = 4
MAX_FRAME = 5
SMALL = Config(initial_window_size=65_535, connection_window=100_000)


# What the peer may send


def test_the_greeting_announces_the_windows() -> None:
    talk = server(Config(), greet=False)
    assert talk.says() == [
        "SETTINGS 1=0 4=1048576 5=1048576 6=32768 3=256",
        "WINDOW_UPDATE 0 16711681",
    ]
    assert client(greet=False).says() == [
        "PREFACE",
        "SETTINGS 1=0 4=1048576 5=1048576 6=32768 2=0",
        "WINDOW_UPDATE 0 16711681",
    ]


def test_stream_credit_is_given_back_in_batches_as_the_application_consumes() -> None:
    talk = serving(SMALL)
    talk.hears(data(1, bytes(40_000)))
    talk.connection.acknowledge(1, 30_000)
    assert talk.says() == []
    talk.connection.acknowledge(1, 10_000)
    assert talk.says() == ["WINDOW_UPDATE 1 40000"]


def test_connection_credit_is_given_back_on_receipt() -> None:
    talk = serving(SMALL)
    talk.hears(data(1, bytes(50_000)))
    assert talk.says() == []
    talk.hears(data(1, b"x"))
    assert talk.says() == ["WINDOW_UPDATE 0 50001"]


def test_connection_credit_is_exact() -> None:
    talk = serving(SMALL)
    given = 0
    for size in (60_000, 1, 49_000, 40_000, 7, 50_000):
        talk.hears(data(1, bytes(size)))
        talk.connection.acknowledge(1, size)
        given += sum(int(line.split()[2]) for line in talk.says() if line.startswith("WINDOW_UPDATE 0 "))
    assert given + (100_000 - talk.connection._room) == 199_008


def test_a_stalled_stream_does_not_stall_another() -> None:
    talk = serving(SMALL)
    talk.hears(headers(3, CONNECT))
    talk.hears(data(1, bytes(65_535)))  # nobody consumes it
    for _ in range(20):
        [event] = talk.hears(data(3, bytes(60_000)))
        assert isinstance(event, DataReceived)
        talk.connection.acknowledge(3, event.credit)


def test_data_beyond_the_stream_window_resets_the_stream() -> None:
    talk = serving(SMALL)
    talk.hears(data(1, bytes(65_535)))
    talk.says()
    assert talk.hears(data(1, b"x")) == [
        StreamReset(1, ErrorCode.FLOW_CONTROL_ERROR, False, "DATA beyond the stream's window")
    ]
    assert talk.says() == ["RST_STREAM 1 FLOW_CONTROL_ERROR"]


def test_data_beyond_the_connection_window_ends_the_connection() -> None:
    # Credited on receipt, the window cannot be used up by frames that come one by one: only one larger frame can.
    talk = serving(Config(initial_window_size=1 << 20, connection_window=65_535))
    [failed] = talk.hears(data(1, bytes(65_536)))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.FLOW_CONTROL_ERROR


def test_padding_counts_and_is_given_back_by_the_codec() -> None:
    talk = serving(SMALL)
    events = talk.hears(*[data(1, b"x", pad=255)] * 200)
    assert sum(event.credit for event in events if isinstance(event, DataReceived)) == 200
    assert talk.says() == ["WINDOW_UPDATE 1 32768", "WINDOW_UPDATE 0 50115"]
    talk.connection.acknowledge(1, 200)
    with pytest.raises(LocalError, match="more than were received"):
        talk.connection.acknowledge(1, 1)


def test_more_padding_than_payload_is_a_connection_error() -> None:
    talk = serving()
    [failed] = talk.hears(bytes.fromhex("000005 00 08 00000001 05 00000000"))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.PROTOCOL_ERROR


def test_padding_may_be_all_there_is() -> None:
    talk = serving()
    assert talk.hears(data(1, b"", pad=0), data(1, b"", pad=9), data(1, b"", END_STREAM, pad=20)) == [
        StreamEnded(1)
    ]


def test_no_credit_is_given_after_the_end() -> None:
    talk = serving(SMALL)
    talk.hears(data(1, bytes(40_000), END_STREAM))
    talk.connection.acknowledge(1, 40_000)
    assert talk.says() == []


def test_acknowledging_a_stream_that_is_gone_does_nothing() -> None:
    talk = serving(SMALL)
    talk.hears(data(1, bytes(40_000)))
    talk.connection.reset_stream(1)
    talk.says()
    talk.connection.acknowledge(1, 40_000)
    assert talk.says() == []


def test_a_window_below_the_initial_one_holds_once_it_is_acknowledged() -> None:
    talk = server(Config(initial_window_size=1000), greet=False)
    talk.says()
    talk.hears(PREFACE, settings(), headers(1, CONNECT))
    assert len(talk.hears(data(1, bytes(3000)))) == 1  # the peer does not know our SETTINGS yet
    talk.hears(SETTINGS_ACK)
    [reset] = talk.hears(data(1, b"x"))
    assert isinstance(reset, StreamReset)
    assert reset.code == ErrorCode.FLOW_CONTROL_ERROR
    talk.hears(headers(3, CONNECT), data(3, bytes(1000)))
    [reset] = talk.hears(data(3, b"x"))
    assert isinstance(reset, StreamReset)


def test_a_negative_window_must_be_earned_back() -> None:
    talk = server(Config(initial_window_size=1000), greet=False)
    talk.hears(PREFACE, settings(), headers(1, CONNECT), data(1, bytes(3000)), SETTINGS_ACK)
    talk.says()
    talk.connection.acknowledge(1, 3000)
    assert talk.says() == ["WINDOW_UPDATE 1 3000"]
    assert len(talk.hears(data(1, bytes(1000)))) == 1


def test_an_empty_end_is_taken_in_a_negative_window() -> None:
    talk = server(Config(initial_window_size=1000), greet=False)
    talk.hears(PREFACE, settings(), headers(1, CONNECT), data(1, bytes(3000)), SETTINGS_ACK)
    assert talk.hears(data(1, b"", END_STREAM)) == [StreamEnded(1)]


def test_the_smallest_window() -> None:
    talk = serving(Config(initial_window_size=1))
    for _ in range(3):
        talk.hears(data(1, b"x"))
        talk.connection.acknowledge(1, 0)
        assert talk.says() == []
        talk.connection.acknowledge(1, 1)
        assert talk.says() == ["WINDOW_UPDATE 1 1"]


# Windows that grow


GROWING = Config(initial_window_size=65_536, widest_window=200_000)


def _consume(talk: Talk, size: int, prompt: bool = True) -> list[str]:
    talk.hears(data(1, bytes(size)))
    talk.connection.acknowledge(1, size, prompt)
    return [line for line in talk.says() if not line.startswith("WINDOW_UPDATE 0")]


def test_a_window_doubles_while_its_reader_keeps_up() -> None:
    allowance = Allowance(1 << 20)
    talk = serving(GROWING, allowance)
    assert _consume(talk, 32_768) == [f"WINDOW_UPDATE 1 {32_768 + 65_536}"]
    assert _consume(talk, 65_535) == []  # half of the window is worth an update, and that is more now
    assert _consume(talk, 1) == [f"WINDOW_UPDATE 1 {65_536 + 200_000 - 131_072}"]  # up to the widest
    assert _consume(talk, 100_000) == ["WINDOW_UPDATE 1 100000"]
    assert allowance.granted == 200_000 - 65_536
    assert len(talk.hears(data(1, bytes(200_000)))) == 1
    [reset] = talk.hears(data(1, b"x"))
    assert isinstance(reset, StreamReset)
    assert reset.code == ErrorCode.FLOW_CONTROL_ERROR
    assert allowance.granted == 0


def test_a_slow_readers_window_stays_as_it_is() -> None:
    talk = serving(GROWING, Allowance(1 << 20))
    assert _consume(talk, 40_000, prompt=False) == ["WINDOW_UPDATE 1 40000"]


def test_all_windows_grow_by_no_more_than_the_allowance() -> None:
    allowance = Allowance(100_000)
    first, second = serving(GROWING, allowance), serving(GROWING, allowance)
    assert _consume(first, 40_000) == [f"WINDOW_UPDATE 1 {40_000 + 65_536}"]
    assert _consume(second, 40_000) == ["WINDOW_UPDATE 1 40000"]
    first.connection.reset_stream(1)
    assert _consume(second, 40_000) == [f"WINDOW_UPDATE 1 {40_000 + 65_536}"]
    assert allowance.granted == 65_536
    second.connection.abandon()
    assert allowance.granted == 0


# What we may send


def test_sendable_is_the_least_of_the_three_limits() -> None:
    talk = tunnelling()
    connection = talk.connection
    assert connection.sendable(1) == 16_384  # the peer's frame size
    talk.hears(settings((MAX_FRAME, 100_000)))
    assert connection.sendable(1) == 65_535  # both windows
    connection.send_data(1, bytes(60_000))
    assert connection.sendable(1) == 5_535
    talk.hears(window_update(1, 100))
    assert connection.sendable(1) == 5_535  # the connection's
    talk.hears(window_update(0, 1000))
    assert connection.sendable(1) == 5_635  # the stream's


def test_windows_open() -> None:
    talk = tunnelling()
    talk.connection.send_data(1, bytes(65_535))
    assert talk.connection.sendable(1) == 0
    assert talk.hears(window_update(1, 10)) == []  # the connection's is still closed
    assert talk.connection.sendable(1) == 0
    assert talk.hears(window_update(0, 100)) == [WindowOpened(0)]
    talk.connection.send_data(1, bytes(10))
    assert talk.hears(window_update(0, 100)) == []
    assert talk.hears(window_update(1, 7)) == [WindowOpened(1)]
    assert talk.hears(window_update(1, 7)) == []
    assert talk.connection.sendable(1) == 14


def test_windows_of_a_side_that_has_ended_do_not_open() -> None:
    talk = tunnelling()
    talk.hears(window_update(0, 100_000))
    talk.connection.send_data(1, bytes(65_535), end_stream=True)
    assert talk.hears(window_update(1, 10)) == []


def test_settings_change_the_windows_of_open_streams() -> None:
    talk = tunnelling()
    talk.connection.send_data(1, bytes(1000))
    assert talk.hears(settings((INITIAL_WINDOW, 500))) == [SettingsReceived(100)]
    assert talk.connection.sendable(1) == 0  # the window is -500 (6.9.2)
    assert talk.hears(window_update(1, 500)) == []
    assert talk.hears(settings((INITIAL_WINDOW, 600))) == [SettingsReceived(100), WindowOpened(0)]
    assert talk.connection.sendable(1) == 100
    talk.connection.open_stream("b:1")
    assert talk.connection.sendable(3) == 600


def test_an_empty_end_is_sent_in_a_negative_window() -> None:
    talk = tunnelling()
    talk.connection.send_data(1, bytes(1000))
    talk.hears(settings((INITIAL_WINDOW, 0)))
    talk.says()
    buffer = bytearray(9)
    talk.connection.frame_data(1, buffer, 0, end_stream=True)
    assert buffer == data(1, b"", END_STREAM)


def test_settings_may_not_overflow_a_window() -> None:
    talk = tunnelling()
    talk.hears(window_update(1, 2**31 - 1 - 65_535))
    [failed] = talk.hears(settings((INITIAL_WINDOW, 65_536)))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.FLOW_CONTROL_ERROR


def test_an_initial_window_beyond_the_limit() -> None:
    [failed] = tunnelling().hears(settings((INITIAL_WINDOW, 2**31)))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.FLOW_CONTROL_ERROR


def test_a_stream_window_may_not_overflow() -> None:
    talk = tunnelling()
    assert talk.hears(window_update(1, 2**31 - 1 - 65_535)) == []
    assert talk.hears(window_update(1, 1)) == [
        StreamReset(1, ErrorCode.FLOW_CONTROL_ERROR, False, "stream window above 2^31-1")
    ]


def test_the_connection_window_may_not_overflow() -> None:
    [failed] = tunnelling().hears(window_update(0, 2**31 - 1))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.FLOW_CONTROL_ERROR


def test_an_update_of_nothing_is_wrong() -> None:
    talk = tunnelling()
    [reset] = talk.hears(window_update(1, 0))
    assert isinstance(reset, StreamReset)
    assert reset.code == ErrorCode.PROTOCOL_ERROR
    [failed] = talk.hears(window_update(0, 0))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.PROTOCOL_ERROR


def test_the_reserved_bit_of_an_increment_is_ignored() -> None:
    talk = tunnelling()
    talk.hears(settings((MAX_FRAME, 1 << 20)), window_update(1, 1 << 31 | 5), window_update(0, 5))
    assert talk.connection.sendable(1) == 65_540


def test_frame_data_writes_the_header_in_place() -> None:
    talk = tunnelling()
    buffer = bytearray(9 + 5) + b"rest"
    buffer[9:14] = b"hello"
    talk.connection.frame_data(1, buffer, 5)
    assert buffer == data(1, b"hello") + b"rest"
    view = memoryview(bytearray(12))
    talk.connection.frame_data(1, view, 3, end_stream=True)
    assert view == data(1, bytes(3), END_STREAM)
    assert not talk.connection.has_output


def test_send_data_cuts_at_the_peers_frame_size() -> None:
    talk = tunnelling()
    talk.connection.send_data(1, bytes(40_000), end_stream=True)
    assert talk.says() == ["DATA 1 16384", "DATA 1 16384", "DATA 1 7232 END_STREAM"]
    talk = tunnelling()
    talk.connection.send_data(1, b"", end_stream=True)
    assert talk.says() == ["DATA 1 0 END_STREAM"]


def test_sending_more_than_allowed_is_the_callers_mistake() -> None:
    talk = tunnelling()
    with pytest.raises(LocalError, match="sendable is 16384"):
        talk.connection.frame_data(1, bytearray(20_000), 16_385)
    with pytest.raises(LocalError):
        talk.connection.send_data(1, bytes(65_536))
    assert talk.connection.sendable(1) == 16_384
    assert not talk.connection.has_output


def test_sending_where_one_may_not_is_the_callers_mistake() -> None:
    talk = server()
    talk.hears(headers(1, CONNECT))
    assert talk.connection.sendable(1) == 0  # not answered yet
    with pytest.raises(LocalError):
        talk.connection.frame_data(1, bytearray(9), 0)
    with pytest.raises(LocalError):
        talk.connection.send_data(1, b"x")
    with pytest.raises(LocalError):
        talk.connection.end_stream(1)
    talk.connection.respond(1, 200, end_stream=True)
    with pytest.raises(LocalError):
        talk.connection.frame_data(1, bytearray(9), 0)
    with pytest.raises(LocalError):
        talk.connection.end_stream(1)
    with pytest.raises(LocalError):
        talk.connection.respond(1, 200)
    assert talk.connection.sendable(99) == 0


def test_early_data_waits_for_nobody() -> None:
    talk = client()
    talk.connection.open_stream("a:1")
    talk.connection.send_data(1, b"client speaks first")
    assert len(talk.says()) == 2
    talk.hears(headers(1, OK))


@pytest.mark.parametrize("size", [16_384, 1 << 20])
def test_the_largest_frame(size: int) -> None:
    talk = serving(Config(max_frame_size=size))
    [event] = talk.hears(data(1, bytes(size)))
    assert isinstance(event, DataReceived)
    assert event.credit == size
    [failed] = talk.hears(data(1, bytes(size + 1)))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.FRAME_SIZE_ERROR


def test_streams_opened_later_have_the_whole_window() -> None:
    talk = serving(SMALL)
    talk.hears(data(1, bytes(65_535)))
    assert talk.hears(headers(3, CONNECT)) == [ConnectRequested(3, "10.0.0.1:80", ())]
    assert isinstance(talk.hears(data(3, bytes(65_535)))[0], DataReceived)
