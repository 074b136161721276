"""How a chunk's rows attend under sparse attention: window by window, and the last in full."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...kernels.dual_chunk import BLOCK_ROWS, QueryBlocks
from ...kernels.pages import LayerPages
from ...kernels.sparse import Selections
from ..model.qwen2 import Qwen2
from ..stages import Stages
from .chunk_rows import ChunkRows
from .full_rows import FullRows, first_full_block
from .selection import ChunkSelector, Window
from .shared_rows import SharedRows
from .sparsity import SparsityConfig


@dataclass(frozen=True)
class SparsePart:
    """This rank's blocks of one window: those that attend sparsely, and all of them.

    `rows` and `all_rows` are theirs among this rank's rows of the chunk.
    """

    sparse: QueryBlocks
    rows: slice
    every: QueryBlocks
    all_rows: slice

    @classmethod
    def of(cls, window: Window, rows: ChunkRows) -> "SparsePart":
        """What a rank has of it."""
        blocks = rows.blocks.blocks
        first = bisect_left(blocks, window.start // BLOCK_ROWS)
        end = bisect_left(blocks, -(-window.end // BLOCK_ROWS))
        full = min(bisect_left(blocks, first_full_block(rows.length), first), end)
        some = QueryBlocks(blocks[first:full], window.end)
        own = QueryBlocks(blocks[first:end], window.end)
        start = first * BLOCK_ROWS
        return cls(
            some, slice(start, start + some.num_rows), own, slice(start, start + own.num_rows)
        )


@dataclass(frozen=True, eq=False)
class SparseChunk:
    """What all layers of a chunk have in common.

    `shared` are the rows whose queries all ranks need: those that select, and the `last` ones.
    """

    windows: Sequence[Window]
    parts: Sequence[SparsePart]
    selector: ChunkSelector
    last: "LastRows | None"
    shared: SharedRows

    @classmethod
    def of(
        cls,
        model: Qwen2,
        sparsity: SparsityConfig,
        rows: ChunkRows,
        scale: float,
        stages: Stages,
    ) -> "SparseChunk":
        """Of one chunk."""
        windows = Window.cut(rows.start, rows.end, sparsity)
        full = FullRows(model, rows, scale, stages) if FullRows.are_in(rows) else None
        wanted = [window.select for window in windows]
        if full is not None:
            wanted.append(full.positions)
        shared = SharedRows(model, rows.positions.numpy(), wanted)
        return cls(
            windows,
            [SparsePart.of(window, rows) for window in windows],
            ChunkSelector(model, sparsity, windows, scale, stages),
            None if full is None else LastRows(full, shared),
            shared,
        )

    def choose(self, number: int, shared: Tensor, pages: LayerPages) -> list[Selections]:
        """For each window, from the shared queries; see `ChunkSelector.choose`."""
        last = [shared[self.shared.places(window.select)] for window in self.windows]
        return self.selector.choose(number, last, pages)


@dataclass(frozen=True, eq=False)
class LastRows:
    """The rows that attend in full, of whose queries `shared` has all."""

    full: FullRows
    shared: SharedRows

    def attend(self, shared: Tensor, pages: LayerPages, attended: Tensor) -> None:
        """As `FullRows.attend`, from the shared queries."""
        self.full.attend(shared[self.shared.places(self.full.positions)], pages, attended)
