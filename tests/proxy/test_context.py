"""An identity's certificate as a worker sees it: missing, there, replaced, over."""

import time

from tests.proxy.ends import Bench
from ztunnel.identity.testing import CLIENT
from ztunnel.proxy.context import Identity
from ztunnel.telemetry.access import OUTBOUND


def test_there_is_no_certificate_before_the_first_and_after_it_was_taken_away(bench: Bench) -> None:
    identity = Identity(CLIENT)
    assert (identity.client, identity.server) == (None, None)
    assert identity.missing == f"no certificate for {CLIENT}: not issued yet"
    identity.use(bench.client_tls, bench.server_tls, time.time() + 60)
    assert [identity.client, identity.server] == [bench.client_tls, bench.server_tls]
    identity.forget("no pod needs it")
    assert [identity.client, identity.server] == [None, None]
    assert "no pod needs it" in identity.missing


def test_a_certificate_that_ended_is_none(bench: Bench) -> None:
    """Nobody tells the worker: its control process may be unable to get another one."""
    identity = Identity(CLIENT)
    identity.use(bench.client_tls, bench.server_tls, time.time() - 0.001)
    assert identity.client is identity.server is None
    assert "expired at" in identity.missing


def test_who_waits_is_told_once(bench: Bench) -> None:
    identity = Identity(CLIENT)
    told: list[int] = []
    identity.waiting["one"] = lambda: told.append(1)
    identity.waiting["gone"] = lambda: told.append(2)
    identity.waiting.pop("gone")
    for resume in identity.use(bench.client_tls, bench.server_tls, time.time() + 60):
        resume()
    assert told == [1]
    assert identity.use(bench.client_tls, bench.server_tls, time.time() + 60) == []


def test_the_lines_of_a_turn_are_written_at_its_end(bench: Bench) -> None:
    context = bench.context

    def end_two() -> None:
        for number in range(2):
            context.record(OUTBOUND, f"10.0.0.1:{number}").finish()
        assert bench.log.read_bytes() == b""

    bench.reactor.again(end_two)
    bench.reactor.turn()
    assert bench.log.read_bytes().count(b"connection complete") == 2
