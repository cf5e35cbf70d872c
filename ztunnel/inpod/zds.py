"""ZDS, the proxy's side: learn from the node agent which pods are mine, and take their network namespaces.

A Unix socket of type SOCK_SEQPACKET, one protobuf message a packet, a namespace's descriptor beside AddWorkload
(SCM_RIGHTS). Every packet is answered before the next is read. Descriptors that nobody takes are closed here.
"""

import array
import logging
import random
import socket
from collections.abc import Callable, Iterable
from os import close
from typing import Any, Never, Protocol

import trio
from google.protobuf.message import DecodeError

from ztunnel.inpod.pods import HANDLE_TIMEOUT, MAX_PACKET, WorkloadInfo, ZdsError
from ztunnel.wire import zds_pb2

log = logging.getLogger(__name__)

SEND_TIMEOUT = 10.0  # seconds
FIRST_DELAY = 0.05  # seconds before the first attempt to connect again; it doubles up to LAST_DELAY
LAST_DELAY = 2.0


class Pods(Protocol):
    """What the connection acts on: the proxies of this node's pods."""

    async def add(self, uid: str, info: WorkloadInfo, netns_fd: int) -> None:
        """Serve this pod; the descriptor is yours from now on, also if you raise. What you raise is answered.

        A uid already served may come again, with the same namespace or another.
        """

    async def delete(self, uid: str) -> None:
        """Stop serving this pod; one that is not known is no error."""

    def known(self) -> set[str]:
        """The uids served now."""


async def run(path: str, pods: Pods, *, on_state: Callable[[bool], None]) -> Never:
    """Follow the node agent that listens on the socket `path`, for ever, connecting again whenever it goes.

    `on_state(True)` is called when the agent's snapshot is complete: all pods named are served (or refused), and
    those not named are dropped; `on_state(False)` when that connection is lost. While the agent is away the pods
    stay as they are.
    """
    delay = FIRST_DELAY
    said = ""
    while True:
        session = _Session(pods, on_state)
        try:
            await session.follow(path)
            reason = "the node agent closed the connection"
        except (OSError, ZdsError, trio.TooSlowError) as error:
            reason = str(error) or "the node agent does not read the answers"
        finally:
            if session.synced:
                on_state(False)
        if session.synced:
            delay = FIRST_DELAY
            said = ""
        if reason != said:
            log.warning("ZDS %s: %s; trying again", path, reason)
            said = reason
        await trio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311  (spreads load, guards nothing)
        delay = min(delay * 2, LAST_DELAY)


class _Session:
    """One connection to the agent."""

    def __init__(self, pods: Pods, on_state: Callable[[bool], None]) -> None:
        self.synced = False
        self._pods = pods
        self._on_state = on_state
        self._named: set[str] = set()

    async def follow(self, path: str) -> None:
        """Until the agent closes the connection. Raises OSError, ZdsError, trio.TooSlowError."""
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            await connection.connect(path)
            await _send(connection, zds_pb2.ZdsHello(version=zds_pb2.V1))
            log.info("ZDS %s: connected", path)
            while True:
                data, descriptors = await receive(connection)
                try:
                    if not data:
                        return
                    error = await self._handle(_parse(data), descriptors)
                finally:
                    for descriptor in descriptors:
                        close(descriptor)
                await _send(connection, zds_pb2.WorkloadResponse(ack=zds_pb2.Ack(error=error)))

    async def _handle(self, request: zds_pb2.WorkloadRequest, descriptors: list[int]) -> str:
        """Carry out one request and take what it uses out of `descriptors`. The error to answer, or ""."""
        uid, what = "", request.WhichOneof("payload")
        try:
            with trio.fail_after(HANDLE_TIMEOUT):
                if what == "add":
                    uid = request.add.uid
                    await self._add(request.add, descriptors)
                elif what == "keep":
                    uid = request.keep.uid
                    self._keep(uid)
                elif what == "del":
                    # The field's name is a keyword of Python.
                    uid = getattr(request, "del").uid
                    self._named.discard(uid)
                    await self._pods.delete(uid)
                else:
                    await self._complete()
        except trio.TooSlowError:
            return self._refused(what, uid, f"took longer than {HANDLE_TIMEOUT:.0f} s")
        except Exception as error:
            return self._refused(what, uid, str(error) or type(error).__name__)
        return ""

    @staticmethod
    def _refused(what: str | None, uid: str, why: str) -> str:
        log.error("ZDS %s %s: %s", what, uid, why)
        return why

    async def _add(self, add: zds_pb2.AddWorkload, descriptors: list[int]) -> None:
        if not add.uid:
            raise ZdsError("AddWorkload has no uid")
        # Named, even if it fails: a pod that is served already must not be dropped at the end of the snapshot.
        self._named.add(add.uid)
        if not descriptors:
            raise ZdsError(f"AddWorkload {add.uid} came without the descriptor of its network namespace")
        info = add.workload_info
        await self._pods.add(
            add.uid, WorkloadInfo(info.name, info.namespace, info.service_account), descriptors.pop(0)
        )

    def _keep(self, uid: str) -> None:
        if uid not in self._pods.known():
            raise ZdsError(f"KeepWorkload {uid}: not known here, it has to be added")
        self._named.add(uid)

    async def _complete(self) -> None:
        for uid in self._pods.known() - self._named:
            log.info("ZDS: pod %s is not on this node any more", uid)
            await self._pods.delete(uid)
        if not self.synced:
            self.synced = True
            self._on_state(True)


def _parse(data: bytes) -> zds_pb2.WorkloadRequest:
    request = zds_pb2.WorkloadRequest()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise ZdsError(f"malformed packet from the node agent: {error}") from error
    if request.WhichOneof("payload") is None:
        raise ZdsError("packet from the node agent with no request, or one of a later version, in it")
    return request


async def _send(connection: trio.socket.SocketType, message: Any) -> None:
    with trio.fail_after(SEND_TIMEOUT):
        await connection.send(message.SerializeToString())


async def receive(connection: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    """One packet and the descriptors that came with it, now the caller's to close; b"" at the end.

    Raises ZdsError (with nothing left open) where the packet or its descriptors are too many to be whole.
    """
    data, ancillary, flags, _ = await connection.recvmsg(
        MAX_PACKET, socket.CMSG_SPACE(8 * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    descriptors = _descriptors(ancillary)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for descriptor in descriptors:
            close(descriptor)
        raise ZdsError(f"packet of more than {MAX_PACKET} bytes or 8 descriptors")
    return data, descriptors


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
