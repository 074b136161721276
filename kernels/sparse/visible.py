"""Which keys the query blocks of one head see, given what was selected; on the host."""

import numpy as np
import numpy.typing as npt

from ..dual_chunk.segments import BLOCK_ROWS
from .selections import Selections


class VisibleKeys:
    """The keys of one head.

    A block sees the tiles at the listed distances, whole, and the selected columns before its own
    tile.

    Attributes:
        columns: int64, token positions, rising.
        distances: int64, of tiles, rising from 0.
    """

    def __init__(self, selections: Selections, head: int) -> None:
        self.columns, self.distances = (each.astype(np.int64) for each in selections.of_head(head))
        self._column_tiles = self.columns // BLOCK_ROWS
        # The last entry is for whatever lies farther away than the farthest tile.
        self._is_listed = np.zeros(int(self.distances[-1]) + 2, dtype=np.bool_)
        self._is_listed[self.distances] = True

    def columns_before(self, block: int) -> int:
        """How many of the columns lie before a block's own tile."""
        return int(np.searchsorted(self._column_tiles, block))

    def hidden_columns(self, blocks: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.bool_]:
        """Which of the first `count` columns a block does not see as such: [blocks, count].

        Those that lie in one of its tiles, or not before its own.
        """
        away = blocks[:, None] - self._column_tiles[:count]
        # Distance 0 is always listed, so whatever comes later counts as hidden like it.
        return self._is_listed[np.clip(away, 0, len(self._is_listed) - 1)]

    def of_block(self, block: int, rows: int = BLOCK_ROWS) -> npt.NDArray[np.int64]:
        """Rising positions of the keys that a block of so many rows sees; its own at the end."""
        tiles = block - self.distances[self.distances <= block]
        in_tiles = (tiles[::-1, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).ravel()
        in_tiles = in_tiles[: len(in_tiles) - (BLOCK_ROWS - rows)]
        before = self.columns_before(block)
        [hidden] = self.hidden_columns(np.array([block]), before)
        alone = self.columns[:before][~hidden]
        return np.sort(np.concatenate((alone, in_tiles)), kind="stable")


def visible_keys(selections: Selections, head: int, block: int, end: int) -> npt.NDArray[np.int64]:
    """Rising positions of the keys that query block `block` sees; its own are causal besides.

    See `VisibleKeys` for which these are.
    """
    return VisibleKeys(selections, head).of_block(block, min(BLOCK_ROWS, end - block * BLOCK_ROWS))
