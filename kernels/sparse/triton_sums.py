# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""Scores of a chunk's last queries, summed along columns and diagonals, on a GPU.

Two passes over the keys, a page at a time; scores never leave the multiprocessor. The first leaves
the log-sum-exp of every row over each stretch of pages; the second scores again, and sums what each
row gives to each key. Heads that share keys read them at the same time. See
docs/kernels/selection.md.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dual_chunk.segments import BLOCK_ROWS, KeyBounds, SegmentQueries
from ..dual_chunk.triton_prefill import check_layout, page_tiles
from ..pages import LayerPages
from ..transfer import without_waiting
from . import scores
from .scores import KeyPart, PartSums
from .selections import HEAVY_ROWS

_LINES = 64
"""Rows of one product: one warpgroup's."""

_STRETCH = 16
"""Pages that one program takes, at most."""

_INTER, _SUCCESSIVE, _INTRA, _MIXED = range(4)

_FIRST_PASS = {"num_stages": 1, "maxnreg": 128}
_SECOND_PASS = {"num_stages": 1, "maxnreg": 168}
"""So that several programs of four warps share a multiprocessor and hide each other's waits."""


def stretches(first_position: int, rows: int, stride: int | None) -> npt.NDArray[np.int32]:
    """Which pages belong together: [n, 3] of first page, page after the last, and kind.

    All rows see all keys of a stretch under one rotation, the kind's; a page where that does not
    hold is alone, and mixed.
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
    return np.array(lines, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class _Work:
    """One part of the stretches, on the host and on the device, and how many there are in all."""

    lines: npt.NDArray[np.int32]
    table: Tensor
    total: int

    @property
    def first_page(self) -> int:
        return int(self.lines[0, 0]) if len(self.lines) else 0

    @property
    def num_pages(self) -> int:
        return int(self.lines[-1, 1]) - self.first_page if len(self.lines) else 0


@lru_cache(maxsize=64)
def _work(
    first_position: int, rows: int, stride: int | None, part: KeyPart, device: torch.device
) -> _Work:
    """Kept, since every layer of a prefill chunk asks for the same."""
    every = stretches(first_position, rows, stride)
    lines = every[part.of(len(every))]
    table = without_waiting(torch.from_numpy(np.ascontiguousarray(lines)), device)
    return _Work(lines, table, len(every))


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
        page: counted from the first one whose sums are wanted, of which there are `num_pages`.
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


@triton.jit(
    do_not_specialize=["num_stretches", "first_page", "num_pages", "first_position", "rows"]
)
def _sums_kernel(
    inter, successive, intra, row_stride, head_stride, kv, table, work, num_stretches,
    first_page, num_pages, first_position, rows, first_head, num_heads, first_kv_head, kv_heads,
    stride, scale, heavy, most_of_a_row,
    stretch_lse, lse, columns, bands, heavy_columns, diagonals,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr,
    DUAL: tl.constexpr, SUMS: tl.constexpr, HEAVY: tl.constexpr, DIAGONALS: tl.constexpr,
):  # fmt: skip
    """One stretch of pages, and some of the query heads that share a KV head.

    Args:
        stretch_lse: [heads, stretches, ROWS] out, in the first pass; lse: [heads, ROWS] in, in the
            second, SUMS; both to the base 2.
        columns, heavy_columns: [heads, num_pages * 128], from `first_page` on.
        bands: [heads, num_pages, 4], see `_band_sums`.
        diagonals: [heads, num_pages, 256], see `_diagonal_sums`; DIAGONALS only.
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
                tl.trans(logits), own_lse, columns, bands, heavy_columns, diagonals,
                first - first_page, num_pages, heads_of_pack, pack_exists, first_position, rows,
                line, scale, heavy, most_of_a_row,
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
                    tl.dot(k, q.T), own_lse, columns, bands, heavy_columns, diagonals,
                    page - first_page, num_pages, heads_of_pack, pack_exists, first_position, rows,
                    line, scale, heavy, most_of_a_row,
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


class KeyScores(scores.KeyScores):
    """As the package's `key_scores`, for tensors on one GPU."""

    def __init__(
        self,
        queries: SegmentQueries,
        first_position: int,
        pages: LayerPages,
        first_head: int,
        stride: int | None,
        scale: float,
        group: int,
        part: KeyPart,
    ) -> None:
        self._rows, self._heads, self._head_dim = queries.intra.shape
        check_layout(queries)
        if self._rows > _LINES:
            raise ValueError(
                f"{self._rows} rows are more than the {_LINES} that can be scored at once"
            )
        # Scores only rank, so they may be made of what the tensor cores take.
        self._queries = tuple(
            each.to(pages.memory.dtype)
            for each in (queries.inter, queries.successive, queries.intra)
        )
        self._first_position, self._pages, self._first_head = first_position, pages, first_head
        self._stride, self._scale, self._group, self._part = stride, scale, group, part
        self._length = first_position + self._rows
        self._padded_rows = max(16, int(triton.next_power_of_2(self._rows)))
        self._device = queries.intra.device
        self._work = _work(first_position, self._rows, stride, part, self._device)

    @property
    def num_rows(self) -> int:
        return self._rows

    @property
    def first_key(self) -> int:
        return self._work.first_page * BLOCK_ROWS

    @property
    def num_keys(self) -> int:
        end = (self._work.first_page + self._work.num_pages) * BLOCK_ROWS
        return min(end, self._length) - self.first_key if self._work.num_pages else 0

    def counts(self) -> list[int]:
        return self._part.counts(self._work.total)

    def log_sum_exps(self) -> Tensor:
        lse = self._empty(self._heads, len(self._work.lines), self._padded_rows)
        if self._padded_rows > self._rows:
            lse.fill_(-torch.inf)
        self._score(stretch_lse=lse)
        return lse

    def sums(
        self,
        every: Tensor,
        heavy: float = math.inf,
        diagonals: bool = False,
        bands: bool = True,
    ) -> PartSums:
        # Those of bands come with the columns, and cost nothing to speak of.
        lse = self._empty(self._heads, self._padded_rows)
        _combine_kernel[(self._heads,)](
            every, lse, every.shape[1], self._rows,
            ROWS=self._padded_rows, STRETCHES=64, num_warps=8,
        )  # fmt: skip
        pages = self._work.num_pages
        columns = self._empty(self._heads, pages * BLOCK_ROWS)
        page_bands = self._empty(self._heads, pages, 4)
        heavy_columns = torch.empty_like(columns) if heavy < math.inf else None
        parts = self._empty(self._heads, pages, 256) if diagonals else None
        self._score(
            lse=lse, columns=columns, bands=page_bands, heavy_columns=heavy_columns,
            diagonals=parts, heavy=heavy,
        )  # fmt: skip
        return PartSums(
            columns[:, : self.num_keys],
            self._band_sums(page_bands),
            None if heavy_columns is None else heavy_columns[:, : self.num_keys],
            None if parts is None else _diagonal_sums(parts, self._first_position, self._length),
        )

    def _score(
        self,
        stretch_lse: Tensor | None = None,
        lse: Tensor | None = None,
        columns: Tensor | None = None,
        bands: Tensor | None = None,
        heavy_columns: Tensor | None = None,
        diagonals: Tensor | None = None,
        heavy: float = math.inf,
    ) -> None:
        """The first pass, which wants memory for `stretch_lse`, or the second, for all else.

        What one pass does not touch is a tensor that it does.
        """
        count = len(self._work.lines)
        if count == 0:
            return
        second_pass = stretch_lse is None
        any_memory = stretch_lse if lse is None else lse
        first_kv_head = self._first_head // self._group
        last_kv_head = -(-(self._first_head + self._heads) // self._group)
        packs = -(-self._group // (_LINES // self._padded_rows))
        memory = [
            any_memory if each is None else each
            for each in (stretch_lse, lse, columns, bands, heavy_columns, diagonals)
        ]
        _sums_kernel[((last_kv_head - first_kv_head) * packs, count)](
            *self._queries, *self._queries[-1].stride()[:2],
            page_tiles(self._pages.memory), self._pages.table.on(self._device),
            self._work.table, count, self._work.first_page, self._work.num_pages,
            self._first_position, self._rows, self._first_head, self._heads, first_kv_head,
            self._pages.num_kv_heads, self._stride or 1, self._scale * math.log2(math.e), heavy,
            heavy / HEAVY_ROWS, *memory,
            GROUP=self._group, HEAD_DIM=self._head_dim, LINES=_LINES, ROWS=self._padded_rows,
            DUAL=self._stride is not None, SUMS=second_pass, HEAVY=heavy_columns is not None,
            DIAGONALS=diagonals is not None,
            num_warps=4, **(_SECOND_PASS if second_pass else _FIRST_PASS),
        )  # fmt: skip

    def _band_sums(self, parts: Tensor) -> Tensor:
        """What this part's pages give to every band."""
        count = -(-self._length // BLOCK_ROWS)
        bands = self._empty(self._heads, count)
        base = self._first_position // BLOCK_ROWS - 1 - self._work.first_page
        _add_bands[(triton.cdiv(count, 1024), self._heads)](
            parts, bands, base, self._work.num_pages, count, BANDS=1024, num_warps=4
        )
        return bands

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._device)


@triton.jit(do_not_specialize=["base", "num_pages", "num_bands"])
def _add_bands(parts, bands, base, num_pages, num_bands, BANDS: tl.constexpr):
    """Page t's part j belongs to band base - t + j; bands below 0 hold masked pairs alone."""
    head = tl.program_id(1).to(tl.int64)
    band = tl.program_id(0) * BANDS + tl.arange(0, BANDS)
    total = tl.zeros([BANDS], tl.float32)
    for part in range(3):
        page = base - band + part
        here = (page >= 0) & (page < num_pages)
        total += tl.load(parts + (head * num_pages + page) * 4 + part, mask=here, other=0.0)
    tl.store(bands + head * num_bands + band, total, mask=band < num_bands)


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
