"""Attention of a few rows over many keys, cut into pieces of keys that are computed apart.

A prompt's last rows see a million keys, and are too few to occupy a GPU as one program for each
block and head. So the keys are cut into pieces, whose results are merged by their log-sum-exps. How
they are cut depends on the prompt alone: ranks that divide the pieces among them come, bit for bit,
to what one process computes.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..pages import LayerPages
from . import portable_pieces
from .segments import BLOCK_ROWS, LastRow, QueryBlocks, SegmentQueries

_MOST_PIECES = 16
_LEAST_TILES = 32
"""Fewer keys are not worth a piece of their own."""


@dataclass(frozen=True)
class KeyPieces:
    """Some neighbouring pieces of a sequence's keys: piece p is [borders[p], borders[p + 1])."""

    borders: tuple[int, ...]

    @classmethod
    def of(cls, length: int) -> "KeyPieces":
        """All pieces of a sequence of so many tokens."""
        tiles = -(-length // BLOCK_ROWS)
        count = max(1, min(_MOST_PIECES, tiles // _LEAST_TILES))
        borders = [tiles * piece // count * BLOCK_ROWS for piece in range(count)]
        return cls((*borders, length))

    def __len__(self) -> int:
        return len(self.borders) - 1

    def part(self, number: int, parts: int) -> "KeyPieces":
        """One of so many parts of the pieces, as even as can be; it may have none."""
        first, last = (len(self) * each // parts for each in (number, number + 1))
        return KeyPieces(self.borders[first : last + 1])

    def ranges(self) -> list[tuple[int, int]]:
        """Each piece's keys, half-open."""
        return list(pairwise(self.borders))


@dataclass(frozen=True, eq=False)
class PartialResults:
    """Attention of the same rows over several pieces of keys.

    `output` is float32 [pieces, rows, heads, d]; `lse`, float32 [pieces, rows, heads], has natural
    log-sum-exps: -inf, with an output of 0, where a row sees no key of a piece.
    """

    output: Tensor
    lse: Tensor

    def merged(self, dtype: torch.dtype) -> Tensor:
        """Attention over all of the pieces, which together have keys for every row."""
        weights = self.lse.softmax(0)
        return (self.output * weights[..., None]).sum(0).to(dtype)


def attention(
    queries: SegmentQueries,
    blocks: QueryBlocks | LastRow,
    pages: LayerPages,
    stride: int | None,
    scale: float,
    pieces: KeyPieces,
) -> PartialResults:
    """As the package's `attention`, over some pieces of the keys, each apart."""
    arguments = (queries, blocks, pages, stride, scale, pieces.ranges())
    if queries.intra.is_cuda:
        from . import triton_pieces

        return PartialResults(*triton_pieces.attention(*arguments))
    return PartialResults(*portable_pieces.attention(*arguments))
