"""The DNS of a node's pods: takes their captured queries, answers those for the mesh, passes on the others.

A socket pair of UDP and TCP in each pod's namespace, all served by this one process. Datagrams are handled by
callbacks (`poller`), connections by tasks (`streams`).
"""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

import trio

from ztunnel.dns import packets
from ztunnel.dns.counters import Counters
from ztunnel.dns.forward import Client, Forwarder
from ztunnel.dns.limits import Limit
from ztunnel.dns.names import CLUSTER_DOMAIN, lookup
from ztunnel.dns.packets import Query
from ztunnel.dns.pod import PORT, Address, DnsPod
from ztunnel.dns.poller import Poller
from ztunnel.dns.streams import Streams
from ztunnel.inpod import netns
from ztunnel.mesh.model import pod_uid
from ztunnel.mesh.state import MeshState

log = logging.getLogger(__name__)

MOST_QUERIES = 2000  # passed on and not answered yet
MOST_CONNECTIONS = 512
BURST = 32  # datagrams of one socket before the next one's turn
ACCEPT_PAUSE = 0.1  # seconds for which a process without free descriptors accepts nothing
DRAIN = 5.0  # seconds for queries under way at the end
UNKNOWN = "unknown"
NOWHERE = {socket.AF_INET: ("127.0.0.1", 1), socket.AF_INET6: ("::1", 1)}


class DnsError(Exception):
    """A pod's DNS cannot be served; the message goes back to the node agent."""


class DnsServer:
    """`synced()`: whether the mesh is known as a whole; before that everything is passed on.

    `servers` are asked where the kernel does not tell whom a program asked.
    """

    def __init__(
        self,
        state: MeshState,
        *,
        synced: Callable[[], bool],
        network: str = "",
        cluster_id: str = "",
        servers: Sequence[Address] = (),
        domain: str = CLUSTER_DOMAIN,
        port: int = PORT,
        most_queries: int = MOST_QUERIES,
        most_connections: int = MOST_CONNECTIONS,
    ) -> None:
        self.counters = Counters()
        self._state = state
        self._synced = synced
        self._network = network
        self._cluster_id = cluster_id
        self._domain = domain
        self._port = port
        self._pods: dict[str, DnsPod] = {}
        self._poller = Poller(self._failed)
        self._limit = Limit(most_queries)
        given = list(servers)
        self._forwarder = Forwarder(self._poller, self.counters, self._limit, lambda: given)
        self._streams = Streams(
            self.answer, self.counters, Limit(most_connections), self._limit, lambda: given
        )
        self._nursery: trio.Nursery | None = None

    def describe(self) -> dict[str, object]:
        """For the admin pages."""
        return {
            "pods": len(self._pods),
            "queries_under_way": self._limit.taken,
            "connections": self._streams.open,
            **self.counters.describe(),
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    await self._poller.wait(self._forwarder.next_due)
                    self._poller.call_back()
                    self._forwarder.run_due()
        finally:
            self._nursery = None
            for uid in list(self._pods):
                self.delete(uid)
            self._poller.close()

    # Pods.

    def add(self, uid: str, name: str, namespace: str, netns_fd: int) -> None:
        """Answer a pod's queries; `netns_fd` stays the caller's. Raises DnsError.

        A pod that is served already, in the same network namespace, is left as it is.
        """
        old = self._pods.get(uid)
        if old is not None:
            if netns.inode(old.netns_fd) == netns.inode(netns_fd):
                return
            self.delete(uid)
        try:
            names = partial(self._names, pod_uid(self._cluster_id, namespace, name))
            pod = DnsPod(uid, name, namespace, os.dup(netns_fd), names, self._port)
            pod.open()
        except OSError as error:
            remedy = (
                "the mesh needs it free there" if error.errno == errno.EADDRINUSE else "DNS capture needs it"
            )
            raise DnsError(
                f"pod {namespace}/{name}: cannot listen on port {self._port} (DNS) in its network namespace: "
                f"{error.strerror}; {remedy}"
            ) from None
        self._pods[uid] = pod
        for sock in pod.datagrams:
            self._poller.add(sock, partial(self._datagrams, pod, sock))
        for listener in pod.listeners:
            self._poller.add(listener, partial(self._accept, pod, listener))

    def _names(self, uid: str) -> tuple[str, str, bool]:
        workload = self._state.workload_by_uid(uid)
        if workload is None:
            return UNKNOWN, UNKNOWN, False
        return workload.canonical_name or UNKNOWN, workload.canonical_revision or UNKNOWN, True

    def delete(self, uid: str) -> None:
        """No longer answer a pod's queries. One that is not known is no error."""
        pod = self._pods.pop(uid, None)
        if pod is not None:
            self._forwarder.forget(pod)
            for sock in (*pod.datagrams, *pod.listeners):
                self._poller.remove(sock)
            pod.close()

    async def drain(self) -> None:
        """Take no new queries, and end those that are under way (5 s at most).

        Another process that listens in the same pods gets all from now on. What is in our queues already is answered:
        a socket that is connected elsewhere gets no more, and is then read to its end.
        """
        for pod in self._pods.values():
            for sock in pod.datagrams:
                with contextlib.suppress(OSError):
                    sock.connect(NOWHERE[socket.AddressFamily(sock.family)])
                self._datagrams(pod, sock, 1 << 16)
                self._poller.remove(sock)
            for listener in pod.listeners:
                self._accept(pod, listener)
                self._poller.remove(listener)
                listener.close()
        with trio.move_on_after(DRAIN):
            while self._limit.taken or self._streams.open:
                await trio.sleep(0.02)
        for uid in list(self._pods):
            self.delete(uid)

    # Queries.

    def _failed(self, error: Exception) -> None:
        self.counters.faults["internal"] += 1
        log.error("internal error; a query is not answered: %s: %s", type(error).__name__, error)

    def _datagrams(self, pod: DnsPod, own: socket.socket, most: int = BURST) -> None:
        for _ in range(most):
            try:
                data, client = own.recvfrom(packets.MAX_SIZE)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error for an earlier answer
                continue
            try:
                self._datagram(pod, own, data, client)
            except Exception as error:
                self._failed(error)

    def _datagram(self, pod: DnsPod, own: socket.socket, data: bytes, client: Client) -> None:
        try:
            query = packets.parse(data)
        except packets.NotAQuery:
            self.counters.faults["malformed"] += 1
            return
        except packets.FormatError:
            self.counters.faults["malformed"] += 1
            self._reply(own, packets.format_error(data), client)
            return
        if pod.asking and ("udp", client[0], client[1]) in pod.asking:
            self.counters.faults["looping"] += 1
            return
        self.counters.requests[pod.labels(query.type_name, "udp")] += 1
        reply = self.answer(pod, query, query.udp_size)
        if reply is None:
            self._forwarder.ask(pod, own, client, query)
        else:
            self._reply(own, reply, client)

    def _reply(self, own: socket.socket, data: bytes, client: Client) -> None:
        with contextlib.suppress(OSError):
            own.sendto(data, client)

    def answer(self, pod: DnsPod, query: Query, limit: int) -> bytes | None:
        """The answer of at most `limit` bytes, or None if another server has to give it."""
        if query.qtype not in (packets.A, packets.AAAA) or query.qclass != packets.IN or not query.plain:
            return None
        if not self._synced():
            return None
        found = lookup(self._state, pod.namespace, self._network, query.name, query.qtype, self._domain)
        if found is None:
            return None
        if query.edns > 0:
            return packets.refusal(query, packets.BADVERS)
        if not found.addresses:
            return packets.no_data(query, found.zone)
        return packets.addresses(query, found.addresses, limit, found.cut)

    def _accept(self, pod: DnsPod, listener: socket.socket) -> None:
        for _ in range(BURST):
            if self._nursery is None:
                return
            try:
                connection, _ = listener.accept()
            except OSError as error:  # nobody waits (any more), or there are no descriptors left
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._poller.remove(listener)
                    self._nursery.start_soon(self._accept_later, pod, listener)
                return
            connection.setblocking(False)
            self._nursery.start_soon(self._stream, pod, connection)

    async def _accept_later(self, pod: DnsPod, listener: socket.socket) -> None:
        await trio.sleep(ACCEPT_PAUSE)
        if listener in pod.listeners and listener.fileno() >= 0:
            self._poller.add(listener, partial(self._accept, pod, listener))

    async def _stream(self, pod: DnsPod, connection: socket.socket) -> None:
        try:
            await self._streams.serve(pod, connection)
        except Exception as error:
            self._failed(error)
