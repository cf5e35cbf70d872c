"""Two connections talking, whatever they say and however their bytes are cut: what must always hold."""

import random
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ztunnel.hbone import (
    Allowance,
    Config,
    Connection,
    ConnectionFailed,
    ConnectRequested,
    DataReceived,
    Event,
    GoAwayReceived,
    ResponseReceived,
    Role,
    StreamEnded,
    StreamReset,
    WindowOpened,
)

configs = st.builds(
    Config,
    initial_window_size=st.sampled_from([1, 100, 65_535, 100_000, 1 << 20]),
    widest_window=st.sampled_from([0, 200, 150_000, 1 << 20]),
    connection_window=st.sampled_from([65_535, 100_000, 16 << 20]),
    max_frame_size=st.sampled_from([16_384, 20_000, 1 << 20]),
    max_concurrent_streams=st.integers(1, 5),
)


@dataclass
class Half:
    """What one end knows of one stream."""

    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    owed: int = 0  # received, not acknowledged
    ended: bool = False  # we sent END_STREAM
    peer_ended: bool = False
    reset: bool = False
    status: int = 0


class End:
    """One connection and its application, which never looks inside the codec."""

    def __init__(self, role: Role, config: Config) -> None:
        self.connection = Connection(role, config, Allowance(150_000))
        self.streams: dict[int, Half] = {}
        self.wire = bytearray()  # sent, not yet delivered
        self.waiting: set[int] = set()  # streams whose `sendable` was 0
        self.events: list[Event] = []

    def flush(self) -> None:
        self.wire += self.connection.data_to_send()

    def hear(self, piece: bytes) -> None:
        for event in self.connection.receive(piece):
            assert not isinstance(event, ConnectionFailed), event
            if isinstance(event, DataReceived):
                half = self.streams[event.stream_id]
                assert not half.peer_ended
                assert not half.reset
                half.received += event.data
                half.owed += event.credit
            elif isinstance(event, ConnectRequested):
                assert event.stream_id not in self.streams
                self.streams[event.stream_id] = Half()
            elif isinstance(event, ResponseReceived):
                self.streams[event.stream_id].status = event.status
            elif isinstance(event, StreamEnded):
                half = self.streams[event.stream_id]
                assert not half.peer_ended
                half.peer_ended = True
            elif isinstance(event, StreamReset):
                assert event.remote, "an honest peer was found guilty"
                assert not self.streams[event.stream_id].reset
                self.streams[event.stream_id].reset = True
            elif isinstance(event, WindowOpened):
                self.waiting.discard(event.stream_id)
                if event.stream_id == 0:
                    self.waiting.clear()
        for stream_id in self.waiting:
            # The promise of WindowOpened: without it, nothing can be sent.
            assert self.connection.sendable(stream_id) == 0

    def send(self, stream_id: int, size: int, fill: int, *, in_place: bool, end: bool) -> None:
        half = self.streams[stream_id]
        if half.ended or half.reset:
            return
        allowed = self.connection.sendable(stream_id)
        if allowed == 0 and (half.status or self.connection._is_client):
            self.waiting.add(stream_id)
        size = min(size, allowed)
        if not size:
            return
        payload = bytes([fill]) * size
        if in_place:
            buffer = bytearray(9) + payload
            self.flush()
            self.connection.frame_data(stream_id, buffer, size, end)
            self.wire += buffer
        else:
            self.connection.send_data(stream_id, payload, end)
        half.sent += payload
        half.ended = end


class Pair:
    """Client and server, and the two directions of the wire between them."""

    def __init__(self, client: Config, server: Config, chunks: random.Random) -> None:
        self.client = End(Role.CLIENT, client)
        self.server = End(Role.SERVER, server)
        self.chunks = chunks

    def deliver(self, source: End, target: End) -> None:
        source.flush()
        size = min(len(source.wire), self.chunks.choice((1, 5, 9, 10, 100, 16_384, 1 << 20)))
        piece = bytes(source.wire[:size])
        del source.wire[:size]
        target.hear(piece)

    def settle(self) -> None:
        """Deliver, consume and acknowledge until both ends are silent."""
        while True:
            for source, target in ((self.client, self.server), (self.server, self.client)):
                source.flush()
                while source.wire:
                    self.deliver(source, target)
            for end in (self.client, self.server):
                for stream_id, half in end.streams.items():
                    end.connection.acknowledge(stream_id, half.owed, prompt=True)
                    half.owed = 0
                end.flush()
            if not self.client.wire and not self.server.wire:
                return


actions = st.lists(
    st.tuples(
        st.sampled_from(
            ["open", "respond", "send", "send", "send", "end", "ack", "reset", "deliver", "deliver", "ping"]
        ),
        st.booleans(),  # which end
        st.integers(0, 5),  # which stream
        st.integers(1, 70_000),
        st.booleans(),
        st.booleans(),
    ),
    min_size=20,
    max_size=120,
)


def act(pair: Pair, step: tuple[str, bool, int, int, bool, bool]) -> None:
    verb, of_client, which, size, in_place, end_too = step
    end, other = (pair.client, pair.server) if of_client else (pair.server, pair.client)
    connection = end.connection
    if verb == "open" and pair.client.connection.can_open:
        stream_id = pair.client.connection.open_stream(f"10.0.0.{which}:80", [("x-n", str(size))])
        pair.client.streams[stream_id] = Half()
    elif verb == "deliver":
        pair.deliver(end, other)
    elif verb == "ping":
        connection.ping(b"%08d" % size)
    if not end.streams:
        return
    stream_id = list(end.streams)[which % len(end.streams)]
    half = end.streams[stream_id]
    if verb == "respond" and not of_client and not half.status:
        half.status = 200
        connection.respond(stream_id, 200)
    elif verb == "send" and (of_client or half.status):
        end.send(stream_id, size, which + 65, in_place=in_place, end=end_too)
    elif verb == "end" and not half.ended and not half.reset and (of_client or half.status):
        connection.end_stream(stream_id)
        half.ended = True
    elif verb == "ack":
        size = min(size, half.owed)
        half.owed -= size
        connection.acknowledge(stream_id, size, prompt=bool(which & 1))
    elif verb == "reset" and not half.reset and not (half.ended and half.peer_ended):
        connection.reset_stream(stream_id)
        half.reset = True


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow]
)
@given(configs, configs, actions, st.randoms(use_true_random=False))
def test_two_ends_agree(
    client: Config, server: Config, steps: list[tuple[str, bool, int, int, bool, bool]], chunks: random.Random
) -> None:
    pair = Pair(client, server, chunks)
    for step in steps:
        act(pair, step)
    pair.settle()
    for stream_id, ours in pair.client.streams.items():
        theirs = pair.server.streams.get(stream_id)
        if theirs is None:  # it never became a stream: refused, or reset before it was sent
            assert ours.reset
            continue
        for sender, receiver in ((ours, theirs), (theirs, ours)):
            # Everything in order, and all of it unless somebody reset the stream.
            assert sender.sent.startswith(receiver.received)
            if not (ours.reset or theirs.reset):
                assert sender.sent == receiver.received
                assert sender.ended == receiver.peer_ended
    assert set(pair.server.streams) <= set(pair.client.streams)
    assert pair.client.connection.open_streams == pair.server.connection.open_streams
    for end in (pair.client, pair.server):
        assert not end.connection.closed
        assert end.connection.settings_acknowledged


@settings(max_examples=150, deadline=None)
@given(
    configs,
    st.lists(st.binary(min_size=1, max_size=40_000), max_size=6),
    st.lists(st.binary(min_size=1, max_size=40_000), max_size=6),
    st.randoms(use_true_random=False),
)
def test_every_byte_arrives_whatever_the_windows(
    config: Config, upwards: list[bytes], downwards: list[bytes], chunks: random.Random
) -> None:
    pair = Pair(config, config, chunks)
    stream_id = pair.client.connection.open_stream("a:1")
    pair.client.streams[stream_id] = Half()
    pair.settle()
    pair.server.connection.respond(stream_id, 200)
    pair.server.streams[stream_id].status = 200
    todo = [(pair.client, bytearray(b"".join(upwards))), (pair.server, bytearray(b"".join(downwards)))]
    # A window of one byte needs a round trip a byte: a part of the data is enough there.
    todo = [(end, rest[: 50 * config.initial_window_size]) for end, rest in todo]
    expected = [bytes(rest) for _, rest in todo]
    while any(rest for _, rest in todo):
        for end, rest in todo:
            size = min(len(rest), end.connection.sendable(stream_id))
            end.connection.send_data(stream_id, rest[:size])
            del rest[:size]
        pair.settle()  # hangs here if credit is ever lost
    for end, _ in todo:
        end.connection.end_stream(stream_id)
    pair.settle()
    assert [pair.server.streams[1].received, pair.client.streams[1].received] == expected
    assert pair.client.connection.open_streams == pair.server.connection.open_streams == 0


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.randoms(use_true_random=False))
def test_a_graceful_shutdown_loses_nothing_whenever_it_happens(
    before: int, after: int, chunks: random.Random
) -> None:
    pair = Pair(Config(), Config(), chunks)

    def open_some(count: int) -> None:
        for _ in range(count):
            if pair.client.connection.can_open:
                pair.client.streams[pair.client.connection.open_stream("a:1")] = Half()
            pair.deliver(pair.client, pair.server)

    open_some(before)
    pair.server.connection.go_away(graceful=True)
    for _ in range(chunks.randrange(5)):
        pair.deliver(pair.server, pair.client)
    open_some(after)
    pair.settle()
    assert not pair.client.connection.can_open
    assert set(pair.client.streams) == set(pair.server.streams)
    assert not any(half.reset for half in pair.client.streams.values())
    for stream_id in pair.server.streams:
        pair.server.connection.respond(stream_id, 200, end_stream=True)
        pair.client.connection.end_stream(stream_id)
    pair.settle()
    assert pair.client.connection.closed
    assert pair.server.connection.closed


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=30), st.lists(st.integers(1, 400)))
def test_how_the_bytes_are_cut_changes_nothing(payloads: list[bytes], cuts: list[int]) -> None:
    sender = Connection(Role.CLIENT)
    receiver, other = Connection(Role.SERVER), Connection(Role.SERVER)
    stream_id = sender.open_stream("a:1", [("long", "x" * 300)])
    for payload in payloads:
        sender.send_data(stream_id, payload)
    sender.end_stream(stream_id)
    sender.ping(b"cut here")
    stream = sender.data_to_send()
    whole = receiver.receive(stream)
    pos, pieces = 0, []
    for size in [*cuts, len(stream)]:
        pieces += other.receive(stream[pos : pos + size])
        pos += size

    def without_data(events: list[Event]) -> list[Event]:
        return [event for event in events if not isinstance(event, DataReceived | GoAwayReceived)]

    def only_data(events: list[Event]) -> bytes:
        return b"".join(event.data for event in events if isinstance(event, DataReceived))

    assert without_data(whole) == without_data(pieces)
    assert only_data(whole) == only_data(pieces) == b"".join(payloads)
    assert receiver.data_to_send() == other.data_to_send()
