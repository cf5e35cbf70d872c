"""A user's own small machine: user, network and mount namespaces in which an ordinary user may do what root does.

Call `enter` before any thread is started. What is mounted and connected inside stays inside and ends with the last
process; files belong to the user all the same.
"""

import ctypes
import os
from pathlib import Path

from pyroute2 import IPRoute

from ztunnel.inpod import netns

CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21
MS_SLAVE = 1 << 19
PR_SET_DUMPABLE = 4


class RootlessError(OSError):
    """This system does not let ordinary users make namespaces; the message says which setting forbids it."""


def needed() -> bool:
    """Whether this process lacks the capabilities that network namespaces and mounts take."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            return not (effective >> CAP_NET_ADMIN & 1 and effective >> CAP_SYS_ADMIN & 1)
    return True


def enter() -> None:
    """Move this process into namespaces of its own, in which it is root. Raises RootlessError."""
    user, group = os.geteuid(), os.getegid()
    try:
        netns.unshare(netns.CLONE_NEWUSER)
        # The kernel keeps a process that has changed its credentials from its own files in /proc.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        netns.unshare(netns.CLONE_NEWNET | netns.CLONE_NEWNS)
        netns.mount("none", "/", netns.MS_REC | MS_SLAVE)
        with IPRoute() as link:
            link.link("set", index=1, state="up")
    except OSError as error:
        raise RootlessError(f"without root a mesh needs a user namespace: {error}; {_remedy()}") from error


def _remedy() -> str:
    if _sysctl("kernel/unprivileged_userns_clone") == "0":
        return "allow them with `sudo sysctl -w kernel.unprivileged_userns_clone=1`, or run as root"
    if _sysctl("user/max_user_namespaces") == "0":
        return "allow them with `sudo sysctl -w user.max_user_namespaces=15000`, or run as root"
    if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "allow them with `sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`, or run as root"
        )
    return "run as root; in a container, one that is privileged or whose seccomp profile allows unshare"


def _sysctl(name: str) -> str:
    try:
        return (Path("/proc/sys") / name).read_text().strip()
    except OSError:
        return ""
