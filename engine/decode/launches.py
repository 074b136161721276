"""Launches of a decode step, and what they leave."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResults:
    """What launches leave on the device, at the same addresses every time."""

    logits: Tensor  # [rows, vocab], in the model's type
    tokens: Tensor  # int32 [rows]: the best of each row, or the one drawn
    logprobs: Tensor  # float32 [rows]: theirs


Launch = Callable[[], StepResults]
Capture = Callable[[Launch], Launch]
"""From launches to something that does the same as one call of them."""
