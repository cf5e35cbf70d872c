"""A proxy that is told to end, and how long it goes on as if it was not: until somebody else serves its pods.

In a rolling update of a DaemonSet with `maxSurge` the successor listens before its predecessor is told to end. One
whose pod is deleted gets no successor before it is gone: if it stopped accepting at once, the node's pods had no
network for as long as its last connection lasts. So it serves on, and stops for the last moment of its time only.
"""

from collections.abc import Iterable

import trio

from ztunnel.inpod import handover, netns, sockets
from ztunnel.proxy.served import ServedPod
from ztunnel.proxy.workers import Workers

LOOK = 0.25  # seconds between looks
TAIL = 2.0  # seconds of the grace period in which nothing new is accepted, for what is under way to end
IDLE_LOOKS = 2


async def until_succeeded(workers: Workers, grace: float) -> tuple[bool, str, float]:
    """Wait while the workers have to serve on. Whether another proxy follows; why it is over; what is left of `grace`.

    It is over, too, when nothing is open: whoever follows comes the sooner. Times in seconds.
    """
    began = trio.current_time()
    idle = 0
    followed = False
    why = "the grace period ends"
    while trio.current_time() < began + grace - min(TAIL, grace / 2):
        if not workers.pods:
            why = "no pods"
            break
        if succeeded(workers.pods.values()):
            followed, why = True, "another proxy listens"
            break
        open_now = sum(one.connections for one in await workers.stats())
        idle = 0 if open_now else idle + 1
        if idle == IDLE_LOOKS:
            why = "nothing is open"
            break
        await trio.sleep(LOOK)
    return followed, why, max(0.0, began + grace - trio.current_time())


def succeeded(pods: Iterable[ServedPod]) -> bool:
    """Whether another proxy listens in one of the pods, too. False where the kernel does not say it."""
    for pod in pods:
        own = set(pod.siblings())
        try:
            with netns.inside(pod.netns_fd):
                if handover.listening_here(sockets.INBOUND_HBONE_PORT) - own:
                    return True
        except OSError:  # its network went, or this kernel has no socket diagnosis
            continue
    return False
