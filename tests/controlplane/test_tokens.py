"""Service account tokens to callers: the node's own is accepted, anything else refused with what is wrong."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.controlplane.objects import pod
from tests.controlplane.process import ControlPlane
from ztunnel.controlplane.authn import Caller, UnauthenticatedError
from ztunnel.controlplane.tokens import ServiceAccountTokens
from ztunnel.embedded.tokens import ISSUER, NodeTokens
from ztunnel.identity import jwt, keys

Change = Callable[[dict[str, Any]], None]


def proxy_of(node: str) -> Caller:
    return Caller(node, "istio-system", "ztunnel", f"ztunnel-{node}")


@pytest.fixture
def made(tmp_path: Path) -> NodeTokens:
    directory = tmp_path / "tokens"
    directory.mkdir()
    tokens = NodeTokens(directory, tmp_path / "keys.json", ["node-1", "node-2"])
    tokens.write()
    return tokens


@pytest.fixture
def checked(made: NodeTokens, tmp_path: Path) -> ServiceAccountTokens:
    return ServiceAccountTokens(tmp_path / "keys.json", ISSUER)


async def refusal(checked: ServiceAccountTokens, token: str) -> str:
    with pytest.raises(UnauthenticatedError) as refused:
        await checked.authenticate(token)
    assert token[-20:] not in str(refused.value)
    return str(refused.value)


async def test_each_node_by_its_own_token(
    made: NodeTokens, checked: ServiceAccountTokens, tmp_path: Path
) -> None:
    for node in ("node-1", "node-2"):
        file = tmp_path / "tokens" / node
        assert await checked.authenticate(file.read_text()) == proxy_of(node)
        assert file.stat().st_mode & 0o777 == 0o600
    made.renew()
    assert await checked.authenticate((tmp_path / "tokens" / "node-1").read_text()) == proxy_of("node-1")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.update(aud=["kubernetes"]), "for the audience ['kubernetes'], not for 'istio-ca'"),
        (lambda c: c.update(iss="https://other"), "issued by 'https://other', not by this cluster's"),
        (lambda c: c.update(exp=time.time() - 3600), "expired 1h ago: is the file"),
        (lambda c: c.update(nbf=time.time() + 3600), "valid only in 1h: compare the clocks"),
        (lambda c: c.pop("exp"), "no time at which it ends"),
        (lambda c: c["kubernetes.io"].pop("node"), "not bound to a node"),
        (lambda c: c.pop("kubernetes.io"), "service account '/', which is none"),
        (lambda c: c["kubernetes.io"].update(namespace=7), "service account '/ztunnel', which is none"),
        (
            lambda c: c["kubernetes.io"].pop("serviceaccount"),
            "service account 'istio-system/', which is none",
        ),
        (lambda c: c["kubernetes.io"].update(node="node-1"), "not bound to a node"),
    ],
)
async def test_claims_that_do_not_do(
    change: Change, complaint: str, made: NodeTokens, checked: ServiceAccountTokens
) -> None:
    claims = made._claims("node-1")
    change(claims)
    assert complaint in await refusal(checked, jwt.sign(claims, made._key))


async def test_others_are_told_apart_by_their_account(
    made: NodeTokens, checked: ServiceAccountTokens
) -> None:
    bound = {"namespace": "shop", "serviceaccount": {"name": "waypoint"}}
    claims = made._claims("node-1")
    assert await checked.authenticate(jwt.sign(claims | {"kubernetes.io": bound}, made._key)) == Caller(
        "", "shop", "waypoint"
    )
    bound |= {"pod": {"name": "waypoint-1", "uid": "u"}, "node": {"name": "node-2"}}
    assert await checked.authenticate(jwt.sign(claims | {"kubernetes.io": bound}, made._key)) == Caller(
        "node-2", "shop", "waypoint", "waypoint-1", "u"
    )


async def test_the_clocks_may_differ_a_little(made: NodeTokens, checked: ServiceAccountTokens) -> None:
    claims = made._claims("node-1") | {"nbf": time.time() + 20, "aud": "istio-ca"}
    assert await checked.authenticate(jwt.sign(claims, made._key)) == proxy_of("node-1")


async def test_tokens_that_nobody_here_signed(made: NodeTokens, checked: ServiceAccountTokens) -> None:
    claims = made._claims("node-1")
    good = jwt.sign(claims, made._key)
    header, body, signature = good.split(".")
    other = jwt.sign(claims, keys.generate())
    assert "key of this cluster's (another cluster's token?)" in await refusal(checked, other)
    forged = jwt.sign(claims | {"kubernetes.io": {"node": {"name": "node-2"}}}, made._key).split(".")[1]
    for token, complaint in (
        (f"{header}.{forged}.{signature}", "signature does not verify"),
        (f"{header}.{body}.{signature[:-4]}", "signature does not verify"),
        (f"{header}.{body}.{other.split('.')[2]}", "signature does not verify"),
        (f"{header}.{body}.", "signature does not verify"),
        (f"{_header('none', good)}.{body}.", "algorithm 'none' is not that"),
        (f"{_header('HS256', good)}.{body}.{signature}", "algorithm 'HS256' is not that"),
        (f"{_header('RS256', good)}.{body}.{signature}", "algorithm 'RS256' is not that"),
        ("a random word", "not a signed token"),
        ("a.b.c", "header cannot be read"),
        ("..", "header cannot be read"),
    ):
        assert complaint in await refusal(checked, token)


def _header(algorithm: str, token: str) -> str:
    header = json.loads(jwt._decode(token.split(".")[0])) | {"alg": algorithm}
    return jwt._encode(json.dumps(header).encode())


async def test_keys_that_change_and_keys_that_cannot_be_read(made: NodeTokens, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    checked = ServiceAccountTokens(file, ISSUER)
    token = (tmp_path / "tokens" / "node-1").read_text()
    assert await checked.authenticate(token) == proxy_of("node-1")
    file.write_bytes(jwt.key_set(keys.generate().public_key()))
    assert "another cluster's" in await refusal(checked, token)
    file.write_bytes(b'{"keys": []}')
    assert "no key in it can verify" in await refusal(checked, token)
    file.write_bytes(b"nonsense")
    assert "not a JSON Web Key Set" in await refusal(checked, token)
    file.unlink()
    assert "cannot be read" in await refusal(checked, token)


def test_the_keys_of_an_api_server_are_rsa() -> None:
    key = rsa.generate_private_key(65537, 2048)
    numbers = key.public_key().public_numbers()
    jwks = {
        "keys": [
            {"kty": "OKP", "kid": "unknown"},
            {
                "kty": "RSA",
                "kid": "k",
                "n": jwt._encode(numbers.n.to_bytes(256)),
                "e": jwt._encode(b"\1\0\1"),
            },
        ]
    }
    signed = ".".join(
        jwt._encode(json.dumps(one).encode()) for one in ({"alg": "RS256", "kid": "k"}, {"a": 1})
    )
    token = f"{signed}.{jwt._encode(key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"
    assert jwt.verify(token, jwt.parse_key_set(json.dumps(jwks).encode())) == {"a": 1}


async def test_a_control_plane_that_is_given_keys(stopped: ControlPlane) -> None:
    """Over the wire: a node's token is good for the pods of that node, and for no others."""
    from grpclib import GRPCError
    from grpclib.const import Status

    directory = stopped.directory / "signed"
    directory.mkdir()
    tokens = NodeTokens(directory, stopped.directory / "keys.json", ["node-1", "node-2"])
    tokens.write()
    stopped.authentication = ["--token-keys", str(stopped.directory / "keys.json"), "--token-issuer", ISSUER]
    stopped.apply(pod("reviews-1", "10.244.1.2", namespace="shop", account="reviews", node="node-1"))
    await stopped.start()
    identity = "spiffe://cluster.local/ns/shop/sa/reviews"
    csr = keys.csr(keys.generate(), identity)
    assert len(await stopped.create_certificate(csr, identity, token=(directory / "node-1").read_text())) == 3
    # A waypoint, say, names no identity: it gets its own, and no other.
    own = "spiffe://cluster.local/ns/shop/sa/waypoint"
    claims = tokens._claims("node-1")
    claims["kubernetes.io"].update(
        namespace="shop", serviceaccount={"name": "waypoint"}, pod={"name": "waypoint-1"}
    )
    waypoint = jwt.sign(claims, tokens._key)
    for asked in (None, own):
        chain = await stopped.create_certificate(csr, asked, token=waypoint)
        leaf = x509.load_pem_x509_certificate(chain[0].encode())
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [own]
    expired = jwt.sign(tokens._claims("node-1") | {"exp": 1}, tokens._key)
    for token, status, words in (
        (
            (directory / "node-2").read_text(),
            Status.PERMISSION_DENIED,
            "no pod of service account shop/reviews",
        ),
        (waypoint, Status.PERMISSION_DENIED, f"may have a certificate for {own} only"),
        (jwt.sign(tokens._claims("node-1"), keys.generate()), Status.UNAUTHENTICATED, "another cluster's"),
        (expired, Status.UNAUTHENTICATED, "expired"),
        ("token of node-1", Status.UNAUTHENTICATED, "not a signed token"),
    ):
        with pytest.raises(GRPCError) as refused:
            await stopped.create_certificate(csr, identity, token=token)
        assert refused.value.status is status
        assert words in str(refused.value.message)
    assert "eyJ" not in stopped.log, "tokens are never logged"
