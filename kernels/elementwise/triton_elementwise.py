# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""The fused kernels; arguments and results are those of the package's functions.

All are bound by memory: each thread moves 16 bytes at once, and every byte is read once and
written once. See docs/kernels/elementwise.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual_chunk.segments import Rotation, SegmentQueries
from ..narrow import Narrowing, NarrowRows
from ..narrow.triton_narrow import empty_rows, row_pieces, row_warps, store_groups
from ..page_size import PAGE_TOKENS
from ..pages import check_pages
from ..triton_scales import e4m3_scale

_NORM_ELEMENTS = 2048
_SWIGLU_COLUMNS = 2048
_ROTATED_ROWS = 16
_BYTES_AT_ONCE = 16
_WARP = 32


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(x, None, weight, epsilon, normed, normed)
    return normed


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The sum's norm, and the sum."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(normed)
    _launch_norm(x, residual, weight, epsilon, normed, total)
    return normed, total


def narrow_rms_norm(x: Tensor, weight: Tensor, epsilon: float, narrowing: Narrowing) -> NarrowRows:
    """The norm, narrowed while the row is in registers."""
    normed = empty_rows(*x.shape, narrowing, x)
    _launch_norm(x, None, weight, epsilon, normed, x, narrowing)
    return normed


def narrow_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, narrowing: Narrowing
) -> tuple[NarrowRows, Tensor]:
    """The sum's norm, narrowed while the row is in registers, and the sum."""
    normed = empty_rows(*x.shape, narrowing, x)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(x, residual, weight, epsilon, normed, total, narrowing)
    return normed, total


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    count, width = gate_up.shape
    columns = width // 2
    output = torch.empty(count, columns, dtype=gate_up.dtype, device=gate_up.device)
    blocks = triton.cdiv(columns, _SWIGLU_COLUMNS)
    if count:
        _swiglu[(count * blocks,)](
            gate_up,
            output,
            gate_up.stride(0),
            blocks,
            COLUMNS=columns,
            BLOCK=_SWIGLU_COLUMNS,
            num_warps=4,
        )
    return output


def narrow_swiglu(gate_up: Tensor, narrowing: Narrowing) -> NarrowRows:
    """silu(gate) * up, narrowed; a row stays in registers until its largest number is known."""
    count, columns = len(gate_up), gate_up.shape[1] // 2
    narrow = empty_rows(count, columns, narrowing, gate_up)
    pieces, by_row = row_pieces(columns), narrowing.group is None
    blocks = 1 if by_row else triton.cdiv(columns, _SWIGLU_COLUMNS)
    if count:
        _narrow_swiglu[(count * blocks,)](
            gate_up,
            narrow.values,
            narrow.scales,
            gate_up.stride(0),
            *narrow.scales.stride(),
            blocks,
            COLUMNS=columns,
            GROUP=narrowing.group or 0,
            FIRST=pieces[0],
            REST=pieces[1],
            SIZE=_SWIGLU_COLUMNS,
            num_warps=row_warps(pieces) if by_row else 4,
        )
    return narrow


def rotate_queries(
    q: Tensor, intra: Rotation, successive: Rotation, inter: Rotation
) -> SegmentQueries:
    """One read of q, and a write for each rotation that is an object of its own."""
    count, heads, head_dim = q.shape
    first = torch.empty_like(q, memory_format=torch.contiguous_format)
    second, third = (
        first if each is intra else torch.empty_like(first) for each in (successive, inter)
    )
    block = min(_ROTATED_ROWS, int(triton.next_power_of_2(heads)))
    blocks = triton.cdiv(heads, block)
    if count:
        _rotate_queries[(count * blocks,)](
            q,
            intra.cosine,
            intra.sine,
            successive.cosine,
            successive.sine,
            inter.cosine,
            inter.sine,
            first,
            second,
            third,
            q.stride(0),
            q.stride(1),
            heads,
            blocks,
            BLOCK=block,
            HALF=head_dim // 2,
            SUCCESSIVE=second is not first,
            INTER=third is not first,
            num_warps=_warps(block * head_dim // 2, q),
        )
    return SegmentQueries(first, second, third)


def write_pages(memory: Tensor, slots: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> None:
    """Rotated K, and V, at the slots."""
    check_pages(memory, pages_apart=True)
    count, kv_heads, head_dim = k.shape
    if count:
        _write_pages[(triton.cdiv(count * kv_heads, _ROTATED_ROWS),)](
            memory,
            slots,
            k,
            v,
            rotation.cosine,
            rotation.sine,
            memory.stride(0),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            count * kv_heads,
            kv_heads,
            BLOCK=_ROTATED_ROWS,
            HALF=head_dim // 2,
            PAGE=PAGE_TOKENS,
            num_warps=_warps(_ROTATED_ROWS * head_dim // 2, k),
        )


def _launch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    epsilon: float,
    normed: Tensor | NarrowRows,
    total: Tensor,
    narrowing: Narrowing | None = None,
) -> None:
    """`total` is written where there is a residual."""
    count, hidden = x.shape
    block = int(triton.next_power_of_2(hidden))
    rows = max(1, _NORM_ELEMENTS // block)
    narrow = isinstance(normed, NarrowRows)
    if count:
        _norm[(triton.cdiv(count, rows),)](
            x,
            x if residual is None else residual,
            weight,
            normed.values if narrow else normed,
            normed.scales if narrow else x,
            total,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            *(normed.scales.stride() if narrow else (0, 0)),
            count,
            epsilon,
            ROWS=rows,
            HIDDEN=hidden,
            BLOCK=block,
            ADDS=residual is not None,
            NARROW=narrow,
            GROUP=block if narrowing is None or narrowing.group is None else narrowing.group,
            num_warps=min(16, 2 * _warps(rows * block // 4, x)),
        )


def _warps(elements: int, tensor: Tensor) -> int:
    """Warps that move so many elements with one access of 16 bytes a thread."""
    return max(1, elements * tensor.element_size() // (_BYTES_AT_ONCE * _WARP))


@triton.jit(do_not_specialize=["count"])
def _norm(
    x,
    residual,
    weight,
    normed,
    scales,
    total,
    x_stride,
    residual_stride,
    scale_row_stride,
    scale_group_stride,
    count,
    epsilon,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    NARROW: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A few whole rows."""
    dtype = x.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    exists = (row < count) & (column < HIDDEN)
    factors = tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    wide = tl.load(x + row * x_stride + column, mask=exists, other=0.0).to(tl.float32)
    if ADDS:
        others = residual + row * residual_stride + column
        wide += tl.load(others, mask=exists, other=0.0).to(tl.float32)
        rounded = wide.to(dtype)
        tl.store(total + row * HIDDEN + column, rounded, mask=exists)
        wide = rounded.to(tl.float32)
    variance = tl.sum(wide * wide, 1, keep_dims=True) / HIDDEN
    unit = (wide * tl.rsqrt(variance + epsilon)).to(dtype).to(tl.float32)
    result = (factors * unit).to(dtype)
    if NARROW:
        grouped = tl.reshape(result.to(tl.float32), [ROWS, BLOCK // GROUP, GROUP])
        scale, reciprocal = e4m3_scale(tl.max(tl.abs(grouped), 2))
        narrow = tl.reshape(grouped * reciprocal[:, :, None], [ROWS, BLOCK]).to(tl.float8e4nv)
        tl.store(normed + row * HIDDEN + column, narrow, mask=exists)
        group = tl.arange(0, BLOCK // GROUP)[None, :]
        place = scales + row * scale_row_stride + group * scale_group_stride
        tl.store(place, scale, mask=(row < count) & (group * GROUP < HIDDEN))
    else:
        tl.store(normed + row * HIDDEN + column, result, mask=exists)


@triton.jit
def _swiglu(gate_up, output, row_stride, blocks, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One block of columns of one row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    activated = _activated(gate_up + row * row_stride, column, COLUMNS)
    tl.store(output + row * COLUMNS + column, activated, mask=column < COLUMNS)


@triton.jit
def _activated(gate_up, column, COLUMNS: tl.constexpr):
    """Some columns of one row, in its type; 0 behind its end."""
    dtype = gate_up.dtype.element_ty
    exists = column < COLUMNS
    gate = tl.load(gate_up + column, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gate_up + COLUMNS + column, mask=exists, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (activated * up).to(dtype)


@triton.jit
def _narrow_swiglu(
    gate_up,
    values,
    scales,
    row_stride,
    scale_row_stride,
    scale_group_stride,
    blocks,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One row, or one block of its columns where groups have scales of their own."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    source = gate_up + row * row_stride
    target = values + row * COLUMNS
    own_scales = scales + row * scale_row_stride
    if GROUP == 0:
        first = _activated(source, tl.arange(0, FIRST), COLUMNS)
        largest = tl.max(tl.abs(first.to(tl.float32)), 0)
        if REST > 0:
            rest = _activated(source, FIRST + tl.arange(0, REST), COLUMNS)
            largest = tl.maximum(largest, tl.max(tl.abs(rest.to(tl.float32)), 0))
        scale, reciprocal = e4m3_scale(largest)
        tl.store(own_scales, scale)
        narrow = (first.to(tl.float32) * reciprocal).to(tl.float8e4nv)
        tl.store(target + tl.arange(0, FIRST), narrow)
        if REST > 0:
            column = FIRST + tl.arange(0, REST)
            narrow_rest = (rest.to(tl.float32) * reciprocal).to(tl.float8e4nv)
            tl.store(target + column, narrow_rest, mask=column < COLUMNS)
    else:
        start = tl.program_id(0) % blocks * SIZE
        activated = _activated(source, start + tl.arange(0, SIZE), COLUMNS).to(tl.float32)
        store_groups(
            activated, target + start, own_scales, start, scale_group_stride, COLUMNS, GROUP, SIZE
        )


@triton.jit
def _store_rotated(target, first, second, cosine, sine, exists, HALF: tl.constexpr):
    """Write both halves of rotated rows; `target` points at the first."""
    dtype = target.dtype.element_ty
    tl.store(target, (first * cosine - second * sine).to(dtype), mask=exists)
    tl.store(target + HALF, (second * cosine + first * sine).to(dtype), mask=exists)


@triton.jit
def _rotate_queries(
    q,
    intra_cosine,
    intra_sine,
    successive_cosine,
    successive_sine,
    inter_cosine,
    inter_sine,
    intra,
    successive,
    inter,
    row_stride,
    head_stride,
    heads,
    blocks,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    SUCCESSIVE: tl.constexpr,
    INTER: tl.constexpr,
):
    """Some heads of one row, which share their angles."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    head = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[:, None]
    column = tl.arange(0, HALF)[None, :]
    exists = head < heads
    source = q + row * row_stride + head * head_stride + column
    first = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=exists, other=0.0).to(tl.float32)
    target = (row * heads + head) * (2 * HALF) + column
    angles = row * HALF + column
    cosine, sine = tl.load(intra_cosine + angles), tl.load(intra_sine + angles)
    _store_rotated(intra + target, first, second, cosine, sine, exists, HALF)
    if SUCCESSIVE:
        cosine, sine = tl.load(successive_cosine + angles), tl.load(successive_sine + angles)
        _store_rotated(successive + target, first, second, cosine, sine, exists, HALF)
    if INTER:
        cosine, sine = tl.load(inter_cosine + angles), tl.load(inter_sine + angles)
        _store_rotated(inter + target, first, second, cosine, sine, exists, HALF)


@triton.jit(do_not_specialize=["rows"])
def _write_pages(
    memory,
    slots,
    k,
    v,
    cosines,
    sines,
    page_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    rows,
    kv_heads,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Some rows of K and V, each one head of one token."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    token = row // kv_heads
    head = row % kv_heads
    slot = tl.load(slots + token, mask=row < rows, other=-1)
    exists = (slot >= 0)[:, None]
    column = tl.arange(0, HALF)[None, :]
    keys = k + (token * k_row_stride + head * k_head_stride)[:, None] + column
    values = v + (token * v_row_stride + head * v_head_stride)[:, None] + column
    angles = token[:, None] * HALF + column
    cosine = tl.load(cosines + angles, mask=exists, other=0.0)
    sine = tl.load(sines + angles, mask=exists, other=0.0)
    first = tl.load(keys, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(keys + HALF, mask=exists, other=0.0).to(tl.float32)
    first_value = tl.load(values, mask=exists, other=0.0)
    second_value = tl.load(values + HALF, mask=exists, other=0.0)
    place = slot // PAGE * page_stride + (head * (2 * PAGE) + slot % PAGE) * (2 * HALF)
    target = memory + place[:, None] + column
    _store_rotated(target, first, second, cosine, sine, exists, HALF)
    target += PAGE * 2 * HALF
    tl.store(target, first_value, mask=exists)
    tl.store(target + HALF, second_value, mask=exists)
