"""WebSockets to a pod's subresources through the API server: port-forward and exec, in the protocol v4.channel.k8s.io.

A message is a byte for the channel and data. Of a port-forward, channel 0 is the connection and 1 its error, and each
begins with a message that repeats the port; of an exec, 1 is standard output, 2 standard error, 3 how it ended.
"""

import contextlib
import http.client
import io
import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import websocket

from ztunnel.store.kube import errors
from ztunnel.store.kube.errors import ApiError, answered
from ztunnel.store.kube.proxies import credentials

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from ztunnel.store.kube.access import Access

PROTOCOL = "v4.channel.k8s.io"
CONNECT = 10.0  # seconds
STDOUT, STDERR, ENDED = 1, 2, 3
_UNREACHED = (OSError, websocket.WebSocketException)


class PodPort(NamedTuple):
    """A TCP port of a pod, on its loopback too."""

    namespace: str
    pod: str
    port: int

    def __str__(self) -> str:
        return f"port {self.port} of pod {self.namespace}/{self.pod}"


def open_socket(access: "Access", path: str, query: Sequence[tuple[str, str]]) -> Any:
    """A WebSocket to a path of the API server. Raises ApiError."""
    url = urlsplit(access.server)
    scheme = "wss" if url.scheme == "https" else "ws"
    header = ["User-Agent: ambient-mesh"]
    if authorization := access.authorization():
        header.append(f"Authorization: {authorization}")
    settings: dict[str, Any] = {"suppress_origin": True}
    if (context := access.tls()) is not None:
        settings["sslopt"] = {"context": context, "check_hostname": True}
        if access.server_name:
            settings["sslopt"]["server_hostname"] = access.server_name
    if access.proxy:
        proxy = urlsplit(access.proxy)
        settings |= {"http_proxy_host": proxy.hostname, "http_proxy_port": proxy.port, "proxy_type": "http"}
        if user := credentials(access.proxy):
            settings["http_proxy_auth"] = tuple(user.split(":", 1))
    else:
        settings["http_no_proxy"] = ["*"]
    try:
        return websocket.create_connection(
            f"{scheme}://{url.netloc}{url.path}{path}?{urlencode(query)}",
            timeout=CONNECT,
            subprotocols=[PROTOCOL],
            header=header,
            **settings,
        )
    except websocket.WebSocketBadStatusException as error:
        body = error.resp_body or b""
        raise answered(error.status_code, body, f"GET {path}", path) from None
    except _UNREACHED as error:
        where = f"API server {access.server}"
        if isinstance(error, ssl.SSLError) and not errors.ended(error):
            told = getattr(error, "verify_message", "") or error.reason or str(error)
            message = f"{where}: no trusted connection ({told}); check the CA given"
            raise ApiError(0, "Untrusted", message) from None
        away = errors.ended(error) or isinstance(error, websocket.WebSocketConnectionClosedException)
        told = errors.ENDED if away else str(error)
        raise ApiError(
            0, "Unreachable", f"{where}: cannot be reached ({told}); check that it runs and its address"
        ) from None


class Forwarded:
    """A connection to a pod's port, as far as http.client needs a socket: open until its files are closed, too."""

    def __init__(self, access: "Access", to: PodPort, timeout: float | None) -> None:
        """Raises ApiError where the API server refuses, or is not reached."""
        path = f"/api/v1/namespaces/{to.namespace}/pods/{to.pod}/portforward"
        self._socket = open_socket(access, path, [("ports", str(to.port))])
        self._socket.settimeout(timeout)
        self._begun: set[int] = set()
        self._users = 1

    def settimeout(self, timeout: float | None) -> None:
        """Seconds that the next byte may take; None: for ever."""
        self._socket.settimeout(timeout)

    def sendall(self, data: bytes) -> None:
        """Send to the pod. Raises OSError."""
        with self._as_os_error():
            self._socket.send_binary(b"\0" + data)

    def makefile(self, mode: str = "rb", *_: object) -> io.BufferedReader:
        """What the pod sends, as a file."""
        self._users += 1
        return io.BufferedReader(_Received(self))

    def receive(self) -> bytes | None:
        """The next bytes, None at their end. Raises OSError, with what the node says of a port where nobody listens."""
        while True:
            with self._as_os_error():
                opcode, data = self._socket.recv_data()
            if opcode == websocket.ABNF.OPCODE_CLOSE or not data:
                return None
            channel = data[0]
            if channel not in self._begun:
                self._begun.add(channel)
            elif channel == 1:
                raise ConnectionRefusedError(None, f"the node says: {_told(data[1:])}")
            elif len(data) > 1:
                return bytes(data[1:])

    @contextlib.contextmanager
    def _as_os_error(self) -> Iterator[None]:
        try:
            yield
        except websocket.WebSocketTimeoutException as error:
            raise TimeoutError(None, "no answer in time") from error
        except websocket.WebSocketException as error:
            raise ConnectionResetError(None, str(error) or "the connection ended") from error

    def close(self) -> None:
        """One user less; the last one ends the connection."""
        self._users -= 1
        if self._users == 0:
            _end(self._socket)


class _Received(io.RawIOBase):
    """What comes over a connection, for a buffer."""

    def __init__(self, connection: Forwarded) -> None:
        super().__init__()
        self._connection = connection
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """The next bytes; 0 at their end. Raises OSError."""
        view = memoryview(buffer).cast("B")
        if not self._left:
            self._left = self._connection.receive() or b""
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        """One user of the connection less."""
        if not self.closed:
            self._connection.close()
        super().close()


class PodConnection(http.client.HTTPConnection):
    """HTTP to a port of a pod."""

    def __init__(self, access: "Access", to: PodPort, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._access = access
        self._to = to

    def connect(self) -> None:
        """Connect. Raises ApiError."""
        self.sock = Forwarded(self._access, self._to, self.timeout)


class Execution:
    """A program that runs in a container. Iterating gives what it prints, as it comes, each with STDOUT or STDERR;
    ENDED, and Kubernetes' Status of its end, is the last. Closing ends its standard input.
    """

    def __init__(
        self, access: "Access", namespace: str, pod: str, container: str, argv: Sequence[str]
    ) -> None:
        """Raises ApiError."""
        self._server = access.server
        self._path = f"/api/v1/namespaces/{namespace}/pods/{pod}/exec"
        query = [("container", container), *((name, "true") for name in ("stdin", "stdout", "stderr"))]
        self._socket = open_socket(access, self._path, [*query, *(("command", word) for word in argv)])
        self._socket.settimeout(None)

    def send(self, data: bytes) -> None:
        """Give the program something to read."""
        with contextlib.suppress(*_UNREACHED):  # it has ended already
            self._socket.send_binary(b"\0" + data)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Raises ApiError where the connection breaks."""
        try:
            while True:
                opcode, data = self._socket.recv_data()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    return
                if len(data) > 1:
                    yield data[0], bytes(data[1:])
        except _UNREACHED as error:
            raise ApiError(
                0,
                "Broken",
                f"{self._path}: the connection to API server {self._server} ended ({error}); try again",
            ) from None

    def close(self) -> None:
        """End the connection."""
        _end(self._socket)


def _end(channel: Any) -> None:
    # The other side is not waited for: it may be a node that is gone.
    with contextlib.suppress(*_UNREACHED):
        if channel.sock is not None:
            channel.sock.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(*_UNREACHED):
        channel.shutdown()


def _told(data: bytes) -> str:
    text = " ".join(data.decode(errors="replace").split())
    # What kubelet says ends with the reason, after the ids of its sandbox.
    return text.rpartition(": ")[2] if "connection refused" in text else text[:300]
