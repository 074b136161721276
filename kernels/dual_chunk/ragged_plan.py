"""Rows of several sequences in one call: whose they are, and where their pages lie.

Rows of one sequence follow on those of the one before it. A program of the kernel takes a *span*:
up to 128 rows of one sequence, within one of its blocks and one of its dual chunks. Spans, and the
pages of all sequences one after the other, lie in one tensor whose address stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..page_size import PAGE_TOKENS, pages_for
from ..pages import BlockTable
from .segments import BLOCK_ROWS, KeyBounds, QueryBlocks, split_at_chunks

_SPAN_NUMBERS = 6
_BLOCK_NUMBERS = 3


@dataclass(frozen=True, eq=False)
class SequenceRows:
    """Tokens [start, end) of one sequence, whose earlier ones lie in the pages of `table`.

    `start` is a multiple of 128. `scale` multiplies the logits.
    """

    start: int
    end: int
    table: BlockTable
    scale: float

    @property
    def count(self) -> int:
        """How many rows."""
        return self.end - self.start

    @property
    def blocks(self) -> QueryBlocks:
        """The same rows as attention of one sequence takes them."""
        return QueryBlocks(tuple(range(self.start // BLOCK_ROWS, pages_for(self.end))), self.end)


@dataclass(frozen=True)
class RaggedShape:
    """What a plan is made for: so many rows of so many sequences, which hold so many pages."""

    rows: int
    sequences: int
    pages: int
    stride: int | None

    @property
    def blocks(self) -> int:
        """The most blocks that so many rows can fall into."""
        return min(self.rows, self.rows // BLOCK_ROWS + self.sequences)

    @property
    def spans(self) -> int:
        """The most spans: borders of dual chunks that are none of blocks cut one more each."""
        if self.stride is None or self.stride % BLOCK_ROWS == 0:
            return self.blocks
        return self.blocks + self.rows // self.stride + self.sequences

    @property
    def sizes(self) -> list[int]:
        """Numbers of a plan's parts, in their order."""
        spans = self.spans
        return [spans * _SPAN_NUMBERS, spans, self.blocks * _BLOCK_NUMBERS, self.pages]

    @property
    def size(self) -> int:
        """Numbers of a plan."""
        return sum(self.sizes)


@dataclass(frozen=True)
class RaggedPlan:
    """Views of one int32 tensor on the device, whose addresses stay: a CUDA graph may read them.

    A span is its first row, its rows (0 for one that is not used), its first position, its two
    `KeyBounds`, and where in `pages` its sequence's begin. A block, as `narrow_blocks` takes it, is
    a page, its first row and its rows.
    """

    shape: RaggedShape
    storage: Tensor
    spans: Tensor  # [spans, 6]
    scales: Tensor  # float32 [spans]: what logits are multiplied by
    blocks: Tensor  # [blocks, 3]
    pages: Tensor  # [pages]

    @classmethod
    def over(cls, storage: Tensor, shape: RaggedShape) -> "RaggedPlan":
        """A plan in a tensor that is there: int32 [shape.size], which says what the plan is."""
        spans, scales, blocks, pages = storage.split(shape.sizes)
        return cls(
            shape, storage, spans.view(-1, _SPAN_NUMBERS), scales.view(torch.float32),
            blocks.view(-1, _BLOCK_NUMBERS), pages,
        )  # fmt: skip

    @classmethod
    def allocate(cls, shape: RaggedShape, device: torch.device) -> "RaggedPlan":
        """A plan of no rows."""
        return cls.over(torch.zeros(shape.size, dtype=torch.int32, device=device), shape)

    def refresh(self, parts: Sequence[SequenceRows]) -> None:
        """Plan other rows, in place; does not wait for the device.

        Raises:
            ValueError: the plan is made for fewer.
        """
        self._check(parts)
        written = np.zeros(self.shape.size, dtype=np.int32)
        spans, scales, blocks, pages = np.split(written, np.cumsum(self.shape.sizes)[:-1])
        for index, (numbers, scale) in enumerate(_spans(parts, self.shape.stride)):
            spans[index * _SPAN_NUMBERS : (index + 1) * _SPAN_NUMBERS] = numbers
            scales.view(np.float32)[index] = scale
        own = np.ravel(page_blocks(parts))
        blocks[: len(own)] = own
        first = 0
        for part in parts:
            held = part.table.pages[: pages_for(part.end)]
            pages[first : first + len(held)] = held
            first += len(held)
        self.storage.copy_(torch.from_numpy(written), non_blocking=True)

    def _check(self, parts: Sequence[SequenceRows]) -> None:
        shape = self.shape
        rows = sum(part.count for part in parts)
        pages = sum(pages_for(part.end) for part in parts)
        if rows > shape.rows or len(parts) > shape.sequences or pages > shape.pages:
            raise ValueError(
                f"{rows} rows of {len(parts)} sequences with {pages} pages do not fit in a plan "
                f"for {shape}"
            )


def page_blocks(parts: Sequence[SequenceRows]) -> list[tuple[int, int, int]]:
    """The blocks of rows that lie one part after the other: page, first row, rows of each."""
    blocks: list[tuple[int, int, int]] = []
    first_row = 0
    for part in parts:
        for span in part.blocks.spans():
            page = int(part.table.pages[span.start // PAGE_TOKENS])
            blocks.append((page, first_row + span.first_row, span.rows))
        first_row += part.count
    return blocks


def _spans(
    parts: Sequence[SequenceRows], stride: int | None
) -> list[tuple[tuple[int, ...], float]]:
    """The spans' numbers and scales, those with the most keys first: so the grid's end is short."""
    spans: list[tuple[tuple[int, ...], float]] = []
    first_row = first_page = 0
    for part in parts:
        for block in part.blocks.spans():
            for span in split_at_chunks(block, stride):
                bounds = KeyBounds.of(span.start, stride)
                numbers = (
                    first_row + span.first_row, span.rows, span.start, bounds.inter,
                    bounds.successive, first_page,
                )  # fmt: skip
                spans.append((numbers, part.scale))
        first_row += part.count
        first_page += pages_for(part.end)
    return sorted(spans, key=lambda span: -span[0][2])
