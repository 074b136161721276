"""For how many rows steps are prepared, where a step's launches are captured."""

from collections.abc import Sequence

from .step import PromptLimits

_LEAST_PROMPT_ROWS = 64
"""Fewer rows take no less time: all weights are read for them as well."""


def row_counts(max_batch: int) -> list[int]:
    """Rows of the graphs: powers of two, and the largest batch."""
    powers = [2**power for power in range(max_batch.bit_length()) if 2**power < max_batch]
    return [*powers, max_batch]


def prompt_row_counts(at_once: int) -> list[int]:
    """Rows of the graphs for prompts: what is filled up is a third of a step at most, and small."""
    counts = [_LEAST_PROMPT_ROWS]
    while counts[-1] < at_once:
        half = counts[-1] & (counts[-1] - 1) == 0 and counts[-1] >= 128
        counts.append(counts[-1] * 3 // 2 if half else 1 << counts[-1].bit_length())
    return [*(count for count in counts if count < at_once), at_once]


def step_rows(row_counts: Sequence[int], prompts: PromptLimits) -> list[tuple[int, int]]:
    """Rows of sequences and of prompts: either alone, or prompts beside the largest batch.

    The largest ones of prompts are alone only.
    """
    shapes = [(rows, 0) for rows in row_counts]
    if prompts.at_once:
        for count in prompt_row_counts(prompts.at_once):
            shapes += [(0, count), (row_counts[-1], count)]
        shapes += [(0, size) for size in prompts.sizes_alone[1:]]
    return shapes


def logits_rows(max_batch: int, prompts: PromptLimits) -> int:
    """Rows that logits are kept for, of all graphs together."""
    every = step_rows(row_counts(max_batch), prompts)
    return sum(rows + (prompts.pieces if prompt_rows else 0) for rows, prompt_rows in every)
