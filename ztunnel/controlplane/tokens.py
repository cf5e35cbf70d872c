"""Who is calling, by service account tokens: verified with the cluster's own keys, without asking its API server.

What a TokenReview would decide: signature, issuer, audience and times. What the mesh asks beside: that a node
proxy's token is bound to the node that it runs on (a claim that Kubernetes puts into the tokens of pods).
"""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from ztunnel.controlplane.authn import NODE_PROXIES, Caller, UnauthenticatedError
from ztunnel.durations import told
from ztunnel.identity import jwt
from ztunnel.identity.ca_files import stamp

AUDIENCE: Final = "istio-ca"
LEEWAY: Final = 30.0  # seconds that clocks may differ


class ServiceAccountTokens:
    """Verifies bound service account tokens with the keys in a file (a JSON Web Key Set), read again when it changes.

    The API server gives its own under /openid/v1/jwks.
    """

    def __init__(
        self,
        keys: Path,
        issuer: str,
        *,
        audience: str = AUDIENCE,
        accounts: Collection[str] = NODE_PROXIES,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`accounts` are those, as NAMESPACE/NAME, that act for the pods of their node."""
        self._path = keys
        self._issuer = issuer
        self._audience = audience
        self._accounts = frozenset(accounts)
        self._now = now
        self._stamp: object = None
        self._keys: jwt.KeySet = {}

    async def authenticate(self, token: str) -> Caller:
        """The service account that the token is of, and what it is bound to. Raises UnauthenticatedError."""
        try:
            self._refresh()
            claims = jwt.verify(token, self._keys)
        except OSError as error:
            raise UnauthenticatedError(
                f"the keys that verify tokens cannot be read: {self._path}: {error.strerror}"
            ) from None
        except jwt.TokenError as error:
            raise UnauthenticatedError(f"the token is refused: {error}") from None
        self._check_meant(claims)
        self._check_times(claims)
        return self._caller(claims)

    def _check_meant(self, claims: jwt.Claims) -> None:
        if claims.get("iss") != self._issuer:
            raise UnauthenticatedError(
                f"the token was issued by {_shown(claims.get('iss'))}, not by this cluster's {self._issuer!r}"
                " (another cluster's token?)"
            )
        audience = claims.get("aud")
        given = audience if isinstance(audience, list) else [audience]
        if self._audience not in given:
            raise UnauthenticatedError(
                f"the token is for the audience {_shown(given)}, not for {self._audience!r}: mount a projected service"
                f" account token with `audience: {self._audience}`"
            )

    def _check_times(self, claims: jwt.Claims) -> None:
        now = self._now()
        ends, begins = claims.get("exp"), claims.get("nbf", claims.get("iat", 0))
        if not isinstance(ends, int | float) or not isinstance(begins, int | float):
            raise UnauthenticatedError(
                "the token has no time at which it ends: only bound tokens are accepted"
            )
        if now > ends + LEEWAY:
            raise UnauthenticatedError(
                f"the token expired {told(now - ends)} ago: is the file that it is read from still renewed?"
            )
        if now < begins - LEEWAY:
            raise UnauthenticatedError(
                f"the token is valid only in {told(begins - now)}: compare the clocks of this machine and its issuer's"
            )

    def _caller(self, claims: jwt.Claims) -> Caller:
        bound = claims.get("kubernetes.io")
        bound = bound if isinstance(bound, dict) else {}
        namespace, pod = bound.get("namespace"), bound.get("pod")
        caller = Caller(
            node=_name(bound.get("node")),
            namespace=namespace if isinstance(namespace, str) else "",
            service_account=_name(bound.get("serviceaccount")),
            pod=_name(pod),
            uid=_name(pod, "uid"),
        )
        if not caller.namespace or not caller.service_account:
            raise UnauthenticatedError(
                f"the token is that of service account {_shown(caller.account)}, which is none: only tokens of"
                " service accounts are accepted"
            )
        if caller.account in self._accounts and not caller.node:
            raise UnauthenticatedError(
                "the token is not bound to a node (claim kubernetes.io/node/name): Kubernetes 1.30 and later put it"
                " into the tokens that are mounted into pods"
            )
        return caller

    def _refresh(self) -> None:
        found = stamp(self._path)
        if found is None or found != self._stamp:
            self._keys = jwt.parse_key_set(self._path.read_bytes())
            self._stamp = found


def _name(claim: Any, key: str = "name") -> str:
    name = claim.get(key) if isinstance(claim, dict) else None
    return name if isinstance(name, str) else ""


def _shown(value: object) -> str:
    return repr(value)[:200]
