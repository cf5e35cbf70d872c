"""What the demo makes of the proxies' access logs: only ended connections of clients, each counted once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ztunnel.cli.demo.accesslog import AccessLog, Traffic
from ztunnel.cli.demo.acts import Acts, Refusal
from ztunnel.cli.demo.run import Result

PAGE = "spiffe://cluster.local/ns/default/sa/bookshop-productpage"
REVIEWS = "spiffe://cluster.local/ns/default/sa/bookshop-reviews"


def line(**fields: Any) -> str:
    entry = {
        "time": "2025-01-01T00:00:00Z",
        "level": "info",
        "scope": "access",
        "message": "connection complete",
        "src.workload": "productpage-1",
        "src.namespace": "default",
        "src.identity": PAGE,
        "dst.workload": "reviews-1",
        "dst.namespace": "default",
        "dst.identity": REVIEWS,
        "direction": "outbound",
        "connection_security_policy": "mutual_tls",
        "bytes_sent": 12,
        "duration": "3ms",
    } | fields
    return json.dumps({key: value for key, value in entry.items() if value is not None}) + "\n"


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_only_what_is_written_from_now_on_counts_and_each_line_once(tmp_path: Path) -> None:
    first = tmp_path / "ztunnel-node-1.log"
    add(first, line())
    log = AccessLog(tmp_path)
    assert log.entries() == []
    add(first, line())
    add(tmp_path / "ztunnel-node-2.log", line())  # a node's log may appear later
    add(tmp_path / "controlplane.log", line())
    assert len(log.entries()) == 2
    assert log.entries() == []
    add(first, line())
    log.skip()
    assert log.entries() == []


def test_a_line_in_the_writing_is_left_for_later(tmp_path: Path) -> None:
    log = AccessLog(tmp_path)
    path = tmp_path / "ztunnel-node-1.log"
    whole = line()
    add(path, whole + whole[:50])
    assert len(log.entries()) == 1
    add(path, whole[50:])
    assert len(log.entries()) == 1


def test_other_lines_are_passed_over(tmp_path: Path) -> None:
    log = AccessLog(tmp_path)
    add(
        tmp_path / "ztunnel-node-1.log",
        line(scope="xds")
        + line(direction="inbound")
        + "Traceback (most recent call last):\n\n[1]\n\xff\n"
        + line(),
    )
    assert len(log.entries()) == 1


def test_traffic_is_added_up_by_the_two_identities(tmp_path: Path) -> None:
    log = AccessLog(tmp_path)
    add(tmp_path / "ztunnel-node-1.log", line() * 3)
    traffic = Traffic()
    assert traffic.mtls_percent == 0
    for entry in log.entries():
        traffic.add(entry)
    assert (traffic.connections, traffic.mtls_percent) == (3, 100)
    assert traffic.identities() == [{"source": PAGE, "destination": REVIEWS, "connections": 3}]
    plain = {"connection_security_policy": "unknown", "dst.identity": None}
    add(tmp_path / "ztunnel-node-1.log", line(**plain) + line(**plain, error="connection refused"))
    add(tmp_path / "ztunnel-node-1.log", line(**{"dst.namespace": None}) + line(**{"src.namespace": "other"}))
    for entry in log.entries():
        traffic.add(entry)
    assert (traffic.connections, traffic.mutual_tls, traffic.mtls_percent) == (5, 3, 60)
    assert traffic.errors == {"productpage-1 -> reviews-1: not mutual TLS": 1, "connection refused": 1}


def good() -> Result:
    traffic = Traffic()
    traffic.connections = traffic.mutual_tls = 5
    counts = {"packets": 10, "sightings": 0, "dropped": 0, "gaps": 0, "ports": {"15008": 10}}
    return Result(
        requests=9,
        traffic=traffic,
        inside=counts,
        outside=counts | {"sightings": 3, "ports": {"9080": 9}},
        acts=acts(),
    )


def acts(**change: Any) -> Acts:
    refused = Refusal(allowed_before=True, refused=True)
    return replace(Acts(strict=refused, denied=refused, certificates=5, renewed=5), **change)


def test_a_result_without_shortcomings_has_the_fields_that_scripts_read() -> None:
    result = good()
    assert result.shortcomings() == []
    wanted = {"requests", "failures", "mtls_percent", "plaintext_leaks", "leak_check_detects", "identities"}
    wanted |= {"p50_ms", "p99_ms", "requests_per_second", "duration_s", "nodes", "pods", "packets_captured"}
    found = result.as_json()
    assert wanted <= set(found)
    assert (found["plaintext_leaks"], found["leak_check_detects"], found["mtls_percent"]) == (0, True, 100)
    assert (found["acts"]["strict_refuses_plaintext"], found["acts"]["policy_denies_identity"]) == (
        True,
        True,
    )
    assert (found["ports_inside"], found["ports_outside"]) == ([15008], [9080])


def test_each_shortcoming_is_named() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"requests": 0}, "no request was made"),
        ({"failures": 2, "errors": {"timed out": 2}}, "2 requests failed: 2x timed out"),
        ({"inside": {"packets": 1, "sightings": 4}}, "readable on the link 4 times"),
        ({"inside": {"packets": 0}}, "saw no packets"),
        ({"inside": {"packets": 1, "dropped": 7}}, "missed 7 packets"),
        ({"outside": {"sightings": 0}}, "proves nothing"),
        ({"traffic": Traffic()}, "none seen"),
        (
            {"acts": acts(strict=Refusal(error="timed out"))},
            "the client outside the mesh got no answer even without a policy: timed out",
        ),
        ({"acts": acts(denied=Refusal(allowed_before=True))}, "does not name, still got answers"),
        ({"acts": acts(renewed=4)}, "4 of 5 certificates were renewed"),
        ({"acts": acts(certificates=0, renewed=0)}, "0 of 0 certificates were renewed"),
    ]
    for change, words in cases:
        result = good()
        for name, value in change.items():
            setattr(result, name, value)
        (shortcoming,) = result.shortcomings()
        assert words in shortcoming
