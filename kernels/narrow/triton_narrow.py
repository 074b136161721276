# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""The kernels; arguments and results are those of the package's functions.

A product of many rows is the library's. Of few rows every weight is read once, and that is what
takes time: the library's product divides neither long sums nor few outputs enough to fill a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_scales import e4m3_scale
from .rows import BLOCK, Narrowing, NarrowRows

_MOST_FEW_ROWS = 32
_LEAST_DOT_ROWS = 16
_GROUPED_COLUMNS = 2048


@dataclass(frozen=True)
class FewRowsTiling:
    """A program computes `outputs` of all rows, `inputs` at once, `stages - 1` such on the way."""

    outputs: int = 64
    inputs: int = 256
    stages: int = 6
    warps: int = 4


BY_OUTPUT = FewRowsTiling()
BY_BLOCK = FewRowsTiling(inputs=BLOCK)
"""A step takes one block of inputs, and outputs lie in one block."""


@dataclass(frozen=True)
class ProductTiling:
    """Rows of x and outputs that a program of the product by blocks computes.

    Programs that follow each other take `together` tiles of rows of the same outputs, which then
    lie in the cache.
    """

    rows: int = 128
    outputs: int = 64
    together: int = 8
    stages: int = 4
    warps: int = 4


DEFAULT_TILING = ProductTiling()


def narrow_rows(x: Tensor, narrowing: Narrowing) -> NarrowRows:
    """Each row is read once."""
    count, columns = x.shape
    narrow = empty_rows(count, columns, narrowing, x)
    pieces = row_pieces(columns)
    if count:
        _narrow_rows[(count,)](
            x,
            narrow.values,
            narrow.scales,
            x.stride(0),
            *narrow.scales.stride(),
            COLUMNS=columns,
            GROUP=narrowing.group or 0,
            FIRST=pieces[0],
            REST=pieces[1],
            SIZE=_GROUPED_COLUMNS,
            num_warps=row_warps(pieces),
        )
    return narrow


def row_pieces(columns: int) -> tuple[int, int]:
    """Powers of two that hold a row between them and waste little; the second may be 0."""
    whole = triton.next_power_of_2(columns)
    first = whole if whole == columns else whole // 2
    rest = triton.next_power_of_2(columns - first) if columns > first else 0
    return int(first), int(rest)


def row_warps(pieces: tuple[int, int]) -> int:
    """Warps that keep such a row in registers."""
    return max(1, min(8, int(triton.next_power_of_2(sum(pieces))) // 2048))


def empty_rows(count: int, columns: int, narrowing: Narrowing, like: Tensor) -> NarrowRows:
    """Rows to be filled; a group's scales lie together, as the library's product wants them."""
    groups, device = narrowing.groups(columns), like.device
    values = torch.empty(count, columns, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(groups, count, dtype=torch.float32, device=device).t()
    return NarrowRows(values, scales, like.dtype)


def linear(x: NarrowRows, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """By what suits so many rows."""
    count, by_blocks = len(x), scales.dim() == 2
    if count == 0:
        return torch.empty(0, len(weight), dtype=x.dtype, device=weight.device)
    if count <= _MOST_FEW_ROWS:
        return linear_of_few(x, weight, scales, bias)
    if by_blocks and not _library_takes_blocks(count, weight):
        return linear_by_blocks(x, weight, scales, bias)
    x_scales = x.scales
    if by_blocks and x_scales.stride(1) != count:
        # Of rows cut out of others the scales lie apart.
        x_scales = x_scales.t().contiguous().t()
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.values,
        weight.t(),
        scale_a=x_scales,
        scale_b=scales.t() if by_blocks else scales[None],
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=not by_blocks,
    )


def _library_takes_blocks(count: int, weight: Tensor) -> bool:
    """Whether its product has scales by blocks: on Hopper, of whole blocks, and of whole fours."""
    outputs, inputs = weight.shape
    whole = outputs % BLOCK == 0 and inputs % (4 * BLOCK) == 0 and count % 4 == 0
    return whole and weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] == 9


def _operands(
    x: NarrowRows, weight: Tensor, scales: Tensor, bias: Tensor | None, output: Tensor
) -> tuple[Tensor | int, ...]:
    """What both products are launched with, in their order; without a bias, anything for one."""
    return (
        x.values,
        x.scales,
        weight,
        scales,
        output if bias is None else bias,
        output,
        len(x),
        x.values.stride(0),
        *x.scales.stride(),
        weight.stride(0),
        scales.stride(0),
    )


def linear_of_few(
    x: NarrowRows,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    tiling: FewRowsTiling | None = None,
) -> Tensor:
    """Up to 32 rows."""
    count, (outputs, inputs) = len(x), weight.shape
    by_blocks = scales.dim() == 2
    tiling = tiling or (BY_BLOCK if by_blocks else BY_OUTPUT)
    output = torch.empty(count, outputs, dtype=x.dtype, device=weight.device)
    _few_rows[(triton.cdiv(outputs, tiling.outputs),)](
        *_operands(x, weight, scales, bias, output),
        INPUTS=inputs,
        OUTPUTS=outputs,
        BIASED=bias is not None,
        BY_BLOCKS=by_blocks,
        EVEN=inputs % tiling.inputs == 0,
        ROWS=max(_LEAST_DOT_ROWS, triton.next_power_of_2(count)),
        WIDTH=tiling.outputs,
        STEP=tiling.inputs,
        GROUP=BLOCK,
        STAGES=tiling.stages,
        num_warps=tiling.warps,
    )
    return output


def linear_by_blocks(
    x: NarrowRows,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    tiling: ProductTiling = DEFAULT_TILING,
) -> Tensor:
    """Many rows, with scales by blocks."""
    count, (outputs, inputs) = len(x), weight.shape
    output = torch.empty(count, outputs, dtype=x.dtype, device=weight.device)
    tiles = triton.cdiv(count, tiling.rows) * triton.cdiv(outputs, tiling.outputs)
    _block_product[(tiles,)](
        *_operands(x, weight, scales, bias, output),
        INPUTS=inputs,
        OUTPUTS=outputs,
        BIASED=bias is not None,
        ROWS=tiling.rows,
        WIDTH=tiling.outputs,
        TOGETHER=tiling.together,
        GROUP=BLOCK,
        num_stages=tiling.stages,
        num_warps=tiling.warps,
    )
    return output


@triton.jit
def _narrow_rows(
    x,
    values,
    scales,
    row_stride,
    scale_row_stride,
    scale_group_stride,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    source = x + row * row_stride
    target = values + row * COLUMNS
    own_scales = scales + row * scale_row_stride
    if GROUP == 0:
        first = tl.load(source + tl.arange(0, FIRST)).to(tl.float32)
        largest = tl.max(tl.abs(first), 0)
        if REST > 0:
            column = FIRST + tl.arange(0, REST)
            rest = tl.load(source + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(rest), 0))
        scale, reciprocal = e4m3_scale(largest)
        tl.store(own_scales, scale)
        tl.store(target + tl.arange(0, FIRST), (first * reciprocal).to(tl.float8e4nv))
        if REST > 0:
            column = FIRST + tl.arange(0, REST)
            narrow = (rest * reciprocal).to(tl.float8e4nv)
            tl.store(target + column, narrow, mask=column < COLUMNS)
    else:
        column = tl.arange(0, SIZE)
        for start in range(0, COLUMNS, SIZE):
            part = tl.load(source + start + column, mask=start + column < COLUMNS, other=0.0)
            store_groups(
                part.to(tl.float32), target + start, own_scales, start, scale_group_stride,
                COLUMNS, GROUP, SIZE,
            )  # fmt: skip


@triton.jit
def store_groups(
    row,
    target,
    scales,
    start,
    scale_group_stride,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Narrow float32 row [SIZE] group by group; it begins at column `start` of its whole row."""
    grouped = tl.reshape(row, [SIZE // GROUP, GROUP])
    scale, reciprocal = e4m3_scale(tl.max(tl.abs(grouped), 1))  # pyright: ignore
    group = tl.arange(0, SIZE // GROUP)
    exists = start + group * GROUP < COLUMNS
    tl.store(scales + (start // GROUP + group) * scale_group_stride, scale, mask=exists)
    narrow = (grouped * reciprocal[:, None]).to(tl.float8e4nv)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(target + place, narrow, mask=exists[:, None])


@triton.jit(do_not_specialize=["count"])
def _few_rows(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    output,
    count,
    x_stride,
    x_scale_row_stride,
    x_scale_group_stride,
    weight_stride,
    weight_scale_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BIASED: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some outputs of all rows: weights are the product's left side, whose rows fill its tiles."""
    first = tl.program_id(0) * WIDTH
    column = first + tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    inner = tl.arange(0, STEP)
    # Outputs beyond the last are computed from what is there, and not stored.
    read_column = tl.where(column < OUTPUTS, column, 0).to(tl.int64)
    there = row < count
    x_tile = x + row[None, :] * x_stride + inner[:, None]
    weight_tile = weight + read_column[:, None] * weight_stride + inner[None, :]
    own_scales = x_scales + row * x_scale_row_stride
    block_scales = weight_scales + first // GROUP * weight_scale_stride
    sums = tl.zeros([WIDTH, ROWS], tl.float32)
    for start in tl.range(0, INPUTS, STEP, num_stages=STAGES):
        if EVEN:
            weights = tl.load(weight_tile + start)
            rows = tl.load(x_tile + start, mask=there[None, :], other=0.0)
        else:
            inside = start + inner < INPUTS
            weights = tl.load(weight_tile + start, mask=inside[None, :], other=0.0)
            rows = tl.load(x_tile + start, mask=there[None, :] & inside[:, None], other=0.0)
        if BY_BLOCKS:
            group = start // GROUP
            own = tl.load(own_scales + group * x_scale_group_stride, mask=there, other=0.0)
            sums += tl.dot(weights, rows) * (own * tl.load(block_scales + group))[None, :]
        else:
            sums = tl.dot(weights, rows, sums)
    if not BY_BLOCKS:
        own = tl.load(own_scales, mask=there, other=0.0)
        sums *= own[None, :] * tl.load(weight_scales + read_column)[:, None]
    if BIASED:
        sums += tl.load(bias + read_column)[:, None].to(tl.float32)
    place = output + row[None, :].to(tl.int64) * OUTPUTS + column[:, None]
    exists = there[None, :] & (column < OUTPUTS)[:, None]
    tl.store(place, sums.to(output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["count"])
def _block_product(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    output,
    count,
    x_stride,
    x_scale_row_stride,
    x_scale_group_stride,
    weight_stride,
    weight_scale_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the result; a step takes one group of inputs, whose scales are outside its sum.

    Outputs of a tile lie in one block of weights.
    """
    span: tl.constexpr = TOGETHER * ((OUTPUTS + WIDTH - 1) // WIDTH)
    first = tl.program_id(0) // span * TOGETHER
    in_span = tl.program_id(0) % span
    height = tl.minimum(tl.cdiv(count, ROWS) - first, TOGETHER)
    row = (first + in_span % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_output = in_span // height * WIDTH
    column = first_output + tl.arange(0, WIDTH)
    inner = tl.arange(0, GROUP)
    # Rows and outputs beyond the last are computed from what is there, and not stored.
    read_row = tl.where(row < count, row, 0)
    read_column = tl.where(column < OUTPUTS, column, 0).to(tl.int64)
    x_tile = x + read_row[:, None] * x_stride + inner[None, :]
    weight_tile = weight + read_column[None, :] * weight_stride + inner[:, None]
    own_scales = x_scales + read_row * x_scale_row_stride
    block_scales = weight_scales + (first_output // GROUP) * weight_scale_stride
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for group in range(0, INPUTS // GROUP):
        start = group * GROUP
        scale = tl.load(own_scales + group * x_scale_group_stride) * tl.load(block_scales + group)
        part = tl.dot(tl.load(x_tile + start), tl.load(weight_tile + start))
        sums += part * scale[:, None]
    if BIASED:
        sums += tl.load(bias + read_column)[None, :].to(tl.float32)
    place = output + row[:, None] * OUTPUTS + column[None, :]
    exists = (row < count)[:, None] & (column < OUTPUTS)[None, :]
    tl.store(place, sums.to(output.dtype.element_ty), mask=exists)
