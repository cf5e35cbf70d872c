"""Simulated nodes and the link that joins them: network namespaces, bridges, veth pairs, addresses, routes.

    fabric netns                node-1 netns                         pod netns
    bridge `fabric`             `eth0`  10.99.0.11                   `eth0` 10.244.1.2/32
      port `node-1` ----veth----'  `cni0` bridge, 10.244.1.1/24        default via 10.244.1.1
      port `node-2` ---- ...         port `pod<hash>` ----veth-------'

Everything is routed, also between two pods of one node (a pod's only on-link neighbour is its gateway), so that
a node's rules see each packet both ways. The fabric's ports have no IPv6 of their own and its bridge neither
learns multicast groups nor speaks spanning tree: what passes is what the nodes send each other. Nothing is made
in the caller's own namespace, except for the files that name the others. Netlink and system calls only.
"""

import contextlib
import errno
import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ztunnel.embedded.addresses import (
    gateway4,
    gateway6,
    node_address4,
    node_address6,
    node_name,
    node_number,
    pod_range4,
    pod_range6,
)
from ztunnel.inpod import netns

FABRIC = "fabric"
BRIDGE = "cni0"
UPLINK = "eth0"
IFA_F_NODAD = 0x02
RT_SCOPE_LINK = 253
FAMILY6 = 10

_SYSCTL = Path("/proc/sys/net")


class NetworkError(Exception):
    """A node or a pod could not be given its network; the message says which and why."""


def port_name(uid: str) -> str:
    """The interface towards a pod in its node's namespace (15 characters at most: IFNAMSIZ)."""
    return "pod" + hashlib.sha256(uid.encode()).hexdigest()[:11]


def has_ipv6() -> bool:
    """Whether this kernel has IPv6 at all (`ipv6.disable=1` takes it away)."""
    return (_SYSCTL / "ipv6").exists()


@contextlib.contextmanager
def netlink(path: str | Path) -> Iterator[Any]:
    """An IPRoute in the namespace named by `path`, the calling thread being inside for the block."""
    namespace = netns.open_path(path)
    try:
        with netns.inside(namespace), IPRoute() as link:
            yield link
    finally:
        os.close(namespace)


class Network:
    """The namespaces of one embedded mesh, all named by files in `directory`.

    Its methods block for milliseconds and may be called from any thread. Each may be called again for what is
    already there. They raise NetworkError.
    """

    def __init__(self, directory: Path, nodes: int) -> None:
        self.directory = directory
        self.nodes = nodes

    def path(self, name: str) -> Path:
        """The file that names the namespace of the fabric, a node or a pod (by its uid)."""
        if not name or "/" in name or name.startswith("."):
            raise NetworkError(f"{name!r} cannot name a namespace: it must be a plain file name")
        return self.directory / name

    def start(self) -> None:
        """Make the fabric and the nodes, joined and routed."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _failing("the link between the nodes"):
            self._create(FABRIC)
            with netlink(self.path(FABRIC)) as link:
                _quiet_ipv6()
                _no_bridge_filter()
                _up(link, "lo")
                _bridge(link, FABRIC, "02:00:00:00:00:00")
        for number in range(1, self.nodes + 1):
            with _failing(node_name(number)):
                self._start_node(number)

    def _start_node(self, number: int) -> None:
        name = node_name(number)
        self._create(name)
        with netlink(self.path(name)) as link:
            # Ports of the bridge need no IPv6; lo, the uplink and the bridge get theirs back by name below.
            _quiet_ipv6()
            _sysctl("ipv6/conf/lo/disable_ipv6", "0")
            _no_bridge_filter()
            _router_sysctls()
            _up(link, "lo")
        namespace = netns.open_path(self.path(name))
        try:
            with netlink(self.path(name)) as link:
                plugged = bool(link.link_lookup(ifname=UPLINK))
            if not plugged:
                self._plug(namespace, inside=UPLINK, outside_namespace=FABRIC, outside=name, bridge=FABRIC)
        finally:
            os.close(namespace)
        with netlink(self.path(name)) as link:
            _bridge(link, BRIDGE, f"02:00:00:00:{number:02x}:01")
            for interface in (UPLINK, BRIDGE):
                _sysctl(f"ipv6/conf/{interface}/disable_ipv6", "0")
            uplink = _up(link, UPLINK)
            bridge = _up(link, BRIDGE)
            _addresses(link, uplink, [str(node_address4(number)), str(node_address6(number))])
            _addresses(link, bridge, [str(gateway4(number)), str(gateway6(number))])
            for other in range(1, self.nodes + 1):
                if other != number:
                    _route(link, str(pod_range4(other)), uplink, str(node_address4(other).ip))
                    _route(link, str(pod_range6(other)), uplink, str(node_address6(other).ip))

    def attach(self, uid: str, node: str, addresses: Sequence[str]) -> None:
        """Make the namespace of the pod `uid` and join it to `node` with `addresses` (IPv4 and/or IPv6).

        Usable at once: no duplicate address detection. Inside, unprivileged programs may bind any port and
        send pings, as in containers.
        """
        with _failing(f"pod {uid}"):
            # The node agent looks at namespaces as soon as they have a name.
            self._create(uid, lambda namespace: self._wire(namespace, uid, node, addresses))

    def _wire(self, namespace: int, uid: str, node: str, addresses: Sequence[str]) -> None:
        """Join the namespace that the calling thread is in, open as `namespace`, to the node."""
        number = node_number(node)
        _pod_sysctls()
        with IPRoute() as link:
            _up(link, "lo")
            self._plug(
                namespace, inside=UPLINK, outside_namespace=node, outside=port_name(uid), bridge=BRIDGE
            )
            interface = _up(link, UPLINK)
            _addresses(link, interface, addresses)
            for gateway in (gateway4(number).ip, gateway6(number).ip):
                if any(ip_address(address).version == gateway.version for address in addresses):
                    _route(link, f"{gateway}/{gateway.max_prefixlen}", interface)
                    _route(link, "0.0.0.0/0" if gateway.version == 4 else "::/0", interface, str(gateway))

    def detach(self, uid: str, node: str) -> None:
        """Unplug the pod and remove its namespace's name; the namespace ends with its last process."""
        if self.path(node).exists():
            with _failing(f"pod {uid}"), netlink(self.path(node)) as link:
                _delete_link(link, port_name(uid))
        netns.remove(self.path(uid))

    def stop(self) -> None:
        """Remove every namespace in the directory, and the directory."""
        if not self.directory.is_dir():
            return
        for entry in self.directory.iterdir():
            netns.remove(entry)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _create(self, name: str, prepare: Callable[[int], None] = lambda namespace: None) -> None:
        """Make the namespace and prepare it (see `netns.create`), or prepare again the one that is there."""
        path = self.path(name)
        with contextlib.suppress(FileExistsError):
            netns.create(path, prepare)
            return
        if not _is_namespace(path):  # a file whose mount is gone: a machine that was switched off
            netns.remove(path)
            netns.create(path, prepare)
            return
        namespace = netns.open_path(path)
        try:
            with netns.inside(namespace):
                prepare(namespace)
        finally:
            os.close(namespace)

    def _plug(self, namespace: int, inside: str, outside_namespace: str, outside: str, bridge: str) -> None:
        """A veth pair: `inside` in the open namespace, `outside` a port of `bridge` in the named one.

        Nothing is done where `inside` is there.
        """
        with netns.inside(namespace):
            if any(name == inside for _, name in socket.if_nameindex()):
                return
        with netlink(self.path(outside_namespace)) as link:
            _delete_link(link, outside)  # left by an earlier namespace of the same name
            link.link(
                "add",
                ifname=outside,
                kind="veth",
                master=_index(link, bridge),
                state="up",
                peer={"ifname": inside, "net_ns_fd": namespace},
            )


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turn what the kernel says into a message that names `what`, and what to do where that is known."""
    try:
        yield
    except (OSError, NetlinkError, ValueError) as error:
        code = getattr(error, "code", getattr(error, "errno", None))
        remedy = ""
        if code in (errno.EPERM, errno.EACCES):
            remedy = "; run as root, or as a user who may create user namespaces"
        elif code == errno.EROFS:
            remedy = "; /proc/sys must be writable (in a container: run it privileged)"
        elif code == errno.EOPNOTSUPP:
            remedy = "; the kernel needs the bridge and veth modules (modprobe bridge veth)"
        raise NetworkError(f"no network for {what}: {error}{remedy}") from error


def _is_namespace(path: Path) -> bool:
    """Whether a namespace is mounted on the file: its file system is then the kernel's nsfs, not ours."""
    return path.stat().st_dev != path.parent.stat().st_dev


def _sysctl(name: str, value: str) -> None:
    """Write a net.* setting of the thread's namespace; settings this kernel does not have are left out."""
    with contextlib.suppress(FileNotFoundError):
        (_SYSCTL / name).write_text(value)


def _quiet_ipv6() -> None:
    """No IPv6 on interfaces unless it is turned on by name, and no detection, discovery or autoconfiguration."""
    _sysctl("ipv6/conf/all/disable_ipv6", "0")
    _sysctl("ipv6/conf/default/disable_ipv6", "1")
    _static_ipv6()


def _static_ipv6() -> None:
    for scope in ("all", "default"):
        _sysctl(f"ipv6/conf/{scope}/accept_dad", "0")
        _sysctl(f"ipv6/conf/{scope}/dad_transmits", "0")
        _sysctl(f"ipv6/conf/{scope}/accept_ra", "0")
        _sysctl(f"ipv6/conf/{scope}/router_solicitations", "0")


def _no_bridge_filter() -> None:
    """Bridged packets are not the IP rules' business here, whatever the host's br_netfilter says."""
    for name in ("iptables", "ip6tables", "arptables"):
        _sysctl(f"bridge/bridge-nf-call-{name}", "0")


def _router_sysctls() -> None:
    for scope in ("all", "default"):
        _sysctl(f"ipv4/conf/{scope}/forwarding", "1")
        _sysctl(f"ipv4/conf/{scope}/rp_filter", "0")
        # Both ends of a hop through the bridge are on one interface: the node must not send pods to each other.
        _sysctl(f"ipv4/conf/{scope}/send_redirects", "0")
        _sysctl(f"ipv6/conf/{scope}/forwarding", "1")


def _pod_sysctls() -> None:
    _static_ipv6()
    for scope in ("all", "default"):
        _sysctl(f"ipv6/conf/{scope}/disable_ipv6", "0")
        # IPv6 routers say by themselves that a neighbour could be reached directly: answers would then pass the
        # node by, whose connection table knows that they have to come from a Service's address.
        for version in ("ipv4", "ipv6"):
            _sysctl(f"{version}/conf/{scope}/accept_redirects", "0")
        # The default is the host's; a proxy that keeps the original source needs it loose.
        _sysctl(f"ipv4/conf/{scope}/rp_filter", "0")
        _sysctl(f"ipv4/conf/{scope}/forwarding", "0")
    _sysctl("ipv4/ip_unprivileged_port_start", "0")
    try:
        _sysctl("ipv4/ping_group_range", "0 2147483647")
    except OSError:  # in a user namespace only the groups that are mapped, here 0, may be named
        _sysctl("ipv4/ping_group_range", "0 0")


def _index(link: Any, name: str) -> int:
    found = link.link_lookup(ifname=name)
    if not found:
        raise OSError(errno.ENODEV, f"interface {name} is missing")
    return int(found[0])


def _up(link: Any, name: str) -> int:
    index = _index(link, name)
    link.link("set", index=index, state="up")
    return index


def _bridge(link: Any, name: str, mac: str) -> None:
    """A bridge with an address of its own: else it takes that of a port, and another when that port goes, and
    the pods would go on sending to the one they remember.
    """
    if not link.link_lookup(ifname=name):
        link.link(
            "add",
            ifname=name,
            kind="bridge",
            address=mac,
            br_stp_state=0,
            br_forward_delay=0,
            br_mcast_snooping=0,
        )
    _up(link, name)


def _delete_link(link: Any, name: str) -> None:
    for index in link.link_lookup(ifname=name):
        with _unless(errno.ENODEV):
            link.link("del", index=index)


def _addresses(link: Any, interface: int, addresses: Sequence[str]) -> None:
    """Give the interface addresses; one without a prefix length is a host address."""
    for address in addresses:
        text, _, length = address.partition("/")
        parsed = ip_address(text)
        options: dict[str, Any] = {"prefixlen": int(length or parsed.max_prefixlen)}
        if parsed.version == 6:
            if not has_ipv6():
                continue
            options |= {"family": FAMILY6, "flags": IFA_F_NODAD}
        with _unless(errno.EEXIST):
            link.addr("add", index=interface, address=text, **options)


def _route(link: Any, destination: str, interface: int, gateway: str | None = None) -> None:
    """A route out of `interface`; without a gateway the destination is on the link."""
    options: dict[str, Any] = {"dst": destination, "oif": interface}
    if ":" in destination:
        if not has_ipv6():
            return
        options["family"] = FAMILY6
    if gateway:
        options["gateway"] = gateway
    elif ":" not in destination:
        options["scope"] = RT_SCOPE_LINK
    link.route("replace", **options)


@contextlib.contextmanager
def _unless(code: int) -> Iterator[None]:
    """That error of the kernel means that the block was done before."""
    try:
        yield
    except NetlinkError as error:
        if error.code != code:
            raise
