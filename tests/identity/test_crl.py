"""Revocation lists: what they refuse in handshakes and in chains verified before, and the file that is followed."""

import logging
import time
from pathlib import Path

import pytest
import trio
from cryptography import x509
from OpenSSL import crypto

from ztunnel.identity import crl, keys, templates, testing, tls
from ztunnel.identity.ca import Authority
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import CertificateError, HandshakeError, RevokedError
from ztunnel.identity.revocations import Revocations, follow


class _Ca:
    """A root, whose key is here, and an authority below it."""

    def __init__(self) -> None:
        self.root_key, self.key = keys.generate(), keys.generate()
        now = time.time()
        self.root = templates.make_root(self.root_key, now)
        self.intermediate = templates.make_intermediate(self.key, self.root_key, self.root, now)
        self.authority = Authority(self.key, self.intermediate, (), (self.root,))

    def of_root(self, *revoked: x509.Certificate, ends: float = 3600) -> bytes:
        return testing.revoke(self.authority, revoked, key=self.root_key, issuer=self.root, ends=ends)

    def of_intermediate(self, *revoked: WorkloadCertificate, ends: float = 3600) -> bytes:
        return testing.revoke(self.authority, revoked, ends=ends)


@pytest.fixture(scope="module")
def ca() -> _Ca:
    return _Ca()


@pytest.fixture(scope="module")
def client(ca: _Ca) -> WorkloadCertificate:
    return testing.workload(ca.authority, testing.CLIENT)


@pytest.fixture(scope="module")
def server(ca: _Ca) -> WorkloadCertificate:
    return testing.workload(ca.authority, testing.SERVER)


def handshake(client: WorkloadCertificate, server: WorkloadCertificate, lists: bytes) -> None:
    """With the lists on the server's side only."""
    testing.handshake(tls.mesh_context(client), tls.mesh_context(server, crl.parse(lists)))


@pytest.mark.parametrize("ends", [3600, -60], ids=["in force", "past its time"])
def test_a_revoked_leaf_and_a_revoked_intermediate(
    ca: _Ca, client: WorkloadCertificate, server: WorkloadCertificate, ends: float
) -> None:
    nobody = (ca.of_root(ends=ends), ca.of_intermediate(ends=ends))
    for harmless in (b"", *nobody, b"".join(nobody), ca.of_intermediate(server, ends=ends)):
        handshake(client, server, harmless)
    leaf = ca.of_intermediate(client, ends=ends)
    intermediate = ca.of_root(ca.intermediate, ends=ends)
    for lists, depth in ((leaf, 0), (leaf + nobody[0], 0), (intermediate, 1), (intermediate + nobody[1], 1)):
        with pytest.raises(RevokedError, match=rf"depth {depth}\) was refused: it is revoked"):
            handshake(client, server, lists)
    # The client hears why, and says so.
    attempt = testing.attempt(tls.mesh_context(client), tls.mesh_context(server, crl.parse(leaf)))
    assert attempt.client_error is not None
    told = tls.handshake_error(attempt.client, attempt.client_error)
    assert isinstance(told, RevokedError)
    assert "the peer found our certificate, or one of its authorities, revoked" in str(told)


def test_a_client_judges_servers_too(
    ca: _Ca, client: WorkloadCertificate, server: WorkloadCertificate
) -> None:
    with pytest.raises(RevokedError, match=r"sa/server' .*it is revoked"):
        testing.handshake(
            tls.mesh_context(client, crl.parse(ca.of_intermediate(server))), tls.mesh_context(server)
        )


def test_a_list_with_a_forged_signature_lets_nobody_in(
    ca: _Ca, client: WorkloadCertificate, server: WorkloadCertificate
) -> None:
    forged = testing.revoke(ca.authority, [], key=keys.generate())
    with pytest.raises(HandshakeError, match="revocation list has a signature that does not verify"):
        handshake(client, server, forged)
    with pytest.raises(CertificateError, match="is not signed by it"):
        crl.check(crl.parse(forged), [ca.intermediate])


def test_a_chain_that_was_verified_before(ca: _Ca, client: WorkloadCertificate) -> None:
    chain = [
        crypto.X509.from_cryptography(one)
        for one in (*x509.load_pem_x509_certificates(client.chain_pem), ca.root)
    ]
    serial = f"serial {x509.load_pem_x509_certificate(client.chain_pem).serial_number:x}"
    for lists, expected in (
        (b"", ""),
        (ca.of_root() + ca.of_intermediate(), ""),
        (ca.of_intermediate(client), serial),
        (ca.of_intermediate(client, ends=-60), serial),
        (ca.of_root(ca.intermediate), "CN=Intermediate CA,O=ambient mesh"),
    ):
        assert crl.revoked(chain, [ca.root], crl.parse(lists)) == expected


def test_a_proxy_that_is_told_of_a_list_starts_only_with_it(ca: _Ca, tmp_path: Path) -> None:
    assert Revocations(None).status() is None
    path = tmp_path / "crl.pem"
    for content, complaint in (
        (None, "No such file"),
        (b"nonsense", "no revocation list in PEM"),
        (b"x" * (crl.MAX_SIZE + 1), "more than"),
        (b"0nonsense", "that can be read"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CertificateError, match=rf"CRL_PATH: {path}: .*{complaint}.*; an empty file says"):
            Revocations(path)
    path.write_bytes(b"")
    assert Revocations(path).pem == b""


async def test_the_last_good_list_stays(
    ca: _Ca, client: WorkloadCertificate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "crl.pem"
    first, second = ca.of_intermediate(), ca.of_intermediate(client)
    path.write_bytes(first)
    revocations = Revocations(path)
    told: list[bytes] = []
    await revocations.check(told.append)
    assert told == []
    path.write_bytes(second)
    await revocations.check(told.append)
    assert told == [second]
    for broken in (b"nonsense", None):
        path.unlink() if broken is None else path.write_bytes(broken)
        for _ in range(3):
            await revocations.check(told.append)
        assert told == [second]
        status = revocations.status()
        assert status is not None
        assert "the last list stays in force" in status["error"]
        assert status["lists"][0]["revoked"] == 1
    assert caplog.text.count("the last list stays in force") == 2, "told once each"
    old = ca.of_intermediate(client, ends=-60)
    path.write_bytes(old)
    await revocations.check(told.append)
    assert told == [second, old]
    assert "and no other followed; what it revokes stays revoked" in caplog.text


async def test_a_root_file_that_changes_is_told(nursery: trio.Nursery, tmp_path: Path) -> None:
    path = tmp_path / "root-cert.pem"
    path.write_bytes(b"one")
    told: list[bytes] = []
    changed = trio.Event()

    def on_change() -> None:
        told.append(path.read_bytes())
        changed.set()

    nursery.start_soon(follow, path, on_change, 0.01)
    await trio.sleep(0.2)
    path.unlink()
    await trio.sleep(0.2)
    path.write_bytes(b"one")
    await trio.sleep(0.2)
    path.write_bytes(b"two")
    with trio.fail_after(30):
        await changed.wait()
    assert told == [b"two"], "neither its absence nor the same again is news"


def test_a_list_past_its_time_is_told_at_the_start(
    caplog: pytest.LogCaptureFixture, ca: _Ca, tmp_path: Path
) -> None:
    path = tmp_path / "crl.pem"
    path.write_bytes(ca.of_intermediate(ends=-3600))
    with caplog.at_level(logging.WARNING):
        Revocations(path)
    assert "revocation list of CN=Intermediate CA,O=ambient mesh: ended 1h" in caplog.text
