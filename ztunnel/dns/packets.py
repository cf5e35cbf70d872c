"""DNS messages as bytes: queries read as far as an answer needs it, answers built. Pure (RFC 1035, 2308, 6891).

Rule: nothing that arrives may lead to another exception than `NotAQuery` and `FormatError`. What is passed on to
another server is passed on as it came, so there is no general encoder here: a mesh has addresses to give, and nothing
else. Reading a query takes 2 us, building an answer 2 us; a general library takes 150.
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

A: Final = 1
SOA: Final = 6
CNAME: Final = 5
AAAA: Final = 28
OPT: Final = 41
IN: Final = 1

NOERROR: Final = 0
FORMERR: Final = 1
SERVFAIL: Final = 2
BADVERS: Final = 16

TTL: Final = 30
"""Seconds for which an answer holds, and one that says that there is none; what Istio's ztunnel says."""

HEADER: Final = 12
PLAIN_UDP_SIZE: Final = 512
OWN_UDP_SIZE: Final = 1232
MAX_SIZE: Final = 65535
MOST_UDP: Final = 65507
"""What an IPv4 datagram holds."""

TYPE_NAMES: Final = {
    1: "a", 2: "ns", 5: "cname", 6: "soa", 12: "ptr", 15: "mx", 16: "txt", 28: "aaaa", 33: "srv", 35: "naptr",
    64: "svcb", 65: "https", 252: "axfr", 255: "any",
}  # fmt: skip
"""The types that are counted by name; others are `other`, since their number is up to who asks."""

_QR, _AA, _TC, _RD, _RA, _CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0010
_OPCODE = 0x7800
_COPIED = _OPCODE | _RD | _CD
_POINTER = 0xC000
_QUESTION_NAME = _POINTER | HEADER
_DO = 0x8000

_COUNTS = struct.Struct("!HHHHHH")  # id, flags, and how many of each section
_TYPE_CLASS = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")  # after the name: type, class, TTL, length of the data
_POINTED = struct.Struct("!HHHIH")  # the same with a pointer for the name
_SOA_TIMES = struct.pack(
    "!IIIII", 1, 7200, 1800, 86400, TTL
)  # the last is how long a "no" holds (RFC 2308, 4)


class NotAQuery(Exception):
    """Too short for a header, or an answer: nothing to reply to."""


class FormatError(Exception):
    """A query that cannot be read: FORMERR."""


class Query(NamedTuple):
    """What is asked.

    `name` is in lower case without the dot at its end, a byte a character (a dot inside of a label is `\\\\.`); `end`
    is where the question ends. `udp_size`: the largest answer over UDP. `edns` -1: the query has no OPT record, else
    its version. `plain`: an ordinary query, with nothing in it that only the server it was sent to can judge.
    """

    data: bytes
    flags: int
    name: str
    end: int
    qtype: int
    qclass: int
    udp_size: int = PLAIN_UDP_SIZE
    edns: int = -1
    dnssec: bool = False
    plain: bool = True

    @property
    def type_name(self) -> str:
        """The type as it is counted."""
        return TYPE_NAMES.get(self.qtype, "other")


def parse(data: bytes) -> Query:
    """Read a query. Raises NotAQuery, FormatError.

    Of other operations than QUERY (updates, notifications) only the header is looked at.
    """
    if len(data) < HEADER:
        raise NotAQuery
    _, flags, questions, answers, authorities, additionals = _COUNTS.unpack_from(data)
    if flags & _QR:
        raise NotAQuery
    if flags & _OPCODE:
        return Query(data, flags, "", HEADER, 0, 0, plain=False)
    if questions != 1:
        raise FormatError
    try:
        name, end = _name(data)
        qtype, qclass = _TYPE_CLASS.unpack_from(data, end)
        end += 4
        if not additionals and not answers and not authorities:
            return Query(data, flags, name, end, qtype, qclass, plain=end == len(data))
        return _with_records(data, flags, name, end, qtype, qclass, answers + authorities, additionals)
    except (IndexError, struct.error):
        raise FormatError from None


def _name(data: bytes) -> tuple[str, int]:
    """The question's name and where it ends. Raises FormatError, IndexError."""
    labels = []
    position = HEADER
    while length := data[position]:
        if length > 63:  # a pointer: the first name of a message has nothing to point to
            raise FormatError
        labels.append(data[position + 1 : position + 1 + length])
        position += 1 + length
    position += 1
    if position - HEADER > 255:
        raise FormatError
    text = b".".join(labels)
    if text.count(b".") != max(0, len(labels) - 1):
        text = b".".join(label.replace(b".", b"\\.") for label in labels)
    return text.lower().decode("latin-1"), position


def _skip_name(data: bytes, position: int) -> int:
    while length := data[position]:
        if length >= 0xC0:
            return position + 2
        if length > 63:
            raise FormatError
        position += 1 + length
    return position + 1


def _with_records(
    data: bytes, flags: int, name: str, end: int, qtype: int, qclass: int, others: int, additionals: int
) -> Query:
    """A query with records after its question: its OPT record, if that is all there is."""
    plain = others == 0
    size, version, dnssec = PLAIN_UDP_SIZE, -1, False
    position = end
    for number in range(others + additionals):
        root = data[position] == 0
        position = _skip_name(data, position)
        kind, of_class, lifetime, length = _RECORD.unpack_from(data, position)
        position += _RECORD.size + length
        if kind == OPT and number >= others:
            if not root or version >= 0:  # RFC 6891, 6.1.1
                raise FormatError
            size, version, dnssec = (
                min(max(size, of_class), MOST_UDP),
                lifetime >> 16 & 0xFF,
                bool(lifetime & _DO),
            )
        else:
            plain = False  # a signature (RFC 8945), for example
    if position > len(data):
        raise FormatError
    plain = plain and position == len(data)
    return Query(data, flags, name, end, qtype, qclass, size, version, dnssec, plain)


# Answers. `limit` is in bytes.


def addresses(query: Query, found: Sequence[bytes], limit: int, cut: int = 0) -> bytes:
    """The answer with these packed addresses, all of the type asked for; what does not fit is left out (TC).

    With `cut`, the offset in the message at which a search domain begins: as an alias (CNAME) of the name before it.
    """
    head, owner = b"", _QUESTION_NAME
    if cut:
        target = query.data[HEADER:cut] + b"\0"
        head = _POINTED.pack(_QUESTION_NAME, CNAME, IN, TTL, len(target)) + target
        owner = _POINTER | query.end + _POINTED.size
    length = 4 if query.qtype == A else 16
    start = _POINTED.pack(owner, query.qtype, IN, TTL, length)
    opt = _opt(query)
    room = (limit - query.end - len(head) - len(opt)) // (len(start) + length)
    taken = found if len(found) <= room else found[:room]
    flags = _AA | (_TC if len(taken) < len(found) else 0)
    records = start + start.join(taken) if taken else b""
    return b"".join((_start(query, flags, len(taken) + bool(head), 0, bool(opt)), head, records, opt))


def no_data(query: Query, zone: int) -> bytes:
    """The name exists, and has no address of the type asked for.

    `zone` is the offset in the message of the name to which the answer's authority belongs, a suffix of the question's.
    """
    owner = _POINTER | zone
    names = struct.pack("!HH", owner, owner)
    record = _POINTED.pack(owner, SOA, IN, TTL, len(names) + len(_SOA_TIMES)) + names + _SOA_TIMES
    opt = _opt(query)
    return b"".join((_start(query, _AA, 0, 1, bool(opt)), record, opt))


def refusal(query: Query, code: int) -> bytes:
    """The query's question with an error code, which may be an extended one (BADVERS) where the query has EDNS."""
    opt = _opt(query, code >> 4)
    if query.end > HEADER:
        return _start(query, code & 0xF, 0, 0, bool(opt)) + opt
    return query.data[:2] + struct.pack("!HHHHH", _QR | query.flags & _COPIED | _RA | code & 0xF, 0, 0, 0, 0)


def format_error(data: bytes) -> bytes:
    """FORMERR to what `parse` could not read (a header's length at least)."""
    flags = int.from_bytes(data[2:4], "big")
    return data[:2] + struct.pack("!HHHHH", _QR | flags & _COPIED | _RA | FORMERR, 0, 0, 0, 0)


def _start(query: Query, flags: int, answers: int, authorities: int, additionals: int) -> bytes:
    data = query.data
    flags |= _QR | _RA | query.flags & _COPIED
    return (
        data[:2]
        + struct.pack("!HHHHH", flags, 1, answers, authorities, additionals)
        + data[HEADER : query.end]
    )


def _opt(query: Query, code: int = 0) -> bytes:
    """Our OPT record, if the query has one; `code` are the upper bits of the answer's."""
    if query.edns < 0:
        return b""
    return b"\0" + _RECORD.pack(OPT, OWN_UDP_SIZE, code << 24 | (_DO if query.dnssec else 0), 0)


def answers(query: Query, response: bytes) -> bool:
    """Whether a message from the server that was asked answers this query; the ids are compared elsewhere.

    It repeats the question, in whatever letters. One without a question can only say what is wrong (FORMERR of a
    server that did not understand), unless the operation was no query.
    """
    if len(response) < HEADER or not response[2] & 0x80:
        return False
    flags, questions = struct.unpack_from("!HH", response, 2)
    if flags & _OPCODE != query.flags & _OPCODE:
        return False
    if query.end == HEADER:
        return True
    if questions == 0:
        return bool(flags & 0xF)
    name_end = query.end - 4
    return (
        questions == 1
        and response[name_end : query.end] == query.data[name_end : query.end]
        and response[HEADER:name_end].lower() == query.data[HEADER:name_end].lower()
    )
