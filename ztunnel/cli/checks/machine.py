"""Whether this machine can run a mesh: does, once and in namespaces of its own, what a mesh would do.

`python -m ztunnel.cli.checks.machine` prints a JSON object: a step's name, and why it failed ("" if it did not).
A process of its own, because it moves into namespaces; they go with it.
"""

import json
import os
import socket
import sys
from collections.abc import Callable


def namespaces() -> None:
    """Make network and mount namespaces, as an ordinary user in a user namespace."""
    from ztunnel.embedded import rootless
    from ztunnel.inpod import netns

    if rootless.needed():
        rootless.enter()
    else:
        netns.unshare(netns.CLONE_NEWNET | netns.CLONE_NEWNS)


def rules() -> None:
    """Put a pod's rules and routes into the namespace, and read them back."""
    from pyroute2 import IPRoute

    from cni.rules import Settings, apply, verify

    with IPRoute() as link:
        link.link("set", index=1, state="up")
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        apply(own, Settings())
        wrong = verify(own, Settings())
    finally:
        os.close(own)
    if wrong:
        raise OSError("; ".join(wrong))


def links() -> None:
    """Make a pair of veth devices and a bridge."""
    from pyroute2 import IPRoute

    with IPRoute() as link:
        link.link("add", ifname="check0", kind="bridge")
        link.link("add", ifname="check1", kind="veth", peer="check2")
        link.link("set", index=socket.if_nametoindex("check1"), master=socket.if_nametoindex("check0"))


def attempt(step: Callable[[], None]) -> str:
    """Why the step failed, "" if it did not."""
    try:
        step()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def main() -> int:
    """Take the steps; without namespaces the others would change the machine itself."""
    found = {"namespaces": attempt(namespaces)}
    for step in (rules, links):
        found[step.__name__] = "no namespace to try it in" if found["namespaces"] else attempt(step)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
