"""Who is calling: bearer tokens to callers, through an interface that each kind of cluster implements.

No message, log line or exception of this file ever holds a token.
"""

import hmac
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, Protocol

_MAX_TOKEN_BYTES = 16 * 1024


NODE_PROXIES: Final = ("istio-system/ztunnel",)
"""Service accounts (NAMESPACE/NAME) that ask for the identities of their node's pods: CA_TRUSTED_NODE_ACCOUNTS."""


class Caller(NamedTuple):
    """An authenticated caller: its service account, and the node and pod that its token is bound to ("": to none)."""

    node: str
    namespace: str = ""
    service_account: str = ""
    pod: str = ""
    uid: str = ""  # the pod's

    @property
    def account(self) -> str:
        """NAMESPACE/NAME of its service account."""
        return f"{self.namespace}/{self.service_account}"


class UnauthenticatedError(Exception):
    """The caller did not prove who it is; the message says how it would."""


class UndecidedError(Exception):
    """Who is calling cannot be found out now; the caller may ask again later."""


class Authenticator(Protocol):
    """Decides who a bearer token belongs to."""

    async def authenticate(self, token: str) -> Caller:
        """The token's owner. Raises UnauthenticatedError, UndecidedError."""
        ...


async def authenticate(authenticator: Authenticator, metadata: Mapping[str, object] | None) -> Caller:
    """The caller of a request with this gRPC metadata. Raises UnauthenticatedError, UndecidedError."""
    value = (metadata or {}).get("authorization")
    if not isinstance(value, str) or not value:
        raise UnauthenticatedError("no token: send metadata `authorization: Bearer TOKEN`")
    scheme, _, token = value.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise UnauthenticatedError("the `authorization` metadata is not of the form `Bearer TOKEN`")
    if len(token) > _MAX_TOKEN_BYTES:
        raise UnauthenticatedError(f"the token is longer than {_MAX_TOKEN_BYTES} bytes")
    return await authenticator.authenticate(token)


class _TokenFile(NamedTuple):
    stamp: tuple[int, int, int]  # inode, size, modification time: another file or content, another stamp
    token: bytes


class TokenDirectory:
    """Tokens of node proxies kept as files: a file's name is its node's, its content the token.

    Re-read when files change.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokens: dict[str, _TokenFile] = {}

    async def authenticate(self, token: str) -> Caller:
        """The node whose file holds the token. Raises UnauthenticatedError."""
        try:
            self._refresh()
        except OSError as error:
            raise UnauthenticatedError(f"the tokens cannot be read: {error.strerror}") from error
        given = token.encode()
        # All are compared, each in constant time, so that the time taken tells nothing about any of them.
        nodes = [node for node, known in self._tokens.items() if hmac.compare_digest(known.token, given)]
        if len(nodes) != 1:
            raise UnauthenticatedError(
                "the token belongs to several nodes; give each node its own"
                if nodes
                else "the token is not that of a node; it may have been replaced: read it again from its file"
            )
        namespace, _, name = NODE_PROXIES[0].partition("/")
        return Caller(nodes[0], namespace, name)

    def _refresh(self) -> None:
        tokens: dict[str, _TokenFile] = {}
        with os.scandir(self._path) as files:
            for file in files:
                # A name with a dot first is a file that is being written.
                if file.name.startswith(".") or not file.is_file():
                    continue
                try:
                    stat = file.stat()
                    stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                    known = self._tokens.get(file.name)
                    if known is None or known.stamp != stamp:
                        known = _TokenFile(stamp, Path(file.path).read_bytes().strip())
                except FileNotFoundError:
                    continue
                if known.token:
                    tokens[file.name] = known
        self._tokens = tokens
