# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false
# Gluon's own annotations do not know that a kernel's constants are values when it is compiled.
"""Dense dual chunk attention of a prefill chunk on Hopper, warp-specialized.

The same function as `triton_prefill`, and the same walk over the keys. Two consumer warpgroups hold
64 query rows each, and one producer warp brings pages into a ring of shared memory through the
tensor memory accelerator. They meet at mbarriers alone, so one consumer's softmax runs beside the
other's products, and within a consumer beside its own product of weights and values. Source of
the schedule: FlashAttention-3 (arXiv 2407.08608).
"""

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..pages import LayerPages, as_tiles
from .segments import QueryBlocks, SegmentQueries, span_table
from .triton_prefill import fresh_results

STAGES = 3
"""Pages of K and V in shared memory."""


@gluon.constexpr_function
def row_layout(head_dim):
    """Neighbouring threads of a warpgroup read 16 bytes each of one row, or of the next."""
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The ring's next place, and the parity of the round that fills it: it changes at place 0."""
    following = stage + 1
    wraps = following == STAGES
    return gl.where(wraps, 0, following), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def segment_bounds(segment, start, inter_end, successive_end):
    """Tiles [first, last) of a segment: 0 intra without the block's own, 1 successive, 2 inter."""
    first = gl.where(segment == 0, successive_end, gl.where(segment == 1, inter_end, 0))
    last = gl.where(segment == 0, start, gl.where(segment == 1, successive_end, inter_end))
    return first // 128, last // 128


@gluon.jit
def fetch(kv, row, target, full, empty, stage, phase):
    """Bring 128 rows of `kv` into a place of a ring, as soon as it was emptied."""
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), kv.block_type.nbytes)
    tma.async_copy_global_to_shared(kv, [row, 0], full.index(stage), target.index(stage))


@gluon.jit
def _produce(
    kv, table, head, num_heads, borders, ring, STAGES: gl.constexpr,
):  # fmt: skip
    k, v, k_full, k_empty, v_full, v_empty = ring
    start, inter_end, successive_end = borders
    page = gl.load(table + start // 128)
    fetch(kv, (page * num_heads + head) * 256, k, k_full, k_empty, 0, 0)
    # The own tile's V lies there already.
    mbarrier.arrive(v_full.index(0), count=1)
    stage, phase = next_stage(0, 0, STAGES)
    for segment in range(3):
        first, last = segment_bounds(segment, start, inter_end, successive_end)
        page = gl.load(table + first)
        for tile in range(first, last):
            row = (page * num_heads + head) * 256
            # The next page's number is fetched while this page's place is waited for. After the
            # last there is one more in the table: the block's own.
            page = gl.load(table + tile + 1)
            fetch(kv, row, k, k_full, k_empty, stage, phase)
            fetch(kv, row + 128, v, v_full, v_empty, stage, phase)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def load_queries(q, queries, first_row, rows, row_stride, HEAD_DIM: gl.constexpr):
    """Put 64 rows into shared memory, for the tensor cores to read; missing ones are 0."""
    LAYOUT: gl.constexpr = row_layout(HEAD_DIM)
    line = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    place = (first_row + line).to(gl.int64)[:, None] * row_stride + dims[None, :]
    q.store(gl.load(queries + place, mask=(line < rows)[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def softmax_step(logits, highest, total, scale):
    """Weights, what earlier ones shrink by, and the new highest logit and total."""
    risen = gl.maximum(highest, gl.max(logits, 1) * scale)
    weights = gl.exp2(logits * scale - risen[:, None])
    shrink = gl.exp2(highest - risen)
    return weights, shrink, risen, total * shrink + gl.sum(weights, 1)


@gluon.constexpr_function
def logits_layout():
    """Of 64 rows against 128 keys."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])


@gluon.constexpr_function
def result_layout(head_dim):
    """Of 64 rows of results."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])


@gluon.jit
def begin(q, ring, rows, scale, HALF: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Softmax over the block's own tile; its weights meet their values with the next tile.

    Returns:
        accumulator [64, d], weights as an operand, highest [64] and total [64].
    """
    k, _, k_full, k_empty, _, _ = ring
    LOGITS: gl.constexpr = logits_layout()
    RESULT: gl.constexpr = result_layout(HEAD_DIM)
    blank = gl.zeros([64, 128], gl.float32, LOGITS)
    mbarrier.wait(k_full.index(0), 0)
    logits = warpgroup_mma(q, k.index(0).permute([1, 0]), blank, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, [logits])
    mbarrier.arrive(k_empty.index(0), count=1)
    line = gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    column = gl.arange(0, 128, gl.SliceLayout(0, LOGITS))
    # Rows that do not exist see what the others see, so that they stay finite.
    seen = (column[None, :] <= (line + 64 * HALF)[:, None]) & (column < rows + 64 * HALF)[None, :]
    logits = gl.where(seen, logits, -float("inf"))
    highest = gl.max(logits, 1) * scale
    weights = gl.exp2(logits * scale - highest[:, None])
    total = gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(k.dtype), gl.DotOperandLayout(0, RESULT, 2))
    accumulator = gl.zeros([64, HEAD_DIM], gl.float32, RESULT)
    return accumulator, weights, highest, total


@gluon.jit
def attend_next(
    accumulator, weights, highest, total, q, ring, turns, stage, phase, v_stage, v_phase, turn,
    scale, seen, HALF: gl.constexpr, HEAD_DIM: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Softmax over the tile at `stage`, beside the product of the last tile's weights and values.

    Args:
        seen: with MASKED, whether each of the tile's keys is seen, [128].
    """
    k, v, k_full, k_empty, v_full, v_empty = ring
    LOGITS: gl.constexpr = logits_layout()
    RESULT: gl.constexpr = result_layout(HEAD_DIM)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    blank = gl.zeros([64, 128], gl.float32, LOGITS)
    mbarrier.wait(k_full.index(stage), phase)
    # The consumers issue in turns, so that one's softmax falls into the other's products.
    mbarrier.wait(turns.index(HALF), turn)
    keys = k.index(stage).permute([1, 0])
    logits = warpgroup_mma(q, keys, blank, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    accumulator = warpgroup_mma(weights, v.index(v_stage), accumulator, is_async=True)
    mbarrier.arrive(turns.index(1 - HALF), count=1)
    logits = warpgroup_mma_wait(1, [logits])
    if MASKED:
        logits = gl.where(seen[None, :], logits, -float("inf"))
    fresh, shrink, highest, total = softmax_step(logits, highest, total, scale)
    fresh = gl.convert_layout(fresh.to(k.dtype), WEIGHTS)
    # Long since passed. The assembler puts a wait for products as early as it can, so that
    # softmax would follow it; past a branch it moves nothing.
    mbarrier.wait(k_full.index(stage), phase)
    accumulator, weights = warpgroup_mma_wait(0, [accumulator, fresh])
    mbarrier.arrive(k_empty.index(stage), count=1)
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    accumulator *= gl.convert_layout(shrink, gl.SliceLayout(1, RESULT))[:, None]
    return accumulator, weights, highest, total


@gluon.jit
def finish(
    accumulator, weights, highest, total, ring, v_stage, v_phase, out, first_row, rows,
    HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """The last tile's values; then output and log-sum-exp are written."""
    output, lse, heads, _ = out
    _, v, _, _, v_full, _ = ring
    LOGITS: gl.constexpr = logits_layout()
    RESULT: gl.constexpr = result_layout(HEAD_DIM)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    accumulator = warpgroup_mma(weights, v.index(v_stage), accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, [accumulator])
    divisor = gl.convert_layout(total, gl.SliceLayout(1, RESULT))
    line = gl.arange(0, 64, gl.SliceLayout(1, RESULT))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, RESULT))
    place = (first_row + line).to(gl.int64)[:, None] * (heads * HEAD_DIM) + dims[None, :]
    normal = (accumulator / divisor[:, None]).to(v.dtype)
    gl.store(output + place, normal, mask=(line < rows)[:, None])
    line = gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    # From the base 2 back to e.
    natural = (highest + gl.log2(total)) * 0.6931471805599453
    gl.store(lse + first_row + line, natural, mask=line < rows)


@gluon.jit
def _consume(
    queries, where, out, q, borders, ring, turns,
    HALF: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of rows [64 HALF, 64 HALF + 64) of the block."""
    intra, successive, inter = queries
    scale = out[3]
    first_row, rows, row_stride = where
    q = q.index(HALF)
    start, inter_end, successive_end = borders
    first_row += 64 * HALF
    rows -= 64 * HALF
    load_queries(q, intra, first_row, rows, row_stride, HEAD_DIM)
    accumulator, weights, highest, total = begin(q, ring, rows, scale, HALF, HEAD_DIM)
    v_stage, v_phase = 0, 0
    turn = 1 - HALF
    stage, phase = next_stage(0, 0, STAGES)
    for segment in range(3):
        first, last = segment_bounds(segment, start, inter_end, successive_end)
        if segment > 0:
            rotated = successive if segment == 1 else inter
            load_queries(q, rotated, first_row, rows, row_stride, HEAD_DIM)
        for _ in range(first, last):
            accumulator, weights, highest, total = attend_next(
                accumulator, weights, highest, total, q, ring, turns, stage, phase,
                v_stage, v_phase, turn, scale, 0, HALF, HEAD_DIM, False,
            )  # fmt: skip
            turn ^= 1
            v_stage, v_phase = stage, phase
            stage, phase = next_stage(stage, phase, STAGES)
    finish(
        accumulator, weights, highest, total, ring, v_stage, v_phase, out, first_row, rows, HEAD_DIM
    )


@gluon.jit
def load_own_values(memory, page, head, num_heads, rows, target, HEAD_DIM: gl.constexpr):
    """V of a block's own tile; what lies past the sequence's end may be NaN and becomes 0."""
    LAYOUT: gl.constexpr = row_layout(HEAD_DIM)
    line = gl.arange(0, 128, gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    row = (page.to(gl.int64) * num_heads + head) * 256 + 128
    place = (row + line)[:, None] * HEAD_DIM + dims[None, :]
    target.store(gl.load(memory + place, mask=(line < rows)[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def make_ring(kv, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory: both consumers' queries, the ring of K and V with its barriers, and turns."""
    dtype: gl.constexpr = kv.dtype
    q = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], kv.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, 128, HEAD_DIM], kv.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, 128, HEAD_DIM], kv.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        # Each of the two consumers says once that it is done.
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    return q, (k, v, k_full, k_empty, v_full, v_empty), turns


@gluon.jit(do_not_specialize=["num_spans", "num_rows"])
def _prefill_kernel(
    intra, successive, inter, row_stride, head_stride,
    output, lse, memory, kv, table, spans, scale, num_spans, num_rows, heads, kv_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    head = program // num_spans
    kv_head = head // GROUP
    # The last rows have the most keys: they go first, so that the end of the grid is short.
    span = spans + (num_spans - 1 - program % num_spans) * 5
    first_row, rows, start = gl.load(span), gl.load(span + 1), gl.load(span + 2)
    inter_end, successive_end = gl.load(span + 3), gl.load(span + 4)

    q, ring, turns = make_ring(kv, HEAD_DIM, STAGES)
    page = gl.load(table + start // 128)
    load_own_values(memory, page, kv_head, kv_heads, rows, ring[1].index(0), HEAD_DIM)

    wide_head = head.to(gl.int64)
    intra += wide_head * head_stride
    successive += wide_head * head_stride
    inter += wide_head * head_stride
    output += wide_head * HEAD_DIM
    lse += wide_head * num_rows
    borders = (start, inter_end, successive_end)
    queries = (intra, successive, inter)
    out = (output, lse, heads, scale)
    where = (first_row, rows, row_stride)
    gl.warp_specialize(
        [
            (_consume, (queries, where, out, q, borders, ring, turns, 0, HEAD_DIM, STAGES)),
            (_consume, (queries, where, out, q, borders, ring, turns, 1, HEAD_DIM, STAGES)),
            (_produce, (kv, table, kv_head, kv_heads, borders, ring, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def supports(queries: SegmentQueries, pages: LayerPages, stride: int | None) -> bool:
    """Whether `attention` can be called: on Hopper, in 16 bits, with chunks of whole tiles."""
    head_dim = queries.intra.shape[2]
    return (
        torch.cuda.get_device_capability(queries.intra.device)[0] == 9
        and pages.memory.dtype in (torch.bfloat16, torch.float16)
        and queries.intra.dtype == pages.memory.dtype
        and head_dim in (64, 128)
        and (stride is None or stride % 128 == 0)
    )


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks,
    pages: LayerPages,
    stride: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the package's `attention`, for tensors on one GPU that `supports` approves of."""
    rows, heads, head_dim = queries.intra.shape
    device = queries.intra.device
    output, lse = fresh_results(queries)
    if rows == 0:
        return output, lse.T
    spans = span_table(blocks, stride, device)
    _prefill_kernel[(len(spans) * heads,)](
        queries.intra, queries.successive, queries.inter, *queries.intra.stride()[:2],
        output, lse, pages.memory, swizzled_tiles(pages.memory), pages.table.on(device), spans,
        scale * math.log2(math.e), len(spans), rows, heads, pages.num_kv_heads,
        GROUP=heads // pages.num_kv_heads, HEAD_DIM=head_dim, STAGES=STAGES,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
    return output, lse.T


def swizzled_tiles(memory: Tensor) -> TensorDescriptor:
    """Pages as a kernel in Gluon reads them into shared memory; see `as_tiles`."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(memory, *as_tiles(memory), layout)
