"""What can go wrong between us and an API server, said so that it can be mended; no message ever holds a secret."""

import errno
import ssl
from typing import Final

import msgspec

from ztunnel.store.problems import StoreError

_LONGEST_WAIT: Final = (
    300.0  # seconds: whatever somebody on the way asks for, the API server is looked for again
)
_MOST_TOLD: Final = 600  # characters of a server's message

ENDED: Final = "it ends connections without an answer"
# RemoteDisconnected of http.client is a ConnectionResetError.
_ENDS: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError)

_REMEDIES: Final = {
    401: "the API server does not know who asks: check the token or the client certificate, or log in again",
    403: "bind a Role or ClusterRole with that verb on that resource to that user",
    413: "make the object smaller",
    429: "the API server is busy; try again later",
    503: "the API server is not ready; try again later",
}


class ApiError(StoreError):
    """An answer that is not a success, or none at all (`status` 0: the server was not reached).

    `reason` is the server's word for it ("NotFound", "Forbidden", "Expired"), `retry_after` how many seconds it asks
    to wait (0: it does not say).
    """

    def __init__(self, status: int, reason: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    @property
    def unreachable(self) -> bool:
        """Whether nobody answered."""
        return self.status == 0

    @property
    def not_found(self) -> bool:
        return self.status == 404

    @property
    def conflict(self) -> bool:
        """Whether it is there already, or was changed by somebody else meanwhile."""
        return self.status == 409

    @property
    def forbidden(self) -> bool:
        return self.status == 403

    @property
    def gone(self) -> bool:
        """Whether the server no longer has the history that was asked for: list again."""
        return self.status == 410

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later without anybody changing anything."""
        return self.status == 0 or self.status in (408, 429) or self.status >= 500


class NoSuchKind(ApiError):
    """The cluster does not serve the kind: a CustomResourceDefinition is missing, or the cluster is too old."""

    def __init__(self, api_version: str, kind: str) -> None:
        super().__init__(
            404,
            "NoSuchKind",
            f"the cluster has no {kind} of {api_version}; install its CustomResourceDefinition",
        )


class Status(msgspec.Struct):
    """Kubernetes' metav1.Status, as far as an error needs it."""

    kind: str = ""
    message: str = ""
    reason: str = ""
    code: int = 0


_status = msgspec.json.Decoder(Status)


def answered(status: int, body: bytes, what: str, path: str, retry_after: str | None = None) -> ApiError:
    """The error in an answer. `what` was asked, in words; `path` where."""
    try:
        told = _status.decode(body)
        message, reason = told.message, told.reason
    except (msgspec.DecodeError, UnicodeDecodeError):
        message, reason = body[:_MOST_TOLD].decode("utf-8", "replace").strip(), ""
    if status in (400, 422) and "/secrets" in path:
        message = ""  # it may quote what was sent
    elif status == 400 and "{" in message:
        message = message.partition("{")[0].rstrip(" '\":")
    message = " ".join(message[:_MOST_TOLD].split()) or f"refused with status {status}"
    try:
        wait = min(max(0.0, float(retry_after or 0)), _LONGEST_WAIT)
    except ValueError:
        wait = 0.0
    remedy = _REMEDIES.get(status, "")
    return ApiError(status, reason, f"{what}: {message}; {remedy}" if remedy else f"{what}: {message}", wait)


def ended(error: BaseException) -> bool:
    """Whether the other side ended the connection without a word, before, in or after the TLS handshake.

    A balancer whose API server is away does so, and which of these its clients see is a matter of microseconds:
    it is one and the same failure, and none of trust. Looks into the errors that libraries wrap around it.
    """
    inner = [error.__cause__, *error.args, getattr(error, "reason", None)]
    if isinstance(error, _ENDS) or (isinstance(error, OSError) and error.errno == errno.ENOTCONN):
        return True  # the latter where a reset came before the handshake began
    return any(ended(each) for each in inner if isinstance(each, BaseException))
