"""A small HTTP server that answers as a test tells it to: for what no real API server does on demand."""

import contextlib
import json
import queue
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from ztunnel.store.kube.access import Access
from ztunnel.store.kube.api import Api


class Request(NamedTuple):
    """What came in. `query` has each parameter once."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    """What goes out: a body, or chunks as they are put into a queue until there comes None."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = MappingProxyType({})
    chunks: "queue.Queue[bytes | None] | None" = None


def failure(status: int, reason: str, message: str, **headers: str) -> Answer:
    """A refusal as API servers write it."""
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": message,
        "code": status,
    }
    return Answer(status, body, headers)


Handler = Callable[[Request], Answer]


class Fake:
    """Answers with `handle`; `requests` are those that came."""

    def __init__(self, handle: Handler, context: ssl.SSLContext | None = None) -> None:
        self.handle = handle
        self.requests: list[Request] = []
        fake = self

        class Handling(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = Request(
                    self.command, parts.path, dict(parse_qsl(parts.query)), dict(self.headers.items()), body
                )
                fake.requests.append(request)
                answer = fake.handle(request)
                if answer.status == 0:  # end without a word
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                if answer.chunks is not None:
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    with contextlib.suppress(OSError):
                        while (chunk := answer.chunks.get()) is not None:
                            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                            self.wfile.flush()
                        self.wfile.write(b"0\r\n\r\n")
                    return
                data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = answer

            def log_message(self, _format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handling)
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def api(self, token: str = "") -> Api:
        """A client of it, in plaintext."""
        return Api(Access(self.url, "team", lambda: None, lambda: token and f"Bearer {token}"))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serving(handle: Handler, context: ssl.SSLContext | None = None) -> Iterator[Fake]:
    fake = Fake(handle, context)
    try:
        yield fake
    finally:
        fake.close()


CORE = {
    "resources": [
        {"name": "pods", "kind": "Pod", "namespaced": True},
        {"name": "pods/status", "kind": "Pod", "namespaced": True},
        {"name": "nodes", "kind": "Node", "namespaced": False},
        {"name": "services", "kind": "Service", "namespaced": True},
        {"name": "namespaces", "kind": "Namespace", "namespaced": False},
    ]
}
