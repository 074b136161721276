# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""Decode attention on GPUs: one query row a sequence over paged K and V, split over the keys.

The first kernel streams pages and leaves a partial result an item of the plan; the second merges
a sequence's partial results by their log-sum-exp. Heads that share keys are rows of one tile.
Both compute in float32 and to the base 2. See docs/kernels/decode.md.

Pages of 8 bits are multiplied as float16, which holds them without loss: queries are brought into
its range by a power of two, and weights, at most 2^15, use it whole. Scales of pages multiply
results, not elements. Values are read in pairs (`triton_pairs`), and even and odd columns of the
output are summed apart.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..page_size import PAGE_TOKENS
from ..pages import check_pages
from ..triton_pairs import PAIR_SCALE, split_pairs
from ..triton_scales import scale_for
from .decode_plan import DecodePlan
from .segments import SegmentQueries

_NO_CHUNKS = 2**31 - 1
_LEAST_DOT_ROWS = 16
_ITEMS_AT_ONCE = 32
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class DecodeTiling:
    """How a program streams keys: `tokens` at once, up to `stages - 1` such tiles on the way.

    `resident`: programs that one multiprocessor is meant to run at the same time.
    """

    tokens: int = 64
    stages: int = 4
    warps: int = 4
    resident: int = 2


DEFAULT_TILING = DecodeTiling()
QUANTIZED_TILING = DecodeTiling(stages=3, resident=3)
"""Half the bytes of 16 bits take as much computing, so three programs share what two do there."""


def programs_per_kv_head(
    num_kv_heads: int, device: torch.device, tiling: DecodeTiling = DEFAULT_TILING
) -> int:
    """How many programs a plan should have so that all KV heads together fill the device."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, multiprocessors * tiling.resident // num_kv_heads)


def decode_attention(
    queries: SegmentQueries,
    memory: Tensor,
    block_tables: Tensor,
    plan: DecodePlan,
    stride: int | None,
    scales: Tensor,
    tiling: DecodeTiling | None = None,
    page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last token of each sequence, whose K and V already lie in its page.

    Launches depend on shapes alone, so that a CUDA graph may hold them: `plan.refresh`, and new
    contents of `block_tables` and `scales`, are all that a replay needs.

    Args:
        queries: rotated for each sequence's last position, each [batch, heads, d].
        memory: one layer's pages, [pages, kv_heads, 2, 128, d], in the queries' type, or
            float8_e4m3fn with `page_scales`.
        block_tables: int32 [batch, n].
        plan: of the same batch.
        stride: tokens of one dual chunk, None for plain positions.
        scales: what each sequence's logits are multiplied by, float32 [batch].
        tiling: None for what suits the pages' type.
        page_scales: float32 [pages, kv_heads, 2]; see `quantized`.

    Returns:
        output [batch, heads, d] in the queries' type and log-sum-exp [batch, heads] float32;
        0 and -inf where a sequence is empty.
    """
    batch, heads, head_dim = queries.intra.shape
    check_pages(memory, pages_apart=True)
    kv_heads = memory.shape[1]
    if plan.batch != batch:
        raise ValueError(f"a plan for {plan.batch} rows does not fit {batch} queries")
    quantized = page_scales is not None
    if quantized != (memory.dtype == torch.float8_e4m3fn):
        raise ValueError(f"pages of {memory.dtype} need {'no ' if quantized else ''}scales")
    tiling = tiling or (QUANTIZED_TILING if quantized else DEFAULT_TILING)
    group = heads // kv_heads
    items = len(plan.items)
    partial_output = torch.empty(items, heads, head_dim, dtype=torch.float32, device=memory.device)
    partial_lse = torch.empty(items, heads, dtype=torch.float32, device=memory.device)
    _attend_items[(kv_heads, plan.programs)](
        queries.intra.contiguous(),
        queries.successive.contiguous(),
        queries.inter.contiguous(),
        memory,
        page_scales,
        block_tables,
        plan.lengths,
        scales,
        plan.program_items,
        plan.items,
        partial_output,
        partial_lse,
        memory.stride(0),
        page_scales.stride(0) if page_scales is not None else 0,
        block_tables.stride(0),
        _NO_CHUNKS if stride is None else stride,
        kv_heads,
        GROUP=group,
        ROWS=max(_LEAST_DOT_ROWS, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        PAGE=PAGE_TOKENS,
        TILE=tiling.tokens,
        STAGES=tiling.stages,
        LOG2_E=_LOG2_E,
        QUANTIZED=quantized,
        PACKED=memory.is_cuda,
        num_warps=tiling.warps,
    )
    output = torch.empty_like(queries.intra, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=memory.device)
    _merge_items[(heads, batch)](
        partial_output,
        partial_lse,
        plan.sequence_items,
        output,
        lse,
        heads,
        HEAD_DIM=head_dim,
        ITEMS=_ITEMS_AT_ONCE,
        LOG2_E=_LOG2_E,
        num_warps=4,
    )
    return output, lse


@triton.jit
def _attend_items(
    intra,
    successive,
    inter,
    memory,
    page_scales,
    block_tables,
    lengths,
    scales,
    program_items,
    items,
    partial_output,
    partial_lse,
    page_stride,
    page_scale_stride,
    table_stride,
    chunk_stride,
    kv_heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    LOG2_E: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """All items of one program: KV head by grid axis 0, so that neighbours read one page."""
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    heads = kv_heads * GROUP
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HEAD_DIM)
    in_tile = tl.arange(0, TILE)
    exists = row < GROUP
    query_offsets = (kv_head * GROUP + row)[:, None] * HEAD_DIM + column[None, :]
    tile_offsets = in_tile[:, None] * HEAD_DIM + column[None, :]
    half = tl.arange(0, HEAD_DIM // 2)
    pair_offsets = in_tile[:, None] * (HEAD_DIM // 2) + half[None, :]
    head_memory = memory + kv_head.to(tl.int64) * (2 * PAGE * HEAD_DIM)

    for item in range(tl.load(program_items + program), tl.load(program_items + program + 1)):
        sequence = tl.load(items + item * 3)
        length = tl.load(lengths + sequence)
        item_start = tl.load(items + item * 3 + 1) * PAGE
        item_end = tl.minimum(tl.load(items + item * 3 + 2) * PAGE, length)
        scale = tl.load(scales + sequence) * LOG2_E
        table = block_tables + sequence.to(tl.int64) * table_stride
        chunk = (length - 1) // chunk_stride
        inter_end = tl.maximum((chunk - 1) * chunk_stride, 0)
        intra_start = chunk * chunk_stride

        highest = tl.full([ROWS], float("-inf"), tl.float32)
        totals = tl.zeros([ROWS, TILE], tl.float32)
        if QUANTIZED:
            even = tl.zeros([ROWS, HEAD_DIM // 2], tl.float32)
            odd = tl.zeros([ROWS, HEAD_DIM // 2], tl.float32)
        else:
            output = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        for segment in range(3):
            queries = inter
            start = item_start
            end = tl.minimum(item_end, inter_end)
            if segment == 1:
                queries = successive
                start = tl.maximum(item_start, inter_end)
                end = tl.minimum(item_end, intra_start)
            if segment == 2:
                queries = intra
                start = tl.maximum(item_start, intra_start)
                end = item_end
            if start < end:
                query_rows = queries + sequence.to(tl.int64) * heads * HEAD_DIM
                q = tl.load(query_rows + query_offsets, mask=exists[:, None], other=0.0)
                logit_scale = scale
                if QUANTIZED:
                    wide = q.to(tl.float32)
                    q_scale, reciprocal = scale_for(tl.max(tl.abs(wide), 1, keep_dims=True))
                    q = (wide * reciprocal).to(_narrow_type(q.dtype))
                    logit_scale = q_scale * scale
                first_tile = start // TILE * TILE
                page = tl.load(table + first_tile // PAGE)
                for token in tl.range(first_tile, end, TILE, num_stages=STAGES):
                    position = token + in_tile
                    visible = (position >= start) & (position < end)
                    keys = head_memory + page.to(tl.int64) * page_stride
                    keys += (token % PAGE) * HEAD_DIM
                    k = tl.load(keys + tile_offsets)
                    values = keys + PAGE * HEAD_DIM
                    if QUANTIZED:
                        # Whatever lies behind a sequence's end is finite, and counts for nothing.
                        pairs = values.to(tl.pointer_type(tl.int16), bitcast=True)
                        v = tl.load(pairs + pair_offsets)
                        own_scales = page_scales + page.to(tl.int64) * page_scale_stride
                        tile_scale = logit_scale * tl.load(own_scales + kv_head * 2)
                        v_scale = tl.load(own_scales + kv_head * 2 + 1) * PAIR_SCALE
                    else:
                        # What lies behind a sequence's end may be NaN, and 0 * NaN is not 0.
                        v = tl.load(values + tile_offsets, (position < end)[:, None], other=0.0)
                        tile_scale = logit_scale
                    # The next tile's page number is on its way while this tile is computed.
                    following = token + TILE
                    page = tl.load(table + following // PAGE, mask=following < end, other=0)
                    highest, totals, weights, shrink = _weigh(
                        q, k, visible, tile_scale, highest, totals, QUANTIZED
                    )
                    if QUANTIZED:
                        weights = weights.to(q.dtype)
                        even_v, odd_v = split_pairs(v, PACKED)
                        added = tl.dot(weights, even_v.to(q.dtype), input_precision="ieee")
                        even = even * shrink + added * v_scale
                        added = tl.dot(weights, odd_v.to(q.dtype), input_precision="ieee")
                        odd = odd * shrink + added * v_scale
                    else:
                        weights = weights.to(v.dtype)
                        output = tl.dot(weights, v, output * shrink, input_precision="ieee")

        if QUANTIZED:
            output = tl.interleave(even, odd)
        total = tl.sum(totals, 1)
        first_head = tl.cast(item, tl.int64) * heads + kv_head * GROUP
        tl.store(
            partial_output + (first_head + row)[:, None] * HEAD_DIM + column[None, :],
            output / total[:, None],
            mask=exists[:, None],
        )
        tl.store(partial_lse + first_head + row, highest + tl.log2(total), mask=exists)


@triton.constexpr_function
def _narrow_type(dtype):
    """What 8-bit pages are multiplied as, for queries of a type."""
    return tl.float32 if dtype == tl.float32 else tl.float16


@triton.jit
def _weigh(q, k, visible, scale, highest, totals, QUANTIZED: tl.constexpr):
    """Weights of a tile's keys, of which one is visible at least, and by what all before shrink.

    `totals` [rows, tile] is summed over the tile only at the end: warps split a tile's keys, and
    would have to wait for each other.
    """
    logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
    logits = tl.where(visible[None, :], logits, float("-inf"))
    peaks = tl.max(logits, 1)
    if QUANTIZED:
        # Weights up to 2^15: the small ones would be lost below float16's least number.
        peaks -= 15.0
    new_highest = tl.maximum(highest, peaks)
    weights = tl.exp2(logits - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)[:, None]
    return new_highest, totals * shrink + weights, weights, shrink


@triton.jit
def _merge_items(
    partial_output,
    partial_lse,
    sequence_items,
    output,
    lse,
    heads,
    HEAD_DIM: tl.constexpr,
    ITEMS: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """One head of one sequence: its partial results, so many at a time."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    column = tl.arange(0, HEAD_DIM)
    first = tl.load(sequence_items + sequence)
    last = tl.load(sequence_items + sequence + 1)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    merged = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(first, last, ITEMS):
        item = start + tl.arange(0, ITEMS)
        exists = item < last
        where = item.to(tl.int64) * heads + head
        logs = tl.load(partial_lse + where, mask=exists, other=float("-inf"))
        parts = tl.load(
            partial_output + where[:, None] * HEAD_DIM + column[None, :],
            mask=exists[:, None],
            other=0.0,
        )
        new_highest = tl.maximum(highest, tl.max(logs, 0))
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(logs - new_highest)
        total = total * shrink + tl.sum(weights, 0)
        merged = merged * shrink + tl.sum(weights[:, None] * parts, 0)
        highest = new_highest
    # A sequence of no keys has no items: 0 / 1, and -inf + log2(1).
    total = tl.where(first == last, 1.0, total)
    where = sequence.to(tl.int64) * heads + head
    tl.store(output + where * HEAD_DIM + column, (merged / total).to(output.dtype.element_ty))
    tl.store(lse + where + tl.arange(0, 1), (highest + tl.log2(total)) / LOG2_E)
