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
from ..page_size import PAGE_TOKENS
from ..pages import check_pages

_NORM_ELEMENTS = 2048
_SWIGLU_COLUMNS = 2048
_ROTATED_ROWS = 16
_BYTES_AT_ONCE = 16
_WARP = 32


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(x, x, weight, epsilon, normed, normed, adds=False)
    return normed


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The sum's norm, and the sum."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(normed)
    _launch_norm(x, residual, weight, epsilon, normed, total, adds=True)
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
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    normed: Tensor,
    total: Tensor,
    adds: bool,
) -> None:
    count, hidden = x.shape
    block = int(triton.next_power_of_2(hidden))
    rows = max(1, _NORM_ELEMENTS // block)
    if count:
        _norm[(triton.cdiv(count, rows),)](
            x,
            residual,
            weight,
            normed,
            total,
            x.stride(0),
            residual.stride(0),
            count,
            epsilon,
            ROWS=rows,
            HIDDEN=hidden,
            BLOCK=block,
            ADDS=adds,
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
    total,
    x_stride,
    residual_stride,
    count,
    epsilon,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
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
    tl.store(normed + row * HIDDEN + column, (factors * unit).to(dtype), mask=exists)


@triton.jit
def _swiglu(gate_up, output, row_stride, blocks, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One block of columns of one row."""
    dtype = output.dtype.element_ty
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = column < COLUMNS
    gates = gate_up + row * row_stride + column
    gate = tl.load(gates, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gates + COLUMNS, mask=exists, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(output + row * COLUMNS + column, (activated * up).to(dtype), mask=exists)


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
