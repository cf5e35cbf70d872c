"""The redirection of one pod's network namespace: which rules, put in, checked, drained and taken out.

The decisions are those of Istio's ambient mode, so that any ztunnel can live behind them; the rules as data are
pure (`table`), and the functions below apply them to a namespace given as an open descriptor. They block (measured:
2 ms to apply in a new namespace, half a millisecond to find that all is right, 20 ms to drain or replace, most of it in
the kernel, which waits until all cores have seen what goes): call them from a thread.
"""

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from cni import nftables as nft
from cni import routes, ruleset
from cni.nftables import Chain, IpNetwork, Rule, Set, Table

PROBE_SOURCES = (
    ipaddress.ip_address("169.254.7.127"),
    ipaddress.ip_address("fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
)
DNS_PORT = 53
DNS_ZONE = 1
IP_VERSIONS = (4, 6)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the rules of one pod depend on. Marks are compared under `mask`; ports are those ztunnel listens on.

    `exclude_*` and `include_ranges` (None: all) are the pod's own exceptions, ranges collapsed (see capture).
    """

    mark: int = 0x539
    return_mark: int = 0x111
    mask: int = 0xFFF
    outbound_port: int = 15001
    inbound_port: int = 15006
    hbone_port: int = 15008
    dns_port: int = 15053
    dns_capture: bool = False
    capture_inbound: bool = True
    exclude_ranges: tuple[IpNetwork, ...] = ()
    include_ranges: tuple[IpNetwork, ...] | None = None
    exclude_ports: tuple[int, ...] = ()
    exclude_inbound_ports: tuple[int, ...] = ()
    table: str = "ambient"


class State(Enum):
    """How far a namespace is into the mesh, as its kernel tells."""

    ABSENT = "absent"
    REDIRECTED = "redirected"
    DRAINED = "drained"
    DIFFERENT = "different"


@lru_cache(maxsize=64)
def table(settings: Settings, *, drained: bool = False) -> Table:
    """The table for these settings; `drained`: without its redirections, everything else as it was.

    A redirection is taken for the first packet of a connection only: where conntrack starts in a namespace whose
    connections are already open, their next packets look new to it and would be redirected in mid-stream.
    """
    chains = [
        Chain("prerouting", "nat", nft.PREROUTING, nft.DSTNAT, _inbound(settings)),
        Chain("output", "nat", nft.OUTPUT, nft.DSTNAT, _outbound(settings)),
        Chain("mangle_prerouting", "filter", nft.PREROUTING, nft.MANGLE, _remember(settings)),
        Chain("mangle_output", "route", nft.OUTPUT, nft.MANGLE, _restore(settings)),
    ]
    if settings.dns_capture:
        chains.append(Chain("raw_prerouting", "filter", nft.PREROUTING, nft.RAW, _answers_zone(settings)))
        chains.append(Chain("raw_output", "filter", nft.OUTPUT, nft.RAW, _queries_zone(settings)))
    if drained:
        chains = [
            chain._replace(rules=tuple(rule for rule in chain.rules if not nft.redirects(rule)))
            for chain in chains
        ]
    return Table(settings.table, tuple(chains), tuple(_sets(settings)))


# Names of the sets, as `nft` lists them.
EXCLUDED_PORTS = "excluded_ports"
EXCLUDED_INBOUND_PORTS = "excluded_inbound_ports"


def _excluded(version: int) -> str:
    return f"excluded_ranges_ipv{version}"


def _included(version: int) -> str:
    return f"included_ranges_ipv{version}"


def _of_version(networks: Iterable[IpNetwork] | None, version: int) -> list[IpNetwork]:
    return [network for network in networks or () if network.version == version]


def _sets(settings: Settings) -> Iterator[Set]:
    """The sets that the exceptions need: none that would be empty."""
    if settings.capture_inbound and settings.exclude_inbound_ports:
        yield nft.port_set(EXCLUDED_INBOUND_PORTS, settings.exclude_inbound_ports)
    if settings.exclude_ports:
        yield nft.port_set(EXCLUDED_PORTS, settings.exclude_ports)
    for version in IP_VERSIONS:
        if excluded := _of_version(settings.exclude_ranges, version):
            yield nft.range_set(_excluded(version), version, excluded)
        if included := _of_version(settings.include_ranges, version):
            yield nft.range_set(_included(version), version, included)


def _not_proxy(settings: Settings) -> list[nft.Expression]:
    return nft.packet_mark(settings.mark, settings.mask, equal=False)


def _inbound(settings: Settings) -> tuple[Rule, ...]:
    tcp = nft.protocol(nft.TCP)
    rules = [
        nft.rule(f"health probes, IPv{probe.version}", tcp, nft.source(probe), nft.accept())
        for probe in PROBE_SOURCES
    ]
    if settings.capture_inbound:
        if settings.exclude_inbound_ports:
            rules.append(
                nft.rule(
                    "excluded inbound ports",
                    tcp,
                    nft.destination_port_in(EXCLUDED_INBOUND_PORTS),
                    nft.first_packet(),
                    nft.accept(),
                )
            )
        rules += [
            nft.rule(
                f"inbound, IPv{version}",
                tcp,
                nft.not_to_loopback(version),
                nft.destination_port(settings.hbone_port, equal=False),
                _not_proxy(settings),
                nft.first_packet(),
                nft.redirect(settings.inbound_port),
            )
            for version in IP_VERSIONS
        ]
    return tuple(rules)


def _outbound(settings: Settings) -> tuple[Rule, ...]:
    tcp = nft.protocol(nft.TCP)
    rules = [
        nft.rule(f"answers to health probes, IPv{probe.version}", tcp, nft.destination(probe), nft.accept())
        for probe in PROBE_SOURCES
    ]
    if settings.exclude_ports:
        rules.append(
            nft.rule(
                "excluded ports",
                tcp,
                nft.destination_port_in(EXCLUDED_PORTS),
                nft.first_packet(),
                nft.accept(),
            )
        )
    if settings.dns_capture:
        rules.append(
            nft.rule(
                "DNS over UDP",
                nft.protocol(nft.UDP),
                nft.destination_port(DNS_PORT),
                nft.leaves_by("lo", equal=False),
                _not_proxy(settings),
                nft.redirect(settings.dns_port),
            )
        )
        rules += [
            nft.rule(
                f"DNS over TCP, IPv{version}",
                tcp,
                nft.destination_port(DNS_PORT),
                nft.not_to_loopback(version),
                _not_proxy(settings),
                nft.first_packet(),
                nft.redirect(settings.dns_port),
            )
            for version in IP_VERSIONS
        ]
    rules.append(
        nft.rule(
            "answers on connections of the proxy",
            tcp,
            nft.packet_mark(settings.return_mark, settings.mask),
            nft.accept(),
        )
    )
    rules += [
        nft.rule(
            f"the pod to itself, IPv{version}",
            nft.leaves_by("lo"),
            nft.not_to_loopback(version),
            nft.accept(),
        )
        for version in IP_VERSIONS
    ]
    rules += [
        nft.rule(
            f"excluded ranges, IPv{version}",
            tcp,
            nft.destination_in(_excluded(version), version),
            nft.first_packet(),
            nft.accept(),
        )
        for version in IP_VERSIONS
        if _of_version(settings.exclude_ranges, version)
    ]
    rules += [
        nft.rule(
            f"outbound, IPv{version}",
            tcp,
            nft.not_to_loopback(version),
            _not_proxy(settings),
            [] if settings.include_ranges is None else nft.destination_in(_included(version), version),
            nft.first_packet(),
            nft.redirect(settings.outbound_port),
        )
        for version in IP_VERSIONS
        if settings.include_ranges is None or _of_version(settings.include_ranges, version)
    ]
    return tuple(rules)


def _remember(settings: Settings) -> tuple[Rule, ...]:
    return (
        nft.rule(
            "connections of the proxy",
            nft.packet_mark(settings.mark, settings.mask),
            nft.set_connection_mark(settings.return_mark, settings.mask),
        ),
    )


def _restore(settings: Settings) -> tuple[Rule, ...]:
    # A packet whose mark changes is routed again. The proxy's own need no other route than the one they have, and
    # to spare them the second look saves 5 % of the processor time that a request or a byte costs both proxies.
    return (
        nft.rule(
            "back to the proxy",
            _not_proxy(settings),
            nft.connection_mark(settings.return_mark, settings.mask),
            nft.restore_mark(),
        ),
    )


def _queries_zone(settings: Settings) -> tuple[Rule, ...]:
    return (
        nft.rule(
            "DNS queries of the proxy",
            nft.protocol(nft.UDP),
            nft.packet_mark(settings.mark, settings.mask),
            nft.destination_port(DNS_PORT),
            nft.set_zone(DNS_ZONE),
        ),
    )


def _answers_zone(settings: Settings) -> tuple[Rule, ...]:
    return (
        nft.rule(
            "DNS answers to the proxy",
            nft.protocol(nft.UDP),
            _not_proxy(settings),
            nft.source_port(DNS_PORT),
            nft.set_zone(DNS_ZONE),
        ),
    )


@lru_cache(maxsize=64)
def _batch(settings: Settings, *, drained: bool) -> ruleset.Batch:
    # pyroute2 takes about 20 ms to encode a table, and more to decode one; pods share a handful of settings.
    return ruleset.replacement(table(settings, drained=drained))


@lru_cache(maxsize=64)
def _first_batch(settings: Settings) -> ruleset.Batch:
    return ruleset.creation(table(settings))


@lru_cache(maxsize=64)
def _wanted(settings: Settings, *, drained: bool) -> ruleset.Listing:
    return ruleset.wanted(table(settings, drained=drained))


def prepare(settings: Settings) -> None:
    """Do what is done once for all pods of these settings before the first of them waits for it. Blocks (0.2 s)."""
    _first_batch(settings)
    for drained in (False, True):
        _batch(settings, drained=drained)
        _wanted(settings, drained=drained)


def _routing(settings: Settings) -> routes.ReturnPath:
    return routes.ReturnPath(mark=settings.return_mark, mask=settings.mask)


def verify(namespace: int, settings: Settings, *, drained: bool = False) -> list[str]:
    """What the kernel holds in this namespace that is not as wanted: one sentence each, empty if all is right.

    Raises RulesetError or RoutesError where the kernel will not tell.
    """
    with ruleset.open_nftables(namespace) as nftables:
        found = ruleset.read(nftables, settings.table)
    differences = ruleset.compare(settings.table, _wanted(settings, drained=drained), found)
    return differences + routes.verify(namespace, _routing(settings))


def state(namespace: int, settings: Settings) -> State:
    """How far the namespace is into the mesh. Raises as `verify`; a kernel without nftables has nothing to tell."""
    try:
        with ruleset.open_nftables(namespace) as nftables:
            found = ruleset.read(nftables, settings.table)
    except ruleset.NoNftablesError:
        found = None
    missing = routes.verify(namespace, _routing(settings))
    if found is None:
        return State.DIFFERENT if routes.present(namespace, _routing(settings)) else State.ABSENT
    for drained, name in ((False, State.REDIRECTED), (True, State.DRAINED)):
        if not missing and not ruleset.compare(settings.table, _wanted(settings, drained=drained), found):
            return name
    return State.DIFFERENT


def apply(namespace: int, settings: Settings) -> list[str]:
    """Bring the namespace's redirection to these settings and check it; what was different before.

    Nothing is touched where all is right (an empty list), so open connections are never disturbed by a second
    application; and where the table is replaced, the connections already redirected stay translated. The way
    back for the proxy's connections (`routes`) is there before the first redirection. Raises RulesetError or
    RoutesError; the table is then as it was before.
    """
    return _bring(namespace, settings, drained=False)


def drain(namespace: int, settings: Settings) -> list[str]:
    """Take the redirections out and leave the rest, as connections that were redirected need it to their end.

    The kernel stops translating a namespace's connections when its last nat chain goes. Returns what was
    different before; raises as `apply`.
    """
    return _bring(namespace, settings, drained=True)


def _bring(namespace: int, settings: Settings, *, drained: bool) -> list[str]:
    routing = _routing(settings)
    differences = routes.verify(namespace, routing)
    if differences:
        routes.ensure(namespace, routing)
    with ruleset.open_nftables(namespace) as nftables:
        want = _wanted(settings, drained=drained)
        found = ruleset.read(nftables, settings.table)
        wrong = ruleset.compare(settings.table, want, found)
        if wrong:
            fresh = found is None and not drained
            ruleset.commit(nftables, _first_batch(settings) if fresh else _batch(settings, drained=drained))
            left = ruleset.compare(settings.table, want, ruleset.read(nftables, settings.table))
            if left:
                raise ruleset.RulesetError(
                    f"nftables: the kernel took table inet {settings.table} and shows another: {'; '.join(left)}; "
                    "is another program changing the pod's rules?"
                )
    return differences + wrong


def remove(namespace: int, settings: Settings) -> None:
    """Take out everything that `apply` put in. Raises RulesetError or RoutesError; nothing there is no error."""
    with ruleset.open_nftables(namespace) as nftables:
        if ruleset.read(nftables, settings.table) is not None:
            ruleset.commit(nftables, ruleset.removal(settings.table))
    routes.remove(namespace, _routing(settings))
