"""`python -m perf policy`: what a policy decision costs, among 10,000 policies of 10 rules each. Needs no root."""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from rich.console import Console
from rich.table import Table

from ztunnel.identity.spiffe import SpiffeId
from ztunnel.mesh.policy import (
    Action,
    Authorization,
    Cidr,
    Clause,
    Connection,
    Match,
    MatchKind,
    PolicyScope,
    Rule,
    StringMatch,
)
from ztunnel.mesh.policy_atoms import Atoms
from ztunnel.mesh.policy_index import PolicyIndex, judge

POLICIES: Final = 10_000
RULES: Final = 10
CONNECTIONS: Final = 5_000
REQUIRED, WANTED = 100.0, 10.0  # us a decision
NARROWEST: Final = 100  # columns

NAMESPACES: Final = 2_000
ACCOUNTS: Final = 20
PORTS: Final = (80, 443, 8080, 9090)


@dataclass(frozen=True)
class Measured:
    """One kind of policies. Times in us, memory in MiB."""

    kind: str
    mean: float
    p99: float
    change: float  # of one policy, and the first decision after it
    build: float  # seconds for all
    memory: float
    allowed: float  # part of the connections


def main(arguments: Sequence[str]) -> int:
    """Measure and report; exit code 1 if a kind takes longer than what is required."""
    parser = argparse.ArgumentParser(prog="python -m perf policy", description=__doc__)
    parser.add_argument("--policies", type=int, default=POLICIES, help=f"how many [{POLICIES}]")
    parser.add_argument("--rules", type=int, default=RULES, help=f"of each [{RULES}]")
    given = parser.parse_args(arguments)
    console = Console()
    console.width = max(console.width, NARROWEST)
    found = []
    for kind in KINDS:
        with console.status(f"policies by {kind}"):
            found.append(measure(kind, given.policies, given.rules))
    show(console, found, given.policies, given.rules)
    return 1 if any(one.mean > REQUIRED for one in found) else 0


def measure(kind: str, policies: int = POLICIES, rules: int = RULES) -> Measured:
    """Decide about connections that differ all, by policies for the whole mesh, half of them DENY."""
    random = Random(kind)  # noqa: S311 - the same ones in each run
    made = [
        Authorization(
            name=f"policy-{number}",
            namespace=f"ns-{number % NAMESPACES}",
            scope=PolicyScope.GLOBAL,
            action=Action(number % 2),
            rules=tuple(KINDS[kind](random) for _ in range(rules)),
        )
        for number in range(policies)
    ]
    connections = [_connection(random) for _ in range(CONNECTIONS)]
    gc.collect()
    before = _pss()
    began = time.process_time()
    index = PolicyIndex(Atoms())
    for policy in made:
        index.put(policy)
    build = time.process_time() - began
    judge([index], connections[0])  # what is made at the first decision
    gc.collect()
    memory = _pss() - before
    began = time.process_time()
    allowed = sum(judge([index], connection)[0].allowed for connection in connections)
    mean = (time.process_time() - began) / len(connections)
    taken = []
    for connection in connections:
        began = time.thread_time()
        judge([index], connection)
        taken.append(time.thread_time() - began)
    taken.sort()
    changes = []
    for policy in made[: len(made) // 20 + 1]:
        began = time.thread_time()
        index.put(policy)
        judge([index], connections[0])
        changes.append(time.thread_time() - began)
    changes.sort()
    us = 1e6
    return Measured(
        kind=kind,
        mean=mean * us,
        p99=taken[len(taken) * 99 // 100] * us,
        change=changes[len(changes) // 2] * us,
        build=build,
        memory=memory,
        allowed=allowed / len(connections),
    )


def show(console: Console, found: Sequence[Measured], policies: int, rules: int) -> None:
    """The table, and the budget."""
    table = Table(
        title=f"decisions among {policies:,} policies of {rules} rules, CPU time", title_justify="left"
    )
    table.add_column("rules that name")
    for name in ("mean us", "p99 us", "one changed, us", "all built, s", "memory MiB", "allowed"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            one.kind, f"{one.mean:.1f}", f"{one.p99:.1f}", f"{one.change:.0f}", f"{one.build:.2f}",
            f"{one.memory:.0f}", f"{one.allowed:.0%}",
        )  # fmt: skip
    console.print(table)
    worst = max(found, key=lambda one: one.mean)
    console.print(
        f"budget: {worst.mean:.1f} us at worst ({worst.kind}), required ≤ {REQUIRED:.0f}: "
        f"{'met' if worst.mean <= REQUIRED else 'NOT MET'}; wanted ≤ {WANTED:.0f}: met by "
        f"{', '.join(one.kind for one in found if one.mean <= WANTED) or 'none'}",
        soft_wrap=True,
    )


def _exact(value: str) -> StringMatch:
    return StringMatch(MatchKind.EXACT, value)


def _namespace(random: Random) -> str:
    return f"ns-{random.randrange(NAMESPACES)}"


def _principal(random: Random) -> str:
    return f"cluster.local/ns/{_namespace(random)}/sa/sa-{random.randrange(ACCOUNTS)}"


def _rule(*matches: Match) -> Rule:
    return Rule(tuple(Clause((match,)) for match in matches))


def _to(random: Random) -> Match:
    return Match(destination_ports=tuple(random.sample(PORTS, 2)))


def _principals(random: Random) -> Rule:
    return _rule(Match(principals=tuple(_exact(_principal(random)) for _ in range(3))), _to(random))


def _prefixes(random: Random) -> Rule:
    prefix = StringMatch(MatchKind.PREFIX, f"cluster.local/ns/{_namespace(random)}/sa/")
    return _rule(Match(principals=(prefix,)), _to(random))


def _namespaces(random: Random) -> Rule:
    return _rule(Match(namespaces=(_exact(_namespace(random)),)), _to(random))


def _blocks(random: Random) -> Rule:
    address = bytes((10, random.randrange(256), random.randrange(256), 0))
    return _rule(Match(source_ips=(Cidr.of(address, random.choice((16, 20, 24, 28))),)), _to(random))


def _ports(random: Random) -> Rule:
    return _rule(Match(destination_ports=(random.randrange(1, 65536),)))


def _exclusions(random: Random) -> Rule:
    excluded = Match(
        not_namespaces=(_exact(_namespace(random)), _exact("ns-1")),
        not_destination_ports=(*PORTS, random.randrange(1, 65536)),
    )
    return _rule(excluded)


def _mixed(random: Random) -> Rule:
    """As meshes have them: mostly who may, here and there who may not."""
    weights = (40, 10, 30, 12, 6, 2)
    (kind,) = random.choices((_principals, _prefixes, _namespaces, _blocks, _ports, _exclusions), weights)
    return kind(random)


KINDS: Final[dict[str, Callable[[Random], Rule]]] = {
    "principals": _principals,
    "prefixes": _prefixes,
    "namespaces": _namespaces,
    "addresses": _blocks,
    "ports": _ports,
    "a mix of all": _mixed,
    "exclusions only": _exclusions,
}


def _connection(random: Random) -> Connection:
    identity = SpiffeId("cluster.local", _namespace(random), f"sa-{random.randrange(ACCOUNTS)}")
    source = bytes((10, random.randrange(256), random.randrange(256), random.randrange(256)))
    return Connection.of(str(identity), source, bytes((10, 0, 0, 1)), random.choice((*PORTS, 7777)))


def _pss() -> float:
    """MiB of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise OSError("the kernel does not tell the size of a process")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
