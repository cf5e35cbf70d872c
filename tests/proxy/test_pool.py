"""Which tunnel takes a connection: sharing, limits, streams that went away meanwhile, tunnels that died or ended."""

import random
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.proxy.ends import Bench, End, Owner
from ztunnel import hbone
from ztunnel.identity.testing import CLIENT, SERVER, workload
from ztunnel.identity.tls import mesh_context
from ztunnel.inpod import sockets
from ztunnel.mesh.route import Endpoint
from ztunnel.proxy import tls
from ztunnel.proxy.context import Pod
from ztunnel.proxy.errors import ConnectFailed, IdentityMissing
from ztunnel.proxy.pool import ClientTunnel, Pool
from ztunnel.proxy.relay import WAITING, AppStream
from ztunnel.proxy.tunnel import CLOSED, CLOSING, CONNECTING, OPEN
from ztunnel.telemetry.access import OUTBOUND

pytestmark = pytest.mark.e2e  # marked sockets need CAP_NET_ADMIN


class Side:
    """A pod's pool, and a peer that accepts on an address of its own on loopback."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.pod: Pod = bench.pod()
        self.ended: list[Pod] = []
        self.pool = Pool(bench.context, self.ended.append, max_streams=100)
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rng = random.SystemRandom()
        while True:
            address = f"127.{rng.randrange(1, 255)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"
            try:
                self.listener.bind((address, sockets.INBOUND_HBONE_PORT))
            except OSError:
                continue
            break
        self.listener.listen(128)
        self.listener.setblocking(False)
        self.endpoint = Endpoint(address, 80, True, SERVER, "w", "default", "")
        self.servers: list[End] = []
        self.owner = Owner
        bench.reactor.register(self.listener.fileno(), self._accept, 1)

    def _accept(self, event: int) -> None:
        sock, _ = self.listener.accept()
        sock.setblocking(False)
        self.servers.append(End(self.bench, sock, hbone.Role.SERVER))

    def stream(self) -> tuple[AppStream, Owner, socket.socket]:
        ours, theirs = self.bench.tcp_pair()
        owner = self.owner()
        record = self.bench.context.record(OUTBOUND, "app")
        return AppStream(self.bench.reactor, ours, record, owner, WAITING), owner, theirs

    def open(self, **options: Any) -> tuple[ClientTunnel, Owner, socket.socket]:
        """Take a tunnel and ask it for a stream."""
        tunnel = self.pool.get(self.pod, self.endpoint, **options)
        stream, owner, app = self.stream()
        tunnel.open(stream, "10.0.0.1:80", ())
        return tunnel, owner, app

    def close(self) -> None:
        for tunnel in list(self.pod.tunnels):
            tunnel.fail(ConnectFailed("the test is over"))
        self.listener.close()
        self.pod.close()


@pytest.fixture
def side(bench: Bench) -> Iterator[Side]:
    made = Side(bench)
    yield made
    made.close()


def test_connections_share_a_tunnel_up_to_its_limit(bench: Bench, side: Side) -> None:
    side.pool.max_streams = 3
    taken = [side.open() for _ in range(7)]
    assert len({id(tunnel) for tunnel, _, _ in taken}) == len(side.pool) == 3
    bench.until(lambda: all(owner.statuses == [200] for _, owner, _ in taken))
    assert sorted(tunnel.load for tunnel in {one for one, _, _ in taken}) == [1, 3, 3]


def test_a_peer_that_is_not_heard_of_is_told_from_one_that_is_slow(bench: Bench, side: Side) -> None:
    """The flag of the first is what one looks for when a NetworkPolicy is in the way."""
    silent, first, _ = side.open()
    assert silent.state == CONNECTING
    silent.overdue()
    slow, second, _ = side.open()
    bench.until(lambda: slow.state != CONNECTING)
    slow.overdue()
    flags = [owner.lost_to[0].flag for owner in (first, second)]
    assert flags == ["NETWORK_POLICY", "CONNECT"]


def test_an_application_that_left_while_its_tunnel_was_made_gets_no_stream(bench: Bench, side: Side) -> None:
    """Its socket is closed, and the number may belong to another connection by the time the tunnel stands."""
    tunnel, owner, app = side.open()
    _, other, _ = side.open()
    app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    app.close()
    bench.until(lambda: owner.ends)
    assert tunnel.state != OPEN
    bench.until(lambda: other.statuses == [200])
    assert owner.statuses == []
    assert len(owner.ends) == 1
    assert len(tunnel.streams) == len(side.servers[0].streams) == 1


def test_more_streams_than_the_peer_takes_at_first(bench: Bench, side: Side) -> None:
    """Before its SETTINGS a peer takes 100 (RFC 9113, 6.5.2): who is beyond that goes elsewhere at once."""
    side.pool.max_streams = 1000
    elsewhere: list[bool] = []

    class Again(Owner):
        def refused(self, stream: AppStream) -> None:
            super().refused(stream)
            elsewhere.append(side.pool.get(side.pod, side.endpoint) is not taken[0][0])

    side.owner = Again
    taken = [side.open() for _ in range(120)]
    bench.until(lambda: all(owner.statuses or owner.refusals for _, owner, _ in taken))
    assert elsewhere == [True] * 20
    assert taken[0][0].limit <= 256


def test_a_dead_tunnels_streams_share_the_one_that_follows(bench: Bench, side: Side) -> None:
    taken = [side.open() for _ in range(5)]
    bench.until(lambda: all(owner.statuses for _, owner, _ in taken))
    side.servers[0].fail(None)
    bench.until(lambda: taken[0][0].state == CLOSED)
    assert len(side.pool) == 0
    first = side.pool.get(side.pod, side.endpoint, fresh=True)
    assert side.pool.get(side.pod, side.endpoint, fresh=True) is first


def test_a_fresh_tunnel_is_not_one_that_stands(bench: Bench, side: Side) -> None:
    tunnel, owner, _ = side.open()
    bench.until(lambda: owner.statuses)
    assert side.pool.get(side.pod, side.endpoint) is tunnel
    assert side.pool.get(side.pod, side.endpoint, fresh=True) is not tunnel


def test_after_goaway_a_tunnel_serves_what_it_has_and_closes(bench: Bench, side: Side) -> None:
    tunnel, owner, app = side.open()
    bench.until(lambda: owner.statuses)
    side.servers[0].go()
    bench.until(lambda: not tunnel.usable)
    assert len(side.pool) == 0
    assert tunnel.state == OPEN
    app.sendall(b"x")
    app.shutdown(socket.SHUT_WR)
    assert bench.read_all(side.servers[0].apps[0]) == b"x"
    side.servers[0].apps[0].close()
    bench.until(lambda: tunnel.state == side.servers[0].state == CLOSED)
    assert owner.ends == [None]
    assert side.ended == [side.pod]


def test_an_unused_tunnel_is_closed_after_its_time(bench: Bench, side: Side) -> None:
    tunnel, owner, app = side.open()
    bench.until(lambda: owner.statuses)
    side.pool.idle.sweep(bench.reactor.now + 1000)
    assert tunnel.state == OPEN
    app.close()
    side.servers[0].apps[0].close()
    bench.until(lambda: owner.ends)
    side.pool.idle.sweep(bench.reactor.now + 1000)
    assert tunnel.state == CLOSING
    bench.until(lambda: tunnel.state == side.servers[0].state == CLOSED)
    assert side.servers[0].ended_with == [None]


def test_no_certificate_no_tunnel(bench: Bench, side: Side) -> None:
    tunnel, owner, _ = side.open()
    bench.until(lambda: owner.statuses)
    side.pod.identity.not_after = 1.0
    with pytest.raises(IdentityMissing, match="expired at 1970"):
        side.pool.get(side.pod, side.endpoint)
    assert tunnel.state == OPEN  # what is open goes on


def test_a_tunnel_takes_new_streams_for_half_of_what_is_left_of_either_certificate(
    bench: Bench, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunnel, owner, _ = side.open()
    bench.until(lambda: owner.statuses)
    began = time.time()
    assert abs(tunnel.not_after - side.pod.identity.not_after) < 30
    assert abs(tunnel.fresh_until - began - 1800) < 60
    monkeypatch.setattr("ztunnel.proxy.pool.time.time", lambda: began + 1700)
    assert side.pool.get(side.pod, side.endpoint) is tunnel
    monkeypatch.setattr("ztunnel.proxy.pool.time.time", lambda: began + 1900)
    again = side.pool.get(side.pod, side.endpoint)
    assert again is not tunnel
    assert not tunnel.usable
    assert tunnel.state == OPEN, "what is open goes on"


def test_a_renewed_certificate_is_for_the_next_stream(bench: Bench, side: Side) -> None:
    tunnel, owner, _ = side.open()
    bench.until(lambda: owner.statuses)
    renewed = tls.prepare(mesh_context(workload(bench.authority, CLIENT)))
    side.pod.identity.use(renewed, renewed, time.time() + 3600)
    again, owner, _ = side.open()
    assert again is not tunnel
    bench.until(lambda: owner.statuses)
    assert side.pool.get(side.pod, side.endpoint) is again


def test_nobody_listens(bench: Bench, side: Side) -> None:
    side.endpoint = side.endpoint._replace(address="127.255.255.254")
    tunnel, owner, _ = side.open()
    bench.until(lambda: tunnel.state == CLOSED)
    assert "nothing listens there" in str(owner.lost_to[0])
    assert not tunnel.served


def test_a_pod_that_left_has_its_tunnels_released(bench: Bench, side: Side) -> None:
    tunnel, owner, app = side.open()
    idle = side.pool.get(side.pod, side.endpoint._replace(identity="spiffe://cluster.local/ns/x/sa/y"))
    bench.until(lambda: owner.statuses)
    side.pod.accepting = False
    side.pool.release(side.pod)
    assert len(side.pool) == 0
    bench.until(lambda: idle.state == CLOSED)
    assert tunnel.state == OPEN
    app.close()
    side.servers[0].apps[0].close()
    bench.until(lambda: tunnel.state == CLOSED)
    assert not side.pod.tunnels
