"""Scores of a chunk's last queries, summed along columns and diagonals, on a GPU.

Two passes over the keys, a page at a time; a page's scores never leave the multiprocessor. The first
leaves each page's log-sum-exp of every row; the second scores again, and sums what each row gives to
each key. A page is read once for all query heads that share it.
"""

# Triton's language has no types that a checker could follow.
# pyright: basic

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual_chunk.segments import BLOCK_ROWS, SegmentQueries
from ..dual_chunk.triton_prefill import check_layout, page_tiles
from ..pages import LayerPages
from .selections import Sums


@triton.jit
def _tile_logits(
    k, inter, successive, intra, place, exists, tile, positions, first_position, last_position,
    stride, scale, DUAL: tl.constexpr,
):  # fmt: skip
    """Causal logits to the base 2 of one head's rows over one page, [ROWS, 128] float32.

    Rows may lie in two dual chunks, and a page too: each product is made where any pair needs it.
    """
    keys = tile * 128 + tl.arange(0, 128)
    if DUAL:
        successive_end = positions // stride * stride
        inter_end = successive_end - stride
        first_successive_end = first_position // stride * stride
        last_successive_end = last_position // stride * stride
        low, high = tile * 128, tile * 128 + 128
        logits = tl.full([place.shape[0], 128], -float("inf"), tl.float32)
        if low < last_successive_end - stride:
            q = tl.load(inter + place, mask=exists, other=0.0)
            logits = tl.where(keys[None, :] < inter_end[:, None], tl.dot(q, k.T), logits)
        if (high > first_successive_end - stride) & (low < last_successive_end):
            q = tl.load(successive + place, mask=exists, other=0.0)
            where = (keys[None, :] >= inter_end[:, None]) & (
                keys[None, :] < successive_end[:, None]
            )
            logits = tl.where(where, tl.dot(q, k.T), logits)
        if high > first_successive_end:
            q = tl.load(intra + place, mask=exists, other=0.0)
            logits = tl.where(keys[None, :] >= successive_end[:, None], tl.dot(q, k.T), logits)
    else:
        q = tl.load(intra + place, mask=exists, other=0.0)
        logits = tl.dot(q, k.T)
    return tl.where(keys[None, :] <= positions[:, None], logits * scale, -float("inf"))


@triton.jit
def _sums_kernel(
    inter, successive, intra, row_stride, head_stride, kv, table, num_tiles,
    first_position, rows, first_head, num_heads, first_kv_head, kv_heads, stride, scale, heavy,
    page_lse, lse, columns, bands, diagonals,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    DUAL: tl.constexpr, SUMS: tl.constexpr, DIAGONALS: tl.constexpr,
):  # fmt: skip
    """One page and the query heads of one KV head. Without SUMS the first pass, else the second.

    Args:
        page_lse: [heads, tiles, ROWS] out, or lse: [heads, ROWS] in; both to the base 2.
        columns: [heads, tiles * 128]. bands: [heads, tiles, 4], see `band_sums`.
        diagonals: [heads, tiles, 256], see `diagonal_sums`; DIAGONALS only.
    """
    tile = tl.program_id(0)
    kv_head = first_kv_head + tl.program_id(1)
    page = tl.load(table + tile)
    k = kv.load([(page * kv_heads + kv_head) * 256, 0])
    line = tl.arange(0, ROWS)
    exists = line < rows
    positions = first_position + line
    for member in range(GROUP):
        head = kv_head * GROUP + member - first_head
        if (head >= 0) & (head < num_heads):
            place = (
                line[:, None] * row_stride + head * head_stride + tl.arange(0, HEAD_DIM)[None, :]
            )
            logits = _tile_logits(
                k, inter, successive, intra, place, exists[:, None], tile, positions,
                first_position, first_position + rows - 1, stride, scale, DUAL,
            )  # fmt: skip
            cell = head.to(tl.int64) * num_tiles + tile
            if SUMS:
                own = tl.load(lse + head * ROWS + line, mask=exists, other=float("inf"))
                weights = tl.exp2(logits - own[:, None])
                key = tl.arange(0, 128)
                column = tl.sum(weights, 0)
                tl.store(columns + cell * 128 + key, column)
                # Distances from query to key, of which the least is -127 with the last key.
                distance = first_position - tile * 128 + line[:, None] - key[None, :]
                light = tl.where((column < heavy)[None, :], weights, 0.0)
                band = (distance >> 7) - ((first_position - tile * 128 - 127) >> 7)
                row_sums = tl.sum(tl.where(band == 0, light, 0.0), 1)
                tl.store(bands + cell * 4, tl.sum(row_sums, 0))
                row_sums = tl.sum(tl.where(band == 1, light, 0.0), 1)
                tl.store(bands + cell * 4 + 1, tl.sum(row_sums, 0))
                row_sums = tl.sum(tl.where(band == 2, light, 0.0), 1)
                tl.store(bands + cell * 4 + 2, tl.sum(row_sums, 0))
                if DIAGONALS:
                    # Column e of the skewed tile holds row - key == e - 127.
                    wide = tl.arange(0, 256)
                    source = line[:, None] + 127 - wide[None, :]
                    inside = (source >= 0) & (source < 128)
                    skewed = tl.gather(weights, tl.where(inside, source, 0), 1)
                    tl.store(
                        diagonals + cell * 256 + wide, tl.sum(tl.where(inside, skewed, 0.0), 0)
                    )
            else:
                highest = tl.max(logits, 1)
                base = tl.where(highest == -float("inf"), 0.0, highest)
                total = tl.sum(tl.exp2(logits - base[:, None]), 1)
                tl.store(page_lse + cell * ROWS + line, base + tl.log2(total))


@triton.jit
def _combine_kernel(page_lse, lse, num_tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Log-sum-exp over all pages of one head's rows, to the base 2."""
    head = tl.program_id(0)
    line = tl.arange(0, ROWS)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        place = (head.to(tl.int64) * num_tiles + tile)[:, None] * ROWS + line[None, :]
        values = tl.load(page_lse + place, mask=(tile < num_tiles)[:, None], other=-float("inf"))
        risen = tl.maximum(highest, tl.max(values, 0))
        base = tl.where(risen == -float("inf"), 0.0, risen)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(values - base[None, :]), 0)
        highest = risen
    tl.store(lse + head * ROWS + line, highest + tl.log2(total))


def sums(
    queries: SegmentQueries,
    first_position: int,
    pages: LayerPages,
    first_head: int,
    stride: int | None,
    scale: float,
    group: int,
    heavy: float = math.inf,
    diagonals: bool = False,
) -> Sums:
    """As `sums.sums`, for tensors on one GPU."""
    rows, heads, head_dim = queries.intra.shape
    check_layout(queries)
    length = first_position + rows
    num_tiles = -(-length // BLOCK_ROWS)
    padded_rows = max(16, triton.next_power_of_2(rows))
    first_kv_head = first_head // group
    last_kv_head = -(-(first_head + heads) // group)
    device = queries.intra.device

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    page_lse, lse = empty(heads, num_tiles, padded_rows), empty(heads, padded_rows)
    columns, bands = empty(heads, num_tiles * BLOCK_ROWS), empty(heads, num_tiles, 4)
    diagonal_parts = empty(heads, num_tiles, 256) if diagonals else bands

    def score(second_pass: bool) -> None:
        _sums_kernel[(num_tiles, last_kv_head - first_kv_head)](
            queries.inter, queries.successive, queries.intra, *queries.intra.stride()[:2],
            page_tiles(pages.memory), pages.table.on(device), num_tiles,
            first_position, rows, first_head, heads, first_kv_head, pages.num_kv_heads,
            stride or 1, scale * math.log2(math.e), heavy,
            page_lse, lse, columns, bands, diagonal_parts,
            GROUP=group, HEAD_DIM=head_dim, ROWS=padded_rows,
            DUAL=stride is not None, SUMS=second_pass, DIAGONALS=second_pass and diagonals,
            num_warps=4, num_stages=1,
        )  # fmt: skip

    score(second_pass=False)
    _combine_kernel[(heads,)](page_lse, lse, num_tiles, ROWS=padded_rows, TILES=64, num_warps=8)
    score(second_pass=True)
    return Sums(
        columns[:, :length],
        _band_sums(bands, first_position, num_tiles),
        _diagonal_sums(diagonal_parts, first_position, length) if diagonals else None,
        rows,
    )


def _band_sums(parts: Tensor, first_position: int, num_tiles: int) -> Tensor:
    """Add what pages give to each band: page t's part j belongs to band base - t + j."""
    base = (first_position - 127) // BLOCK_ROWS
    result = parts.new_zeros(parts.shape[0], num_tiles + 4)
    for part in range(3):
        # Falling pages are rising bands; bands below 0 hold masked pairs alone.
        rising = parts[:, :, part].flip(1)
        lowest = base - (num_tiles - 1) + part
        start = max(0, -lowest)
        result[:, lowest + start : lowest + num_tiles] += rising[:, start:]
    return result[:, :num_tiles]


def _diagonal_sums(parts: Tensor, first_position: int, length: int) -> Tensor:
    """Add what pages give to each distance: page t's part e is at first - 128 t + e - 127."""
    heads, num_tiles, _ = parts.shape
    rising = parts.flip(1)
    halves = parts.new_zeros(heads, num_tiles + 1, BLOCK_ROWS)
    halves[:, :num_tiles] = rising[:, :, :BLOCK_ROWS]
    halves[:, 1:] += rising[:, :, BLOCK_ROWS:]
    lowest = first_position - (num_tiles - 1) * BLOCK_ROWS - 127
    flat = halves.flatten(1)
    start = max(0, -lowest)
    result = parts.new_zeros(heads, length)
    count = min(length - max(0, lowest), flat.shape[1] - start)
    result[:, max(0, lowest) : max(0, lowest) + count] = flat[:, start : start + count]
    return result
