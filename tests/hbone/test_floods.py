"""Conversations with peers that waste our time: they end in ENHANCE_YOUR_CALM, honest ones do not (RFC 9113, 10.5)."""

import struct
from collections.abc import Iterator

import pytest

from tests.hbone.peer import (
    ACK,
    CONNECT,
    END_STREAM,
    OK,
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
    window_update,
)
from ztunnel.hbone import Config, ConnectionFailed, ConnectRequested, ErrorCode, Event

LIMITS = Config(max_wasted_frames=100, max_wasted_streams=50)
RECORD = 16_384


def records(frames: list[bytes]) -> Iterator[bytes]:
    stream = b"".join(frames)
    return (stream[pos : pos + RECORD] for pos in range(0, len(stream), RECORD))


def calm(events: list[Event]) -> bool:
    """Whether the connection ended as a flood."""
    for event in events:
        if isinstance(event, ConnectionFailed):
            assert event.code == ErrorCode.ENHANCE_YOUR_CALM
            return True
    return False


WASTE = {
    "PING": ping(),
    "PING ACK": ping(flags=ACK),
    "SETTINGS": settings(),
    "SETTINGS with values": settings((4, 65_535), (3, 100)),
    "WINDOW_UPDATE": window_update(0, 1),
    "WINDOW_UPDATE of a stream": window_update(1, 1),
    "WINDOW_UPDATE of a closed stream": window_update(3, 1),
    "empty DATA": data(1),
    "padding": data(1, b"", pad=100),
    "empty DATA of a closed stream": data(3),
    "RST_STREAM of a closed stream": rst(3),
    "trailers of a closed stream": headers(3, [("a", "b")], END_STREAM),
    "PRIORITY": frame(2, 0, 1, bytes(5)),
    "PRIORITY of idle streams": frame(2, 0, 99, bytes(5)),
    "unknown": frame(0xFA, 0, 0, b"x"),
    "GOAWAY": goaway(1),
}


@pytest.mark.parametrize("waste", WASTE.values(), ids=WASTE)
def test_floods_of_frames_that_carry_nothing(waste: bytes) -> None:
    talk = serving(LIMITS)
    talk.hears(headers(3, CONNECT))
    talk.connection.reset_stream(3)
    talk.says()
    assert not calm(talk.hears(*[waste] * 30))
    for _ in range(20):
        talk.says()  # the peer reads what we answer: that is no excuse
        if calm(talk.hears(*[waste] * 30)):
            break
    else:
        pytest.fail("the flood was not noticed")
    assert talk.says()[-1].startswith("GOAWAY")


def test_floods_of_informational_answers() -> None:
    talk = client(LIMITS)
    talk.connection.open_stream("a:1")
    assert calm(talk.hears(*[headers(1, [(":status", "103")])] * 200))


def test_one_settings_frame_with_too_many_values() -> None:
    assert calm(serving().hears(settings(*[(0xF000, 1)] * 65)))


@pytest.mark.parametrize(
    "waste", [ping(), window_update(1, 1), settings()], ids=["PING", "WINDOW_UPDATE", "SETTINGS"]
)
def test_an_idle_tunnel_with_keepalives_lives_for_ever(waste: bytes) -> None:
    talk = serving(LIMITS)
    for _ in range(5000):
        assert not calm(talk.hears(waste))
        talk.says()


def test_updates_that_our_own_data_causes_are_no_flood() -> None:
    talk = tunnelling(LIMITS)
    for _ in range(50):
        for _ in range(1000):
            talk.connection.send_data(1, b"small")
        talk.says()
        answers = [window_update(1, 5), window_update(0, 5)] * 1000
        for record in records(answers):
            assert not calm(talk.hears(record))


def test_a_window_full_of_late_small_data_is_no_flood() -> None:
    talk = serving(Config(initial_window_size=65_535, max_wasted_frames=100, max_wasted_streams=50))
    talk.connection.reset_stream(1)
    late = [data(1, b"small")] * 13_107
    assert [event for record in records(late) for event in talk.hears(record)] == []
    [failed] = talk.hears(data(1, b"more than that"))
    assert isinstance(failed, ConnectionFailed)
    assert failed.code == ErrorCode.FLOW_CONTROL_ERROR


def test_credit_for_updates_is_bounded() -> None:
    talk = tunnelling(LIMITS)
    for _ in range(5000):
        talk.connection.send_data(1, b"x")
    talk.says()
    assert calm(talk.hears(*[window_update(0, 1)] * 6000))


def test_rapid_reset() -> None:
    # CVE-2023-44487
    talk = server(LIMITS)
    attack = [
        part for stream_id in range(1, 401, 2) for part in (headers(stream_id, CONNECT), rst(stream_id))
    ]
    assert any(calm(talk.hears(record)) for record in records(attack))


def test_resets_that_the_peer_makes_us_send() -> None:
    # CVE-2025-8671
    talk = server(LIMITS)
    attack = [
        part for number in range(1, 401, 2) for part in (headers(number, CONNECT), window_update(number, 0))
    ]
    assert any(calm(talk.hears(record)) for record in records(attack))


@pytest.mark.parametrize("request_", [[("a", "b")], [(":method", "CONNECT")]])
def test_malformed_requests_without_end(request_: list[tuple[str, str]]) -> None:
    talk = server(LIMITS)
    assert any(
        calm(talk.hears(record)) for record in records([headers(n, request_) for n in range(1, 401, 2)])
    )


def test_streams_beyond_the_limit_without_end() -> None:
    talk = server(Config(max_concurrent_streams=1, max_wasted_streams=50))
    assert any(
        calm(talk.hears(record)) for record in records([headers(n, CONNECT) for n in range(1, 401, 2)])
    )


def test_connections_that_are_given_up_one_by_one_are_no_flood() -> None:
    # A health check that connects and resets, all day.
    talk = server(LIMITS)
    for stream_id in range(1, 10_001, 2):
        assert not calm(talk.hears(headers(stream_id, CONNECT)))
        assert not calm(talk.hears(rst(stream_id)))


def test_streams_that_were_answered_may_be_reset_in_any_number() -> None:
    talk = server(LIMITS)
    for first in range(1, 10_001, 40):
        numbers = range(first, first + 40, 2)
        talk.hears(*[headers(number, CONNECT) for number in numbers])
        for number in numbers:
            talk.connection.respond(number, 200)
        talk.says()
        assert not calm(talk.hears(*[rst(number) for number in numbers]))


def test_a_peer_that_never_reads_its_answers() -> None:
    talk = serving(Config(max_queued_replies=100))
    for _ in range(100):
        assert not calm(talk.hears(ping()))  # nobody calls data_to_send: the socket is blocked
    assert calm(talk.hears(ping()))


def test_get_requests_are_answered_in_any_number() -> None:
    talk = server(LIMITS)
    get = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]
    for first in range(1, 4001, 200):
        assert not calm(
            talk.hears(*[headers(number, get, END_STREAM) for number in range(first, first + 200, 2)])
        )
        assert len(talk.says()) == 100


def test_many_streams_in_one_record_are_no_flood() -> None:
    talk = server()
    events = talk.hears(*[headers(number, CONNECT) for number in range(1, 401, 2)])
    assert len([event for event in events if isinstance(event, ConnectRequested)]) == 200


def test_small_data_is_no_flood() -> None:
    talk = serving(LIMITS)
    for _ in range(20):
        assert len(talk.hears(*[data(1, b"k")] * 1000)) == 1000
        talk.connection.acknowledge(1, 1000)


def test_answered_streams_pay_for_those_given_up() -> None:
    talk = server(LIMITS)
    for first in range(1, 8001, 80):
        given_up = range(first, first + 40, 2)
        lasting = range(first + 40, first + 80, 2)
        said = [headers(number, CONNECT) + rst(number) for number in given_up]
        assert not calm(talk.hears(*said, *[headers(number, CONNECT) for number in lasting]))
        for number in lasting:
            talk.connection.respond(number, 200)
            talk.connection.reset_stream(number)
        talk.says()


def test_answers_pay_for_streams_that_a_server_spoils() -> None:
    talk = client(LIMITS)
    for _ in range(100):
        numbers = [talk.connection.open_stream("a:1") for _ in range(20)]
        answers = [headers(number, OK) + headers(number, [("a", "b")], END_STREAM) for number in numbers]
        assert not calm(talk.hears(*answers))
        talk.says()


def test_settings_with_many_streams_open() -> None:
    talk = server()
    talk.hears(*[headers(number, CONNECT) for number in range(1, 401, 2)])
    talk.says()
    toggles = [settings((4, size)) for _ in range(1000) for size in (0, 1 << 20)]
    assert any(calm(talk.hears(record)) for record in records(toggles))


def test_the_limits_leave_the_debug_reason() -> None:
    talk = serving(LIMITS)
    talk.says()
    assert calm(talk.hears(*[ping()] * 200))
    sent = talk.connection.data_to_send()
    assert struct.pack(">I", ErrorCode.ENHANCE_YOUR_CALM) + b"too many frames that carry nothing" in sent
