"""Sparse dual chunk attention in plain PyTorch: gather what was selected, then attend to it.

Whole blocks are attended to in batches where they can be; see `portable_batches`.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..dual_chunk.segments import (
    BLOCK_ROWS,
    KeyBounds,
    QueryBlocks,
    SegmentQueries,
    Span,
    split_at_chunks,
)
from ..pages import LayerPages
from . import portable_batches
from .selections import Selections
from .visible import VisibleKeys


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks,
    pages: LayerPages,
    stride: int | None,
    scale: float,
    selections: Selections,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the package's `attention`, for tensors on any device."""
    device = pages.memory.device
    if output is None:
        output = torch.empty_like(queries.intra, memory_format=torch.contiguous_format)
    lse = torch.empty(queries.intra.shape[:2], device=device)
    spans = list(blocks.spans())
    whole = [span for span in spans if span.rows == BLOCK_ROWS]
    if whole and portable_batches.can_batch(pages, stride):
        chosen = [span.start // BLOCK_ROWS for span in whole]
        portable_batches.attend(queries, chosen, pages, stride, scale, selections, output, lse)
        spans = spans[len(whole) :]
    if spans:
        _attend_alone(queries, spans, pages, stride, scale, selections, output, lse)
    return output, lse


def _attend_alone(
    queries: SegmentQueries,
    spans: Sequence[Span],
    pages: LayerPages,
    stride: int | None,
    scale: float,
    selections: Selections,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Attention of query blocks one by one, whatever their size, filled into `output` and `lse`."""
    heads = output.shape[1]
    group = heads // pages.num_kv_heads
    for head in range(heads):
        visible = VisibleKeys(selections, head)
        # Scaled once here instead of scaling every logit, and to the base 2: in PyTorch on a CPU
        # powers of two are three times as fast as those of e.
        rotated = [
            each[:, head].float() * (scale * math.log2(math.e))
            for each in (queries.inter, queries.successive, queries.intra)
        ]
        for span in spans:
            tokens = visible.of_block(span.start // BLOCK_ROWS, span.rows)
            k, v = pages.gather(head // group, tokens)
            logits = _logits(rotated, span, tokens, k.float(), stride)
            highest = logits.amax(-1, keepdim=True)
            weights = logits.sub_(highest).exp2_()
            total = weights.sum(-1, keepdim=True)
            weights.div_(total)
            block = slice(span.first_row, span.last_row)
            lse[block, head] = (highest + total.log2_())[:, 0] * math.log(2)
            output[block, head] = weights.to(v.dtype) @ v


def _logits(
    rotated: Sequence[Tensor],
    span: Span,
    tokens: npt.NDArray[np.int64],
    keys: Tensor,
    stride: int | None,
) -> Tensor:
    """Causal logits [rows, len(tokens)] of one head's block, scaled as the queries are.

    Args:
        rotated: that head's inter, successive and intra queries, each [rows of all blocks, d].
        tokens: rising; they end with the block's own.
        keys: float32 [len(tokens), d].
    """
    logits = torch.empty(span.rows, len(tokens), device=keys.device)
    for part in split_at_chunks(span, stride):
        bounds = KeyBounds.of(part.start, stride)
        borders = [0, *np.searchsorted(tokens, (bounds.inter, bounds.successive)), len(tokens)]
        rows = slice(part.first_row - span.first_row, part.last_row - span.first_row)
        for queries, first, last in zip(rotated, borders[:-1], borders[1:], strict=True):
            if first < last:
                q = queries[part.first_row : part.last_row]
                torch.mm(q, keys[first:last].T, out=logits[rows, first:last])
    own = logits[:, len(tokens) - span.rows :]
    later = torch.ones(span.rows, span.rows, dtype=torch.bool, device=keys.device).triu_(1)
    own.masked_fill_(later, -torch.inf)
    return logits
