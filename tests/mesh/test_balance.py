"""The choice among a route's endpoints."""

from collections import Counter
from random import Random

import pytest

from ztunnel.mesh.balance import Balance


@pytest.mark.parametrize("weights", [(1,), (7,), (1, 1, 1), (2, 2), (1, 2, 3), (5, 1), (1, 1000)])
def test_each_gets_its_share(weights: tuple[int, ...]) -> None:
    balance = Balance(weights)
    rng = Random(4711)
    draws = 6000
    counts = Counter(balance.choose(rng) for _ in range(draws))
    assert set(counts) <= set(range(len(weights)))
    for index, weight in enumerate(weights):
        expected = draws * weight / sum(weights)
        assert abs(counts[index] - expected) < 5 * expected**0.5 + 1


class Fixed(Random):
    """Draws what it is told."""

    def __init__(self, draw: float) -> None:
        super().__init__()
        self.draw = draw

    def random(self) -> float:
        return self.draw


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 3), (1, 1000, 1)])
def test_the_ends_of_the_range_are_the_first_and_the_last(weights: tuple[int, ...]) -> None:
    balance = Balance(weights)
    assert balance.choose(Fixed(0.0)) == 0
    assert balance.choose(Fixed(1.0 - 2.0**-53)) == len(weights) - 1


def test_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="no endpoints"):
        Balance(())
