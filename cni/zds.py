"""ZDS, the agent's side: tell every ztunnel that connects which pods are its own, and hand over their namespaces.

Each connection has one queue of orders, carried out in order, the next when the last is answered. A new
connection's queue starts with all pods there are at that moment, so that nothing falls between its snapshot and
the changes after it. Several proxies may be connected (an old one drains while its successor works): all get
every change, and the one that connected last is the one whose answer counts.
"""

import errno
import logging
import math
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import trio

from cni import zds_messages as messages
from ztunnel.inpod import netns
from ztunnel.inpod.pods import HANDLE_TIMEOUT, MAX_PACKET, WorkloadInfo, ZdsError

log = logging.getLogger(__name__)

HELLO_TIMEOUT = 10.0  # seconds for a peer to say who it is
ACK_TIMEOUT = HANDLE_TIMEOUT + 10  # seconds for ztunnel to answer; longer than it gives itself for one pod
MAX_SOCKET_PATH = 107  # bytes: sockaddr_un(7)
MAX_CONNECTIONS = 32

Peer = tuple[int, int]  # process id and its start time: one process for as long as the machine runs


@dataclass(eq=False)
class _Pod:
    """A pod as it was added: what to send, and who has answered what ("" is yes)."""

    uid: str
    info: WorkloadInfo
    path: Path
    inode: int
    answers: dict["_Connection", str] = field(default_factory=dict)
    known_to: set[Peer] = field(default_factory=set)

    def same(self, other: "_Pod") -> bool:
        return (self.info, self.path, self.inode) == (other.info, other.path, other.inode)


class _What(Enum):
    ADD = "AddWorkload"
    SNAPSHOT_ADD = "AddWorkload of the snapshot"
    DELETE = "DelWorkload"
    SNAPSHOT_SENT = "SnapshotSent"


@dataclass(eq=False)
class _Order:
    what: _What
    uid: str = ""
    pod: _Pod | None = None
    done: trio.Event = field(default_factory=trio.Event)
    error: str = ""


class _Connection:
    """One ztunnel: its socket and what it is still to be told."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock
        self.peer = _peer(sock)
        self.queue, self.orders = trio.open_memory_channel[_Order](math.inf)
        self.answers_in, self.answers = trio.open_memory_channel[str](0)
        self.waiting = False

    def __str__(self) -> str:
        return f"ztunnel (pid {self.peer[0]})" if self.peer else "ztunnel"


class ZdsServer:
    """Listens on the socket `path`; `on_synced` is called whenever a ztunnel has answered a whole snapshot."""

    def __init__(
        self,
        path: Path,
        *,
        on_synced: Callable[[], None] = lambda: None,
        ack_timeout: float = ACK_TIMEOUT,
        hello_timeout: float = HELLO_TIMEOUT,
    ) -> None:
        self._path = path
        self._on_synced = on_synced
        self._ack_timeout = ack_timeout
        self._hello_timeout = hello_timeout
        self._pods: dict[str, _Pod] = {}
        self._refused: set[str] = set()  # deleted, which the newest proxy refused
        self._connections: list[_Connection] = []  # those that said hello, the newest last
        self._changed = trio.Event()

    @property
    def connections(self) -> int:
        """How many proxies are connected now."""
        return len(self._connections)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, then remove the socket. Raises ZdsError where the path cannot be listened on."""
        with listen(self._path) as listener:
            inode = self._path.stat().st_ino
            try:
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    limit = trio.CapacityLimiter(MAX_CONNECTIONS)
                    while True:
                        await self._accept(listener, nursery, limit)
            finally:
                unlink_own(self._path, inode)

    async def _accept(
        self, listener: trio.socket.SocketType, nursery: trio.Nursery, limit: trio.CapacityLimiter
    ) -> None:
        try:
            accepted, _ = await listener.accept()
        except OSError as error:  # too many open files, or a peer gone already
            log.warning("ZDS %s: accept: %s", self._path, error)
            await trio.sleep(0.1)
            return
        if limit.available_tokens < 1:
            log.warning("ZDS %s: %d proxies are connected, refusing another", self._path, MAX_CONNECTIONS)
            accepted.close()
            return
        nursery.start_soon(self._serve, accepted, limit)

    def offer(self, uid: str, info: WorkloadInfo, path: Path) -> None:
        """Put a pod, whose network namespace `path` names, into every snapshot to come, and tell who is connected.

        Again is harmless: it is sent to those that refused it. Raises ZdsError where the path is not there.
        """
        try:
            pod = _Pod(uid, info, path, netns.inode(path))
        except OSError as error:
            raise ZdsError(f"pod {info.namespace}/{info.name}: {error}") from error
        known = self._pods.get(uid)
        if known is not None and known.same(pod):
            pod = known
        else:
            self._pods[uid] = pod
        for connection in self._connections:
            if pod is not known or pod.answers.get(connection):
                pod.answers.pop(connection, None)
                connection.queue.send_nowait(_Order(_What.ADD, uid, pod))

    async def add(self, uid: str, info: WorkloadInfo, path: Path, *, patience: float = ACK_TIMEOUT) -> None:
        """Hand a pod to the proxies as `offer` does, and wait for the ztunnel that connected last to have it.

        Returns at once if it has. Raises ZdsError where ztunnel refuses it, none is connected within `patience`
        seconds (the pod stays in the snapshot for the one that comes), or the path is not there.
        """
        await trio.lowlevel.checkpoint()  # a caller that is cancelled must not offer the pod any more
        self.offer(uid, info, path)
        pod = self._pods[uid]
        with trio.move_on_after(patience):
            while self._pods.get(uid) is pod:
                if self._connections and self._connections[-1] in pod.answers:
                    error_text = pod.answers[self._connections[-1]]
                    if error_text:
                        raise ZdsError(f"ztunnel refused pod {info.namespace}/{info.name}: {error_text}")
                    return
                await self._changed.wait()
            raise ZdsError(
                f"pod {info.namespace}/{info.name} was changed or removed while ztunnel was told of it"
            )
        lacking = "did not answer" if self._connections else "is not connected"
        raise ZdsError(
            f"pod {info.namespace}/{info.name}: ztunnel {lacking} within {patience:.0f} s; is it running, with "
            f"INPOD_UDS={self._path}?"
        )

    async def delete(self, uid: str) -> None:
        """Take a pod from the proxies; returns when the newest has answered, or there is none.

        A uid that is not known is no error. Raises ZdsError where ztunnel answers with one; then ask again.
        """
        if self._pods.pop(uid, None) is None and uid not in self._refused:
            return
        self._refused.discard(uid)
        newest: _Order | None = None
        for connection in self._connections:
            newest = _Order(_What.DELETE, uid)
            connection.queue.send_nowait(newest)
        self._notify()
        if newest is not None:
            await newest.done.wait()
            if newest.error:
                self._refused.add(uid)
                raise ZdsError(f"ztunnel did not drop pod {uid}: {newest.error}")

    def offered(self) -> Iterator[tuple[str, Path, int, bool]]:
        """Every pod there is: its uid, the path and inode of its namespace, and whether a proxy has taken it."""
        for uid, pod in self._pods.items():
            yield uid, pod.path, pod.inode, "" in pod.answers.values()

    async def changed(self) -> None:
        """Until a proxy came, went or answered, or a pod was offered or taken away."""
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _serve(self, accepted: trio.socket.SocketType, limit: trio.CapacityLimiter) -> None:
        async with limit:
            with accepted:
                connection = _Connection(accepted)
                try:
                    await _hello(connection, self._hello_timeout)
                    await self._talk(connection)
                except (ZdsError, OSError) as error:
                    log.warning("ZDS %s: %s: %s; connection closed", self._path, connection, error)

    async def _talk(self, connection: _Connection) -> None:
        # No await until the connection is listed: changes from here on queue up behind the snapshot.
        for uid, pod in self._pods.items():
            connection.queue.send_nowait(_Order(_What.SNAPSHOT_ADD, uid, pod))
        connection.queue.send_nowait(_Order(_What.SNAPSHOT_SENT))
        self._connections.append(connection)
        self._notify()
        log.info("ZDS %s: %s connected, %d pods", self._path, connection, len(self._pods))
        failure: list[Exception] = []
        carried: list[_Order] = []
        try:
            async with trio.open_nursery() as nursery:
                for work in (_read_answers(connection), self._carry_out(connection, carried)):
                    nursery.start_soon(_first_to_end, nursery, work, failure)
        finally:
            self._connections.remove(connection)
            for order in [*carried, *_rest(connection)]:
                order.done.set()
            for pod in self._pods.values():
                pod.answers.pop(connection, None)
            self._notify()
        if failure:
            raise failure[0]
        log.info("ZDS %s: %s disconnected", self._path, connection)

    async def _carry_out(self, connection: _Connection, carried: list[_Order]) -> None:
        async for order in connection.orders:
            carried[:] = [order]
            order.error = await self._order(connection, order)
            order.done.set()
            self._notify()

    async def _order(self, connection: _Connection, order: _Order) -> str:
        pod = order.pod
        if order.what is _What.SNAPSHOT_SENT:
            error = await self._ask(connection, messages.SNAPSHOT_SENT)
            self._on_synced()
        elif pod is None:
            error = await self._ask(connection, messages.delete(order.uid))
        elif self._pods.get(order.uid) is not pod:
            return ""  # deleted or replaced since; the order about that follows in the queue
        else:
            error = await self._hand_over(connection, pod, snapshot=order.what is _What.SNAPSHOT_ADD)
            pod.answers[connection] = error
            if not error and connection.peer:
                pod.known_to.add(connection.peer)
        if error:
            log.error(
                "ZDS %s: %s answered %s %s: %s", self._path, connection, order.what.value, order.uid, error
            )
        return error

    async def _hand_over(self, connection: _Connection, pod: _Pod, *, snapshot: bool) -> str:
        if (
            snapshot
            and connection.peer in pod.known_to
            and not await self._ask(connection, messages.keep(pod.uid))
        ):
            return ""
        try:
            descriptor = netns.open_path(pod.path)
        except OSError as error:
            return f"network namespace {error}"
        try:
            if netns.inode(descriptor) != pod.inode:
                return f"network namespace {pod.path} is another than when the pod was added"
            return await self._ask(connection, messages.add(pod.uid, pod.info), descriptor)
        finally:
            os.close(descriptor)

    async def _ask(
        self, connection: _Connection, request: messages.Request, descriptor: int | None = None
    ) -> str:
        """Send one request and wait for its answer: ztunnel's error text, "" for none."""
        rights = [] if descriptor is None else [_rights(descriptor)]
        with trio.move_on_after(self._ack_timeout):
            connection.waiting = True
            await connection.socket.sendmsg([request.data], rights)
            return await connection.answers.receive()
        raise ZdsError(f"no answer to {request.name} within {self._ack_timeout:g} s")


async def _first_to_end(nursery: trio.Nursery, work: Awaitable[None], failure: list[Exception]) -> None:
    """Do the work; at its end, good or bad, end the nursery, and keep why."""
    try:
        await work
    except (ZdsError, OSError) as error:
        failure.append(error)
    nursery.cancel_scope.cancel()


def _rights(descriptor: int) -> tuple[int, int, bytes]:
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor)


def _rest(connection: _Connection) -> list[_Order]:
    rest = []
    while True:
        try:
            rest.append(connection.orders.receive_nowait())
        except trio.WouldBlock:
            return rest


async def _packet(connection: _Connection) -> bytes:
    data = await connection.socket.recv(MAX_PACKET + 1)
    if len(data) > MAX_PACKET:
        raise ZdsError(f"packet of more than {MAX_PACKET} bytes")
    return data


async def _hello(connection: _Connection, patience: float) -> None:
    try:
        with trio.fail_after(patience):
            version = messages.hello_version(await _packet(connection))
    except trio.TooSlowError:
        raise ZdsError(f"said nothing within {patience:g} s") from None
    if version != messages.V1:
        raise ZdsError(f"speaks ZDS version {version}, this agent version {messages.V1} (V1)")


async def _read_answers(connection: _Connection) -> None:
    while data := await _packet(connection):
        error = messages.answer(data)
        if error is None or not connection.waiting:
            raise ZdsError("sent a packet that answers nothing")
        connection.waiting = False
        await connection.answers_in.send(error)


def _peer(sock: trio.socket.SocketType) -> Peer | None:
    """Which process connected, or None where that cannot be told (another process namespace)."""
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        # proc(5): field 22 is the start time; the command name before it may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return pid, int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def listen(path: Path, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> trio.socket.SocketType:
    """A listening Unix socket on `path`, mode 0600; the file of an agent that is gone is replaced.

    Raises ZdsError where another agent listens there, or the path is none to listen on.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ZdsError(f"socket path {path} is longer than {MAX_SOCKET_PATH} bytes; choose a shorter one")
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path, kind)
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ZdsError(f"listen on {path}: {error}") from error
    except BaseException:
        listener.close()
        raise
    return trio.socket.from_stdlib_socket(listener)


def _remove_stale(path: Path, kind: socket.SocketKind) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ZdsError(f"{path} is there and is no socket; remove it, or choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(os.fspath(path))
    if code == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif code != errno.ENOENT:
        raise ZdsError(f"another node agent listens on {path}; stop it first, or choose another path")


def unlink_own(path: Path, inode: int) -> None:
    """Remove the socket's file, unless another has taken its place."""
    try:
        if path.stat().st_ino == inode:
            path.unlink()
    except FileNotFoundError:
        pass
