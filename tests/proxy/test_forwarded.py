"""Whose word counts for where a connection comes from, and what it may say."""

import pytest

from ztunnel.proxy import messages
from ztunnel.proxy.inbound import forwarded_for
from ztunnel.proxy.trusted import NOBODY, Trust, TrustedWaypoints


@pytest.mark.parametrize(
    ("header", "address"),
    [
        ("for=10.0.0.1", "10.0.0.1"),
        ('for="10.0.0.1:4711"', "10.0.0.1"),
        ("for=10.0.0.1:4711", "10.0.0.1"),
        ('for="[fd00::1]"', "fd00::1"),
        ('for="[fd00::1]:4711"', "fd00::1"),
        ("for=fd00::1", "fd00::1"),
        ("For=10.0.0.1;host=web", "10.0.0.1"),
        ("host=web; for=10.0.0.1", "10.0.0.1"),
        ("for=10.0.0.1, for=10.0.0.2", "10.0.0.1"),
        ("for=unknown", ""),
        ("for=_hidden", ""),
        ("for=127.0.0.1", ""),
        ('for="[::1]"', ""),
        ("for=0.0.0.0", ""),
        ("for=224.0.0.1", ""),
        ("for=", ""),
        ("for", ""),
        ("", ""),
        ('for="[fd00::1', "fd00::1"),
        ("by=10.0.0.1", ""),
    ],
)
def test_the_first_address_that_is_a_hosts(header: str, address: str) -> None:
    assert forwarded_for(header) == address


def test_workers_are_told_of_a_pods_waypoints_and_of_their_changes() -> None:
    sent: list[messages.Message] = []
    mesh: dict[str, Trust] = {"web": (frozenset({"a"}), ("svc:web",)), "db": (frozenset(), ("svc:db",))}
    trusted = TrustedWaypoints(sent.append, lambda namespace, name: mesh.get(name, NOBODY))
    trusted.add(1, "default", "web")
    trusted.add(2, "default", "db")
    trusted.add(3, "default", "late")
    assert sent == [messages.PodWaypoints(1, ("a",))]
    assert trusted.introduce(1) == messages.PodWaypoints(1, ("a",))
    assert trusted.introduce(2) is None

    sent.clear()
    mesh["web"] = (frozenset({"b", "a"}), ("svc:web",))
    trusted.changed(("svc:other",))
    assert sent == []
    trusted.changed(("svc:web",))
    assert sent == [messages.PodWaypoints(1, ("a", "b"))]

    # One that was not known when its pod came is looked at with each change, until it is.
    mesh["late"] = (frozenset({"c"}), ("svc:late",))
    trusted.changed(("svc:other",))
    assert sent[-1] == messages.PodWaypoints(3, ("c",))

    mesh["web"] = (frozenset(), ("svc:web",))
    trusted.changed(("svc:web",))
    assert sent[-1] == messages.PodWaypoints(1, ())
    trusted.remove(1)
    sent.clear()
    trusted.changed(("svc:web",))
    assert sent == []
