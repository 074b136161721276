"""Sparse dual chunk attention in plain PyTorch: gather what was selected, then attend to it."""

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
from .selections import Selections


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
    rows, heads, head_dim = queries.intra.shape
    attended = torch.empty(
        heads, rows, head_dim, dtype=queries.intra.dtype, device=pages.memory.device
    )
    lse = torch.empty(heads, rows, device=pages.memory.device)
    group = heads // pages.num_kv_heads
    for head in range(heads):
        visible = _VisibleKeys(selections, head)
        # Scaled once here instead of scaling every logit, and to the base 2: in PyTorch on a CPU
        # powers of two are three times as fast as those of e.
        rotated = [
            each[:, head].float() * (scale * math.log2(math.e))
            for each in (queries.inter, queries.successive, queries.intra)
        ]
        for span in blocks.spans():
            tokens = visible.of_block(span)
            k, v = pages.gather(head // group, tokens)
            logits = _logits(rotated, span, tokens, k.float(), stride)
            highest = logits.amax(-1, keepdim=True)
            weights = logits.sub_(highest).exp2_()
            total = weights.sum(-1, keepdim=True)
            weights.div_(total)
            block = slice(span.first_row, span.last_row)
            lse[head, block] = (highest + total.log2_())[:, 0] * math.log(2)
            torch.mm(weights.to(v.dtype), v, out=attended[head, block])
    if output is None:
        return attended.transpose(0, 1), lse.T
    return output.copy_(attended.transpose(0, 1)), lse.T


def visible_keys(selections: Selections, head: int, block: int, end: int) -> npt.NDArray[np.int64]:
    """Rising positions of the keys that query block `block` sees; its own are causal besides.

    A block sees the tiles at the listed distances, whole, and the selected columns before its own
    tile.
    """
    rows = min(BLOCK_ROWS, end - block * BLOCK_ROWS)
    return _VisibleKeys(selections, head).of_block(Span(0, rows, block * BLOCK_ROWS))


class _VisibleKeys:
    """The keys of one head, block by block."""

    def __init__(self, selections: Selections, head: int) -> None:
        columns, distances = (each.astype(np.int64) for each in selections.of_head(head))
        self._offsets = distances[::-1]  # falling, so that tiles rise
        self._is_offset = np.zeros(int(distances[-1]) + 2, dtype=np.bool_)
        self._is_offset[distances] = True
        self._columns = columns
        self._column_tiles = columns // BLOCK_ROWS

    def of_block(self, span: Span) -> npt.NDArray[np.int64]:
        """See `visible_keys`."""
        block = span.start // BLOCK_ROWS
        tiles = block - self._offsets[self._offsets <= block]
        in_tiles = (tiles[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).ravel()
        in_tiles = in_tiles[: len(in_tiles) - (BLOCK_ROWS - span.rows)]
        before = np.searchsorted(self._column_tiles, block)
        distances = block - self._column_tiles[:before]
        np.minimum(distances, len(self._is_offset) - 1, out=distances)
        alone = self._columns[:before][~self._is_offset[distances]]
        return np.sort(np.concatenate((alone, in_tiles)), kind="stable")


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
