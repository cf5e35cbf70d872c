"""One authority takes over from another: at every moment any two valid certificates verify each other's."""

import json
import random
import time
from collections.abc import Callable

import pytest
from cryptography import x509

from ztunnel.identity import chain, keys, templates
from ztunnel.identity.ca import Authority, Lifetimes
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.succession import Succession

HOUR, DAY = 3600.0, 86400.0
START = 1_800_000_000.0
A, B = "spiffe://cluster.local/ns/default/sa/a", "spiffe://cluster.local/ns/default/sa/b"


def yes(_node: str, _identity: str) -> bool:
    return True


class _Mesh:
    """Holders of certificates that renew at half of their life, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.time = START
        self.old, self.new = self.authority(), self.authority()
        self.succession = Succession(self.old, self.time, memory=True)
        self.held: dict[tuple[str, str], WorkloadCertificate] = {}

    def authority(self, *roots: x509.Certificate) -> Authority:
        made = Authority.create(now=lambda: self.time)
        return made.trusting(roots)

    def renew(self, node: str, identity: str, ttl: int = 0) -> None:
        authority = self.succession.answering
        key = keys.generate()
        signed = authority.sign(keys.csr(key, identity), identity, ttl)
        certificate = WorkloadCertificate.from_signed(identity, key, signed, self.time)
        self.held[node, identity] = certificate
        self.succession.issued(authority, node, identity, certificate.not_after, self.time)

    def advance(self, in_use: Callable[[str, str], bool] = yes) -> bool:
        return self.succession.advance(self.time, in_use)

    def all_trust_each_other(self) -> None:
        valid = [one for one in self.held.values() if one.not_after > self.time]
        # One of each issuer, against each list of roots: more of the same would say nothing else.
        chains = {one.chain_pem.split(b"-----END CERTIFICATE-----", 1)[1]: one.chain_pem for one in valid}
        for pem in chains.values():
            leaf, *intermediates = x509.load_pem_x509_certificates(pem)
            for roots_pem in {one.roots_pem for one in valid}:
                roots = x509.load_pem_x509_certificates(roots_pem)
                chain.verify(leaf, intermediates, roots, self.time)

    @property
    def signer(self) -> Authority:
        return self.succession.signing


@pytest.fixture
def mesh() -> _Mesh:
    return _Mesh()


def test_three_phases(mesh: _Mesh) -> None:
    old, new, succession = mesh.old, mesh.new, mesh.succession
    for node in ("1", "2"):
        mesh.renew(node, A)
    assert succession.phase == "stable"
    assert not mesh.advance()

    assert succession.want(new, mesh.time)
    assert succession.phase == "distributing"
    assert mesh.signer is old
    assert succession.bundle == [*old.roots, *new.roots], "the root that signs is the first"
    assert succession.answering.root_pem == old.root_pem + new.root_pem
    assert "not got its root yet: 2," in succession.waiting(mesh.time)

    mesh.time += 60
    mesh.renew("1", A)
    mesh.time += 60
    assert not mesh.advance()
    assert "not got its root yet: 1," in succession.waiting(mesh.time)
    mesh.renew("2", A)
    assert not mesh.advance(), "the answer may have been lost, and be asked for again"
    assert "settling for another 12s" in succession.waiting(mesh.time)
    mesh.all_trust_each_other()

    mesh.time += 20
    assert mesh.advance()
    assert mesh.signer is new
    assert succession.phase == "retiring"
    assert succession.bundle == [*new.roots, *old.roots], "another order is another file: proxies ask again"
    assert "of the old authority: 2," in succession.retiring(mesh.time)
    mesh.renew("1", A)
    mesh.all_trust_each_other()
    mesh.renew("2", A)
    mesh.all_trust_each_other()

    assert mesh.advance()
    assert succession.phase == "stable"
    assert succession.bundle == list(new.roots)
    assert succession.answering.root_pem == new.root_pem
    mesh.all_trust_each_other()


def test_those_who_do_not_renew_are_waited_for_until_their_certificates_end(mesh: _Mesh) -> None:
    mesh.renew("1", A, 4 * 3600)
    mesh.renew("2", B, 2 * 3600)
    mesh.succession.want(mesh.new, mesh.time)
    mesh.time += 3 * HOUR
    assert not mesh.advance()
    mesh.time += 1.1 * HOUR
    assert mesh.advance()
    assert mesh.signer is mesh.new
    # Nothing of the old authority is left either.
    assert mesh.succession.bundle == list(mesh.new.roots)


def test_those_whose_pods_are_gone_are_not_waited_for(mesh: _Mesh) -> None:
    mesh.renew("1", A)
    mesh.succession.want(mesh.new, mesh.time)
    mesh.time += 30
    assert not mesh.advance()
    mesh.time += 5
    assert mesh.advance(lambda node, identity: (node, identity) != ("1", A))
    assert mesh.signer is mesh.new


def test_without_memory_the_longest_life_decides(mesh: _Mesh) -> None:
    succession = Succession(mesh.old, mesh.time)
    succession.want(mesh.new, mesh.time)
    most = mesh.old.lifetimes.most
    for passed, signer in ((60, mesh.old), (most - 1, mesh.old), (most + 21, mesh.new)):
        succession.advance(START + passed, yes)
        assert succession.signing is signer
    assert succession.phase == "stable"


def test_another_intermediate_of_the_same_root_signs_at_once(mesh: _Mesh) -> None:
    mesh.renew("1", A)
    root_key = keys.generate()
    root = templates.make_root(root_key, START)

    def under_root() -> Authority:
        key = keys.generate()
        certificate = templates.make_intermediate(key, root_key, root, START)
        return Authority(key, certificate, (), (root,), now=lambda: mesh.time)

    first, second = under_root(), under_root()
    succession = Succession(first, mesh.time)
    succession.want(second, mesh.time)
    assert succession.signing is second
    assert succession.phase == "stable"


def test_the_steps_that_istio_documents(mesh: _Mesh) -> None:
    """Both roots beside the old signer, then the new signer, then the new root alone: each file taken literally."""
    succession = mesh.succession
    mesh.renew("1", A)
    assert succession.want(mesh.old.trusting(mesh.new.roots), mesh.time)
    assert succession.phase == "stable"
    mesh.time += HOUR
    mesh.renew("1", A)
    mesh.time += HOUR
    assert succession.want(mesh.new.trusting(mesh.old.roots), mesh.time)
    assert mesh.signer.certificate == mesh.new.certificate, "all know its root since an hour"
    mesh.all_trust_each_other()
    # Too early: the proxy's certificate is the old authority's still.
    assert succession.want(mesh.new, mesh.time)
    assert succession.bundle == [*mesh.new.roots, *mesh.old.roots]
    mesh.renew("1", A)
    mesh.advance()
    assert succession.bundle == list(mesh.new.roots)


def test_a_change_of_mind(mesh: _Mesh) -> None:
    mesh.renew("1", A)
    mesh.succession.want(mesh.new, mesh.time)
    mesh.renew("1", A)
    assert mesh.succession.want(mesh.old, mesh.time)
    assert mesh.succession.phase == "stable"
    assert mesh.succession.bundle == list(mesh.old.roots)


def test_an_authority_that_has_ended_is_replaced_at_once(mesh: _Mesh) -> None:
    mesh.renew("1", A)
    mesh.time = mesh.old.not_after - 30
    new = mesh.authority()
    mesh.succession.want(new, mesh.time)
    mesh.advance()
    assert mesh.signer is new


def test_a_restart_in_any_phase_goes_on(mesh: _Mesh) -> None:
    for node in ("1", "2"):
        mesh.renew(node, A)
    mesh.succession.want(mesh.new, mesh.time)
    mesh.time += 60
    mesh.renew("1", A)

    def restart(signing: Authority, *, complete: bool) -> None:
        dumped = json.loads(json.dumps(mesh.succession.dump(complete=complete)))
        mesh.succession = Succession.restore(signing, dumped, mesh.time)
        mesh.succession.want(mesh.new, mesh.time)
        mesh.advance()

    restart(mesh.old, complete=True)
    assert mesh.succession.bundle == [*mesh.old.roots, *mesh.new.roots]
    assert "not got its root yet: 1," in mesh.succession.waiting(mesh.time)
    mesh.renew("2", A)
    mesh.time += 30
    mesh.advance()
    assert mesh.signer is mesh.new
    restart(mesh.new, complete=True)
    assert mesh.succession.phase == "retiring"
    mesh.renew("1", A)
    restart(mesh.new, complete=False)  # killed: nobody knows that "2" still has an old certificate
    mesh.renew("1", A)
    mesh.time += 86000
    mesh.advance()
    mesh.all_trust_each_other()
    mesh.time += 2 * DAY
    mesh.advance()
    assert mesh.succession.phase == "stable"


@pytest.mark.parametrize(
    "dumped", [{}, {"roots": 1}, {"roots": [], "issued": [[1]], "unknown_until": 0, "most": 1}]
)
def test_a_dump_that_is_none(dumped: dict[str, object], mesh: _Mesh) -> None:
    with pytest.raises(ValueError, match=r"dump|unpack"):
        Succession.restore(mesh.old, dumped, START)


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_all_trust_each_other(seed: int, mesh: _Mesh) -> None:
    """Weeks of renewals, authorities that change whenever they like, restarts with and without memory."""
    rng = random.Random(seed)
    holders = [(str(node), identity) for node in range(4) for identity in (A, B)]
    due = {holder: START + rng.uniform(0, 100) for holder in holders}
    wanted, switches = mesh.old, 0
    for _ in range(900):
        mesh.time += rng.uniform(60, 3600)
        for holder in holders:
            if due[holder] <= mesh.time:
                mesh.renew(*holder, ttl=rng.choice((0, 7200, 172800)))
                left = mesh.held[holder].not_after - mesh.time
                due[holder] = mesh.time + left * rng.uniform(0.45, 0.55)
        what = rng.random()
        if what < 0.02:
            wanted = mesh.authority()
            mesh.succession.want(wanted, mesh.time)
        elif what < 0.05:
            dumped = json.loads(json.dumps(mesh.succession.dump(complete=what < 0.035)))
            mesh.succession = Succession.restore(mesh.signer, dumped, mesh.time)
            mesh.succession.want(wanted, mesh.time)
        before = mesh.signer
        mesh.advance()
        switches += mesh.signer is not before
        mesh.all_trust_each_other()
    assert switches >= 2
    assert len(mesh.succession.roots) <= 3


def test_lifetimes_that_were_longer_before_a_restart_count() -> None:
    now = time.time()
    long = Authority.create(lifetimes=Lifetimes(default=100, most=200_000))
    dumped = Succession(long, now).dump(complete=False)
    short = Authority(long.key, long.certificate, (), long.roots, lifetimes=Lifetimes(default=100, most=1000))
    restored = Succession.restore(short, dumped, now)
    restored.want(Authority.create(), now)
    restored.advance(now + 199_000, yes)
    assert restored.signing is short
