"""What both sides of ZDS, the node agent's and the proxy's, have in common."""

from typing import NamedTuple

MAX_PACKET = 16 * 1024  # bytes; a message holds four Kubernetes names
HANDLE_TIMEOUT = 30.0  # seconds for the proxy to take or drop one pod


class WorkloadInfo(NamedTuple):
    """Who the pod is, in Kubernetes' words."""

    name: str
    namespace: str
    service_account: str


class ZdsError(Exception):
    """The other side broke the protocol, refused, or did not answer; the message says which and about what."""
