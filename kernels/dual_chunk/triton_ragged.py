# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""Dense dual chunk attention of several sequences' rows on a GPU, in one launch over paged K and V.

The walk over a sequence's keys is that of `triton_prefill`: one softmax state, the rows' own tile
first. What differs is that every span says where its sequence's pages are listed and how its logits
are scaled, that launches depend on shapes alone, so that a CUDA graph may hold them, and that
pages of 8 bits are read as they are.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..pages import as_tiles
from .ragged_plan import RaggedPlan
from .segments import SegmentQueries
from .triton_prefill import check_layout

_LOG2_E = math.log2(math.e)


def ragged_attention(
    queries: SegmentQueries,
    memory: Tensor,
    plan: RaggedPlan,
    page_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of every row of a plan over its own sequence, up to itself.

    Args:
        queries: rotated, each [n, heads, d], with at least as many rows as the plan is made for.
        memory: one layer's pages, [pages, kv_heads, 2, 128, d], the rows' own K and V included, in
            the queries' type, or float8_e4m3fn with `page_scales`.
        page_scales: float32 [pages, kv_heads, 2]; see `quantized`.

    Returns:
        [n, heads, d] in the queries' type; 0 in rows that are not used.

    Raises:
        ValueError: pages of 8 bits without scales, or the other way round, or queries that cannot
            be read.
    """
    quantized = page_scales is not None
    if quantized != (memory.dtype == torch.float8_e4m3fn):
        raise ValueError(f"pages of {memory.dtype} need {'no ' if quantized else ''}scales")
    check_layout(queries)
    heads, head_dim = queries.intra.shape[1:]
    kv_heads, stride = memory.shape[1], plan.shape.stride
    output = torch.zeros_like(queries.intra, memory_format=torch.contiguous_format)
    _ragged_kernel[(len(plan.spans) * heads,)](
        queries.intra, queries.successive, queries.inter, *queries.intra.stride()[:2],
        output, TensorDescriptor(memory, *as_tiles(memory)), page_scales,
        plan.spans, plan.scales, plan.pages, heads, kv_heads,
        GROUP=heads // kv_heads, HEAD_DIM=head_dim, LOG2_E=_LOG2_E,
        DUAL=stride is not None, ALIGNED=stride is None or stride % 128 == 0, QUANTIZED=quantized,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return output


@triton.jit
def _take_tile(
    accumulator, highest, total, q, kv, page_scales, place, scale, keys, positions, low, high,
    MASKED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """One online softmax step over a page of one KV head; `place` is page * kv_heads + head.

    Keys outside [low, high) are not seen, nor those after their query. A masked tile must not be
    the first that a row meets, unless the row sees a key of it.
    """
    k = kv.load([place * 256, 0])
    logit_scale = scale
    if QUANTIZED:
        logit_scale = scale * tl.load(page_scales + place * 2)
        k = k.to(q.dtype)
    logits = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        seen = (keys >= low) & (keys < high)
        seen = seen[None, :] & (keys[None, :] <= positions[:, None])
        logits = tl.where(seen, logits, -float("inf"))
    risen = tl.maximum(highest, tl.max(logits, 1) * logit_scale)
    weights = tl.exp2(logits * logit_scale - risen[:, None])
    shrink = tl.exp2(highest - risen)
    total = total * shrink + tl.sum(weights, 1)
    v = kv.load([place * 256 + 128, 0])
    if QUANTIZED:
        v = v.to(q.dtype)
    if MASKED:
        # Past the sequence's end lies anything, NaN included, and 0 * NaN is not 0.
        v = tl.where((keys < high)[:, None], v, 0.0)
    if QUANTIZED:
        added = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        v_scale = tl.load(page_scales + place * 2 + 1)
        accumulator = accumulator * shrink[:, None] + added * v_scale
    else:
        shrunk = accumulator * shrink[:, None]
        accumulator = tl.dot(weights.to(v.dtype), v, shrunk, input_precision="ieee")
    return accumulator, risen, total


@triton.jit
def _take_range(
    accumulator, highest, total, q, kv, page_scales, pages, head, kv_heads, scale, positions,
    low, high, MASKED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Attention over all keys in [low, high); see `_take_tile`.

    Without MASKED, `low` and `high` are borders of tiles and no key lies after a query.
    """
    first, last = low // 128, tl.cdiv(high, 128)
    # The next page's number is fetched while this page is worked on.
    page = tl.load(pages + first, mask=first < last, other=0)
    for tile in range(first, last):
        place = page * kv_heads + head
        page = tl.load(pages + tile + 1, mask=tile + 1 < last, other=0)
        keys = tile * 128 + tl.arange(0, 128)
        accumulator, highest, total = _take_tile(
            accumulator, highest, total, q, kv, page_scales, place, scale, keys, positions,
            low, high, MASKED, QUANTIZED,
        )  # fmt: skip
    return accumulator, highest, total


@triton.jit(do_not_specialize=["row_stride"])
def _ragged_kernel(
    intra, successive, inter, row_stride, head_stride,
    output, kv, page_scales, spans, scales, pages, heads, kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LOG2_E: tl.constexpr,
    DUAL: tl.constexpr, ALIGNED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) // heads
    # Heads that share keys are neighbours, and read them at the same time.
    head = tl.program_id(0) % heads
    kv_head = head // GROUP
    span = spans + index * 6
    first_row, rows, start = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    if rows > 0:
        inter_end, successive_end = tl.load(span + 3), tl.load(span + 4)
        pages += tl.load(span + 5)
        scale = tl.load(scales + index) * LOG2_E
        end = start + rows

        line = tl.arange(0, 128)
        exists = (line < rows)[:, None]
        positions = start + line
        row = (first_row + line).to(tl.int64)[:, None]
        column = tl.arange(0, HEAD_DIM)[None, :]
        place = row * row_stride + head * head_stride + column

        accumulator = tl.zeros([128, HEAD_DIM], tl.float32)
        highest = tl.full([128], -float("inf"), tl.float32)
        total = tl.zeros([128], tl.float32)
        q = tl.load(intra + place, mask=exists, other=0.0)
        # The rows' own tile comes first: every row sees itself there.
        own = start if ALIGNED else successive_end
        accumulator, highest, total = _take_range(
            accumulator, highest, total, q, kv, page_scales, pages, kv_head, kv_heads, scale,
            positions, own, end, True, QUANTIZED,
        )  # fmt: skip
        if ALIGNED:
            accumulator, highest, total = _take_range(
                accumulator, highest, total, q, kv, page_scales, pages, kv_head, kv_heads, scale,
                positions, successive_end, start, False, QUANTIZED,
            )  # fmt: skip
        if DUAL:
            if successive_end > 0:
                q = tl.load(successive + place, mask=exists, other=0.0)
                accumulator, highest, total = _take_range(
                    accumulator, highest, total, q, kv, page_scales, pages, kv_head, kv_heads,
                    scale, positions, inter_end, successive_end, not ALIGNED, QUANTIZED,
                )  # fmt: skip
            if inter_end > 0:
                q = tl.load(inter + place, mask=exists, other=0.0)
                accumulator, highest, total = _take_range(
                    accumulator, highest, total, q, kv, page_scales, pages, kv_head, kv_heads,
                    scale, positions, 0, inter_end, not ALIGNED, QUANTIZED,
                )  # fmt: skip
        normal = (accumulator / total[:, None]).to(output.dtype.element_ty)
        tl.store(output + (row * heads + head) * HEAD_DIM + column, normal, mask=exists)
