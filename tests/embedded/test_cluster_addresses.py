"""Addresses: none twice, none lost, kept while somebody lives, given out again late."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.embedded.addresses import (
    DNS_VIP,
    SERVICES4,
    SERVICES6,
    gateway4,
    gateway6,
    pod_range4,
    pod_range6,
)
from ztunnel.embedded.ipam import PODS_PER_NODE, Exhausted, PodAddresses, ServiceAddresses


def test_a_pods_two_addresses_look_alike() -> None:
    pool = PodAddresses(3)
    assert pool.take() == ["10.244.3.2", "fd00:10:244:3::2"]
    for _ in range(20):
        last = pool.take()
    assert last == ["10.244.3.22", "fd00:10:244:3::22"]


def test_a_whole_node() -> None:
    pool = PodAddresses(1)
    pairs = [pool.take() for _ in range(PODS_PER_NODE)]
    assert len({four for four, _ in pairs}) == len({six for _, six in pairs}) == PODS_PER_NODE
    for four, six in pairs:
        assert ip_address(four) in pod_range4(1)
        assert ip_address(six) in pod_range6(1)
        assert ip_address(four) not in (gateway4(1).ip, pod_range4(1).broadcast_address)
        assert ip_address(six) != gateway6(1).ip
    with pytest.raises(Exhausted, match=r"all 253 addresses of 10\.244\.1\.0/24 are in use"):
        pool.take()


@pytest.mark.parametrize(
    "addresses",
    [
        [],
        ["10.244.2.5"],
        ["10.244.2.5", "fd00:10:244:1::5"],
        ["10.244.1.5", "fd00:10:244:2::5"],
        ["10.244.2.1", "fd00:10:244:2::1"],
        ["10.244.2.255", "fd00:10:244:2::255"],
        ["fd00:10:244:2::5", "10.244.2.5"],
        ["nonsense", "fd00:10:244:2::5"],
    ],
)
def test_addresses_that_are_not_the_nodes_are_not_kept(addresses: list[str]) -> None:
    assert not PodAddresses(2).keep(addresses)


@given(st.lists(st.integers(0, 30) | st.none(), max_size=400))
def test_no_address_is_held_twice_and_none_returns_at_once(steps: list[int | None]) -> None:
    """A node through restarts: pods come (None) and go (which one), each step with a pool made anew."""
    held: list[list[str]] = []
    last = 0
    given_back: list[list[str]] = []
    for step in steps:
        if step is not None and held:
            given_back.append(held.pop(step % len(held)))
            continue
        pool = PodAddresses(1, last)
        for pair in held:
            assert pool.keep(pair)
        if len(held) == PODS_PER_NODE:
            continue
        pair = pool.take()
        last = pool.last
        assert pair not in held
        if len(held) < PODS_PER_NODE // 2:
            assert pair not in given_back[-5:]
        held.append(pair)


def test_after_a_restart_it_goes_on_after_the_highest() -> None:
    pool = PodAddresses(1)
    assert pool.keep(["10.244.1.7", "fd00:10:244:1::7"])
    assert not pool.keep(["10.244.1.7", "fd00:10:244:1::7"])
    assert pool.take()[0] == "10.244.1.8"


names = st.text("abcdefgh-", min_size=1, max_size=8)


@given(st.lists(names, unique=True, max_size=200))
def test_services_get_addresses_of_their_own(wanted: list[str]) -> None:
    pool = ServiceAddresses()
    taken = [pool.take(name, ["IPv4", "IPv6"]) for name in wanted]
    everything = [address for pair in taken for address in pair]
    assert len(set(everything)) == len(everything)
    for four, six in taken:
        assert four in SERVICES4
        assert six in SERVICES6
        assert str(four) not in (DNS_VIP, "10.96.0.0", "10.96.255.255")
        assert int(four) - int(SERVICES4[0]) == int(six) - int(SERVICES6[0])


@given(st.lists(names, unique=True, min_size=2, max_size=30))
def test_a_service_gets_the_same_address_wherever_it_is_in_the_order(wanted: list[str]) -> None:
    alone = {name: ServiceAddresses().take(name, ["IPv4"]) for name in wanted}
    pool = ServiceAddresses()
    together = {name: pool.take(name, ["IPv4"]) for name in reversed(wanted)}
    if len({str(address) for address in alone.values()}) == len(wanted):
        assert together == alone


def test_addresses_in_use_are_passed_over() -> None:
    (first,) = ServiceAddresses().take("web", ["IPv4"])
    pool = ServiceAddresses()
    pool.keep([first, ip_address("192.0.2.1"), ip_network("fd00:10:96::/112")[7]])
    assert pool.take("web", ["IPv4"]) == [first + 1]


def test_every_service_address_can_be_used() -> None:
    pool = ServiceAddresses()
    pool.keep(
        address for address in SERVICES4 if str(address) not in ("10.96.0.9", "10.96.0.10", "10.96.200.7")
    )
    assert {str(pool.take(name, ["IPv4"])[0]) for name in "ab"} == {"10.96.0.9", "10.96.200.7"}
    with pytest.raises(Exhausted, match=r"all addresses of 10\.96\.0\.0/16 are in use"):
        pool.take("c", ["IPv4"])
