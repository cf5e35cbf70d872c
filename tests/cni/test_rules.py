"""The rules as the kernel holds them: read back over netlink, and as Debian's `nft` program reads them."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from cni import nftables as nft
from cni import routes, rules, ruleset
from cni.nftables import Chain, Table
from cni.routes import ReturnPath
from cni.rules import Settings, State
from tests.cni.conftest import open_descriptors
from ztunnel.inpod import netns

pytestmark = pytest.mark.e2e

PLAIN = Settings()
DNS = Settings(dns_capture=True)
PROXY, BACK = "meta mark & 0xfff", "ct mark & 0xfff"
FIRST = "tcp flags & fin|syn|rst|ack == syn"
PROBE4, PROBE6 = "169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"

# What nft says of the rules with everything on: chain, then conditions and action of each rule in order.
DECISIONS = {
    "prerouting nat prerouting -100": [
        f"l4proto == tcp, ip.saddr == {PROBE4}, accept",
        f"l4proto == tcp, ip6.saddr == {PROBE6}, accept",
        f"ip.daddr != 127.0.0.0/8, tcp.dport != 15008, {PROXY} != 0x539, {FIRST}, redirect 15006",
        f"ip6.daddr != ::1, tcp.dport != 15008, {PROXY} != 0x539, {FIRST}, redirect 15006",
    ],
    "output nat output -100": [
        f"l4proto == tcp, ip.daddr == {PROBE4}, accept",
        f"l4proto == tcp, ip6.daddr == {PROBE6}, accept",
        f"udp.dport == 53, oifname != lo, {PROXY} != 0x539, redirect 15053",
        f"tcp.dport == 53, ip.daddr != 127.0.0.0/8, {PROXY} != 0x539, {FIRST}, redirect 15053",
        f"tcp.dport == 53, ip6.daddr != ::1, {PROXY} != 0x539, {FIRST}, redirect 15053",
        f"l4proto == tcp, {PROXY} == 0x111, accept",
        "oifname == lo, ip.daddr != 127.0.0.0/8, accept",
        "oifname == lo, ip6.daddr != ::1, accept",
        f"ip.daddr != 127.0.0.0/8, {PROXY} != 0x539, {FIRST}, redirect 15001",
        f"ip6.daddr != ::1, {PROXY} != 0x539, {FIRST}, redirect 15001",
    ],
    # 0xfffff111 | 0x111 is how nft prints (mark & ~0xfff) ^ 0x111.
    "mangle_prerouting filter prerouting -150": [f"{PROXY} == 0x539, ct mark = ct mark & 0xfffff111 | 0x111"],
    "mangle_output route output -150": [f"{PROXY} != 0x539, {BACK} == 0x111, meta mark = ct mark"],
    "raw_prerouting filter prerouting -300": [f"{PROXY} != 0x539, udp.sport == 53, ct zone = 1"],
    "raw_output filter output -300": [f"{PROXY} == 0x539, udp.dport == 53, ct zone = 1"],
}


def without(decisions: dict[str, list[str]], *words: str) -> dict[str, list[str]]:
    """The decisions without those, and the chains, in which a word occurs."""
    return {
        chain: [rule for rule in found if not any(word in rule for word in words)]
        for chain, found in decisions.items()
        if not any(word in chain for word in words)
    }


def run(path: Path, *argv: str) -> str:
    return subprocess.run(
        ["nsenter", f"--net={path}", *argv], check=True, capture_output=True, text=True, timeout=30
    ).stdout


def text(value: Any) -> str:
    """One side of a match in nft's JSON as short text."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value) if value in (1, 53, 15008) else hex(value)
    if isinstance(value, list):
        return "|".join(text(each) for each in value)
    (kind, inner), *_ = value.items()
    if kind in ("&", "|"):
        return f"{text(inner[0])} {kind} {text(inner[1])}"
    if kind == "meta":
        key = inner["key"]
        return f"meta {key}" if key == "mark" else str(key)
    if kind == "ct":
        return f"ct {inner['key']}"
    if kind == "prefix":
        return f"{inner['addr']}/{inner['len']}"
    assert kind == "payload", value
    return f"tcp {inner['field']}" if inner["field"] == "flags" else f"{inner['protocol']}.{inner['field']}"


def statement(of: dict[str, Any]) -> str:
    (kind, inner), *_ = of.items()
    if kind == "match":
        # A test of single flags is "in" to nft; the mask is then on the left or, in older ones, written out.
        operator = "==" if inner["op"] == "in" else inner["op"]
        return f"{text(inner['left'])} {operator} {text(inner['right'])}"
    if kind == "mangle":
        return f"{text(inner['key'])} = {text(inner['value'])}"
    if kind == "redirect":
        return f"redirect {inner['port']}"
    assert kind == "accept", of
    return kind


def decisions(path: Path) -> dict[str, list[str]]:
    """The whole rule set of the namespace as nft reads it."""
    found: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for item in json.loads(run(path, "nft", "-j", "list", "ruleset"))["nftables"]:
        if chain := item.get("chain"):
            assert (chain["family"], chain["table"], chain["policy"]) == ("inet", "ambient", "accept")
            names[chain["name"]] = f"{chain['name']} {chain['type']} {chain['hook']} {chain['prio']}"
            found[names[chain["name"]]] = []
        elif rule := item.get("rule"):
            assert rule["comment"]
            found[names[rule["chain"]]].append(", ".join(map(statement, rule["expr"])))
    return found


def policy_routing(path: Path) -> list[str]:
    """The ip rules with a mark and the routes of their table, IPv4 then IPv6."""
    found = []
    for version in ("-4", "-6"):
        for rule in json.loads(run(path, "ip", "-j", version, "rule")):
            if "fwmark" in rule:
                found.append(f"{rule['priority']} {rule['fwmark']}/{rule['fwmask']} {rule['table']}")
        table = subprocess.run(
            ["nsenter", f"--net={path}", "ip", "-j", version, "route", "show", "table", "100"],
            check=False,
            capture_output=True,
            text=True,
        )
        if table.returncode:  # no such table; some versions print half a list
            continue
        for route in json.loads(table.stdout or "[]"):
            found.append(f"{route.get('type')} {route['dst']} {route['dev']}")
    return found


ROUTING = ["32764 0x111/0xfff 100", "local default lo"] * 2


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A network namespace with nothing but its loopback device."""
    path = tmp_path / "netns"
    netns.create(path)
    try:
        run(path, "ip", "link", "set", "lo", "up")
        yield path
    finally:
        netns.remove(path)


@pytest.fixture
def namespace(path: Path) -> Iterator[int]:
    descriptor = netns.open_path(path)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        (DNS, ()),
        (PLAIN, ("53,", "15053", "raw", "dport == 53")),
        (Settings(capture_inbound=False), ("15006", "15053", "raw")),
    ],
    ids=["everything", "default", "inbound left alone"],
)
def test_nft_reads_exactly_the_decisions(
    path: Path, namespace: int, settings: Settings, lacking: tuple[str, ...]
) -> None:
    assert rules.apply(namespace, settings)
    assert decisions(path) == without(DECISIONS, *lacking)
    assert policy_routing(path) == ROUTING
    assert rules.verify(namespace, settings) == []
    assert rules.state(namespace, settings) is State.REDIRECTED


TEN, DOC4 = ip_network("10.0.0.0/8"), ip_network("192.0.2.0/24")
FD, DOC6 = ip_network("fd00::/8"), ip_network("2001:db8::/32")
EVERYTHING4, EVERYTHING6 = ip_network("0.0.0.0/0"), ip_network("::/0")


@pytest.mark.parametrize(
    ("settings", "sets", "chain", "first", "with_sets"),
    [
        (
            Settings(exclude_ports=(53, 5432)),
            {"excluded_ports inet_service": ["53", "5432"]},
            "output nat output -100",
            2,
            [f"tcp.dport == @excluded_ports, {FIRST}, accept"],
        ),
        (
            Settings(exclude_inbound_ports=(9090,)),
            {"excluded_inbound_ports inet_service": ["9090"]},
            "prerouting nat prerouting -100",
            2,
            [f"tcp.dport == @excluded_inbound_ports, {FIRST}, accept"],
        ),
        (
            Settings(exclude_ranges=(TEN, DOC4, FD)),
            {
                "excluded_ranges_ipv4 ipv4_addr": ["10.0.0.0/8", "192.0.2.0/24"],
                "excluded_ranges_ipv6 ipv6_addr": ["fd00::/8"],
            },
            "output nat output -100",
            5,
            [
                f"ip.daddr == @excluded_ranges_ipv4, {FIRST}, accept",
                f"ip6.daddr == @excluded_ranges_ipv6, {FIRST}, accept",
            ],
        ),
        (
            Settings(include_ranges=(TEN, DOC6)),
            {
                "included_ranges_ipv4 ipv4_addr": ["10.0.0.0/8"],
                "included_ranges_ipv6 ipv6_addr": ["2001:db8::/32"],
            },
            "output nat output -100",
            5,
            [
                f"ip.daddr != 127.0.0.0/8, {PROXY} != 0x539, ip.daddr == @included_ranges_ipv4, {FIRST}, "
                "redirect 15001",
                f"ip6.daddr != ::1, {PROXY} != 0x539, ip6.daddr == @included_ranges_ipv6, {FIRST}, redirect 15001",
            ],
        ),
        (Settings(include_ranges=()), {}, "output nat output -100", 5, []),
        (
            Settings(
                exclude_ranges=(EVERYTHING4, EVERYTHING6), capture_inbound=False, exclude_inbound_ports=(1,)
            ),
            {"excluded_ranges_ipv4 ipv4_addr": ["0.0.0.0/0"], "excluded_ranges_ipv6 ipv6_addr": ["::/0"]},
            "output nat output -100",
            5,
            [
                f"ip.daddr == @excluded_ranges_ipv4, {FIRST}, accept",
                f"ip6.daddr == @excluded_ranges_ipv6, {FIRST}, accept",
            ],
        ),
    ],
    ids=["ports", "inbound ports", "ranges", "included", "nothing included", "everything excluded"],
)
def test_exceptions_are_sets(
    path: Path,
    namespace: int,
    settings: Settings,
    sets: dict[str, list[str]],
    chain: str,
    first: int,
    with_sets: list[str],
) -> None:
    assert rules.apply(namespace, settings)
    assert set_members(path) == sets
    assert decisions(path)[chain][first : first + len(with_sets)] == with_sets
    if settings.include_ranges is not None:
        redirects = [rule for rule in decisions(path)[chain] if "redirect" in rule]
        assert redirects == with_sets
    assert rules.verify(namespace, settings) == []
    assert rules.apply(namespace, settings) == []
    assert rules.state(namespace, settings) is State.REDIRECTED
    # From one setting to any other, and out.
    assert rules.apply(namespace, PLAIN)
    assert set_members(path) == {}
    assert rules.apply(namespace, settings)
    rules.drain(namespace, settings)
    assert rules.state(namespace, settings) is State.DRAINED
    assert not any("redirect" in rule for found in decisions(path).values() for rule in found)
    rules.remove(namespace, settings)
    assert run(path, "nft", "list", "ruleset") == ""


def test_a_set_that_somebody_changed_is_told_and_repaired(path: Path, namespace: int) -> None:
    settings = Settings(exclude_ports=(80,), exclude_ranges=(TEN,))
    rules.apply(namespace, settings)
    for damage, complaint in (
        (["add", "element", "inet", "ambient", "excluded_ports", "{ 443 }"], "set ambient/excluded_ports is"),
        (
            ["delete", "element", "inet", "ambient", "excluded_ranges_ipv4", "{ 10.0.0.0/8 }"],
            "excluded_ranges_ipv4 is",
        ),
        (["add", "set", "inet", "ambient", "more", "{ type inet_service; }"], "set ambient/more is not ours"),
    ):
        run(path, "nft", *damage)
        (told,) = rules.verify(namespace, settings)
        assert complaint in told
        assert rules.apply(namespace, settings) == [told]
        assert rules.verify(namespace, settings) == []


def test_sets_of_a_thousand_ranges(path: Path, namespace: int) -> None:
    ranges = tuple(ip_network(f"10.{number // 128}.{number % 128 * 2}.0/24") for number in range(1000))
    settings = Settings(exclude_ranges=ranges)
    rules.apply(namespace, settings)
    assert rules.verify(namespace, settings) == []
    assert len(set_members(path)["excluded_ranges_ipv4 ipv4_addr"]) == 1000


def set_members(path: Path) -> dict[str, list[str]]:
    """The sets as nft reads them: name and type, and their members as text in order."""
    found = {}
    for item in json.loads(run(path, "nft", "-j", "list", "ruleset"))["nftables"]:
        if one := item.get("set"):
            members = []
            for member in one.get("elem", []):
                range_ = member.get("prefix") if isinstance(member, dict) else None
                whole = {"ipv4_addr": "0.0.0.0/0", "ipv6_addr": "::/0"}.get(one["type"], "")
                if range_ is not None:
                    members.append(f"{range_['addr']}/{range_['len']}" if range_["len"] else whole)
                else:
                    members.append(str(member))
            found[f"{one['name']} {one['type']}"] = sorted(members, key=lambda text: (len(text), text))
    return found


def test_marks_and_ports_are_settings(path: Path, namespace: int) -> None:
    settings = Settings(
        mark=0x2A0, return_mark=0x2B0, mask=0xFF0, outbound_port=25001, inbound_port=25006, hbone_port=25008,
        dns_port=25053, dns_capture=True, table="other",
    )  # fmt: skip
    rules.apply(namespace, settings)
    listed = run(path, "nft", "list", "ruleset")
    assert "table inet other" in listed
    for port in (25001, 25006, 25053):
        assert f"redirect to :{port}" in listed
    assert "dport != 25008" in listed
    assert "meta mark & 0x00000ff0 != 0x000002a0" in listed
    assert "15" not in listed.replace("15.255", "").replace("-150", "")
    assert policy_routing(path)[0] == "32764 0x2b0/0xff0 100"
    assert rules.verify(namespace, settings) == []
    rules.remove(namespace, settings)
    assert (run(path, "nft", "list", "ruleset"), policy_routing(path)) == ("", [])


def test_applying_twice_changes_nothing(path: Path, namespace: int) -> None:
    assert rules.state(namespace, PLAIN) is State.ABSENT
    assert len(rules.apply(namespace, PLAIN)) == 5
    before = run(path, "nft", "-a", "list", "ruleset"), policy_routing(path)
    descriptors = open_descriptors()
    for _ in range(3):
        assert rules.apply(namespace, PLAIN) == []
    # Handles are numbers that the kernel counts up: the very same rules are there.
    assert (run(path, "nft", "-a", "list", "ruleset"), policy_routing(path)) == before
    assert open_descriptors() == descriptors


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (["nft", "flush", "chain", "inet", "ambient", "output"], "rule 1 of ambient/output is missing"),
        (["nft", "add", "rule", "inet", "ambient", "prerouting", "accept"], "prerouting is not ours"),
        (["nft", "insert", "rule", "inet", "ambient", "output", "tcp", "dport", "9", "accept"], "should be"),
        (["nft", "delete", "table", "inet", "ambient"], "table inet ambient is missing"),
        (["nft", "add", "chain", "inet", "ambient", "more"], "chain ambient/more is not ours"),
        (["ip", "-6", "rule", "del", "pref", "32764"], "IPv6 ip rule fwmark 0x111/0xfff"),
        (["ip", "route", "flush", "table", "100"], "IPv4 route local 0.0.0.0/0 dev lo table 100 is missing"),
        (["ip", "rule", "add", "fwmark", "0x111/0xfff", "lookup", "100", "pref", "32764", "protocol", "99"],
         "there 2 times"),
    ],
)  # fmt: skip
def test_what_somebody_changed_is_told_and_repaired(
    path: Path, namespace: int, damage: list[str], complaint: str
) -> None:
    rules.apply(namespace, DNS)
    run(path, *damage)
    told = rules.verify(namespace, DNS)
    assert any(complaint in each for each in told), told
    assert rules.state(namespace, DNS) is State.DIFFERENT
    assert rules.apply(namespace, DNS) == told
    assert rules.verify(namespace, DNS) == []
    assert decisions(path) == DECISIONS
    assert policy_routing(path) == ROUTING


def test_other_tables_are_left_alone(path: Path, namespace: int) -> None:
    run(path, "nft", "add table inet mine; add chain inet mine c { type nat hook output priority -100; }")
    run(path, "nft", "add table ip ambient; add chain ip ambient prerouting")
    rules.apply(namespace, PLAIN)
    assert rules.verify(namespace, PLAIN) == []
    rules.remove(namespace, PLAIN)
    assert run(path, "nft", "list", "tables").split("\n") == ["table inet mine", "table ip ambient", ""]


def test_draining_takes_out_the_redirections_only(path: Path, namespace: int) -> None:
    rules.apply(namespace, DNS)
    assert rules.drain(namespace, DNS)
    assert decisions(path) == without(DECISIONS, "redirect")
    assert policy_routing(path) == ROUTING
    assert rules.state(namespace, DNS) is State.DRAINED
    assert rules.verify(namespace, DNS, drained=True) == []
    assert rules.drain(namespace, DNS) == []
    rules.apply(namespace, DNS)
    assert rules.state(namespace, DNS) is State.REDIRECTED


def test_removing_leaves_nothing_and_may_be_done_twice(path: Path, namespace: int) -> None:
    for _ in range(2):
        rules.apply(namespace, DNS)
        for _ in range(2):
            rules.remove(namespace, DNS)
            assert (run(path, "nft", "list", "ruleset"), policy_routing(path)) == ("", [])
            assert rules.state(namespace, DNS) is State.ABSENT


def test_a_transaction_is_carried_out_whole_or_not_at_all(path: Path, namespace: int) -> None:
    rules.apply(namespace, PLAIN)
    before = run(path, "nft", "-a", "list", "ruleset")
    good = rules.table(DNS)
    misplaced = Chain("last", "filter", nft.OUTPUT, 0, (nft.rule("not in a nat chain", nft.redirect(1)),))
    with ruleset.open_nftables(namespace) as nftables:
        with pytest.raises(
            ruleset.RulesetError, match=r'add rule inet ambient last "not in a nat chain": E(OP)?NOTSUPP?'
        ):
            ruleset.commit(nftables, ruleset.replacement(Table("ambient", (*good.chains, misplaced))))
        assert run(path, "nft", "-a", "list", "ruleset") == before
        ruleset.commit(nftables, ruleset.replacement(good))
    assert decisions(path) == DECISIONS


def test_what_the_kernel_lacks_is_named_with_the_remedy(namespace: int) -> None:
    unknown = Chain("c", "nosuchtype", nft.OUTPUT, 0, ())
    with (
        ruleset.open_nftables(namespace) as nftables,
        pytest.raises(ruleset.RulesetError) as raised,
    ):
        ruleset.commit(nftables, ruleset.replacement(Table("ambient", (unknown,))))
    assert "add chain inet ambient c (type nosuchtype): ENOENT" in str(raised.value)
    assert "modprobe" in str(raised.value)
    assert "nft_redir" in str(raised.value)


def test_a_loopback_device_that_is_down_is_named(path: Path, namespace: int) -> None:
    run(path, "ip", "link", "set", "lo", "down")
    with pytest.raises(routes.RoutesError, match="ip link set lo up"):
        rules.apply(namespace, PLAIN)
    assert run(path, "nft", "list", "ruleset") == "", "no redirection without the way back"
    run(path, "ip", "link", "set", "lo", "up")
    rules.apply(namespace, PLAIN)
    assert rules.verify(namespace, PLAIN) == []


def test_a_namespace_without_ipv6_gets_the_ipv4_part(path: Path, namespace: int) -> None:
    run(path, "sysctl", "-qw", "net.ipv6.conf.lo.disable_ipv6=1")
    assert not routes.has_ipv6(namespace)
    rules.apply(namespace, PLAIN)
    assert policy_routing(path) == ROUTING[:2]
    assert rules.verify(namespace, PLAIN) == []
    run(path, "sysctl", "-qw", "net.ipv6.conf.lo.disable_ipv6=0")
    assert len(rules.verify(namespace, PLAIN)) == 2
    rules.apply(namespace, PLAIN)
    assert policy_routing(path) == ROUTING


def test_routes_alone_are_safe_to_apply_and_remove_twice(path: Path, namespace: int) -> None:
    way = ReturnPath()
    assert not routes.present(namespace, way)
    for _ in range(2):
        routes.ensure(namespace, way)
        assert routes.verify(namespace, way) == []
    assert policy_routing(path) == ROUTING
    for _ in range(2):
        routes.remove(namespace, way)
        assert policy_routing(path) == []


def test_without_the_right_to_the_user_is_told_what_is_missing(path: Path) -> None:
    """A process without capabilities in the namespace's owner, here one in a user namespace of its own."""
    code = (
        "import os, sys\n"
        "from ztunnel.inpod import netns\n"
        "from cni import rules\n"
        "fd = netns.open_path(sys.argv[1])\n"
        "netns.unshare(netns.CLONE_NEWUSER)\n"
        "try: rules.apply(fd, rules.Settings())\n"
        "except Exception as error: print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert os.strerror(errno.EPERM) in told
    assert "CAP_SYS_ADMIN" in told


def test_a_table_that_goes_while_it_is_read_is_no_error(namespace: int) -> None:
    settings = Settings(dns_capture=True, exclude_ranges=(ip_network("192.0.2.0/24"),))
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            rules.apply(namespace, settings)
            rules.remove(namespace, settings)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        seen = {rules.state(namespace, settings) for _ in range(200)}
    finally:
        over.set()
        thread.join()
    assert len(seen) > 1, "it came and went"
