"""Attention over pieces of keys in plain PyTorch; see `pieces`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pages import LayerPages
from .portable import PartialAttention, attend, attend_range, by_dual_chunk
from .segments import KeyBounds, LastRow, QueryBlocks, SegmentQueries, split_at_chunks


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks | LastRow,
    pages: LayerPages,
    stride: int | None,
    scale: float,
    ranges: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """For tensors on any device.

    Args:
        ranges: of keys, each piece's; they begin at a multiple of 128.

    Returns:
        output [pieces, rows, heads, d] and log-sum-exp [pieces, rows, heads], float32.
    """
    rows, heads, head_dim = queries.intra.shape
    output = torch.zeros(len(ranges), rows, heads, head_dim, device=queries.intra.device)
    lse = torch.full((len(ranges), rows, heads), -torch.inf, device=queries.intra.device)
    for piece, (low, high) in enumerate(ranges):
        result = _piece(queries, blocks, pages, stride, scale, low, high)
        output[piece], lse[piece] = result.output.transpose(0, 1), result.lse.T
    return output, lse


def _piece(
    queries: SegmentQueries,
    blocks: QueryBlocks | LastRow,
    pages: LayerPages,
    stride: int | None,
    scale: float,
    low: int,
    high: int,
) -> PartialAttention:
    rows, heads, head_dim = queries.intra.shape
    result = PartialAttention(heads, rows, head_dim, queries.intra.device)
    intra, successive, inter = (
        each.transpose(0, 1) for each in (queries.intra, queries.successive, queries.inter)
    )  # [heads, rows, d]
    spans = [part for span in blocks.spans() for part in split_at_chunks(span, stride)]

    def attend_within(chosen: slice, q: Tensor, start: int, end: int) -> None:
        attend_range(result, chosen, q, pages, max(start, low), min(end, high), scale)

    for bounds, first_row, last_row in by_dual_chunk(spans, stride):
        chosen = slice(first_row, last_row)
        attend_within(chosen, inter, 0, bounds.inter)
        attend_within(chosen, successive, bounds.inter, bounds.successive)
    for span in spans:
        chosen = slice(span.first_row, span.last_row)
        attend_within(chosen, intra, KeyBounds.of(span.start, stride).successive, span.start)
        # Pieces begin where tiles do, and a span lies within a tile.
        if low <= span.start < high:
            k, v = pages.read(span.start, span.end)
            result.merge(chosen, *attend(intra[:, chosen], k, v, scale, causal=True))
    return result
