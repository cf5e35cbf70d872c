"""What rules compare with, as numbers, and which of them a connection meets.

Every value that some rule compares something with (a principal, a prefix, a block of addresses, a port) is an atom. The
atoms that a connection meets are found by look-ups in dictionaries, whose number does not depend on that of the rules.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from ztunnel.mesh.policy import Cidr, Connection, Match, MatchKind, ServiceAccount, StringMatch

Atom = int
Condition = tuple[tuple[tuple[Atom, ...], ...], tuple[Atom, ...]]
"""A match: of each of the first tuples some atom is met, and of the last none."""
Clauses = tuple[tuple[Condition, ...], ...]


class Atoms:
    """All values that rules compare with, each with a number for as long as some rule has it."""

    def __init__(self) -> None:
        self._namespaces = _Texts()
        self._principals = _Texts()
        self._accounts: dict[ServiceAccount, Atom] = {}
        self._sources = _Blocks()
        self._destinations = _Blocks()
        self._ports: dict[int, Atom] = {}
        self._users: list[int] = []  # of each atom
        self._tables: list[dict[Any, Atom]] = []  # where each atom is,
        self._values: list[object] = []  # and its key there
        self._free: list[Atom] = []
        self.common: set[Atom] = set()
        """Those that nearly every connection meets."""

    def __len__(self) -> int:
        return len(self._users) - len(self._free)

    def met(self, connection: Connection) -> set[Atom]:
        """The atoms that a connection meets."""
        principal, namespace, account, source, destination, port = connection
        atoms: list[Atom] = []
        if principal:
            self._principals.met(principal, atoms)
            self._namespaces.met(namespace, atoms)
            if self._accounts:
                atom = self._accounts.get(ServiceAccount(namespace, account))
                if atom is not None:
                    atoms.append(atom)
        self._sources.met(source, atoms)
        self._destinations.met(destination, atoms)
        atom = self._ports.get(port)
        if atom is not None:
            atoms.append(atom)
        return set(atoms)

    def condition(self, match: Match) -> Condition:
        """A match as atoms, which have one more user each. The first fields are the better ones to find it by."""
        wanted: list[tuple[Atom, ...]] = []
        unwanted: tuple[Atom, ...] = ()
        # Most are empty, and looking costs less than a call.
        if match.principals:
            wanted.append(self._patterns(self._principals, match.principals))
        if match.not_principals:
            unwanted += self._patterns(self._principals, match.not_principals)
        if match.service_accounts:
            wanted.append(self._plain(self._accounts, match.service_accounts))
        if match.not_service_accounts:
            unwanted += self._plain(self._accounts, match.not_service_accounts)
        if match.source_ips:
            wanted.append(self._blocks(self._sources, match.source_ips))
        if match.not_source_ips:
            unwanted += self._blocks(self._sources, match.not_source_ips)
        if match.namespaces:
            wanted.append(self._patterns(self._namespaces, match.namespaces))
        if match.not_namespaces:
            unwanted += self._patterns(self._namespaces, match.not_namespaces)
        if match.destination_ips:
            wanted.append(self._blocks(self._destinations, match.destination_ips))
        if match.not_destination_ips:
            unwanted += self._blocks(self._destinations, match.not_destination_ips)
        if match.destination_ports:
            wanted.append(self._plain(self._ports, match.destination_ports))
        if match.not_destination_ports:
            unwanted += self._plain(self._ports, match.not_destination_ports)
        return tuple(wanted), unwanted

    def release(self, clauses: Clauses) -> None:
        """These conditions are used no more."""
        users = self._users
        for atom in _atoms(clauses):
            users[atom] -= 1
            if not users[atom]:
                del self._tables[atom][self._values[atom]]
                self._values[atom] = None
                self.common.discard(atom)
                self._free.append(atom)

    def _patterns(self, table: "_Texts", values: Iterable[StringMatch]) -> tuple[Atom, ...]:
        return tuple([self._atom(*table.place(value), common=not value.value) for value in values])

    def _blocks(self, table: "_Blocks", values: Iterable[Cidr]) -> tuple[Atom, ...]:
        return tuple([self._atom(*table.place(value), common=not value.length) for value in values])

    def _plain(self, table: dict[Any, Atom], values: Iterable[object]) -> tuple[Atom, ...]:
        return tuple([self._atom(table, value) for value in values])

    def _atom(self, table: dict[Any, Atom], value: object, *, common: bool = False) -> Atom:
        atom = table.get(value)
        if atom is not None:
            self._users[atom] += 1
            return atom
        if self._free:
            atom = self._free.pop()
            self._users[atom] = 1
            self._tables[atom] = table
            self._values[atom] = value
        else:
            atom = len(self._users)
            self._users.append(1)
            self._tables.append(table)
            self._values.append(value)
        table[value] = atom
        if common:
            self.common.add(atom)
        return atom


class _Texts:
    """Patterns for a text: a table for each way of comparing, prefixes and suffixes by their length.

    Tables that became empty stay: there are no more of them than names have characters.
    """

    __slots__ = ("_exact", "_prefixes", "_presence", "_suffixes")

    def __init__(self) -> None:
        self._exact: dict[str, Atom] = {}
        self._prefixes: dict[int, dict[str, Atom]] = {}
        self._suffixes: dict[int, dict[str, Atom]] = {}
        self._presence: dict[str, Atom] = {}

    def place(self, pattern: StringMatch) -> tuple[dict[str, Atom], str]:
        """The table that a pattern belongs in, and its key there."""
        text = pattern.value
        match pattern.kind:
            case MatchKind.EXACT:
                return self._exact, text
            case MatchKind.PREFIX:
                return self._prefixes.setdefault(len(text), {}), text
            case MatchKind.SUFFIX:
                return self._suffixes.setdefault(len(text), {}), text
            case MatchKind.PRESENCE:
                return self._presence, text

    def met(self, text: str, atoms: list[Atom]) -> None:
        """Add the atoms that a text meets, which must not be empty."""
        atom = self._exact.get(text)
        if atom is not None:
            atoms.append(atom)
        for length, table in self._prefixes.items():
            atom = table.get(text[:length])
            if atom is not None:
                atoms.append(atom)
        size = len(text)
        for length, table in self._suffixes.items():
            if length <= size:
                atom = table.get(text[size - length :])
                if atom is not None:
                    atoms.append(atom)
        if self._presence:
            atoms.extend(self._presence.values())


class _Blocks:
    """Blocks of addresses: a table for each family and length, by the bits of the prefix."""

    __slots__ = ("_four", "_six")

    def __init__(self) -> None:
        self._four: dict[int, dict[int, Atom]] = {}  # by the number of bits that are not the prefix's
        self._six: dict[int, dict[int, Atom]] = {}

    def place(self, block: Cidr) -> tuple[dict[int, Atom], int]:
        """The table that a block belongs in, and its key there."""
        shift = 8 * len(block.address) - block.length
        tables = self._four if len(block.address) == 4 else self._six
        return tables.setdefault(shift, {}), int.from_bytes(block.address) >> shift

    def met(self, ip: bytes, atoms: list[Atom]) -> None:
        """Add the atoms of the blocks that a packed address is in."""
        tables = self._four if len(ip) == 4 else self._six
        if tables:
            number = int.from_bytes(ip)
            for shift, table in tables.items():
                atom = table.get(number >> shift)
                if atom is not None:
                    atoms.append(atom)


def _atoms(clauses: Clauses) -> Iterator[Atom]:
    for clause in clauses:
        for wanted, unwanted in clause:
            for atoms in wanted:
                yield from atoms
            yield from unwanted
