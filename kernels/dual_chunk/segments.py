"""Dual chunk positions: which rotation of a query meets which keys.

With stride C = S - w, a query at i (chunk a = i // C, r = i mod C) and a key at j (chunk b,
s = j mod C) see each other at the relative position

    r - s               a = b        intra
    min(r + C, S) - s   a = b + 1    successive
    S - s               a >= b + 2   inter

A key's rotation depends on s alone, so keys are rotated once, before they are cached, and a
query is rotated three times. Source: Dual Chunk Attention (arXiv 2402.17463) as published with
Qwen2.5-1M (arXiv 2501.15383).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..transfer import without_waiting

BLOCK_ROWS = 128


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines, float32 [n, head_dim / 2], of one position a row."""

    cosine: Tensor
    sine: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        """Rotate [n, heads, head_dim] by each row's position; computed in float32."""
        return Rotatable(vectors).by(self)


class Rotatable:
    """Vectors [n, heads, head_dim], to be rotated in one or several ways."""

    def __init__(self, vectors: Tensor) -> None:
        self._dtype = vectors.dtype
        self._wide = vectors.float()
        first, second = self._wide.chunk(2, dim=-1)
        self._swapped = torch.cat((second, first), -1)

    def by(self, rotation: Rotation) -> Tensor:
        """Each row rotated by its position.

        Whole vectors are multiplied, not halves: rows of numbers twice as long take half the time.
        """
        cosine = torch.cat((rotation.cosine, rotation.cosine), -1)[:, None]
        sine = torch.cat((-rotation.sine, rotation.sine), -1)[:, None]
        return (self._wide * cosine).add_(self._swapped * sine).to(self._dtype)


def rotation(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """The rotary embedding's angles (arXiv 2104.09864) at `positions`, int64 [n]."""
    angles = positions.float()[:, None] * _frequencies(head_dim, theta, positions.device)[None, :]
    return Rotation(angles.cos(), angles.sin())


@cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians a position, float32 [head_dim / 2]; kept for good: CUDA graphs hold its address."""
    # Whoever asks first may be in inference mode, and whoever asks next may not.
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
        return 1.0 / theta ** (exponents / head_dim)


@dataclass(frozen=True)
class SegmentQueries:
    """One set of queries under its three rotations, each [n, heads, head_dim]."""

    intra: Tensor
    successive: Tensor
    inter: Tensor

    def rows(self, rows: slice) -> "SegmentQueries":
        """The same rows of each."""
        return SegmentQueries(self.intra[rows], self.successive[rows], self.inter[rows])

    def heads(self, heads: slice) -> "SegmentQueries":
        """The same heads of each."""
        return SegmentQueries(self.intra[:, heads], self.successive[:, heads], self.inter[:, heads])

    def to(self, dtype: torch.dtype) -> "SegmentQueries":
        """The same in another type; the very same where it is theirs."""
        return SegmentQueries(*(q.to(dtype) for q in (self.intra, self.successive, self.inter)))


@dataclass(frozen=True)
class KeyBounds:
    """Where a query's segments lie: keys [0, inter), [inter, successive), [successive, i]."""

    inter: int
    successive: int

    @classmethod
    def of(cls, position: int, stride: int | None) -> "KeyBounds":
        """The bounds for a query at `position`; without a stride every key is intra."""
        if stride is None:
            return cls(0, 0)
        chunk = position // stride
        return cls(max(0, (chunk - 1) * stride), chunk * stride)


@dataclass(frozen=True)
class Span:
    """Query rows [first_row, last_row) at positions [start, start + rows), all in one chunk."""

    first_row: int
    last_row: int
    start: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.last_row - self.first_row

    @property
    def end(self) -> int:
        """The position after the last query."""
        return self.start + self.rows


@dataclass(frozen=True)
class QueryBlocks:
    """Which positions a tensor of query rows holds: whole blocks of 128, in rising order.

    `blocks` are indices into the sequence (block b is [128 b, 128 (b + 1))), not necessarily
    neighbours: sequence parallelism deals them out in turn. Only the sequence's last block may
    be short; `end` is the position after the last row that exists.
    """

    blocks: tuple[int, ...]
    end: int

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_rows(self) -> int:
        """Rows in all blocks."""
        if not self.blocks:
            return 0
        last = min(BLOCK_ROWS, self.end - self.blocks[-1] * BLOCK_ROWS)
        return (len(self.blocks) - 1) * BLOCK_ROWS + last

    def spans(self) -> Iterator[Span]:
        """One span a block."""
        row = 0
        for block in self.blocks:
            start = block * BLOCK_ROWS
            rows = min(BLOCK_ROWS, self.end - start)
            yield Span(row, row + rows, start)
            row += rows

    def positions(self, device: torch.device | None = None) -> Tensor:
        """int64 [num_rows]."""
        starts = torch.tensor(self.blocks, dtype=torch.int64, device=device) * BLOCK_ROWS
        offsets = torch.arange(BLOCK_ROWS, device=device)
        return (starts[:, None] + offsets[None, :]).flatten()[: self.num_rows]


@dataclass(frozen=True)
class LastRow:
    """The last row alone of a sequence that ends at `end`, where else there are `QueryBlocks`.

    Or the last `count`, which lie in one block.
    """

    end: int
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.count <= (self.end - 1) % BLOCK_ROWS + 1:
            raise ValueError(f"{self.count} rows up to {self.end} are not in one block")

    def spans(self) -> Iterator[Span]:
        """The one that there is."""
        yield Span(0, self.count, self.end - self.count)


def split_at_chunks(span: Span, stride: int | None) -> Iterator[Span]:
    """Cut a span where it crosses from one dual chunk to the next."""
    row, position = span.first_row, span.start
    while row < span.last_row:
        border = span.end if stride is None else (position // stride + 1) * stride
        rows = min(span.end, border) - position
        yield Span(row, row + rows, position)
        row, position = row + rows, position + rows


@lru_cache(maxsize=16)
def span_table(blocks: QueryBlocks | LastRow, stride: int | None, device: torch.device) -> Tensor:
    """The spans of query blocks, cut at dual chunks, as kernels read them: int32 [spans, 5].

    A line is a span's first row, its rows, its first position, and its `KeyBounds`. Kept, since
    every layer of a prefill chunk asks for the same.
    """
    lines: list[tuple[int, ...]] = []
    for span in blocks.spans():
        for part in split_at_chunks(span, stride):
            bounds = KeyBounds.of(part.start, stride)
            lines.append((part.first_row, part.rows, part.start, bounds.inter, bounds.successive))
    return without_waiting(torch.tensor(lines, dtype=torch.int32).view(-1, 5), device)
