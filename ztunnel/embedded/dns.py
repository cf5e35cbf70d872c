"""The cluster's DNS server: in every node's namespace, at one address, over UDP and TCP.

zone.py knows the answers. What it does not know goes to the resolvers of the machine itself, asked from the
supervisor's own namespace; the pods have no other way out.
"""

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from ztunnel.embedded.addresses import DNS_VIP
from ztunnel.embedded.network import netlink
from ztunnel.embedded.view import View
from ztunnel.embedded.zone import PLAIN_UDP_SIZE, reply
from ztunnel.inpod import netns

PORT = 53
UPSTREAM_TIMEOUT = 2.0
UPSTREAM_PAUSE = 5.0  # how long resolvers that did not answer are left alone
TCP_IDLE = 10.0
MAX_PENDING = 200
RESOLV_CONF = Path("/etc/resolv.conf")


class Upstream:
    """The machine's own resolvers, over UDP.

    `sockets` are made where the machine's network is; a process in a namespace of its own makes them before.
    """

    def __init__(
        self, sockets: Sequence[socket.socket], resolv_conf: Path = RESOLV_CONF, port: int = PORT
    ) -> None:
        self._sockets = {s.family: trio.socket.from_stdlib_socket(s) for s in sockets}
        self._resolv_conf = resolv_conf
        self._port = port
        self._waiting: dict[int, tuple[trio.MemorySendChannel[bytes], bytes]] = {}
        self._pause_until = 0.0

    @staticmethod
    def open_sockets() -> list[socket.socket]:
        """One UDP socket for each IP family this machine has."""
        sockets = []
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                sockets.append(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
        return sockets

    def servers(self) -> list[str]:
        """The addresses that resolv.conf(5) names, three at most."""
        try:
            lines = self._resolv_conf.read_text().splitlines()
        except OSError:
            return []
        return [words[1] for line in lines if len(words := line.split()) > 1 and words[0] == "nameserver"][:3]

    async def ask(self, query: bytes) -> bytes | None:
        """The answer of the first resolver that gives one within 2 s, or None."""
        servers = self.servers()
        if not servers or time.monotonic() < self._pause_until or len(self._waiting) >= MAX_PENDING:
            return None
        number = secrets.randbelow(65536)
        while number in self._waiting:
            number = secrets.randbelow(65536)
        send, receive = trio.open_memory_channel[bytes](1)
        self._waiting[number] = (send, query[12:])
        try:
            for server in servers:
                family = socket.AF_INET6 if ":" in server else socket.AF_INET
                if family not in self._sockets:
                    continue
                with contextlib.suppress(OSError), trio.move_on_after(UPSTREAM_TIMEOUT):
                    await self._sockets[family].sendto(
                        struct.pack("!H", number) + query[2:], (server, self._port)
                    )
                    answer = await receive.receive()
                    return query[:2] + answer[2:]
        finally:
            del self._waiting[number]
        self._pause_until = time.monotonic() + UPSTREAM_PAUSE
        return None

    async def run(self) -> None:
        """Take in the answers, for ever."""
        async with trio.open_nursery() as nursery:
            for one in self._sockets.values():
                nursery.start_soon(self._receive, one)

    async def _receive(self, one: trio.socket.SocketType) -> None:
        while True:
            try:
                answer, _ = await one.recvfrom(65536)
            except OSError:  # an ICMP error for an earlier query
                continue
            waiting = self._waiting.get(int.from_bytes(answer[:2], "big")) if len(answer) > 12 else None
            if waiting is None or not answer[2] & 0x80:
                continue
            channel, question = waiting
            # An answer repeats its question; one that does not was meant for somebody else.
            end = question.find(b"\0") + 1
            if answer[12 : 12 + end].lower() == question[:end].lower():
                with contextlib.suppress(trio.WouldBlock):
                    channel.send_nowait(answer)


class ClusterDns:
    """Answers in each node's namespace, which `nodes` name by their files."""

    def __init__(self, view: View, nodes: Sequence[Path], upstream: Upstream | None = None) -> None:
        self._view = view
        self._nodes = nodes
        self._upstream = upstream
        self._pending = trio.CapacityLimiter(MAX_PENDING)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve for ever; started when every node has its sockets. Raises OSError, NetlinkError."""
        async with trio.open_nursery() as nursery:
            if self._upstream is not None:
                nursery.start_soon(self._upstream.run)
            for node in self._nodes:
                datagrams, listener = await trio.to_thread.run_sync(self._open, node)
                nursery.start_soon(self._serve_udp, trio.socket.from_stdlib_socket(datagrams), nursery)
                stream_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
                nursery.start_soon(trio.serve_listeners, self._serve_tcp, [stream_listener])
            task_status.started()

    @staticmethod
    def _open(node: Path) -> tuple[socket.socket, socket.socket]:
        with netlink(node) as link:
            loopback = link.link_lookup(ifname="lo")[0]
            link.addr("replace", index=loopback, address=DNS_VIP, prefixlen=32)
        namespace = netns.open_path(node)
        try:
            with netns.inside(namespace):
                datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                datagrams.bind((DNS_VIP, PORT))
                listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((DNS_VIP, PORT))
                listener.listen(64)
        finally:
            os.close(namespace)
        return datagrams, listener

    async def _answer(self, query: bytes, size: int | None) -> bytes | None:
        found = reply(self._view, query, size)
        if found is None:
            return None
        if found.forward and self._upstream is not None:
            return await self._upstream.ask(query) or found.data
        return found.data

    async def _serve_udp(self, datagrams: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                query, client = await datagrams.recvfrom(4096)
            except OSError:  # an ICMP error for an earlier answer
                continue
            nursery.start_soon(self._answer_udp, datagrams, query, client)

    async def _answer_udp(self, datagrams: trio.socket.SocketType, query: bytes, client: Any) -> None:
        async with self._pending:
            answer = await self._answer(query, PLAIN_UDP_SIZE)
            if answer is not None:
                with contextlib.suppress(OSError):
                    await datagrams.sendto(answer, client)

    async def _serve_tcp(self, stream: trio.SocketStream) -> None:
        """RFC 7766: queries, each after its length, answered one after the other."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                buffer = b""
                while True:
                    with trio.move_on_after(TCP_IDLE) as idle:
                        while len(buffer) < 2 or len(buffer) < 2 + int.from_bytes(buffer[:2], "big"):
                            data = await stream.receive_some(65536)
                            if not data:
                                return
                            buffer += data
                    if idle.cancelled_caught:
                        return
                    end = 2 + int.from_bytes(buffer[:2], "big")
                    query, buffer = buffer[2:end], buffer[end:]
                    async with self._pending:
                        answer = await self._answer(query, None)
                    if answer is None:
                        return
                    await stream.send_all(struct.pack("!H", len(answer)) + answer)
