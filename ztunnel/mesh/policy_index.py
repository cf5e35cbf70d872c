"""The answers of `policy.decide`, fast: which of many rules match a connection is looked up, not tried.

Rule: the answer, and the policy and rule that it names, are those of `decide`; a property test holds it to that.

A connection is turned once into the set of atoms that it meets (policy_atoms.py); then rules are set operations. A rule
that can match only if one of certain atoms is met (nearly all: they name who may) is filed under those, and only the
rules filed under the atoms met are tried. Rules that only exclude (`notPorts`) are kept as bits of one integer, and
those that an atom met excludes are taken out together.

10,000 policies of 10 rules each: 3 to 12 us a decision, 40 us where all rules do nothing but exclude, and 200 us to put
a policy in (`python -m perf policy` measures it).
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from operator import attrgetter
from typing import Final

import msgspec

from ztunnel.mesh.policy import (
    ALLOWED,
    NO_CONDITION,
    NOT_ALLOWED,
    Action,
    Authorization,
    Connection,
    Match,
    Rule,
    Verdict,
)
from ztunnel.mesh.policy_atoms import Atom, Atoms, Clauses, Condition

_CHUNK: Final = 2048  # rules at most that only exclude and are looked at together
_MANY: Final = 8  # rules under one atom, beyond which they are filed under a second one
_NO_OTHER: Final = -1  # no atom
_ANY: Final = (_NO_OTHER,)
_FIRST: Final = (-1, "", -1)  # before every rule
_UNSPECIFIC: Final = 1000  # rules that an atom is taken to have that nearly every connection meets


class _Rule(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One rule. There are very many: what the collector does not look at costs it no time (200 ms of 100,000).

    `order` says which of several that match is named: by scope, policy, and place in the policy. `keys` are the atoms
    that it is filed under, none if it can match where no atom is met.
    """

    order: tuple[int, str, int]
    clauses: Clauses
    keys: tuple[Atom, ...]

    def others(self, atom: Atom) -> tuple[Atom, ...]:
        """Atoms of which one is met, beside `atom`, whenever the rule matches by it; () if there are none."""
        own: Clauses = ()
        for clause in self.clauses:
            if all(wanted for wanted, _ in clause):
                if any(atom in atoms for wanted, _ in clause for atoms in wanted):
                    own = (*own, clause)
                else:
                    return tuple(dict.fromkeys(one for wanted, _ in clause for one in wanted[0]))
        for clause in own:
            found: tuple[Atom, ...] = ()
            for wanted, _ in clause:
                for atoms in wanted:
                    if atom not in atoms:
                        found += atoms
                        break
                else:
                    break
            else:
                return tuple(dict.fromkeys(found))
        return ()

    def holds(self, met: set[Atom]) -> bool:
        """Whether a connection that meets these atoms matches."""
        apart = met.isdisjoint
        for clause in self.clauses:
            for wanted, unwanted in clause:
                if unwanted and not apart(unwanted):
                    continue
                for atoms in wanted:
                    if apart(atoms):
                        break
                else:
                    break
            else:
                return False
        return True


_order = attrgetter("order")


class _Filed(msgspec.Struct, eq=False, gc=False):
    """The rules that are filed under one atom, in order; once they are many, by a second atom where they have one."""

    count: int = 0
    few: tuple[_Rule, ...] = ()
    second: dict[Atom, list[_Rule]] | None = None

    def put(self, rule: _Rule, atom: Atom) -> None:
        self.count += 1
        if self.second is not None:
            self._put_second(rule, atom, self.second)
        elif self.count <= _MANY:
            self.few = tuple(sorted((*self.few, rule), key=_order))
        else:
            self.second = {}
            for one in (*self.few, rule):
                self._put_second(one, atom, self.second)
            self.few = ()

    def _put_second(self, rule: _Rule, atom: Atom, second: dict[Atom, list[_Rule]]) -> None:
        for other in rule.others(atom) or _ANY:
            insort(second.setdefault(other, []), rule, key=_order)

    def drop(self, rule: _Rule, atom: Atom) -> None:
        self.count -= 1
        second = self.second
        if second is None:
            self.few = tuple([one for one in self.few if one is not rule])
            return
        for other in rule.others(atom) or _ANY:
            rules = second[other]
            del rules[bisect_left(rules, rule.order, key=_order)]
            if not rules:
                del second[other]

    @staticmethod
    def find(second: dict[Atom, list[_Rule]], met: set[Atom], lists: list[Sequence[_Rule]]) -> None:
        """Add the lists of rules that a connection may match that meets these atoms."""
        lists += [second[other] for other in second.keys() & met]
        if _NO_OTHER in second:
            lists.append(second[_NO_OTHER])


class _Rules:
    """The rules of policies with the same action."""

    def __init__(self, atoms: Atoms, action: Action) -> None:
        self.policies: dict[str, tuple[_Rule, ...]] = {}
        """By key; also of policies that can never match."""
        self._atoms = atoms
        self._action = action
        self._filed: dict[Atom, _Filed] = {}
        self._chunks: list[_Chunk] = []  # the rules that are not filed, in order

    def put(self, policy: Authorization) -> None:
        """Add a policy, which must not be there."""
        key = policy.key
        rules: list[_Rule] = []
        for index, rule in enumerate(policy.rules):
            clauses = self._compile(rule)
            if clauses is None:
                continue
            made = _Rule((int(policy.scope), key, index), clauses, self._keys(clauses))
            rules.append(made)
            if made.keys:
                for atom in made.keys:
                    filed = self._filed.get(atom)
                    if filed is None:
                        filed = self._filed[atom] = _Filed()
                    filed.put(made, atom)
            else:
                self._put_open(made)
        self.policies[key] = tuple(rules)

    def _put_open(self, rule: _Rule) -> None:
        chunks = self._chunks
        if not chunks:
            chunks.append(_Chunk([]))
        number = self._chunk(rule)
        chunk = chunks[number]
        insort(chunk.rules, rule, key=_order)
        chunk.changed()
        if len(chunk.rules) > _CHUNK:
            half = len(chunk.rules) // 2
            chunks[number : number + 1] = [_Chunk(chunk.rules[:half]), _Chunk(chunk.rules[half:])]

    def _chunk(self, rule: _Rule) -> int:
        """The chunk that a rule belongs in."""
        return max(bisect_right(self._chunks, rule.order, key=_Chunk.begin) - 1, 0)

    def drop(self, key: str) -> None:
        """Forget a policy, if it is there."""
        for rule in self.policies.pop(key, ()):
            for atom in rule.keys:
                filed = self._filed[atom]
                filed.drop(rule, atom)
                if not filed.count:
                    del self._filed[atom]
            if not rule.keys:
                number = self._chunk(rule)
                chunk = self._chunks[number]
                del chunk.rules[bisect_left(chunk.rules, rule.order, key=_order)]
                chunk.changed()
                if not chunk.rules:
                    del self._chunks[number]
            self._atoms.release(rule.clauses)

    def first(self, met: set[Atom]) -> _Rule | None:
        """The first rule, in order, that a connection matches that meets these atoms."""
        best: _Rule | None = None
        for chunk in self._chunks:
            best = chunk.first(met)
            if best is not None:
                break
        filed = self._filed
        lists: list[Sequence[_Rule]] = []
        for atom in met:
            found = filed.get(atom)
            if found is not None:
                if found.second is None:
                    lists.append(found.few)
                else:
                    found.find(found.second, met, lists)
        for rules in lists:
            for rule in rules:
                if best is not None and rule.order >= best.order:
                    break
                if rule.holds(met):
                    best = rule
                    break
        return best

    def _compile(self, rule: Rule) -> Clauses | None:
        """The rule's clauses; those that are met by everything are left out. None: the rule never matches."""
        deny = self._action is Action.DENY
        clauses: list[tuple[Condition, ...]] = []
        kept: list[tuple[Match, ...]] = []
        for clause in rule.clauses:
            matches = tuple(match for match in clause.matches if match != NO_CONDITION)
            if not clause.matches or (deny and len(matches) < len(clause.matches)):
                continue
            if not matches:
                return None
            kept.append(matches)
        for matches in kept:
            clauses.append(tuple([self._atoms.condition(match) for match in matches]))
        return tuple(clauses)

    def _keys(self, clauses: Clauses) -> tuple[Atom, ...]:
        """Atoms of which one is met whenever the rule matches, those with the fewest rules; () if there are none."""
        best: tuple[Atom, ...] = ()
        fewest = -1
        for clause in clauses:
            keys: tuple[Atom, ...] = ()
            most = 0
            for wanted, _ in clause:
                if not wanted:
                    break
                crowds = [self._crowd(atoms) for atoms in wanted]
                crowd = min(crowds)
                keys += wanted[crowds.index(crowd)]
                most = max(most, crowd)
            else:
                if fewest < 0 or most < fewest:
                    best, fewest = tuple(dict.fromkeys(keys)), most
        return best

    def _crowd(self, atoms: tuple[Atom, ...]) -> int:
        common = self._atoms.common
        crowds = []
        for atom in atoms:
            filed = self._filed.get(atom)
            crowds.append((filed.count if filed is not None else 0) + _UNSPECIFIC * (atom in common))
        return max(crowds)


class _Chunk:
    """Some of the rules that match unless an atom excludes them, in order."""

    __slots__ = ("_excluded", "rules")

    def __init__(self, rules: list[_Rule]) -> None:
        self.rules = rules
        self._excluded: dict[Atom, int] | None = None  # which rules an atom excludes, as bits

    def begin(self) -> tuple[int, str, int]:
        """The order of the first rule."""
        return self.rules[0].order if self.rules else _FIRST

    def changed(self) -> None:
        """Other rules are in it now."""
        self._excluded = None

    def first(self, met: set[Atom]) -> _Rule | None:
        """The first rule that a connection matches that meets these atoms."""
        excluded = self._excluded
        if excluded is None:
            excluded = self._excluded = self._make()
        left = (1 << len(self.rules)) - 1
        for atom in met:
            bits = excluded.get(atom)
            if bits is not None:
                left &= ~bits
        while left:
            lowest = left & -left
            rule = self.rules[lowest.bit_length() - 1]
            if rule.holds(met):
                return rule
            left ^= lowest
        return None

    def _make(self) -> dict[Atom, int]:
        excluded: dict[Atom, int] = {}
        for position, rule in enumerate(self.rules):
            for clause in rule.clauses:
                if len(clause) == 1:
                    for atom in clause[0][1]:
                        excluded[atom] = excluded.get(atom, 0) | 1 << position
        return excluded


class PolicyIndex:
    """Policies that concern the same workloads. Those of several indexes may concern one: `judge` asks them all."""

    def __init__(self, atoms: Atoms) -> None:
        """`atoms` are shared by all indexes that `judge` will be asked about together."""
        self.atoms = atoms
        self._deny, self._allow = _Rules(atoms, Action.DENY), _Rules(atoms, Action.ALLOW)
        self._dry_deny, self._dry_allow = _Rules(atoms, Action.DENY), _Rules(atoms, Action.ALLOW)

    def __len__(self) -> int:
        return sum(len(rules.policies) for rules in self._all())

    def put(self, policy: Authorization) -> None:
        """Add a policy or replace the one of its name."""
        self.drop(policy.key)
        if policy.action is Action.DENY:
            (self._dry_deny if policy.dry_run else self._deny).put(policy)
        else:
            (self._dry_allow if policy.dry_run else self._allow).put(policy)

    def drop(self, key: str) -> None:
        """Forget the policy of this name, if it is known."""
        for rules in self._all():
            rules.drop(key)

    def names(self) -> list[str]:
        """The names of the policies."""
        return [key for rules in self._all() for key in rules.policies]

    @property
    def dry_run(self) -> bool:
        """Whether there are dry-run policies."""
        return bool(self._dry_deny.policies or self._dry_allow.policies)

    def enforced(self) -> tuple[_Rules, _Rules]:
        """DENY and ALLOW policies."""
        return self._deny, self._allow

    def rehearsed(self) -> tuple[_Rules, _Rules]:
        """DENY and ALLOW policies that are dry runs."""
        return self._dry_deny, self._dry_allow

    def _all(self) -> tuple[_Rules, ...]:
        return self._deny, self._allow, self._dry_deny, self._dry_allow


def judge(indexes: Sequence[PolicyIndex], connection: Connection) -> tuple[Verdict, Verdict | None]:
    """The verdict of the policies of some indexes, and what it would be if their dry-run policies were enforced
    (None: there are none)."""
    if not any(indexes):
        return ALLOWED, None
    met = indexes[0].atoms.met(connection)
    enforced = [index.enforced() for index in indexes]
    verdict = _verdict(enforced, met)
    if not any(index.dry_run for index in indexes):
        return verdict, None
    return verdict, _verdict(enforced + [index.rehearsed() for index in indexes], met)


def _verdict(parts: Sequence[tuple[_Rules, _Rules]], met: set[Atom]) -> Verdict:
    denied = _first([deny for deny, _ in parts], met)
    if denied is not None:
        return Verdict(False, denied[1], denied[2])
    allowing = [allow for _, allow in parts if allow.policies]
    if not allowing:
        return ALLOWED
    allowed = _first(allowing, met)
    return NOT_ALLOWED if allowed is None else Verdict(True, allowed[1], allowed[2])


def _first(parts: Sequence[_Rules], met: set[Atom]) -> tuple[int, str, int] | None:
    best = None
    for rules in parts:
        if rules.policies:
            found = rules.first(met)
            if found is not None and (best is None or found.order < best):
                best = found.order
    return best
