"""The simulated nodes: pods reach one another over IPv4 and IPv6, and nothing of it is left afterwards."""

import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ztunnel.embedded.network import Network, NetworkError, netlink, port_name
from ztunnel.embedded.testing import Lab, LabPod
from ztunnel.inpod import netns

pytestmark = pytest.mark.e2e

IFA_F_TENTATIVE = 0x40


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path, nodes=2) as lab:
        yield lab


def echo_peer(listener: socket.socket) -> None:
    connection, peer = listener.accept()
    with connection:
        connection.sendall(peer[0].encode())


def asked(client: LabPod, server: LabPod, address: str) -> str:
    """The client's address as the server sees it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with server.listen(0, family) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=echo_peer, args=(listener,))
        thread.start()
        with client.connect(address, listener.getsockname()[1]) as connection:
            answer = connection.recv(100)
        thread.join()
    return answer.decode()


@pytest.mark.parametrize("server_node", [1, 2])
def test_pods_reach_one_another_with_their_own_addresses(lab: Lab, server_node: int) -> None:
    client, server = lab.pod("client", node=1), lab.pod("server", node=server_node)
    assert asked(client, server, server.ip4) == client.ip4
    assert asked(client, server, server.ip6) == client.ip6


def test_ipv6_addresses_are_usable_at_once(lab: Lab) -> None:
    pod = lab.pod("pod")
    for path, address in ((pod.path, pod.ip6), (lab.network.path("node-1"), "fd00:10:99::11")):
        with netlink(path) as link:
            flags = {a.get_attr("IFA_ADDRESS"): a["flags"] for a in link.get_addr(family=socket.AF_INET6)}
        assert not flags[address] & IFA_F_TENTATIVE, "nobody looks for duplicates of it first"


def test_real_programs_talk(lab: Lab, tmp_path: Path) -> None:
    server, client = lab.pod("server", node=2), lab.pod("client", node=1)
    (tmp_path / "index.html").write_text("hello from the other node\n")
    server.start([sys.executable, "-m", "http.server", "80", "--bind", "::"], cwd=tmp_path, stderr=-3)
    server.wait_port(80, address="::1")
    for host in (server.ip4, f"[{server.ip6}]"):
        answer = client.check(["curl", "-sS", f"http://{host}/"])
        assert answer.stdout == "hello from the other node\n", answer.stderr


def test_the_link_between_nodes_is_silent_until_somebody_sends(lab: Lab) -> None:
    lab.pod("client", node=1)
    lab.pod("server", node=2)
    with netlink(lab.network.path("fabric")) as link:
        ports = {p.get_attr("IFLA_IFNAME"): p.get_attr("IFLA_STATS64") for p in link.get_links()}
    assert {name for name in ports if name != "lo"} == {"fabric", "node-1", "node-2"}
    # What a node sends by itself: the multicast reports of its IPv6 addresses, a handful when it comes up.
    assert all(ports[name]["rx_packets"] < 20 for name in ("node-1", "node-2"))


def test_an_unprivileged_program_may_bind_low_ports_in_a_pod(lab: Lab) -> None:
    pod = lab.pod("server")
    setpriv = shutil.which("setpriv")
    assert setpriv, "setpriv of util-linux is needed"
    code = "import socket; socket.create_server(('', 80))"
    done = pod.check([setpriv, "--reuid=65534", "--clear-groups", "/usr/bin/env", "python3", "-c", code])
    assert done.returncode == 0, done.stderr


def test_attaching_twice_and_starting_twice_is_harmless(lab: Lab) -> None:
    client, server = lab.pod("client", node=1), lab.pod("server", node=2)
    lab.network.start()
    lab.network.attach(client.uid, "node-1", [client.ip4, client.ip6])
    assert asked(client, server, server.ip4) == client.ip4


def test_a_detached_pod_leaves_no_interface_and_its_address_can_be_given_again(lab: Lab) -> None:
    client, server = lab.pod("client", node=1), lab.pod("server", node=2)
    assert asked(client, server, server.ip4) == client.ip4
    lab.remove(server)
    with netlink(lab.network.path("node-2")) as link:
        assert not link.link_lookup(ifname=port_name(server.uid))
    lab.network.attach("again", "node-2", [server.ip4, server.ip6])
    again = LabPod("again", lab.network.path("again"), server.ip4, server.ip6, 2, "default", "default")
    # The node still has the neighbour entry of the pod that had the address before.
    assert asked(client, again, again.ip4) == client.ip4
    assert asked(client, again, again.ip6) == client.ip6


def test_pods_that_come_and_go_do_not_disturb_their_neighbours(lab: Lab) -> None:
    client, server = lab.pod("client", node=1), lab.pod("server", node=2)
    assert asked(client, server, server.ip4) == client.ip4
    assert asked(client, server, server.ip6) == client.ip6
    with netlink(lab.network.path("node-1")) as link:
        (index,) = link.link_lookup(ifname="cni0")
        before = link.get_links(index)[0].get_attr("IFLA_ADDRESS")
        others = [lab.pod(f"other-{number}", node=1) for number in range(8)]
        assert link.get_links(index)[0].get_attr("IFLA_ADDRESS") == before
        lab.remove(others[0])
        lab.remove(client)
        assert link.get_links(index)[0].get_attr("IFLA_ADDRESS") == before
    assert asked(others[1], server, server.ip4) == others[1].ip4


def test_a_name_whose_namespace_is_gone_is_made_anew(tmp_path: Path) -> None:
    network = Network(tmp_path / "netns", nodes=1)
    network.directory.mkdir()
    network.path("node-1").touch()
    try:
        network.start()
        network.attach("pod", "node-1", ["10.244.1.2"])
        with netlink(network.path("pod")) as link:
            assert link.link_lookup(ifname="eth0")
    finally:
        network.stop()


def test_nothing_is_left_and_the_own_namespace_is_untouched(tmp_path: Path) -> None:
    def interfaces() -> set[str]:
        return set(os.listdir("/sys/class/net"))

    before, home = interfaces(), netns.inode("/proc/thread-self/ns/net")
    with Lab(tmp_path, nodes=3) as lab:
        pod = lab.pod("client", node=3)
        sleeper = pod.start(["sleep", "1000"])
        assert sleeper.pid in pod.processes()
        assert interfaces() == before
    assert sleeper.returncode == -9
    assert not (tmp_path / "netns").exists()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert netns.inode("/proc/thread-self/ns/net") == home


def test_errors_name_the_pod(lab: Lab) -> None:
    with pytest.raises(NetworkError, match=r"pod some-uid.*"):
        lab.network.attach("some-uid", "node-9", ["10.244.1.2"])
    with pytest.raises(NetworkError, match="plain file name"):
        lab.network.attach("../x", "node-1", ["10.244.1.2"])
