"""Two tunnels joined by a TCP connection, with application sockets at both ends, in one reactor that a test turns."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ztunnel import hbone
from ztunnel.identity.ca import Authority
from ztunnel.identity.testing import CLIENT, SERVER, workload
from ztunnel.identity.tls import mesh_context, verify_peer
from ztunnel.proxy import tls
from ztunnel.proxy.context import Context, Identity, Pod
from ztunnel.proxy.errors import ProxyError
from ztunnel.proxy.relay import FLOWING, WAITING, AppStream, StreamOwner
from ztunnel.proxy.tunnel import CLOSED, HANDSHAKE, OPEN, Tunnel
from ztunnel.telemetry.access import INBOUND, OUTBOUND
from ztunnel.telemetry.log import Logger

LIMIT = 10.0  # seconds for whatever is waited for


class Owner(StreamOwner):
    """Remembers what became of a stream."""

    def __init__(self) -> None:
        self.ends: list[ProxyError | None] = []
        self.statuses: list[int] = []
        self.lost_to: list[ProxyError] = []
        self.refusals = 0

    def answered(self, stream: AppStream, status: int) -> None:
        self.statuses.append(status)
        stream.flow()

    def refused(self, stream: AppStream) -> None:
        self.refusals += 1

    def lost(self, stream: AppStream, error: ProxyError) -> None:
        self.lost_to.append(error)

    def over(self, stream: AppStream, error: ProxyError | None) -> None:
        stream.record.finish(error)
        self.ends.append(error)


class End(Tunnel):
    """A tunnel's end without pods: the server answers each CONNECT with 200 and an application socket."""

    def __init__(self, bench: "Bench", sock: socket.socket, role: hbone.Role) -> None:
        self.bench = bench
        self.ended_with: list[ProxyError | None] = []
        self.apps: list[socket.socket] = []
        self.owners: list[Owner] = []
        self.answers = True
        context = bench.client_tls if role is hbone.Role.CLIENT else bench.server_tls
        super().__init__(bench.context, sock, context, role, HANDSHAKE)

    def peer_label(self) -> str:
        return "the other end"

    def handshaken(self) -> None:
        verify_peer(self.engine.connection, "cluster.local", None)

    def opened(self) -> None:
        pass

    def on_stream_gone(self) -> None:
        if self.going:
            self._close_if_over()

    def on_closed(self, error: ProxyError | None) -> None:
        self.ended_with.append(error)

    def _app(self, direction: str, state: int) -> AppStream:
        ours, theirs = self.bench.tcp_pair()
        self.apps.append(theirs)
        owner = Owner()
        self.owners.append(owner)
        record = self.bench.context.record(direction, "app")
        return AppStream(self.bench.context.reactor, ours, record, owner, state)

    def on_connect_request(self, event: hbone.ConnectRequested) -> None:
        stream = self._app(INBOUND, FLOWING)
        stream.bind(self, event.stream_id)
        if self.answers:
            self.h2.respond(event.stream_id, 200)
            self.reactor.dirty.add(self)
            stream.flow()

    def connect(self) -> socket.socket:
        """Open a stream; the application's end of it."""
        stream = self._app(OUTBOUND, WAITING)
        stream.bind(self, self.h2.open_stream("10.0.0.1:80"))
        self.reactor.dirty.add(self)
        return self.apps[-1]

    def go(self) -> None:
        """What a server does whose pod leaves."""
        self.going = True
        self.h2.go_away(graceful=True)
        self.reactor.dirty.add(self)


class Bench:
    """The reactor, the certificates, and what happens."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "log"
        self._log = os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC)
        self.context = Context(Logger("debug", json=True, fd=self._log))
        self.context.trust_domain = "cluster.local"
        self.authority = Authority.create()
        self.client_tls = tls.prepare(mesh_context(workload(self.authority, CLIENT)))
        self.server_tls = tls.prepare(mesh_context(workload(self.authority, SERVER)))
        self._sockets: list[socket.socket] = []
        self.reactor = self.context.reactor

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            sock.close()
        self.reactor.close()
        os.close(self._log)

    def tcp_pair(self, **buffers: int) -> tuple[socket.socket, socket.socket]:
        """A connected pair over loopback: (non-blocking, blocking with a time limit)."""
        with socket.socket() as listener:
            for name, size in buffers.items():
                listener.setsockopt(socket.SOL_SOCKET, getattr(socket, name), size)
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            one = socket.socket()
            for name, size in buffers.items():
                one.setsockopt(socket.SOL_SOCKET, getattr(socket, name), size)
            one.connect(listener.getsockname())
            other, _ = listener.accept()
        one.setblocking(False)
        other.settimeout(LIMIT)
        self._sockets += [one, other]
        return one, other

    def tunnels(self, **buffers: int) -> tuple[End, End]:
        """Two ends, (client, server), past their handshakes."""
        one, other = self.tcp_pair(**buffers)
        other.setblocking(False)
        client, server = End(self, one, hbone.Role.CLIENT), End(self, other, hbone.Role.SERVER)
        self.until(lambda: client.state == server.state == OPEN)
        return client, server

    def until(self, condition: Callable[[], Any], limit: float = LIMIT) -> None:
        """Turn the reactor until it is so."""
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end:
                raise AssertionError("not within the limit")
            if not self.reactor.turn():
                time.sleep(0.0005)  # waits for the kernel, not for a result

    def settle(self) -> None:
        """Turn the reactor until nothing is ready for a while."""
        quiet = time.monotonic()
        while time.monotonic() - quiet < 0.05:
            if self.reactor.turn():
                quiet = time.monotonic()

    def read_all(self, sock: socket.socket) -> bytes:
        """What comes until the end, while the reactor turns."""
        sock.setblocking(False)
        data = bytearray()
        done = False

        def end() -> bool:
            nonlocal done
            try:
                piece = sock.recv(1 << 20)
            except BlockingIOError:
                return False
            data.extend(piece)
            done = not piece
            return done

        self.until(end)
        return bytes(data)

    def defects(self) -> list[str]:
        """Lines of the log that tell of defects."""
        return [line for line in self.log.read_text().splitlines() if "internal error" in line]

    def pod(self, number: int = 1, identity: str = CLIENT) -> Pod:
        """A pod whose network is this process's own, with a certificate."""
        one = Identity(identity)
        one.use(self.client_tls, self.server_tls, time.time() + 3600)
        namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        return Pod(number, f"uid-{number}", f"pod-{number}", "default", one, namespace, {})


__all__ = ["CLOSED", "LIMIT", "OPEN", "Bench", "End", "Owner"]
