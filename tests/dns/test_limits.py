"""What is under way at a time, shared between pods."""

from ztunnel.dns.limits import Limit


def test_one_pod_alone_gets_half_and_others_find_room() -> None:
    limit = Limit(100)
    assert sum(limit.take("greedy") for _ in range(1000)) == 50
    assert sum(limit.take("second") for _ in range(1000)) == 25
    assert all(limit.take(f"pod-{number}") for number in range(10))
    assert limit.taken == 85


def test_what_ends_makes_room() -> None:
    limit = Limit(2)
    assert limit.take("a")
    assert not limit.take("a")
    limit.give_back("a")
    assert limit.take("a")
    assert limit.take("b")
    assert not limit.take("c")
