"""What the rules do to real connections of a real pod: captured, let through, answered, and never broken."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni import rules
from cni.rules import Settings, State
from cni.sockets import proxy_connections
from ztunnel.embedded.testing import Lab, LabPod, LabSpace, until

pytestmark = pytest.mark.e2e

PLAIN = Settings()
DNS = Settings(dns_capture=True)
PORT = 8080
SO_ORIGINAL_DST = 80
IPV6_TRANSPARENT = 75
LIMIT = 60.0
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])


class Pods:
    """The pod under test, `app`, with its namespace open; `peer` is a pod outside the mesh; `node` is their node."""

    def __init__(self, lab: Lab, app: LabPod, peer: LabPod, namespace: int) -> None:
        self.app = app
        self.peer = peer
        self.node: LabSpace = lab.node(1)
        self.namespace = namespace
        self.stack = contextlib.ExitStack()

    def listen(self, at: LabSpace, port: int) -> socket.socket:
        """A listener for IPv4 and IPv6 that is closed at the test's end."""
        listener = self.stack.enter_context(contextlib.closing(at.listen(port, socket.AF_INET6)))
        listener.settimeout(LIMIT)
        return listener

    def connect(
        self, of: LabSpace, address: str, port: int, mark: int = 0, source: str = ""
    ) -> socket.socket:
        """A TCP connection from a namespace, with a mark, from a source address (also a foreign one)."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        connection = self.stack.enter_context(contextlib.closing(of.new_socket(family)))
        connection.settimeout(LIMIT)
        if mark:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if source:
            level, option = (
                (socket.IPPROTO_IPV6, IPV6_TRANSPARENT)
                if ":" in source
                else (socket.IPPROTO_IP, socket.IP_TRANSPARENT)
            )
            connection.setsockopt(level, option, 1)
            connection.bind((source, 0))
        connection.connect((address, port))
        return connection

    def accept(self, listener: socket.socket) -> socket.socket:
        accepted, _ = listener.accept()
        self.stack.enter_context(contextlib.closing(accepted))
        accepted.settimeout(LIMIT)
        return accepted


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    with Lab(tmp_path, nodes=1) as lab:
        app, peer = lab.pod("app"), lab.pod("peer")
        namespace = app.open()
        pods = Pods(lab, app, peer, namespace)
        with pods.stack:
            pods.stack.callback(os.close, namespace)
            yield pods


def address(of: LabPod, family: int) -> str:
    return of.ip6 if family == socket.AF_INET6 else of.ip4


def plain(text: str) -> str:
    """An address without the prefix that IPv4 has on an IPv6 socket."""
    return text.removeprefix("::ffff:")


def original_destination(connection: socket.socket) -> tuple[str, int]:
    if "." in connection.getpeername()[0]:
        _, port, packed = struct.unpack(
            "!HH4s8x", connection.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
        )
        return socket.inet_ntop(socket.AF_INET, packed), port
    _, port, packed = struct.unpack(
        "!HH4x16s4x", connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
    )
    return socket.inet_ntop(socket.AF_INET6, packed), port


def talk(one: socket.socket, other: socket.socket) -> None:
    """Bytes go both ways."""
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"are you there?")
        data = b""
        while len(data) < 14:
            more = receiver.recv(100)
            assert more, "the connection was closed"
            data += more
        assert data == b"are you there?"


def nobody(listener: socket.socket) -> bool:
    """Whether no connection waits at the listener."""
    listener.settimeout(0)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return True
    finally:
        listener.settimeout(LIMIT)
    return False


@FAMILIES
def test_a_connection_out_of_the_pod_is_captured(pods: Pods, family: int) -> None:
    proxy, server = pods.listen(pods.app, 15001), pods.listen(pods.peer, PORT)
    rules.apply(pods.namespace, PLAIN)
    client = pods.connect(pods.app, address(pods.peer, family), PORT)
    captured = pods.accept(proxy)
    assert original_destination(captured) == (address(pods.peer, family), PORT)
    assert plain(captured.getpeername()[0]) == address(pods.app, family)
    assert client.getpeername()[:2] == (address(pods.peer, family), PORT)
    talk(client, captured)
    assert nobody(server)


@FAMILIES
@pytest.mark.parametrize("mark", [0x539, 0x7539], ids=["mark", "mark with other bits"])
def test_the_proxys_own_connections_go_out(pods: Pods, family: int, mark: int) -> None:
    proxy, server = pods.listen(pods.app, 15001), pods.listen(pods.peer, PORT)
    rules.apply(pods.namespace, PLAIN)
    client = pods.connect(pods.app, address(pods.peer, family), PORT, mark)
    talk(client, pods.accept(server))
    assert nobody(proxy)


@FAMILIES
def test_another_mark_does_not_help_out(pods: Pods, family: int) -> None:
    proxy = pods.listen(pods.app, 15001)
    rules.apply(pods.namespace, PLAIN)
    pods.connect(pods.app, address(pods.peer, family), PORT, 0x538)
    pods.accept(proxy)


@FAMILIES
def test_a_connection_into_the_pod_is_captured(pods: Pods, family: int) -> None:
    proxy, server = pods.listen(pods.app, 15006), pods.listen(pods.app, PORT)
    rules.apply(pods.namespace, PLAIN)
    client = pods.connect(pods.peer, address(pods.app, family), PORT)
    captured = pods.accept(proxy)
    assert original_destination(captured) == (address(pods.app, family), PORT)
    assert plain(captured.getpeername()[0]) == address(pods.peer, family)
    talk(client, captured)
    assert nobody(server)


@FAMILIES
def test_tunnels_into_the_pod_arrive(pods: Pods, family: int) -> None:
    inbound, tunnels = pods.listen(pods.app, 15006), pods.listen(pods.app, 15008)
    rules.apply(pods.namespace, PLAIN)
    talk(pods.connect(pods.peer, address(pods.app, family), 15008), pods.accept(tunnels))
    assert nobody(inbound)


@FAMILIES
def test_inbound_may_be_left_alone(pods: Pods, family: int) -> None:
    inbound, server = pods.listen(pods.app, 15006), pods.listen(pods.app, PORT)
    rules.apply(pods.namespace, Settings(capture_inbound=False))
    talk(pods.connect(pods.peer, address(pods.app, family), PORT), pods.accept(server))
    assert nobody(inbound)


@FAMILIES
def test_while_the_proxy_is_down_connections_fail(pods: Pods, family: int) -> None:
    outside, inside = pods.listen(pods.peer, PORT), pods.listen(pods.app, PORT)
    rules.apply(pods.namespace, PLAIN)
    for source, destination in ((pods.app, pods.peer), (pods.peer, pods.app)):
        with pytest.raises(ConnectionRefusedError):
            pods.connect(source, address(destination, family), PORT)
    assert nobody(outside)
    assert nobody(inside)


@pytest.mark.parametrize("probe", ["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"])
def test_health_probes_pass(pods: Pods, probe: str) -> None:
    version, length = (6, 128) if ":" in probe else (4, 32)
    flags = ["nodad"] if version == 6 else []
    added = pods.node.check(
        ["ip", f"-{version}", "address", "add", f"{probe}/{length}", "dev", "cni0", *flags]
    )
    assert added.returncode == 0, added.stderr
    inbound, outbound = pods.listen(pods.app, 15006), pods.listen(pods.app, 15001)
    server, node = pods.listen(pods.app, PORT), pods.listen(pods.node, PORT)
    rules.apply(pods.namespace, PLAIN)
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    client = pods.connect(pods.node, address(pods.app, family), PORT, source=probe)
    probed = pods.accept(server)
    assert plain(probed.getpeername()[0]) == probe
    talk(client, probed)
    talk(pods.connect(pods.app, probe, PORT), pods.accept(node))
    assert nobody(inbound)
    assert nobody(outbound)


@FAMILIES
def test_the_pod_reaches_itself(pods: Pods, family: int) -> None:
    proxies = [pods.listen(pods.app, port) for port in (15001, 15006)]
    server = pods.listen(pods.app, PORT)
    rules.apply(pods.namespace, PLAIN)
    loopback = ["::1"] if family == socket.AF_INET6 else ["127.0.0.1", "127.9.9.9"]
    for destination in [address(pods.app, family), *loopback]:
        talk(pods.connect(pods.app, destination, PORT), pods.accept(server))
    assert all(nobody(proxy) for proxy in proxies)


@FAMILIES
@pytest.mark.parametrize("rp_filter", [0, 1, 2])
def test_the_proxy_connects_to_the_program_from_the_clients_address(
    pods: Pods, family: int, rp_filter: int
) -> None:
    for scope in ("all", "lo", "eth0"):
        done = pods.app.check(["sysctl", "-qw", f"net.ipv4.conf.{scope}.rp_filter={rp_filter}"])
        assert done.returncode == 0, done.stderr
    proxies = [pods.listen(pods.app, port) for port in (15001, 15006)]
    server = pods.listen(pods.app, PORT)
    rules.apply(pods.namespace, PLAIN)
    foreign = address(pods.peer, family)
    inner = pods.connect(pods.app, address(pods.app, family), PORT, 0x539, source=foreign)
    served = pods.accept(server)
    assert plain(served.getpeername()[0]) == foreign
    talk(inner, served)
    served.sendall(b"x" * 1_000_000)
    received = 0
    while received < 1_000_000:
        received += len(inner.recv(100_000))
    served.close()
    assert inner.recv(1) == b""
    assert all(nobody(proxy) for proxy in proxies)


@FAMILIES
def test_connections_open_before_joining_survive_joining_and_leaving(pods: Pods, family: int) -> None:
    outside, inside = pods.listen(pods.peer, PORT), pods.listen(pods.app, PORT)
    out = pods.connect(pods.app, address(pods.peer, family), PORT), pods.accept(outside)
    into = pods.connect(pods.peer, address(pods.app, family), PORT), pods.accept(inside)
    own = pods.connect(pods.app, address(pods.app, family), PORT), pods.accept(inside)
    pods.listen(pods.app, 15001)
    pods.listen(pods.app, 15006)
    for step in (lambda: None, rules.apply, rules.apply, rules.drain, rules.apply, rules.drain, rules.remove):
        if step.__name__ != "<lambda>":
            step(pods.namespace, PLAIN)  # type: ignore[call-arg]
        for one, other in (out, into, own):
            talk(one, other)
            talk(other, one)
    for one, other in (out, into, own):
        one.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""
        other.sendall(b"last words")
        other.close()
        assert one.recv(100) == b"last words"
        assert one.recv(1) == b""


@FAMILIES
def test_captured_connections_survive_new_rules_and_draining(pods: Pods, family: int) -> None:
    outbound, inbound = pods.listen(pods.app, 15001), pods.listen(pods.app, 15006)
    outside, inside = pods.listen(pods.peer, PORT), pods.listen(pods.app, PORT)
    assert rules.apply(pods.namespace, PLAIN)
    out = pods.connect(pods.app, address(pods.peer, family), PORT), pods.accept(outbound)
    into = pods.connect(pods.peer, address(pods.app, family), PORT), pods.accept(inbound)
    through = (
        pods.connect(pods.app, address(pods.app, family), PORT, 0x539, source=address(pods.peer, family)),
        pods.accept(inside),
    )
    onward = pods.connect(pods.app, address(pods.peer, family), PORT, 0x539), pods.accept(outside)
    before = rules.apply(pods.namespace, DNS)
    assert before, "the table was replaced"
    for one, other in (out, into, through, onward):
        talk(one, other)
    assert rules.drain(pods.namespace, DNS)
    for one, other in (out, into, through, onward):
        talk(one, other)
    # New ones go straight.
    talk(pods.connect(pods.app, address(pods.peer, family), PORT), pods.accept(outside))
    talk(pods.connect(pods.peer, address(pods.app, family), PORT), pods.accept(inside))
    # Accepted on 15001 and 15006, and the two with the mark.
    assert proxy_connections(pods.namespace, DNS) == 4
    for pair in (out, into, through, onward):
        for end in pair:
            end.close()
    until(lambda: proxy_connections(pods.namespace, DNS) == 0, "no connection of the proxy is left")
    rules.remove(pods.namespace, DNS)
    assert rules.state(pods.namespace, DNS) is State.ABSENT
    talk(pods.connect(pods.app, address(pods.peer, family), PORT), pods.accept(outside))


def datagrams(pods: Pods, at: LabSpace, bind: tuple[str, int], mark: int = 0) -> socket.socket:
    made = at.new_socket(socket.AF_INET6 if ":" in bind[0] else socket.AF_INET, socket.SOCK_DGRAM)
    pods.stack.enter_context(contextlib.closing(made))
    made.settimeout(LIMIT)
    if mark:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    made.bind(bind)
    return made


@FAMILIES
def test_dns_is_captured_where_asked_for(pods: Pods, family: int) -> None:
    anywhere = "::" if family == socket.AF_INET6 else "0.0.0.0"
    resolver = address(pods.peer, family), 53
    upstream = datagrams(pods, pods.peer, (anywhere, 53))
    proxy = datagrams(pods, pods.app, ("::1" if family == socket.AF_INET6 else "127.0.0.1", 15053))
    over_tcp = pods.listen(pods.app, 15053)
    rules.apply(pods.namespace, DNS)
    program = datagrams(pods, pods.app, (anywhere, 0))
    program.sendto(b"question", resolver)
    question, asker = proxy.recvfrom(100)
    assert (question, asker[1]) == (b"question", program.getsockname()[1])
    # The proxy asks on from the same port, the address the program has: the same 5-tuple.
    forward = pods.app.new_socket(family, socket.SOCK_DGRAM)
    pods.stack.enter_context(contextlib.closing(forward))
    forward.settimeout(LIMIT)
    forward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
    forward.sendto(b"forwarded", resolver)
    asked, source = upstream.recvfrom(100)
    assert asked == b"forwarded"
    upstream.sendto(b"upstream's answer", source)
    assert forward.recv(100) == b"upstream's answer"
    proxy.sendto(b"answer", asker)
    answer, answerer = program.recvfrom(100)
    assert (answer, answerer[:2]) == (b"answer", resolver), "the answer seems to come from the resolver asked"
    pods.connect(pods.app, resolver[0], 53)
    assert original_destination(pods.accept(over_tcp)) == resolver


@FAMILIES
def test_dns_of_one_5_tuple_captured_and_forwarded_does_not_collide(pods: Pods, family: int) -> None:
    """The proxy asks on as the program: same addresses, same ports; each gets its own answer."""
    own, resolver = address(pods.app, family), (address(pods.peer, family), 53)
    upstream = datagrams(pods, pods.peer, ("::" if family == socket.AF_INET6 else "0.0.0.0", 53))
    proxy = datagrams(pods, pods.app, ("::1" if family == socket.AF_INET6 else "127.0.0.1", 15053))
    rules.apply(pods.namespace, DNS)
    program = datagrams(pods, pods.app, (own, 0))
    program.sendto(b"question", resolver)
    _, asker = proxy.recvfrom(100)
    port = program.getsockname()[1]
    program.close()
    forward = datagrams(pods, pods.app, (own, port), 0x539)
    forward.sendto(b"forwarded", resolver)
    asked, source = upstream.recvfrom(100)
    assert (asked, source[:2]) == (b"forwarded", (own, port))
    upstream.sendto(b"upstream's answer", source)
    answer, answerer = forward.recvfrom(100)
    assert (answer, answerer[:2]) == (b"upstream's answer", resolver)
    forward.close()
    again = datagrams(pods, pods.app, (own, port))
    proxy.sendto(b"answer", asker)
    answer, answerer = again.recvfrom(100)
    assert (answer, answerer[:2]) == (b"answer", resolver)


@FAMILIES
def test_dns_goes_its_way_by_default(pods: Pods, family: int) -> None:
    upstream = datagrams(pods, pods.peer, ("::" if family == socket.AF_INET6 else "0.0.0.0", 53))
    rules.apply(pods.namespace, PLAIN)
    program = datagrams(pods, pods.app, (address(pods.app, family), 0))
    program.sendto(b"question", (address(pods.peer, family), 53))
    question, asker = upstream.recvfrom(100)
    assert (question, asker[:2]) == (b"question", program.getsockname()[:2])
    upstream.sendto(b"answer", asker)
    assert program.recv(100) == b"answer"
