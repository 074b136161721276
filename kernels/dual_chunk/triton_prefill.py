# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""Dense dual chunk attention of a prefill chunk on a GPU, in one pass over paged K and V.

One program computes 128 query rows of one head. It walks the keys segment by segment with one
softmax state, taking the query's rotation of each segment in turn, so nothing is merged afterwards
and no key is copied. A tile of keys is a page, read by the tensor memory accelerator
straight from the page pool.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..pages import LayerPages, as_tiles
from .segments import QueryBlocks, SegmentQueries, span_table


@triton.jit
def attend_tile(
    accumulator, highest, total, q, kv, row, scale, keys, positions, low, high,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One online softmax step over the tile whose K starts at `row` of `kv`, and V 128 rows later.

    Args:
        accumulator: [M, d] float32. highest, total: [M] float32; highest is to the base 2.
        keys: [N] positions of the tile's keys. positions: [M] those of the queries.
        low, high: keys outside [low, high) are not seen, nor those after their query.

    A masked tile must not be the first that a row meets, unless the row sees a key of it.
    """
    k = kv.load([row, 0])
    logits = tl.dot(q, k.T)
    if MASKED:
        seen = (keys >= low) & (keys < high)
        seen = seen[None, :] & (keys[None, :] <= positions[:, None])
        logits = tl.where(seen, logits, -float("inf"))
    risen = tl.maximum(highest, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - risen[:, None])
    shrink = tl.exp2(highest - risen)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = accumulator * shrink[:, None]
    v = kv.load([row + 128, 0])
    if MASKED:
        # Past the sequence's end lies anything, NaN included, and 0 * NaN is not 0.
        v = tl.where((keys < high)[:, None], v, 0.0)
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator)
    return accumulator, risen, total


@triton.jit
def attend_range(
    accumulator, highest, total, q, kv, table, head, num_heads, scale, positions, low, high,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Attention over all keys in [low, high); see `attend_tile`.

    Without MASKED, `low` and `high` are borders of tiles and no key lies after a query.
    """
    first, last = low // 128, tl.cdiv(high, 128)
    # The next page's number is fetched while this page is worked on.
    page = tl.load(table + first, mask=first < last, other=0)
    for tile in range(first, last):
        row = (page * num_heads + head) * 256
        page = tl.load(table + tile + 1, mask=tile + 1 < last, other=0)
        keys = tile * 128 + tl.arange(0, 128)
        accumulator, highest, total = attend_tile(
            accumulator, highest, total, q, kv, row, scale, keys, positions, low, high, MASKED
        )
    return accumulator, highest, total


@triton.jit
def store_result(
    output, lse, accumulator, highest, total, first_row, rows, head, heads, num_rows,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Normalize and write output [num_rows, heads, d] and log-sum-exp [heads, num_rows]."""
    line = tl.arange(0, 128)
    row = (first_row + line).to(tl.int64)
    place = (row[:, None] * heads + head) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    normal = (accumulator / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + place, normal, mask=(line < rows)[:, None])
    # From the base 2 back to e.
    natural = (highest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + head.to(tl.int64) * num_rows + row, natural, mask=line < rows)


@triton.jit(do_not_specialize=["num_spans", "num_rows"])
def _prefill_kernel(
    intra, successive, inter, row_stride, head_stride,
    output, lse, kv, table, spans, scale, num_spans, num_rows, heads, kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    DUAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program // num_spans
    kv_head = head // GROUP
    # The last rows have the most keys: they go first, so that the end of the grid is short.
    span = spans + (num_spans - 1 - program % num_spans) * 5
    first_row, rows, start = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    inter_end, successive_end = tl.load(span + 3), tl.load(span + 4)
    end = start + rows

    line = tl.arange(0, 128)
    exists = (line < rows)[:, None]
    positions = start + line
    place = (first_row + line).to(tl.int64)[:, None] * row_stride
    place += head * head_stride + tl.arange(0, HEAD_DIM)[None, :]

    accumulator = tl.zeros([128, HEAD_DIM], tl.float32)
    highest = tl.full([128], -float("inf"), tl.float32)
    total = tl.zeros([128], tl.float32)
    q = tl.load(intra + place, mask=exists, other=0.0)
    # The rows' own tile comes first: every row sees itself there.
    own = start if ALIGNED else successive_end
    accumulator, highest, total = attend_range(
        accumulator, highest, total, q, kv, table, kv_head, kv_heads, scale, positions,
        own, end, True,
    )  # fmt: skip
    if ALIGNED:
        accumulator, highest, total = attend_range(
            accumulator, highest, total, q, kv, table, kv_head, kv_heads, scale, positions,
            successive_end, start, False,
        )  # fmt: skip
    if DUAL:
        if successive_end > 0:
            q = tl.load(successive + place, mask=exists, other=0.0)
            accumulator, highest, total = attend_range(
                accumulator, highest, total, q, kv, table, kv_head, kv_heads, scale, positions,
                inter_end, successive_end, not ALIGNED,
            )  # fmt: skip
        if inter_end > 0:
            q = tl.load(inter + place, mask=exists, other=0.0)
            accumulator, highest, total = attend_range(
                accumulator, highest, total, q, kv, table, kv_head, kv_heads, scale, positions,
                0, inter_end, not ALIGNED,
            )  # fmt: skip
    store_result(
        output, lse, accumulator, highest, total, first_row, rows, head, heads, num_rows, HEAD_DIM
    )


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks,
    pages: LayerPages,
    stride: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the package's `attention`, for tensors on one GPU."""
    rows, heads, head_dim = queries.intra.shape
    device = queries.intra.device
    output, lse = fresh_results(queries)
    if rows == 0:
        return output, lse.T
    spans = span_table(blocks, stride, device)
    _prefill_kernel[(len(spans) * heads,)](
        queries.intra, queries.successive, queries.inter, *queries.intra.stride()[:2],
        output, lse, page_tiles(pages.memory), pages.table.on(device), spans,
        scale * math.log2(math.e), len(spans), rows, heads, pages.num_kv_heads,
        GROUP=heads // pages.num_kv_heads, HEAD_DIM=head_dim,
        DUAL=stride is not None, ALIGNED=stride is None or stride % 128 == 0,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return output, lse.T


def page_tiles(memory: Tensor) -> TensorDescriptor:
    """Pages as a kernel in Triton reads them; see `as_tiles`."""
    return TensorDescriptor(memory, *as_tiles(memory))


def fresh_results(queries: SegmentQueries, output: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Memory for output [rows, heads, d], unless there is some, and log-sum-exp [heads, rows].

    Raises:
        ValueError: the queries cannot be read, see `check_layout`, or the memory not be written.
    """
    check_layout(queries)
    rows, heads, head_dim = queries.intra.shape
    device = queries.intra.device
    if output is None:
        output = queries.intra.new_empty(rows, heads, head_dim)
    elif output.shape != queries.intra.shape or not output.is_contiguous():
        raise ValueError(f"results {tuple(output.shape)} must be contiguous, as queries are shaped")
    return output, torch.empty(heads, rows, dtype=torch.float32, device=device)


def check_layout(queries: SegmentQueries) -> None:
    """Kernels take one set of strides for the three rotations.

    Raises:
        ValueError: they differ, or a head's elements are not neighbours.
    """
    strides = queries.intra.stride()
    if strides[2] != 1 or {queries.successive.stride(), queries.inter.stride()} != {strides}:
        raise ValueError("the three rotations of the queries must have the same strides")
