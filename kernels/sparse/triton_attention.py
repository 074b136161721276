# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`, and a kernel's
# `range` as if it never ended.
"""Sparse dual chunk attention on a GPU: whole tiles by their distance, and columns packed once.

One program computes 128 query rows of one head, as in dense attention, over that block's list of
tiles, and then over the head's columns, which were packed into pages of their own before: so both
are read tile by tile, and nothing is gathered row by row while tensor cores wait.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual_chunk.segments import BLOCK_ROWS, QueryBlocks, SegmentQueries, span_table
from ..dual_chunk.triton_prefill import attend_tile, fresh_results, page_tiles, store_result
from ..pages import LayerPages, check_pages
from .selections import Selections


@triton.jit
def _attend_listed(
    accumulator, highest, total, q, kv, table, distances, block, first, last,
    head, num_heads, scale, positions, low, high, MASKED: tl.constexpr,
):  # fmt: skip
    """Attention over the tiles of entries [first, last) of a block's list."""
    tile = block - tl.load(distances + first, mask=first < last, other=0)
    page = tl.load(table + tile, mask=first < last, other=0)
    for entry in range(first, last):
        row = (page * num_heads + head) * 256
        keys = tile * 128 + tl.arange(0, 128)
        more = entry + 1 < last
        tile = block - tl.load(distances + entry + 1, mask=more, other=0)
        page = tl.load(table + tile, mask=more, other=0)
        accumulator, highest, total = attend_tile(
            accumulator, highest, total, q, kv, row, scale, keys, positions, low, high, MASKED
        )
    return accumulator, highest, total


@triton.jit
def _attend_columns(
    accumulator, highest, total, q, packed, tile_base, seen, first, last, scale,
):  # fmt: skip
    """Attention over the packed columns [first, last) of a head, as far as the block sees them."""
    for tile in range(first // 128, tl.cdiv(last, 128)):
        column = tile * 128 + tl.arange(0, 128)
        inside = (column >= first) & (column < last)
        here = tl.load(seen + column, mask=inside, other=0) != 0
        row = (tile_base + tile) * 256
        k = packed.load([row, 0])
        logits = tl.where(here[None, :], tl.dot(q, k.T), -float("inf"))
        risen = tl.maximum(highest, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - risen[:, None])
        shrink = tl.exp2(highest - risen)
        total = total * shrink + tl.sum(weights, 1)
        accumulator = accumulator * shrink[:, None]
        v = packed.load([row + 128, 0])
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator)
        highest = risen
    return accumulator, highest, total


@triton.jit(do_not_specialize=["num_spans", "num_rows", "most_distances"])
def _sparse_kernel(
    intra, successive, inter, row_stride, head_stride,
    output, lse, kv, table, spans, scale, num_spans, num_rows, heads, kv_heads,
    distances, most_distances, tile_counts, packed, most_columns, column_counts, seen,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DUAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program // num_spans
    kv_head = head // GROUP
    number = num_spans - 1 - program % num_spans
    span = spans + number * 5
    first_row, rows, start = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    inter_end, successive_end = tl.load(span + 3), tl.load(span + 4)
    end = start + rows
    block = start // 128

    line = tl.arange(0, 128)
    exists = (line < rows)[:, None]
    positions = start + line
    place = (first_row + line).to(tl.int64)[:, None] * row_stride
    place += head * head_stride + tl.arange(0, HEAD_DIM)[None, :]

    wide_head = head.to(tl.int64)
    distances += wide_head * most_distances
    counts = tile_counts + (head * num_spans + number) * 3
    intra_tiles, successive_tiles = tl.load(counts), tl.load(counts + 1)
    inter_tiles = tl.load(counts + 2)
    counts = column_counts + (head * num_spans + number) * 3
    inter_columns, successive_columns = tl.load(counts), tl.load(counts + 1)
    intra_columns = tl.load(counts + 2)
    seen += (wide_head * num_spans + number) * most_columns
    packed_base = head * (most_columns // 128)

    accumulator = tl.zeros([128, HEAD_DIM], tl.float32)
    highest = tl.full([128], -float("inf"), tl.float32)
    total = tl.zeros([128], tl.float32)
    q = tl.load(intra + place, mask=exists, other=0.0)
    # A block's own tile comes first in its list: every row sees itself there.
    accumulator, highest, total = _attend_listed(
        accumulator, highest, total, q, kv, table, distances, block, 0, 1,
        kv_head, kv_heads, scale, positions, successive_end, end, True,
    )  # fmt: skip
    accumulator, highest, total = _attend_listed(
        accumulator, highest, total, q, kv, table, distances, block, 1, intra_tiles,
        kv_head, kv_heads, scale, positions, successive_end, end, not ALIGNED,
    )  # fmt: skip
    accumulator, highest, total = _attend_columns(
        accumulator, highest, total, q, packed, packed_base, seen,
        successive_columns, intra_columns, scale,
    )  # fmt: skip
    if DUAL:
        if successive_end > 0:
            q = tl.load(successive + place, mask=exists, other=0.0)
            # A tile that two segments share is in both ranges, and each sees its part.
            accumulator, highest, total = _attend_listed(
                accumulator, highest, total, q, kv, table, distances, block,
                intra_tiles if ALIGNED else 0, successive_tiles,
                kv_head, kv_heads, scale, positions, inter_end, successive_end, not ALIGNED,
            )  # fmt: skip
            accumulator, highest, total = _attend_columns(
                accumulator, highest, total, q, packed, packed_base, seen,
                inter_columns, successive_columns, scale,
            )  # fmt: skip
        if inter_end > 0:
            q = tl.load(inter + place, mask=exists, other=0.0)
            accumulator, highest, total = _attend_listed(
                accumulator, highest, total, q, kv, table, distances, block,
                successive_tiles if ALIGNED else 0, inter_tiles,
                kv_head, kv_heads, scale, positions, 0, inter_end, not ALIGNED,
            )  # fmt: skip
            accumulator, highest, total = _attend_columns(
                accumulator, highest, total, q, packed, packed_base, seen,
                0, inter_columns, scale,
            )  # fmt: skip
    store_result(
        output, lse, accumulator, highest, total, first_row, rows, head, heads, num_rows, HEAD_DIM
    )


@triton.jit
def _pack_kernel(
    memory, table, columns, packed, capacity, kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Copy 128 chosen columns of one head into a page; places without a column become 0.

    Pages without any are left as they are: no one reads beyond a head's last column.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    line = tl.arange(0, 128)
    own = columns + head.to(tl.int64) * capacity + tile * 128
    if tl.load(own) >= 1073741824:  # NOTHING; columns rise
        return
    token = tl.load(own + line)
    exists = token < 1073741824
    page = tl.load(table + token // 128, mask=exists, other=0).to(tl.int64)
    source = ((page * kv_heads + head // GROUP) * 2 * 128 + token % 128) * HEAD_DIM
    dims = tl.arange(0, HEAD_DIM)
    target = packed + (head.to(tl.int64) * (capacity // 128) + tile) * 2 * 128 * HEAD_DIM
    place = line[:, None] * HEAD_DIM + dims[None, :]
    source = source[:, None] + dims[None, :]
    k = tl.load(memory + source, mask=exists[:, None], other=0.0)
    tl.store(target + place, k)
    v = tl.load(memory + source + 128 * HEAD_DIM, mask=exists[:, None], other=0.0)
    tl.store(target + 128 * HEAD_DIM + place, v)


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks,
    pages: LayerPages,
    stride: int | None,
    scale: float,
    selections: Selections,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the package's `attention`, for tensors on one GPU."""
    rows, heads, head_dim = queries.intra.shape
    device = queries.intra.device
    output, lse = fresh_results(queries, output)
    if rows == 0:
        return output, lse.T
    group = heads // pages.num_kv_heads
    spans = span_table(blocks, stride, device)
    table = pages.table.on(device)
    columns, distances = selections.columns, selections.distances
    packed = pack(pages, table, columns, group)
    _sparse_kernel[(len(spans) * heads,)](
        queries.intra, queries.successive, queries.inter, *queries.intra.stride()[:2],
        output, lse, page_tiles(pages.memory), table, spans,
        scale * math.log2(math.e), len(spans), rows, heads, pages.num_kv_heads,
        distances, distances.shape[1], tile_counts(distances, spans), page_tiles(packed),
        columns.shape[1], column_counts(columns, spans), seen_columns(selections, spans, blocks),
        GROUP=group, HEAD_DIM=head_dim, DUAL=stride is not None,
        ALIGNED=stride is None or stride % BLOCK_ROWS == 0, num_warps=8, num_stages=2,
    )  # fmt: skip
    return output, lse.T


def pack(pages: LayerPages, table: Tensor, columns: Tensor, group: int) -> Tensor:
    """The chosen columns of each head as pages of their own, [heads * tiles, 1, 2, 128, d]."""
    check_pages(pages.memory)
    heads, width = columns.shape
    head_dim = pages.memory.shape[-1]
    packed = pages.memory.new_empty(heads * width // BLOCK_ROWS, 1, 2, BLOCK_ROWS, head_dim)
    _pack_kernel[(width // BLOCK_ROWS, heads)](
        pages.memory, table, columns, packed, width, pages.num_kv_heads,
        GROUP=group, HEAD_DIM=head_dim, num_warps=4,
    )  # fmt: skip
    return packed


def seen_columns(selections: Selections, spans: Tensor, blocks: QueryBlocks) -> Tensor:
    """Which columns a span sees, uint8 [heads, spans, most columns]: those in no listed tile."""
    columns, distances = selections.columns, selections.distances
    heads, width = columns.shape
    num_tiles = -(-blocks.end // BLOCK_ROWS)
    listed = torch.zeros(heads, num_tiles + 1, dtype=torch.uint8, device=columns.device)
    listed.scatter_(1, distances.clamp(max=num_tiles).long(), 1)
    seen = torch.empty(heads, len(spans), width, dtype=torch.uint8, device=columns.device)
    _see_columns[(len(spans), heads)](
        columns, listed, spans, seen, width, num_tiles + 1, COLUMNS=1024, num_warps=4
    )
    return seen


@triton.jit(do_not_specialize=["most_listed"])
def _see_columns(columns, listed, spans, seen, width, most_listed, COLUMNS: tl.constexpr):
    span, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = tl.load(spans + span * 5 + 2) // 128
    target = seen + (head * tl.num_programs(0) + span) * width
    for first in range(0, width, COLUMNS):
        # Columns rise: behind a place without one there is none, and no one reads there.
        if tl.load(columns + head * width + first) < 1073741824:
            place = first + tl.arange(0, COLUMNS)
            exists = place < width
            distance = block - tl.load(columns + head * width + place, mask=exists, other=0) // 128
            is_listed = tl.load(
                listed + head * most_listed + distance, mask=exists & (distance >= 0), other=1
            )
            tl.store(target + place, 1 - is_listed, mask=exists)


def tile_counts(distances: Tensor, spans: Tensor) -> Tensor:
    """How many listed tiles reach into each span's intra segment, the two nearer ones, and all.

    int32 [heads, spans * 3].
    """
    block = spans[:, 2:3] // BLOCK_ROWS
    farthest = torch.cat(
        (block - spans[:, 4:5] // BLOCK_ROWS, block - spans[:, 3:4] // BLOCK_ROWS, block), 1
    )
    values = farthest.view(1, -1).expand(len(distances), -1).contiguous()
    return torch.searchsorted(distances, values, right=True, out_int32=True)


def column_counts(columns: Tensor, spans: Tensor) -> Tensor:
    """How many columns lie in each span's inter segment, the two farther ones, and before its tile.

    int32 [heads, spans * 3]. A dual chunk may begin within the span's own tile.
    """
    own = spans[:, 2:3] // BLOCK_ROWS * BLOCK_ROWS
    ends = torch.cat((spans[:, 3:5], own), 1).minimum(own)
    values = ends.view(1, -1).expand(len(columns), -1).contiguous()
    return torch.searchsorted(columns, values, out_int32=True)
