"""Which keys a chunk's last queries look at, summed along columns and diagonals, in plain PyTorch.

The estimate that vertical-slash selection rests on (MInference, arXiv 2407.02490): column sums find
verticals, keys that everybody looks at; sums along diagonals find slashes, distances that everybody
looks back.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dual_chunk.segments import BLOCK_ROWS, KeyBounds, SegmentQueries, Span, split_at_chunks
from ..page_size import PAGE_TOKENS
from ..pages import LayerPages
from . import scores
from .scores import KeyPart, PartSums
from .selections import HEAVY_ROWS

_SCORES_AT_ONCE = 2**18
"""Of all rows with some keys: 1 MB in float32, which a CPU's caches hold."""


class KeyScores(scores.KeyScores):
    """As the package's `key_scores`, for tensors on any device, and for up to 128 rows.

    A part is one stretch, of whole pages.
    """

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
        self._rows, self._num_heads, _ = queries.intra.shape
        self._part, self._length = part, first_position + self._rows
        own = part.of(-(-self._length // BLOCK_ROWS))
        self._keys = range(own.start * BLOCK_ROWS, min(own.stop * BLOCK_ROWS, self._length))
        if self._rows > BLOCK_ROWS:
            raise ValueError(f"{self._rows} rows are more than the {BLOCK_ROWS} of a band")
        # Query heads that share keys are rows of one product.
        borders = [0, *range(group - first_head % group, self._num_heads, group), self._num_heads]
        self._heads = [slice(first, last) for first, last in itertools.pairwise(borders)]
        self._scorers = [
            _Scorer(
                queries.heads(heads), first_position, pages, (first_head + heads.start) // group,
                stride, scale, self._keys,
            )
            for heads in self._heads
        ]  # fmt: skip

    @property
    def num_rows(self) -> int:
        return self._rows

    @property
    def first_key(self) -> int:
        return self._keys.start

    @property
    def num_keys(self) -> int:
        return len(self._keys)

    def counts(self) -> list[int]:
        return [1] * self._part.parts

    def log_sum_exps(self) -> Tensor:
        lse = [scorer.log_sum_exp().transpose(1, 2) for scorer in self._scorers]
        return torch.cat(lse)

    def sums(
        self,
        every: Tensor,
        heavy: float = math.inf,
        diagonals: bool = False,
        bands: bool = True,
    ) -> PartSums:
        lse = _log_sum_exp2(every)[..., None]  # [heads, rows, 1]
        parts = [
            scorer.sums(lse[heads], heavy, diagonals, bands)
            for heads, scorer in zip(self._heads, self._scorers, strict=True)
        ]
        heavy_columns = [part.heavy_columns for part in parts if part.heavy_columns is not None]
        every_diagonal = [part.diagonals for part in parts if part.diagonals is not None]
        return PartSums(
            torch.cat([part.columns for part in parts]),
            torch.cat([part.bands for part in parts]),
            torch.cat(heavy_columns) if heavy < math.inf else None,
            torch.cat(every_diagonal) if diagonals else None,
        )


def _log_sum_exp2(every: Tensor) -> Tensor:
    """Over all stretches, to the base 2: [heads, stretches, rows] to [heads, rows]."""
    lse = every[:, 0]
    for stretch in range(1, every.shape[1]):
        lse = torch.logaddexp2(lse, every[:, stretch])
    return lse


@dataclass(frozen=True)
class _Segment:
    """Query rows [first_row, last_row) of every head, rotated for keys [start, end)."""

    first_row: int
    last_row: int
    queries: Tensor  # [heads * (last_row - first_row), d]
    start: int
    end: int


class _Scorer:
    """Scores the last queries against all keys, a few thousand keys at a time.

    Scores are in the keys' type, since they only rank, and to the base 2, since powers of two are
    three times as fast as those of e in PyTorch on a CPU.
    """

    def __init__(
        self,
        queries: SegmentQueries,
        first_position: int,
        pages: LayerPages,
        kv_head: int,
        stride: int | None,
        scale: float,
        scored: range,
    ) -> None:
        """`scored` are the keys that are looked at."""
        self._rows, self._heads, _ = queries.intra.shape
        self._first, self._scored = first_position, scored
        self._length = first_position + self._rows
        self._bands = -(-self._length // BLOCK_ROWS)
        self._pages, self._kv_head = pages, kv_head
        scale *= math.log2(math.e)
        self._segments = [
            replace(segment, queries=segment.queries.to(pages.dtype))
            for segment in _segments(queries, first_position, stride, scale)
        ]
        self._device = queries.intra.device
        pages_at_once = max(1, _SCORES_AT_ONCE // (self._heads * self._rows * PAGE_TOKENS))
        self._keys_at_once = pages_at_once * PAGE_TOKENS
        most_keys = min(self._keys_at_once, len(scored))
        size = self._heads * self._rows * most_keys
        self._products = torch.empty(size, dtype=pages.dtype, device=self._device)
        self._scores = torch.empty(size, device=self._device)

    def log_sum_exp(self) -> Tensor:
        """Of all keys of each query, to the base 2, [heads, rows, 1]."""
        lse = torch.full((self._heads, self._rows, 1), -torch.inf, device=self._device)
        for start, end in self._ranges():
            scores = self._score(start, end)
            # A row may see no key of a range; any finite number will do for it then.
            highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
            total = scores.sub_(highest).exp2_().sum(-1, keepdim=True)
            lse = torch.logaddexp2(lse, highest + total.log2())
        return lse

    def sums(self, lse: Tensor, heavy: float, diagonals: bool, bands: bool) -> PartSums:
        """Everything that is summed, of each head."""
        columns = torch.empty(self._heads, len(self._scored), device=self._device)
        heavy_columns = torch.zeros_like(columns) if heavy < math.inf else None
        light = torch.empty_like(columns)  # of the later of two bands; see `_by_band`
        later = self._later_band()
        # Distances of -(rows - 1) and more; negative ones hold masked keys alone, and no mass.
        shape = (self._heads, self._length + self._rows)
        every = torch.zeros(shape, device=self._device) if diagonals else None
        for start, end in self._ranges():
            attention = self._score(start, end).sub_(lse).exp2_()  # [heads, rows, keys]
            own = slice(start - self._scored.start, end - self._scored.start)
            torch.sum(attention, 1, out=columns[:, own])
            if every is not None:
                self._add_diagonals(every, attention, start)
            if heavy_columns is not None:
                shared = attention.clamp(max=heavy / HEAVY_ROWS).sum(1) >= heavy
                heavy_columns[:, own] = columns[:, own] * shared
                attention.masked_fill_(shared[:, None], 0.0)
            if bands:
                torch.sum(attention.mul_(later[:, : end - start]), 1, out=light[:, own])
        rest = columns if heavy_columns is None else columns - heavy_columns
        return PartSums(
            columns,
            self._by_band(rest, light) if bands else columns.new_zeros(self._heads, self._bands),
            heavy_columns,
            None if every is None else every[:, self._rows :],
        )

    def _later_band(self) -> Tensor:
        """Which rows see a key in the later of its two bands: 1 or 0, [rows, keys at once].

        Seen from the last row, keys lie in blocks of 128: those of a block are in its band for the
        last row, and for rows before it some are in the band before. It is the same for each page.
        """
        key = torch.arange(self._keys_at_once, device=self._device)
        in_block = (self._length - 1 - key) % BLOCK_ROWS
        before_last = torch.arange(self._rows - 1, -1, -1, device=self._device)
        return (in_block >= before_last[:, None]).float()

    def _by_band(self, columns: Tensor, later: Tensor) -> Tensor:
        """Sums by bands, [heads, bands], from those of columns.

        Args:
            columns: [heads, keys].
            later: the same, of rows that see the key in the band of the last row.
        """
        first = self._length - self._scored.stop  # the least distance from the last row
        missing = (first, self._bands * BLOCK_ROWS - first - columns.shape[1])
        both = torch.nn.functional.pad(torch.stack((later, columns - later)).flip(2), missing)
        own, before = both.unflatten(2, (self._bands, BLOCK_ROWS)).sum(3)
        own[:, :-1] += before[:, 1:]
        return own

    def _add_diagonals(self, result: Tensor, attention: Tensor, start: int) -> None:
        """Add each diagonal's sum to `result`, whose entry rows + d is of distance d.

        Row t is shifted by rows - 1 - t columns, so that a diagonal becomes a column.
        """
        width = attention.shape[-1] + self._rows
        skewed = torch.zeros(self._heads, self._rows, width, device=self._device)
        # Row t begins at t * width + rows - 1 - t: a row stride one shorter than the width.
        strides = (self._rows * width, width - 1, 1)
        skewed.as_strided(attention.shape, strides, self._rows - 1).copy_(attention)
        # Column c is the distance length - 1 - start - c.
        newest = self._length - 1 - start + self._rows
        first = max(0, newest - width + 1)
        result[:, first : newest + 1] += skewed.sum(1)[:, : newest + 1 - first].flip(1)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        for start in range(self._scored.start, self._scored.stop, self._keys_at_once):
            yield start, min(start + self._keys_at_once, self._scored.stop)

    def _score(self, start: int, end: int) -> Tensor:
        """Causal logits over keys [start, end), [heads, rows, end - start]; reused memory."""
        count = end - start
        keys = self._pages.read_keys(self._kv_head, start, end)
        size = self._heads * self._rows * count
        products = self._products[:size].view(self._heads, self._rows, count)
        for segment in self._segments:
            low, high = max(segment.start, start), min(segment.end, end)
            rows = segment.last_row - segment.first_row
            if rows == self._rows and (low, high) == (start, end):
                torch.mm(segment.queries, keys.T, out=products.view(-1, count))
            elif low < high:
                part = segment.queries @ keys[low - start : high - start].T
                columns = slice(low - start, high - start)
                target = products[:, segment.first_row : segment.last_row, columns]
                target.copy_(part.view(self._heads, rows, -1))
        scores = self._scores[:size].view_as(products).copy_(products)
        if end > self._first:
            key = torch.arange(start, end, device=self._device)
            query = torch.arange(self._first, self._length, device=self._device)
            scores.masked_fill_(key[None, :] > query[:, None], -torch.inf)
        return scores


def _segments(
    queries: SegmentQueries, first_position: int, stride: int | None, scale: float
) -> Iterator[_Segment]:
    """Rows of one dual chunk, against each of the three kinds of keys."""
    rows = queries.intra.shape[0]
    for span in split_at_chunks(Span(0, rows, first_position), stride):
        bounds = KeyBounds.of(span.start, stride)
        chosen = queries.rows(slice(span.first_row, span.last_row))
        for each, start, end in (
            (chosen.inter, 0, bounds.inter),
            (chosen.successive, bounds.inter, bounds.successive),
            (chosen.intra, bounds.successive, span.end),
        ):
            # Scaled once here instead of scaling every score.
            flat = (each.float() * scale).transpose(0, 1).reshape(-1, each.shape[-1])
            yield _Segment(span.first_row, span.last_row, flat, start, end)
