"""nf_tables messages as bytes, and the transaction that gives them to the kernel and hears its verdict.

Only encoding and sending live here; what the rules say is services.py's business. pyroute2 encodes a rule in
0.5 ms; the rules of a hundred Services on two nodes would take a second at every change. Here a rule takes 10 us,
and the bytes made once serve every node. Names and numbers: linux/netfilter/nf_tables.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable, Sequence

NETLINK_NETFILTER = 12
NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE, NLM_F_APPEND = 0x1, 0x4, 0x400, 0x800
NLMSG_ERROR = 2
BATCH_BEGIN, BATCH_END = 0x10, 0x11
SUBSYSTEM = 10
NEWTABLE, DELTABLE, NEWCHAIN, NEWRULE, NEWSET, NEWSETELEM = 0, 2, 3, 6, 9, 12

IPV4, IPV6 = 2, 10
PREROUTING, POSTROUTING = 0, 4
NF_ACCEPT, NFT_GOTO = 1, -4

NESTED = 0x8000
SET_MAP = 0x8
DATA_VERDICT = 0xFFFFFF00
TYPE_IPV4, TYPE_IPV6, TYPE_PROTOCOL, TYPE_PORT = 7, 8, 12, 13
TYPE_BITS = 6

# The 16-byte register 1 and the 4-byte registers it consists of name the same memory; a concatenated key
# fills consecutive 4-byte registers from REG32 on.
REG_VERDICT, REG32 = 0, 8
META_L4PROTO = 16
NETWORK_HEADER, TRANSPORT_HEADER = 1, 2
NG_RANDOM = 1
NAT_DNAT = 1
REJECT_ICMP_UNREACH, REJECT_TCP_RST = 0, 1
ICMP_PORT_UNREACHABLE = {IPV4: 3, IPV6: 4}

Key = bytes
Expression = bytes


class NftError(Exception):
    """The kernel refused a transaction; the message says what it said."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + b"\0" * (-length % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that consists of attributes."""
    return attribute(kind | NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    """A string attribute, with the terminating zero that nf_tables wants."""
    return attribute(kind, value.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    """A 32-bit attribute in network order, as nf_tables has all its numbers."""
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def _value(kind: int, data: bytes) -> bytes:
    return nested(kind, attribute(1, data))


def _verdict(kind: int, code: int, chain: str = "") -> bytes:
    return nested(kind, nested(2, number(1, code), text(2, chain) if chain else b""))


# Expressions of a rule, evaluated in order until one does not match.


def _expression(name: str, *attributes: bytes) -> Expression:
    return nested(1, text(1, name), nested(2, *attributes))


def payload(register: int, base: int, offset: int, length: int) -> Expression:
    """Load bytes of the packet, counted from the network or transport header."""
    return _expression("payload", number(1, register), number(2, base), number(3, offset), number(4, length))


def meta(register: int, key: int) -> Expression:
    """Load a fact about the packet."""
    return _expression("meta", number(1, register), number(2, key))


def equal(register: int, data: bytes) -> Expression:
    """Go on only if the register holds `data`."""
    return _expression("cmp", number(1, register), number(2, 0), _value(3, data))


def mask(register: int, bits: bytes) -> Expression:
    """And the register with `bits`."""
    zero = bytes(len(bits))
    return _expression(
        "bitwise",
        number(1, register),
        number(2, register),
        number(3, len(bits)),
        _value(4, bits),
        _value(5, zero),
    )


def immediate(register: int, data: bytes) -> Expression:
    """Put `data` into the register."""
    return _expression("immediate", number(1, register), _value(2, data))


def accept() -> Expression:
    """End here: the packet passes this chain."""
    return _expression("immediate", number(1, REG_VERDICT), _verdict(2, NF_ACCEPT))


def lookup(name: str, register: int, verdict: bool = False) -> Expression:
    """Go on only if the key in the register is in the set; with `verdict`, do what the map says of it."""
    return _expression(
        "lookup", text(1, name), number(2, register), number(3, REG_VERDICT) if verdict else b""
    )


def random_below(register: int, bound: int) -> Expression:
    """Load a random number from 0 to `bound` - 1, in the host's byte order."""
    return _expression("numgen", number(1, register), number(2, bound), number(3, NG_RANDOM), number(4, 0))


def dnat(family: int, address_register: int, port_register: int) -> Expression:
    """Send the connection to the address and port in the registers."""
    return _expression(
        "nat",
        number(1, NAT_DNAT),
        number(2, family),
        number(3, address_register),
        number(5, port_register),
    )


def masquerade() -> Expression:
    """Make the connection come from the address of the interface it leaves through."""
    return _expression("masq")


def reject_tcp() -> Expression:
    """Answer with a reset."""
    return _expression("reject", number(1, REJECT_TCP_RST), attribute(2, b"\0"))


def reject_port(family: int) -> Expression:
    """Answer with ICMP's "port unreachable"."""
    return _expression(
        "reject", number(1, REJECT_ICMP_UNREACH), attribute(2, bytes([ICMP_PORT_UNREACHABLE[family]]))
    )


class Transaction:
    """Messages that the kernel applies all together or not at all."""

    def __init__(self) -> None:
        self._messages: list[tuple[int, int, int, bytes]] = []

    def _add(self, kind: int, family: int, flags: int, *attributes: bytes) -> None:
        self._messages.append((kind, family, flags, b"".join(attributes)))

    def replace_table(self, family: int, table: str) -> None:
        """An empty table, whatever there was of that name before."""
        self.remove_table(family, table)
        self._add(NEWTABLE, family, NLM_F_CREATE, text(1, table))

    def remove_table(self, family: int, table: str) -> None:
        """No table of that name; to delete one that may be missing, it is made first."""
        self._add(NEWTABLE, family, NLM_F_CREATE, text(1, table))
        self._add(DELTABLE, family, 0, text(1, table))

    def base_chain(self, family: int, table: str, chain: str, kind: str, hook: int, priority: int) -> None:
        """A chain that packets enter at a hook; `kind` is "nat" or "filter"."""
        where = nested(4, number(1, hook), number(2, priority))
        self._add(NEWCHAIN, family, NLM_F_CREATE, text(1, table), text(3, chain), where, text(7, kind))

    def chain(self, family: int, table: str, chain: str) -> None:
        """A chain that rules send packets to."""
        self._add(NEWCHAIN, family, NLM_F_CREATE, text(1, table), text(3, chain))

    def rule(self, family: int, table: str, chain: str, *expressions: Expression) -> None:
        """A rule at the end of the chain."""
        self._add(
            NEWRULE,
            family,
            NLM_F_CREATE | NLM_F_APPEND,
            text(1, table),
            text(2, chain),
            nested(4, *expressions),
        )

    def set(
        self, family: int, table: str, name: str, types: Sequence[int], key_length: int, keys: Iterable[Key]
    ) -> None:
        """A set of concatenated keys; `types` are for people who list it."""
        self._set(family, table, name, types, key_length, 0)
        self._elements(family, table, name, [nested(1, _value(1, key)) for key in keys])

    def jump_map(
        self,
        family: int,
        table: str,
        name: str,
        types: Sequence[int],
        key_length: int,
        chains: dict[Key, str],
    ) -> None:
        """A map from keys to the chain that goes on with the packet."""
        self._set(family, table, name, types, key_length, SET_MAP)
        self._elements(
            family,
            table,
            name,
            [nested(1, _value(1, key), _verdict(2, NFT_GOTO, chain)) for key, chain in chains.items()],
        )

    def _set(
        self, family: int, table: str, name: str, types: Sequence[int], key_length: int, flags: int
    ) -> None:
        concatenated = 0
        for kind in types:
            concatenated = concatenated << TYPE_BITS | kind
        self._add(
            NEWSET,
            family,
            NLM_F_CREATE,
            text(1, table),
            text(2, name),
            number(3, flags),
            number(4, concatenated),
            number(5, key_length),
            number(6, DATA_VERDICT) + number(7, 16) if flags & SET_MAP else b"",
            number(10, len(self._messages)),
        )

    def _elements(self, family: int, table: str, name: str, elements: list[bytes]) -> None:
        # The list is one attribute, whose length has 16 bits.
        for start in range(0, len(elements), 400):
            self._add(
                NEWSETELEM,
                family,
                NLM_F_CREATE,
                text(1, table),
                text(2, name),
                nested(3, *elements[start : start + 400]),
            )

    def encode(self) -> bytes:
        """The whole batch; only its last message asks to be acknowledged (errors come unasked)."""
        batch = [_message(BATCH_BEGIN, NLM_F_REQUEST, 0, 0, SUBSYSTEM)]
        last = len(self._messages)
        for sequence, (kind, family, flags, body) in enumerate(self._messages, 1):
            flags |= NLM_F_REQUEST | (NLM_F_ACK if sequence == last else 0)
            batch.append(_message(SUBSYSTEM << 8 | kind, flags, sequence, family, 0, body))
        batch.append(_message(BATCH_END, NLM_F_REQUEST, last + 1, 0, SUBSYSTEM))
        return b"".join(batch)


def _message(kind: int, flags: int, sequence: int, family: int, resource: int, body: bytes = b"") -> bytes:
    return struct.pack(
        "=IHHIIBBH", 20 + len(body), kind, flags, sequence, 0, family, 0, socket.htons(resource)
    ) + (body)


def send(batch: bytes) -> None:
    """Give an encoded transaction to the kernel, in the calling thread's network namespace.

    Raises NftError with the kernel's first complaint, nothing having been changed.
    """
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
    ) as channel:
        try:
            # A batch is one message: it must fit. As root of the namespace the limit may be passed.
            channel.setsockopt(socket.SOL_SOCKET, 32, len(batch) * 2 + 65536)  # SO_SNDBUFFORCE
        except PermissionError:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(batch) * 2 + 65536)
        channel.settimeout(5)
        channel.bind((0, 0))
        channel.send(batch)
        complaint = 0
        while not complaint:
            answers = channel.recv(65536)
            acknowledged = False
            while len(answers) >= 20:
                length, kind = struct.unpack_from("=IH", answers)
                if kind == NLMSG_ERROR:
                    complaint = complaint or -struct.unpack_from("=i", answers, 16)[0]
                    acknowledged = True
                answers = answers[length + -length % 4 :]
            if acknowledged:
                break
    if complaint:
        remedy = (
            "; the kernel needs nf_tables with NAT (modules nf_tables, nft_chain_nat, nft_numgen, nft_masq, nft_reject)"
            if complaint in (errno.EOPNOTSUPP, errno.ENOENT, errno.EPROTONOSUPPORT)
            else ""
        )
        raise NftError(f"nftables: {os.strerror(complaint)}{remedy}", complaint)
