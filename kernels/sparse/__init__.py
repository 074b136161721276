"""Vertical-slash sparse attention: selection, and attention over what was selected.

On a GPU the Gluon version of attention runs where the GPU is Hopper and the case is its, else
Triton's; on a CPU the portable ones. All answer to `reference`.
"""

import math

from torch import Tensor

from ..dual_chunk.segments import QueryBlocks, SegmentQueries
from ..pages import LayerPages
from . import portable, portable_sums
from .choose import FORCED_VERTICALS, by_bands, by_coverage, by_diagonals, widths_by_bands
from .portable import visible_keys
from .selections import NOTHING, HeadBudget, Selections, Sums

__all__ = [
    "FORCED_VERTICALS",
    "NOTHING",
    "HeadBudget",
    "Selections",
    "Sums",
    "attention",
    "by_bands",
    "by_coverage",
    "by_diagonals",
    "sums",
    "visible_keys",
    "widths_by_bands",
]


def sums(
    queries: SegmentQueries,
    first_position: int,
    pages: LayerPages,
    first_head: int,
    stride: int | None,
    scale: float,
    group: int,
    heavy: float = math.inf,
    diagonals: bool = False,
) -> Sums:
    """Score the last rows of a chunk against all keys up to them.

    Args:
        queries: under continuous positions, each [rows, heads, d], at most 64 rows.
        first_position: of the first row; the keys are those of [0, first_position + rows).
        first_head: which query head of `pages` is the queries' first.
        stride: tokens of one dual chunk, None for plain positions.
        scale: multiplies the logits.
        group: query heads that share a KV head.
        heavy: a column is heavy, and left out of the bands, if it sums to so much although no row
            counts for more than an eighth of it: a key that only its own slash's row looks at
            is none.
        diagonals: whether single diagonals are wanted too.
    """
    arguments = (queries, first_position, pages, first_head, stride, scale, group, heavy, diagonals)
    if queries.intra.is_cuda:
        from . import triton_sums

        return triton_sums.sums(*arguments)
    return portable_sums.sums(*arguments)


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks,
    pages: LayerPages,
    stride: int | None,
    scale: float,
    selections: Selections,
) -> tuple[Tensor, Tensor]:
    """Causal attention of query blocks over the tiles and columns selected for each head.

    Args:
        queries: rotated, each [rows, heads, d]; row r is the r-th row of `blocks`.
        pages: K and V of tokens [0, blocks.end), the queries' own included.
        selections: see `visible_keys` for what they make visible.

    Returns:
        output [rows, heads, d] in the queries' type, log-sum-exp [rows, heads] float32.
    """
    arguments = (queries, blocks, pages, stride, scale, selections)
    if queries.intra.is_cuda:
        from ..dual_chunk import gluon_prefill
        from . import gluon_attention, triton_attention

        version = triton_attention
        if gluon_prefill.supports(queries, pages, stride):
            version = gluon_attention
        return version.attention(*arguments)
    return portable.attention(*arguments)
