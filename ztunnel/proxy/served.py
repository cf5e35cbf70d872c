"""A pod as the control process serves it: its namespace, and the listeners that its workers share out."""

import contextlib
import os
import socket
from dataclasses import dataclass, field

from ztunnel.inpod import handover, netns, sockets

PORTS = (sockets.OUTBOUND_PORT, sockets.INBOUND_HBONE_PORT, sockets.INBOUND_PLAINTEXT_PORT)


class PodError(Exception):
    """The pod cannot be served; the message goes back to the node agent."""


@dataclass
class ServedPod:
    """A pod of this node. `listeners` has one list, in the order of `ports`, per worker.

    `netns_fd` is sockets.OWN for what is served in this process's own namespace.
    """

    number: int
    uid: str
    name: str
    namespace: str
    identity: str
    netns_fd: int
    inode: int
    ports: tuple[int, ...] = PORTS
    listeners: list[list[socket.socket]] = field(default_factory=list)
    idle: set[int] = field(default_factory=set)

    def siblings(self) -> tuple[int, ...]:
        """The inodes of the workers' listeners on port 15008."""
        at = self.ports.index(sockets.INBOUND_HBONE_PORT)
        return tuple(os.fstat(group[at].fileno()).st_ino for group in self.listeners)

    def listen(self, workers: int) -> None:
        """Make the listeners, for each of so many workers. Raises PodError, with everything closed."""
        who = f"pod {self.namespace}/{self.name}"
        try:
            with netns.inside(self.netns_fd) if self.netns_fd != sockets.OWN else contextlib.nullcontext():
                if self.netns_fd != sockets.OWN:
                    handover.migrate_on_close()
                for _ in range(workers):
                    group: list[socket.socket] = []
                    self.listeners.append(group)
                    for port in self.ports:
                        try:
                            group.append(sockets.listen(port))
                        except OSError as error:
                            raise PodError(
                                f"{who}: cannot listen on port {port} in its network namespace: {error.strerror}; "
                                f"the mesh needs the ports {', '.join(map(str, self.ports))} free there"
                            ) from None
        except OSError as error:
            self.close()
            raise PodError(f"{who}: cannot enter its network namespace: {error.strerror}") from None
        except PodError:
            self.close()
            raise

    def close_listeners(self) -> None:
        """Close our copies of the listeners."""
        for group in self.listeners:
            for listener in group:
                listener.close()
        self.listeners = []

    def close(self) -> None:
        """Close everything that is held for the pod."""
        self.close_listeners()
        if self.netns_fd >= 0:
            os.close(self.netns_fd)
            self.netns_fd = -1


def has_network(netns_fd: int) -> bool:
    """Whether a namespace still has an interface other than loopback: a deleted pod's has none."""
    try:
        with netns.inside(netns_fd):
            return any(name != "lo" for _, name in socket.if_nameindex())
    except OSError:
        return False
