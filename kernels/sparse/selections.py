"""What a prefill chunk attends to under sparse attention: the data, wherever it was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..dual_chunk.segments import BLOCK_ROWS

NOTHING = 2**30
"""Fills lists of columns and distances up: greater than all of them, so that lists stay rising."""


HEAVY_ROWS = 8
"""A heavy column is one to many rows: none counts for more than one in so many towards it."""


@dataclass(frozen=True)
class HeadBudget:
    """Most verticals and slashes (single diagonals) that one head may choose."""

    verticals: int
    slashes: int

    @property
    def bands(self) -> int:
        """Bands of 128 diagonals that hold so many slashes."""
        return max(1, -(-self.slashes // BLOCK_ROWS))


@dataclass(frozen=True)
class Sums:
    """Attention of a chunk's last rows, summed over them; each sum is at most their number.

    Attributes:
        columns: float32 [heads, keys].
        bands: float32 [heads, ceil(keys / 128)]; band b holds the distances
            [128 b, 128 (b + 1)) from query to key. Heavy columns are left out.
        heavy_columns: `columns` where they are heavy, else 0; None where not asked for.
        diagonals: float32 [heads, keys], by single distances; None where not asked for.
        rows: how many were summed over.
    """

    columns: Tensor
    bands: Tensor
    heavy_columns: Tensor | None
    diagonals: Tensor | None
    rows: int


@dataclass(frozen=True)
class Selections:
    """The columns and tiles that every head attends to in one chunk.

    A query block sees the listed tiles, whole, and the columns that lie before its own tile. Tiles
    are listed by their distance, for all blocks of the chunk: query block q sees tile q - d.

    Attributes:
        columns: int32 [heads, most columns], token positions, rising, filled up with `NOTHING`.
            A multiple of 128 of them.
        distances: int32 [heads, most tiles], rising from 0, filled up with `NOTHING`.
    """

    columns: Tensor
    distances: Tensor

    def __post_init__(self) -> None:
        if not (self.columns.is_contiguous() and self.distances.is_contiguous()):
            raise ValueError("columns and distances must be contiguous: kernels count on it")
        if self.columns.shape[1] % BLOCK_ROWS or len(self.columns) != len(self.distances):
            raise ValueError(
                f"columns {tuple(self.columns.shape)} and distances {tuple(self.distances.shape)} "
                "do not describe one set of heads"
            )

    @classmethod
    def of(
        cls, columns: Sequence[Sequence[int]], distances: Sequence[Sequence[int]]
    ) -> "Selections":
        """From rising columns and rising distances of each head."""
        most_columns = round_up(max(1, max(len(each) for each in columns)))
        most_distances = max(len(each) for each in distances)
        return cls(_filled_up(columns, most_columns), _filled_up(distances, most_distances))

    @classmethod
    def received(cls, columns: Tensor, distances: Tensor, keys: int) -> "Selections":
        """From other ranks, of a prompt whose first `keys` tokens have pages.

        A collective that is given up while a rank waits for it leaves anything in its result. What
        was launched behind it still runs, and looks up what stands there; nobody takes the outcome.
        So numbers that are none of the prompt's become `NOTHING`, and distances rise from 0.
        Columns may be out of order: kernels look each of them up by itself.
        """
        distances = _within(distances, -(-keys // BLOCK_ROWS)).sort(1).values
        distances[:, 0] = 0
        return cls(_within(columns, keys), distances)

    def of_head(self, head: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Columns and distances of one head, as they are without filling."""
        columns, distances = (each[head].cpu().numpy() for each in (self.columns, self.distances))
        return columns[columns < NOTHING], distances[distances < NOTHING]


def round_up(count: int) -> int:
    """To whole tiles."""
    return -(-count // BLOCK_ROWS) * BLOCK_ROWS


def _within(places: Tensor, end: int) -> Tensor:
    """`NOTHING` for what does not lie in [0, end); contiguous."""
    return torch.where((places >= 0) & (places < end), places, NOTHING).contiguous()


def _filled_up(lists: Sequence[Sequence[int]], size: int) -> Tensor:
    result = torch.full((len(lists), size), NOTHING, dtype=torch.int32)
    for line, values in zip(result, lists, strict=True):
        line[: len(values)] = torch.as_tensor(values, dtype=torch.int32)
    return result
