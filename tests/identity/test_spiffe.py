"""SPIFFE ids: what is accepted, what is refused, and that text and parts are the same thing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.identity.errors import SpiffeIdError
from ztunnel.identity.spiffe import SpiffeId, check_trust_domain


def test_parts_of_a_workloads_id() -> None:
    identity = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/cart-v1")
    assert identity == SpiffeId("cluster.local", "shop", "cart-v1")
    assert str(identity) == "spiffe://cluster.local/ns/shop/sa/cart-v1"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not begin with"),
        ("https://cluster.local/ns/a/sa/b", "does not begin with"),
        ("SPIFFE://cluster.local/ns/a/sa/b", "does not begin with"),
        ("spiffe:/cluster.local/ns/a/sa/b", "does not begin with"),
        (" spiffe://cluster.local/ns/a/sa/b", "does not begin with"),
        ("spiffe:///ns/a/sa/b", "trust domain"),
        ("spiffe://Cluster.local/ns/a/sa/b", "trust domain"),
        ("spiffe://cluster.local:443/ns/a/sa/b", "trust domain"),
        ("spiffe://user@cluster.local/ns/a/sa/b", "trust domain"),
        ("spiffe://cluster%2elocal/ns/a/sa/b", "trust domain"),
        ("spiffe://bücher.example/ns/a/sa/b", "trust domain"),
        ("spiffe://" + "a" * 256 + "/ns/a/sa/b", "trust domain"),
        ("spiffe://cluster.local", "the path is not"),
        ("spiffe://cluster.local/", "segment ''"),
        ("spiffe://cluster.local/ns/a/sa/b/", "segment ''"),
        ("spiffe://cluster.local//ns/a/sa/b", "segment ''"),
        ("spiffe://cluster.local/ns//sa/b", "segment ''"),
        ("spiffe://cluster.local/ns/./sa/b", "segment '.'"),
        ("spiffe://cluster.local/ns/../sa/b", "segment '..'"),
        ("spiffe://cluster.local/ns/a/sa/b?x=1", "characters"),
        ("spiffe://cluster.local/ns/a/sa/b#x", "characters"),
        ("spiffe://cluster.local/ns/a/sa/b%2fc", "characters"),
        ("spiffe://cluster.local/ns/a/sa/b\n", "characters"),
        ("spiffe://cluster.local\n/ns/a/sa/b", "trust domain"),
        ("spiffe://cluster.local/ns/a/sa/ü", "characters"),
        ("spiffe://cluster.local/ns/a/sa/*", "characters"),
        ("spiffe://cluster.local/ns/a/sa", "the path is not"),
        ("spiffe://cluster.local/ns/a/sa/b/c", "the path is not"),
        ("spiffe://cluster.local/sa/a/ns/b", "the path is not"),
        ("spiffe://cluster.local/NS/a/SA/b", "the path is not"),
        ("spiffe://cluster.local/ns/a/sa/" + "b" * 2048, "at most 2048"),
    ],
)
def test_refused(text: str, complaint: str) -> None:
    with pytest.raises(SpiffeIdError, match=complaint):
        SpiffeId.parse(text)


_DOMAIN = st.text("abcxyz019._-", min_size=1, max_size=60)
_NAME = st.text("abcxyzABC019._-", min_size=1, max_size=60).filter(lambda text: text not in (".", ".."))


@given(_DOMAIN, _NAME, _NAME)
def test_text_and_parts_are_the_same_thing(domain: str, namespace: str, account: str) -> None:
    identity = SpiffeId(domain, namespace, account)
    assert SpiffeId.parse(str(identity)) == identity


@given(st.text(max_size=80))
def test_any_text_either_is_spelled_the_same_again_or_refused(text: str) -> None:
    for candidate in (text, f"spiffe://{text}", f"spiffe://cluster.local/ns/{text}"):
        try:
            identity = SpiffeId.parse(candidate)
        except SpiffeIdError:
            continue
        assert str(identity) == candidate


def test_a_trust_domain_alone() -> None:
    check_trust_domain("prod.example-1_a")
    with pytest.raises(SpiffeIdError, match="'Prod'"):
        check_trust_domain("Prod")
