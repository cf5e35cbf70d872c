"""Services by their addresses, from pods outside the mesh: real rules in the nodes' namespaces."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.embedded.objects import pod, service
from ztunnel.embedded import nft
from ztunnel.embedded.endpoints import Backend, Frontend, frontends
from ztunnel.embedded.services import ServiceRules, apply, datagram_routes, no_rules, rules
from ztunnel.embedded.testing import Lab, LabPod, until
from ztunnel.embedded.view import View
from ztunnel.store.models import Service, ServicePort
from ztunnel.store.problems import Problem

VIP4, VIP6 = "10.96.7.7", "fd00:10:96::77"


def web_service(port: ServicePort, publish_not_ready: bool = False) -> Service:
    return service("web", port, addresses=[VIP4, VIP6], publish_not_ready=publish_not_ready)


class TestEndpoints:
    """Which pods stand behind which Service."""

    def test_each_address_leads_to_pods_of_its_family(self) -> None:
        pods = [pod("a", "10.244.1.2", "fd00:10:244:1::2"), pod("b", "10.244.2.2")]
        assert frontends([web_service(ServicePort(port=80, target_port="http"))], pods) == [
            Frontend(VIP4, "TCP", 80, (Backend("10.244.1.2", 8080), Backend("10.244.2.2", 8080))),
            Frontend(VIP6, "TCP", 80, (Backend("fd00:10:244:1::2", 8080),)),
        ]

    def test_only_ready_pods_that_match_unless_it_publishes_all(self) -> None:
        pods = [pod("a", "10.244.1.2", ready=False), pod("b", "10.244.1.3", labels={"app": "x"})]
        port = ServicePort(port=80)
        assert all(not f.backends for f in frontends([web_service(port)], pods))
        assert frontends([web_service(port, publish_not_ready=True)], pods)[0].backends == (
            Backend("10.244.1.2", 80),
        )

    def test_a_named_port_of_another_protocol_is_not_meant(self) -> None:
        port = ServicePort(port=53, protocol="UDP", target_port="http")
        assert frontends([web_service(port)], [pod("a", "10.244.1.2")])[0].backends == ()

    def test_headless_services_have_no_frontend(self) -> None:
        assert frontends([service("headless", ServicePort(port=80))], [pod("a", "10.244.1.2")]) == []


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path, nodes=2) as lab:
        yield lab


def set_rules(lab: Lab, *wanted: Frontend, before: tuple[Frontend, ...] = ()) -> None:
    gone = datagram_routes(before) - datagram_routes(wanted)
    for node in (1, 2):
        apply(lab.network.path(f"node-{node}"), rules(wanted), gone)


@contextmanager
def naming(pod: LabPod, port: int, family: int = socket.AF_INET6) -> Iterator[None]:
    """A server in the pod that tells everybody the pod's name, then repeats what it hears."""
    listener = pod.listen(port, family)

    def talk(connection: socket.socket) -> None:
        with connection:
            connection.sendall(pod.name.encode() + b"\n")
            while data := connection.recv(1000):
                connection.sendall(data)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def name_of(connection: socket.socket) -> str:
    return connection.makefile().readline().strip()


def asked(client: LabPod, address: str, port: int = 80) -> str:
    with client.connect(address, port) as connection:
        return name_of(connection)


def web(vip: str, *pods: LabPod, port: int = 80, target: int = 8080, protocol: str = "TCP") -> Frontend:
    return Frontend(vip, protocol, port, tuple(Backend(p.ip6 if ":" in vip else p.ip4, target) for p in pods))


@pytest.mark.e2e
class TestRules:
    """What the kernel makes of them."""

    @pytest.mark.parametrize("vip", [VIP4, VIP6])
    def test_every_endpoint_is_chosen_wherever_it_runs(self, lab: Lab, vip: str) -> None:
        client = lab.pod("client", node=1)
        servers = [lab.pod("near", node=1), lab.pod("far", node=2), lab.pod("farther", node=2)]
        set_rules(lab, web(vip, *servers))
        with naming(servers[0], 8080), naming(servers[1], 8080), naming(servers[2], 8080):
            answers = [asked(client, vip) for _ in range(90)]
        for server in servers:
            assert answers.count(server.name) > 10, "each has a third of the chances"

    def test_real_programs(self, lab: Lab, tmp_path: Path) -> None:
        server, client = lab.pod("server", node=2), lab.pod("client", node=1)
        (tmp_path / "index.html").write_text("served by address\n")
        server.start(
            [sys.executable, "-m", "http.server", "8080", "--bind", "::"],
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
        )
        server.wait_port(8080)
        set_rules(lab, web(VIP4, server), web(VIP6, server))
        for host in (VIP4, f"[{VIP6}]"):
            done = client.check(["curl", "-sS", "--max-time", "5", f"http://{host}/"])
            assert done.stdout == "served by address\n", done.stderr

    @pytest.mark.parametrize("vip", [VIP4, VIP6])
    def test_a_pod_reaches_itself_through_its_service(self, lab: Lab, vip: str) -> None:
        server = lab.pod("server", node=1)
        set_rules(lab, web(vip, server))
        with naming(server, 8080):
            assert asked(server, vip) == "server"

    @pytest.mark.parametrize("vip", [VIP4, VIP6])
    def test_neighbours_that_know_each_other_still_talk_through_the_node(self, lab: Lab, vip: str) -> None:
        client, server = lab.pod("client", node=1), lab.pod("server", node=1)
        set_rules(lab, web(vip, server))
        with naming(server, 8080):
            for _ in range(3):
                # A router tells both that they are neighbours on one link when they talk without a Service.
                with client.connect(server.ip6 if ":" in vip else server.ip4, 8080) as direct:
                    assert name_of(direct) == "server"
                    direct.sendall(b"hello")
                    assert direct.recv(100) == b"hello"
                assert asked(client, vip) == "server"

    @pytest.mark.parametrize("vip", [VIP4, VIP6])
    def test_no_endpoints_and_unknown_ports_are_refused_at_once(self, lab: Lab, vip: str) -> None:
        client, server = lab.pod("client"), lab.pod("server")
        set_rules(lab, web(vip), web(vip, server, port=81))
        for port in (80, 82):
            with pytest.raises(ConnectionRefusedError):
                client.connect(vip, port, timeout=2)

    def test_addresses_outside_of_the_range_are_refused_too(self, lab: Lab) -> None:
        client = lab.pod("client")
        set_rules(lab, web("192.0.2.5"))
        with pytest.raises(ConnectionRefusedError):
            client.connect("192.0.2.5", 80, timeout=2)

    def test_open_connections_go_on_while_rules_change(self, lab: Lab) -> None:
        client, first, second = lab.pod("client", 1), lab.pod("first", 2), lab.pod("second", 2)
        set_rules(lab, web(VIP4, first))
        with naming(first, 8080), naming(second, 8080), client.connect(VIP4, 80) as connection:
            assert name_of(connection) == "first"
            set_rules(lab, web(VIP4, second))
            assert asked(client, VIP4) == "second"
            set_rules(lab, web(VIP4))
            with pytest.raises(ConnectionRefusedError):
                client.connect(VIP4, 80, timeout=2)
            connection.sendall(b"still here")
            assert connection.recv(100) == b"still here"

    @pytest.mark.parametrize("vip", [VIP4, VIP6])
    def test_datagrams_and_their_move_to_another_endpoint(self, lab: Lab, vip: str) -> None:
        client, first, second = lab.pod("client", 1), lab.pod("first", 2), lab.pod("second", 2)
        family = socket.AF_INET6 if ":" in vip else socket.AF_INET
        sockets = {}
        for server in (first, second):
            sockets[server.name] = server.new_socket(family, socket.SOCK_DGRAM)
            sockets[server.name].bind(("::" if ":" in vip else "0.0.0.0", 5353))
            sockets[server.name].settimeout(5)
        before = web(vip, first, port=53, target=5353, protocol="UDP")
        set_rules(lab, before)
        with client.new_socket(family, socket.SOCK_DGRAM) as asking:
            asking.settimeout(5)
            asking.connect((vip, 53))
            asking.send(b"one")
            data, source = sockets["first"].recvfrom(100)
            sockets["first"].sendto(b"answer", source)
            assert data == b"one"
            assert asking.recv(100) == b"answer"
            set_rules(lab, web(vip, second, port=53, target=5353, protocol="UDP"), before=(before,))
            asking.send(b"two")  # from the same port: the kernel had it down as a flow to the first
            assert sockets["second"].recvfrom(100)[0] == b"two"
        for open_socket in sockets.values():
            open_socket.close()

    def test_many_services_fit_one_transaction(self, lab: Lab) -> None:
        server, client = lab.pod("server"), lab.pod("client")
        wanted = [
            Frontend(f"10.96.{i // 250 + 1}.{i % 250 + 1}", "TCP", 80, (Backend(server.ip4, 8080),) * 3)
            for i in range(1000)
        ]
        set_rules(lab, *wanted)
        with naming(server, 8080):
            assert asked(client, "10.96.1.1") == "server"
            assert asked(client, "10.96.4.250") == "server"

    def test_removal_and_listing(self, lab: Lab) -> None:
        set_rules(lab, web(VIP4, lab.pod("server")))
        node = lab.node(1)
        listed = node.check(["nft", "list", "ruleset"]).stdout
        assert f"{VIP4} . tcp . 80 : goto service-0" in listed
        apply(node.path, no_rules())
        apply(node.path, no_rules())
        assert until(lambda: node.check(["nft", "list", "ruleset"]).stdout == "", "no rules")

    def test_a_refused_transaction_says_so_and_changes_nothing(self, lab: Lab) -> None:
        node = lab.node(1)
        set_rules(lab, web(VIP4, lab.pod("server")))
        before = node.check(["nft", "list", "ruleset"]).stdout
        broken = nft.Transaction()
        broken.remove_table(nft.IPV4, "ambient-services")
        broken.rule(nft.IPV4, "no-such-table", "chain", nft.accept())
        with pytest.raises(nft.NftError, match="nftables: No such file"):
            apply(node.path, broken.encode())
        assert node.check(["nft", "list", "ruleset"]).stdout == before

    async def test_settled_is_what_every_node_has_in_its_rules(self, lab: Lab) -> None:
        view, told = View(), list[Problem | None]()
        view.put(pod("a", "10.244.1.2"))
        nodes = {"node-1": lab.network.path("node-1"), "node-2": lab.network.path("node-2")}
        kept = ServiceRules(view, nodes, lambda _, problem: told.append(problem))
        seen = [kept.settled]
        async with trio.open_nursery() as nursery:
            await nursery.start(kept.run)
            seen.append(kept.settled)
            view.put(web_service(ServicePort(port=80)))
            view.notify()
            seen.append(kept.settled)
            with trio.fail_after(10):
                while not kept.settled:
                    await trio.sleep(0.001)
            for node in (lab.node(1), lab.node(2)):
                assert VIP4 in node.check(["nft", "list", "ruleset"]).stdout
            nodes["node-2"] = Path("/nonexistent")
            view.drop(web_service(ServicePort(port=80)))
            view.notify()
            with trio.fail_after(10):
                while told[-1] is None:
                    await trio.sleep(0.001)
            seen.append(kept.settled)
            nursery.cancel_scope.cancel()
        assert seen == [False, True, False, False], (
            "before it ran, then, after a change, one node did not take it"
        )
