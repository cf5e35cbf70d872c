"""The listeners of a worker's pods: what is accepted from them, how much of it, and how they end.

No pod may take what the others need. A pod that holds POD_CONNECTION_LIMIT connections accepts no more until some have
ended: new ones wait in its own listeners' backlog. Who is slow to finish TLS holds a place among POD_HANDSHAKE_LIMIT
for CONNECT_TIMEOUT at most, and only for PRESSED while all of them are taken: then the next one gets the oldest's.
"""

import contextlib
import select
import socket
from collections.abc import Callable

from ztunnel.inpod import sockets
from ztunnel.proxy.context import Context, Pod
from ztunnel.proxy.errors import TimedOut
from ztunnel.proxy.reactor import IN

ACCEPT_TURN = 64  # connections accepted from one listener before the other sockets get their turn
PRESSED = 2.0  # seconds for TLS while many others of the pod are at it

Accepted = Callable[[Pod, sockets.Socket, tuple[str, int]], None]


class Listeners:
    """All that a worker has."""

    def __init__(self, context: Context, connections: int, handshakes: int) -> None:
        """The most `connections` (tunnels are connections, too) and unfinished `handshakes` of one pod."""
        self._context = context
        self._connections = connections
        self._handshakes = handshakes
        self._acceptors: dict[socket.socket, Callable[[int], None]] = {}
        self._paused: list[socket.socket] = []
        self._told: set[tuple[int, str]] = set()  # numbers of pods, and limits of which the log was told

    def add(self, pod: Pod, port: int, accepted: Accepted) -> None:
        """Take a listener of the pod; `accept` is for later."""
        listener = pod.listeners[port]
        listener.setblocking(False)
        self._acceptors[listener] = self._acceptor(pod, port, listener, accepted)

    def accept(self, pod: Pod, port: int) -> None:
        """Accept what comes to this port of the pod."""
        listener = pod.listeners[port]
        # Level-triggered: what one turn leaves in the backlog is reported again.
        self._context.reactor.register(listener.fileno(), self._acceptors[listener], IN)

    def hold(self, pod: Pod, port: int) -> None:
        """Leave what comes in the backlog."""
        listener = pod.listeners.get(port)
        if listener is not None:
            self._context.reactor.unregister(listener.fileno())
            self._forget_pause(listener)

    def resume(self) -> None:
        """Look again at listeners that had to wait; to be called a few times a second."""
        paused, self._paused = self._paused, []
        for listener in paused:
            self._context.reactor.register(listener.fileno(), self._acceptors[listener], IN)

    def close(self, pod: Pod, serves: Callable[[int], bool]) -> None:
        """Close the pod's listeners.

        Whom the kernel has let in already is served where `serves(port)` says so: closing resets him, unless somebody
        else listens there.
        """
        listeners, pod.listeners = pod.listeners, {}
        for port, listener in listeners.items():
            acceptor = self._acceptors.pop(listener, None)
            self._context.reactor.unregister(listener.fileno())
            paused = self._forget_pause(listener)
            for _ in range(sockets.BACKLOG // ACCEPT_TURN):
                if acceptor is None or paused or not serves(port) or not _somebody_waits(listener):
                    break
                acceptor(IN)
                paused = self._forget_pause(listener)
            listener.close()
        self._told = {(number, limit) for number, limit in self._told if number != pod.number}

    def _forget_pause(self, listener: socket.socket) -> bool:
        with contextlib.suppress(ValueError):
            self._paused.remove(listener)
            return True
        return False

    def _acceptor(
        self, pod: Pod, port: int, listener: socket.socket, accepted: Accepted
    ) -> Callable[[int], None]:
        accept = sockets.acceptor(listener)
        room = self._room_for_handshakes if port == sockets.INBOUND_HBONE_PORT else self._room
        guard = self._context.reactor.guard

        def on_event(event: int) -> None:
            places = room(pod)
            if places <= 0:
                self._pause(listener)
                return
            for _ in range(min(sockets.queued(listener), ACCEPT_TURN, places)):
                try:
                    sock, peer = accept()
                except BlockingIOError:
                    return
                except OSError as error:
                    if error.errno not in sockets.EXHAUSTED:
                        continue  # that connection's own matter: it was gone before we came (accept(2), errors)
                    # Let others finish first, the backlog waits.
                    self._context.logger.error(
                        "proxy",
                        "cannot accept",
                        pod=f"{pod.namespace}/{pod.name}",
                        error=f"{error.strerror}; raise the limit of open files (ulimit -n) if it says so",
                    )
                    self._pause(listener)
                    return
                guard(accepted, pod, sock, peer)

        return on_event

    def _pause(self, listener: socket.socket) -> None:
        self._context.reactor.unregister(listener.fileno())
        self._paused.append(listener)

    def _room(self, pod: Pod) -> int:
        """How many connections more the pod may have."""
        held = len(pod.connections) + len(pod.tunnels)
        room = self._connections - held
        if room <= 0:
            self._say(
                pod, "POD_CONNECTION_LIMIT", f"it holds {held} connections; others wait until some have ended"
            )
        elif self._told and held < self._connections / 2:
            self._told.discard((pod.number, "POD_CONNECTION_LIMIT"))
        return room

    def _room_for_handshakes(self, pod: Pod) -> int:
        """The same on the port of tunnels, where each begins with TLS."""
        pending = len(pod.handshakes)
        if pending < self._handshakes:
            if self._told and pending < self._handshakes / 2:
                self._told.discard((pod.number, "POD_HANDSHAKE_LIMIT"))
            return min(self._handshakes - pending, self._room(pod))
        oldest = next(iter(pod.handshakes))
        if self._context.reactor.now - pod.handshakes[oldest] < PRESSED:
            return 0
        self._say(pod, "POD_HANDSHAKE_LIMIT", f"{pending} peers have not finished TLS; the slowest are cut")
        error = TimedOut(f"TLS handshake timed out: not finished in {PRESSED:.0f} s, while others wait")
        self._context.reactor.guard(oldest.fail, error)
        return min(1, self._room(pod))

    def _say(self, pod: Pod, limit: str, what: str) -> None:
        """Once until it is far from the limit again."""
        if (pod.number, limit) not in self._told:
            self._told.add((pod.number, limit))
            self._context.logger.warn(
                "proxy", "a pod is at a limit", pod=f"{pod.namespace}/{pod.name}", limit=limit, error=what
            )


def _somebody_waits(listener: socket.socket) -> bool:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))
