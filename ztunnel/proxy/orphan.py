"""What a worker does when its control process has died without a word: it serves on until a successor listens.

What comes to its pods (15008, 15006) needs nothing that only the control process knows, and is served as before.
What their programs begin (15001) may need a route that nobody tells any more: it waits in the listeners' backlog.
As soon as somebody else listens beside it in a pod's namespace the worker closes its listeners there, and the kernel
hands what waits to the other one. Without a successor it drains after PATIENCE: what it knows gets old.
"""

from collections.abc import Callable, Mapping

from ztunnel.inpod import handover, sockets
from ztunnel.proxy.context import Pod

PATIENCE = 20.0  # seconds


class Orphan:
    """One worker's time without a control process."""

    def __init__(self, pods: Mapping[int, Pod], now: float, leave: Callable[[Pod, bool], None]) -> None:
        """`leave(pod, migrates)` ends accepting for a pod; what waits at its listeners then migrates, or does not."""
        self._pods = pods
        self._until = now + PATIENCE
        self._leave = leave

    def over(self, now: float) -> bool:
        """Leave the pods in which a successor listens; True once there is nothing to wait for."""
        waiting = [pod for pod in self._pods.values() if pod.accepting]
        if now >= self._until:
            return True
        for pod in waiting:
            try:
                succeeded = bool(handover.listening(pod.netns, sockets.INBOUND_HBONE_PORT) - pod.siblings)
            except OSError:
                return True  # a kernel that cannot say it
            if succeeded:
                self._leave(pod, handover.migrates())
        return not any(pod.accepting for pod in waiting)
