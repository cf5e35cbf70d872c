"""Callers by TokenReview: what the API server's answers mean, how long they count, and what counts while it is away."""

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio_asyncio

from ztunnel.controlplane.authn import Caller, UnauthenticatedError, UndecidedError
from ztunnel.controlplane.kube.tokenreview import FRESH, REFUSED, TokenReviews
from ztunnel.store.kube.errors import ApiError

GOOD: dict[str, Any] = {
    "authenticated": True,
    "audiences": ["istio-ca"],
    "user": {
        "username": "system:serviceaccount:istio-system:ztunnel",
        "extra": {
            "authentication.kubernetes.io/node-name": ["node-1"],
            "authentication.kubernetes.io/pod-name": ["ztunnel-x"],
            "authentication.kubernetes.io/pod-uid": ["u"],
        },
    },
}
PROXY = Caller("node-1", "istio-system", "ztunnel", "ztunnel-x", "u")


class Server:
    """An API server of which only reviews are needed."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = GOOD
        self.error: ApiError | None = None
        self.asked: list[dict[str, Any]] = []

    def request(self, method: str, path: str, *, body: dict[str, Any], timeout: float) -> bytes:
        assert (method, path) == ("POST", "/apis/authentication.k8s.io/v1/tokenreviews")
        self.asked.append(body["spec"])
        if self.error is not None:
            raise self.error
        return json.dumps({"status": self.status}).encode()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def token(audience: object = ("istio-ca",), ends: float | None = None, name: str = "x") -> str:
    claims = {"aud": audience, "exp": time.time() + 600 if ends is None else ends, "sub": name}
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"header.{body}.signature"


async def review(reviews: TokenReviews, given: str) -> Caller:
    caller: Caller = await trio_asyncio.aio_as_trio(reviews.authenticate)(given)
    return caller


async def test_an_answer_counts_for_a_while(asyncio_loop: None) -> None:
    server, clock = Server(), Clock()
    reviews, given = TokenReviews(server, clock=clock), token()
    assert await review(reviews, given) == PROXY
    assert server.asked == [{"token": given, "audiences": ["istio-ca"]}]
    clock.now += FRESH - 1
    assert await review(reviews, given) == PROXY
    assert len(server.asked) == 1
    clock.now += 2
    server.status = {"authenticated": False, "error": "the pod is gone"}
    for _ in range(2):
        with pytest.raises(UnauthenticatedError, match="the pod is gone"):
            await review(reviews, given)
    assert len(server.asked) == 2
    clock.now += REFUSED + 1
    server.status = GOOD
    assert await review(reviews, given) == PROXY
    assert await review(reviews, token(name="other")) == PROXY
    assert len(server.asked) == 4


async def test_many_at_once_ask_once(asyncio_loop: None) -> None:
    server = Server()
    reviews, given = TokenReviews(server), token()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(review, reviews, given)
    assert len(server.asked) == 1


async def test_while_the_api_server_is_away(asyncio_loop: None) -> None:
    server, clock = Server(), Clock()
    reviews, given = TokenReviews(server, clock=clock), token()
    await review(reviews, given)
    clock.now += 3600
    server.error = ApiError(0, "Unreachable", "cannot be reached")
    assert await review(reviews, given) == PROXY
    with pytest.raises(UndecidedError, match="cannot be reached"):
        await review(reviews, token(name="other"))
    # An answer that will not get better by itself is no outage.
    server.error = ApiError(403, "Forbidden", "tokenreviews is forbidden; bind a Role")
    with pytest.raises(UndecidedError, match="bind a Role"):
        await review(reviews, given)


async def test_a_token_that_has_ended_is_not_taken_from_memory(asyncio_loop: None) -> None:
    server, now = Server(), [time.time()]
    reviews, given = TokenReviews(server, now=lambda: now[0]), token()
    await review(reviews, given)
    server.error = ApiError(0, "Unreachable", "cannot be reached")
    now[0] += 3600
    with pytest.raises(UnauthenticatedError, match="expired 50m ago"):
        await review(reviews, given)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.update(authenticated=False), "does not accept the token"),
        (lambda s: s.update(authenticated="true"), "does not accept the token"),
        (lambda s: s.update(audiences=["kubernetes"]), "not for the audience"),
        (lambda s: s.pop("audiences"), "not for the audience"),
        (lambda s: s["user"].update(username="admin"), "'admin' is no service account"),
        (lambda s: s["user"].update(username="system:serviceaccount:x"), "no service account"),
        (lambda s: s["user"].pop("extra"), "not bound to a node"),
        (lambda s: s["user"]["extra"].pop("authentication.kubernetes.io/node-name"), "not bound to a node"),
    ],
)
async def test_answers_that_do_not_do(asyncio_loop: None, change: Change, complaint: str) -> None:
    server = Server()
    server.status = json.loads(json.dumps(GOOD))
    change(server.status)
    with pytest.raises(UnauthenticatedError, match=complaint):
        await review(TokenReviews(server), token())


async def test_an_answer_that_cannot_be_read(asyncio_loop: None) -> None:
    server = Server()
    server.status = {"authenticated": True, "audiences": ["istio-ca"], "user": "x"}
    with pytest.raises(UndecidedError, match="cannot be read"):
        await review(TokenReviews(server), token())


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("word", "not a bound service account token"),
        ("a.b.c", "not a bound service account token"),
        (token(audience=["kubernetes"]), "not for the audience 'istio-ca'"),
        (token(audience="other"), "not for the audience 'istio-ca'"),
        (token(ends=1.0), "expired"),
    ],
    ids=["a word", "three words", "the API server's", "another's", "expired"],
)
async def test_what_cannot_be_accepted_is_not_asked_for(
    asyncio_loop: None, given: str, complaint: str
) -> None:
    server = Server()
    with pytest.raises(UnauthenticatedError, match=complaint):
        await review(TokenReviews(server), given)
    assert server.asked == []


async def test_others_need_no_node(asyncio_loop: None) -> None:
    server = Server()
    server.status = {
        "authenticated": True,
        "audiences": ["istio-ca"],
        "user": {"username": "system:serviceaccount:shop:waypoint"},
    }
    assert await review(TokenReviews(server), token()) == Caller("", "shop", "waypoint")
