# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""A matrix times a vector on GPUs: every weight is read once, and that is what takes time.

A program takes a few whole rows, so that no sum is shared; there are many more programs than
multiprocessors, so that their ends do not show.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class MatvecTiling:
    """Weights that a program reads at once: `rows` × up to `columns`, `unroll` times over."""

    rows: int = 4
    columns: int = 512
    unroll: int = 4
    warps: int = 4


DEFAULT_TILING = MatvecTiling()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tiling: MatvecTiling = DEFAULT_TILING
) -> Tensor:
    """As the package's."""
    if len(x) != 1:
        raise ValueError(f"a matrix times a vector takes one row, not {len(x)}")
    rows, columns = weight.shape
    output = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    block = min(tiling.columns, int(triton.next_power_of_2(columns)))
    _linear[(-(-rows // tiling.rows),)](
        x,
        weight,
        x if bias is None else bias,
        output,
        weight.stride(0),
        rows,
        COLUMNS=columns,
        BIASED=bias is not None,
        EVEN=columns % block == 0 and rows % tiling.rows == 0,
        ROWS=tiling.rows,
        BLOCK=block,
        UNROLL=tiling.unroll,
        num_warps=tiling.warps,
    )
    return output


@triton.jit
def _linear(
    x,
    weight,
    bias,
    output,
    row_stride,
    rows,
    COLUMNS: tl.constexpr,
    BIASED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Some rows of the matrix, from end to end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_block = tl.arange(0, BLOCK)
    exists = row < rows
    sources = weight + row.to(tl.int64)[:, None] * row_stride + in_block[None, :]
    # Each row reads x for itself, from the cache: to share it, warps would wait for each other.
    places = tl.broadcast_to(x + in_block[None, :], [ROWS, BLOCK])
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, COLUMNS, BLOCK, loop_unroll_factor=UNROLL):
        if EVEN:
            factors = tl.load(places + start)
            # Read once a step: it would only drive out what others read again.
            weights = tl.load(sources + start, eviction_policy="evict_first")
        else:
            inside = start + in_block < COLUMNS
            factors = tl.load(places + start, mask=inside[None, :], other=0.0)
            weights = tl.load(sources + start, mask=exists[:, None] & inside[None, :], other=0.0)
        sums += weights.to(tl.float32) * factors.to(tl.float32)
    result = tl.sum(sums, 1)
    if BIASED:
        result += tl.load(bias + row, mask=exists, other=0.0).to(tl.float32)
    tl.store(output + row, result.to(output.dtype.element_ty), mask=exists)
