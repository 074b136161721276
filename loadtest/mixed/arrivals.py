"""When requests come: seconds since the start, without end, never going back."""

import random
from collections.abc import Iterator
from enum import StrEnum


class Pattern(StrEnum):
    """How arrivals are spread; the mean rate is the same for all."""

    POISSON = "poisson"
    BURSTS = "bursts"
    EVEN = "even"


def arrivals(pattern: Pattern, rate: float, burst: int, seed: int) -> Iterator[float]:
    """Arrivals by this pattern.

    Args:
        rate: requests a second in the mean, above 0.
        burst: how many come at once, where they come in bursts.
    """
    match pattern:
        case Pattern.POISSON:
            return poisson(rate, seed)
        case Pattern.BURSTS:
            return bursts(rate, burst, seed)
        case Pattern.EVEN:
            return even(rate)


def even(rate: float) -> Iterator[float]:
    """One after the other at equal distances."""
    number = 0
    while True:
        yield number / rate
        number += 1


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Each independent of all others: what many unrelated people send."""
    chance = random.Random(f"arrivals {seed}")
    now = 0.0
    while True:
        now += chance.expovariate(rate)
        yield now


def bursts(rate: float, size: int, seed: int) -> Iterator[float]:
    """`size` at the same moment, and such moments as `poisson` has them."""
    for moment in poisson(rate / size, seed):
        yield from [moment] * size
