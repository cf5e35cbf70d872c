"""The bookshop's program: one HTTP/1.1 server that plays productpage, reviews, details or ratings.

Standard library only. What it calls for a visitor it calls over connections that live exactly as long as the
visitor's own, so that nothing is left open when a visitor has gone.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ztunnel.cli.demo.http1 import Client, HttpError, Message, encode, read_message

MARKER = "x-bookshop-marker"
IDLE_SECONDS = 30.0
BOOKS: dict[str, dict[str, Any]] = {
    "productpage": {"title": "The Comedy of Errors"},
    "details": {"author": "William Shakespeare", "year": 1595, "pages": 200, "language": "English"},
    "reviews": {"reviews": ["An extremely entertaining play.", "Absolutely fun and entertaining."]},
    "ratings": {"ratings": {"Reviewer1": 5, "Reviewer2": 4}},
}


class Shop:
    """One role of the shop: what it knows itself, and the services it asks for the rest."""

    def __init__(self, role: str, version: str, calls: Sequence[str], port: int) -> None:
        self.role = role
        self.version = version
        self.calls = tuple(calls)
        self.port = port
        self.pod = os.environ.get("HOSTNAME") or socket.gethostname()

    def clients(self) -> dict[str, Client]:
        """A client for each service called: "NAME" (on the shop's own port) or "NAME:PORT"."""
        found = {}
        for call in self.calls:
            host, colon, port = call.rpartition(":")
            found[call] = Client(host, int(port)) if colon else Client(call, self.port)
        return found

    def answer(self, request: Message, clients: dict[str, Client]) -> tuple[str, bytes]:
        """Status and JSON page for a request; every page carries the request's marker, and so do the calls."""
        method, path, *_ = [*request.start.split(" "), ""]
        if method != "GET":
            return "405 Method Not Allowed", b'{"error": "only GET is served"}\n'
        marker = request.headers.get(MARKER, "")
        page: dict[str, Any] = {
            "service": self.role,
            "version": self.version,
            "pod": self.pod,
            "marker": marker,
        }
        page |= BOOKS.get(self.role, {})
        status = "200 OK"
        for call, client in clients.items() if path != "/health" else ():
            try:
                code, body = client.get("/", {MARKER: marker})
                page[call.partition(":")[0]] = json.loads(body)
            except (OSError, HttpError, ValueError) as error:
                code = 0
                page["error"] = f"{self.role} cannot reach {call}: {error}"
            if code != 200:
                status = "502 Bad Gateway"
        return status, json.dumps(page).encode() + b"\n"

    def serve(self, connection: socket.socket) -> None:
        """Answer one visitor until it leaves or has been idle for half a minute."""
        clients = self.clients()
        try:
            connection.settimeout(IDLE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection.makefile("rb") as stream:
                while (request := read_message(stream)) is not None:
                    status, page = self.answer(request, clients)
                    kept = {"Content-Type": "application/json"} | (
                        {} if request.keeps_alive else {"Connection": "close"}
                    )
                    connection.sendall(encode(f"HTTP/1.1 {status}", kept, page))
                    if not request.keeps_alive:
                        break
        except (OSError, HttpError):
            pass  # the visitor broke off, or was idle for long, or speaks no HTTP: nobody is left to tell
        finally:
            connection.close()
            for client in clients.values():
                client.close()


def listen(port: int) -> socket.socket:
    """A listening socket on all addresses, IPv6 and IPv4 (IPv4 alone where the kernel has no IPv6)."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    return socket.create_server(("", port), backlog=512)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a role until killed; prints `ROLE VERSION listening on port PORT` once it does."""
    parser = argparse.ArgumentParser(prog="bookshop", description="One role of the demo's bookshop.")
    parser.add_argument("role", choices=sorted(BOOKS))
    parser.add_argument("--version", default="v1")
    parser.add_argument("--port", type=int, default=9080, help="0: any free one")
    parser.add_argument("--calls", nargs="*", default=[], metavar="SERVICE[:PORT]")
    options = parser.parse_args(arguments)
    shop = Shop(options.role, options.version, options.calls, options.port)
    with listen(options.port) as listener:
        print(f"{shop.role} {shop.version} listening on port {listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=shop.serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
    sys.exit(0)
