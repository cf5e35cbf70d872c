"""`python -m perf upgrade`: what it reads in wrk's words."""

import pytest

from perf.load import LoadError
from perf.upgrade import Run, parse

GOOD = """Running 12s test @ http://10.244.2.2:8080/
  2 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    12.21ms    5.71ms  65.14ms   74.18%
    Req/Sec     1.60k   281.56     2.34k    70.83%
  Latency Distribution
     50%   11.46ms
     99%   31.88ms
  38399 requests in 12.07s, 6.08MB read
{errors}Requests/sec:   3182.45
Transfer/sec:    515.98KB
"""


def test_a_run_without_failures() -> None:
    assert parse(GOOD.format(errors="")) == Run(3182.45, 38399, 0, 65.14, "")


@pytest.mark.parametrize(
    ("errors", "count"),
    [
        ("  Socket errors: connect 1, read 20, write 300, timeout 4000\n", 4321),
        ("  Non-2xx or 3xx responses: 7\n", 7),
        ("  Socket errors: connect 0, read 2, write 0, timeout 0\n  Non-2xx or 3xx responses: 1\n", 3),
    ],
)
def test_every_failure_counts(errors: str, count: int) -> None:
    assert parse(GOOD.format(errors=errors)).failures == count


@pytest.mark.parametrize(
    ("said", "milliseconds"), [("1.45s", 1450.0), ("890.00us", 0.89), ("1.50m", 90_000.0)]
)
def test_units(said: str, milliseconds: float) -> None:
    assert parse(GOOD.format(errors="").replace("65.14ms", said)).slowest == pytest.approx(milliseconds)


def test_words_that_are_none_of_wrks() -> None:
    with pytest.raises(LoadError, match="unable to connect"):
        parse("unable to connect to 10.244.2.2:8080 Connection refused")
