"""The other end of a conversation with the codec: frames written and read by hand, independently of the codec.

A test reads `talk.hears(frames...)` for what the peer says, returning the codec's events, and `talk.says()` for
what the codec answers, one readable line a frame, such as "RST_STREAM 1 PROTOCOL_ERROR".
"""

import struct

import hpack

from ztunnel.hbone import Allowance, Config, Connection, ErrorCode, Event, Role

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY = 0x20

NAMES = {
    0: "DATA",
    1: "HEADERS",
    2: "PRIORITY",
    3: "RST_STREAM",
    4: "SETTINGS",
    5: "PUSH_PROMISE",
    6: "PING",
    7: "GOAWAY",
    8: "WINDOW_UPDATE",
    9: "CONTINUATION",
}

Field = tuple[str, str]
CONNECT: list[Field] = [(":method", "CONNECT"), (":authority", "10.0.0.1:80")]
OK: list[Field] = [(":status", "200")]


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream_id) + payload


def data(stream_id: int, payload: bytes = b"", flags: int = 0, pad: int | None = None) -> bytes:
    if pad is not None:
        return frame(0, flags | PADDED, stream_id, bytes((pad,)) + payload + bytes(pad))
    return frame(0, flags, stream_id, payload)


def block(fields: list[Field], table: int = 0) -> bytes:
    encoder = hpack.Encoder()
    encoder.header_table_size = table
    return encoder.encode(fields)


def headers(stream_id: int, fields: list[Field], flags: int = 0) -> bytes:
    return frame(1, flags | END_HEADERS, stream_id, block(fields))


def rst(stream_id: int, code: int = 8) -> bytes:
    return frame(3, 0, stream_id, struct.pack(">I", code))


def settings(*values: tuple[int, int]) -> bytes:
    return frame(4, 0, 0, b"".join(struct.pack(">HI", *value) for value in values))


SETTINGS_ACK = frame(4, ACK, 0)


def ping(payload: bytes = b"12345678", flags: int = 0) -> bytes:
    return frame(6, flags, 0, payload)


def goaway(last: int, code: int = 0, debug: bytes = b"") -> bytes:
    return frame(7, 0, 0, struct.pack(">II", last, code) + debug)


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(8, 0, stream_id, struct.pack(">I", increment))


def continuation(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return frame(9, flags, stream_id, payload)


def split(stream: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, stream id, payload) of each frame; all of `stream` must be whole frames."""
    out = []
    pos = 0
    while pos < len(stream):
        length = int.from_bytes(stream[pos : pos + 3], "big")
        kind, flags = stream[pos + 3], stream[pos + 4]
        stream_id = int.from_bytes(stream[pos + 5 : pos + 9], "big")
        payload = stream[pos + 9 : pos + 9 + length]
        assert len(payload) == length
        out.append((kind, flags, stream_id, payload))
        pos += 9 + length
    return out


def code_name(code: int) -> str:
    return ErrorCode(code).name


class Talk:
    """A codec under test, and the peer's memory of what it said."""

    def __init__(
        self,
        role: Role,
        config: Config | None = None,
        *,
        greet: bool = True,
        allowance: Allowance | None = None,
    ) -> None:
        self.connection = Connection(role, config, allowance)
        self.decoder = hpack.Decoder()
        self.is_client = role is Role.CLIENT
        if greet:
            self.says()
            self.hears(b"" if self.is_client else PREFACE, settings(), SETTINGS_ACK)
            assert self.says() == ["SETTINGS ACK"]

    def hears(self, *frames: bytes) -> list[Event]:
        """The peer sends `frames`, in one piece."""
        return self.connection.receive(b"".join(frames))

    def says(self) -> list[str]:
        """What the codec sends, one line a frame."""
        stream = self.connection.data_to_send()
        lines = []
        if stream.startswith(PREFACE):
            lines.append("PREFACE")
            stream = stream[len(PREFACE) :]
        return lines + [self._line(*parts) for parts in split(stream)]

    def _line(self, kind: int, flags: int, stream_id: int, payload: bytes) -> str:
        words = [NAMES[kind]]
        if kind not in (4, 6, 7):
            words.append(str(stream_id))
        if kind == 0:
            words.append(str(len(payload)))
        elif kind == 1:
            words += [str(name) + "=" + str(value) for name, value in self.decoder.decode(payload)]
        elif kind == 3:
            words.append(code_name(int.from_bytes(payload, "big")))
        elif kind == 4:
            if flags & ACK:
                assert not payload
                words.append("ACK")
            words += [f"{key}={value}" for key, value in struct.iter_unpack(">HI", payload)]
        elif kind == 6:
            words += (["ACK"] if flags & ACK else []) + [payload.decode("latin-1")]
        elif kind == 7:
            last, code = struct.unpack_from(">II", payload)
            words += [str(last), code_name(code)]
        elif kind == 8:
            words.append(str(int.from_bytes(payload, "big")))
        if kind in (0, 1) and flags & END_STREAM:
            words.append("END_STREAM")
        return " ".join(words)


def server(config: Config | None = None, *, greet: bool = True, allowance: Allowance | None = None) -> Talk:
    """We are the server; the test is the client."""
    return Talk(Role.SERVER, config, greet=greet, allowance=allowance)


def client(config: Config | None = None, *, greet: bool = True) -> Talk:
    """We are the client; the test is the server."""
    return Talk(Role.CLIENT, config, greet=greet)


def serving(config: Config | None = None, allowance: Allowance | None = None) -> Talk:
    """A server with tunnel 1 open, both ways."""
    talk = server(config, allowance=allowance)
    talk.hears(headers(1, CONNECT))
    talk.connection.respond(1, 200)
    assert talk.says() == ["HEADERS 1 :status=200"]
    return talk


def tunnelling(config: Config | None = None) -> Talk:
    """A client with tunnel 1 open, both ways."""
    talk = client(config)
    assert talk.connection.open_stream("10.0.0.1:80") == 1
    assert talk.says() == ["HEADERS 1 :method=CONNECT :authority=10.0.0.1:80"]
    talk.hears(headers(1, OK))
    return talk
