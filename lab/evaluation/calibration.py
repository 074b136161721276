"""Grows the budgets of heads that lose too much, as Qwen2.5-1M's were refined.

Source: arXiv 2501.15383, section 5.2: where a head's recall on a calibration text is under a
threshold, its verticals and slashes grow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...engine.messages import Tokens
from ...engine.model.qwen2 import Qwen2
from ...engine.prefill.sparsity import SparsityConfig
from ...kernels.sparse import HeadBudget
from .recall import HeadRecall, measure

_GROWTH = 1.5
_VERTICALS_STEP = 16
_SLASHES_STEP = 128


@dataclass(frozen=True)
class Round:
    """One measurement: the budgets it was made with, and the heads that it found wanting."""

    sparsity: SparsityConfig
    recalls: tuple[HeadRecall, ...]
    wanting: tuple[HeadRecall, ...]


def grow_budgets(
    model: Qwen2,
    start: SparsityConfig,
    prompts: Sequence[Tokens],
    threshold: float,
    most: HeadBudget,
    chunk_tokens: int,
    on_round: Callable[[Round], None],
) -> SparsityConfig:
    """Budgets under which each head's mean recall reaches `threshold`, or `most` is reached.

    Budgets never shrink. Those of the last layer stay: nothing is selected there.
    """
    sparsity = start
    while True:
        recalls = tuple(measure(model, sparsity, prompts, chunk_tokens).heads())
        wanting = tuple(each for each in recalls if each.mean < threshold)
        on_round(Round(sparsity, recalls, wanting))
        grown = _grow(sparsity, wanting, most)
        if grown == sparsity:
            return sparsity
        sparsity = grown


def uniform(model: Qwen2, verticals: int, slashes: int) -> SparsityConfig:
    """The same budget for every head, to begin with."""
    layer = (HeadBudget(verticals, slashes),) * model.config.num_heads
    return SparsityConfig((layer,) * model.config.num_layers)


def _grow(
    sparsity: SparsityConfig, wanting: Sequence[HeadRecall], most: HeadBudget
) -> SparsityConfig:
    budgets = [list(layer) for layer in sparsity.budgets]
    for each in wanting:
        budget = budgets[each.layer][each.head]
        budgets[each.layer][each.head] = HeadBudget(
            _larger(budget.verticals, _VERTICALS_STEP, most.verticals),
            _larger(budget.slashes, _SLASHES_STEP, most.slashes),
        )
    return replace(sparsity, budgets=tuple(map(tuple, budgets)))


def _larger(size: int, step: int, most: int) -> int:
    """Half as much again, in whole steps, and no more than `most` unless it was more before."""
    return max(size, min(math.ceil(size * _GROWTH / step) * step, most))
