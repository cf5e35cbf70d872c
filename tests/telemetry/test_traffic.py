"""The node's TCP metrics from reports: labels, worker deaths, bounds, and pages that Prometheus's parser takes."""

import gzip
import math
import os
import time
import tracemalloc
from ipaddress import ip_address
from typing import Any

import pytest
import trio

from tests.telemetry.scraped import Scraped
from ztunnel.mesh.model import Port, Service, Workload
from ztunnel.mesh.state import MeshState
from ztunnel.telemetry import labels, node
from ztunnel.telemetry.access import INBOUND, OUTBOUND
from ztunnel.telemetry.counting import MOST, Counts, Key, PodTraffic
from ztunnel.telemetry.exposition import Family, exposition
from ztunnel.telemetry.log import Logger
from ztunnel.telemetry.meters import COUNTER, GAUGE, Meters
from ztunnel.telemetry.node import NodeMetrics
from ztunnel.telemetry.traffic import RETENTION, SWEEP, TrafficMetrics, samples

WEB = "spiffe://cluster.local/ns/default/sa/web"
CLIENT = "spiffe://cluster.local/ns/shop/sa/client"
KEY = "default/web.default.svc.cluster.local"
SILENT = Logger("off")


class World:
    """A client's and a server's workload, the service before it, a clock, and the metrics of their node."""

    def __init__(self, most: int = 10_000, logger: Logger = SILENT) -> None:
        self.now = 1000.0
        self.state = MeshState()
        self.workload("web-1", "default", "10.0.0.2", service_account="web", canonical_name="web",
            canonical_revision="v3", workload_name="web", services={KEY: (Port(80, 8080),)})  # fmt: skip
        self.workload("client-1", "shop", "10.0.0.1", service_account="client", workload_name="client")
        self.state.upsert_service(
            Service(
                name="web", namespace="default", hostname="web.default.svc.cluster.local",
                ports=(Port(80, 8080),),
            )
        )  # fmt: skip
        self.traffic = TrafficMetrics(self.state, "", "C", logger, most=most, clock=lambda: self.now)

    def workload(self, name: str, namespace: str, address: str, **fields: Any) -> None:
        self.state.upsert_workload(
            Workload(
                uid=f"C//Pod/{namespace}/{name}", name=name, namespace=namespace, cluster_id="C",
                addresses=(ip_address(address).packed,), **fields,
            )
        )  # fmt: skip

    def report(
        self, pod: str, key: Key, opened: int = 0, closed: int = 0, failed: int = 0, sent: int = 0,
        received: int = 0, worker: int = 0,
    ) -> None:  # fmt: skip
        namespace, name = pod.split("/")
        identity = {"web-1": WEB, "client-1": CLIENT}.get(name, "")
        counts = [opened, closed, failed, sent, received]
        self.traffic.add(worker, [PodTraffic(namespace, name, identity, [(key, counts)])])

    def page(self, accept: str = "") -> str:
        return exposition(
            [
                Family(COUNTER, name, told, labels.TCP, found)
                for name, told, found in samples(self.traffic.snapshot())
            ],
            accept,
        )[0].decode()

    def sums(self, **wanted: str) -> tuple[float, ...]:
        scraped = Scraped(self.page())
        return tuple(
            scraped.sum(f"istio_tcp_{name}_total", **wanted)
            for name in (
                "connections_opened", "connections_closed", "connections_failed", "sent_bytes", "received_bytes",
            )
        )  # fmt: skip


def outbound(peer: str = "10.0.0.2", identity: str = WEB, service: str = KEY, flag: str = "-") -> Key:
    return (OUTBOUND, peer, identity, service, 0, bool(identity), flag)


def inbound(peer: str = "10.0.0.1", identity: str = CLIENT, port: int = 8080, flag: str = "-") -> Key:
    return (INBOUND, peer, identity, "", port, bool(identity), flag)


NAMES = [
    "reporter",
    "source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
    "source_principal", "source_app", "source_version", "source_cluster",
    "destination_service", "destination_service_namespace", "destination_service_name",
    "destination_workload", "destination_canonical_service", "destination_canonical_revision",
    "destination_workload_namespace", "destination_principal", "destination_app", "destination_version",
    "destination_cluster",
    "request_protocol", "response_flags", "connection_security_policy",
]  # fmt: skip


def test_the_names_of_the_labels_are_istios() -> None:
    assert sorted(labels.TCP) == sorted(NAMES)


def test_an_outbound_connection_has_the_labels_of_both_ends() -> None:
    world = World()
    world.report("shop/client-1", outbound(), opened=2, closed=1, sent=10, received=20)
    (line,) = Scraped(world.page()).find("istio_tcp_connections_opened_total")
    assert line.value == 2
    assert line.labels == {
        "reporter": "source",
        "source_workload": "client",
        "source_canonical_service": "unknown",
        "source_canonical_revision": "unknown",
        "source_workload_namespace": "shop",
        "source_principal": CLIENT,
        "source_app": "unknown",
        "source_version": "unknown",
        "source_cluster": "C",
        "destination_service": "web.default.svc.cluster.local",
        "destination_service_namespace": "default",
        "destination_service_name": "web",
        "destination_workload": "web",
        "destination_canonical_service": "web",
        "destination_canonical_revision": "v3",
        "destination_workload_namespace": "default",
        "destination_principal": WEB,
        "destination_app": "web",
        "destination_version": "v3",
        "destination_cluster": "C",
        "request_protocol": "tcp",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
    }
    assert world.sums() == (2, 1, 0, 10, 20)


def test_an_inbound_connections_service_is_told_by_its_port() -> None:
    world = World()
    world.report("default/web-1", inbound(), opened=1)
    world.report("default/web-1", inbound(port=9999), opened=1)
    lines = Scraped(world.page()).find("istio_tcp_connections_opened_total", reporter="destination")
    assert [one.labels["destination_service"] for one in lines] == [
        "web.default.svc.cluster.local",
        "unknown",
    ]
    assert {one.labels["source_workload"] for one in lines} == {"client"}
    assert {one.labels["source_principal"] for one in lines} == {CLIENT}


@pytest.mark.parametrize(
    ("peer", "identity", "expected"),
    [
        # Without a certificate: the address says whose it is, nothing says that it is he.
        ("10.0.0.1", "", ("client", "shop", "unknown")),
        ("192.0.2.1", "", ("unknown", "unknown", "unknown")),
        ("2001:db8::1", "", ("unknown", "unknown", "unknown")),
        ("", "", ("unknown", "unknown", "unknown")),
        ("fe80::1%eth0", "", ("unknown", "unknown", "unknown")),
        # With one that is not of whoever has the address now: what the certificate says.
        ("10.0.0.1", "spiffe://other/ns/far/sa/x", ("unknown", "far", "spiffe://other/ns/far/sa/x")),
        ("192.0.2.1", "spiffe://other/ns/far/sa/x", ("unknown", "far", "spiffe://other/ns/far/sa/x")),
    ],
)
def test_a_source_is_what_it_has_proved(peer: str, identity: str, expected: tuple[str, str, str]) -> None:
    world = World()
    world.report("default/web-1", inbound(peer, identity), opened=1)
    (line,) = Scraped(world.page()).find("istio_tcp_connections_opened_total")
    found = line.labels
    assert (
        found["source_workload"],
        found["source_workload_namespace"],
        found["source_principal"],
    ) == expected


def test_a_report_that_comes_after_its_pod_has_gone_has_its_labels_still() -> None:
    world = World()
    world.report("default/web-1", inbound(), opened=1, closed=1)
    world.state.remove("C//Pod/shop/client-1")
    world.now += 10
    world.report("default/web-1", inbound(), opened=1, closed=1)
    assert world.sums(source_workload="client")[:2] == (2, 2)
    world.now += 100
    world.report("default/web-1", inbound(), opened=1, closed=1)
    assert world.sums(source_workload="client")[:2] == (2, 2)
    assert world.sums(source_workload="unknown", source_principal=CLIENT)[:2] == (1, 1)


def test_a_connection_is_closed_under_the_labels_that_it_was_opened_under() -> None:
    """Or opened minus closed, the number that is open, would be wrong for ever."""
    world = World()
    world.report("default/web-1", inbound(), opened=3)
    world.workload("client-1", "shop", "10.0.0.1", service_account="client", workload_name="renamed")
    world.report("default/web-1", inbound(flag="CONNECT"), closed=1, failed=1)
    world.report("default/web-1", inbound(), opened=1, closed=3)
    assert world.sums(source_workload="client")[:3] == (4, 4, 1)
    assert world.sums(source_workload="client", response_flags="CONNECT")[:3] == (0, 1, 1)
    assert world.traffic.open_conversations == 0
    world.report("default/web-1", inbound(), opened=1)
    assert world.sums(source_workload="renamed")[:2] == (1, 0)


def test_what_was_open_in_a_worker_that_died_is_closed_and_failed() -> None:
    world = World()
    for worker in (0, 1):
        world.report("shop/client-1", outbound(), opened=3, closed=1, sent=5, worker=worker)
    world.traffic.left(0)
    assert world.sums()[:4] == (6, 4, 2, 10)
    world.traffic.left(0)
    assert world.sums()[:3] == (6, 4, 2)
    world.report("shop/client-1", outbound(), opened=1, closed=1, worker=0)
    assert world.sums()[:3] == (7, 5, 2)


def test_series_are_bounded_and_what_is_beyond_is_told() -> None:
    read, write = os.pipe()
    world = World(most=50, logger=Logger("info", fd=write))
    for number in range(200):
        identity = f"spiffe://cluster.local/ns/n{number}/sa/x"
        world.report("default/web-1", inbound("192.0.2.9", identity), opened=1, closed=1, sent=7)
    assert len(world.traffic) <= 51
    assert world.traffic.overflowed == 150
    assert world.sums()[:4] == (200, 200, 0, 1400)  # nothing is lost
    assert world.sums(destination_workload="unknown")[:2] == (150, 150)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    assert told.count("\n") == 1
    assert "limit=50" in told


def test_series_of_workloads_that_are_gone_go_and_others_stay() -> None:
    world = World()
    world.report("default/web-1", inbound(), opened=1, closed=1)
    world.report("default/web-1", inbound("192.0.2.1", ""), opened=1, closed=1)
    world.state.remove("C//Pod/shop/client-1")
    world.now += RETENTION - 1
    assert len(world.traffic) == 2
    world.now += SWEEP
    assert world.sums(source_workload="client") == (0, 0, 0, 0, 0)
    assert world.sums()[:2] == (1, 1)


def test_a_series_with_an_open_connection_stays() -> None:
    world = World()
    world.report("default/web-1", inbound(), opened=1)
    world.state.remove("C//Pod/shop/client-1")
    world.now += RETENTION + SWEEP
    assert world.sums(source_workload="client")[:2] == (1, 0)
    world.report("default/web-1", inbound(), closed=1)
    assert world.sums(source_workload="client")[:2] == (1, 1)


def test_memory_stays_the_same_under_a_stream_of_strangers() -> None:
    world = World()

    def strangers(first: int) -> None:
        for number in range(first, first + 5000):
            peer = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
            world.now += 0.1
            world.report("default/web-1", inbound(peer, ""), opened=1, closed=1)
        world.now += RETENTION + SWEEP
        world.page()

    strangers(100_000)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        strangers(200_000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 200_000
    assert len(world.traffic) < 10


def test_the_names_for_the_log_hold_until_something_about_them_changes() -> None:
    world = World()
    found = world.traffic.peer("default", "web-1", "10.0.0.1", 8080)
    assert found[:3] == ("client-1", "shop", "web.default.svc.cluster.local")
    for change in (
        world.state.remove("C//Pod/shop/client-1"),
        world.state.upsert_service(
            Service(name="web", namespace="default", hostname="web.default.svc.cluster.local")
        ),
        world.state.remove("C//Pod/default/web-1"),
    ):
        assert not change.isdisjoint(found.tags)
    for address in ("192.0.2.1", "fe80::1%eth0"):
        assert world.traffic.peer("default", "nobody", address, 1)[:3] == ("", "", "")


# Counting in a worker.


def test_a_worker_reports_at_once_when_there_is_much() -> None:
    asked: list[int] = []
    counts = Counts(lambda: asked.append(1))
    for number in range(MOST):
        counts.entry(inbound(str(number)))[0] += 1
        counts.entry(inbound(str(number)))[1] += 1
    assert asked == [1]
    taken = counts.take()
    assert len(taken) == MOST
    assert all(numbers == [1, 1, 0, 0, 0] for _, numbers in taken)
    assert not counts


# Exposition.


ODD = ['quoted "name"', "back\\slash", "two\nlines", "ünïcode", "", "}", ","]


@pytest.mark.parametrize(
    "accept", ["", "text/plain;version=0.0.4", "application/openmetrics-text; version=1.0.0"]
)
def test_the_parser_takes_what_is_written(accept: str) -> None:
    meters = Meters()
    counter = meters.counter("odd", "What is odd \\ and\nof two lines", ("one", "another"))
    for text in ODD:
        counter.add(text, "x", amount=2)
    meters.gauge("level", "A level").set(value=math.pi)
    world = World()
    world.report("shop/client-1", outbound(), opened=3, closed=1, failed=1, sent=1 << 60, received=5)
    families = [
        Family(COUNTER, name, told, labels.TCP, found)
        for name, told, found in samples(world.traffic.snapshot())
    ]
    families += [Family(one.kind, one.name, one.told, one.labels, one.samples()) for one in meters]
    body, content_type = exposition(families, accept)
    open_metrics = content_type.startswith("application/openmetrics-text")
    assert open_metrics == accept.startswith("application/openmetrics-text")
    scraped = Scraped(body.decode(), open_metrics=open_metrics)
    assert {one.labels["one"]: one.value for one in scraped.find("odd_total")} == dict.fromkeys(ODD, 2)
    assert scraped.sum("level") == math.pi
    assert scraped.sum("istio_tcp_sent_bytes_total") == 1 << 60
    assert scraped.sum("istio_tcp_connections_failed_total", response_flags="-") == 1


def test_a_name_is_taken_once_and_labels_have_their_number() -> None:
    meters = Meters()
    counter = meters.counter("a", "", ("x",))
    with pytest.raises(ValueError, match="metric a"):
        meters.gauge("a", "")
    with pytest.raises(ValueError, match="labels"):
        counter.add()


def test_a_meter_is_bounded() -> None:
    counter = Meters().counter("a", "", ("x",))
    for number in range(10_000):
        counter.add(str(number))
    samples = dict(counter.samples())
    assert len(samples) <= 2001
    assert sum(samples.values()) == 10_000
    assert samples["unknown",] == 8000


async def _nothing() -> None:
    return


async def test_ten_thousand_scrapes_leave_nothing_behind() -> None:
    world = World()
    metrics = NodeMetrics(world.traffic, _nothing, rest=0)
    world.report("shop/client-1", outbound(), opened=3, closed=1, sent=5)

    async def scrape(times: int) -> bytes:
        body = b""
        for _ in range(times):
            body, _, _ = await metrics.page("", "")
        return body

    tracemalloc.start()
    try:
        first = await scrape(200)
        before, _ = tracemalloc.get_traced_memory()
        assert await scrape(200) == first
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000
    assert await scrape(10_000 - 400) == first


async def test_who_scrapes_without_end_gets_half_of_the_time_at_most() -> None:
    world = World()
    for number in range(200):
        world.report("shop/client-1", outbound(service=f"default/s{number}"), opened=3, closed=1, sent=5)
    spent: list[float] = []

    metrics = NodeMetrics(world.traffic, _nothing)
    write = node._write

    def timed(*arguments: Any) -> tuple[bytes, str, str]:
        began = time.perf_counter()
        try:
            return write(*arguments)
        finally:
            spent.append(time.perf_counter() - began)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "_write", timed)
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(metrics.page, "", "")
        took = time.perf_counter() - began
    assert len(spent) == 10
    # The last one is followed by no pause.
    assert sum(spent[:-1]) <= (took - spent[-1]) / 2 * 1.01


@pytest.mark.parametrize(
    ("header", "compressed"),
    [("gzip", True), ("deflate, gzip;q=0.5", True), ("", False), ("gzip;q=0", False), ("br", False)],
)
async def test_a_page_is_compressed_for_those_who_take_it(header: str, compressed: bool) -> None:
    world = World()
    for number in range(20):
        world.report("shop/client-1", outbound(service=f"default/s{number}"), opened=1)
    body, _, encoding = await NodeMetrics(world.traffic, _nothing).page("", header)
    assert encoding == ("gzip" if compressed else "")
    text = gzip.decompress(body) if compressed else body
    assert Scraped(text.decode()).sum("istio_tcp_connections_opened_total") == 20
    assert Scraped(text.decode()).find("istio_build", component="ztunnel")[0].value == 1
    assert {one.kind for one in NodeMetrics(world.traffic, _nothing).meters} == {COUNTER, GAUGE}
