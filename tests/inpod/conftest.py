"""The two ends of a ZDS connection to play in tests: pods that record what they are told, and a scripted agent."""

import array
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from ztunnel.inpod import netns
from ztunnel.inpod.pods import WorkloadInfo
from ztunnel.wire import zds_pb2

LIMIT = 10.0  # seconds that anything here may take


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def wait_until(true: Callable[[], object]) -> None:
    """Until the condition holds; fails after LIMIT seconds."""
    with trio.fail_after(LIMIT):
        while not true():
            await trio.sleep(0.01)


class RecordingPods:
    """Takes pods as the daemon does; keeps who they are and which namespace their descriptor was of."""

    def __init__(self) -> None:
        self.pods: dict[str, tuple[WorkloadInfo, int]] = {}
        self.refuse: dict[str, str] = {}
        self.calls: list[str] = []
        self.states: list[bool] = []

    async def add(self, uid: str, info: WorkloadInfo, netns_fd: int) -> None:
        inode = netns.inode(netns_fd)
        assert not os.get_inheritable(netns_fd)
        os.close(netns_fd)
        self.calls.append(f"add {uid}")
        await trio.lowlevel.checkpoint()
        if uid in self.refuse:
            raise RuntimeError(self.refuse[uid])
        self.pods[uid] = (info, inode)

    async def delete(self, uid: str) -> None:
        self.calls.append(f"delete {uid}")
        if uid in self.refuse:
            raise RuntimeError(self.refuse[uid])
        self.pods.pop(uid, None)

    def known(self) -> set[str]:
        return set(self.pods)


class ScriptedAgent:
    """An agent whose every packet the test writes."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(os.fspath(path))
        self._listener.listen()
        self.listener = trio.socket.from_stdlib_socket(self._listener)
        self.connection: trio.socket.SocketType | None = None

    async def accept(self) -> None:
        """Take the proxy's connection and its greeting."""
        with trio.fail_after(LIMIT):
            self.connection, _ = await self.listener.accept()
            assert zds_pb2.ZdsHello.FromString(await self.connection.recv(1000)).version == zds_pb2.V1

    async def send(self, packet: bytes, *descriptors: int) -> None:
        assert self.connection
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        await self.connection.sendmsg([packet], rights)

    async def answer(self) -> str:
        """The error text of the proxy's next answer."""
        assert self.connection
        with trio.fail_after(LIMIT):
            data = await self.connection.recv(1000)
        assert data, "the proxy closed the connection"
        response = zds_pb2.WorkloadResponse.FromString(data)
        assert response.WhichOneof("payload") == "ack"
        return response.ack.error

    async def ask(self, request: zds_pb2.WorkloadRequest, *descriptors: int) -> str:
        await self.send(request.SerializeToString(), *descriptors)
        return await self.answer()

    async def closed(self) -> None:
        """Until the proxy closes the connection."""
        assert self.connection
        with trio.fail_after(LIMIT):
            try:
                assert await self.connection.recv(1000) == b""
            except ConnectionResetError:
                pass
        self.hang_up()

    def hang_up(self) -> None:
        assert self.connection
        self.connection.close()

    def close(self) -> None:
        if self.connection:
            self.connection.close()
        self.listener.close()


def add_request(uid: str, name: str = "web") -> zds_pb2.WorkloadRequest:
    info = zds_pb2.WorkloadInfo(name=name, namespace="shop", service_account="clerk")
    return zds_pb2.WorkloadRequest(add=zds_pb2.AddWorkload(uid=uid, workload_info=info))


def keep_request(uid: str) -> zds_pb2.WorkloadRequest:
    return zds_pb2.WorkloadRequest(keep=zds_pb2.KeepWorkload(uid=uid))


def delete_request(uid: str) -> zds_pb2.WorkloadRequest:
    request = zds_pb2.WorkloadRequest()
    getattr(request, "del").uid = uid
    return request


def snapshot_sent() -> zds_pb2.WorkloadRequest:
    return zds_pb2.WorkloadRequest(snapshot_sent=zds_pb2.SnapshotSent())


@pytest.fixture
def pods() -> RecordingPods:
    return RecordingPods()
