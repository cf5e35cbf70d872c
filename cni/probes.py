"""What lets the kubelet's probes reach pods whose policy wants mutual TLS: rules in the node's own network namespace.

A probe is a connection of the kubelet's from the node, in plaintext and without an identity. Its source is rewritten
to a link-local address that nobody else has, and the rules in pods let that pass beside the proxy (see rules). Only
connections of sockets of the node itself, owned by the kubelet's user, to pods of this node that are in the mesh:
what is forwarded has no socket here.
"""

import ipaddress
import logging
import os
from collections.abc import Iterable

import trio

from cni import nftables as nft
from cni import ruleset
from cni.nftables import Chain, IpAddress, SetElement, Table
from cni.rules import PROBE_SOURCES
from cni.ruleset import NoNftablesError, RulesetError
from ztunnel.inpod import netns

log = logging.getLogger(__name__)

TABLE = "ambient_host"
KUBELET_UID = 0
# Before those that masquerade (kube-proxy's, and networks' own): the first that translates a connection wins.
PRIORITY = nft.SRCNAT - 1


def _set_name(version: int) -> str:
    return f"probed_ipv{version}"


def table(addresses: Iterable[IpAddress], *, kubelet_uid: int = KUBELET_UID, name: str = TABLE) -> Table:
    """The table for pods with these addresses. Pure."""
    pods = sorted(addresses, key=lambda each: (each.version, each))
    rules = tuple(
        nft.rule(
            f"health probes, IPv{probe.version}",
            nft.protocol(nft.TCP),
            nft.socket_owner(kubelet_uid),
            nft.destination_in(_set_name(probe.version), probe.version),
            nft.source_nat(probe),
        )
        for probe in PROBE_SOURCES
    )
    sets = tuple(
        nft.address_set(_set_name(version), version, [pod for pod in pods if pod.version == version])
        for version in (4, 6)
    )
    return Table(name, (Chain("postrouting", "nat", nft.POSTROUTING, PRIORITY, rules),), sets)


class HostProbes:
    """Keeps the rules in the network namespace that this process is in."""

    def __init__(self, *, kubelet_uid: int = KUBELET_UID, name: str = TABLE) -> None:
        self.problem = "they were not looked at yet"
        self._uid = kubelet_uid
        self._name = name
        self._pods: dict[str, frozenset[IpAddress]] = {}
        self._held: frozenset[IpAddress] | None = None  # what the kernel has, None: not known
        self._turn = trio.Lock()

    async def admit(self, uid: str, addresses: Iterable[str]) -> None:
        """From now on probes of this pod pass. Failures are logged, and tried again by `reconcile`."""
        found = frozenset(ipaddress.ip_address(each) for each in addresses)
        if found and self._pods.get(uid) != found:
            self._pods[uid] = found
            await self._bring()

    async def dismiss(self, uid: str) -> None:
        """The pod is in the mesh no longer."""
        if self._pods.pop(uid, None):
            await self._bring()

    async def reconcile(self) -> list[str]:
        """Look at what the kernel has and repair it; what was different."""
        self._held = None
        return await self._bring()

    async def remove(self) -> None:
        """Take the rules away. Failures are logged."""
        async with self._turn:
            self._pods.clear()
            self._held = None
            try:
                await trio.to_thread.run_sync(self._remove)
            except (RulesetError, OSError) as error:
                log.error("rules for health probes: %s", error)

    async def _bring(self) -> list[str]:
        async with self._turn:
            wanted = frozenset[IpAddress]().union(*self._pods.values())
            if wanted == self._held:
                return []
            try:
                was = await trio.to_thread.run_sync(self._apply, self._held, wanted)
            except (RulesetError, OSError) as error:
                self._held = None
                if str(error) != self.problem:
                    log.error("rules for health probes: %s; trying again", error)
                self.problem = str(error)
                return []
            self._held = wanted
            self.problem = ""
            return was

    def _apply(self, held: frozenset[IpAddress] | None, wanted: frozenset[IpAddress]) -> list[str]:
        namespace = netns.open_path("/proc/self/ns/net")
        try:
            with ruleset.open_nftables(namespace) as nftables:
                whole = table(wanted, kubelet_uid=self._uid, name=self._name)
                if held is not None:
                    try:
                        ruleset.commit(nftables, self._difference(held, wanted))
                        return []
                    except RulesetError as error:
                        log.debug("rules for health probes: %s; written anew", error)
                found = ruleset.read(nftables, self._name)
                wrong = ruleset.compare(self._name, ruleset.wanted(whole), found)
                if wrong:
                    ruleset.commit(nftables, ruleset.replacement(whole))
                return wrong
        finally:
            os.close(namespace)

    def _difference(self, held: frozenset[IpAddress], wanted: frozenset[IpAddress]) -> ruleset.Batch:
        changes = []
        for version in (4, 6):
            of = nft.address_set(_set_name(version), version, ())
            added, gone = (
                [SetElement(each.packed) for each in group if each.version == version]
                for group in (wanted - held, held - wanted)
            )
            changes += [(of, added, True), (of, gone, False)]
        return ruleset.elements_change(self._name, changes)

    def _remove(self) -> None:
        namespace = netns.open_path("/proc/self/ns/net")
        try:
            with ruleset.open_nftables(namespace) as nftables:
                if ruleset.read(nftables, self._name) is not None:
                    ruleset.commit(nftables, ruleset.removal(self._name))
        except NoNftablesError:
            pass  # then there are none
        finally:
            os.close(namespace)
