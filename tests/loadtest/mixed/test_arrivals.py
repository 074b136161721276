"""Arrivals of an open loop."""

import itertools
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.loadtest.mixed.arrivals import Pattern, arrivals

PATTERNS = st.sampled_from(Pattern)
RATES = st.floats(0.01, 1_000)
BURSTS = st.integers(1, 50)
SEEDS = st.integers(0, 1 << 40)


def first(count: int, pattern: Pattern, rate: float, burst: int, seed: int) -> list[float]:
    return list(itertools.islice(arrivals(pattern, rate, burst, seed), count))


@given(PATTERNS, RATES, BURSTS, SEEDS)
def test_they_never_go_back_and_the_same_seed_makes_the_same(
    pattern: Pattern, rate: float, burst: int, seed: int
) -> None:
    moments = first(100, pattern, rate, burst, seed)
    assert moments[0] >= 0
    assert moments == sorted(moments)
    assert moments == first(100, pattern, rate, burst, seed)


@given(PATTERNS, RATES, st.integers(1, 10), SEEDS)
def test_the_mean_rate_is_the_one_asked_for(
    pattern: Pattern, rate: float, burst: int, seed: int
) -> None:
    """Within five standard deviations of a mean over 400 bursts."""
    moments = first(400 * burst, pattern, rate, burst, seed)
    assert len(moments) / moments[-1] == pytest.approx(rate, rel=0.35)


@given(RATES, st.floats(1.1, 100), SEEDS)
def test_a_higher_rate_is_the_same_but_faster(rate: float, times: float, seed: int) -> None:
    slow = first(50, Pattern.POISSON, rate, 1, seed)
    fast = first(50, Pattern.POISSON, rate * times, 1, seed)
    assert fast == pytest.approx([moment / times for moment in slow])


def test_distances_of_poisson_are_exponential() -> None:
    """Their deviation is their mean, and 1 - 1/e of them are shorter than that."""
    moments = first(20_000, Pattern.POISSON, 2.0, 1, 7)
    distances = [after - before for before, after in itertools.pairwise(moments)]
    mean = statistics.fmean(distances)
    assert mean == pytest.approx(0.5, rel=0.03)
    assert statistics.pstdev(distances) == pytest.approx(mean, rel=0.05)
    shorter = sum(each < mean for each in distances) / len(distances)
    assert shorter == pytest.approx(0.632, abs=0.02)


@given(RATES, st.integers(2, 50), SEEDS)
def test_bursts_come_together(rate: float, size: int, seed: int) -> None:
    together = Counter(first(size * 20, Pattern.BURSTS, rate, size, seed))
    assert set(together.values()) == {size}


def test_even_ones_have_equal_distances() -> None:
    assert first(4, Pattern.EVEN, 2.0, 1, 7) == [0.0, 0.5, 1.0, 1.5]


def test_seeds_differ() -> None:
    for pattern in (Pattern.POISSON, Pattern.BURSTS):
        assert first(10, pattern, 1.0, 2, 1) != first(10, pattern, 1.0, 2, 2)
