"""The measurement of policy decisions measures decisions."""

import pytest

from perf import policy
from perf.__main__ import main


@pytest.mark.parametrize("kind", policy.KINDS)
def test_each_kind_is_measured(kind: str) -> None:
    found = policy.measure(kind, policies=20, rules=3)
    assert found.kind == kind
    assert found.mean > 0
    assert found.p99 > 0
    assert found.build > 0
    assert 0 <= found.allowed <= 1


def test_the_report_says_whether_the_budget_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "--policies", "4", "--rules", "2"]) == 0
    told = capsys.readouterr().out
    assert "exclusions only" in told
    assert "required ≤ 100: met" in told
