"""Attention of one piece of a prompt over everything before it, in every layer.

As the engine's prefill: beyond the first dual chunk under its positions, long prompts sparsely, the
last rows of such a prompt in full. A piece may begin anywhere: rows before the first border of
pages attend in full, by a kernel that takes them.
"""

from functools import cached_property

import torch
from torch import Tensor

from ...engine.model.positions import Rotations
from ...engine.prefill.full_rows import first_full_block
from ...engine.prefill.selection import Window
from ...kernels import dual_chunk, sparse
from ...kernels.dual_chunk import (
    BLOCK_ROWS,
    KeyPieces,
    LastRow,
    QueryBlocks,
    SegmentQueries,
)
from ...kernels.page_size import pages_for
from ...kernels.pages import BlockTable, LayerPages
from .model_attention import ModelAttention
from .step_plan import Piece


class PieceAttention:
    """What all layers of a step have in common for one piece.

    Args:
        positions: of its rows, int64 [n], on their device.
    """

    def __init__(
        self, model: ModelAttention, piece: Piece, table: BlockTable, positions: Tensor
    ) -> None:
        self._model, self._piece, self._table = model, piece, table
        self._positions = positions
        self._stride = model.stride
        self._scale = model.positions.softmax_scale(piece.length)
        sparsely = sparse_rows(model, piece)
        self._aligned, self._sparse_end = sparsely.start, sparsely.stop
        self._windows: tuple[Window, ...] = ()
        if sparsely:
            assert model.sparsity is not None
            self._windows = Window.cut(self._aligned, piece.end, model.sparsity)

    @property
    def rows(self) -> slice:
        """Its rows in the step."""
        return self._piece.rows

    @cached_property
    def _rotations(self) -> Rotations:
        within = range(self._piece.start, self._piece.end)
        return self._model.positions.rotations(self._positions, within)

    @cached_property
    def _selecting(self) -> list[Rotations]:
        """Of each window's rows that select."""
        return [
            self._model.positions.selection_rotations(self._positions[self._own(each)], each)
            for each in (window.select for window in self._windows)
        ]

    def attend(self, layer: int, queries: Tensor, memory: Tensor, output: Tensor) -> None:
        """Fill in the rows of one layer.

        Args:
            queries: not rotated, [n, heads, d].
            memory: the layer's pages, [pages, kv_heads, 2, 128, d], the rows' own K and V included.
            output: [n, heads, d], contiguous.
        """
        pages = LayerPages(memory, self._table, read_as=queries.dtype)
        rotated = self._rotations.rotate(queries)
        self._attend_in_full(rotated, pages, output)
        for window, selecting in zip(self._windows, self._selecting, strict=True):
            rows = self._own(range(window.start, min(window.end, self._sparse_end)))
            if rows.start < rows.stop:
                chosen = self._choose(layer, window, selecting, queries, pages)
                end = min(window.end, self._sparse_end)
                blocks = QueryBlocks(_blocks(window.start, end), end)
                sparse.attention(
                    rotated.rows(rows), blocks, pages, self._stride, self._scale, chosen,
                    output[rows],
                )  # fmt: skip

    def _attend_in_full(self, rotated: SegmentQueries, pages: LayerPages, output: Tensor) -> None:
        """Rows before the first border of pages, and all behind the sparse ones."""
        start, end = self._piece.start, self._piece.end
        if start < self._aligned:
            last = LastRow(self._aligned, self._aligned - start)
            self._attend_in_pieces(rotated, last, range(start, self._aligned), pages, output)
        if self._sparse_end == end:
            return
        blocks = QueryBlocks(_blocks(self._sparse_end, end), end)
        rows = range(self._sparse_end, end)
        if len(rows) <= 2 * BLOCK_ROWS:
            # Few rows that see many keys: pieces of those occupy a GPU, one walk does not.
            self._attend_in_pieces(rotated, blocks, rows, pages, output)
            return
        own = self._own(rows)
        output[own] = dual_chunk.attention(
            rotated.rows(own), blocks, pages, self._stride, self._scale
        )[0]

    def _attend_in_pieces(
        self,
        rotated: SegmentQueries,
        blocks: QueryBlocks | LastRow,
        rows: range,
        pages: LayerPages,
        output: Tensor,
    ) -> None:
        own, pieces = self._own(rows), KeyPieces.of(rows.stop)
        results = dual_chunk.attention_in_pieces(
            rotated.rows(own), blocks, pages, self._stride, self._scale, pieces
        )
        output[own] = results.merged(output.dtype)

    def _choose(
        self,
        layer: int,
        window: Window,
        selecting: Rotations,
        queries: Tensor,
        pages: LayerPages,
    ) -> sparse.Selections:
        """What each head attends to in a window, by the window's last rows."""
        last = selecting.rotate(queries[self._own(window.select)].float())
        sums = sparse.sums(
            last, window.select.start, pages, 0, self._stride, self._scale, self._model.group
        )
        return sparse.by_bands(sums, self._model.budgets(layer))

    def _own(self, positions: range) -> slice:
        """Where positions are among the piece's rows."""
        return slice(positions.start - self._piece.start, positions.stop - self._piece.start)


def sparse_rows(model: ModelAttention, piece: Piece) -> range:
    """Which tokens of a piece attend sparsely: from where its whole blocks begin; none at all of a
    prompt that is dense."""
    start = end = min(pages_for(piece.start) * BLOCK_ROWS, piece.end)
    if piece.is_prompt and model.is_sparse(piece.length):
        full = first_full_block(piece.length) * BLOCK_ROWS
        end = max(start, min(full, piece.end))
    return range(start, end)


def _blocks(start: int, end: int) -> tuple[int, ...]:
    return tuple(range(start // BLOCK_ROWS, pages_for(end)))


def table_of(tables: Tensor, sequence: int) -> BlockTable:
    """One sequence's row of int32 tables [sequences, pages]."""
    row = tables[sequence]
    if row.is_cuda:
        # Kernels are compiled for whether it begins at a multiple of 16 bytes, and so it does.
        return BlockTable.where_it_lies(row.clone())
    return BlockTable(row.to(torch.int64).numpy())
