"""Where the network namespaces of a node's pods are: in a directory by uid, or among those that a runtime has named.

On Kubernetes a namespace is learned from the CNI plugin when its pod starts. Of pods that run already, and after a
restart of the agent, it is found by looking into all of them for the pod's addresses: a namespace knows nothing of
pods, and the files are named at random. Nothing here needs the node's process ids.
"""

import ipaddress
import logging
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple, Protocol

import trio
from pyroute2.netlink import NETLINK_ROUTE
from pyroute2.netlink.rtnl import RTM_GETADDR
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from cni.goals import Goal
from cni.netlink import NetlinkSocket, dump_request, message_of, raw_attributes
from cni.routes import LOOPBACK_INDEX
from ztunnel.inpod import netns

log = logging.getLogger(__name__)

# linux/if_addr.h: family, prefix length, flags, scope, index; and its attributes.
_ADDRESS = struct.Struct("=4BI")
IFA_ADDRESS, IFA_LOCAL = 1, 2
SCAN_PAUSE = 1.0  # seconds at least between two looks into all namespaces

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class PlacesError(Exception):
    """The namespace of a pod that runs cannot be told; the message says why and what helps."""


class Places(Protocol):
    """Tells the file that names a pod's network namespace.

    `first_pause` and `last_pause`: seconds after which to ask again for one that is not there.
    """

    first_pause: float
    last_pause: float

    async def find(self, goal: Goal) -> Path | None:
        """The file, or None while there is none. Raises PlacesError."""
        ...

    def forget(self, uid: str) -> None:
        """The pod is no more."""
        ...


def _device() -> int:
    """The device number of every file on which a network namespace is mounted."""
    return os.stat("/proc/self/ns/net").st_dev


class Directory:
    """A directory with a file per pod's uid (the embedded mesh)."""

    first_pause = 0.01
    last_pause = 0.1

    def __init__(self, path: Path) -> None:
        self._path = path
        self._device = _device()

    async def find(self, goal: Goal) -> Path | None:
        """The file of the pod's uid, once the namespace is mounted on it: it exists for a moment before that."""
        path = self._path / goal.uid
        try:
            return path if path.stat().st_dev == self._device else None
        except OSError:
            return None

    def forget(self, uid: str) -> None:
        """Nothing is remembered of it."""


class _Known(NamedTuple):
    """A namespace. The kernel gives the number of one that is gone to the next, so that alone says nothing."""

    path: Path
    inode: int


class Runtime:
    """The namespaces that a container runtime has named below `path` (/var/run/netns, as this process sees it)."""

    first_pause = 0.2
    last_pause = 5.0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._device = _device()
        self._known: dict[str, _Known] = {}
        self._sandboxes: dict[str, str] = {}  # by uid, as the runtime calls them
        self._ended: set[_Known] = set()
        self._over: set[str] = set()  # uids of pods whose network has been taken down
        self._addresses: dict[_Known, frozenset[Address]] = {}
        self._scanned = -SCAN_PAUSE
        self._scanning = trio.Lock()

    def file_of(self, named: str) -> Path:
        """The file that the runtime names so on the host, as it is here. Raises PlacesError."""
        path = self._path / Path(named).name
        if not named or self._inode(path) is None:
            raise PlacesError(
                f"its network namespace {named or '(CNI_NETNS is empty)'} is not below {self._path}; mount the "
                "runtime's directory of namespaces there, with mountPropagation HostToContainer"
            )
        return path

    def tell(self, uid: str, path: Path, sandbox: str = "") -> None:
        """The plugin has said that this is the namespace of the pod, in the sandbox that the runtime calls so."""
        inode = self._inode(path)
        if inode is not None:
            self._known[uid] = _Known(path, inode)
            self._sandboxes[uid] = sandbox
            self._ended.discard(self._known[uid])
            self._over.discard(uid)

    def end(self, uid: str, named: str, sandbox: str = "") -> bool:
        """The plugin has said that the pod leaves this namespace; whether it is the one that the pod has.

        A runtime says it again, without naming a namespace, whenever it is asked to stop a sandbox that it has stopped:
        the kubelet does, minutes later, when the pod has another one.
        """
        known = self._known.get(uid)
        if known is None:
            return False
        told = self._sandboxes.get(uid)
        if told and sandbox:
            if told != sandbox:
                return False
        elif not named or known.path.name != Path(named).name:
            return False
        self._end(uid)
        self._over.add(uid)
        return True

    def forget(self, uid: str) -> None:
        """The pod is no more. Its namespace may be there for a while, and is nobody else's."""
        self._end(uid)
        self._over.discard(uid)

    def _end(self, uid: str) -> None:
        known = self._known.pop(uid, None)
        self._sandboxes.pop(uid, None)
        self._ended = {each for each in self._ended if self._inode(each.path) == each.inode}
        if known is not None:
            self._ended.add(known)

    async def find(self, goal: Goal) -> Path | None:
        """The file, from what the plugin said, or by the pod's addresses."""
        known = self._known.get(goal.uid)
        if known is not None:
            if self._inode(known.path) == known.inode:
                return known.path
            del self._known[goal.uid]
            self._sandboxes.pop(goal.uid, None)
        if not goal.addresses or goal.uid in self._over:
            return None
        await self._scan()
        return self._by_addresses(goal)

    def _by_addresses(self, goal: Goal) -> Path | None:
        wanted = {ipaddress.ip_address(each) for each in goal.addresses}
        taken = self._ended.union(self._known.values())
        found = [each for each, held in self._addresses.items() if held & wanted and each not in taken]
        if len(found) == 1:
            self._known[goal.uid] = found[0]
            return found[0].path
        if not goal.started or goal.ending:
            return None
        where = f"with the pod's address {', '.join(map(str, sorted(wanted, key=str)))} below {self._path}"
        if found:
            names = ", ".join(sorted(each.path.name for each in found))
            raise PlacesError(
                f"several network namespaces {where} ({names}): which one is the pod's cannot be told; delete "
                "the pod, its successor is told of by the CNI plugin"
            )
        raise PlacesError(
            f"no network namespace {where}; delete the pod, its successor is told of by the CNI plugin"
        )

    async def _scan(self) -> None:
        async with self._scanning:
            if trio.current_time() < self._scanned + SCAN_PAUSE:
                return
            await trio.to_thread.run_sync(self._look)
            self._scanned = trio.current_time()

    def _look(self) -> None:
        """Look for namespaces, and into those that were not seen before or had no address."""
        there: dict[_Known, frozenset[Address]] = {}
        try:
            names = sorted(os.listdir(self._path))
        except FileNotFoundError:
            names = []
        for name in names:
            path = self._path / name
            inode = self._inode(path)
            if inode is None:
                continue
            each = _Known(path, inode)
            held = self._addresses.get(each, frozenset())
            try:
                there[each] = held or addresses_in(path)
            except OSError as error:
                log.warning("network namespace %s: %s", path, error)
        self._addresses = there

    def _inode(self, path: Path) -> int | None:
        """The number of the namespace mounted on the file, None if there is none."""
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_ino if found.st_dev == self._device else None


def addresses_in(path: Path) -> frozenset[Address]:
    """The addresses in a network namespace, those of its loopback device left out. Raises OSError. Blocks briefly."""
    descriptor = netns.open_path(path)
    try:
        with NetlinkSocket(NETLINK_ROUTE, descriptor) as rtnetlink:
            request = dump_request(message_of(ifaddrmsg, {"family": socket.AF_UNSPEC}, ()), RTM_GETADDR)
            return frozenset(each for each in rtnetlink.dump(request, _address_of) if each is not None)
    finally:
        os.close(descriptor)


def _address_of(payload: bytes) -> Address | None:
    index = _ADDRESS.unpack_from(payload)[4]
    if index == LOOPBACK_INDEX:
        return None
    found = raw_attributes(payload, _ADDRESS.size)
    # On a point-to-point device IFA_ADDRESS is the other end.
    raw = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS)
    return ipaddress.ip_address(raw) if raw and len(raw) in (4, 16) else None
