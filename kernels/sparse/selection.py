"""Vertical-slash selection: which keys a prefill chunk attends to (MInference, arXiv 2407.02490).

The chunk's last queries score every key. Column sums of their attention choose verticals, keys
that everybody looks at; sums along diagonals choose slashes, distances that everybody looks back.
Slashes are chosen as bands of 128 diagonals: attention computes whole tiles, so a lone diagonal
would cost as much as a band.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..dual_chunk.segments import (
    BLOCK_ROWS,
    KeyBounds,
    SegmentQueries,
    Span,
    split_at_chunks,
)
from ..pages import LayerPages

FORCED_VERTICALS = 30
"""The first tokens of a sequence are always attended to: attention sinks."""

_KEYS_AT_ONCE = 4096


@dataclass(frozen=True)
class Selection:
    """What one head attends to in one chunk.

    `verticals` are token positions, rising. `bands` are rising numbers of diagonal bands: band b
    holds the distances [128 b, 128 (b + 1)) from query to key. Band 0 is always there.
    """

    verticals: npt.NDArray[np.int64]
    bands: npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeadBudget:
    """Most verticals and slashes (single diagonals) that one head may choose."""

    verticals: int
    slashes: int

    @property
    def bands(self) -> int:
        """Bands of 128 diagonals that hold so many slashes."""
        return max(1, -(-self.slashes // BLOCK_ROWS))


def select(
    queries: SegmentQueries,
    first_position: int,
    pages: LayerPages,
    kv_head: int,
    stride: int | None,
    scale: float,
    budgets: list[HeadBudget],
) -> list[Selection]:
    """Choose for the heads that share one KV head.

    Args:
        queries: the chunk's last rows under continuous positions, each [rows, heads, d].
        first_position: of the first of them; their keys are [0, first_position + rows).
        budgets: one a head.
    """
    rows, heads, _ = queries.intra.shape
    length = first_position + rows
    scorer = _Scorer(queries, first_position, pages, kv_head, stride, scale)
    lse = scorer.log_sum_exp()
    columns, bands = scorer.sums(lse)
    return [
        Selection(
            _most(columns[head, :length], budgets[head].verticals, FORCED_VERTICALS),
            _most(bands[head], budgets[head].bands, 1),
        )
        for head in range(heads)
    ]


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
    ) -> None:
        self._rows, self._heads, _ = queries.intra.shape
        self._first = first_position
        self._length = first_position + self._rows
        self._pages, self._kv_head = pages, kv_head
        scale *= math.log2(math.e)
        self._segments = [
            replace(segment, queries=segment.queries.to(pages.memory.dtype))
            for segment in _segments(queries, first_position, stride, scale)
        ]
        self._device = queries.intra.device
        most_keys = min(_KEYS_AT_ONCE, self._length)
        size = self._heads * self._rows * most_keys
        self._products = torch.empty(size, dtype=pages.memory.dtype, device=self._device)
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

    def sums(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Attention summed along columns [heads, keys], and along bands [heads, bands]."""
        columns = torch.empty(self._heads, self._length, device=self._device)
        num_bands = (self._length - 1) // BLOCK_ROWS + 1
        bands = torch.zeros(self._heads, num_bands, device=self._device)
        for start, end in self._ranges():
            attention = self._score(start, end).sub_(lse).exp2_()  # [heads, rows, keys]
            torch.sum(attention, 1, out=columns[:, start:end])
            bands.index_add_(1, *self._diagonal_sums(attention, start))
        return columns, bands

    def _diagonal_sums(self, attention: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Which band each diagonal is in, [diagonals], and its sum, [heads, diagonals].

        Row t is shifted by rows - 1 - t columns, so that a diagonal becomes a column.
        """
        width = attention.shape[-1] + self._rows
        skewed = torch.zeros(self._heads, self._rows, width, device=self._device)
        # Row t begins at t * width + rows - 1 - t: a row stride one shorter than the width.
        strides = (self._rows * width, width - 1, 1)
        skewed.as_strided(attention.shape, strides, self._rows - 1).copy_(attention)
        # The first column is the distance from the last row to key `start`.
        newest = self._length - 1 - start
        distances = newest - torch.arange(width, device=self._device)
        # Negative distances hold masked keys alone, and no mass.
        return distances.clamp_(min=0) // BLOCK_ROWS, skewed.sum(1)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self._length, _KEYS_AT_ONCE):
            yield start, min(start + _KEYS_AT_ONCE, self._length)

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


def _most(weights: Tensor, count: int, forced: int) -> npt.NDArray[np.int64]:
    """Rising indices of the `count` heaviest, the first `forced` always among them."""
    count = min(max(count, forced), weights.shape[0])
    weights = weights.clone()
    weights[:forced] = torch.inf
    return weights.topk(count).indices.sort().values.cpu().numpy()
