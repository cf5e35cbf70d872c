"""Hostile input: whatever bytes arrive, `receive` never raises, fails at most once, and remembers little."""

import gc
import random
import sys
import tracemalloc
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hbone.peer import (
    CONNECT,
    END_HEADERS,
    END_STREAM,
    OK,
    PREFACE,
    SETTINGS_ACK,
    block,
    data,
    frame,
    goaway,
    headers,
    ping,
    rst,
    split,
    window_update,
)
from tests.hbone.peer import settings as settings_frame
from ztunnel.hbone import (
    Allowance,
    Config,
    Connection,
    ConnectionFailed,
    ConnectRequested,
    DataReceived,
    Event,
    ResponseReceived,
    Role,
)

CONFIG = Config(
    initial_window_size=70_000,
    widest_window=200_000,
    connection_window=100_000,
    max_frame_size=20_000,
    max_concurrent_streams=8,
    max_header_list_size=2000,
    max_wasted_frames=60,
    max_wasted_streams=30,
    max_queued_replies=200,
    closed_streams=8,
)

BLOCKS = [
    block(CONNECT),
    block([*CONNECT, ("forwarded", "for=10.1.1.1"), ("baggage", "service.name=web")]),
    block([(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]),
    block(OK),
    block([(":status", "103")]),
    block([(":status", "503"), ("a", "b")]),
    block([("grpc-status", "0")]),
    block([*CONNECT, ("connection", "close")]),
    block([*CONNECT, ("big", "x" * 1900)]),
    block([*CONNECT, ("indexed", "y")], table=4096),
    b"",
    b"\x3f\xe1\x1f",  # a dynamic table of 4096 bytes, please
    b"\xbe\xbf\xc0",
    b"\x82\x86\x84\x41\xff",
]


class Application:
    """Uses a connection as the proxy does: reacts to events in all the ways it may, never in a way it may not."""

    def __init__(self, role: Role, chance: random.Random) -> None:
        self.chance = chance
        self.allowance = Allowance(150_000)
        self.connection = Connection(role, CONFIG, self.allowance)
        self.is_client = role is Role.CLIENT
        self.unanswered: list[int] = []
        self.open: set[int] = set()
        self.failed = False
        if self.is_client:
            for _ in range(3):
                self.open.add(self.connection.open_stream("10.0.0.1:80"))

    def hear(self, piece: bytes) -> None:
        events = self.connection.receive(piece)
        if self.failed:
            assert events == []
        for position, event in enumerate(events):
            self.react(event)
            if isinstance(event, ConnectionFailed):
                assert position == len(events) - 1
                assert event.reason
                assert self.connection.open_streams == self.allowance.granted == 0
                assert split(self.connection.data_to_send().removeprefix(PREFACE))[-1][0] == 7
                self.failed = True
        if self.chance.random() < 0.5:
            split(self.connection.data_to_send().removeprefix(PREFACE))  # whole frames, always
        self.act()
        if not self.failed:
            self.check()

    def react(self, event: Event) -> None:
        connection, chance = self.connection, self.chance
        if isinstance(event, ConnectRequested):
            self.unanswered.append(event.stream_id)
        elif isinstance(event, DataReceived):
            assert len(event.data) == event.credit > 0
            if chance.random() < 0.7:
                connection.acknowledge(event.stream_id, event.credit, prompt=chance.random() < 0.5)
        elif isinstance(event, ResponseReceived):
            assert 200 <= event.status <= 999

    def act(self) -> None:
        connection, chance = self.connection, self.chance
        if self.unanswered and chance.random() < 0.5:
            stream_id = self.unanswered.pop(0)
            connection.respond(stream_id, chance.choice((200, 503)), end_stream=False)
            self.open.add(stream_id)
        for stream_id in list(self.open):
            roll = chance.random()
            if roll < 0.1:
                connection.reset_stream(stream_id)
                self.open.discard(stream_id)
            elif roll < 0.2:
                connection.end_stream(stream_id)
                self.open.discard(stream_id)
            elif roll < 0.5 and connection.sendable(stream_id):
                connection.send_data(stream_id, bytes(min(100, connection.sendable(stream_id))))
        if self.is_client and connection.can_open and len(self.open) < 6:
            self.open.add(connection.open_stream("10.0.0.2:80"))
        if chance.random() < 0.02:
            connection.go_away(graceful=chance.random() < 0.5)

    def check(self) -> None:
        connection = self.connection
        assert self.is_client or connection.open_streams <= CONFIG.max_concurrent_streams
        assert len(connection._closed_streams) <= 2 * CONFIG.closed_streams
        assert len(connection._partial) <= 4000
        assert len(connection._block) <= 4000
        assert 0 <= connection._room <= CONFIG.connection_window
        assert sum(stream.extra for stream in connection._streams.values()) == self.allowance.granted
        assert self.allowance.granted <= self.allowance.total
        for stream in connection._streams.values():
            assert stream.window + stream.credit <= connection._enforced_window + stream.extra


def some_frame(chance: random.Random, wild: float, is_client: bool) -> bytes:
    """A frame that is whole, and at its place except with probability `wild`."""
    size = chance.choice((0, 1, 4, 5, 6, 8, 8, 12, 100, 300, 5000))
    if chance.random() < wild:
        stream_id = chance.choice((0, 1, 3, 5, 2, 101, 2**31 - 1))
        flags = chance.choice((0, END_HEADERS, END_STREAM, END_HEADERS | END_STREAM, chance.randrange(256)))
        payload = chance.choice((*BLOCKS, bytes(4), chance.randbytes(size)))
        return frame(chance.randrange(12), flags, stream_id, payload)
    stream_id = chance.choice((1, 1, 1, 3, 3, 5))
    roll = chance.randrange(12)
    if roll < 3:
        flags = END_HEADERS | chance.choice((0, 0, END_STREAM))
        return frame(
            1, flags, stream_id if is_client else chance.choice((1, 7, 9, 11)), chance.choice(BLOCKS[:9])
        )
    if roll < 6:
        return data(
            stream_id, bytes(size), chance.choice((0, 0, 0, END_STREAM)), chance.choice((None, None, 0, 20))
        )
    if roll == 6:
        return window_update(chance.choice((0, stream_id)), chance.choice((1, 1000, 1 << 20)))
    if roll == 7:
        return rst(stream_id, chance.randrange(20))
    if roll == 8:
        values = (
            (4, 0),
            (4, 100_000),
            (4, 65_535),
            (5, 16_384),
            (5, 1 << 20),
            (3, 0),
            (3, 100),
            (1, 0),
            (99, 5),
        )
        return settings_frame(*chance.sample(values, chance.randrange(4)))
    if roll == 9:
        return chance.choice((ping(), ping(b"draining", 1), goaway(chance.choice((1, 5, 2**31 - 1)))))
    return frame(chance.choice((2, 0xFA)), 0, stream_id, bytes(5))


def honest_stream(is_client: bool) -> bytes:
    """What an honest peer of a server (or of a client) sends, for mutation."""
    if is_client:
        return (
            settings_frame((3, 100))
            + SETTINGS_ACK
            + headers(1, OK)
            + data(1, b"hello" * 20)
            + window_update(1, 100)
            + headers(3, [(":status", "103")])
            + headers(3, OK)
            + data(3, b"x", END_STREAM)
            + ping()
            + rst(5)
            + goaway(5)
        )
    return (
        PREFACE
        + settings_frame((4, 1 << 20), (5, 1 << 20))
        + SETTINGS_ACK
        + window_update(0, 1 << 20)
        + headers(1, CONNECT)
        + data(1, b"hello" * 20)
        + frame(1, 0, 3, BLOCKS[0][:5])
        + frame(9, END_HEADERS, 3, BLOCKS[0][5:])
        + data(3, b"x", END_STREAM, pad=5)
        + ping()
        + headers(5, CONNECT)
        + rst(5)
        + data(1, b"", END_STREAM)
    )


HONEST = {True: honest_stream(True), False: honest_stream(False)}


def some_input(chance: random.Random, is_client: bool) -> bytes:
    kind = chance.randrange(4)
    if kind == 0:
        greeting = b"" if is_client else PREFACE
        if chance.random() < 0.8:
            greeting += settings_frame()
        return greeting * (chance.random() < 0.9) + chance.randbytes(chance.randrange(120))
    if kind == 1:
        mutant = bytearray(HONEST[is_client])
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            position = chance.randrange(0 if chance.random() < 0.1 else 24, len(mutant))
            what = chance.randrange(4)
            if what == 0:
                mutant[position] = chance.randrange(256)
            elif what == 1:
                mutant[position] ^= 1 << chance.randrange(8)
            elif what == 2:
                del mutant[position : position + chance.randrange(1, 10)]
            else:
                mutant[position:position] = mutant[position : position + chance.randrange(1, 40)]
            if len(mutant) < 30:
                break
        return bytes(mutant)
    greeting = (b"" if is_client else PREFACE) + settings_frame() + SETTINGS_ACK * (chance.random() < 0.8)
    if not is_client:
        greeting += b"".join(headers(stream_id, CONNECT) for stream_id in (1, 3, 5))
    wild = chance.choice((0, 0.02, 0.2))
    return greeting + b"".join(some_frame(chance, wild, is_client) for _ in range(chance.randrange(1, 25)))


def one_input(seed: int) -> bool:
    """Feed one arbitrary input to one connection. Returns whether it ended in a failure."""
    chance = random.Random(seed)
    is_client = chance.random() < 0.5
    application = Application(Role.CLIENT if is_client else Role.SERVER, chance)
    rest = some_input(chance, is_client)
    step = chance.choice((1 + len(rest), 1 + len(rest), 64, 13, 5 if len(rest) < 500 else 500))
    for position in range(0, len(rest), step):
        application.hear(rest[position : position + step])
    return application.failed


def many_inputs(first: int, count: int) -> int:
    return sum(one_input(seed) for seed in range(first, first + count))


def test_some_thousands_of_inputs() -> None:
    failed = many_inputs(1_000_000, 2500)
    # Inputs that all fail at once, or never, would test nothing.
    assert 500 < failed < 2300


@pytest.mark.long
@pytest.mark.timeout(1200)  # half a minute on a core of its own; other tests may want that core too
def test_a_hundred_thousand_inputs_leave_nothing_behind() -> None:
    many_inputs(0, 10_000)  # fills the bounded caches of header blocks
    gc.collect()
    before = sys.getallocatedblocks()
    many_inputs(10_000, 110_000)
    gc.collect()
    # The caches hold 5000 entries of some tens of objects at most.
    assert sys.getallocatedblocks() - before < 50_000


class Traced(Connection):
    """Can be referenced weakly."""


@pytest.mark.parametrize("role", Role)
def test_a_connection_that_is_dropped_is_freed_at_once(role: Role) -> None:
    connection = Traced(role)
    connection.receive(HONEST[role is Role.CLIENT])
    gone = weakref.ref(connection)
    gc.disable()  # nothing may wait for the garbage collector: proxies open and close thousands
    try:
        del connection
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("role", Role)
@settings(max_examples=300, deadline=None)
@given(stream=st.binary(max_size=400), greet=st.booleans())
def test_arbitrary_bytes(role: Role, stream: bytes, greet: bool) -> None:
    connection = Connection(role, CONFIG)
    if greet:
        connection.receive((PREFACE if role is Role.SERVER else b"") + settings_frame())
    connection.receive(stream)
    split(connection.data_to_send().removeprefix(PREFACE))


@pytest.mark.parametrize(
    "hostile",
    [
        lambda n: ping(),
        lambda n: settings_frame((4, n)),
        lambda n: headers(2 * n + 1, CONNECT) + rst(2 * n + 1),
        lambda n: headers(2 * n + 1, [*CONNECT, (f"x-{n}", "v" * 200)], END_STREAM),
        lambda n: headers(2 * n + 1, [(":method", f"M{n}"), (":scheme", "a"), (":path", "/")], END_STREAM),
        lambda n: frame(1, 0, 1, bytes(100)) if n == 0 else frame(9, 0, 1, bytes(100)),
        lambda n: goaway(2**31 - 1 - n, 0, bytes(10_000)),
        lambda n: frame(0xFA, 0, 0, bytes(10_000)),
        lambda n: data(1, bytes(10_000)),
        lambda n: b"\x00\x40\x00",
    ],
    ids=[
        "PING",
        "SETTINGS",
        "resets",
        "streams",
        "other methods",
        "CONTINUATION",
        "GOAWAY",
        "unknown",
        "DATA",
        "junk",
    ],
)
@pytest.mark.parametrize("peer_reads", [True, False])
def test_memory_stays_small_under_attack(hostile, peer_reads: bool) -> None:  # type: ignore[no-untyped-def]
    connection = Connection(Role.SERVER, Config(max_wasted_frames=10**6, max_wasted_streams=10**6))
    connection.receive(PREFACE + settings_frame() + SETTINGS_ACK + headers(1, CONNECT))
    for number in range(200):
        connection.receive(hostile(number))  # what is allocated once, and not counted
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(200, 2000):
            connection.receive(hostile(number))
            if peer_reads:
                connection.data_to_send()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
