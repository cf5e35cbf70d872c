"""What the authority signs, for whom, for how long; and what it refuses to sign."""

import ipaddress
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL

from ztunnel.identity import keys, testing, tls
from ztunnel.identity.ca import Authority, Lifetimes
from ztunnel.identity.certs import WorkloadCertificate, uri_names
from ztunnel.identity.errors import (
    AuthorityError,
    CsrError,
    HandshakeError,
    PeerCertificateError,
    SpiffeIdError,
)

WEB = "spiffe://cluster.local/ns/shop/sa/web"
HOUR = 3600


def _request(key: CertificateIssuerPrivateKeyTypes, algorithm: hashes.HashAlgorithm | None = None) -> bytes:
    if algorithm is None and not isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm = hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM)  # type: ignore[arg-type]


def _leaf(chain: list[bytes]) -> x509.Certificate:
    return x509.load_pem_x509_certificate(chain[0])


def test_the_leaf_is_an_svid_for_the_authorised_identity(authority: Authority) -> None:
    key = keys.generate()
    chain = authority.sign(keys.csr(key, WEB), WEB)
    assert len(chain) == 3
    assert chain[-1] == authority.root_pem
    leaf = _leaf(chain)
    assert leaf.public_key() == key.public_key()
    assert uri_names(leaf) == [WEB]
    assert leaf.subject == x509.Name([])
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert san.critical
    assert len(list(san.value)) == 1
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    ]
    other = _leaf(authority.sign(keys.csr(key, WEB), WEB))
    assert leaf.serial_number != other.serial_number
    assert leaf.serial_number.bit_length() > 64


def test_nothing_but_the_key_is_taken_from_the_request(authority: Authority) -> None:
    key = keys.generate()
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "istiod.istio-system.svc")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.UniformResourceIdentifier("spiffe://cluster.local/ns/kube-system/sa/admin"),
                    x509.DNSName("istiod.istio-system.svc"),
                ]
            ),
            critical=True,
        )
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    leaf = _leaf(authority.sign(greedy, WEB))
    assert leaf.subject == x509.Name([])
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(san) == [x509.UniformResourceIdentifier(WEB)]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    ("asked", "given"),
    [(0, 24 * HOUR), (60, 60), (HOUR, HOUR), (48 * HOUR, 48 * HOUR)],
)
def test_validity_in_seconds(asked: int, given: int, authority: Authority) -> None:
    before = int(time.time())
    leaf = _leaf(authority.sign(keys.csr(keys.generate(), WEB), WEB, asked))
    after = int(time.time())
    assert before + given <= leaf.not_valid_after_utc.timestamp() <= after + given
    assert before - 120 <= leaf.not_valid_before_utc.timestamp() <= after - 120


def test_more_than_the_most_is_refused(authority: Authority) -> None:
    csr = keys.csr(keys.generate(), WEB)
    with pytest.raises(CsrError, match=r"validity of 48h1s is more than the 48h .* MAX_WORKLOAD_CERT_TTL"):
        authority.sign(csr, WEB, 48 * HOUR + 1)
    brief = Authority.create(lifetimes=Lifetimes(default=60, most=90))
    leaf = _leaf(brief.sign(csr, WEB))
    assert 60 <= leaf.not_valid_after_utc.timestamp() - time.time() + 1 <= 62
    with pytest.raises(CsrError, match="validity of 1m31s"):
        brief.sign(csr, WEB, 91)
    for default, most in ((9, 9), (60, 59)):
        with pytest.raises(ValueError, match="at least 10s, and the default no more than the most"):
            Lifetimes(default, most)


def test_the_default_validity_is_a_day(authority: Authority) -> None:
    leaf = _leaf(authority.sign(keys.csr(keys.generate(), WEB), WEB))
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=1, minutes=2)


def test_never_beyond_the_authoritys_own_end() -> None:
    clock = [time.time()]
    authority = Authority.create(now=lambda: clock[0])
    end = int(authority.not_after)
    clock[0] = end - HOUR
    leaf = _leaf(authority.sign(keys.csr(keys.generate(), WEB), WEB))
    assert leaf.not_valid_after_utc.timestamp() == end
    assert authority.server_certificate(["localhost"]).not_after == end
    for at in (end - 30, end, end + HOUR):
        clock[0] = at
        with pytest.raises(AuthorityError, match="nothing more can be signed; put its successor"):
            authority.sign(keys.csr(keys.generate(), WEB), WEB)
        with pytest.raises(AuthorityError, match="nothing more can be signed"):
            authority.server_certificate(["localhost"])


def test_no_leaf_begins_before_its_authority() -> None:
    authority = Authority.create()
    chain = authority.sign(keys.csr(keys.generate(), WEB), WEB)
    leaf, issuer = (x509.load_pem_x509_certificate(pem) for pem in chain[:2])
    assert leaf.not_valid_before_utc >= issuer.not_valid_before_utc


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-256", "P-384", "RSA 2048"],
)
def test_keys_that_are_certified(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, authority: Authority
) -> None:
    for algorithm in (hashes.SHA256(), hashes.SHA384(), hashes.SHA512()):
        assert _leaf(authority.sign(_request(key, algorithm), WEB)).public_key() == key.public_key()


@pytest.mark.parametrize(
    ("request_pem", "complaint"),
    [
        (_request(ec.generate_private_key(ec.SECP521R1())), "curve secp521r1; use P-256 or P-384"),
        (_request(ec.generate_private_key(ec.SECP256K1())), "curve secp256k1"),
        (_request(rsa.generate_private_key(65537, 1024)), "RSA key of 1024 bits; use 2048"),
        (_request(ed25519.Ed25519PrivateKey.generate()), "Ed25519PublicKey is not accepted"),
        (_request(dsa.generate_private_key(2048)), "DSAPublicKey is not accepted"),
        (_request(keys.generate(), hashes.SHA224()), "signed with sha224; use SHA-256"),
        (b"", "not a PEM certificate request"),
        (b"\xff\x00", "not a PEM certificate request"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "not a PEM"),
        (b"x" * 20_000, "at most 16384 are accepted"),
    ],
)
def test_requests_that_are_refused(request_pem: bytes, complaint: str, authority: Authority) -> None:
    with pytest.raises(CsrError, match=complaint) as caught:
        authority.sign(request_pem, WEB)
    assert WEB in str(caught.value)


def test_a_request_has_to_be_signed_with_its_own_key(authority: Authority) -> None:
    """Another's public key in a request of mine: the key is replaced after signing, the rest stays."""
    mine = x509.load_pem_x509_csr(keys.csr(keys.generate(), WEB)).public_bytes(Encoding.DER)
    theirs = x509.load_pem_x509_csr(keys.csr(keys.generate(), WEB))
    own_point, other_point = (
        csr.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        for csr in (x509.load_der_x509_csr(mine), theirs)
    )
    stolen = x509.load_der_x509_csr(mine.replace(own_point, other_point))
    assert stolen.public_key() == theirs.public_key()
    with pytest.raises(CsrError, match="its signature does not verify"):
        authority.sign(stolen.public_bytes(Encoding.PEM), WEB)


def test_only_workload_identities_are_certified(authority: Authority) -> None:
    request = keys.csr(keys.generate(), WEB)
    for identity in ("", "web", "spiffe://cluster.local", WEB + "/", "spiffe://Cluster.local/ns/a/sa/b"):
        with pytest.raises(SpiffeIdError):
            authority.sign(request, identity)
    with pytest.raises(CsrError, match="validity of -1 s"):
        authority.sign(request, WEB, -1)


def test_a_request_for_what_is_no_identity_is_not_made() -> None:
    with pytest.raises(SpiffeIdError):
        keys.csr(keys.generate(), "spiffe://cluster.local/web")


def test_the_control_planes_own_certificate(authority: Authority, client_context: SSL.Context) -> None:
    names = ["localhost", "istiod.istio-system.svc", "127.0.0.1", "::1"]
    server = authority.server_certificate(names)
    leaf = x509.load_pem_x509_certificate(server.chain_pem)
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.DNSName) == names[:2]
    assert san.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(one) for one in names[2:]]
    assert server.not_after == leaf.not_valid_after_utc.timestamp()
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    # It is nobody in the mesh.
    as_workload = WorkloadCertificate(
        testing.SERVER, server.key_pem, server.chain_pem, authority.root_pem, 0.0, server.not_after
    )
    client, _ = testing.handshake(client_context, tls.mesh_context(as_workload))
    with pytest.raises(PeerCertificateError, match="0 URI SANs"):
        tls.verify_peer(client, "cluster.local")
    for bad in ([], [""], ["bücher.example"], [" "]):
        with pytest.raises(AuthorityError, match="server certificate"):
            authority.server_certificate(bad)


def test_an_authority_in_memory_is_its_own(client_context: SSL.Context) -> None:
    other = tls.mesh_context(testing.workload(Authority.create(), testing.SERVER))
    with pytest.raises(HandshakeError, match="not one of our roots"):
        testing.handshake(client_context, other)


def test_openssl_verifies_what_is_issued(authority: Authority, tmp_path: Path) -> None:
    """The second opinion of the `openssl` program, strictly by RFC 5280 and for both sides of TLS."""
    leaf, *intermediates, root = authority.sign(keys.csr(keys.generate(), WEB), WEB)
    server = authority.server_certificate(["localhost", "127.0.0.1"])
    (tmp_path / "root.pem").write_bytes(root)
    (tmp_path / "untrusted.pem").write_bytes(b"".join(intermediates))
    (tmp_path / "leaf.pem").write_bytes(leaf)
    (tmp_path / "server.pem").write_bytes(server.chain_pem)

    def verify(file: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = ["openssl", "verify", "-x509_strict", "-CAfile", "root.pem", "-untrusted", "untrusted.pem"]
        return subprocess.run(
            [*command, *options, file], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )

    for purpose in ("sslclient", "sslserver"):
        done = verify("leaf.pem", "-purpose", purpose)
        assert done.returncode == 0, done.stderr
    done = verify("server.pem", "-purpose", "sslserver", "-verify_hostname", "localhost")
    assert done.returncode == 0, done.stderr
    assert verify("server.pem", "-purpose", "sslserver", "-verify_ip", "127.0.0.1").returncode == 0
    assert verify("server.pem", "-purpose", "sslclient").returncode != 0
    assert verify("server.pem", "-verify_hostname", "example.com").returncode != 0
