"""Who is calling, by asking the API server: TokenReview, remembered for a moment.

A node proxy asks for a certificate for each identity on its node, with one token: each token is reviewed once in
`FRESH` seconds. While the API server is away, a token that it has accepted before is taken until it ends; any other
caller is told to come again (UNAVAILABLE). No token is kept or logged: what is remembered goes by its hash.
"""

import asyncio
import base64
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple, Protocol

import trio_asyncio

from ztunnel.controlplane.authn import NODE_PROXIES, Caller, UnauthenticatedError, UndecidedError
from ztunnel.controlplane.tokens import AUDIENCE, LEEWAY
from ztunnel.durations import told
from ztunnel.store.kube.errors import ApiError

FRESH: Final = 30.0  # seconds for which an answer counts without asking again
REFUSED: Final = 5.0  # the same for a refusal
TIMEOUT: Final = 5.0  # seconds for the API server to answer
REMEMBERED: Final = 8192  # tokens
MOST_WAITING: Final = 512  # reviews under way or waiting for it; more callers are told to come again
THREADS: Final = 8

_PATH: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
_EXTRA: Final = "authentication.kubernetes.io/"
_PREFIX: Final = "system:serviceaccount:"


class Requests(Protocol):
    """What is needed of the API server."""

    def request(self, method: str, path: str, *, body: dict[str, Any], timeout: float) -> bytes:
        """The answer's body. Raises ApiError."""
        ...


class _Known(NamedTuple):
    caller: Caller | UnauthenticatedError
    asked: float  # monotonic seconds


class TokenReviews:
    """Authenticates service account tokens of one audience. Used inside trio-asyncio's loop."""

    def __init__(
        self,
        api: Requests,
        *,
        audience: str = AUDIENCE,
        node_proxies: Collection[str] = NODE_PROXIES,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`node_proxies` are the service accounts whose tokens have to be bound to a node."""
        self._api = api
        self._audience = audience
        self._node_proxies = frozenset(node_proxies)
        self._now = now
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._asked: dict[bytes, asyncio.Task[Caller]] = {}
        # Threads of its own: a slow API server must not keep signatures waiting.
        self._threads = trio_asyncio.TrioExecutor(max_workers=THREADS)

    async def authenticate(self, token: str) -> Caller:
        """The service account that the token is of, and what it is bound to.

        Raises UnauthenticatedError, and UndecidedError while the API server cannot be asked.
        """
        self._plausible(token)
        name = hashlib.sha256(token.encode()).digest()
        known = self._known.get(name)
        if known is not None:
            fresh = FRESH if isinstance(known.caller, Caller) else REFUSED
            if self._clock() - known.asked < fresh:
                return _outcome(known)
        task = self._asked.get(name)
        if task is None:
            if len(self._asked) >= MOST_WAITING:
                raise UndecidedError("too many tokens wait to be reviewed; try again")
            task = asyncio.get_running_loop().create_task(self._ask(name, token))
            self._asked[name] = task
            task.add_done_callback(lambda _: self._asked.pop(name, None))
        # Shielded: one caller that goes away does not take the answer from the others.
        return await asyncio.shield(task)

    async def _ask(self, name: bytes, token: str) -> Caller:
        asked = self._clock()
        try:
            caller: Caller | UnauthenticatedError
            caller = await asyncio.get_running_loop().run_in_executor(self._threads, self._review, token)
        except UnauthenticatedError as error:
            caller = error
        except ApiError as error:
            known = self._known.get(name)
            if known is not None and isinstance(known.caller, Caller) and error.transient:
                return known.caller
            raise UndecidedError(f"the token cannot be reviewed now: {error}") from None
        self._known[name] = known = _Known(caller, asked)
        self._known.move_to_end(name)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return _outcome(known)

    def _plausible(self, token: str) -> None:
        """Refuse what cannot be accepted by what the token says of itself (unverified): it is not even asked for."""
        try:
            body = token.split(".")[1]
            claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            audience, ends = claims.get("aud"), float(claims["exp"])
        except (IndexError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UnauthenticatedError(
                "it is not a bound service account token: mount a projected one with"
                f" `audience: {self._audience}`"
            ) from None
        if self._audience not in (audience if isinstance(audience, list) else [audience]):
            raise UnauthenticatedError(
                f"the token is not for the audience {self._audience!r}: mount a projected service account token with"
                f" `audience: {self._audience}`"
            )
        if self._now() > ends + LEEWAY:
            raise UnauthenticatedError(
                f"the token expired {told(self._now() - ends)} ago: is the file that it is read from still renewed?"
            )

    def _review(self, token: str) -> Caller:
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [self._audience]},
        }
        try:
            answer = json.loads(self._api.request("POST", _PATH, body=review, timeout=TIMEOUT))
            status = answer["status"]
            authenticated = status.get("authenticated") is True
            audiences = status.get("audiences") or []
            user = status.get("user") or {}
            username, extra = str(user.get("username", "")), user.get("extra") or {}
            node, pod, uid = (_first(extra, name) for name in ("node-name", "pod-name", "pod-uid"))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ApiError(0, "Garbled", "the API server's TokenReview cannot be read") from None
        if not authenticated:
            # What the API server says of it may quote the token's claims, never the token.
            why = " ".join(str(status.get("error") or "").split())[:300]
            raise UnauthenticatedError(f"the cluster does not accept the token{f': {why}' if why else ''}")
        if self._audience not in audiences:
            raise UnauthenticatedError(f"the token is not for the audience {self._audience!r}")
        namespace, colon, account = username.removeprefix(_PREFIX).partition(":")
        if not username.startswith(_PREFIX) or not colon or not namespace or not account:
            raise UnauthenticatedError(f"{username[:200]!r} is no service account")
        caller = Caller(node, namespace, account, pod, uid)
        if caller.account in self._node_proxies and not node:
            raise UnauthenticatedError(
                f"the token of {caller.account} is not bound to a node (authentication.kubernetes.io/node-name):"
                " Kubernetes 1.30 and later bind the tokens that are mounted into pods"
            )
        return caller


def _first(extra: dict[str, Any], name: str) -> str:
    values = extra.get(_EXTRA + name)
    return str(values[0]) if isinstance(values, list) and values else ""


def _outcome(known: _Known) -> Caller:
    if isinstance(known.caller, Caller):
        return known.caller
    raise UnauthenticatedError(str(known.caller))
