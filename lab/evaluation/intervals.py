"""How sure a share of right answers is."""

import math
from dataclasses import dataclass

_Z = 1.959963984540054
"""The normal distribution lies within ± this with a probability of 95 %."""


@dataclass(frozen=True)
class Interval:
    """The limits of a 95 % confidence interval, each 0 to 1."""

    low: float
    high: float


def wilson(successes: float, trials: int) -> Interval:
    """Wilson's score interval for a share (J. Am. Stat. Assoc. 22, 1927, 209-212).

    Unlike the usual ± it stays between 0 and 1, and 3 of 3 is not certainty. Scores between 0 and
    1 may be summed up as `successes`: they vary no more than right and wrong with the same mean,
    so the interval is at least as wide as it must be.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials} is no share")
    share, square = successes / trials, _Z * _Z
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    spread = math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    half = _Z * spread / (1 + square / trials)
    # At the ends the formula is exact, and only rounding would leave 0 or 1.
    return Interval(
        0.0 if successes == 0 else middle - half, 1.0 if successes == trials else middle + half
    )
