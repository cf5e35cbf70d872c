"""The DNS server behind real rules in a pod's network, with a server beyond that does what each test says."""

import contextlib
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
import trio.testing
from dnslib import QTYPE, RCODE, RR, TXT, A, DNSRecord

from cni import rules
from tests.mesh.meshes import mesh, pod, service
from ztunnel.dns import forward, packets, streams
from ztunnel.dns.server import DnsError, DnsServer
from ztunnel.embedded.testing import Lab, LabPod
from ztunnel.mesh.state import MeshState

pytestmark = pytest.mark.e2e

LIMIT = 30.0
FAMILIES = pytest.mark.parametrize("family", [4, 6])
WEB = "web.default.svc.cluster.local"
CAPTURED = rules.Settings(dns_capture=True)


class World:
    """A pod `app` whose DNS is captured, and the server `peer` that its programs ask."""

    def __init__(self, lab: Lab) -> None:
        self.app, self.peer = lab.pod("app"), lab.pod("peer")
        self.stack = contextlib.ExitStack()
        self.namespace = self.app.open()
        self.stack.callback(os.close, self.namespace)
        self.state: MeshState = mesh(
            service("web", "10.96.0.1", "fd00:96::1"),
            service("many"),
            *(pod(f"m{n}", str(ip_address(0x0A000001 + n)), services={"many": {}}) for n in range(100)),
        )
        self.nursery: trio.Nursery | None = None

    def server_address(self, family: int = 4) -> str:
        return self.peer.ip4 if family == 4 else self.peer.ip6

    async def start(self, settings: rules.Settings = CAPTURED, **options: object) -> DnsServer:
        """A DnsServer that serves `app`, and its rules."""
        assert self.nursery is not None
        options = {"synced": lambda: True, **options}
        server = DnsServer(self.state, **options)  # type: ignore[arg-type]
        await self.nursery.start(server.run)
        server.add("uid", "app", "default", self.namespace)
        await trio.to_thread.run_sync(rules.apply, self.namespace, settings)
        return server

    def socket(
        self, of: LabPod, kind: int = socket.SOCK_DGRAM, family: int = 4, bind: tuple[str, int] | None = None
    ) -> trio.socket.SocketType:
        made = of.new_socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
        self.stack.callback(made.close)
        if bind is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(bind)
        made.setblocking(False)
        return trio.socket.from_stdlib_socket(made)

    def upstream(self, family: int = 4) -> trio.socket.SocketType:
        """The server's socket, for a test that plays the server itself."""
        return self.socket(self.peer, family=family, bind=(self.server_address(family), 53))

    async def client(self, family: int = 4, to: str = "", port: int = 53) -> trio.socket.SocketType:
        """A program's socket; it takes answers from the server that it asked only."""
        made = self.socket(self.app, family=family)
        await made.connect((to or self.server_address(family), port))
        return made

    async def ask(self, data: bytes, family: int = 4) -> bytes:
        client = await self.client(family)
        await client.send(data)
        return await client.recv(65536)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Lab(tmp_path, nodes=1) as lab:
        world = World(lab)
        with world.stack:
            yield world


@pytest.fixture
async def life(world: World) -> AsyncIterator[World]:
    """The world, in which servers may run for the length of a test."""
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            world.nursery = nursery
            yield world
            nursery.cancel_scope.cancel()


def query(name: str = WEB, kind: str = "A") -> bytes:
    return bytes(DNSRecord.question(name, kind).pack())


def read(data: bytes) -> tuple[str, list[str]]:
    answer = DNSRecord.parse(data)
    return RCODE[answer.header.rcode], [str(rr.rdata) for rr in answer.rr]


def answer_to(data: bytes, *addresses: str) -> bytes:
    reply = DNSRecord.parse(data).reply()
    for address in addresses:
        reply.add_answer(RR(reply.q.qname, QTYPE.A, ttl=7, rdata=A(address)))
    return bytes(reply.pack())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.01)


@FAMILIES
async def test_a_service_is_answered_as_if_by_the_server_asked(life: World, family: int) -> None:
    server = await life.start()
    assert read(await life.ask(query(), family)) == ("NOERROR", ["10.96.0.1"])
    assert read(await life.ask(query(kind="AAAA"), family)) == ("NOERROR", ["fd00:96::1"])
    assert server.counters.requests.total() == 2
    assert server.counters.upstream_requests.total() == 0
    code, addresses = read(await life.ask(query("many.default.svc.cluster.local"), family))
    assert (code, len(addresses)) == ("NOERROR", 29)  # what 512 bytes hold


@FAMILIES
async def test_the_rest_goes_to_the_server_asked_byte_for_byte(life: World, family: int) -> None:
    server = await life.start()
    upstream = life.upstream(family)
    numbers, ports = set(), set()
    for kind in ("SRV", "TXT", "MX", "PTR", "HTTPS", "ANY"):
        client = await life.client(family)
        data = query(kind=kind)
        await client.send(data)
        asked, source = await upstream.recvfrom(4096)
        assert asked[2:] == data[2:]
        # From the pod's own address, so that what stands between sees the pod, and a port of its own.
        assert source[0] == (life.app.ip4 if family == 4 else life.app.ip6)
        numbers.add(asked[:2])
        ports.add(source[1])
        answer = answer_to(asked) + b"whatever else it says"
        await upstream.sendto(answer, source)
        assert await client.recv(4096) == data[:2] + answer[2:]
    assert len(numbers) > 1
    assert len(ports) > 1
    assert server.counters.upstream_requests.total() == 6
    assert server.counters.upstream_failures.total() == 0
    assert {one.query_type for one in server.counters.requests} == {"srv", "txt", "mx", "ptr", "https", "any"}


async def test_each_query_goes_to_the_server_it_was_for(life: World) -> None:
    await life.start()
    second = "10.255.0.53"
    assert life.peer.check(["ip", "address", "add", f"{second}/32", "dev", "lo"]).returncode == 0
    assert (
        life.app.check(
            ["ip", "route", "add", second, "via", life.peer.ip4, "onlink", "dev", "eth0"]
        ).returncode
        == 0
    )
    for address in (life.peer.ip4, second):
        upstream = life.socket(life.peer, bind=(address, 53))
        client = await life.client(to=address)
        await client.send(query("example.org"))
        asked, source = await upstream.recvfrom(4096)
        await upstream.sendto(answer_to(asked, "192.0.2.1"), source)
        assert read(await client.recv(4096)) == ("NOERROR", ["192.0.2.1"])


async def test_before_the_mesh_is_known_everything_is_passed_on(life: World) -> None:
    await life.start(synced=lambda: False)
    upstream, client = life.upstream(), await life.client()
    await client.send(query())
    asked, source = await upstream.recvfrom(4096)
    await upstream.sendto(answer_to(asked, "192.0.2.1"), source)
    assert read(await client.recv(4096)) == ("NOERROR", ["192.0.2.1"])


async def test_lost_datagrams_are_sent_again_and_silence_is_a_failure(
    life: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "PAUSES", (0.05, LIMIT))
    server = await life.start()
    upstream, client = life.upstream(), await life.client()
    await client.send(query("example.org"))
    first, _ = await upstream.recvfrom(4096)
    second, source = await upstream.recvfrom(4096)
    assert first == second
    await upstream.sendto(answer_to(second, "192.0.2.1"), source)
    assert read(await client.recv(4096)) == ("NOERROR", ["192.0.2.1"])
    monkeypatch.setattr(forward, "PAUSES", (0.05, 0.05))
    await client.send(query("example.net"))
    assert read(await client.recv(4096)) == ("SERVFAIL", [])
    assert server.counters.upstream_failures.total() == 1
    assert server.describe()["queries_under_way"] == 0


async def test_where_nobody_listens_the_program_hears_at_once(life: World) -> None:
    server = await life.start()
    assert read(await life.ask(query("example.org"))) == ("SERVFAIL", [])
    assert server.counters.upstream_failures.total() == 1


async def test_only_the_right_answer_is_believed(life: World) -> None:
    server = await life.start()
    upstream, client = life.upstream(), await life.client()
    data = query("example.org")
    await client.send(data)
    asked, source = await upstream.recvfrom(4096)
    right = answer_to(asked, "192.0.2.1")
    forged = answer_to(asked, "192.0.2.66")
    stranger = life.socket(life.peer, bind=(life.peer.ip4, 5353))
    await stranger.sendto(forged, source)  # the wrong port, and the next ones from the right one
    for wrong in (
        bytes([forged[0] ^ 1]) + forged[1:],
        asked,
        b"",
        asked[:2] + answer_to(query("example.net"), "192.0.2.66")[2:],
    ):
        await upstream.sendto(wrong, source)
    await upstream.sendto(right, source)
    code, addresses = read(await client.recv(4096))
    assert code == "NOERROR"
    assert "192.0.2.66" not in addresses
    assert server.counters.faults["unmatched"] >= 2


async def test_a_bound_on_what_is_under_way(life: World) -> None:
    server = await life.start(most_queries=8)
    life.upstream()  # takes everything, says nothing
    client = await life.client()
    for number in range(10):
        await client.send(query(f"x{number}.example.org"))
    for _ in range(6):
        assert read(await client.recv(4096)) == ("SERVFAIL", [])
    assert server.counters.faults["refused"] == 6
    assert server.describe()["queries_under_way"] == 4
    # The mesh's own names need nobody else.
    await client.send(query())
    assert read(await client.recv(4096)) == ("NOERROR", ["10.96.0.1"])


async def test_a_query_that_is_under_way_is_not_asked_twice(life: World) -> None:
    server = await life.start()
    upstream, client = life.upstream(), await life.client()
    data = query("example.org")
    for _ in range(3):
        await client.send(data)
    await until(lambda: server.counters.faults["repeated"] == 2)
    asked, source = await upstream.recvfrom(4096)
    await upstream.sendto(answer_to(asked, "192.0.2.1"), source)
    assert read(await client.recv(4096)) == ("NOERROR", ["192.0.2.1"])


async def test_our_own_queries_come_back_and_end_there(life: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "PAUSES", (0.05, 0.1, 0.1))
    monkeypatch.setattr(streams, "TIMEOUT", 0.5)
    monkeypatch.setattr(streams, "LOOK", 0.1)
    # Rules that know another mark capture what the proxy itself sends.
    server = await life.start(rules.Settings(dns_capture=True, mark=0x7FF, return_mark=0x7FE))
    assert read(await life.ask(query("example.org"))) == ("SERVFAIL", [])
    assert server.counters.faults["looping"] == 3
    assert server.counters.upstream_requests.total() == 1
    stream = await connect(life)
    await stream.send_all(framed(query("example.org")))
    async for message in streams.messages(stream):
        assert read(message) == ("SERVFAIL", [])
        break
    assert server.counters.faults["looping"] == 4


async def test_malformed_packets_of_all_kinds(life: World) -> None:
    server = await life.start()
    life.upstream()
    client = await life.client()
    await client.send(query()[:-1])
    assert read(await client.recv(4096)) == ("FORMERR", [])
    before = server.counters.faults["malformed"]
    draw = random.Random(7)
    for number in range(300):
        data = bytearray(query()) + draw.randbytes(draw.choice([0, 0, 11, 40, 900, 60000]))
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        await client.send(bytes(data))
        if number % 20 == 0:
            await trio.sleep(0)
    await client.send(b"")
    await until(lambda: server.counters.faults["malformed"] > before)
    probe = await life.client()
    await probe.send(query())
    assert read(await probe.recv(4096)) == ("NOERROR", ["10.96.0.1"])
    assert server.counters.faults["internal"] == 0


async def test_queries_that_nobody_redirected(life: World) -> None:
    await life.start()
    client = await life.client(to="127.0.0.1", port=15053)
    await client.send(query())
    assert read(await client.recv(4096)) == ("NOERROR", ["10.96.0.1"])
    await client.send(query("example.org"))
    assert read(await client.recv(4096)) == ("SERVFAIL", [])
    outsider = life.socket(life.peer)
    await outsider.connect((life.app.ip4, 15053))
    await outsider.send(query())
    with pytest.raises(ConnectionRefusedError):
        await outsider.recv(4096)


async def test_servers_of_the_node_where_nobody_knows_whom_the_program_asked(life: World) -> None:
    await life.start(servers=[(life.peer.ip4, 53)])
    upstream, client = life.upstream(), await life.client(to="127.0.0.1", port=15053)
    await client.send(query("example.org"))
    asked, source = await upstream.recvfrom(4096)
    await upstream.sendto(answer_to(asked, "192.0.2.1"), source)
    assert read(await client.recv(4096)) == ("NOERROR", ["192.0.2.1"])


# Over TCP.


def framed(*data: bytes) -> bytes:
    return b"".join(struct.pack("!H", len(one)) + one for one in data)


async def connect(life: World, family: int = 4) -> trio.SocketStream:
    client = life.socket(life.app, socket.SOCK_STREAM, family)
    await client.connect((life.server_address(family), 53))
    return trio.SocketStream(client)


async def serve(life: World, family: int, handle: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    listener = life.socket(life.peer, socket.SOCK_STREAM, family, (life.server_address(family), 53))
    listener.listen()
    assert life.nursery is not None
    life.nursery.start_soon(trio.serve_listeners, handle, [trio.SocketListener(listener)])


async def take(received: AsyncIterator[bytes], count: int) -> list[bytes]:
    return [await anext(received) for _ in range(count)]


@FAMILIES
async def test_tcp_answers_and_forwards_on_one_connection(life: World, family: int) -> None:
    seen = []

    async def handle(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async for message in streams.messages(stream):
                seen.append(message)
                reply = DNSRecord.parse(message).reply()
                for number in range(200):
                    reply.add_answer(RR(reply.q.qname, QTYPE.TXT, rdata=TXT(f"{number:0200d}")))
                await stream.send_all(framed(reply.pack()))

    server = await life.start()
    await serve(life, family, handle)
    stream = await connect(life, family)
    big = query("big.example.org", "TXT")
    many = query("many.default.svc.cluster.local")
    # In pieces, as TCP may bring it; several at once.
    sent = framed(query(), big, many)
    for position in range(0, len(sent), 9):
        await stream.send_all(sent[position : position + 9])
    answers = {message[:2]: message for message in await take(streams.messages(stream), 3)}
    assert len(answers) == 3
    assert seen == [big]
    assert len(read(answers[big[:2]])[1]) == 200
    assert len(read(answers[many[:2]])[1]) == 100
    assert {one.protocol for one in server.counters.requests} == {"tcp"}
    await stream.aclose()
    await until(lambda: server.describe()["connections"] == 0)


async def test_an_answer_in_many_messages_comes_as_it_is(life: World) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        async for message in streams.messages(stream):
            for _ in range(5):
                await stream.send_all(framed(answer_to(message, "192.0.2.1")))

    await life.start()
    await serve(life, 4, handle)
    stream = await connect(life)
    data = query("example.org", "AXFR")
    await stream.send_all(framed(data))
    assert await take(streams.messages(stream), 5) == [answer_to(data, "192.0.2.1")] * 5


async def test_a_server_that_ends_or_says_nothing_over_tcp(
    life: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "TIMEOUT", 0.3)
    monkeypatch.setattr(streams, "LOOK", 0.05)
    server = await life.start()
    stream = await connect(life)
    received = streams.messages(stream)
    await stream.send_all(framed(query("example.org")))
    assert read(await anext(received)) == ("SERVFAIL", [])  # nobody listens

    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some(10)
        await trio.sleep_forever()

    await serve(life, 4, handle)
    await stream.send_all(framed(query("example.net")))
    assert read(await anext(received)) == ("SERVFAIL", [])
    assert server.counters.upstream_failures.total() == 2
    # And where nothing is asked any more, the connection goes.
    monkeypatch.setattr(streams, "IDLE", 0.1)
    with pytest.raises(StopAsyncIteration):
        await anext(received)
    await until(lambda: server.describe()["connections"] == 0)
    assert server.describe()["queries_under_way"] == 0


async def test_hostile_connections_cost_little(life: World) -> None:
    server = await life.start(most_connections=4)
    kept = [await connect(life) for _ in range(2)]
    await until(lambda: server.describe()["connections"] == 2)
    refused = await connect(life)
    assert await refused.receive_some(1) == b""
    await kept[0].send_all(b"\0\1x")  # not even a header
    assert await kept[0].receive_some(1) == b""
    await kept[1].send_all(framed(query()[:-1], query()))
    messages = await take(streams.messages(kept[1]), 2)
    assert [read(message)[0] for message in messages] == ["FORMERR", "NOERROR"]
    assert server.counters.faults["internal"] == 0


async def test_a_resolver_that_is_told_that_an_answer_was_cut_off_asks_over_tcp(life: World) -> None:
    server = await life.start()
    dig = ["dig", f"@{life.peer.ip4}", "many.default.svc.cluster.local", "+noall", "+comments", "+answer"]

    async def told(*words: str) -> tuple[int, bool]:
        """How many addresses dig gets, and whether the answer says that there are more."""
        done = await trio.to_thread.run_sync(life.app.check, [*dig, *words])
        return done.stdout.count(" A\t") + done.stdout.count("\tA\t"), " tc " in done.stdout

    assert await told("+ignore", "+noedns") == (29, True)
    assert await told("+ignore", "+bufsize=1232") == (73, True)
    assert await told("+ignore", "+bufsize=4096") == (100, False)
    assert {one.protocol for one in server.counters.requests} == {"udp"}
    assert await told("+noedns") == (100, False)
    assert {one.protocol for one in server.counters.requests} == {"udp", "tcp"}


# Lives of pods and servers.


async def test_a_pod_that_left_is_not_answered(life: World) -> None:
    server = await life.start()
    descriptors = len(os.listdir("/proc/self/fd"))
    server.add("uid", "app", "default", life.namespace)  # again, which changes nothing
    assert len(os.listdir("/proc/self/fd")) == descriptors
    life.upstream()
    client = await life.client()
    await client.send(query("example.org"))
    await until(lambda: server.describe()["queries_under_way"] == 1)
    server.delete("uid")
    server.delete("uid")
    assert server.describe()["queries_under_way"] == 0
    await client.send(query())
    with pytest.raises(ConnectionRefusedError):
        await client.recv(4096)


async def test_a_port_that_is_taken_is_named(life: World) -> None:
    server = DnsServer(life.state, synced=lambda: True)
    life.socket(life.app, bind=("127.0.0.1", 15053))
    with pytest.raises(
        DnsError, match=r"pod default/app: .* port 15053 \(DNS\).*Address already in use.*free"
    ):
        server.add("uid", "app", "default", life.namespace)
    assert server.describe()["pods"] == 0


async def test_one_server_takes_over_from_another_without_losing_a_query(life: World) -> None:
    old = await life.start()
    asked = answered = 0
    stop = False

    async def program() -> None:
        nonlocal asked, answered
        while not stop:
            asked += 1
            assert read(await life.ask(query())) == ("NOERROR", ["10.96.0.1"])
            answered += 1

    assert life.nursery is not None
    async with trio.open_nursery() as programs:
        for _ in range(8):
            programs.start_soon(program)
        await until(lambda: answered > 50)
        new = await life.start()
        await until(lambda: new.counters.requests.total() > 20)
        assert old.counters.requests.total() > 20
        await old.drain()
        seen = old.counters.requests.total()
        before = answered
        await until(lambda: answered > before + 100)
        assert old.counters.requests.total() == seen
        stop = True
    assert asked == answered


async def test_a_bug_costs_one_query(life: World, monkeypatch: pytest.MonkeyPatch) -> None:
    server = await life.start()
    client = await life.client()
    with monkeypatch.context() as broken:
        broken.setattr(packets, "addresses", lambda *_: 1 / 0)
        await client.send(query())
        await until(lambda: server.counters.faults["internal"] == 1)
        stream = await connect(life)
        await stream.send_all(framed(query()))
        assert await stream.receive_some(1) == b""
    assert server.counters.faults["internal"] == 2
    await client.send(query())
    assert read(await client.recv(4096)) == ("NOERROR", ["10.96.0.1"])


async def test_what_is_under_way_ends_before_the_server_does(life: World) -> None:
    server = await life.start()
    upstream, client = life.upstream(), await life.client()
    await client.send(query("example.org"))
    asked, source = await upstream.recvfrom(4096)
    assert life.nursery is not None
    life.nursery.start_soon(server.drain)
    await trio.testing.wait_all_tasks_blocked()
    await upstream.sendto(answer_to(asked, "192.0.2.1"), source)
    assert read(await client.recv(4096)) == ("NOERROR", ["192.0.2.1"])
    await until(lambda: server.describe()["pods"] == 0)


async def test_while_one_server_drains_the_other_gets_every_query(
    life: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztunnel.dns.server.DRAIN", LIMIT)
    monkeypatch.setattr(forward, "PAUSES", (LIMIT,))
    old, new = await life.start(), await life.start()
    life.upstream()  # which says nothing
    while not old.describe()["queries_under_way"]:
        await (await life.client()).send(query("example.org"))
        await trio.sleep(0.01)
    assert life.nursery is not None
    life.nursery.start_soon(old.drain)
    await trio.testing.wait_all_tasks_blocked()
    before = new.counters.requests.total()
    for _ in range(40):
        assert read(await life.ask(query())) == ("NOERROR", ["10.96.0.1"])
        stream = await connect(life)
        await stream.send_all(framed(query()))
        await take(streams.messages(stream), 1)
    assert old.describe()["pods"] == 1, "it drains still"
    assert new.counters.requests.total() == before + 80
