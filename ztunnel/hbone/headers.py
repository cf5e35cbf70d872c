"""Field sections: HPACK (RFC 7541), through `hpack`, and what a CONNECT and its answer must be (RFC 9113, 8).

We never use the dynamic table as an encoder, and tell peers to not use it either (SETTINGS_HEADER_TABLE_SIZE 0),
so that a block is a pure function of its bytes: fields that we send and blocks that we receive repeat from one
stream to the next (same pod, same baggage), and are looked up instead of coded. Measured, for a CONNECT with
authority, baggage, forwarded and traceparent: 40 us to encode with the library (7.5 without Huffman coding) and
15 us to decode and check; 0.13 us each from the caches. Until the peer acknowledged our SETTINGS it may use
its dynamic table, so until then blocks are decoded statefully.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import hpack

from ztunnel.hbone.errors import ConnectionViolation, ErrorCode, LocalError
from ztunnel.hbone.events import Headers

T = TypeVar("T")
Fields = Sequence[tuple[bytes, bytes]]
"""Decoded field lines, pseudo-header fields included."""

REQUEST_HEADER_FIELDS_TOO_LARGE = 431
METHOD_NOT_ALLOWED = 405

_CACHED_BLOCK = 1024  # bytes; longer blocks are decoded each time, so that the cache stays below some MiB
_CACHED_FIELD = 512
_CACHED_FIELDS = 4  # of what we send: baggage, and little else

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")  # a token (RFC 9110, 5.6.2) in lower case (RFC 9113, 8.2.1)
_VALUE = re.compile(rb"[^\x00\r\n \t](?:[^\x00\r\n]*[^\x00\r\n \t])?|")  # RFC 9113, 8.2.1
_AUTHORITY = re.compile(rb"[^\x00-\x20@/?#\x7f-\xff]+")
_STATUS = re.compile(rb"[1-9][0-9]{2}")
_CONNECTION_SPECIFIC = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)  # 8.2.2
_REQUEST_PSEUDO = frozenset((b":method", b":scheme", b":authority", b":path"))
_RESPONSE_PSEUDO = frozenset((b":status",))


class Request(NamedTuple):
    """A well-formed request: a CONNECT (`refusal` 0), or one that `refusal` is the status for."""

    authority: str
    headers: Headers
    refusal: int = 0


class Response(NamedTuple):
    """A well-formed response header section."""

    status: int
    headers: Headers


class Malformed(Exception):
    """A field section that RFC 9113, 8.1.1 calls malformed: a stream error of type PROTOCOL_ERROR."""


def parse_request(fields: Fields) -> Request:
    """Check a request's fields (8.2, 8.3, 8.5). Raises Malformed.

    Extended CONNECT (RFC 8441) is malformed too: without SETTINGS_ENABLE_CONNECT_PROTOCOL `:protocol` is an
    undefined pseudo-header field. Other methods are well formed but not ours: they are refused with 405.
    """
    pseudo, regular = _split(fields, _REQUEST_PSEUDO)
    method = pseudo.get(b":method")
    if not method:
        raise Malformed("request without :method")
    if method != b"CONNECT":
        if not pseudo.get(b":scheme") or not pseudo.get(b":path"):
            raise Malformed(f"{_text(method)} request without :scheme or :path")
        return Request("", (), METHOD_NOT_ALLOWED)
    if b":scheme" in pseudo or b":path" in pseudo:
        raise Malformed("CONNECT with :scheme or :path")
    authority = pseudo.get(b":authority", b"")
    if not _AUTHORITY.fullmatch(authority):
        raise Malformed("CONNECT without a valid :authority")
    return Request(_text(authority), regular)


def parse_response(fields: Fields) -> Response:
    """Check a response's fields (8.2, 8.3.2). Raises Malformed."""
    pseudo, regular = _split(fields, _RESPONSE_PSEUDO)
    status = pseudo.get(b":status", b"")
    if not _STATUS.fullmatch(status):
        raise Malformed("response without a valid :status")
    if status == b"101":  # 8.6: HTTP/2 has no 101
        raise Malformed("response with status 101")
    return Response(int(status), regular)


def parse_trailers(fields: Fields) -> None:
    """Check trailers: regular fields only (8.1). Raises Malformed."""
    _split(fields, frozenset())


def parse_nothing(fields: Fields) -> None:
    """For sections that are decoded only to keep the decoder's state (8.2, 5.1)."""


def _text(octets: bytes) -> str:
    return octets.decode("latin-1")


def _split(fields: Fields, allowed: frozenset[bytes]) -> tuple[dict[bytes, bytes], Headers]:
    pseudo: dict[bytes, bytes] = {}
    regular: list[tuple[str, str]] = []
    for name, value in fields:
        if not _VALUE.fullmatch(value):
            raise Malformed(f"field {_text(name)!r} has a value with forbidden characters")
        if name[:1] == b":":
            if name not in allowed:
                raise Malformed(f"pseudo-header field {_text(name)!r} is not allowed here")
            if name in pseudo:
                raise Malformed(f"pseudo-header field {_text(name)!r} appears twice")
            if regular:
                raise Malformed(f"pseudo-header field {_text(name)!r} after a regular field")
            pseudo[name] = value
            continue
        if not _NAME.fullmatch(name):
            raise Malformed(f"field name {_text(name)!r} is not a lower-case token")
        if name in _CONNECTION_SPECIFIC or (name == b"te" and value.lower() != b"trailers"):
            raise Malformed(f"connection-specific field {_text(name)!r}")
        regular.append((_text(name), _text(value)))
    return pseudo, tuple(regular)


def _too_large(fields: Fields, limit: int) -> bool:
    return sum(len(name) + len(value) + 32 for name, value in fields) > limit  # RFC 9113, 6.5.2


class TooLarge(Exception):
    """A field section beyond SETTINGS_MAX_HEADER_LIST_SIZE whose decoding did no harm yet."""


def _parse(decoder: hpack.Decoder, block: bytes, parse: Callable[[Fields], T], limit: int) -> T:
    fields = cast("Fields", decoder.decode(block, raw=True))
    if _too_large(fields, limit):
        raise TooLarge(f"field section larger than {limit} bytes")
    return parse(fields)


def _stateless(block: bytes, parse: Callable[[Fields], Any], limit: int) -> Any:
    decoder = hpack.Decoder(max_header_list_size=2 * limit)
    decoder.header_table_size = 0
    decoder.max_allowed_table_size = 0
    return _parse(decoder, block, parse, limit)


_stateless_cached = lru_cache(maxsize=1024)(_stateless)


class HeaderDecoder:
    """Decodes the field blocks of one peer. `limit` is our SETTINGS_MAX_HEADER_LIST_SIZE, in bytes.

    A section up to twice the limit is refused (TooLarge); a larger one ends the connection, since decoding
    stops in the middle of it (RFC 9113, 10.5.1).
    """

    __slots__ = ("_limit", "_stateful")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stateful: hpack.Decoder | None = hpack.Decoder(max_header_list_size=2 * limit)

    def forbid_table(self) -> None:
        """The peer acknowledged SETTINGS_HEADER_TABLE_SIZE 0: its next block must say so (RFC 7541, 4.2)."""
        if self._stateful is not None:
            self._stateful.max_allowed_table_size = 0

    def decode(self, block: bytes, parse: Callable[[Fields], T]) -> T:
        """Decode and `parse` a block. Raises what `parse` raises, TooLarge, and ConnectionViolation."""
        try:
            decoder = self._stateful
            if decoder is not None:
                if decoder.header_table_size or decoder.max_allowed_table_size:
                    return _parse(decoder, block, parse, self._limit)
                self._stateful = None  # the table is empty and stays so
            if len(block) > _CACHED_BLOCK:
                parsed: T = _stateless(block, parse, self._limit)
            else:
                parsed = _stateless_cached(block, parse, self._limit)
            return parsed
        except hpack.OversizedHeaderListError:
            raise ConnectionViolation(
                ErrorCode.ENHANCE_YOUR_CALM,
                f"field section larger than twice SETTINGS_MAX_HEADER_LIST_SIZE ({self._limit} bytes)",
            ) from None
        except hpack.HPACKError as error:
            raise ConnectionViolation(ErrorCode.COMPRESSION_ERROR, f"HPACK: {error}"[:200]) from None


def _new_encoder() -> hpack.Encoder:
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    encoder.encode(())  # swallow the table size update: `HeaderEncoder` announces it once a connection
    return encoder


_ENCODER = _new_encoder()  # with an empty table it has no state
_TABLE_SIZE_ZERO = b"\x20"  # RFC 7541, 6.3
_CONNECT = _ENCODER.encode(((":method", "CONNECT"),), huffman=False)


def _encode_field(name: str, value: str) -> bytes:
    try:
        octets = name.encode("latin-1"), value.encode("latin-1")
    except UnicodeEncodeError:
        raise LocalError(f"field {name!r}: name and value must be Latin-1 text") from None
    if name[:1] != ":" and not _NAME.fullmatch(octets[0]):
        raise LocalError(f"field {name!r}: the name must be a lower-case token")
    if octets[0] in _CONNECTION_SPECIFIC:
        raise LocalError(f"field {name!r}: HTTP/2 has no connection-specific fields")
    if not _VALUE.fullmatch(octets[1]):
        raise LocalError(f"field {name!r}: the value must have no NUL, CR, LF, nor white space at its ends")
    return _ENCODER.encode((octets,), huffman=False)


_encode_field_cached = lru_cache(maxsize=4096)(_encode_field)


def _encode_request(authority: str, headers: Headers) -> bytes:
    if not authority.isascii() or not _AUTHORITY.fullmatch(authority.encode()):
        raise LocalError(f"authority {authority!r}: must be host:port in ASCII")
    return _joined([_CONNECT, _field(":authority", authority)], headers)


def _encode_response(status: int, headers: Headers) -> bytes:
    if not 200 <= status <= 599:
        raise LocalError(f"status {status}: must be a final one, 200 to 599")
    return _joined([_field(":status", str(status))], headers)


def _joined(parts: list[bytes], headers: Headers) -> bytes:
    for name, value in headers:
        if name[:1] == ":":
            raise LocalError(f"field {name!r}: pseudo-header fields are not the caller's")
        parts.append(_field(name, value))
    return b"".join(parts)


_request_cached = lru_cache(maxsize=1024)(_encode_request)
_response_cached = lru_cache(maxsize=64)(_encode_response)


class HeaderEncoder:
    """Encodes field sections for one peer, without its dynamic table.

    Blocks with no more fields than _CACHED_FIELDS are looked up as a whole.
    """

    __slots__ = ("_prefix",)

    def __init__(self) -> None:
        self._prefix = _TABLE_SIZE_ZERO

    def request(self, authority: str, headers: Sequence[tuple[str, str]]) -> bytes:
        """The block of a CONNECT. Raises LocalError for fields that may not be sent."""
        encode = _request_cached if len(headers) <= _CACHED_FIELDS else _encode_request
        block = encode(authority, tuple(headers))
        if self._prefix:
            block = self._prefix + block
            self._prefix = b""
        return block

    def response(self, status: int, headers: Sequence[tuple[str, str]]) -> bytes:
        """The block of a final response. Raises LocalError for fields that may not be sent."""
        encode = _response_cached if len(headers) <= _CACHED_FIELDS else _encode_response
        block = encode(status, tuple(headers))
        if self._prefix:
            block = self._prefix + block
            self._prefix = b""
        return block


def _field(name: str, value: str) -> bytes:
    if len(name) + len(value) <= _CACHED_FIELD:
        return _encode_field_cached(name, value)
    return _encode_field(name, value)
