"""Dual chunk attention: positions, the definition, and dense attention over pages.

On a GPU the Gluon version runs where the GPU is Hopper and the case is its, else Triton's; on a CPU
the portable one. All answer to `reference`.
"""

from torch import Tensor

from ..pages import LayerPages
from . import portable
from .pieces import KeyPieces, PartialResults
from .pieces import attention as attention_in_pieces
from .portable import decode_attention, ragged_attention
from .ragged_plan import SequenceRows
from .segments import (
    BLOCK_ROWS,
    KeyBounds,
    LastRow,
    QueryBlocks,
    SegmentQueries,
    Span,
    split_at_chunks,
)

__all__ = [
    "BLOCK_ROWS",
    "KeyBounds",
    "KeyPieces",
    "LastRow",
    "PartialResults",
    "QueryBlocks",
    "SegmentQueries",
    "SequenceRows",
    "Span",
    "attention",
    "attention_in_pieces",
    "decode_attention",
    "ragged_attention",
    "split_at_chunks",
]


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks,
    pages: LayerPages,
    stride: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention of some query blocks over everything before them.

    Args:
        queries: rotated, each [rows, heads, d]; row r is the r-th row of `blocks`.
        pages: K and V of tokens [0, blocks.end), the queries' own included.
        stride: tokens of one dual chunk, None for plain positions.
        scale: multiplies the logits.

    Returns:
        output [rows, heads, d] in the queries' type, log-sum-exp [rows, heads] float32.
    """
    if queries.intra.is_cuda:
        from . import gluon_prefill, triton_prefill

        version = triton_prefill
        if gluon_prefill.supports(queries, pages, stride):
            version = gluon_prefill
        return version.attention(queries, blocks, pages, stride, scale)
    return portable.attention(queries, blocks, pages, stride, scale)
