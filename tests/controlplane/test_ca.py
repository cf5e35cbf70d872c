"""Who may have which certificate: the real process, asked over TLS."""

from datetime import timedelta
from itertools import pairwise

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from grpclib import GRPCError
from grpclib.const import Status

from tests.controlplane.objects import pod
from tests.controlplane.process import ControlPlane
from ztunnel.identity import keys
from ztunnel.xds.ca import CaClient
from ztunnel.xds.channel import ControlPlane as ControlPlaneAddress

REVIEWS = "spiffe://cluster.local/ns/shop/sa/reviews"


@pytest.fixture
async def shop(stopped: ControlPlane) -> ControlPlane:
    """A pod of shop/reviews on node-1, one of shop/ratings on node-2."""
    stopped.apply(
        pod("reviews-1", "10.244.1.2", namespace="shop", account="reviews", node="node-1"),
        pod("ratings-1", "10.244.2.2", namespace="shop", account="ratings", node="node-2"),
        pod("done", "10.244.1.3", namespace="shop", account="done", node="node-1", phase="Succeeded"),
    )
    await stopped.start()
    return stopped


def request() -> bytes:
    return keys.csr(keys.generate(), REVIEWS)


async def refusal(
    plane: ControlPlane, csr: bytes, identity: str | None, token: str = "token of node-1"
) -> GRPCError:
    with pytest.raises(GRPCError) as refused:
        await plane.create_certificate(csr, identity, token=token)
    return refused.value


async def test_a_pod_of_the_callers_node(shop: ControlPlane) -> None:
    key = keys.generate()
    chain = await shop.create_certificate(keys.csr(key, REVIEWS), REVIEWS, ttl=3600)
    certificates = [x509.load_pem_x509_certificate(pem.encode()) for pem in chain]
    leaf, root = certificates[0], certificates[-1]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [REVIEWS]
    assert leaf.public_key() == key.public_key()
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc < timedelta(hours=2)
    assert root.public_bytes(Encoding.PEM) == shop.root_ca.read_bytes()
    for issued, issuer in pairwise(certificates):
        issued.verify_directly_issued_by(issuer)
    await shop.logged(message="certificate signed", identity=REVIEWS, node="node-1")


async def test_lifetimes_are_those_of_the_settings(stopped: ControlPlane) -> None:
    stopped.apply(pod("reviews-1", "10.244.1.2", namespace="shop", account="reviews", node="node-1"))
    await stopped.start(DEFAULT_WORKLOAD_CERT_TTL="90m", MAX_WORKLOAD_CERT_TTL="3h")
    for asked, expected in ((0, 5400), (60, 60), (10800, 10800)):
        chain = await stopped.create_certificate(request(), REVIEWS, ttl=asked)
        leaf = x509.load_pem_x509_certificate(chain[0].encode())
        life = leaf.not_valid_after_utc - leaf.not_valid_before_utc
        assert timedelta(0) <= life - timedelta(seconds=expected) < timedelta(minutes=3)
    with pytest.raises(GRPCError) as refused:
        await stopped.create_certificate(request(), REVIEWS, ttl=10801)
    assert refused.value.status is Status.INVALID_ARGUMENT
    for words in ("3h1s", "more than the 3h", "MAX_WORKLOAD_CERT_TTL", "SECRET_TTL"):
        assert words in str(refused.value.message)


@pytest.mark.parametrize(
    "identity",
    [
        "spiffe://cluster.local/ns/shop/sa/ratings",
        "spiffe://cluster.local/ns/default/sa/reviews",
        "spiffe://cluster.local/ns/shop/sa/done",
    ],
    ids=["on-another-node", "of-another-namespace", "run-to-its-end"],
)
async def test_no_such_pod_on_the_callers_node(shop: ControlPlane, identity: str) -> None:
    error = await refusal(shop, request(), identity)
    assert error.status is Status.PERMISSION_DENIED
    assert "node-1" in str(error.message)
    assert identity in str(error.message)


async def test_another_trust_domain(shop: ControlPlane) -> None:
    error = await refusal(shop, request(), "spiffe://example.org/ns/shop/sa/reviews")
    assert error.status is Status.PERMISSION_DENIED
    assert "example.org" in str(error.message)
    assert "cluster.local" in str(error.message)


@pytest.mark.parametrize("identity", [None, "", "reviews", "spiffe://cluster.local/shop/reviews"])
async def test_an_identity_that_is_none(shop: ControlPlane, identity: str | None) -> None:
    error = await refusal(shop, request(), identity)
    assert error.status is Status.INVALID_ARGUMENT
    assert "ImpersonatedIdentity" in str(error.message)


@pytest.mark.parametrize(
    "csr",
    [b"", b"garbage", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"],
)
async def test_a_garbage_request(shop: ControlPlane, csr: bytes) -> None:
    error = await refusal(shop, csr, REVIEWS)
    assert error.status is Status.INVALID_ARGUMENT
    assert REVIEWS in str(error.message)


@pytest.mark.parametrize("token", ["", "wrong", "token of node"])
async def test_a_bad_token(shop: ControlPlane, token: str) -> None:
    error = await refusal(shop, request(), REVIEWS, token)
    assert error.status is Status.UNAUTHENTICATED


async def test_a_pod_that_is_only_just_being_written(shop: ControlPlane, nursery: trio.Nursery) -> None:
    """The node may ask before the store's change has been seen: the answer waits a moment for it."""
    chains: list[list[str]] = []

    async def ask() -> None:
        chains.append(await shop.create_certificate(request(), "spiffe://cluster.local/ns/shop/sa/late"))

    async with trio.open_nursery() as both:
        both.start_soon(ask)
        shop.apply(pod("late", "10.244.1.9", namespace="shop", account="late", node="node-1"))
    assert len(chains) == 1


async def test_the_node_proxys_own_client(shop: ControlPlane) -> None:
    address = ControlPlaneAddress(
        address=f"https://localhost:{shop.port}",
        root_ca=shop.root_ca,
        token=shop.directory / "tokens" / "node-1",
    )
    chain = await CaClient(address).sign(request(), REVIEWS, 3600)
    assert len(chain) >= 2
    assert chain[-1] == shop.root_ca.read_bytes()


async def test_a_restarted_authority_is_the_same(shop: ControlPlane) -> None:
    root = shop.root_ca.read_bytes()
    await shop.stop()
    await shop.start()
    chain = await shop.create_certificate(request(), REVIEWS)
    assert chain[-1].encode() == root
