"""A week of a mesh's certificates on a virtual clock: real managers, real signatures, and what goes wrong in a week.

Three nodes whose clocks differ, each with the certificates of four identities; one control plane that is away now and
then, replaces its root on the fourth day, and is restarted in the middle of that. Every hour every node's
certificates are verified as every other node would do it, by its own clock.
"""

import json
import random

import pytest
import trio
from cryptography import x509
from trio.testing import MockClock

from ztunnel.identity import chain
from ztunnel.identity.ca import Authority
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.rotation import CertificateManager, CertificateState
from ztunnel.identity.succession import Succession

START = 1_800_000_000.0
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
IDENTITIES = [f"spiffe://cluster.local/ns/default/sa/{name}" for name in "abcd"]
SKEWS = (0.0, 100.0, -100.0)  # seconds; certificates are dated back by two minutes
AWAY = [  # (from, to) since the start
    (3 * HOUR, 4 * HOUR),
    (1 * DAY, 1 * DAY + 10 * HOUR),  # less than what a certificate has left when its renewal begins
    (2 * DAY + 5 * HOUR, 2 * DAY + 6 * HOUR),
    (5 * DAY, 5 * DAY + 9 * HOUR),
]


class _ControlPlane:
    """Signs with the authority that may, unless it is away."""

    def __init__(self) -> None:
        self.wanted = Authority.create(now=self.now)
        self.succession = Succession(self.wanted, self.now(), memory=True)
        self.signed = 0
        self.refused = 0

    def now(self) -> float:
        try:
            return START + trio.current_time()
        except RuntimeError:
            return START

    @property
    def away(self) -> bool:
        return any(begin <= self.now() - START < end for begin, end in AWAY)

    async def sign(self, node: int, csr: bytes, identity: str, ttl: int) -> list[bytes]:
        await trio.sleep(0.05)
        if self.away:
            self.refused += 1
            raise ConnectionRefusedError("the control plane is away")
        authority = self.succession.answering
        pems = authority.sign(csr, identity, ttl)
        end = x509.load_pem_x509_certificate(pems[0]).not_valid_after_utc.timestamp()
        self.succession.issued(authority, str(node), identity, end, self.now())
        self.signed += 1
        return pems

    async def run(self) -> None:
        while True:
            await trio.sleep(MINUTE)
            if not self.away:
                self.succession.advance(self.now(), lambda _node, _identity: True)

    def replace_root(self) -> None:
        self.wanted = Authority.create(now=self.now)
        self.succession.want(self.wanted, self.now())

    def restart(self) -> None:
        dumped = json.loads(json.dumps(self.succession.dump(complete=True)))
        self.succession = Succession.restore(self.succession.signing, dumped, self.now())
        self.succession.want(self.wanted, self.now())


class _Node:
    def __init__(self, number: int, plane: _ControlPlane) -> None:
        self.number = number
        self.plane = plane
        self.skew = SKEWS[number]
        self.updates: list[WorkloadCertificate] = []
        self.manager = CertificateManager(
            self.sign, on_update=self.updates.append, now=self.now, rng=random.Random(number)
        )
        for identity in IDENTITIES:
            self.manager.want(identity)

    def now(self) -> float:
        return self.plane.now() + self.skew

    async def sign(self, csr: bytes, identity: str, ttl: int) -> list[bytes]:
        return await self.plane.sign(self.number, csr, identity, ttl)

    def held(self) -> list[WorkloadCertificate]:
        found = [self.manager.current(identity) for identity in IDENTITIES]
        assert all(found), [(one.identity, one.last_error) for one in self.manager.status()]
        return [one for one in found if one is not None]


def all_trust_each_other(nodes: list[_Node]) -> None:
    for verifier in nodes:
        roots_pems = {one.roots_pem for one in verifier.held()}
        assert len(roots_pems) == 1, "all identities of a node trust what it heard last"
        roots = x509.load_pem_x509_certificates(roots_pems.pop())
        for node in nodes:
            for one in node.held():
                leaf, *intermediates = x509.load_pem_x509_certificates(one.chain_pem)
                chain.verify(leaf, intermediates, roots, verifier.now())


async def test_a_week(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    plane = _ControlPlane()
    first_root = plane.wanted.roots[0]
    nodes = [_Node(number, plane) for number in range(3)]
    nursery.start_soon(plane.run)
    for node in nodes:
        await nursery.start(node.manager.run)
        for identity in IDENTITIES:
            await node.manager.wait(identity, persist=True)
    replaced = restarted = False
    failing = set()
    while (passed := trio.current_time()) < 7 * DAY:
        await trio.sleep(HOUR)
        if not replaced and passed > 3.5 * DAY:
            plane.replace_root()
            replaced = True
        if not restarted and passed > 3.6 * DAY:
            assert plane.succession.phase == "distributing", "half a life is needed until all have renewed"
            plane.restart()
            restarted = True
        all_trust_each_other(nodes)
        failing |= {one.state for node in nodes for one in node.manager.status()}
    assert failing == {CertificateState.VALID, CertificateState.FAILING}
    assert plane.refused > 50, "the control plane was asked while it was away"
    # Twelve certificates, renewed at about half of their day: some 14 times each, and not much more for all that.
    assert 12 * 13 <= plane.signed <= 12 * 17
    assert plane.succession.phase == "stable"
    assert first_root not in plane.succession.bundle
    for node in nodes:
        for one in node.held():
            assert x509.load_pem_x509_certificates(one.roots_pem) == list(plane.wanted.roots)


@pytest.mark.parametrize("step", [2 * DAY, -2 * DAY], ids=["forward", "backward"])
async def test_a_clock_that_steps(autojump_clock: MockClock, nursery: trio.Nursery, step: float) -> None:
    """Forward past the end of the certificates: none is served, until the authority's clock is the node's again.
    Backward before their beginning: what is there stays, and renewals go on once the clock is right."""
    plane = _ControlPlane()
    node = _Node(0, plane)
    await nursery.start(node.manager.run)
    for identity in IDENTITIES:
        await node.manager.wait(identity)
    await trio.sleep(HOUR)
    before = {one.chain_pem for one in node.held()}
    node.skew = step
    await trio.sleep(5 * MINUTE)
    if step > 0:
        assert all(node.manager.current(identity) is None for identity in IDENTITIES)
        # What the authority gives is over already by this clock: refused, told, and asked for again and again.
        status = node.manager.status()[0]
        assert status.state is CertificateState.UNAVAILABLE
        assert "expired" in status.last_error
    else:
        assert {one.chain_pem for one in node.held()} == before
    node.skew = 0.0
    await trio.sleep(2 * MINUTE)
    all_trust_each_other([node])
    signed = plane.signed
    await trio.sleep(2 * DAY)
    all_trust_each_other([node])
    assert 4 * 3 <= plane.signed - signed <= 4 * 5


async def test_news_of_another_root_are_fetched_at_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    plane = _ControlPlane()
    nodes = [_Node(number, plane) for number in range(3)]
    nursery.start_soon(plane.run)
    for node in nodes:
        await nursery.start(node.manager.run)
        for identity in IDENTITIES:
            await node.manager.wait(identity)
    old = plane.wanted
    plane.replace_root()
    bundle = plane.succession.bundle
    began = trio.current_time()
    while plane.succession.phase != "stable":
        await trio.sleep(2)
        all_trust_each_other(nodes)
        if plane.succession.bundle != bundle:  # as a published file changes
            bundle = plane.succession.bundle
        for node in nodes:
            roots = x509.load_pem_x509_certificates(node.held()[0].roots_pem)
            if roots != bundle:
                node.manager.refresh()
                await trio.sleep(2)
    assert trio.current_time() - began < 300
    assert old.roots[0] not in plane.succession.bundle
    for node in nodes:
        assert len({one.chain_pem for one in node.updates}) < 4 * 8, (
            "asked for more often than there were news"
        )
