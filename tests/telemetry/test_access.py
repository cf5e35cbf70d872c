"""A connection's record: one line and one count, however often and however late it is told of its end."""

import json
import os
import re

import pytest

from ztunnel.telemetry.access import INBOUND, OUTBOUND, ConnectionRecord, Totals
from ztunnel.telemetry.log import Logger


def record(level: str = "info") -> tuple[ConnectionRecord, Totals, int]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    totals = Totals()
    return ConnectionRecord(Logger(level, json=True, fd=write), totals, OUTBOUND, "10.0.0.1:5"), totals, read


def test_the_first_end_counts() -> None:
    one, totals, read = record()
    one.dst_addr = "10.0.0.2:80"
    one.sent, one.received = 10, 20
    one.finish()
    assert totals.closed == 1
    one.sent = 1000
    one.finish(RuntimeError("too late"))
    assert one.done
    assert (totals.opened, totals.closed, totals.failed) == (1, 1, 0)
    assert (totals.bytes_sent, totals.bytes_received) == (10, 20)
    lines = os.read(read, 65536).decode().splitlines()
    assert len(lines) == 1
    event = json.loads(lines[0])
    assert event["bytes_sent"] == 10
    assert event["direction"] == OUTBOUND
    assert event["duration"].endswith("ms")
    assert event["connection_security_policy"] == "unknown"
    assert "error" not in event
    assert "src.identity" not in event


def test_a_failure_is_an_error_with_its_reason() -> None:
    one, totals, read = record("error")
    one.direction = INBOUND
    one.mutual_tls = True
    one.finish(RuntimeError("why"))
    event = json.loads(os.read(read, 65536))
    assert (event["level"], event["error"], totals.failed) == ("error", "why", 1)
    assert event["connection_security_policy"] == "mutual_tls"


def test_what_the_level_hides_is_counted_all_the_same() -> None:
    one, totals, read = record("warn")
    one.finish()
    assert totals.closed == 1
    try:
        assert not os.read(read, 1)
    except BlockingIOError:
        pass


FILLED = {
    "src_addr": "10.244.1.2:40000",
    "src_workload": "visitor",
    "src_namespace": "default",
    "src_identity": "spiffe://cluster.local/ns/default/sa/visitor",
    "dst_addr": "[fd00::1]:80",
    "dst_hbone_addr": "[fd00::1]:15008",
    "dst_service": "web.default.svc.cluster.local",
    "dst_workload": "web-0",
    "dst_namespace": "default",
    "dst_identity": "spiffe://cluster.local/ns/default/sa/web",
}


def line_of(as_json: bool, error: str | None = None, **fields: str) -> str:
    read, write = os.pipe()
    one = ConnectionRecord(Logger("info", json=as_json, fd=write, worker="3"), Totals(), INBOUND, "")
    for name, value in fields.items():
        setattr(one, name, value)
    one.sent, one.received, one.mutual_tls = 11, 22, True
    one.finish(error)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read().decode()


@pytest.mark.parametrize("error", [None, 'said "no"'])
def test_a_line_has_all_fields_in_their_order(error: str | None) -> None:
    event = json.loads(line_of(True, error, **FILLED))
    assert event.pop("time").endswith("Z")
    assert re.fullmatch(r"\d+ms", event.pop("duration"))
    assert list(event.items()) == [
        ("level", "info" if error is None else "error"),
        ("scope", "access"),
        ("message", "connection complete"),
        ("worker", "3"),
        *((name.replace("_", ".", 1), value) for name, value in FILLED.items()),
        ("direction", "inbound"),
        ("bytes_sent", 11),
        ("bytes_recv", 22),
        ("connection_security_policy", "mutual_tls"),
        *([] if error is None else [("error", error)]),
    ]


def test_a_line_of_text_has_the_same_fields() -> None:
    line = line_of(False, 'said "no"', **FILLED)
    assert line.count("\n") == 1
    time, rest = line.split(" ", 1)
    assert time.endswith("Z")
    words = [f"{name.replace('_', '.', 1)}={value}" for name, value in FILLED.items()]
    assert re.fullmatch(
        re.escape(f"error access connection complete worker=3 {' '.join(words)} direction=inbound ")
        + "bytes_sent=11 bytes_recv=22 duration=[0-9]+ms connection_security_policy=mutual_tls "
        + re.escape(r'error="said \"no\""')
        + "\n",
        rest,
    )


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("field", ["src_addr", "src_workload", "dst_addr", "dst_service"])
@pytest.mark.parametrize(
    "text",
    ['a","level":"error', "a\nb", "a\x85b\u2028c", "x=1 y=2", "\udcff", "\u00e4\U0001f600", "%s {0} \\", '"'],
)
def test_what_a_peer_names_itself_stays_in_its_field(as_json: bool, field: str, text: str) -> None:
    """Told twice: the second time the part of the line is looked up."""
    for _ in range(2):
        line = line_of(as_json, **(FILLED | {field: text}))
        assert line.count("\n") == 1
        if as_json:
            event = json.loads(line)
            assert event[field.replace("_", ".", 1)] == text
            assert event["level"] == "info"
        else:
            assert line[:-1].isprintable()
            assert len(re.findall(" bytes_sent=", line)) == 1
            assert " y=2 " not in line.replace('"x=1 y=2"', "")
