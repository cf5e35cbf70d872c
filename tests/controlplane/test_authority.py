"""The authority's files followed while it serves: changes of the root, revocation lists, mistakes, a full disk."""

import errno
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import trio
from cryptography import x509

from tests.controlplane.objects import pod
from tests.controlplane.process import ControlPlane, until
from ztunnel.controlplane.authority import AuthorityKeeper
from ztunnel.identity import ca_files, crl, keys
from ztunnel.identity.ca import Authority, pem
from ztunnel.identity.errors import AuthorityError

REVIEWS = "spiffe://cluster.local/ns/shop/sa/reviews"


def runs(_node: str, _identity: str) -> bool:
    return True


async def look(keeper: AuthorityKeeper) -> None:
    """Two looks: a changed file is read once it rested between two."""
    for _ in range(2):
        await keeper.check(runs)


def openssl(*arguments: str | Path, cwd: Path) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def make_with_openssl(directory: Path, name: str, days: int = 2) -> Path:
    """A root and an issuer as the well-known examples make them; the directory in the names that Istio gives."""
    made = directory / name
    made.mkdir(mode=0o700)
    for file in ("ca.key", "issuer.key"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", file, cwd=made)
    openssl(
        *("req", "-x509", "-new", "-key", "ca.key", "-sha256", "-days", "3650", "-out", "ca.crt"),
        *(
            "-subj",
            f"/CN=root.{name}.cluster.local",
            "-addext",
            "basicConstraints=critical,CA:TRUE,pathlen:1",
        ),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        cwd=made,
    )
    openssl(
        "req", "-new", "-key", "issuer.key", "-subj", f"/CN=identity.{name}", "-out", "issuer.csr", cwd=made
    )
    (made / "extensions").write_text(
        "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    openssl(
        *("x509", "-req", "-in", "issuer.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-set_serial", "4711"),
        *("-days", str(days), "-sha256", "-extfile", "extensions", "-out", "issuer.crt"),
        cwd=made,
    )
    return made


def install(made: Path, directory: Path) -> None:
    """Give the control plane the authority that was made: the names that Istio's cacerts has."""
    directory.mkdir(mode=0o700, exist_ok=True)
    (directory / "root-key.pem").unlink(missing_ok=True)
    for source, target in (
        ("issuer.crt", "ca-cert.pem"),
        ("issuer.key", "ca-key.pem"),
        ("ca.crt", "root-cert.pem"),
    ):
        shutil.copy(made / source, directory / target)
        if "key" in target:
            (directory / target).chmod(0o600)


def revoke_issuer(made: Path, *, seconds: int = 86400) -> bytes:
    """A revocation list of the root's that revokes the issuer."""
    (made / "index.txt").write_text("")
    (made / "crlnumber").write_text("01\n")
    (made / "config").write_text(
        "[ca]\ndefault_ca=x\n[x]\ndatabase=index.txt\ncrlnumber=crlnumber\ndefault_md=sha256\n"
        f"default_crl_days={seconds / 86400}\n"
    )
    common = ("ca", "-config", "config", "-cert", "ca.crt", "-keyfile", "ca.key")
    openssl(*common, "-revoke", "issuer.crt", cwd=made)
    openssl(*common, "-gencrl", "-crlsec", str(seconds), "-out", "crl.pem", cwd=made)
    return (made / "crl.pem").read_bytes()


async def test_an_operators_authority_made_with_openssl_is_taken_and_followed(tmp_path: Path) -> None:
    first, second = make_with_openssl(tmp_path, "first"), make_with_openssl(tmp_path, "second")
    directory = tmp_path / "ca"
    install(first, directory)
    keeper = AuthorityKeeper(directory, settle=0)
    published = directory / "published" / "root-cert.pem"
    assert published.read_bytes() == pem(x509.load_pem_x509_certificates((first / "ca.crt").read_bytes()))
    before = keeper.authority
    csr = keys.csr(keys.generate(), REVIEWS)
    assert len(before.sign(csr, REVIEWS)) == 3

    keeper.succession.unknown_until = 0.0  # as after two days
    install(second, directory)
    await look(keeper)
    # Both roots are told, and the next look finds nobody who would need them for long.
    both = x509.load_pem_x509_certificates(published.read_bytes())
    assert [one.subject.rfc4514_string() for one in both][-1:] == ["CN=root.second.cluster.local"] or len(
        both
    ) == 1
    await look(keeper)
    assert published.read_bytes() == pem(x509.load_pem_x509_certificates((second / "ca.crt").read_bytes()))
    assert keeper.authority.certificate != before.certificate
    assert keeper.status()["phase"] == "stable"


async def test_a_change_of_the_root_waits_for_the_proxies(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    keeper = AuthorityKeeper(directory, settle=0)
    old = keeper.authority
    published = directory / "published" / "root-cert.pem"
    told: list[int] = []
    keeper.on_change(lambda: told.append(len(keeper.succession.roots)))
    keeper.issued(old, "node-1", REVIEWS, time.time() + 3600)
    ca_files.renew_root(directory, time.time())
    await look(keeper)
    assert keeper.status()["phase"] == "distributing"
    assert "not got its root yet: 1," in keeper.status()["waiting"]
    assert keeper.authority.certificate == old.certificate
    assert len(x509.load_pem_x509_certificates(published.read_bytes())) == 2
    first_of_both = published.read_bytes()

    # A restart in between: the old key is in the state file, and nowhere else.
    state = directory / "signing-state.json"
    assert state.stat().st_mode & 0o777 == 0o600
    keeper._write(complete=True)
    keeper = AuthorityKeeper(directory, settle=0)
    assert keeper.authority.certificate == old.certificate
    keeper.issued(keeper.authority, "node-1", REVIEWS, time.time() + 3600)
    await keeper.check(runs)
    assert keeper.status()["phase"] == "retiring"
    assert keeper.authority.certificate != old.certificate
    assert sorted(published.read_bytes().split(b"-----BEGIN")) == sorted(first_of_both.split(b"-----BEGIN"))
    assert published.read_bytes() != first_of_both, "proxies see another file and ask again"
    keeper.issued(keeper.authority, "node-1", REVIEWS, time.time() + 3600)
    await keeper.check(runs)
    assert keeper.status()["phase"] == "stable"
    assert published.read_bytes() == (directory / "root-cert.pem").read_bytes()
    assert pem(old.roots) not in published.read_bytes()
    assert told == [2]


async def test_files_that_were_replaced_while_it_did_not_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make_with_openssl(tmp_path, "first"), make_with_openssl(tmp_path, "second")
    directory = tmp_path / "ca"
    install(first, directory)
    old = AuthorityKeeper(directory).authority
    install(second, directory)
    keeper = AuthorityKeeper(directory)
    status = keeper.status()
    assert status["phase"] == "distributing"
    assert keeper.authority.certificate == old.certificate, "nobody knows the new root yet"
    assert [one["subject"] for one in status["roots"]] == [
        "CN=root.first.cluster.local",
        "CN=root.second.cluster.local",
    ]
    assert "may be in use until" in status["waiting"], "it does not know who has a certificate"

    # Without its memory it can only do what the files say.
    (directory / "signing-state.json").write_text("{}")
    keeper = AuthorityKeeper(directory)
    assert keeper.status()["phase"] == "stable"
    assert keeper.authority.certificate != old.certificate
    assert "signing-state.json: not used: KeyError" in caplog.text


async def test_half_of_a_change_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "ca"
    keeper = AuthorityKeeper(directory)
    before = keeper.authority
    other = make_with_openssl(tmp_path, "other")
    shutil.copy(other / "issuer.crt", directory / "ca-cert.pem")
    await look(keeper)
    assert keeper.authority is before
    assert "its key is another one" in keeper.status()["problems"][0]
    assert "what signed until now goes on" in caplog.text
    for name in ("ca-cert.pem", "ca-key.pem", "root-cert.pem", "root-key.pem"):
        (directory / name).unlink()
    await look(keeper)
    assert keeper.authority is before, "an emptied directory is no order to make another authority"
    assert not (directory / "ca-cert.pem").exists()
    assert "is missing" in keeper.status()["problems"][0]
    install(other, directory)
    await look(keeper)
    assert keeper.status()["problems"] == []
    assert keeper.status()["phase"] == "distributing"


async def test_an_own_intermediate_is_renewed_while_it_serves(tmp_path: Path) -> None:
    """At half of its life, and at once where a clock that stepped forward finds it over."""
    began = time.time()
    now = [began]
    keeper = AuthorityKeeper(tmp_path / "ca", now=lambda: now[0])
    root = keeper.authority.roots
    for passed in (200, 800):
        before = keeper.authority
        now[0] = began + passed * 86400
        await look(keeper)
        assert keeper.authority.certificate != before.certificate
        assert keeper.authority.not_after > now[0] + 364 * 86400
        keeper.authority.sign(keys.csr(keys.generate(), REVIEWS), REVIEWS)
        assert keeper.authority.roots == root
        assert keeper.status()["phase"] == "stable"
    now[0] = began  # and back: what is valid only later is not signed with, but nothing breaks
    await look(keeper)
    assert "clock" in keeper.status()["problems"][0]
    with pytest.raises(AuthorityError, match=r"valid only from .* clock"):
        keeper.authority.sign(keys.csr(keys.generate(), REVIEWS), REVIEWS)
    now[0] = began + 801 * 86400
    await look(keeper)
    assert keeper.status()["problems"] == []


async def test_revocation_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, foreign = make_with_openssl(tmp_path, "made"), make_with_openssl(tmp_path, "foreign")
    directory = tmp_path / "ca"
    install(made, directory)
    keeper = AuthorityKeeper(directory)
    source, published = directory / "ca-crl.pem", directory / "published" / "ca-crl.pem"
    assert published.read_bytes() == b"", "there is always a file: nothing is revoked"

    revoked = revoke_issuer(made)
    source.write_bytes(revoked)
    await look(keeper)
    assert published.read_bytes() == revoked
    (described,) = keeper.status()["revocations"]
    assert (described["issuer"], described["revoked"]) == ("CN=root.made.cluster.local", 1)
    own_goal = "'CN=identity.made', which signs or is above what signs, is revoked"
    assert own_goal in keeper.status()["problems"][0]
    assert own_goal in caplog.text

    for wrong, complaint in (
        (b"nonsense", "no revocation list in PEM"),
        (revoked.replace(b"-----END", b"#"), "its end is missing"),
        (revoke_issuer(foreign), "by none of the mesh's certificate authorities"),
    ):
        source.write_bytes(wrong)
        await look(keeper)
        assert published.read_bytes() == revoked
        assert complaint in keeper.status()["problems"][0]
        assert complaint in caplog.text
        # The last good one survives a restart, too.
        assert AuthorityKeeper(directory).revocations == revoked
    source.unlink()
    await look(keeper)
    assert published.read_bytes() == revoked
    source.write_bytes(b"")
    await look(keeper)
    assert published.read_bytes() == b""
    assert keeper.status()["problems"] == []

    source.write_bytes(b"nonsense")
    with pytest.raises(AuthorityError, match=r"ca-crl\.pem: no revocation list .* empty file"):
        AuthorityKeeper(directory)


def test_a_full_disk_at_the_first_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    full = True

    def fsync(fd: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(AuthorityError, match=r"certificate authority in .*/ca: .*No space left"):
        AuthorityKeeper(tmp_path / "ca")
    assert [file.name for file in (tmp_path / "ca").iterdir()] == [], "half a file would not help"
    full = False
    AuthorityKeeper(tmp_path / "ca")


async def test_a_full_disk_later_stops_no_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "ca"
    keeper = AuthorityKeeper(directory, settle=0)
    csr = keys.csr(keys.generate(), REVIEWS)
    ca_files.renew_root(directory, time.time())
    published = directory / "published" / "root-cert.pem"
    before = published.read_bytes()
    real = ca_files.write

    def write(path: Path, data: bytes, mode: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ca_files, "write", write)
    await look(keeper)
    keeper.authority.sign(csr, REVIEWS)
    assert published.read_bytes() == before
    assert "No space left on device; what signed until now goes on" in caplog.text
    monkeypatch.setattr(ca_files, "write", real)
    await keeper.check(runs)
    assert published.read_bytes() != before, "written as soon as there is room"


async def test_the_process_goes_over_to_another_root(stopped: ControlPlane) -> None:
    """Over the wire: both roots come with certificates, and the server's own certificate follows."""
    stopped.apply(pod("reviews-1", "10.244.1.2", namespace="shop", account="reviews", node="node-1"))
    await stopped.start()

    async def fetch() -> list[str]:
        return await stopped.create_certificate(keys.csr(keys.generate(), REVIEWS), REVIEWS)

    before = await fetch()
    old_root = stopped.root_ca.read_bytes()
    await trio.to_thread.run_sync(ca_files.renew_root, stopped.directory / "ca", time.time())
    await until(lambda: stopped.root_ca.read_bytes() != old_root, "both roots are published")
    during = await fetch()
    assert during[1] == before[1], "the old one signs still"
    assert during[-1].encode() == stopped.root_ca.read_bytes()
    assert during[-1].count("BEGIN") == 2
    assert await stopped.stop() == 0
    await stopped.start()
    assert (
        json.loads((stopped.directory / "ca" / "signing-state.json").read_text())["succession"]["issued"]
        is None
    )
    again = await fetch()
    assert again[1] == before[1]
    assert (await stopped.logged(message="the certificate authority changes"))["phase"] == "distributing"


def test_lists_in_der_and_several_in_one_file(tmp_path: Path) -> None:
    made = make_with_openssl(tmp_path, "made")
    one = revoke_issuer(made)
    openssl("crl", "-in", "crl.pem", "-outform", "DER", "-out", "crl.der", cwd=made)
    assert crl.parse(crl.read(made / "crl.der")) == crl.parse(one)
    both = tmp_path / "both"
    both.write_bytes(b"a comment\n" + one + b"\n" + one)
    assert len(crl.parse(crl.read(both))) == 2
    crl.check(
        crl.parse(one),
        [Authority.create().certificate, *x509.load_pem_x509_certificates((made / "ca.crt").read_bytes())],
    )
