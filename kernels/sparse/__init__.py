"""Vertical-slash sparse attention: selection, and attention over what was selected.

On a GPU the Gluon version of attention runs where the GPU is Hopper and the case is its, else
Triton's; on a CPU the portable ones. All answer to `reference`.
"""

import math
from typing import TYPE_CHECKING

from torch import Tensor

from ..dual_chunk.segments import QueryBlocks, SegmentQueries
from ..pages import LayerPages
from . import portable, portable_sums
from .choose import (
    FORCED_VERTICALS,
    band_tiles,
    by_bands,
    by_coverage,
    by_diagonals,
    choose_by_bands,
    column_candidates,
    free_counts,
    leave_no_choice,
    part_candidates,
    what_is_forced,
)
from .heaviest import ColumnCandidates, heaviest
from .scores import ALL_KEYS, KeyPart, KeyScores, in_order
from .selections import NOTHING, HeadBudget, Selections, Sums
from .visible import visible_keys

if TYPE_CHECKING:
    from . import triton_sums

__all__ = [
    "ALL_KEYS",
    "FORCED_VERTICALS",
    "NOTHING",
    "ColumnCandidates",
    "HeadBudget",
    "KeyPart",
    "KeyScores",
    "Selections",
    "Sums",
    "attention",
    "band_tiles",
    "by_bands",
    "by_coverage",
    "by_diagonals",
    "choose_by_bands",
    "column_candidates",
    "free_counts",
    "heaviest",
    "in_order",
    "key_scores",
    "leave_no_choice",
    "part_candidates",
    "sums",
    "visible_keys",
    "what_is_forced",
]


def key_scores(
    queries: SegmentQueries,
    first_position: int,
    pages: LayerPages,
    first_head: int,
    stride: int | None,
    scale: float,
    group: int,
    part: KeyPart = ALL_KEYS,
) -> KeyScores:
    """Score the last rows of a chunk against a part of all keys up to them.

    Args:
        queries: under continuous positions, each [rows, heads, d], at most 64 rows.
        first_position: of the first row; the keys are those of [0, first_position + rows).
        first_head: which query head of `pages` is the queries' first.
        stride: tokens of one dual chunk, None for plain positions.
        scale: multiplies the logits.
        group: query heads that share a KV head.
    """
    return _version(queries)(queries, first_position, pages, first_head, stride, scale, group, part)


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
    """As `key_scores`, over all keys, to the end; `heavy` and `diagonals` as `KeyScores.sums`."""
    scored = key_scores(queries, first_position, pages, first_head, stride, scale, group)
    return scored.all_sums(heavy, diagonals)


def _version(queries: SegmentQueries) -> "type[portable_sums.KeyScores | triton_sums.KeyScores]":
    if queries.intra.is_cuda:
        from . import triton_sums

        return triton_sums.KeyScores
    return portable_sums.KeyScores


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks,
    pages: LayerPages,
    stride: int | None,
    scale: float,
    selections: Selections,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of query blocks over the tiles and columns selected for each head.

    Args:
        queries: rotated, each [rows, heads, d]; row r is the r-th row of `blocks`.
        pages: K and V of tokens [0, blocks.end), the queries' own included.
        selections: see `visible_keys` for what they make visible.
        output: contiguous memory for it; fresh memory where there is none.

    Returns:
        output [rows, heads, d] in the queries' type, log-sum-exp [rows, heads] float32.
    """
    arguments = (queries, blocks, pages, stride, scale, selections, output)
    if queries.intra.is_cuda:
        from ..dual_chunk import gluon_prefill
        from . import gluon_attention, triton_attention

        version = triton_attention
        if gluon_prefill.supports(queries, pages, stride):
            version = gluon_attention
        return version.attention(*arguments)
    return portable.attention(*arguments)
