"""A table of rules as one netlink transaction, and the kernel's table read back as text that can be compared.

What the kernel holds is compared with what was wanted by turning both, message by message, into the same text
through the same decoder: so a difference is found whatever attribute it is in, and can be shown to a person.
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pyroute2.netlink import NETLINK_NETFILTER, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFT_MSG_DELSETELEM,
    NFT_MSG_DELTABLE,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETRULE,
    NFT_MSG_GETSET,
    NFT_MSG_GETSETELEM,
    NFT_MSG_GETTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
    NFT_MSG_NEWTABLE,
    nft_chain_msg,
    nft_rule_msg,
    nft_set_elem_list_msg,
    nft_set_msg,
    nft_table_msg,
)

from cni.netlink import (
    NetlinkError,
    NetlinkSocket,
    attributes,
    decoded,
    dump_request,
    encode,
    message_of,
    payload_of,
    raw_attribute_list,
    raw_attributes,
)
from cni.nftables import NF_ACCEPT, Chain, Rule, Set, SetElement, Table

# What a kernel answers that has no netfilter sockets, or no nftables behind them.
NO_NFTABLES = (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL)
READ_ATTEMPTS = 5
NFNL_MSG_BATCH_BEGIN = 0x10
NFNL_MSG_BATCH_END = 0x11


# Of a set's description and its elements (linux/netfilter/nf_tables.h), what is read without a decoder.
NFTA_SET_TABLE, NFTA_SET_NAME, NFTA_SET_FLAGS, NFTA_SET_KEY_TYPE, NFTA_SET_KEY_LEN = 1, 2, 3, 4, 5
NFTA_SET_ELEM_LIST_ELEMENTS = 3
NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_FLAGS = 1, 3
NFTA_DATA_VALUE = 1
NFT_SET_INTERVAL = 4
NFT_SET_ELEM_INTERVAL_END = 1
# pyroute2 0.9 knows this flag by its number only.
_INTERVAL_END = {NFT_SET_ELEM_INTERVAL_END, "NFT_SET_ELEM_INTERVAL_END"}
_NFGENMSG = 4  # bytes before the attributes
ELEMENTS_A_MESSAGE = 500  # an attribute, and so the list of elements, has at most 64 KiB

INET = {"nfgen_family": NFPROTO_INET}


class RulesetError(Exception):
    """The kernel would not take, or show, a table; the message says which step, why, and what would help."""


class NoNftablesError(RulesetError):
    """The node's kernel has no nftables at all."""


class Batch(NamedTuple):
    """An encoded transaction: its bytes, the sequence numbers to be acknowledged, and what each message does."""

    data: bytes
    sequences: range
    steps: tuple[str, ...]


class Listing(NamedTuple):
    """A table as text: for each chain its description, then its rules in order; for each set what it is and holds."""

    chains: dict[str, tuple[str, ...]]
    sets: dict[str, str]


class _Step(NamedTuple):
    name: str
    message: Any
    operation: int
    flags: int


def _kind(operation: int) -> int:
    return int(NFNL_SUBSYS_NFTABLES << 8) | operation


def _boundary(kind: int, sequence: int) -> bytes:
    return encode(message_of(nfgen_msg, {"res_id": NFNL_SUBSYS_NFTABLES}, ()), kind, 0, sequence)


def _table_message(name: str) -> Any:
    return message_of(nft_table_msg, INET, [("NFTA_TABLE_NAME", name)])


def _chain_message(table: str, chain: Chain) -> Any:
    hook = {"attrs": [("NFTA_HOOK_HOOKNUM", chain.hook), ("NFTA_HOOK_PRIORITY", chain.priority)]}
    parts = [
        ("NFTA_CHAIN_TABLE", table),
        ("NFTA_CHAIN_NAME", chain.name),
        ("NFTA_CHAIN_HOOK", hook),
        ("NFTA_CHAIN_POLICY", NF_ACCEPT),
        ("NFTA_CHAIN_TYPE", chain.kind),
    ]
    return message_of(nft_chain_msg, INET, parts)


def _set_message(table: str, of: Set, identifier: int) -> Any:
    parts = [
        ("NFTA_SET_TABLE", table),
        ("NFTA_SET_NAME", of.name),
        ("NFTA_SET_FLAGS", {"NFT_SET_INTERVAL"} if of.interval else set()),
        ("NFTA_SET_KEY_TYPE", of.key_type),
        ("NFTA_SET_KEY_LEN", of.key_length),
        ("NFTA_SET_ID", identifier),
    ]
    return message_of(nft_set_msg, INET, parts)


def _elements_message(table: str, of: Set, elements: Iterable[SetElement]) -> Any:
    listed = [
        {
            "attrs": [
                ("NFTA_SET_ELEM_KEY", {"attrs": [("NFTA_DATA_VALUE", element.key)]}),
                *([("NFTA_SET_ELEM_FLAGS", _INTERVAL_END)] if element.end else []),
            ]
        }
        for element in elements
    ]
    parts = [
        ("NFTA_SET_ELEM_LIST_TABLE", table),
        ("NFTA_SET_ELEM_LIST_SET", of.name),
        ("NFTA_SET_ELEM_LIST_ELEMENTS", listed),
    ]
    return message_of(nft_set_elem_list_msg, INET, parts)


def _rule_message(table: str, chain: str, of: Rule) -> Any:
    parts = [
        ("NFTA_RULE_TABLE", table),
        ("NFTA_RULE_CHAIN", chain),
        ("NFTA_RULE_EXPRESSIONS", list(of.expressions)),
        ("NFTA_RULE_USERDATA", of.comment),
    ]
    return message_of(nft_rule_msg, INET, parts)


def _transaction(steps: Iterable[_Step]) -> Batch:
    parts = [_boundary(NFNL_MSG_BATCH_BEGIN, 0)]
    names = []
    for number, step in enumerate(steps, 1):
        parts.append(encode(step.message, _kind(step.operation), step.flags | NLM_F_ACK, number))
        names.append(step.name)
    parts.append(_boundary(NFNL_MSG_BATCH_END, len(names) + 1))
    return Batch(b"".join(parts), range(1, len(names) + 1), tuple(names))


def _deletion(name: str) -> list[_Step]:
    # A table that is not there cannot be deleted; making it first makes the deletion always possible.
    return [
        _Step(f"add table inet {name}", _table_message(name), NFT_MSG_NEWTABLE, NLM_F_CREATE),
        _Step(f"delete table inet {name}", _table_message(name), NFT_MSG_DELTABLE, 0),
    ]


def creation(table: Table) -> Batch:
    """The transaction that makes `table` where there is none of its name (else EEXIST), all or nothing.

    Much faster than `replacement`: whoever has deleted something waits, when he closes his socket, until all cores have
    seen it (10 ms).
    """
    name = f"add table inet {table.name}"
    return _transaction(
        [_Step(name, _table_message(table.name), NFT_MSG_NEWTABLE, NLM_F_CREATE | NLM_F_EXCL), *_parts(table)]
    )


def replacement(table: Table) -> Batch:
    """The transaction that puts `table` in the place of whatever table of its name there is, all or nothing."""
    steps = _deletion(table.name)
    return _transaction([*steps, steps[0]._replace(message=_table_message(table.name)), *_parts(table)])


def _parts(table: Table) -> Iterator[_Step]:
    """What is in a table that is there, and empty."""
    for identifier, each_set in enumerate(table.sets, 1):
        name = f"add set inet {table.name} {each_set.name}"
        message = _set_message(table.name, each_set, identifier)
        yield _Step(name, message, NFT_MSG_NEWSET, NLM_F_CREATE)
        for start in range(0, len(each_set.elements), ELEMENTS_A_MESSAGE):
            part = each_set.elements[start : start + ELEMENTS_A_MESSAGE]
            message = _elements_message(table.name, each_set, part)
            yield _Step(f"{name}: its elements", message, NFT_MSG_NEWSETELEM, NLM_F_CREATE)
    for chain in table.chains:
        name = f"add chain inet {table.name} {chain.name} (type {chain.kind})"
        yield _Step(name, _chain_message(table.name, chain), NFT_MSG_NEWCHAIN, NLM_F_CREATE)
    for chain in table.chains:
        for each in chain.rules:
            name = f'add rule inet {table.name} {chain.name} "{each.comment}"'
            message = _rule_message(table.name, chain.name, each)
            yield _Step(name, message, NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND)


def elements_change(table: str, changes: Iterable[tuple[Set, Sequence[SetElement], bool]]) -> Batch:
    """The transaction that puts elements into sets of a table that is there (True), or takes them out (False)."""
    steps = []
    for of, elements, added in changes:
        name = f"{'add to' if added else 'delete from'} set inet {table} {of.name}"
        operation, flags = (NFT_MSG_NEWSETELEM, NLM_F_CREATE) if added else (NFT_MSG_DELSETELEM, 0)
        for start in range(0, len(elements), ELEMENTS_A_MESSAGE):
            message = _elements_message(table, of, elements[start : start + ELEMENTS_A_MESSAGE])
            steps.append(_Step(name, message, operation, flags))
    return _transaction(steps)


def removal(name: str) -> Batch:
    """The transaction after which there is no table of this name."""
    return _transaction(_deletion(name))


def open_nftables(namespace: int) -> NetlinkSocket:
    """A netlink socket for nftables in the namespace open as `namespace`. Raises NoNftablesError, OSError."""
    try:
        return NetlinkSocket(NETLINK_NETFILTER, namespace)
    except OSError as error:
        if error.errno in NO_NFTABLES:
            raise NoNftablesError(_explain(error.errno or 0, "open a netfilter netlink socket")) from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise RulesetError(
                _explain(error.errno, "enter the pod's network namespace", str(error))
            ) from error
        raise


def commit(nftables: NetlinkSocket, batch: Batch) -> None:
    """Have the kernel carry out a transaction, all of it or none. Raises RulesetError naming the step refused."""
    try:
        nftables.send(batch.data, batch.sequences)
    except NetlinkError as error:
        step = batch.steps[min(error.index, len(batch.steps) - 1)]
        raise RulesetError(_explain(error.errno or 0, step, error.detail)) from error


def _explain(code: int, step: str, detail: str = "") -> str:
    """What a person should know about errno `code` at `step`."""
    what = f"nftables: {step}: {errno.errorcode.get(code, code)}"
    if detail:
        what += f" ({detail})"
    if code in (errno.EPERM, errno.EACCES):
        return f"{what}: not permitted; run the node agent as root, or with CAP_NET_ADMIN and CAP_SYS_ADMIN"
    if code in (*NO_NFTABLES, errno.ENOENT):
        return (
            f"{what}: this node's kernel lacks what the redirection needs; load the kernel modules nfnetlink, "
            "nf_tables, nft_chain_nat, nft_redir and nft_ct (modprobe), or use a kernel built with "
            "CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET, CONFIG_NFT_NAT, CONFIG_NFT_REDIR and CONFIG_NFT_CT"
        )
    return what


# Back from the kernel, as text.


def _text(value: Any) -> str:
    """A decoded attribute value as text that does not depend on the order of attributes."""
    if isinstance(value, dict):
        return " ".join(
            sorted(f"{pair[0].split('_', 2)[-1].lower()}={_text(pair[1])}" for pair in value["attrs"])
        )
    if isinstance(value, bytes | bytearray):
        return bytes(value).hex()
    if isinstance(value, frozenset | set):
        return ",".join(sorted(map(str, value)))
    return str(value)


def _rule_text(message: Any) -> str:
    found = attributes(message)
    parts = []
    for expression in found.get("NFTA_RULE_EXPRESSIONS", ()):
        inner = attributes(expression)
        parts.append(f"{inner.get('NFTA_EXPR_NAME')}[{_text(inner.get('NFTA_EXPR_DATA', ''))}]")
    return f'"{found.get("NFTA_RULE_USERDATA", "")}": {" ".join(parts)}'


def _chain_text(message: Any) -> str:
    found = attributes(message)
    hook = attributes(found["NFTA_CHAIN_HOOK"]) if "NFTA_CHAIN_HOOK" in found else {}
    return (
        f"type {found.get('NFTA_CHAIN_TYPE')} hook {hook.get('NFTA_HOOK_HOOKNUM')} "
        f"priority {hook.get('NFTA_HOOK_PRIORITY')} policy {found.get('NFTA_CHAIN_POLICY')}"
    )


class _Object(NamedTuple):
    """An object that the kernel lists: a table (`chain` and `text` empty), a chain or a rule."""

    table: str
    chain: str = ""
    text: str = ""


# Decoding a table takes 10 ms, and pods have the same one: the same bytes, handles included, unless it was changed.


@lru_cache(maxsize=64)
def _table_object(payload: bytes) -> _Object:
    return _Object(decoded(nft_table_msg, payload).get_attr("NFTA_TABLE_NAME"))


@lru_cache(maxsize=256)
def _chain_object(payload: bytes) -> _Object:
    found = decoded(nft_chain_msg, payload)
    return _Object(found.get_attr("NFTA_CHAIN_TABLE"), found.get_attr("NFTA_CHAIN_NAME"), _chain_text(found))


@lru_cache(maxsize=1024)
def _rule_object(payload: bytes) -> _Object:
    found = decoded(nft_rule_msg, payload)
    return _Object(found.get_attr("NFTA_RULE_TABLE"), found.get_attr("NFTA_RULE_CHAIN"), _rule_text(found))


def wanted(table: Table) -> Listing:
    """`table` as the listing that `read` gives where the kernel holds exactly it."""
    chains = {}
    for chain in table.chains:
        description = _chain_object(payload_of(_chain_message(table.name, chain))).text
        rules = (
            _rule_object(payload_of(_rule_message(table.name, chain.name, of))).text for of in chain.rules
        )
        chains[chain.name] = (description, *rules)
    return Listing(chains, {each.name: _set_text(each) for each in table.sets})


def read(nftables: NetlinkSocket, name: str) -> Listing | None:
    """The inet table `name` as the kernel holds it, or None where there is none. Raises RulesetError."""
    attempt = 1
    while True:
        try:
            return _read(nftables, name)
        except NetlinkError as error:
            # It was there a moment ago: somebody takes it out, or replaces it, while it is read.
            if error.errno == errno.ENOENT and attempt < READ_ATTEMPTS:
                attempt += 1
                continue
            kind = NoNftablesError if error.errno in NO_NFTABLES else RulesetError
            raise kind(_explain(error.errno or 0, f"read table inet {name}", error.detail)) from error


def _read(nftables: NetlinkSocket, name: str) -> Listing | None:
    """`read`, once. Raises NetlinkError."""
    tables, chains, rules = _requests(name)
    if not _of_table(name, nftables.dump(tables, _listed(_table_object))):
        return None
    held_chains = _of_table(name, nftables.dump(chains, _listed(_chain_object)))
    held_rules = _of_table(name, nftables.dump(rules, _listed(_rule_object)))
    held_sets = _read_sets(nftables, name)
    found: dict[str, list[str]] = {held.chain: [held.text] for held in held_chains}
    for held in held_rules:
        found.setdefault(held.chain, [""]).append(held.text)
    return Listing({chain: tuple(lines) for chain, lines in found.items()}, held_sets)


def _set_text(of: Set) -> str:
    held = ", ".join(f"{'end ' if each.end else ''}{each.key.hex()}" for each in sorted(of.elements))
    kind = f"{of.key_length} bytes of type {of.key_type}{' in intervals' if of.interval else ''}"
    return f"{kind}: {held}"


def _read_sets(nftables: NetlinkSocket, name: str) -> dict[str, str]:
    """The sets of the inet table `name`. Raises NetlinkError."""
    asked = message_of(nft_set_msg, INET, [("NFTA_SET_TABLE", name)])
    found = nftables.dump(dump_request(asked, _kind(NFT_MSG_GETSET)), _set_of)
    texts = {}
    for table, each in found:
        if table == name:
            request = _elements_message(name, each, ())
            lists = nftables.dump(dump_request(request, _kind(NFT_MSG_GETSETELEM)), _elements_of)
            elements = tuple(element for part in lists for element in part)
            texts[each.name] = _set_text(each._replace(elements=elements))
    return texts


def _set_of(payload: bytes) -> tuple[str, Set]:
    """The table of a set that the kernel lists (none if of another family than inet), and the set without elements."""
    found = raw_attributes(payload, _NFGENMSG)
    table = _string(found.get(NFTA_SET_TABLE)) if payload[0] == NFPROTO_INET else ""
    interval = bool(int.from_bytes(found.get(NFTA_SET_FLAGS, b""), "big") & NFT_SET_INTERVAL)
    key_type, key_length = (
        int.from_bytes(found.get(kind, b""), "big") for kind in (NFTA_SET_KEY_TYPE, NFTA_SET_KEY_LEN)
    )
    return table, Set(_string(found.get(NFTA_SET_NAME)), key_type, key_length, interval, ())


def _elements_of(payload: bytes) -> tuple[SetElement, ...]:
    listed = raw_attributes(payload, _NFGENMSG).get(NFTA_SET_ELEM_LIST_ELEMENTS, b"")
    elements = []
    for raw in raw_attribute_list(listed):
        found = raw_attributes(raw, 0)
        key = raw_attributes(found.get(NFTA_SET_ELEM_KEY, b""), 0).get(NFTA_DATA_VALUE, b"")
        flags = int.from_bytes(found.get(NFTA_SET_ELEM_FLAGS, b""), "big")
        elements.append(SetElement(key, bool(flags & NFT_SET_ELEM_INTERVAL_END)))
    return tuple(elements)


def _string(raw: bytes | None) -> str:
    return (raw or b"").rstrip(b"\0").decode(errors="replace")


@lru_cache(maxsize=8)
def _requests(name: str) -> tuple[bytes, bytes, bytes]:
    """What asks for all tables, all chains, and the rules of the table `name`."""
    rules = message_of(nft_rule_msg, INET, [("NFTA_RULE_TABLE", name)])
    return (
        dump_request(message_of(nft_table_msg, INET, ()), _kind(NFT_MSG_GETTABLE)),
        dump_request(message_of(nft_chain_msg, INET, ()), _kind(NFT_MSG_GETCHAIN)),
        dump_request(rules, _kind(NFT_MSG_GETRULE)),
    )


def _listed(read_object: Callable[[bytes], _Object]) -> Callable[[bytes], _Object | None]:
    """Reads one entry of a list; None for those of other families than inet."""

    def one(payload: bytes) -> _Object | None:
        if payload[0] != NFPROTO_INET:
            return None
        # nfgenmsg: family, version, resource id; the last counts the namespace's transactions.
        return read_object(payload[:2] + b"\0\0" + payload[4:])

    return one


def _of_table(name: str, found: Iterable[_Object | None]) -> list[_Object]:
    return [each for each in found if each is not None and each.table == name]


def compare(name: str, want: Listing, found: Listing | None) -> list[str]:
    """What differs between the table wanted and the one found, one sentence each; empty where they are equal."""
    if found is None:
        return [f"table inet {name} is missing"]
    differences = []
    for chain, lines in want.chains.items():
        held = found.chains.get(chain)
        if held is None:
            differences.append(f"chain {name}/{chain} is missing")
            continue
        if held[0] != lines[0]:
            differences.append(f"chain {name}/{chain} is {held[0]}, should be {lines[0]}")
        for number in range(1, max(len(lines), len(held))):
            differences.extend(_rule_difference(f"{name}/{chain}", number, lines, held))
    for each in want.sets.keys() | found.sets.keys():
        wanted_text, held_text = want.sets.get(each), found.sets.get(each)
        if held_text is None:
            differences.append(f"set {name}/{each} is missing")
        elif wanted_text is None:
            differences.append(f"set {name}/{each} is not ours")
        elif wanted_text != held_text:
            differences.append(f"set {name}/{each} is {held_text}, should be {wanted_text}")
    differences.extend(
        f"chain {name}/{chain} is not ours" for chain in found.chains if chain not in want.chains
    )
    return differences


def _rule_difference(chain: str, number: int, lines: tuple[str, ...], held: tuple[str, ...]) -> list[str]:
    if number >= len(held):
        return [f"rule {number} of {chain} is missing: {lines[number]}"]
    if number >= len(lines):
        return [f"rule {number} of {chain} is not ours: {held[number]}"]
    if lines[number] != held[number]:
        return [f"rule {number} of {chain} is {held[number]}, should be {lines[number]}"]
    return []
