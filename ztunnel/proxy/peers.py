"""What a worker knows of a pod's clients for its log: asked once, without making a connection wait, and remembered.

The names are for people. Decisions are made by what the peer's certificate proves.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from ztunnel.proxy import messages
from ztunnel.telemetry.access import ConnectionRecord

if TYPE_CHECKING:
    from ztunnel.proxy.context import Pod

MOST: Final = 1024  # answers remembered for a pod
PENDING: Final = 4096  # questions under way; further connections are logged without names
ASKING: Final = 16  # connections that wait for one answer; further ones are logged without names

Asked: TypeAlias = tuple[str, int]
"""The client's address, and the application's port."""


class Known(NamedTuple):
    """The client's pod and the service that was asked for; empty where not known."""

    workload: str
    namespace: str
    service: str
    tags: tuple[str, ...]

    def fill(self, record: ConnectionRecord) -> None:
        """Write the names into a record. What the mesh says is better than what the peer says of itself; if it says
        another namespace than the certificate, the address has changed hands.
        """
        if self.workload and (not record.src_identity or record.src_namespace == self.namespace):
            record.src_workload = self.workload
            record.src_namespace = self.namespace
        record.dst_service = self.service


class Peers:
    """The answers for one pod."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[Asked, Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, asked: Asked) -> Known | None:
        """The answer, if there is one."""
        return self._known.get(asked)

    def remember(self, asked: Asked, peer: Known) -> None:
        """Keep an answer; the oldest one goes if there are MOST."""
        if len(self._known) >= MOST:
            del self._known[next(iter(self._known))]
        self._known[asked] = peer

    def forget(self, tags: Iterable[str]) -> None:
        """Forget the answers with any of these tags, or all if there are none."""
        if not self._known:
            return
        wanted = frozenset(tags)
        if not wanted:
            self._known.clear()
            return
        for asked in [asked for asked, peer in self._known.items() if not wanted.isdisjoint(peer.tags)]:
            del self._known[asked]


class Questions:
    """Asks the control process, for all pods of a worker."""

    def __init__(self, send: Callable[[messages.Message], None]) -> None:
        self._send = send
        self._number = 0
        self._open: dict[int, tuple[Pod, Asked, list[ConnectionRecord]]] = {}
        self._asked: dict[tuple[int, str, int], int] = {}

    def name(self, pod: "Pod", record: ConnectionRecord) -> None:
        """Fill the record with what is known of its peer, now or when the answer comes.

        The record has the peer's address and the application's port.
        """
        asked = (record.peer, record.port)
        peer = pod.peers.get(asked)
        if peer is not None:
            peer.fill(record)
            return
        question = self._asked.get((pod.number, *asked))
        if question is not None:
            records = self._open[question][2]
            if len(records) < ASKING:
                records.append(record)
        elif len(self._open) < PENDING:
            self._number += 1
            self._open[self._number] = (pod, asked, [record])
            self._asked[pod.number, *asked] = self._number
            self._send(messages.AskPeer(self._number, pod.namespace, pod.name, record.peer, record.port))

    def answered(self, message: messages.PeerAnswer, fds: Iterable[int]) -> None:
        """An answer: for those who wait, and for those who come."""
        found = self._open.pop(message.query, None)
        if found is None:
            return
        pod, asked, records = found
        del self._asked[pod.number, *asked]
        peer = Known(message.workload, message.namespace, message.service, message.tags)
        pod.peers.remember(asked, peer)
        for record in records:
            if not record.done:
                peer.fill(record)
