"""Requests to a Kubernetes API server: blocking, from any thread, with errors that name the object and the remedy.

Stands on urllib3 alone where it runs in a pod: the `kubernetes` package costs 35 MB of memory and is loaded only to
read a kubeconfig. Objects are plain data here; who wants them typed decodes them (store.py).
"""

import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Self
from urllib.parse import quote, urlencode

import msgspec
import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError, SSLError

from ztunnel.store.kube import access as accesses
from ztunnel.store.kube.access import Access
from ztunnel.store.kube.discovery import Discovery, Resource, base
from ztunnel.store.kube.errors import ENDED, ApiError, NoSuchKind, answered, ended
from ztunnel.store.kube.events import Events
from ztunnel.store.kube.proxies import credentials
from ztunnel.store.kube.stream import Stream
from ztunnel.store.models import reference

__all__ = ["Api", "ApiError", "NoSuchKind", "Resource", "Stream"]

Propagation = Literal["Foreground", "Background", "Orphan"]

_CONNECT: Final = 10.0  # seconds for a connection to be made
_CONNECTIONS: Final = 32  # kept for the next request
_CONFLICTS: Final = 5  # how often a merge patch is tried again that met another one
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_MERGE: Final = "application/merge-patch+json"
_APPLY: Final = "application/apply-patch+yaml"
# A server that vanished without a word is noticed within a minute, by those too who only listen.
_SOCKET: Final = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
]


class Api:
    """One API server as one user. Every method may be called by several threads at once, and raises ApiError."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._limit: Callable[[float], float] | None = None
        self._lock = threading.Lock()
        self._pool: urllib3.PoolManager | None = None
        self._stamp: tuple[tuple[int, int], ...] = ()  # of the files that the pool was made with
        self._discovery = Discovery(lambda path: self.request("GET", path))
        self._events = Events(self._send_event)

    @classmethod
    def in_cluster(
        cls, folder: Path = accesses.SERVICE_ACCOUNT, environment: Mapping[str, str] = os.environ
    ) -> Self:
        """As the service account of the pod that this is. Raises ApiError where it is none."""
        return cls(accesses.in_cluster(folder, environment))

    @classmethod
    def from_kubeconfig(cls, path: Path | None = None, context: str | None = None) -> Self:
        """As a kubeconfig's context (default: KUBECONFIG or ~/.kube/config, its current one). Raises ApiError."""
        return cls(accesses.from_kubeconfig(path, context))

    def while_allowed(self, limit: Callable[[float], float]) -> Self:
        """The same user of the same server, who changes something only while he may.

        `limit(timeout)` says, from any thread, how many seconds of them such a request may take; it raises ApiError
        where nothing may be changed.
        """
        other = type(self)(self._access)
        other._limit = limit
        return other

    @property
    def access(self) -> Access:
        """Where the API server is and who asks: for connections that are no requests."""
        return self._access

    @property
    def server(self) -> str:
        """The API server's URL."""
        return self._access.server

    @property
    def namespace(self) -> str:
        """The namespace of the context, or of the pod."""
        return self._access.namespace

    def close(self) -> None:
        """Close the connections that wait for another request."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.clear()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] = _NOTHING,
        body: dict[str, Any] | bytes | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        timeout: float = 30,
    ) -> bytes:
        """The answer's body. A server that is busy and says for how long is asked again, within `timeout` seconds."""
        data = msgspec.json.encode(body) if isinstance(body, dict) else body
        if self._limit is not None and method not in ("GET", "HEAD") and "dryRun" not in query:
            timeout = self._limit(timeout)
        what, deadline = f"{method} {path}", time.monotonic() + timeout
        again = method in ("GET", "HEAD") or content_type == _APPLY
        fresh_token = True
        while True:
            left = max(0.001, deadline - time.monotonic())
            response = self._open(method, path, query, data, content_type, accept, left, again)
            answer = response.data
            if response.status < 300:
                return answer
            error = answered(response.status, answer, what, path, response.headers.get("Retry-After"))
            if error.status == 401 and fresh_token:
                # The token was replaced between reading it and its being looked at.
                fresh_token = False
                continue
            wait = error.retry_after
            if not wait or time.monotonic() + wait > deadline:
                raise error
            time.sleep(wait * random.uniform(1.0, 1.2))  # noqa: S311 (no secret: so that not all come at once)

    def get_json(self, path: str, **query: str) -> dict[str, Any]:
        """The object or list at a path."""
        return _data(self.request("GET", path, query=query), path)

    def stream(
        self,
        path: str,
        query: Mapping[str, str] = _NOTHING,
        *,
        silence: float = 0,
        accept: str = "application/json",
    ) -> Stream:
        """The lines of an answer that goes on (a watch, logs); broken by `silence` seconds without one (0: never)."""
        response = self._open("GET", path, query, None, "", accept, 30, False, stream=True, silence=silence)
        if response.status >= 300:
            data = response.data
            raise answered(response.status, data, f"GET {path}", path, response.headers.get("Retry-After"))
        return Stream(response, f"GET {path}")

    def resource(self, api_version: str, kind: str) -> Resource:
        """How the server serves a kind. Raises NoSuchKind."""
        return self._discovery.find(api_version, kind)

    def forget(self, api_version: str) -> None:
        """Ask the server again what it serves of this version: something of it has gone."""
        self._discovery.forget(api_version)

    def serves(self, api_version: str, kind: str) -> bool:
        """Whether the cluster has the kind."""
        try:
            self._discovery.find(api_version, kind)
        except NoSuchKind:
            return False
        return True

    def path(
        self, api_version: str, kind: str, namespace: str = "", name: str = "", subresource: str = ""
    ) -> str:
        """Where objects of a kind are: all, those of a namespace, one of them, a part of it. Raises NoSuchKind.

        The namespace of a kind without one is not looked at.
        """
        resource = self._discovery.find(api_version, kind)
        parts = [base(api_version)]
        if resource.namespaced and namespace:
            parts += ["namespaces", quote(namespace, safe="")]
        elif resource.namespaced and name:
            raise ApiError(0, "NoNamespace", f"{kind} {name}: is in no namespace; say in which one it is")
        parts.append(resource.plural)
        parts += [quote(part, safe="") for part in (name, subresource) if part]
        return "/".join(parts)

    def apply(
        self,
        obj: dict[str, Any],
        *,
        field_manager: str = "ambient",
        force: bool = True,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Server-side apply: the object as it is then. `force` takes over fields that others manage."""
        metadata = obj.get("metadata") or {}
        kind, name = str(obj.get("kind", "")), str(metadata.get("name", ""))
        namespace = str(metadata.get("namespace") or "")
        with _about(kind, namespace, name):
            api_version = str(obj.get("apiVersion", ""))
            if self._discovery.find(api_version, kind).namespaced:
                namespace = namespace or self.namespace
            path = self.path(api_version, kind, namespace, name)
            query = {"fieldManager": field_manager, "force": "true" if force else "false"}
            if dry_run:
                query["dryRun"] = "All"
            return _data(self.request("PATCH", path, query=query, body=obj, content_type=_APPLY), path)

    def delete(
        self,
        api_version: str,
        kind: str,
        namespace: str,
        name: str,
        *,
        propagation: Propagation = "Background",
        uid: str = "",
    ) -> bool:
        """False if there was none (with `uid`: none of that uid), or no such kind. It may take a while to be gone."""
        options: dict[str, Any] = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": propagation,
        }
        if uid:
            options["preconditions"] = {"uid": uid}
        with _about(kind, namespace, name):
            try:
                self.request("DELETE", self.path(api_version, kind, namespace, name), body=options)
            except ApiError as error:
                if error.not_found or (uid and error.conflict):
                    return False
                raise
        return True

    def patch(
        self,
        api_version: str,
        kind: str,
        namespace: str,
        name: str,
        merge: dict[str, Any],
        subresource: str = "",
    ) -> dict[str, Any]:
        """A JSON merge patch (RFC 7386) of an object, or of its `status`: the object as it is then.

        Tried again where it met another change, unless the patch itself names a resourceVersion.
        """
        pinned = "resourceVersion" in (merge.get("metadata") or {})
        with _about(kind, namespace, name):
            path = self.path(api_version, kind, namespace, name, subresource)
            for attempt in range(_CONFLICTS):
                try:
                    return _data(self.request("PATCH", path, body=merge, content_type=_MERGE), path)
                except ApiError as error:
                    if not error.conflict or pinned or attempt == _CONFLICTS - 1:
                        raise
                time.sleep(random.uniform(0, 0.05) * 2**attempt)  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    def get(self, api_version: str, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        """One object, None if there is none, or no such kind."""
        with _about(kind, namespace, name):
            try:
                return self.get_json(self.path(api_version, kind, namespace, name))
            except ApiError as error:
                if error.not_found:
                    return None
                raise

    def list(
        self, api_version: str, kind: str, namespace: str = "", label_selector: str = "", limit: int = 500
    ) -> list[dict[str, Any]]:
        """The objects of a kind, of one namespace or of all, fetched `limit` at a time. Raises NoSuchKind too."""
        found: list[dict[str, Any]] = []
        with _about(kind, namespace, ""):
            path = self.path(api_version, kind, namespace)
            query = {"labelSelector": label_selector} if label_selector else {}
            following, restarted = "", False
            while True:
                page = {"limit": str(limit), **({"continue": following} if following else {})}
                try:
                    data = self.get_json(path, **query, **page)
                except ApiError as error:
                    if not error.gone or restarted:
                        raise
                    # Reading took longer than the server keeps its history (5 minutes): once more, in one piece.
                    found, following, restarted, limit = [], "", True, 0
                    continue
                for item in data.get("items") or ():
                    found.append({"apiVersion": api_version, "kind": kind, **item})
                following = str((data.get("metadata") or {}).get("continue") or "")
                if not following:
                    return found

    def event(
        self,
        obj_ref: Mapping[str, Any],
        *,
        reason: str,
        message: str,
        type: Literal["Normal", "Warning"] = "Warning",  # noqa: A002 (the field's name)
        component: str = "istio-cni",
    ) -> None:
        """A core/v1 Event on an object (`apiVersion`, `kind`, `namespace`, `name`, `uid`); the same again counts up."""
        self._events.emit(obj_ref, reason, message, type, component)

    def _send_event(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        content_type = _MERGE if method == "PATCH" else "application/json"
        return _data(self.request(method, path, body=body, content_type=content_type), path)

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes | None,
        content_type: str,
        accept: str,
        timeout: float,
        again: bool,
        *,
        stream: bool = False,
        silence: float = 0,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request; its answer, read already unless it is a stream."""
        headers = {"Accept": accept, "User-Agent": "ambient-mesh"}
        if body is not None:
            headers["Content-Type"] = content_type
        if authorization := self._access.authorization():
            headers["Authorization"] = authorization
        url = self.server + path + (f"?{urlencode(query)}" if query else "")
        # A stream is waited for only until it begins.
        limit = urllib3.Timeout(
            total=None if stream else timeout, connect=min(_CONNECT, timeout), read=timeout
        )
        until = time.monotonic() + timeout
        try:
            response = self._connections().request(
                method,
                url,
                body=body,
                headers=headers,
                timeout=limit,
                preload_content=not stream,
                retries=False,
                redirect=False,
            )
            if stream and (sock := getattr(response.connection, "sock", None)) is not None:
                sock.settimeout(silence or None)
        except (HTTPError, OSError) as error:
            # A connection that was kept may have been closed by the server in this very moment.
            if again and not stream and isinstance(error, urllib3.exceptions.ProtocolError):
                left = max(0.001, until - time.monotonic())
                return self._open(method, path, query, body, content_type, accept, left, False)
            raise self._unreached(method, path, error) from None
        return response

    def _connections(self) -> urllib3.PoolManager:
        """The pool, made anew when the files that it was made with have changed."""
        try:
            stamp = tuple(
                (stat.st_mtime_ns, stat.st_ino) for stat in (file.stat() for file in self._access.files)
            )
        except OSError:
            stamp = self._stamp  # being replaced just now
        with self._lock:
            if self._pool is None or stamp != self._stamp:
                try:
                    self._pool = self._make_pool()
                except (OSError, ssl.SSLError) as error:
                    files = ", ".join(map(str, self._access.files))
                    raise ApiError(
                        0, "Unusable", f"{files}: cannot be used ({error}); check the CA file"
                    ) from None
                self._stamp = stamp
            return self._pool

    def _make_pool(self) -> urllib3.PoolManager:
        settings: dict[str, Any] = {"maxsize": _CONNECTIONS, "block": False, "socket_options": _SOCKET}
        if (context := self._access.tls()) is not None:
            settings["ssl_context"] = context
            if self._access.server_name:
                settings |= {"server_hostname": self._access.server_name}
        if self._access.proxy:
            user = credentials(self._access.proxy)
            headers = urllib3.make_headers(proxy_basic_auth=user) if user else None
            return urllib3.ProxyManager(self._access.proxy, proxy_headers=headers, **settings)
        return urllib3.PoolManager(**settings)

    def _unreached(self, method: str, path: str, error: Exception) -> ApiError:
        where = f"API server {self.server}"
        cause: BaseException = error
        while isinstance(getattr(cause, "reason", None), BaseException):
            cause = cause.reason  # type: ignore[attr-defined]
        if not ended(error) and (isinstance(error, SSLError) or isinstance(cause, ssl.SSLError)):
            told = getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or str(cause)
            return ApiError(
                0, "Untrusted", f"{where}: no trusted connection ({told}); check its address and the CA given"
            )
        if isinstance(error, ReadTimeoutError):
            return ApiError(0, "Timeout", f"{method} {path}: no answer in time from {self.server}; try again")
        if ended(error):
            told = ENDED
        elif isinstance(error, ConnectTimeoutError) and not isinstance(error, NewConnectionError):
            told = "connecting took too long"
        elif isinstance(error, NewConnectionError):
            told = str(error).rpartition(": ")[2]
        else:
            told = " ".join(str(cause).split())[:200] or type(cause).__name__
        return ApiError(
            0, "Unreachable", f"{where}: cannot be reached ({told}); check that it runs and its address"
        )


class _about:  # noqa: N801 (used like a function)
    """Puts the object before what is said of a request that fails within."""

    def __init__(self, kind: str, namespace: str, name: str) -> None:
        self._ref = reference(kind, namespace, name) if name or not namespace else f"{kind} of {namespace}"
        self._named = bool(name)

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if not isinstance(error, ApiError) or error.message.startswith(self._ref):
            return
        if (
            self._named or not error.unreachable
        ):  # of a server that is away, what was to be listed tells nothing
            error.message = f"{self._ref}: {error.message}"
            error.args = (error.message,)


def _data(body: bytes, path: str) -> dict[str, Any]:
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        data = None
    if not isinstance(data, dict):
        raise ApiError(
            0, "Garbled", f"{path}: the answer is no JSON object; is this the API server's address?"
        )
    return data
