"""The authority on disk: made once whatever happens, with private modes, and an operator's own files."""

import json
import logging
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from ztunnel.identity import chain, keys, templates, testing
from ztunnel.identity.ca import Authority
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import AuthorityError

DAY = 86400.0
FILES = ["ca-cert.pem", "ca-key.pem", "root-cert.pem", "root-key.pem"]


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def _save(path: Path, *certificates: x509.Certificate) -> Path:
    path.write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in certificates))
    return path


def _save_key(path: Path, key: keys.PrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return path


class _Operator:
    """An operator's root and signing authority, in files of their own naming."""

    def __init__(self, directory: Path, *, now: float | None = None) -> None:
        self.now = time.time() if now is None else now
        self.root_key, self.key = keys.generate(), keys.generate()
        self.root = templates.make_root(self.root_key, self.now)
        self.certificate = templates.make_intermediate(self.key, self.root_key, self.root, self.now)
        directory.mkdir(mode=0o700, exist_ok=True)
        self.root_file = _save(directory / "root-cert.pem", self.root)
        self.cert_file = _save(directory / "ca-cert.pem", self.certificate)
        self.key_file = _save_key(directory / "ca-key.pem", self.key)


def _works(authority: Authority) -> WorkloadCertificate:
    return testing.workload(authority)


def test_made_at_the_first_start_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "ca"
    first = Authority.load_or_create(directory)
    assert sorted(_contents(directory)) == FILES
    assert _mode(directory) == 0o700
    assert {name: _mode(directory / name) for name in FILES if "key" in name} == {
        "ca-key.pem": 0o600,
        "root-key.pem": 0o600,
    }
    before = _contents(directory)
    second = Authority.load_or_create(directory)
    assert _contents(directory) == before
    assert first.root_pem == second.root_pem == before["root-cert.pem"]
    assert _works(first).roots_pem == _works(second).roots_pem


def test_private_at_every_moment_and_whole_after_a_kill_at_any(tmp_path: Path) -> None:
    points = _crashes(tmp_path)
    assert points >= 4 * 4  # four files: open, write and sync, rename, sync of the directory


def test_a_kill_during_the_renewal_of_the_intermediate_loses_nothing(tmp_path: Path) -> None:
    assert _crashes(tmp_path, age=300 * DAY) >= 4


def test_a_kill_during_the_replacement_of_the_root_leaves_an_authority(tmp_path: Path) -> None:
    assert _crashes(tmp_path, 1.0, "rotate") >= 4 * 4


def _crashes(directory: Path, age: float = 0.0, *more: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "tests.identity.ca_crashes", str(directory), str(age), *more],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    assert isinstance(points, int)
    return points


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom ztunnel.identity.ca import Authority\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "authority = Authority.load_or_create(Path(sys.argv[1]))\n"
        "sys.stdout.write(authority.root_pem.decode())\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "ca")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(4)
    ]
    for one in started:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    answers = []
    for one in started:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    for one in started:
        answers.append(one.communicate(timeout=60)[0])
        assert one.returncode == 0
    assert set(answers) == {(tmp_path / "ca" / "root-cert.pem").read_text()}


def test_modes_that_let_others_in_are_mended_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "ca"
    Authority.load_or_create(directory)
    directory.chmod(0o755)
    (directory / "ca-key.pem").chmod(0o644)
    (directory / "root-key.pem").chmod(0o640)
    with caplog.at_level(logging.WARNING):
        _works(Authority.load_or_create(directory))
    assert _mode(directory) == 0o700
    assert _mode(directory / "ca-key.pem") == _mode(directory / "root-key.pem") == 0o600
    told = [record.getMessage() for record in caplog.records]
    assert [f"{directory}: mode 0755 let others in; changed to 0700"] == told[:1]
    assert len(told) == 3
    caplog.clear()
    Authority.load_or_create(directory)
    assert not caplog.records


def test_the_intermediate_is_renewed_at_a_start_after_half_of_its_life(tmp_path: Path) -> None:
    start = time.time()
    Authority.load_or_create(tmp_path / "ca", now=lambda: start)
    before = _contents(tmp_path / "ca")

    Authority.load_or_create(tmp_path / "ca", now=lambda: start + 180 * DAY)
    assert _contents(tmp_path / "ca") == before

    for age in (190, 900):  # the second one long after it expired
        authority = Authority.load_or_create(tmp_path / "ca", now=lambda age=age: start + age * DAY)  # type: ignore[misc]
        after = _contents(tmp_path / "ca")
        assert [name for name in FILES if after[name] != before[name]] == ["ca-cert.pem"]
        assert authority.not_after > start + (age + 364) * DAY


def test_an_expired_root_of_our_own_is_told(tmp_path: Path) -> None:
    start = time.time()
    Authority.load_or_create(tmp_path / "ca", now=lambda: start)
    with pytest.raises(AuthorityError, match=r"root-cert\.pem: expired at .* empty .* new authority"):
        Authority.load_or_create(tmp_path / "ca", now=lambda: start + 3651 * DAY)


@pytest.mark.parametrize("lost", ["ca-cert.pem", "ca-key.pem", "root-cert.pem"])
def test_a_lost_file_of_our_own_is_made_again_and_old_certificates_stay_valid(
    lost: str, tmp_path: Path
) -> None:
    old = _works(Authority.load_or_create(tmp_path / "ca"))
    (tmp_path / "ca" / lost).unlink()
    new = _works(Authority.load_or_create(tmp_path / "ca"))
    for one, other in ((old, new), (new, old)):
        certificates = x509.load_pem_x509_certificates(one.chain_pem)
        chain.verify(
            certificates[0],
            certificates[1:],
            x509.load_pem_x509_certificates(other.roots_pem),
            time.time(),
        )


def test_an_operators_root_and_signing_authority(tmp_path: Path) -> None:
    operator = _Operator(tmp_path / "ca")
    before = _contents(tmp_path / "ca")
    authority = Authority.load_or_create(tmp_path / "ca")
    assert _contents(tmp_path / "ca") == before
    chain = x509.load_pem_x509_certificates(_works(authority).chain_pem)
    assert chain[1:] == [operator.certificate]
    same = Authority.from_files(operator.cert_file, operator.key_file, root_cert=operator.root_file)
    assert same.root_pem == authority.root_pem


def test_an_operators_single_signing_authority(tmp_path: Path) -> None:
    key = keys.generate()
    root = templates.make_root(key, time.time())
    directory = tmp_path / "ca"
    directory.mkdir(mode=0o700)
    cert, key_file = _save(directory / "ca-cert.pem", root), _save_key(directory / "ca-key.pem", key)
    for authority in (Authority.from_files(cert, key_file), Authority.load_or_create(directory)):
        assert x509.load_pem_x509_certificates(authority.root_pem) == [root]
        assert len(x509.load_pem_x509_certificates(_works(authority).chain_pem)) == 1
    assert (directory / "root-cert.pem").read_bytes() == cert.read_bytes()


def test_an_operators_chain_with_more_intermediates(tmp_path: Path) -> None:
    root_key, middle_key, key = keys.generate(), keys.generate(), keys.generate()
    now = time.time()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "long root")])
    root = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(root_key.public_key())
        .serial_number(1)
        .not_valid_before(templates.utc(now - 60))
        .not_valid_after(templates.utc(now + 3600))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(root_key, templates.hash_for(root_key.public_key()))
    )
    middle_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "middle")])
    middle = (
        x509.CertificateBuilder()
        .subject_name(middle_name)
        .issuer_name(name)
        .public_key(middle_key.public_key())
        .serial_number(2)
        .not_valid_before(templates.utc(now - 60))
        .not_valid_after(templates.utc(now + 1800))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(root_key, templates.hash_for(root_key.public_key()))
    )
    signing = templates.make_intermediate(key, middle_key, middle, now)
    key_file, root_file = _save_key(tmp_path / "key", key), _save(tmp_path / "root", root)
    alone = _save(tmp_path / "alone", signing)
    with pytest.raises(AuthorityError, match=r"alone: does not chain to the root.*cert-chain\.pem"):
        Authority.from_files(alone, key_file, root_cert=root_file)
    for cert, chain_file in (
        (alone, _save(tmp_path / "chain", signing, middle, root)),
        (alone, _save(tmp_path / "chain2", middle)),
        (_save(tmp_path / "all", signing, middle, root), None),
    ):
        authority = Authority.from_files(cert, key_file, root_cert=root_file, cert_chain=chain_file)
        issued = _works(authority)
        assert x509.load_pem_x509_certificates(issued.chain_pem)[1:] == [signing, middle]
        assert x509.load_pem_x509_certificates(issued.roots_pem) == [root]
        assert authority.not_after <= now + 1800
    directory = tmp_path / "ca"
    directory.mkdir(mode=0o700)
    for file, source in (("root-cert.pem", "root"), ("ca-cert.pem", "alone"), ("cert-chain.pem", "chain2")):
        (directory / file).write_bytes((tmp_path / source).read_bytes())
    _save_key(directory / "ca-key.pem", key)
    issued = _works(Authority.load_or_create(directory))
    assert x509.load_pem_x509_certificates(issued.chain_pem)[1:] == [signing, middle]


def test_an_operators_rsa_authority(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    root = templates.make_root(key, time.time())
    authority = Authority.from_files(_save(tmp_path / "c", root), _save_key(tmp_path / "k", key))
    assert _works(authority)


def test_an_operators_files_that_do_not_fit(tmp_path: Path) -> None:
    operator, other = _Operator(tmp_path / "a"), _Operator(tmp_path / "b")
    now = time.time()
    leaf = testing.workload(
        Authority.from_files(operator.cert_file, operator.key_file, root_cert=operator.root_file)
    )
    (tmp_path / "leaf").write_bytes(leaf.chain_pem)
    (tmp_path / "leaf-key").write_bytes(leaf.key_pem)
    (tmp_path / "leaf-key").chmod(0o600)
    expired = _Operator(tmp_path / "c", now=now - 400 * DAY)
    early = _Operator(tmp_path / "d", now=now + 400 * DAY)
    (tmp_path / "empty").touch()
    encrypted = tmp_path / "encrypted"
    encrypted.write_bytes(
        operator.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    wrong_kind = _save_key(tmp_path / "ed25519", ed25519.Ed25519PrivateKey.generate())

    def refused(complaint: str, cert: Path, key: Path, root: Path | None) -> None:
        with pytest.raises(AuthorityError, match=complaint):
            Authority.from_files(cert, key, root_cert=root)

    refused(r"ca-cert\.pem: its key is another one", operator.cert_file, other.key_file, operator.root_file)
    refused("leaf: not a certificate authority", tmp_path / "leaf", tmp_path / "leaf-key", operator.root_file)
    refused("expired at", expired.cert_file, expired.key_file, expired.root_file)
    refused("valid only from .* clock", early.cert_file, early.key_file, early.root_file)
    refused("does not chain to the root", operator.cert_file, operator.key_file, other.root_file)
    refused("issued by .* not by itself; .*root's", operator.cert_file, operator.key_file, None)
    refused("missing: No such file", tmp_path / "missing", operator.key_file, None)
    refused("missing: No such file", operator.cert_file, tmp_path / "missing", operator.root_file)
    refused("empty: no PEM certificate", tmp_path / "empty", operator.key_file, operator.root_file)
    refused("empty: no PEM private key", operator.cert_file, tmp_path / "empty", operator.root_file)
    refused("empty: no PEM certificate", operator.cert_file, operator.key_file, tmp_path / "empty")
    refused("encrypted: the key is encrypted", operator.cert_file, encrypted, operator.root_file)
    refused("ed25519: neither", operator.cert_file, wrong_kind, operator.root_file)


@pytest.mark.parametrize(
    ("present", "complaint"),
    [
        (["root-cert.pem"], r"there is root-cert\.pem but not ca-cert\.pem, ca-key\.pem"),
        (["root-cert.pem", "ca-cert.pem"], r"but not ca-key\.pem"),
        (["ca-key.pem"], r"but not ca-cert\.pem"),
        (["ca-cert.pem", "ca-key.pem"], "not by itself"),
    ],
)
def test_half_of_an_operators_files_is_no_reason_to_make_others(
    present: list[str], complaint: str, tmp_path: Path
) -> None:
    _Operator(tmp_path / "ca")
    for file in (tmp_path / "ca").iterdir():
        if file.name not in present:
            file.unlink()
    before = _contents(tmp_path / "ca")
    with pytest.raises(AuthorityError, match=complaint):
        Authority.load_or_create(tmp_path / "ca")
    assert _contents(tmp_path / "ca") == before


def test_mixed_up_files_of_our_own_are_told_and_left_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Authority.load_or_create(tmp_path / name)
    for mixed, complaint in (
        ("ca-key.pem", "its key is another one"),
        ("root-key.pem", r"root-cert\.pem: belongs to another key"),
    ):
        directory = tmp_path / f"mixed-{mixed}"
        directory.mkdir(mode=0o700)
        for file in FILES:
            source = tmp_path / ("b" if file == mixed else "a") / file
            (directory / file).write_bytes(source.read_bytes())
            (directory / file).chmod(0o600)
        before = _contents(directory)
        with pytest.raises(AuthorityError, match=complaint):
            Authority.load_or_create(directory)
        assert _contents(directory) == before


def test_a_key_that_others_can_read_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    operator = _Operator(tmp_path / "ca")
    operator.key_file.chmod(0o644)
    with caplog.at_level(logging.DEBUG):
        Authority.from_files(operator.cert_file, operator.key_file, root_cert=operator.root_file)
    assert f"{operator.key_file}: a private key that others may access (mode 0644)" in caplog.text
    assert _mode(operator.key_file) == 0o644, "an operator's file is theirs"
    assert operator.key_file.read_text().splitlines()[1] not in caplog.text


def test_a_path_that_is_no_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AuthorityError, match=f"certificate authority in {tmp_path}/file"):
        Authority.load_or_create(tmp_path / "file")


def test_a_repr_shows_no_key(tmp_path: Path) -> None:
    authority = Authority.load_or_create(tmp_path / "ca")
    secret = (tmp_path / "ca" / "ca-key.pem").read_text().splitlines()[1]
    assert repr(authority).startswith("<Authority ")
    assert secret not in repr(authority) + repr(authority.server_certificate(["localhost"]))
    assert os.fsencode(secret) not in authority.root_pem


def test_a_p384_authority_signs_with_its_own_hash(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    root = templates.make_root(key, time.time())
    authority = Authority.from_files(_save(tmp_path / "c", root), _save_key(tmp_path / "k", key))
    leaf = x509.load_pem_x509_certificate(_works(authority).chain_pem)
    assert leaf.signature_hash_algorithm is not None
    assert leaf.signature_hash_algorithm.name == "sha384"
