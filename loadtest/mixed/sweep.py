"""The highest load that holds the SLO: doubled until it does not, then halved in between."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .plan import ClosedLoad, OpenLoad
from .summary import Summary

PRECISION = 0.1
"""A sweep ends when the load that holds and the one that does not are as near as this."""


@dataclass(frozen=True)
class Step:
    """One load that was tried."""

    load: float
    holds: bool
    summary: Summary


def search(holds: Callable[[float], bool], first: float, steps: int, whole: bool) -> float | None:
    """The highest load found to hold, within `PRECISION`, or a load of 1 where loads are whole.

    Args:
        holds: tries a load. A higher one should not hold where a lower one does not.
        first: the load to begin with.
        steps: loads to try at most.
        whole: whether loads are whole numbers.

    Returns:
        None where none of those tried held.
    """
    low, high, load = 0.0, math.inf, first
    for _ in range(steps):
        if holds(load):
            low = load
        else:
            high = load
        following = _between(low, high, whole)
        if following is None:
            break
        load = following
    return low or None


def _between(low: float, high: float, whole: bool) -> float | None:
    """The load to try next; None where nothing is left to find."""
    if math.isinf(high):
        return low * 2
    following = math.sqrt(low * high) if low else high / 2
    if whole:
        following = math.floor(following) if following > low + 1 else low + 1
        return following if low < following < high else None
    return following if high > low * (1 + PRECISION) else None


def highest(steps: Sequence[Step]) -> float | None:
    """The highest load that was found to hold; None where none of those tried does."""
    return max((step.load for step in steps if step.holds), default=None)


def with_load(load: OpenLoad | ClosedLoad, value: float) -> OpenLoad | ClosedLoad:
    """The same kind of load, but this much of it."""
    if isinstance(load, ClosedLoad):
        return ClosedLoad(round(value))
    return OpenLoad(value, load.pattern, load.burst)


def value_of(load: OpenLoad | ClosedLoad) -> float:
    """How much load it is: requests a second, or clients."""
    return float(load.concurrency) if isinstance(load, ClosedLoad) else load.rate
