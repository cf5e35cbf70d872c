"""What kube-proxy does, in small: rules in each node's namespace that lead a Service's address to a ready pod.

Table `ambient-services` (families ip and ip6), replaced as a whole in one transaction when anything changes;
open connections go on, since their translation is in the kernel's connection table and not in the rules:

    prerouting, nat       (address . protocol . port) in map `services`: goto the chain of that Service
    service-N             a random one of its endpoints: dnat
    prerouting, filter    after translation: still towards a Service's address: refuse (TCP reset, ICMP)
    postrouting, nat      source and destination are one pod (in set `hairpin`): masquerade, or its kernel
                          would drop the packet that seems to come from itself
"""

import contextlib
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path

import trio
from pyroute2 import NFCTSocket
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

from ztunnel.embedded import nft
from ztunnel.embedded.addresses import DNS_VIP, SERVICES4, SERVICES6
from ztunnel.embedded.endpoints import Frontend, frontends
from ztunnel.embedded.network import has_ipv6
from ztunnel.embedded.view import View
from ztunnel.inpod import netns
from ztunnel.store.problems import Problem

Report = Callable[[str, Problem | None], None]

TABLE = "ambient-services"
DSTNAT, SRCNAT = -100, 100
AFTER_DSTNAT = -90
PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP}
# Byte offsets of the addresses in the IP header, by family; and how long an address is.
SOURCE = {nft.IPV4: 12, nft.IPV6: 8}
DESTINATION = {nft.IPV4: 16, nft.IPV6: 24}
LENGTH = {nft.IPV4: 4, nft.IPV6: 16}
TYPE = {nft.IPV4: nft.TYPE_IPV4, nft.IPV6: nft.TYPE_IPV6}
# Seconds in which changes are gathered; stretched so that making rules takes a tenth of the time at most.
SETTLE, LONGEST_SETTLE = 0.02, 0.25
STRETCH = 9
RETRY = 2.0
REMEDY = "load the kernel modules nfnetlink, nf_tables, nft_nat, nft_reject and nft_masq (modprobe); it is tried again"


def family_of(address: str) -> int:
    """nf_tables' number for the family of an address in text."""
    return nft.IPV6 if ":" in address else nft.IPV4


def rules(wanted: Sequence[Frontend]) -> bytes:
    """The transaction that makes the rules say exactly this, for any node."""
    transaction = nft.Transaction()
    for family in (nft.IPV4, nft.IPV6) if has_ipv6() else (nft.IPV4,):
        _family_rules(transaction, family, [f for f in wanted if family_of(f.address) == family])
    return transaction.encode()


def no_rules() -> bytes:
    """The transaction that takes them away."""
    transaction = nft.Transaction()
    for family in (nft.IPV4, nft.IPV6) if has_ipv6() else (nft.IPV4,):
        transaction.remove_table(family, TABLE)
    return transaction.encode()


def _family_rules(transaction: nft.Transaction, family: int, wanted: Sequence[Frontend]) -> None:
    length = LENGTH[family]
    # Registers of four bytes each; an address takes `length` bytes from the first one on.
    address = nft.REG32
    after = address + length // 4

    def load_destination() -> bytes:
        return nft.payload(address, nft.NETWORK_HEADER, DESTINATION[family], length)

    transaction.replace_table(family, TABLE)
    chains: dict[bytes, str] = {}
    for place, frontend in enumerate(wanted):
        if not frontend.backends:
            continue
        chain = f"service-{place}"
        transaction.chain(family, TABLE, chain)
        count = len(frontend.backends)
        for index, backend in enumerate(frontend.backends):
            # One of those that are left, so that each has the same chance in the end.
            chance = [nft.random_below(address, count - index), nft.equal(address, struct.pack("=I", 0))]
            transaction.rule(
                family,
                TABLE,
                chain,
                *(chance if index < count - 1 else []),
                nft.immediate(address, ip_address(backend.address).packed),
                nft.immediate(after, struct.pack("!H", backend.port)),
                nft.dnat(family, address, after),
            )
        chains[_frontend_key(frontend)] = chain

    transaction.jump_map(
        family, TABLE, "services", (TYPE[family], nft.TYPE_PROTOCOL, nft.TYPE_PORT), length + 8, chains
    )
    transaction.base_chain(family, TABLE, "translate", "nat", nft.PREROUTING, DSTNAT)
    transaction.rule(
        family,
        TABLE,
        "translate",
        load_destination(),
        nft.meta(after, nft.META_L4PROTO),
        nft.payload(after + 1, nft.TRANSPORT_HEADER, 2, 2),
        nft.lookup("services", address, verdict=True),
    )

    transaction.base_chain(family, TABLE, "refuse", "filter", nft.PREROUTING, AFTER_DSTNAT)
    if family == nft.IPV4:
        dns = ip_address(DNS_VIP).packed
        transaction.rule(family, TABLE, "refuse", load_destination(), nft.equal(address, dns), nft.accept())
    everything = SERVICES4 if family == nft.IPV4 else SERVICES6
    covered = [
        [nft.mask(address, everything.netmask.packed), nft.equal(address, everything.network_address.packed)]
    ]
    covered += [
        [nft.equal(address, ip_address(text).packed)]
        for text in sorted({f.address for f in wanted})
        if ip_address(text) not in everything
    ]
    for match in covered:
        tcp = [nft.meta(after, nft.META_L4PROTO), nft.equal(after, bytes([socket.IPPROTO_TCP]))]
        transaction.rule(family, TABLE, "refuse", load_destination(), *match, *tcp, nft.reject_tcp())
        transaction.rule(family, TABLE, "refuse", load_destination(), *match, nft.reject_port(family))

    pods = sorted({ip_address(b.address).packed for f in wanted for b in f.backends})
    transaction.set(
        family, TABLE, "hairpin", (TYPE[family], TYPE[family]), length * 2, [pod + pod for pod in pods]
    )
    transaction.base_chain(family, TABLE, "hairpins", "nat", nft.POSTROUTING, SRCNAT)
    transaction.rule(
        family,
        TABLE,
        "hairpins",
        nft.payload(address, nft.NETWORK_HEADER, SOURCE[family], length),
        nft.payload(after, nft.NETWORK_HEADER, DESTINATION[family], length),
        nft.lookup("hairpin", address),
        nft.masquerade(),
    )


def _frontend_key(frontend: Frontend) -> bytes:
    """The map's key: each part fills up its four-byte registers with zeroes."""
    packed = ip_address(frontend.address).packed
    return packed + struct.pack("!B3xH2x", PROTOCOLS[frontend.protocol], frontend.port)


def forget_datagrams(gone: Iterable[tuple[str, str]]) -> None:
    """Forget the UDP flows that were led from a Service's address to an endpoint which is no more.

    Else a client that keeps its source port would stay with it for as long as it sends. Works on the calling
    thread's network namespace; `gone` are (Service's address, endpoint's address).
    """
    wanted = set(gone)
    for family in sorted({socket.AF_INET6 if ":" in service else socket.AF_INET for service, _ in wanted}):
        # Kernels compare IPv6 addresses the wrong way round when asked for one, so ask for all of UDP.
        datagrams = NFCTAttrTuple(family=family, proto=socket.IPPROTO_UDP)
        with NFCTSocket(nfgen_family=family) as table:
            for entry in list(table.dump(tuple_orig=datagrams)):
                flow = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG"))
                answer = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_REPLY"))
                if datagrams == flow and (flow.daddr, answer.saddr) in wanted:
                    with contextlib.suppress(NetlinkError):  # it may end by itself meanwhile
                        table.entry("del", tuple_orig=flow)


def datagram_routes(wanted: Iterable[Frontend]) -> set[tuple[str, str]]:
    """The pairs (Service's address, endpoint's address) that UDP is led along."""
    return {(f.address, b.address) for f in wanted if f.protocol == "UDP" for b in f.backends}


def apply(node: Path, batch: bytes, gone: Iterable[tuple[str, str]] = ()) -> None:
    """Make the rules of a node, named by its namespace's file, what the transaction says. Blocks for about 1 ms.

    Raises nft.NftError, OSError.
    """
    namespace = netns.open_path(node)
    try:
        with netns.inside(namespace):
            nft.send(batch)
            forget_datagrams(gone)
    finally:
        os.close(namespace)


class ServiceRules:
    """Keeps the rules of every node true to the cluster's objects."""

    def __init__(self, view: View, nodes: dict[str, Path], report: Report) -> None:
        self._view = view
        self._nodes = nodes
        self._report = report
        self._in_place = -1  # the view's version that the rules say

    @property
    def settled(self) -> bool:
        """Whether every node's rules say what the view says now: a pod may be ready some 20 ms earlier."""
        return self._in_place == self._view.version

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the view for ever; started when the first rules are in place."""
        applied: list[Frontend] | None = None
        retry = False
        while True:
            version = self._view.version
            began = time.monotonic()
            wanted = frontends(self._view.services.values(), self._view.pods.values())
            changed = wanted != applied or retry
            batch = rules(wanted) if changed else b""
            settle = min(max(SETTLE, STRETCH * (time.monotonic() - began)), LONGEST_SETTLE)
            if changed:
                gone = datagram_routes(applied or ()) - datagram_routes(wanted)
                retry = not await self._apply(batch, gone)
                applied = wanted
            if not retry:
                self._in_place = version
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            with trio.move_on_after(RETRY if retry else math.inf):
                await self._view.changed(version)
                await trio.sleep(settle)  # one change seldom comes alone

    async def _apply(self, batch: bytes, gone: set[tuple[str, str]]) -> bool:
        """Whether every node took it."""
        done = True
        for name, path in self._nodes.items():
            try:
                await trio.to_thread.run_sync(apply, path, batch, gone)
            except (nft.NftError, OSError) as error:
                done = False
                message = f"Services cannot be reached by their addresses from its pods: {error}"
                self._report(name, Problem(f"Node {name}", "", message, REMEDY))
            else:
                self._report(name, None)
        return done
