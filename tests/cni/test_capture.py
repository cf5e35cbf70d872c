"""A pod's annotations about capture: what they ask for, and what of them cannot be used."""

from ipaddress import ip_network

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni.capture import (
    BYPASS_INBOUND,
    DNS_CAPTURE,
    EXCLUDE_INBOUND_PORTS,
    EXCLUDE_OUTBOUND_PORTS,
    EXCLUDE_OUTBOUND_RANGES,
    INCLUDE_OUTBOUND_RANGES,
    Capture,
    capture_of,
)
from cni.goals import goal_of
from cni.rules import Settings
from ztunnel.store.models import ObjectMeta, Pod


def ranges(*texts: str) -> tuple[object, ...]:
    return tuple(map(ip_network, texts))


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({}, Capture()),
        ({"other": "x"}, Capture()),
        ({DNS_CAPTURE: "false"}, Capture(dns=False)),
        ({DNS_CAPTURE: "true"}, Capture(dns=True)),
        ({BYPASS_INBOUND: "true"}, Capture(bypass_inbound=True)),
        ({BYPASS_INBOUND: "false"}, Capture()),
        ({EXCLUDE_OUTBOUND_PORTS: "5432, 53,5432,"}, Capture(exclude_ports=(53, 5432))),
        ({EXCLUDE_INBOUND_PORTS: "9090"}, Capture(exclude_inbound_ports=(9090,))),
        (
            {EXCLUDE_OUTBOUND_RANGES: "fd00::/8, 10.1.2.3/16,10.0.0.0/16,192.0.2.7"},
            Capture(exclude_ranges=ranges("10.0.0.0/15", "192.0.2.7/32", "fd00::/8")),  # type: ignore[arg-type]
        ),
        ({INCLUDE_OUTBOUND_RANGES: "*"}, Capture()),
        ({INCLUDE_OUTBOUND_RANGES: ""}, Capture(include_ranges=())),
        (
            {INCLUDE_OUTBOUND_RANGES: "10.0.0.0/8"},
            Capture(include_ranges=ranges("10.0.0.0/8")),  # type: ignore[arg-type]
        ),
    ],
)
def test_what_annotations_ask_for(annotations: dict[str, str], expected: Capture) -> None:
    assert capture_of(annotations) == expected


@pytest.mark.parametrize(
    ("annotations", "usable", "words"),
    [
        ({EXCLUDE_OUTBOUND_PORTS: "80,http"}, Capture(exclude_ports=(80,)), ["'http' is not a port from 1 to 65535"]),
        ({EXCLUDE_OUTBOUND_PORTS: "0,65536,-1,8_0,80-90"}, Capture(), ["'0'", "'65536'", "'-1'", "'8_0'", "'80-90'"]),
        ({EXCLUDE_INBOUND_PORTS: "x"}, Capture(), ["so it is not excluded"]),
        ({EXCLUDE_OUTBOUND_RANGES: "10.0.0.0/33,*,10.0.0.0/8"}, Capture(exclude_ranges=ranges("10.0.0.0/8")),  # type: ignore[arg-type]
         ["'10.0.0.0/33' is not an IP range", "'*' is not"]),
        # To leave one out of what is included would capture less than was asked for.
        ({INCLUDE_OUTBOUND_RANGES: "10.0.0.0/8,all"}, Capture(), ["'all'", "so everything is captured"]),
        ({DNS_CAPTURE: "no"}, Capture(), ["'no' is not known"]),
        ({BYPASS_INBOUND: "yes"}, Capture(), ['use "true" or "false"']),
        ({EXCLUDE_OUTBOUND_PORTS: "1," * 1001}, Capture(), ["has 1001 entries"]),
        ({INCLUDE_OUTBOUND_RANGES: "10.0.0.0/8," * 1001}, Capture(), ["has 1001 entries, so everything is captured"]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_and_the_rest_holds(
    annotations: dict[str, str], usable: Capture, words: list[str]
) -> None:
    found = capture_of(annotations)
    assert found._replace(problems=()) == usable
    assert (
        len(found.problems) == len([word for word in words if word.startswith("'")])
        or len(found.problems) == 1
    )
    for word in words:
        assert any(word in problem for problem in found.problems), found.problems
    assert all(
        problem.startswith(f"metadata.annotations[{next(iter(annotations))}]: ") for problem in found.problems
    )


NAMES = [DNS_CAPTURE, BYPASS_INBOUND, EXCLUDE_INBOUND_PORTS, EXCLUDE_OUTBOUND_PORTS, EXCLUDE_OUTBOUND_RANGES]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*NAMES, INCLUDE_OUTBOUND_RANGES]), st.text()))
def test_whatever_is_written_there_nothing_breaks(annotations: dict[str, str]) -> None:
    found = capture_of(annotations)
    for networks in (found.exclude_ranges, found.include_ranges or ()):
        assert list(networks) == sorted(networks, key=lambda one: (one.version, int(one.network_address)))


@pytest.mark.parametrize(
    ("node", "pod", "captured"), [(True, "", True), (True, "false", False), (False, "true", True)]
)
def test_the_pod_overrides_its_node(node: bool, pod: str, captured: bool) -> None:
    annotations = {DNS_CAPTURE: pod} if pod else {}
    goal = goal_of(
        Pod(metadata=ObjectMeta(name="a", annotations=annotations)), None, Settings(dns_capture=node)
    )
    assert goal.settings.dns_capture == captured
    assert goal.problems == ""


def test_a_goal_tells_what_is_wrong_and_another_wrong_is_other_work() -> None:
    def goal(ports: str) -> object:
        return goal_of(
            Pod(metadata=ObjectMeta(name="a", annotations={EXCLUDE_OUTBOUND_PORTS: ports})), None, Settings()
        )

    first, second = goal("80,x"), goal("80,y")
    assert "'x'" in first.problems  # type: ignore[attr-defined]
    assert not first.same_work(second)  # type: ignore[attr-defined]
