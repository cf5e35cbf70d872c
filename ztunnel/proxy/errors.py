"""Why a proxied connection ended badly: one hierarchy, each message written for the operator who reads the log.

Every error carries the response flag that metrics and logs use (the values of Istio's ztunnel).
"""

import errno
from typing import ClassVar


class ProxyError(Exception):
    """A connection could not be proxied, or ended abnormally. `flag` is its response flag."""

    flag: ClassVar[str] = "-"


class RouteError(ProxyError):
    """The destination is refused: a mesh port, a service without healthy endpoints, an unreachable gateway."""

    flag = "CONNECT"


class ControlUnavailable(ProxyError):
    """The control process did not say where the destination is in time."""

    flag = "CONNECT"


class ConnectFailed(ProxyError):
    """A TCP connection could not be made: refused, unreachable, or timed out."""

    flag = "CONNECT"


class BuffersFull(ProxyError):
    """Too much waits for readers that do not keep up, most of it for this connection."""

    flag = "OVERLOAD"


class IdentityMissing(ProxyError):
    """There is no certificate for the identity that the connection needs."""

    flag = "IDENTITY_ERROR"


class TlsFailed(ProxyError):
    """The TLS handshake failed, or the peer's certificate is not that of the expected identity."""

    flag = "TLS_FAILURE"


class Revoked(TlsFailed):
    """One side's certificate, or one of its authorities, is revoked."""

    flag = "CERT_REVOKED"


class H2Failed(ProxyError):
    """The peer broke HTTP/2, or answered the CONNECT with something other than 200."""

    flag = "H2_HANDSHAKE_FAILURE"


class Denied(ProxyError):
    """The peer's policy refused the connection."""

    flag = "DENY"


class RequestRefused(ProxyError):
    """A CONNECT that this proxy does not serve. `status` is the HTTP status of the answer."""

    flag = "CONNECT"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PeerClosed(ProxyError):
    """The tunnel that carried the connection ended first."""

    flag = "CONNECT"


class Reset(ProxyError):
    """One end reset the connection; it was passed on to the other end as a reset."""


class TimedOut(ConnectFailed):
    """A peer or an application did not answer in time."""


class Blocked(TimedOut):
    """Nothing came back from the port of the peer's tunnels: packets to it vanish on their way."""

    flag = "NETWORK_POLICY"


class Draining(ProxyError):
    """The proxy is shutting down, or the pod left, and the connection outlived the grace period."""


def tcp_error(what: str, code: int, text: str) -> ConnectFailed:
    """The message for a failed connect: `what` names the destination, `code` is an errno, `text` its name."""
    hints = {
        errno.ECONNREFUSED: "nothing listens there",
        errno.ETIMEDOUT: "no answer; a NetworkPolicy or firewall may block it",
        errno.EHOSTUNREACH: "no route to the host; is the pod gone?",
        errno.ENETUNREACH: "no route to the network from the pod",
    }
    hint = hints.get(code)
    return ConnectFailed(f"{what}: {text}" + (f" ({hint})" if hint else ""))
