"""The `h2` library as the peer, in memory, both roles: it agrees with every frame that we send and read."""

import hashlib
import random

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest

from tests.hbone.peer import CONNECT, OK
from ztunnel.hbone import (
    Config,
    Connection,
    ConnectionFailed,
    ConnectRequested,
    DataReceived,
    Event,
    GoAwayReceived,
    PingAcknowledged,
    ResponseReceived,
    Role,
    StreamEnded,
    StreamReset,
)

RECORD = 16_384


class Meeting:
    """Our connection and h2's, joined; both applications consume at once."""

    def __init__(self, role: Role, config: Config | None = None) -> None:
        self.ours = Connection(role, config)
        # h2 validates what it gets; as of 4.4 it does not let CONNECT pass its outbound check on :path.
        self.theirs = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=role is Role.SERVER, validate_outbound_headers=False)
        )
        self.theirs.initiate_connection()
        self.events: list[Event] = []
        self.their_events: list[h2.events.Event] = []
        self.received = hashlib.sha256()
        self.their_received = hashlib.sha256()
        self.exchange()

    def exchange(self) -> None:
        """Let both talk until they are silent."""
        while True:
            output = self.ours.data_to_send()
            for event in self.theirs.receive_data(output) if output else ():
                self.their_events.append(event)
                if isinstance(event, h2.events.DataReceived):
                    self.their_received.update(event.data)
                    self.theirs.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            answer = self.theirs.data_to_send()
            for start in range(0, len(answer), RECORD):
                for ours in self.ours.receive(answer[start : start + RECORD]):
                    assert not isinstance(ours, ConnectionFailed), ours
                    if isinstance(ours, DataReceived):
                        self.received.update(ours.data)
                        self.ours.acknowledge(ours.stream_id, ours.credit)
                    else:
                        self.events.append(ours)
            if not answer and not self.ours.has_output:
                return

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def they_saw(self, kind: type) -> list[h2.events.Event]:
        return [event for event in self.their_events if isinstance(event, kind)]


def open_tunnel(meeting: Meeting) -> int:
    if meeting.ours._is_client:
        stream_id = meeting.ours.open_stream(
            "10.0.0.1:80", [("baggage", "service.name=web"), ("x-long", "v" * 3000)]
        )
        meeting.exchange()
        [request] = meeting.they_saw(h2.events.RequestReceived)
        assert (b":authority", b"10.0.0.1:80") in request.headers
        meeting.theirs.send_headers(stream_id, OK)
        meeting.exchange()
        assert ResponseReceived(stream_id, 200, ()) in meeting.take()
    else:
        stream_id = meeting.theirs.get_next_available_stream_id()
        meeting.theirs.send_headers(
            stream_id, [*CONNECT, ("baggage", "service.name=web"), ("x-long", "v" * 3000)]
        )
        meeting.exchange()
        headers = (("baggage", "service.name=web"), ("x-long", "v" * 3000))
        assert ConnectRequested(stream_id, "10.0.0.1:80", headers) in meeting.take()
        meeting.ours.respond(stream_id, 200)
        meeting.exchange()
        assert meeting.they_saw(h2.events.ResponseReceived)
    return stream_id


ROLES = pytest.mark.parametrize("role", Role)


@ROLES
def test_a_tunnel_both_ways_with_half_closes(role: Role) -> None:
    meeting = Meeting(role)
    stream_id = open_tunnel(meeting)
    meeting.ours.send_data(stream_id, b"ping")
    meeting.theirs.send_data(stream_id, b"pong", pad_length=100)
    meeting.ours.end_stream(stream_id)
    meeting.exchange()
    assert meeting.they_saw(h2.events.StreamEnded)
    meeting.theirs.send_data(stream_id, b" after your end", end_stream=True)
    meeting.exchange()
    assert meeting.take() == [StreamEnded(stream_id)]
    assert meeting.received.digest() == hashlib.sha256(b"pong after your end").digest()
    assert meeting.their_received.digest() == hashlib.sha256(b"ping").digest()
    assert meeting.ours.open_streams == 0
    assert meeting.theirs.open_inbound_streams == meeting.theirs.open_outbound_streams == 0


@ROLES
def test_many_tunnels_with_the_dynamic_table_until_we_forbid_it(role: Role) -> None:
    meeting = Meeting(role)
    for _ in range(20):
        stream_id = open_tunnel(meeting)
        meeting.their_events.clear()
        meeting.ours.end_stream(stream_id)
        meeting.theirs.end_stream(stream_id)
        meeting.exchange()
    assert meeting.ours.open_streams == 0


@ROLES
@pytest.mark.parametrize("window", [65_535, 1 << 20])
def test_bulk_both_ways(role: Role, window: int) -> None:
    meeting = Meeting(role, Config(initial_window_size=window))
    stream_id = open_tunnel(meeting)
    total = 24 << 20
    source = random.Random(5).randbytes(1 << 20)
    sent, their_sent = hashlib.sha256(), hashlib.sha256()
    ours_left = theirs_left = total
    buffer = bytearray(9 + (1 << 20))
    while ours_left or theirs_left:
        size = min(ours_left, meeting.ours.sendable(stream_id))
        if size:
            # The way of the proxy: the frame is made in place and sent after what is queued.
            buffer[9 : 9 + size] = source[:size]
            head = meeting.ours.data_to_send()
            meeting.ours.frame_data(stream_id, buffer, size)
            meeting.their_events.clear()
            for event in meeting.theirs.receive_data(head + bytes(buffer[: 9 + size])):
                if isinstance(event, h2.events.DataReceived):
                    meeting.their_received.update(event.data)
                    meeting.theirs.acknowledge_received_data(event.flow_controlled_length, stream_id)
            sent.update(source[:size])
            ours_left -= size
        window_left = meeting.theirs.local_flow_control_window(stream_id)
        size = min(theirs_left, window_left, meeting.theirs.max_outbound_frame_size)
        if size:
            meeting.theirs.send_data(stream_id, source[-size:])
            their_sent.update(source[-size:])
            theirs_left -= size
        meeting.exchange()
    assert meeting.received.digest() == their_sent.digest()
    assert meeting.their_received.digest() == sent.digest()


@ROLES
def test_resets_both_ways(role: Role) -> None:
    meeting = Meeting(role)
    first, second = open_tunnel(meeting), 0
    meeting.their_events.clear()
    second = open_tunnel(meeting)
    meeting.theirs.reset_stream(first, 10)
    meeting.exchange()
    assert StreamReset(first, 10, True) in meeting.take()
    meeting.ours.reset_stream(second, 8)
    meeting.exchange()
    [reset] = meeting.they_saw(h2.events.StreamReset)
    assert (reset.stream_id, reset.error_code) == (second, 8)


@ROLES
def test_pings_settings_and_goodbye(role: Role) -> None:
    meeting = Meeting(role)
    meeting.ours.ping(b"from us!")
    meeting.theirs.ping(b"fromthem")
    meeting.exchange()
    assert PingAcknowledged(b"from us!") in meeting.take()
    assert meeting.they_saw(h2.events.PingAckReceived)
    stream_id = open_tunnel(meeting)
    meeting.theirs.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    meeting.exchange()
    assert meeting.ours.sendable(stream_id) == 1000
    meeting.theirs.close_connection(error_code=0, last_stream_id=stream_id)
    meeting.exchange()
    assert GoAwayReceived(stream_id, 0, b"") in meeting.take()
    meeting.ours.go_away(2)
    meeting.exchange()
    [gone] = meeting.they_saw(h2.events.ConnectionTerminated)
    assert gone.error_code == 2


def test_get_is_answered() -> None:
    meeting = Meeting(Role.SERVER)
    fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]
    meeting.theirs.send_headers(1, fields, end_stream=True)
    meeting.exchange()
    [answer] = meeting.they_saw(h2.events.ResponseReceived)
    assert (b":status", b"405") in answer.headers
    assert meeting.take()[1:] == []


@pytest.mark.parametrize("role", Role)
def test_our_failure_is_understood(role: Role) -> None:
    meeting = Meeting(role)
    [failed] = meeting.ours.receive(b"\0\0\0\0\0\0\0\0\0")  # DATA on stream 0
    assert isinstance(failed, ConnectionFailed)
    [gone] = meeting.theirs.receive_data(meeting.ours.data_to_send())
    assert isinstance(gone, h2.events.ConnectionTerminated)
    assert gone.error_code == failed.code == 1
