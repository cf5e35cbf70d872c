"""Filters of connections: what each of them lets through."""

from typing import Any

import pytest

from ztunnel.debug.filters import Filter, FilterError

ONE: dict[str, Any] = {
    "direction": "outbound",
    "src.addr": "10.1.0.2:41000",
    "src.workload": "visitor-5c4-x",
    "src.namespace": "shop",
    "src.identity": "spiffe://cluster.local/ns/shop/sa/visitor",
    "dst.addr": "[fd00::5]:8080",
    "dst.service": "reviews.books.svc.cluster.local",
    "dst.workload": "reviews-v2-7f",
    "dst.namespace": "books",
    "dst.identity": "spiffe://cluster.local/ns/books/sa/reviews",
}


@pytest.mark.parametrize(
    ("query", "matches"),
    [
        ({}, True),
        ({"unrelated": "x"}, True),
        ({"namespace": "shop"}, True),
        ({"namespace": "books"}, True),
        ({"namespace": "boo"}, False),
        ({"from": "visitor"}, True),
        ({"from": "visitor-5c4-x"}, True),
        ({"from": "visit"}, False),
        ({"from": "shop/visitor"}, True),
        ({"from": "books/visitor"}, False),
        ({"from": "deploy/visitor"}, True),
        ({"from": "10.1.0.2"}, True),
        ({"from": "10.1.0.20"}, False),
        ({"from": "spiffe://cluster.local/ns/shop/sa/visitor"}, True),
        ({"from": "spiffe://cluster.local/ns/shop/sa/other"}, False),
        ({"from": "reviews"}, False),
        ({"to": "reviews"}, True),
        ({"to": "books/reviews"}, True),
        ({"to": "reviews.books.svc.cluster.local"}, True),
        ({"to": "reviews-v2"}, True),
        ({"to": "fd00:0::5"}, True),
        ({"to": "fd00::6"}, False),
        ({"pod": "reviews"}, True),
        ({"pod": "visitor"}, True),
        ({"pod": "ratings"}, False),
        ({"port": "8080"}, True),
        ({"port": "80"}, False),
        ({"direction": "outbound"}, True),
        ({"direction": "inbound"}, False),
        ({"errors": "1"}, False),
        ({"from": "visitor", "to": "reviews", "port": "8080", "namespace": "shop"}, True),
        ({"from": "visitor", "to": "ratings"}, False),
    ],
)
def test_what_matches(query: dict[str, str], matches: bool) -> None:
    wanted = Filter.parse(query)
    assert wanted.matches(ONE) is matches
    assert Filter.parse(wanted.query()) == wanted


def test_errors_only() -> None:
    assert Filter(errors=True).matches(ONE | {"error": "refused"})


def test_what_little_is_known_matches_nothing_that_is_asked_for() -> None:
    for wanted in (Filter(source="a"), Filter(destination="a"), Filter(pod="a"), Filter(port=1), Filter("a")):
        assert not wanted.matches({"direction": "inbound"})


@pytest.mark.parametrize(
    ("query", "told"),
    [({"port": "http"}, "port: 'http'"), ({"port": "70000"}, "65536"), ({"direction": "in"}, "outbound")],
)
def test_what_cannot_be_meant(query: dict[str, str], told: str) -> None:
    with pytest.raises(FilterError, match=told):
        Filter.parse(query)
