# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""Scores of a chunk's last queries, summed along columns and diagonals, on a GPU.

Two passes over the keys, a page at a time; scores never leave the multiprocessor. The first leaves
the log-sum-exp of every row over each stretch of pages; the second scores again, and sums what each
row gives to each key. Heads that share keys read them at the same time. See
docs/kernels/selection.md.
"""

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual_chunk.segments import BLOCK_ROWS, KeyBounds, SegmentQueries
from ..dual_chunk.triton_prefill import check_layout, page_tiles
from ..pages import LayerPages
from ..transfer import without_waiting
from .selections import HEAVY_ROWS, Sums

_LINES = 64
"""Rows of one product: one warpgroup's."""

_STRETCH = 16
"""Pages that one program takes, at most."""

_INTER, _SUCCESSIVE, _INTRA, _MIXED = range(4)

_FIRST_PASS = {"num_stages": 1, "maxnreg": 128}
_SECOND_PASS = {"num_stages": 1, "maxnreg": 168}
"""So that several programs of four warps share a multiprocessor and hide each other's waits."""


@lru_cache(maxsize=16)
def stretches(first_position: int, rows: int, stride: int | None, device: torch.device) -> Tensor:
    """Which pages belong together: int32 [n, 3] of first page, page after the last, and kind.

    All rows see all keys of a stretch under one rotation, the kind's; a page where that does not
    hold is alone, and mixed. Kept, since every layer of a prefill chunk asks for the same.
    """
    last_position = first_position + rows - 1
    near, far = KeyBounds.of(first_position, stride), KeyBounds.of(last_position, stride)
    page = np.arange(last_position // BLOCK_ROWS + 1)
    start, end = page * BLOCK_ROWS, (page + 1) * BLOCK_ROWS
    kinds = np.full(len(page), _MIXED)
    kinds[end <= near.inter] = _INTER
    kinds[(start >= far.inter) & (end <= near.successive)] = _SUCCESSIVE
    kinds[(start >= far.successive) & (end <= first_position + 1)] = _INTRA
    changes = (np.diff(kinds) != 0) | (kinds[1:] == _MIXED)
    borders = np.concatenate(([0], np.flatnonzero(changes) + 1, [len(page)]))
    lines = [
        (first, min(first + _STRETCH, last), kinds[start])
        for start, last in pairwise(borders)
        for first in range(start, last, _STRETCH)
    ]
    return without_waiting(torch.tensor(np.array(lines), dtype=torch.int32), device)


@triton.jit
def _mixed_logits(
    k, inter, successive, intra, place, exists, page, positions, first_position, last_position,
    stride, DUAL: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Causal logits of rows over one page, [LINES, 128] float32.

    Rows may lie in two dual chunks, and a page too: each product is made where any pair needs it.
    """
    keys = page * 128 + tl.arange(0, 128)
    if DUAL:
        successive_end = positions // stride * stride
        inter_end = successive_end - stride
        first_successive_end = first_position // stride * stride
        last_successive_end = last_position // stride * stride
        low, high = page * 128, page * 128 + 128
        logits = tl.full([LINES, 128], -float("inf"), tl.float32)
        if low < last_successive_end - stride:
            q = tl.load(inter + place, mask=exists, other=0.0)
            logits = tl.where(keys[None, :] < inter_end[:, None], tl.dot(q, k.T), logits)
        if (high > first_successive_end - stride) & (low < last_successive_end):
            q = tl.load(successive + place, mask=exists, other=0.0)
            here = keys[None, :] >= inter_end[:, None]
            here = here & (keys[None, :] < successive_end[:, None])
            logits = tl.where(here, tl.dot(q, k.T), logits)
        if high > first_successive_end:
            q = tl.load(intra + place, mask=exists, other=0.0)
            logits = tl.where(keys[None, :] >= successive_end[:, None], tl.dot(q, k.T), logits)
    else:
        q = tl.load(intra + place, mask=exists, other=0.0)
        logits = tl.dot(q, k.T)
    # Rows that do not exist must not see past the end either, where anything lies.
    seen = keys[None, :] <= tl.minimum(positions, last_position)[:, None]
    return tl.where(seen, logits, -float("inf"))


@triton.jit
def _store_sums(
    logits, own_lse, columns, bands, heavy_columns, diagonals, page, num_pages,
    heads_of_pack, pack_exists, first_position, rows, line, scale, heavy,
    most_of_a_row,
    LINES: tl.constexpr, ROWS: tl.constexpr, HEAVY: tl.constexpr, DIAGONALS: tl.constexpr,
):  # fmt: skip
    """Sum one page's attention, and write the sums.

    Args:
        logits: [128 keys, LINES rows]: this way round, a thread holds most of a key's rows.
    """
    PACK: tl.constexpr = LINES // ROWS
    key = tl.arange(0, 128)
    weights = tl.exp2(logits * scale - own_lse[None, :])
    cell = heads_of_pack.to(tl.int64) * num_pages + page  # [PACK]
    column = tl.sum(tl.reshape(weights, [128, PACK, ROWS]), 2)  # [128, PACK]
    place = columns + cell[None, :] * 128 + key[:, None]
    tl.store(place, column, mask=pack_exists[None, :])
    if DIAGONALS:
        # Column e of the skewed page holds row - key == e - 127.
        wide = tl.arange(0, 256)
        source = line[:, None] + 127 - wide[None, :]
        inside = (source >= 0) & (source < 128)
        skewed = tl.gather(tl.trans(weights), tl.where(inside, source, 0), 1)
        skewed = tl.reshape(tl.where(inside, skewed, 0.0), [PACK, ROWS, 256])
        place = diagonals + cell[:, None] * 256 + wide[None, :]
        tl.store(place, tl.sum(skewed, 1), mask=pack_exists[:, None])
    light = tl.reshape(weights, [128, PACK, ROWS])
    if HEAVY:
        shared = tl.reshape(tl.minimum(weights, most_of_a_row), [128, PACK, ROWS])
        is_light = tl.sum(shared, 2) < heavy
        place = heavy_columns + cell[None, :] * 128 + key[:, None]
        tl.store(place, tl.where(is_light, 0.0, column), mask=pack_exists[None, :])
        column = tl.where(is_light, column, 0.0)
        light = tl.where(is_light[:, :, None], light, 0.0)
    # Distances are 128 * (first page of rows - page) + offset; offsets of a page lie in
    # [-127, 190], so a page gives to three neighbouring bands, and mostly to two.
    phase = first_position % 128
    offset = tl.reshape(phase + line[None, :] - key[:, None], [128, PACK, ROWS])
    below = tl.sum(tl.sum(tl.where(offset < 0, light, 0.0), 2), 0)
    above = tl.zeros([PACK], tl.float32)
    if phase + rows > 128:
        above = tl.sum(tl.sum(tl.where(offset >= 128, light, 0.0), 2), 0)
    tl.store(bands + cell * 4, below, mask=pack_exists)
    tl.store(bands + cell * 4 + 1, tl.sum(column, 0) - below - above, mask=pack_exists)
    tl.store(bands + cell * 4 + 2, above, mask=pack_exists)


@triton.jit(do_not_specialize=["num_stretches", "num_pages", "first_position", "rows"])
def _sums_kernel(
    inter, successive, intra, row_stride, head_stride, kv, table, work, num_stretches, num_pages,
    first_position, rows, first_head, num_heads, first_kv_head, kv_heads, stride, scale, heavy,
    most_of_a_row,
    stretch_lse, lse, columns, bands, heavy_columns, diagonals,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr,
    DUAL: tl.constexpr, SUMS: tl.constexpr, HEAVY: tl.constexpr, DIAGONALS: tl.constexpr,
):  # fmt: skip
    """One stretch of pages, and some of the query heads that share a KV head.

    Args:
        stretch_lse: [heads, stretches, ROWS] out, in the first pass; lse: [heads, ROWS] in, in the
            second, SUMS; both to the base 2.
        columns, heavy_columns: [heads, pages * 128]. bands: [heads, pages, 4], see `_band_sums`.
        diagonals: [heads, pages, 256], see `_diagonal_sums`; DIAGONALS only.
    """
    PACK: tl.constexpr = LINES // ROWS
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    # Heads that share a page are neighbours in the grid, so that it is read from memory once.
    kv_head = first_kv_head + tl.program_id(0) // PACKS
    first_member = tl.program_id(0) % PACKS * PACK
    stretch = tl.program_id(1)
    first, last = tl.load(work + stretch * 3), tl.load(work + stretch * 3 + 1)
    kind = tl.load(work + stretch * 3 + 2)

    in_pack = tl.arange(0, PACK)
    heads_of_pack = kv_head * GROUP + first_member + in_pack - first_head
    pack_exists = (first_member + in_pack < GROUP) & (heads_of_pack >= 0)
    pack_exists = pack_exists & (heads_of_pack < num_heads)
    row = tl.arange(0, LINES)
    line = row % ROWS
    member = first_member + row // ROWS
    head = kv_head * GROUP + member - first_head
    exists = (member < GROUP) & (head >= 0) & (head < num_heads) & (line < rows)
    positions = first_position + line
    last_position = first_position + rows - 1
    place = (line * row_stride + head * head_stride)[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    if SUMS:
        own_lse = tl.load(lse + head * ROWS + line, mask=exists, other=float("inf"))

    highest = tl.full([LINES], -float("inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    if kind == 3:
        k = kv.load([(tl.load(table + first) * kv_heads + kv_head) * 256, 0])
        logits = _mixed_logits(
            k, inter, successive, intra, place, exists[:, None], first, positions,
            first_position, last_position, stride, DUAL, LINES,
        )  # fmt: skip
        if SUMS:
            _store_sums(
                tl.trans(logits), own_lse, columns, bands, heavy_columns, diagonals, first,
                num_pages, heads_of_pack, pack_exists, first_position, rows, line, scale, heavy,
                most_of_a_row,
                LINES, ROWS, HEAVY, DIAGONALS,
            )  # fmt: skip
        else:
            highest = tl.max(logits, 1) * scale
            base = tl.where(highest == -float("inf"), 0.0, highest)
            total = tl.sum(tl.exp2(logits * scale - base[:, None]), 1)
    else:
        queries = inter
        if kind == 1:
            queries = successive
        if kind == 2:
            queries = intra
        q = tl.load(queries + place, mask=exists[:, None], other=0.0)
        number = tl.load(table + first)
        for page in range(first, last):
            k = kv.load([(number * kv_heads + kv_head) * 256, 0])
            number = tl.load(table + page + 1, mask=page + 1 < last, other=0)
            if SUMS:
                _store_sums(
                    tl.dot(k, q.T), own_lse, columns, bands, heavy_columns, diagonals, page,
                    num_pages, heads_of_pack, pack_exists, first_position, rows, line, scale, heavy,
                    most_of_a_row,
                    LINES, ROWS, HEAVY, DIAGONALS,
                )  # fmt: skip
            else:
                logits = tl.dot(q, k.T)
                risen = tl.maximum(highest, tl.max(logits, 1) * scale)
                weights = tl.exp2(logits * scale - risen[:, None])
                total = total * tl.exp2(highest - risen) + tl.sum(weights, 1)
                highest = risen
    if not SUMS:
        cell = (head.to(tl.int64) * num_stretches + stretch) * ROWS + line
        # A row that sees nothing of a mixed page has -inf, and log2(0) besides.
        tl.store(stretch_lse + cell, highest + tl.log2(tl.maximum(total, 1e-30)), mask=exists)


@triton.jit(do_not_specialize=["num_stretches", "rows"])
def _combine_kernel(
    stretch_lse, lse, num_stretches, rows, ROWS: tl.constexpr, STRETCHES: tl.constexpr
):  # fmt: skip
    """Log-sum-exp over all stretches of one head's rows, to the base 2."""
    head = tl.program_id(0)
    line = tl.arange(0, ROWS)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_stretches, STRETCHES):
        stretch = first + tl.arange(0, STRETCHES)
        place = (head.to(tl.int64) * num_stretches + stretch)[:, None] * ROWS + line[None, :]
        here = (stretch < num_stretches)[:, None] & (line < rows)[None, :]
        values = tl.load(stretch_lse + place, mask=here, other=-float("inf"))
        risen = tl.maximum(highest, tl.max(values, 0))
        base = tl.where(risen == -float("inf"), 0.0, risen)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(values - base[None, :]), 0)
        highest = risen
    tl.store(lse + head * ROWS + line, highest + tl.log2(total), mask=line < rows)


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
    """As the package's `sums`, for tensors on one GPU."""
    rows, heads, head_dim = queries.intra.shape
    check_layout(queries)
    if rows > _LINES:
        raise ValueError(f"{rows} rows are more than the {_LINES} that can be scored at once")
    # Scores only rank, so they may be made of what the tensor cores take.
    inter, successive, intra = (
        each.to(pages.memory.dtype) for each in (queries.inter, queries.successive, queries.intra)
    )
    length = first_position + rows
    num_pages = -(-length // BLOCK_ROWS)
    padded_rows = max(16, int(triton.next_power_of_2(rows)))
    packs = -(-group // (_LINES // padded_rows))
    first_kv_head = first_head // group
    last_kv_head = -(-(first_head + heads) // group)
    device = queries.intra.device
    work = stretches(first_position, rows, stride, device)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    stretch_lse, lse = empty(heads, len(work), padded_rows), empty(heads, padded_rows)
    columns, bands = empty(heads, num_pages * BLOCK_ROWS), empty(heads, num_pages, 4)
    is_asked = heavy < math.inf
    heavy_columns = torch.empty_like(columns) if is_asked else columns
    diagonal_parts = empty(heads, num_pages, 256) if diagonals else bands

    def score(second_pass: bool) -> None:
        _sums_kernel[((last_kv_head - first_kv_head) * packs, len(work))](
            inter, successive, intra, *intra.stride()[:2],
            page_tiles(pages.memory), pages.table.on(device), work, len(work), num_pages,
            first_position, rows, first_head, heads, first_kv_head, pages.num_kv_heads,
            stride or 1, scale * math.log2(math.e), heavy, heavy / HEAVY_ROWS,
            stretch_lse, lse, columns, bands, heavy_columns, diagonal_parts,
            GROUP=group, HEAD_DIM=head_dim, LINES=_LINES, ROWS=padded_rows, DUAL=stride is not None,
            SUMS=second_pass, HEAVY=is_asked, DIAGONALS=diagonals,
            num_warps=4, **(_SECOND_PASS if second_pass else _FIRST_PASS),
        )  # fmt: skip

    score(second_pass=False)
    _combine_kernel[(heads,)](
        stretch_lse, lse, len(work), rows, ROWS=padded_rows, STRETCHES=64, num_warps=8
    )
    score(second_pass=True)
    return Sums(
        columns[:, :length],
        _band_sums(bands, first_position, num_pages),
        heavy_columns[:, :length] if is_asked else None,
        _diagonal_sums(diagonal_parts, first_position, length) if diagonals else None,
        rows,
    )


def _band_sums(parts: Tensor, first_position: int, num_pages: int) -> Tensor:
    """Add what pages give to each band."""
    bands = torch.empty(len(parts), num_pages, dtype=torch.float32, device=parts.device)
    _add_bands[(triton.cdiv(num_pages, 1024), len(parts))](
        parts, bands, first_position // BLOCK_ROWS - 1, num_pages, BANDS=1024, num_warps=4
    )
    return bands


@triton.jit(do_not_specialize=["base", "num_pages"])
def _add_bands(parts, bands, base, num_pages, BANDS: tl.constexpr):
    """Page t's part j belongs to band base - t + j; bands below 0 hold masked pairs alone."""
    head = tl.program_id(1).to(tl.int64)
    band = tl.program_id(0) * BANDS + tl.arange(0, BANDS)
    total = tl.zeros([BANDS], tl.float32)
    for part in range(3):
        page = base - band + part
        here = (page >= 0) & (page < num_pages)
        total += tl.load(parts + (head * num_pages + page) * 4 + part, mask=here, other=0.0)
    tl.store(bands + head * num_pages + band, total, mask=band < num_pages)


def _diagonal_sums(parts: Tensor, first_position: int, length: int) -> Tensor:
    """Add what pages give to each distance: page t's part e is at first - 128 t + e - 127."""
    heads, num_pages, _ = parts.shape
    rising = parts.flip(1)
    halves = parts.new_zeros(heads, num_pages + 1, BLOCK_ROWS)
    halves[:, :num_pages] = rising[:, :, :BLOCK_ROWS]
    halves[:, 1:] += rising[:, :, BLOCK_ROWS:]
    lowest = first_position - (num_pages - 1) * BLOCK_ROWS - 127
    flat = halves.flatten(1)
    start = max(0, -lowest)
    result = parts.new_zeros(heads, length)
    count = min(length - max(0, lowest), flat.shape[1] - start)
    result[:, max(0, lowest) : max(0, lowest) + count] = flat[:, start : start + count]
    return result
