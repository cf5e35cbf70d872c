"""Where connections wait while no proxy serves a pod: listeners of the agent's own, whose connections migrate.

When ztunnel is gone (killed, or its pod deleted) its ports in the pods are closed, and the kernel answers everybody who
connects with a reset. So the agent listens there meanwhile: nothing is accepted, nothing is passed on, whoever connects
waits. As soon as a proxy serves the pod the agent closes its listeners, and the kernel hands it what waits there
(ztunnel/inpod/handover.py). Where a kernel cannot do that nobody is let wait in vain: the agent does not listen.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import trio

from cni.zds import ZdsServer
from ztunnel.inpod import handover, netns, sockets

log = logging.getLogger(__name__)

PORTS = (sockets.OUTBOUND_PORT, sockets.INBOUND_HBONE_PORT, sockets.INBOUND_PLAINTEXT_PORT)
LOOK = 0.1  # seconds between looks, while no proxy is connected, for pods that somebody listened in until now

Listeners = list[socket.socket]


class Parking:
    """Follows which pods the proxies serve. `run` until cancelled."""

    def __init__(self, server: ZdsServer, listen: Callable[[Path, int], Listeners] | None = None) -> None:
        self._server = server
        self._listen = listen or listen_in
        self._parked: dict[tuple[str, int], Listeners] = {}  # by uid, and the inode of the namespace

    @property
    def pods(self) -> int:
        """In how many pods connections wait."""
        return len(self._parked)

    async def run(self) -> None:
        """Until cancelled; then nobody waits any more."""
        try:
            while True:
                self._release()
                if self._server.connections:
                    await self._server.changed()
                    continue
                await self._park()
                with trio.move_on_after(LOOK):
                    await self._server.changed()
        finally:
            for listeners in self._parked.values():
                _close(listeners)
            self._parked.clear()

    def _release(self) -> None:
        """Let go of pods that a proxy serves, and of those that are not in the mesh any more."""
        waiting = {(uid, inode) for uid, _, inode, served in self._server.offered() if not served}
        for key in [key for key in self._parked if key not in waiting]:
            _close(self._parked.pop(key))

    async def _park(self) -> None:
        before = len(self._parked)
        for uid, path, inode, _ in list(self._server.offered()):
            if (uid, inode) not in self._parked and not self._server.connections:
                try:
                    listeners = await trio.to_thread.run_sync(self._listen, path, inode)
                except OSError as error:
                    log.debug("pod %s: nobody can wait in it: %s", uid, error)
                    continue
                if listeners:
                    self._parked[uid, inode] = listeners
        if len(self._parked) > before:
            log.warning("no ztunnel is connected: connections of %d pods wait for one", len(self._parked))


def listen_in(path: Path, inode: int) -> Listeners:
    """Listeners on the proxy's ports in a pod's namespace; none where others listen, or nothing would migrate.

    Others are workers that serve on without their control process. Raises OSError.
    """
    descriptor = netns.open_path(path)
    try:
        if netns.inode(descriptor) != inode:
            return []
        with netns.inside(descriptor):
            if handover.listening_here(sockets.INBOUND_HBONE_PORT) or not handover.migrate_on_close():
                return []
            with contextlib.ExitStack() as undone:
                listeners = [undone.enter_context(sockets.listen(port)) for port in PORTS]
                undone.pop_all()
                return listeners
    finally:
        os.close(descriptor)


def _close(listeners: Listeners) -> None:
    for listener in listeners:
        listener.close()
