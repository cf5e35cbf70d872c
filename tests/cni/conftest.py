"""What the node agent's tests share: waiting, and a ztunnel whose every packet the test writes."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import trio

from ztunnel.wire import zds_pb2

LIMIT = 10.0  # seconds that anything here may take


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def wait_until(true: Callable[[], object], limit: float = LIMIT) -> None:
    """Until the condition holds; fails after `limit` seconds."""
    with trio.fail_after(limit):
        while not true():
            await trio.sleep(0.01)


class ScriptedProxy:
    """A ztunnel that answers only when told to."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self.connection = connection

    @classmethod
    async def connect(cls, path: Path, *, hello: bytes | None = None) -> "ScriptedProxy":
        """Connect and send the greeting (`hello` in its place, b"": none)."""
        connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        await connection.connect(os.fspath(path))
        greeting = zds_pb2.ZdsHello(version=zds_pb2.V1).SerializeToString() if hello is None else hello
        if greeting:
            await connection.send(greeting)
        return cls(connection)

    async def request(self) -> tuple[str, str, int]:
        """The next request: its kind, its uid, and the inode of the namespace beside it (0: none)."""
        with trio.fail_after(LIMIT):
            data, ancillary, _, _ = await self.connection.recvmsg(20000, 1000, socket.MSG_CMSG_CLOEXEC)
        assert data, "the agent closed the connection"
        inode = 0
        for _, _, rights in ancillary:
            descriptor = int.from_bytes(rights[:4], "little")
            inode = os.fstat(descriptor).st_ino
            os.close(descriptor)
        request = zds_pb2.WorkloadRequest.FromString(data)
        kind = request.WhichOneof("payload")
        assert kind
        uid = "" if kind == "snapshot_sent" else getattr(request, kind).uid
        return kind, uid, inode

    async def answer(self, error: str = "") -> None:
        response = zds_pb2.WorkloadResponse(ack=zds_pb2.Ack(error=error))
        await self.connection.send(response.SerializeToString())

    async def take(self, error: str = "") -> tuple[str, str, int]:
        """The next request, answered."""
        request = await self.request()
        await self.answer(error)
        return request

    async def closed(self) -> None:
        """Until the agent closes the connection."""
        with trio.fail_after(LIMIT):
            try:
                assert await self.connection.recv(1000) == b""
            except ConnectionResetError:
                pass
        self.close()

    def close(self) -> None:
        self.connection.close()
