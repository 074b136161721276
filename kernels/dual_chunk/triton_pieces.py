# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""Attention over pieces of keys on a GPU; see `pieces`.

One program computes 128 query rows of one head over one piece, as `triton_prefill` does over all
keys.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pages import LayerPages
from ..transfer import without_waiting
from .segments import BLOCK_ROWS, LastRow, QueryBlocks, SegmentQueries, span_table
from .triton_prefill import attend_range, check_layout, page_tiles


@triton.jit(do_not_specialize=["num_spans", "num_rows"])
def _pieces_kernel(
    intra, successive, inter, row_stride, head_stride,
    output, lse, kv, table, spans, ranges, scale, num_spans, num_rows, heads, kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    DUAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    piece = tl.program_id(1)
    low, high = tl.load(ranges + piece * 2), tl.load(ranges + piece * 2 + 1)
    head = program // num_spans
    kv_head = head // GROUP
    span = spans + program % num_spans * 5
    first_row, rows, start = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    inter_end, successive_end = tl.load(span + 3), tl.load(span + 4)
    end = start + rows

    line = tl.arange(0, 128)
    dims = tl.arange(0, HEAD_DIM)
    exists = (line < rows)[:, None]
    positions = start + line
    row = (first_row + line).to(tl.int64)
    place = row[:, None] * row_stride + head * head_stride + dims[None, :]

    accumulator = tl.zeros([128, HEAD_DIM], tl.float32)
    highest = tl.full([128], -float("inf"), tl.float32)
    total = tl.zeros([128], tl.float32)
    # Every row of a span sees some key of each tile that a range below touches, its own tile's
    # first one included: so no maximum stays infinite where there was a tile.
    q = tl.load(intra + place, mask=exists, other=0.0)
    own = start if ALIGNED else successive_end
    accumulator, highest, total = attend_range(
        accumulator, highest, total, q, kv, table, kv_head, kv_heads, scale, positions,
        tl.maximum(own, low), tl.minimum(end, high), True,
    )  # fmt: skip
    if ALIGNED:
        accumulator, highest, total = attend_range(
            accumulator, highest, total, q, kv, table, kv_head, kv_heads, scale, positions,
            tl.maximum(successive_end, low), tl.minimum(start, high), False,
        )  # fmt: skip
    if DUAL:
        if successive_end > low:
            q = tl.load(successive + place, mask=exists, other=0.0)
            accumulator, highest, total = attend_range(
                accumulator, highest, total, q, kv, table, kv_head, kv_heads, scale, positions,
                tl.maximum(inter_end, low), tl.minimum(successive_end, high), not ALIGNED,
            )  # fmt: skip
        if inter_end > low:
            q = tl.load(inter + place, mask=exists, other=0.0)
            accumulator, highest, total = attend_range(
                accumulator, highest, total, q, kv, table, kv_head, kv_heads, scale, positions,
                low, tl.minimum(inter_end, high), not ALIGNED,
            )  # fmt: skip
    row += piece.to(tl.int64) * num_rows
    place = (row[:, None] * heads + head) * HEAD_DIM + dims[None, :]
    normal = accumulator / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(output + place, normal, mask=exists)
    # From the base 2 back to e; log2(0) of a piece without keys is -inf, as is its maximum.
    natural = (highest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + row * heads + head, natural, mask=line < rows)


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks | LastRow,
    pages: LayerPages,
    stride: int | None,
    scale: float,
    ranges: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """As `portable_pieces.attention`, for tensors on one GPU."""
    check_layout(queries)
    rows, heads, head_dim = queries.intra.shape
    device = queries.intra.device
    output = torch.empty(len(ranges), rows, heads, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(len(ranges), rows, heads, dtype=torch.float32, device=device)
    if rows == 0 or not ranges:
        return output, lse
    spans = span_table(blocks, stride, device)
    _pieces_kernel[(len(spans) * heads, len(ranges))](
        queries.intra, queries.successive, queries.inter, *queries.intra.stride()[:2],
        output, lse, page_tiles(pages.memory), pages.table.on(device), spans,
        _on_device(tuple(ranges), device), scale * math.log2(math.e), len(spans), rows, heads,
        pages.num_kv_heads,
        GROUP=heads // pages.num_kv_heads, HEAD_DIM=head_dim,
        DUAL=stride is not None, ALIGNED=_begin_with_tiles(blocks, stride),
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return output, lse


def _begin_with_tiles(blocks: QueryBlocks | LastRow, stride: int | None) -> bool:
    """Whether spans, and dual chunks, begin where tiles do."""
    return isinstance(blocks, QueryBlocks) and (stride is None or stride % BLOCK_ROWS == 0)


@lru_cache(maxsize=16)
def _on_device(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32 [pieces, 2]; kept, since every layer of a chunk asks for the same."""
    return without_waiting(torch.tensor(ranges, dtype=torch.int32), device)
