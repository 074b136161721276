# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false
# Gluon's own annotations do not know that a kernel's constants are values when it is compiled.
"""Sparse dual chunk attention on Hopper: the schedule of dense attention, over lists of tiles.

The same function as `triton_attention`. The producer walks a block's own tile, and then for each
segment the listed tiles and the packed columns; it runs ahead across their borders, so the ring
never drains. See docs/kernels/prefill.md.
"""

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..dual_chunk.gluon_prefill import (
    STAGES,
    attend_next,
    begin,
    fetch,
    finish,
    load_own_values,
    load_queries,
    logits_layout,
    make_ring,
    next_stage,
    swizzled_tiles,
)
from ..dual_chunk.segments import QueryBlocks, SegmentQueries, span_table
from ..dual_chunk.triton_prefill import fresh_results
from ..pages import LayerPages
from .selections import Selections
from .triton_attention import column_counts, pack, seen_columns, tile_counts


@gluon.jit
def entries_of(segment, tiles):
    """Entries [first, last) of a list: 0 intra without the own tile, 1 successive, 2 inter."""
    intra, successive, inter = tiles
    first = gl.where(segment == 0, 1, gl.where(segment == 1, intra, successive))
    last = gl.where(segment == 0, intra, gl.where(segment == 1, successive, inter))
    return first, last


@gluon.jit
def columns_of(segment, columns):
    """Packed columns [first, last) of a segment, and the packed tiles that hold them."""
    inter, successive, intra = columns
    first = gl.where(segment == 0, successive, gl.where(segment == 1, inter, 0))
    last = gl.where(segment == 0, intra, gl.where(segment == 1, successive, inter))
    first_tile = first // 128
    last_tile = gl.where(first < last, (last + 127) // 128, first_tile)
    return first, last, first_tile, last_tile


@gluon.jit
def _produce(
    kv, packed, table, distances, block, head, num_heads, packed_base, tiles, columns, ring,
    STAGES: gl.constexpr,
):  # fmt: skip
    k, v, k_full, k_empty, v_full, v_empty = ring
    page = gl.load(table + block)
    fetch(kv, (page * num_heads + head) * 256, k, k_full, k_empty, 0, 0)
    # The own tile's V lies there already.
    mbarrier.arrive(v_full.index(0), count=1)
    stage, phase = next_stage(0, 0, STAGES)
    for segment in range(3):
        first, last = entries_of(segment, tiles)
        tile = block - gl.load(distances + first, mask=first < last, other=0)
        page = gl.load(table + tile)
        for entry in range(first, last):
            row = (page * num_heads + head) * 256
            # The next page's number is fetched while this page's place is waited for.
            tile = block - gl.load(distances + entry + 1, mask=entry + 1 < last, other=0)
            page = gl.load(table + tile)
            fetch(kv, row, k, k_full, k_empty, stage, phase)
            fetch(kv, row + 128, v, v_full, v_empty, stage, phase)
            stage, phase = next_stage(stage, phase, STAGES)
        _, _, first_tile, last_tile = columns_of(segment, columns)
        for tile in range(first_tile, last_tile):
            row = (packed_base + tile) * 256
            fetch(packed, row, k, k_full, k_empty, stage, phase)
            fetch(packed, row + 128, v, v_full, v_empty, stage, phase)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _consume(
    queries, where, out, q, tiles, columns, seen, ring, turns,
    HALF: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of rows [64 HALF, 64 HALF + 64) of the block."""
    intra, successive, inter = queries
    scale = out[3]
    first_row, rows, row_stride = where
    q = q.index(HALF)
    first_row += 64 * HALF
    rows -= 64 * HALF
    load_queries(q, intra, first_row, rows, row_stride, HEAD_DIM)
    accumulator, weights, highest, total = begin(q, ring, rows, scale, HALF, HEAD_DIM)
    v_stage, v_phase = 0, 0
    turn = 1 - HALF
    stage, phase = next_stage(0, 0, STAGES)
    key = gl.arange(0, 128, gl.SliceLayout(0, logits_layout()))
    for segment in range(3):
        if segment > 0:
            rotated = successive if segment == 1 else inter
            load_queries(q, rotated, first_row, rows, row_stride, HEAD_DIM)
        first, last = entries_of(segment, tiles)
        for _ in range(first, last):
            accumulator, weights, highest, total = attend_next(
                accumulator, weights, highest, total, q, ring, turns, stage, phase,
                v_stage, v_phase, turn, scale, 0, HALF, HEAD_DIM, False,
            )  # fmt: skip
            turn ^= 1
            v_stage, v_phase = stage, phase
            stage, phase = next_stage(stage, phase, STAGES)
        first_column, last_column, first_tile, last_tile = columns_of(segment, columns)
        for tile in range(first_tile, last_tile):
            column = tile * 128 + key
            inside = (column >= first_column) & (column < last_column)
            here = inside & (gl.load(seen + column) != 0)
            accumulator, weights, highest, total = attend_next(
                accumulator, weights, highest, total, q, ring, turns, stage, phase,
                v_stage, v_phase, turn, scale, here, HALF, HEAD_DIM, True,
            )  # fmt: skip
            turn ^= 1
            v_stage, v_phase = stage, phase
            stage, phase = next_stage(stage, phase, STAGES)
    finish(
        accumulator, weights, highest, total, ring, v_stage, v_phase, out, first_row, rows, HEAD_DIM
    )


@gluon.jit(do_not_specialize=["num_spans", "num_rows", "most_distances"])
def _sparse_kernel(
    intra, successive, inter, row_stride, head_stride,
    output, lse, memory, kv, table, spans, scale, num_spans, num_rows, heads, kv_heads, order,
    distances, most_distances, tile_ends, packed, most_columns, column_ends, seen,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    # Heads with the most tiles go first, so that the end of the grid is short.
    head = gl.load(order + program // num_spans)
    kv_head = head // GROUP
    number = num_spans - 1 - program % num_spans
    span = spans + number * 5
    first_row, rows, start = gl.load(span), gl.load(span + 1), gl.load(span + 2)
    block = start // 128
    wide_head = head.to(gl.int64)
    ends = tile_ends + (head * num_spans + number) * 3
    tiles = (gl.load(ends), gl.load(ends + 1), gl.load(ends + 2))
    ends = column_ends + (head * num_spans + number) * 3
    columns = (gl.load(ends), gl.load(ends + 1), gl.load(ends + 2))
    distances += wide_head * most_distances
    seen += (wide_head * num_spans + number) * most_columns
    packed_base = head * (most_columns // 128)

    q, ring, turns = make_ring(kv, HEAD_DIM, STAGES)
    page = gl.load(table + block)
    load_own_values(memory, page, kv_head, kv_heads, rows, ring[1].index(0), HEAD_DIM)
    intra += wide_head * head_stride
    successive += wide_head * head_stride
    inter += wide_head * head_stride
    output += wide_head * HEAD_DIM
    lse += wide_head * num_rows
    queries = (intra, successive, inter)
    out = (output, lse, heads, scale)
    where = (first_row, rows, row_stride)
    gl.warp_specialize(
        [
            (_consume, (
                queries, where, out, q, tiles, columns, seen, ring, turns, 0, HEAD_DIM, STAGES,
            )),
            (_consume, (
                queries, where, out, q, tiles, columns, seen, ring, turns, 1, HEAD_DIM, STAGES,
            )),
            (_produce, (
                kv, packed, table, distances, block, kv_head, kv_heads, packed_base, tiles,
                columns, ring, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks,
    pages: LayerPages,
    stride: int | None,
    scale: float,
    selections: Selections,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the package's `attention`, where `gluon_prefill.supports` approves."""
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
    tiles, ends = tile_counts(distances, spans), column_counts(columns, spans)
    most = 128 * tiles[:, -1] + ends[:, -1]
    _sparse_kernel[(len(spans) * heads,)](
        queries.intra, queries.successive, queries.inter, *queries.intra.stride()[:2],
        output, lse, pages.memory, swizzled_tiles(pages.memory), table, spans,
        scale * math.log2(math.e), len(spans), rows, heads, pages.num_kv_heads,
        most.argsort(descending=True).to(torch.int32),
        distances, distances.shape[1], tiles, swizzled_tiles(packed), columns.shape[1], ends,
        seen_columns(selections, spans, blocks),
        GROUP=group, HEAD_DIM=head_dim, STAGES=STAGES, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return output, lse.T
