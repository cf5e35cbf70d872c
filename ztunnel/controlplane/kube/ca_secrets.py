"""The Secrets that the cluster's authority is kept in: read, made, and what is in them.

| Secret of the control plane's namespace | what |
|---|---|
| `cacerts` | the operator's authority: ca-cert.pem, ca-key.pem, root-cert.pem, cert-chain.pem; counts before the next |
| `istio-ca-secret` | an authority of our own, made once by whichever replica comes first |
| `istio-ca-state` | which of them signs now and which roots are told (ca_state.py); annotated by each replica |

Beside an authority may be `ca-crl.pem`, what it revoked; in `istio-ca-state` that is the list in force.
"""

import base64
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from ztunnel.controlplane.kube import ca_state
from ztunnel.controlplane.kube.ca_state import CA_CERT, CA_KEY, CHAIN, ROOT_CERT, State
from ztunnel.controlplane.revoking import judge
from ztunnel.identity import crl, keys, templates
from ztunnel.identity.ca import Lifetimes, pem
from ztunnel.identity.errors import AuthorityError, CertificateError
from ztunnel.store.kube.api import Api
from ztunnel.store.kube.errors import ApiError
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane.ca")

OPERATORS: Final = "cacerts"
OWN: Final = "istio-ca-secret"
OWN_TYPE: Final = "istio.io/ca-root"
STATE: Final = "istio-ca-state"
KEY: Final = "state.json"
CRL: Final = "ca-crl.pem"

TIMEOUT: Final = 4.0  # seconds for one request of a writer


def connect(
    api: Api,
    namespace: str,
    *,
    lifetimes: Lifetimes,
    now: Callable[[], float] = time.time,
) -> State:
    """The state of the cluster's authority, which is made if there is none. Blocks.

    Safe in several replicas at once: what one has created, the others read. Raises ApiError, AuthorityError.
    """
    secret = read(api, namespace, STATE)
    ended = None
    if secret is not None:
        try:
            return state_of(secret, namespace, now(), lifetimes)
        except ca_state.EndedError as error:
            logger.warning("%s; another one begins", error)
            ended = secret
    name = OPERATORS
    source = read(api, namespace, OPERATORS)
    if source is None:
        name = OWN
        source = read(api, namespace, OWN) or _make_own(api, namespace, now())
    where = f"{namespace}/{name}"
    state = ca_state.first(ca_state.authority_of(data_of(source), where, lifetimes), now())
    try:
        revocations = revocations_of(source)
        judge(revocations or b"", state.succession)
    except CertificateError as error:
        raise AuthorityError(
            f"Secret {where}: {CRL}: {error}; mend it, or leave it empty if nothing is revoked"
        ) from None
    state = state._replace(revocations=revocations or b"")
    secret = made_of(namespace, state)
    if ended is not None:
        if revocations is None:
            secret["data"][CRL] = ended["data"].get(CRL, "")  # the root above may be the same
        secret["metadata"]["resourceVersion"] = ended["metadata"]["resourceVersion"]
        api.request("PUT", f"/api/v1/namespaces/{namespace}/secrets/{STATE}", body=secret)
        return connect(api, namespace, lifetimes=lifetimes, now=now)
    if not create(api, secret):
        return connect(api, namespace, lifetimes=lifetimes, now=now)
    logger.info("certificate authority", extra=fields(secret=f"{namespace}/{name}", state=state.digest))
    return state


def made_own(namespace: str, now: float) -> dict[str, Any]:
    """The Secret of a new self-signed authority, in the form that Istio gives it; `now` in Unix seconds."""
    key = keys.generate()
    root = pem([templates.make_root(key, now)])
    data = {CA_CERT: root, CA_KEY: keys.to_pem(key), ROOT_CERT: root, CHAIN: b""}
    return made(namespace, data, OWN, OWN_TYPE)


def _make_own(api: Api, namespace: str, now: float) -> dict[str, Any]:
    """Raises ApiError."""
    secret = made_own(namespace, now)
    if create(api, secret):
        logger.info("a certificate authority was made", extra=fields(secret=f"{namespace}/{OWN}"))
        return secret
    found = read(api, namespace, OWN)
    if found is None:
        raise ApiError(404, "NotFound", f"Secret {namespace}/{OWN} was there and is gone; try again")
    return found


def read(api: Api, namespace: str, name: str) -> dict[str, Any] | None:
    """The Secret; None where there is none. Raises ApiError."""
    return api.get("v1", "Secret", namespace, name)


def create(api: Api, secret: dict[str, Any]) -> bool:
    """False if there was one already. Raises ApiError."""
    try:
        api.request(
            "POST",
            f"/api/v1/namespaces/{secret['metadata']['namespace']}/secrets",
            body=secret,
            timeout=TIMEOUT,
        )
    except ApiError as error:
        if error.conflict:
            return False
        raise
    return True


def made(
    namespace: str, data: Mapping[str, bytes], name: str = STATE, kind: str = "Opaque"
) -> dict[str, Any]:
    """A Secret with this content."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "istio"}},
        "type": kind,
        "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
    }


def made_of(namespace: str, state: State) -> dict[str, Any]:
    """The Secret that keeps the state."""
    return made(namespace, {KEY: state.dump, CRL: state.revocations})


def state_of(secret: Mapping[str, Any], namespace: str, now: float, lifetimes: Lifetimes) -> State:
    """The state that its Secret keeps. Raises AuthorityError, EndedError."""
    name = f"{namespace}/{STATE}"
    data = data_of(secret)
    state = ca_state.parse(data.get(KEY, b""), name, now, lifetimes)
    try:
        crl.parse(data.get(CRL, b""))
    except CertificateError as error:
        raise AuthorityError(
            f"Secret {name}: {CRL}: {error}; restore it, or delete this key to have the list beside the authority count"
        ) from None
    return state._replace(revocations=data.get(CRL, b""))


def revocations_of(secret: Mapping[str, Any]) -> bytes | None:
    """The revocation lists beside an authority, PEM; None where there are none. Raises CertificateError."""
    data = data_of(secret).get(CRL)
    if data is None:
        return None
    decoded = crl.decode(data)
    crl.parse(decoded)
    return decoded


def data_of(secret: Mapping[str, Any]) -> dict[str, bytes]:
    """The Secret's content; what is not base64 is as if it were not there."""
    found = {}
    for name, value in (secret.get("data") or {}).items():
        try:
            found[name] = base64.b64decode(value or "")
        except (ValueError, TypeError):
            continue
    return found
