"""Dense dual chunk attention in plain PyTorch, over paged K and V.

Each query block attends to its segments separately; partial results are merged by their
log-sum-exp. Nothing of size queries × keys outlives one call of the fused attention operator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..merging import merge_attention
from ..page_size import PAGE_TOKENS
from ..pages import BlockTable, LayerPages
from .ragged_plan import SequenceRows
from .segments import KeyBounds, QueryBlocks, SegmentQueries, split_at_chunks

_KEYS_AT_ONCE = 65536
_DECODE_KEYS_AT_ONCE = 8192


class PartialAttention:
    """Attention of some query rows over the keys seen so far, in float32.

    `output` is [heads, rows, d], `lse` [heads, rows]; before any key they are 0 and -inf.
    """

    def __init__(self, heads: int, rows: int, head_dim: int, device: torch.device) -> None:
        self.output = torch.zeros(heads, rows, head_dim, device=device)
        self.lse = torch.full((heads, rows), -torch.inf, device=device)

    def merge(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        """Take in attention of the same rows over other keys: [heads, n, d] and [heads, n]."""
        merge_attention(self.output[:, rows], self.lse[:, rows], output, lse)


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks,
    pages: LayerPages,
    stride: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the package's `attention`, for tensors on any device."""
    rows, heads, head_dim = queries.intra.shape
    result = PartialAttention(heads, rows, head_dim, queries.intra.device)
    intra, successive, inter = (
        each.transpose(0, 1) for each in (queries.intra, queries.successive, queries.inter)
    )  # [heads, rows, d]
    spans = [part for span in blocks.spans() for part in split_at_chunks(span, stride)]
    shared = KeyBounds.of(spans[0].start, stride).inter if spans else 0
    attend_range(result, slice(0, rows), inter, pages, 0, shared, scale)
    for bounds, first_row, last_row in by_dual_chunk(spans, stride):
        chosen = slice(first_row, last_row)
        attend_range(result, chosen, inter, pages, shared, bounds.inter, scale)
        attend_range(result, chosen, successive, pages, bounds.inter, bounds.successive, scale)
    for span in spans:
        chosen = slice(span.first_row, span.last_row)
        first_key = KeyBounds.of(span.start, stride).successive
        attend_range(result, chosen, intra, pages, first_key, span.start, scale)
        k, v = pages.read(span.start, span.end)
        result.merge(chosen, *attend(intra[:, chosen], k, v, scale, causal=True))
    return result.output.transpose(0, 1).to(queries.intra.dtype), result.lse.T


def ragged_attention(
    queries: SegmentQueries,
    memory: Tensor,
    parts: Sequence[SequenceRows],
    stride: int | None,
    page_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of several sequences' rows, each over its own sequence, one by one.

    Args:
        queries: rotated, each [n, heads, d]: the rows of `parts`, one part after the other, and
            perhaps more.
        memory: one layer's pages, [pages, kv_heads, 2, 128, d], the rows' own K and V included.
        stride: tokens of one dual chunk, None for plain positions.
        page_scales: float32 [pages, kv_heads, 2] where pages are of 8 bits; see `quantized`.

    Returns:
        [n, heads, d] in the queries' type; 0 in rows beyond those of `parts`.
    """
    output = torch.zeros_like(queries.intra)
    first = 0
    for part in parts:
        rows = slice(first, first + part.count)
        pages = LayerPages(memory, part.table, page_scales, read_as=output.dtype)
        own = queries.rows(rows).to(pages.dtype)
        output[rows] = attention(own, part.blocks, pages, stride, part.scale)[0].to(output.dtype)
        first = rows.stop
    return output


def by_dual_chunk(spans, stride: int | None):
    """Row ranges of neighbouring spans that share their bounds: (bounds, first row, last row)."""
    groups: list[tuple[KeyBounds, int, int]] = []
    for span in spans:
        bounds = KeyBounds.of(span.start, stride)
        if groups and groups[-1][0] == bounds:
            groups[-1] = (bounds, groups[-1][1], span.last_row)
        else:
            groups.append((bounds, span.first_row, span.last_row))
    return groups


def attend_range(
    result: PartialAttention,
    rows: slice,
    q: Tensor,
    pages: LayerPages,
    start: int,
    end: int,
    scale: float,
) -> None:
    """Merge attention of `rows` of q [heads, rows, d] over all keys in [start, end)."""
    if q.shape[1] == 0:
        return
    for first in range(start, end, _KEYS_AT_ONCE):
        k, v = pages.read(first, min(first + _KEYS_AT_ONCE, end))
        result.merge(rows, *attend(q[:, rows], k, v, scale, causal=False))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Fused attention with log-sum-exp: q [heads, n, d], k and v [kv_heads, m, d]."""
    heads, rows, head_dim = q.shape
    kv_heads = k.shape[0]
    if causal:
        group = heads // kv_heads
        k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    else:
        # Query heads that share keys become rows of one head, so keys are read once.
        q = q.reshape(kv_heads, heads // kv_heads * rows, head_dim)
    output, lse = _fused(q, k, v, scale, causal)
    return output.reshape(heads, rows, head_dim), lse.reshape(heads, rows)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q[None], k[None], v[None], 0.0, causal, False, scale=scale
        )
    else:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, causal, scale=scale
        )
    return output[0], lse[0].float()


def decode_attention(
    queries: SegmentQueries,
    memory: Tensor,
    block_table: Sequence[int],
    length: int,
    stride: int | None,
    scale: float,
    page_scales: Tensor | None = None,
) -> Tensor:
    """Attention of one token, the last of `length`, whose K and V already lie in its page.

    Args:
        queries: rotated for position length - 1, each [1, heads, d].
        memory: one layer's pages, [pages, kv_heads, 2, 128, d].
        page_scales: float32 [pages, kv_heads, 2] where pages are of 8 bits; see `quantized`.

    Returns:
        [1, heads, d] in the queries' type.
    """
    _, heads, head_dim = queries.intra.shape
    pages = LayerPages(memory, BlockTable.of(block_table), page_scales)
    kv_heads = pages.num_kv_heads
    result = PartialAttention(heads, 1, head_dim, memory.device)
    bounds = KeyBounds.of(length - 1, stride)
    segments = (
        (queries.inter, 0, bounds.inter),
        (queries.successive, bounds.inter, bounds.successive),
        (queries.intra, bounds.successive, length),
    )
    most = -(-min(_DECODE_KEYS_AT_ONCE, length) // PAGE_TOKENS) + 1
    scratch = torch.empty(2, kv_heads, most, PAGE_TOKENS, head_dim, device=memory.device)
    for q, start, end in segments:
        grouped = q[0].float().view(kv_heads, heads // kv_heads, head_dim) * scale
        for first in range(start, end, _DECODE_KEYS_AT_ONCE):
            last = min(first + _DECODE_KEYS_AT_ONCE, end)
            k, v = pages.read_into(scratch, first, last)
            logits = grouped @ k.transpose(1, 2)  # [kv_heads, group, n]
            lse = logits.logsumexp(-1, keepdim=True)
            output = (logits - lse).exp() @ v
            result.merge(slice(0, 1), output.view(heads, 1, head_dim), lse.view(heads, 1))
    return result.output.transpose(0, 1).to(queries.intra.dtype)
