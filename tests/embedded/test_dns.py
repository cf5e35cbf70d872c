"""The cluster's DNS: what it answers, and that real programs in pods get it, over UDP and TCP."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from dnslib import QTYPE, RCODE, RR, A, DNSRecord

from tests.embedded.objects import pod, service, view_of
from ztunnel.embedded.dns import ClusterDns, Upstream
from ztunnel.embedded.testing import Lab, LabPod
from ztunnel.embedded.view import View
from ztunnel.embedded.zone import reply
from ztunnel.store.models import ContainerPort, ObjectMeta, Service, ServicePort, ServiceSpec

VIP4, VIP6 = "10.96.7.7", "fd00:10:96::77"


@pytest.fixture
def view() -> View:
    return view_of(
        service("web", ServicePort(name="http", port=80, target_port=8080), addresses=[VIP4, VIP6]),
        service("old", ServicePort(port=80), addresses=["10.96.7.8"]),
        service("peers", ServicePort(name="http", port=80, target_port="http")),
        Service(
            metadata=ObjectMeta(name="out", namespace="default"),
            spec=ServiceSpec(type="ExternalName", external_name="example.org"),
        ),
        pod("a", "10.244.1.2", "fd00:10:244:1::2", hostname="first", subdomain="peers"),
        pod("b", "10.244.2.2", ports=[ContainerPort(name="http", container_port=9090)]),
        pod("c", "10.244.2.3", ready=False),
    )


def ask(view: View, name: str, kind: str = "A") -> tuple[str, set[str]]:
    """The code and the record data, in the words of dig."""
    found = reply(view, DNSRecord.question(name, kind).pack())
    assert found is not None
    answer = DNSRecord.parse(found.data)
    return RCODE[answer.header.rcode], {f"{QTYPE[r.rtype]} {r.rdata}" for r in answer.rr}


class TestAnswers:
    @pytest.mark.parametrize(
        ("name", "kind", "expected"),
        [
            ("web.default.svc.cluster.local", "A", {"A 10.96.7.7"}),
            ("WEB.Default.svc.Cluster.Local", "A", {"A 10.96.7.7"}),
            ("web.default.svc.cluster.local", "AAAA", {"AAAA fd00:10:96::77"}),
            ("web.default.svc.cluster.local", "ANY", {"A 10.96.7.7", "AAAA fd00:10:96::77"}),
            ("old.default.svc.cluster.local", "AAAA", set()),
            ("web.default.svc.cluster.local", "MX", set()),
            ("peers.default.svc.cluster.local", "A", {"A 10.244.1.2", "A 10.244.2.2"}),
            ("peers.default.svc.cluster.local", "AAAA", {"AAAA fd00:10:244:1::2"}),
            ("first.peers.default.svc.cluster.local", "A", {"A 10.244.1.2"}),
            ("10-244-2-2.peers.default.svc.cluster.local", "A", {"A 10.244.2.2"}),
            ("out.default.svc.cluster.local", "A", {"CNAME example.org."}),
            (
                "_http._tcp.web.default.svc.cluster.local",
                "SRV",
                {"SRV 0 100 80 web.default.svc.cluster.local."},
            ),
            ("_http._tcp.web.default.svc.cluster.local", "A", set()),
            ("10-244-1-2.default.pod.cluster.local", "A", {"A 10.244.1.2"}),
            ("7.7.96.10.in-addr.arpa", "PTR", {"PTR web.default.svc.cluster.local."}),
            ("default.svc.cluster.local", "A", set()),
            ("svc.cluster.local", "A", set()),
            ("cluster.local", "A", set()),
        ],
    )
    def test_names_that_exist(self, view: View, name: str, kind: str, expected: set[str]) -> None:
        assert ask(view, name, kind) == ("NOERROR", expected)

    @pytest.mark.parametrize(
        "name",
        [
            "nobody.default.svc.cluster.local",
            "web.other.svc.cluster.local",
            "x.web.default.svc.cluster.local",
            "_grpc._tcp.web.default.svc.cluster.local",
            "10-244-2-3.peers.default.svc.cluster.local",
            "other.svc.cluster.local",
            "bad.default.pod.cluster.local",
            "example.cluster.local",
            "9.9.96.10.in-addr.arpa",
        ],
    )
    def test_names_that_do_not(self, view: View, name: str) -> None:
        assert ask(view, name) == ("NXDOMAIN", set())

    def test_srv_of_a_headless_service_names_each_pod_with_its_own_port(self, view: View) -> None:
        code, records = ask(view, "_http._tcp.peers.default.svc.cluster.local", "SRV")
        assert code == "NOERROR"
        assert records == {
            "SRV 0 100 8080 first.peers.default.svc.cluster.local.",
            "SRV 0 100 9090 10-244-2-2.peers.default.svc.cluster.local.",
        }

    def test_records_live_five_seconds_and_absence_too(self, view: View) -> None:
        found = reply(view, DNSRecord.question("web.default.svc.cluster.local").pack())
        assert found is not None
        assert [r.ttl for r in DNSRecord.parse(found.data).rr] == [5]
        found = reply(view, DNSRecord.question("nobody.default.svc.cluster.local").pack())
        assert found is not None
        (soa,) = DNSRecord.parse(found.data).auth
        assert soa.ttl == 5
        assert soa.rdata.times[4] == 5

    def test_large_answers_are_cut_over_udp_and_whole_over_tcp(self) -> None:
        pods = [pod(f"p{i}", f"10.244.1.{i}") for i in range(2, 102)]
        view = view_of(service("peers", ServicePort(port=80)), *pods)
        query = DNSRecord.question("peers.default.svc.cluster.local").pack()
        small, large = reply(view, query), reply(view, query, None)
        assert small is not None
        assert large is not None
        assert len(small.data) <= 512
        assert DNSRecord.parse(small.data).header.tc
        assert len(DNSRecord.parse(large.data).rr) == 100

    def test_other_names_are_somebody_elses(self, view: View) -> None:
        for name in ("example.org", "notcluster.local", "1.2.0.192.in-addr.arpa"):
            found = reply(view, DNSRecord.question(name).pack())
            assert found is not None
            assert found.forward
            assert DNSRecord.parse(found.data).header.rcode == RCODE.SERVFAIL

    def test_garbage_gets_a_format_error_or_silence(self, view: View) -> None:
        assert reply(view, b"") is None
        assert reply(view, b"short") is None
        answer = DNSRecord.question("web.default.svc.cluster.local").reply().pack()
        assert reply(view, answer) is None, "answers are not answered"
        found = reply(view, b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xff\xff\xff")
        assert found is not None
        header = DNSRecord.parse(found.data).header
        assert (header.id, header.rcode) == (0x1234, RCODE.FORMERR)


@contextmanager
def resolver() -> Iterator[tuple[str, int]]:
    """A resolver on the machine that knows one name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                query, client = server.recvfrom(4096)
                if query == b"end":
                    return
                asked = DNSRecord.parse(query)
                answer = asked.reply()
                if asked.q.qname == "example.org":
                    answer.add_answer(RR("example.org", QTYPE.A, ttl=60, rdata=A("192.0.2.80")))
                else:
                    answer.header.rcode = RCODE.NXDOMAIN
                server.sendto(answer.pack(), client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()
        finally:
            server.sendto(b"end", server.getsockname())
            thread.join()


async def dig(client: LabPod, *words: str) -> list[str]:
    done = await trio.to_thread.run_sync(
        lambda: client.check(["dig", "@10.96.0.10", "+short", "+time=3", "+tries=1", *words])
    )
    return sorted(done.stdout.split())


@pytest.mark.e2e
class TestServer:
    async def test_dig_in_pods_of_every_node(self, tmp_path: Path, view: View) -> None:
        with Lab(tmp_path) as lab:
            nodes = [lab.network.path("node-1"), lab.network.path("node-2")]
            async with trio.open_nursery() as nursery:
                await nursery.start(ClusterDns(view, nodes).run)
                for client in (lab.pod("one", node=1), lab.pod("two", node=2)):
                    assert await dig(client, "web.default.svc.cluster.local") == [VIP4]
                    assert await dig(client, "+tcp", "web.default.svc.cluster.local", "AAAA") == [VIP6]
                    assert await dig(client, "example.org") == []
                    view.drop(service("old"))
                    assert await dig(client, "old.default.svc.cluster.local") == []
                nursery.cancel_scope.cancel()

    async def test_several_queries_on_one_tcp_connection(self, tmp_path: Path, view: View) -> None:
        query = DNSRecord.question("web.default.svc.cluster.local").pack()
        with Lab(tmp_path, nodes=1) as lab:
            client = lab.pod("client")
            async with trio.open_nursery() as nursery:
                await nursery.start(ClusterDns(view, [lab.network.path("node-1")]).run)

                def talk() -> list[bytes]:
                    with client.connect("10.96.0.10", 53) as connection, connection.makefile("rb") as answers:
                        connection.sendall((struct.pack("!H", len(query)) + query) * 3)
                        return [answers.read(int.from_bytes(answers.read(2), "big")) for _ in range(3)]

                answers = await trio.to_thread.run_sync(talk)
                assert [str(DNSRecord.parse(a).short()) for a in answers] == [VIP4] * 3
                nursery.cancel_scope.cancel()

    async def test_other_names_come_from_the_machines_resolvers(self, tmp_path: Path, view: View) -> None:
        resolv_conf = tmp_path / "resolv.conf"
        resolv_conf.write_text("# comment\nsearch x\nnameserver 127.0.0.1\n")
        with Lab(tmp_path, nodes=1) as lab, resolver() as (_, port):
            upstream = Upstream(Upstream.open_sockets(), resolv_conf, port)
            client = lab.pod("client")
            async with trio.open_nursery() as nursery:
                await nursery.start(ClusterDns(view, [lab.network.path("node-1")], upstream).run)
                assert await dig(client, "example.org") == ["192.0.2.80"]
                assert await dig(client, "+tcp", "example.org") == ["192.0.2.80"]
                assert await dig(client, "nobody.example.org") == []
                nursery.cancel_scope.cancel()

    async def test_no_resolvers_no_wait(self, tmp_path: Path) -> None:
        upstream = Upstream(Upstream.open_sockets(), tmp_path / "missing")
        with trio.fail_after(1):
            assert await upstream.ask(DNSRecord.question("example.org").pack()) is None
