"""The bundle of a workload: what is accepted from an authority, and its way over a pipe."""

import time

import pytest

from ztunnel.identity import keys, templates, testing
from ztunnel.identity.ca import Authority
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import CertificateError

ME = testing.CLIENT


def test_over_a_pipe_and_back(authority: Authority) -> None:
    certificate = testing.workload(authority)
    encoded = certificate.encode()
    for form in (encoded, bytearray(encoded), memoryview(encoded)):
        assert WorkloadCertificate.decode(form) == certificate
    assert len(encoded) < 4096


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"[1,2,3,4,5,6]", b"\xff", b'["a","b","c"]'])
def test_anything_else_is_malformed(data: bytes) -> None:
    with pytest.raises(CertificateError, match="malformed"):
        WorkloadCertificate.decode(data)


def test_a_cut_bundle_is_refused_without_quoting_it(authority: Authority) -> None:
    certificate = testing.workload(authority)
    secret = certificate.key_pem.decode().splitlines()[1]
    with pytest.raises(CertificateError) as caught:
        WorkloadCertificate.decode(certificate.encode()[:-10])
    assert secret not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_key_is_not_shown(authority: Authority) -> None:
    certificate = testing.workload(authority)
    assert ME in repr(certificate)
    for line in certificate.key_pem.decode().splitlines():
        assert line not in repr(certificate)


def test_what_an_authority_may_not_answer(authority: Authority) -> None:
    key, now = keys.generate(), time.time()
    good = authority.sign(keys.csr(key, ME), ME, 3600)

    def refused(chain: list[bytes], complaint: str, at: float = now) -> None:
        with pytest.raises(CertificateError, match=complaint) as caught:
            WorkloadCertificate.from_signed(ME, key, chain, at)
        assert ME in str(caught.value)

    assert WorkloadCertificate.from_signed(ME, key, good, now).chain_pem == b"".join(good[:-1])
    refused([], "0 PEMs came")
    refused(good[:1], "1 PEMs came")
    refused([b"", b"", b""], "not PEM")
    refused([good[0], good[1], b"nothing"], "not PEM")
    refused([good[1], good[0], good[2]], "another key")
    refused(authority.sign(keys.csr(keys.generate(), ME), ME), "another key")
    refused(
        authority.sign(keys.csr(key, ME), testing.SERVER), "URI SANs are .*server.*expected exactly.*client"
    )
    refused([*good[:-1], Authority.create().root_pem], "does not chain to the root")
    refused([good[0], good[2]], "does not chain to the root")
    refused(good, "certificate has expired", now + 3601)
    refused(good, r"valid only in \d+ s; set this node's clock", now - 3600)


def test_without_intermediates(authority: Authority) -> None:
    """An authority whose signing certificate is itself the root answers with two PEMs."""
    root_key, key = keys.generate(), keys.generate()
    root = templates.make_root(root_key, time.time())
    alone = Authority(root_key, root, (), (root,))
    chain = alone.sign(keys.csr(key, ME), ME)
    assert len(chain) == 2
    assert WorkloadCertificate.from_signed(ME, key, chain, time.time()).chain_pem == chain[0]
