# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""The kernels; arguments and results are those of the package's functions.

All are bound by memory: every byte is read once and written once.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..dual_chunk.segments import Rotation
from ..page_size import PAGE_TOKENS
from ..triton_scales import scale_for


def narrow_pages(
    memory: Tensor, scales: Tensor, pages: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> None:
    """Whole pages, each with a scale of its own."""
    count, kv_heads, head_dim = k.shape
    if count:
        _narrow_pages[(triton.cdiv(count, PAGE_TOKENS) * kv_heads,)](
            memory,
            scales,
            pages,
            *_operands(memory, scales, k, v, rotation),
            count,
            kv_heads,
            HALF=head_dim // 2,
            PAGE=PAGE_TOKENS,
            num_warps=8,
        )


def narrow_blocks(
    memory: Tensor, scales: Tensor, blocks: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> None:
    """As `narrow_pages`; blocks say which rows are theirs."""
    count, kv_heads, head_dim = k.shape
    if count:
        _narrow_blocks[(len(blocks) * kv_heads,)](
            memory,
            scales,
            blocks,
            *_operands(memory, scales, k, v, rotation),
            kv_heads,
            HALF=head_dim // 2,
            PAGE=PAGE_TOKENS,
            num_warps=8,
        )


def append_tokens(
    memory: Tensor, scales: Tensor, slots: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> None:
    """One row of each page; the rows before it are scaled anew where they have to be."""
    count, kv_heads, head_dim = k.shape
    if count:
        _append_tokens[(count * kv_heads,)](
            memory,
            scales,
            slots,
            *_operands(memory, scales, k, v, rotation),
            kv_heads,
            HALF=head_dim // 2,
            PAGE=PAGE_TOKENS,
            num_warps=4,
        )


def _operands(
    memory: Tensor, scales: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> tuple[Tensor | int, ...]:
    """What both kernels that write pages take in, and how far apart it lies."""
    apart = (memory.stride(0), scales.stride(0), *k.stride()[:2], *v.stride()[:2])
    return k, v, rotation.cosine, rotation.sine, *apart


def widen_pages(memory: Tensor, scales: Tensor, table: Tensor, out: Tensor) -> None:
    """Values times scales."""
    count, kv_heads, _, _, head_dim = out.shape
    if count:
        _widen_pages[(count * kv_heads * 2,)](
            memory,
            scales,
            table,
            out,
            memory.stride(0),
            scales.stride(0),
            kv_heads * 2,
            SIZE=PAGE_TOKENS * head_dim,
            num_warps=8,
        )


@triton.jit
def _store_page(target, first, second, scale_place, HALF: tl.constexpr):
    """Both halves of a page's rows, and the page's scale."""
    largest = tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second)))
    scale, reciprocal = scale_for(largest)
    tl.store(scale_place, scale)
    dtype = target.dtype.element_ty
    tl.store(target, (first * reciprocal).to(dtype))
    tl.store(target + HALF, (second * reciprocal).to(dtype))


@triton.jit
def _narrow_page(
    memory, scales, k, v, cosines, sines, page_stride, scale_stride,
    k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    page, head, first_token, end, HALF: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One head of one page, whose rows are tokens [first_token, end); beyond them are zeros."""
    row = tl.arange(0, PAGE)[:, None]
    token = first_token + row
    column = tl.arange(0, HALF)[None, :]
    exists = token < end
    target = memory + page * page_stride + (head * (2 * PAGE) + row) * (2 * HALF) + column
    scale_place = scales + page * scale_stride + head * 2

    keys = k + token * k_row_stride + head * k_head_stride + column
    first = tl.load(keys, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(keys + HALF, mask=exists, other=0.0).to(tl.float32)
    angles = token * HALF + column
    cosine = tl.load(cosines + angles, mask=exists, other=0.0)
    sine = tl.load(sines + angles, mask=exists, other=0.0)
    turned_first = first * cosine - second * sine
    turned_second = second * cosine + first * sine
    _store_page(target, turned_first, turned_second, scale_place, HALF)

    values = v + token * v_row_stride + head * v_head_stride + column
    first = tl.load(values, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(values + HALF, mask=exists, other=0.0).to(tl.float32)
    _store_page(target + PAGE * 2 * HALF, first, second, scale_place + 1, HALF)


@triton.jit(do_not_specialize=["count"])
def _narrow_pages(
    memory, scales, pages, k, v, cosines, sines, page_stride, scale_stride,
    k_row_stride, k_head_stride, v_row_stride, v_head_stride, count, kv_heads,
    HALF: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One head of one page."""
    block = tl.program_id(0) // kv_heads
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    _narrow_page(
        memory, scales, k, v, cosines, sines, page_stride, scale_stride,
        k_row_stride, k_head_stride, v_row_stride, v_head_stride,
        tl.load(pages + block), head, block.to(tl.int64) * PAGE, count, HALF, PAGE,
    )  # fmt: skip


@triton.jit
def _narrow_blocks(
    memory, scales, blocks, k, v, cosines, sines, page_stride, scale_stride,
    k_row_stride, k_head_stride, v_row_stride, v_head_stride, kv_heads,
    HALF: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One head of one block."""
    block = blocks + tl.program_id(0) // kv_heads * 3
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    first = tl.load(block + 1).to(tl.int64)
    count = tl.load(block + 2)
    if count > 0:
        _narrow_page(
            memory, scales, k, v, cosines, sines, page_stride, scale_stride,
            k_row_stride, k_head_stride, v_row_stride, v_head_stride,
            tl.load(block).to(tl.int64), head, first, first + count, HALF, PAGE,
        )  # fmt: skip


@triton.jit
def _append_row(
    rows, offset, first, second, scale_place, column, HALF: tl.constexpr, PAGE: tl.constexpr
):
    """Put one row behind `offset` others; `rows` points at the first element of the page's."""
    largest = tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second)))
    scale, reciprocal = scale_for(largest)
    dtype = rows.dtype.element_ty
    if offset > 0:
        before = tl.load(scale_place)
        # No warp may put the new scale there before all have read the old one.
        tl.debug_barrier()
        if scale > before:
            row = tl.arange(0, PAGE)[:, None]
            every = tl.arange(0, 2 * HALF)[None, :]
            held = rows + row * (2 * HALF) + every
            values = tl.load(held, mask=row < offset, other=0.0).to(tl.float32)
            tl.store(held, (values * (before / scale)).to(dtype), mask=row < offset)
        else:
            scale, reciprocal = before, 1.0 / before
    tl.store(scale_place, scale)
    target = rows + offset * (2 * HALF) + column
    tl.store(target, (first * reciprocal).to(dtype))
    tl.store(target + HALF, (second * reciprocal).to(dtype))


@triton.jit
def _append_tokens(
    memory,
    scales,
    slots,
    k,
    v,
    cosines,
    sines,
    page_stride,
    scale_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    kv_heads,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One head of one token."""
    token = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    column = tl.arange(0, HALF)
    slot = tl.load(slots + token)
    if slot >= 0:
        page = slot // PAGE
        offset = slot % PAGE
        rows = memory + page * page_stride + head * (4 * PAGE * HALF)
        scale_place = scales + page * scale_stride + head * 2

        keys = k + token * k_row_stride + head * k_head_stride + column
        first = tl.load(keys).to(tl.float32)
        second = tl.load(keys + HALF).to(tl.float32)
        cosine = tl.load(cosines + token * HALF + column)
        sine = tl.load(sines + token * HALF + column)
        turned_first = first * cosine - second * sine
        turned_second = second * cosine + first * sine
        _append_row(rows, offset, turned_first, turned_second, scale_place, column, HALF, PAGE)

        values = v + token * v_row_stride + head * v_head_stride + column
        first = tl.load(values).to(tl.float32)
        second = tl.load(values + HALF).to(tl.float32)
        rows += PAGE * 2 * HALF
        _append_row(rows, offset, first, second, scale_place + 1, column, HALF, PAGE)


@triton.jit
def _widen_pages(memory, scales, table, out, page_stride, scale_stride, halves, SIZE: tl.constexpr):
    """K or V of one head of one page."""
    index = (tl.program_id(0) // halves).to(tl.int64)
    half = (tl.program_id(0) % halves).to(tl.int64)
    page = tl.load(table + index).to(tl.int64)
    element = tl.arange(0, SIZE)
    values = tl.load(memory + page * page_stride + half * SIZE + element)
    scale = tl.load(scales + page * scale_stride + half)
    target = out + tl.program_id(0).to(tl.int64) * SIZE + element
    tl.store(target, (values.to(tl.float32) * scale).to(out.dtype.element_ty))
