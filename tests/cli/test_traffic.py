"""Tables of the traffic from the nodes' metrics: each connection once, right sums and shares, filters, pictures."""

import json
import shutil
import subprocess
from typing import Any

import pytest

from ztunnel.cli.errors import UserError
from ztunnel.cli.traffic import graph, rows, show
from ztunnel.cli.traffic.scrape import Counts, End, Flow, Page, flows, open_now, parse
from ztunnel.telemetry import labels
from ztunnel.telemetry.exposition import Family, exposition
from ztunnel.telemetry.meters import COUNTER, Sample

WEB = ("default", "web", "spiffe://cluster.local/ns/default/sa/web")
SHOP = ("shop", "client", "spiffe://cluster.local/ns/shop/sa/client")
NOBODY = ("unknown", "unknown", "unknown")
HOST = "web.default.svc.cluster.local"


def line(
    reporter: str, source: tuple[str, str, str], destination: tuple[str, str, str], *, secured: bool = True,
    service: bool = True, flag: str = "-",
) -> tuple[str, ...]:  # fmt: skip
    def side(end: tuple[str, str, str]) -> labels.Side:
        return labels.Side(workload=end[1], namespace=end[0], principal=end[2])

    return labels.Labels(
        reporter,
        side(source),
        labels.ServiceLabels(HOST, "default", "web") if service else labels.NO_SERVICE,
        side(destination),
        flag,
        labels.MUTUAL_TLS if secured else labels.UNKNOWN,
    ).values()


def page(node: str, taken: float, **numbers: list[Sample]) -> Page:
    """A node's page, written and read as real ones are."""
    names = {
        "opened": "istio_tcp_connections_opened", "closed": "istio_tcp_connections_closed",
        "failed": "istio_tcp_connections_failed",
        "sent": "istio_tcp_sent_bytes", "received": "istio_tcp_received_bytes",
    }  # fmt: skip
    families = [Family(COUNTER, names[kind], "", labels.TCP, samples) for kind, samples in numbers.items()]
    families.append(Family("gauge", "istio_build", "", (), [((), 1)]))
    return Page(node, taken, parse(exposition(families, "")[0].decode()))


def mesh(factor: int = 1) -> list[Page]:
    """Two nodes: what a client in the mesh did, seen by both; a denied one; and plaintext from outside."""
    both = SHOP, WEB
    one = page(
        "node-1", 10.0,
        opened=[(line("source", *both), 10 * factor)],
        closed=[(line("source", *both), 6 * factor), (line("source", *both, flag="DENY"), 2 * factor)],
        failed=[(line("source", *both, flag="DENY"), 2 * factor)],
        sent=[(line("source", *both), 100 * factor)],
        received=[(line("source", *both), 2000 * factor)],
    )  # fmt: skip
    plain = line("destination", NOBODY, WEB, secured=False)
    two = page(
        "node-2", 10.0,
        opened=[(line("destination", *both), 9 * factor), (plain, 5 * factor)],
        closed=[(line("destination", *both), 7 * factor), (plain, 5 * factor)],
        sent=[(line("destination", *both), 90 * factor), (plain, 7 * factor)],
        received=[(line("destination", *both), 1900 * factor), (plain, 8 * factor)],
    )  # fmt: skip
    return [one, two]


def test_a_connection_that_two_nodes_saw_is_counted_once() -> None:
    found = flows(mesh())
    assert {(str(flow.source), str(flow.destination), flow.secured) for flow in found} == {
        ("shop/client", "default/web", True),
        ("outside", "default/web", False),
    }
    counts = next(counts for flow, counts in found.items() if flow.secured)
    assert counts == Counts(10, 8, 2, 100, 2000, {"DENY": 2})
    assert counts.success == 0.75
    assert sum(open_now(mesh()).values()) == 2


def test_the_shares_of_a_workload() -> None:
    (row,) = rows.rows(flows(mesh()), open_now(mesh()), rows.by_destination("workloads"))
    assert row.key == ("default", "web")
    assert (row.counts.opened, row.counts.closed, row.open) == (15, 13, 2)
    assert row.mutual_tls == pytest.approx(10 / 15)
    described = row.describe(2.0)
    assert described["connections_per_second"] == 7.5
    assert described["failed_by_flag"] == {"DENY": 2}
    assert show.cells(row, 2.0) == ["7.5/s", "84.62%", "2", "54B/s", "1004B/s", "66.67%"]
    assert show.cells(row, 0)[0] == "15"


def test_what_happened_between_two_looks() -> None:
    before, now = mesh(1), mesh(3)
    (row,) = rows.rows(flows(now, before), open_now(now), rows.by_destination("services"))
    assert row.key == ("default", HOST)
    assert (row.counts.opened, row.counts.failed, row.open) == (30, 4, 6)
    nothing = flows(now, now)
    assert nothing == {}
    (quiet,) = rows.rows(nothing, open_now(now), rows.by_destination("namespaces"))
    assert (quiet.key, quiet.counts, quiet.open, quiet.mutual_tls) == (
        ("default", "default"),
        Counts(),
        6,
        None,
    )


def test_a_proxy_that_was_replaced_has_begun_anew() -> None:
    found = flows(mesh(1), mesh(3))
    assert next(counts for flow, counts in found.items() if flow.secured).opened == 10


def test_a_node_that_did_not_answer_before_is_not_all_news() -> None:
    assert flows(mesh(1), mesh(1)[:1]) == {}


@pytest.mark.parametrize(
    ("text", "matching"),
    [
        ("web", ["web"]), ("default/web", ["web"]), ("default/", ["web"]), ("shop/web", []), ("deploy/web", ["web"]),
        ("ns/shop", ["client"]), ("outside", [""]), (None, ["web", "client", "", ""]),
    ],
)  # fmt: skip
def test_an_end_is_named_in_several_ways(text: str | None, matching: list[str]) -> None:
    ends = [End(*WEB), End(*SHOP), End("", "", ""), End("far", "", "spiffe://far/ns/far/sa/x")]
    assert [end.workload for end in ends if rows.end_filter(text)(end)] == matching


def test_a_word_that_is_no_kind_is_refused_with_those_that_are() -> None:
    assert rows.kind_of("Deploy") == "workloads"
    with pytest.raises(UserError, match="services"):
        rows.kind_of("routes")


def test_the_busiest_come_first() -> None:
    lines = [
        rows.Row(("b",), Counts(opened=1, sent=9)),
        rows.Row(("a",), Counts(opened=1)),
        rows.Row(("c",), Counts(opened=5)),
    ]
    assert [row.key[0] for row in rows.ordered(lines, "connections")] == ["c", "a", "b"]
    assert [row.key[0] for row in rows.ordered(lines, "sent")] == ["b", "a", "c"]
    assert [row.key[0] for row in rows.ordered(lines, "name")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (1.0, "100.00%"), (0.99999, "99.99%"), (0.5, "50.00%"), (0.0, "0.00%")]
)
def test_not_all_is_never_shown_as_all(value: float | None, text: str) -> None:
    assert show.percent(value) == text


@pytest.mark.parametrize("screen", [True, False])
def test_a_table_is_drawn_again_and_again(capsys: pytest.CaptureFixture[str], screen: bool) -> None:
    drawn: list[int] = []

    def draw() -> str:
        drawn.append(len(drawn))
        return f"table {len(drawn)} [bold]as it is"

    show.repeat(draw, times=3, screen=screen)
    assert len(drawn) == 3
    assert "table 3 [bold]as it is" in capsys.readouterr().out


def edges() -> list[rows.Row]:
    odd = Flow(End("", "", 'spiffe://x/ns/"odd"\\'), End(*WEB), "", "", True, "destination")
    found = flows(mesh()) | {odd: Counts(opened=1, closed=1)}
    return rows.rows(found, open_now(mesh()), rows.by_pair)


def test_the_graph_as_text() -> None:
    text = graph.as_text(edges(), 0).splitlines()
    assert text[0] == "outside"
    assert text[1].startswith(f"  -> default/web through {HOST}: 5 connections, 0 open")
    assert text[1].endswith("plaintext")
    assert text[2] == "shop/client"
    assert "10 connections, 2 failed, 2 open, 100B sent" in text[3]
    assert text[3].endswith("mTLS")


def test_the_graph_as_json() -> None:
    found: dict[str, Any] = json.loads(graph.as_json(edges(), 0))
    names = {node["id"]: node["namespace"] for node in found["nodes"]}
    assert names == {
        "default/web": "default", "shop/client": "shop", "outside": None, 'spiffe://x/ns/"odd"\\': None,
    }  # fmt: skip
    assert {edge["source"]: edge["connections"] for edge in found["edges"]}["shop/client"] == 10


def test_the_graph_as_dot_has_every_edge_and_odd_names_in_quotes() -> None:
    text = graph.as_dot(edges(), 0)
    assert text.count(" -> ") == 3
    assert '"outside" -> "default/web"' in text
    assert "style=dashed" in text
    assert r'"spiffe://x/ns/\"odd\"\\"' in text
    dot = shutil.which("dot")
    if dot is not None:
        done = subprocess.run([dot, "-Tplain"], input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_page_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="metrics"):
        parse('istio_tcp_sent_bytes_total{reporter="x 1\n')
