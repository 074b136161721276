"""Attention of one prefill chunk: K and V into pages, pages to whoever waits for them, attention.

The rows of a chunk are dealt to the sequence ranks in blocks of 128; each rank computes K and V of
its blocks, all ranks gather them, and so each rank's pages hold the whole prompt for its KV heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import dual_chunk, quantized, sparse
from ...kernels.dual_chunk import BLOCK_ROWS, QueryBlocks, SegmentQueries
from ...kernels.narrow import Rows
from ...kernels.page_size import pages_for
from ...kernels.pages import BlockTable, LayerPages
from ...kernels.sparse import Selections
from ...kernels.transfer import without_waiting
from ..kv.chunk_pages import ChunkPages
from ..kv.hand_off import HandOff, Place
from ..kv.pages import PagePool
from ..model.layer import Attention, Layer
from ..model.positions import Rotations
from ..model.qwen2 import Qwen2
from ..model.rows import RowSteps
from ..stages import Stages
from .selection import ChunkSelector
from .sparsity import SparsityConfig

_FULL_ROWS = 128
"""The last rows of a prompt attend to everything, under sparse attention too."""


@dataclass(frozen=True)
class SparseAttention:
    """What sparse attention of one layer was asked in one chunk, and its log-sum-exp.

    `queries` are rotated, each [rows, heads, d]; `lse` is float32 [rows, heads]. Pages hold the
    layer's keys up to the chunk's end, as long as the observer that is given this runs.
    `selections` are those of this rank's heads.
    """

    layer: int
    queries: SegmentQueries
    blocks: QueryBlocks
    pages: LayerPages
    stride: int | None
    scale: float
    lse: Tensor
    selections: Selections


Observer = Callable[[SparseAttention], None]


@dataclass(frozen=True, eq=False)
class PrefillParts:
    """What all chunks of a prefiller have in common.

    `widened` is one layer of all pages in a type that attention reads, where pages are of 8 bits.
    """

    model: Qwen2
    pool: PagePool
    sparsity: SparsityConfig | None
    observer: Observer | None
    widened: LayerPages | None


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """The rows of chunk [start, end) of a prompt of `length` tokens that this rank computes.

    `positions` are int64 [n] on the host; `rotations` are theirs.
    """

    start: int
    end: int
    length: int
    blocks: QueryBlocks
    positions: Tensor
    rotations: Rotations
    steps: RowSteps

    @classmethod
    def of(cls, model: Qwen2, start: int, end: int, length: int) -> "ChunkRows":
        """Those of the blocks that fall to this rank."""
        every, mesh = range(start // BLOCK_ROWS, pages_for(end)), model.mesh
        own = tuple(b for b in every if b % mesh.sequence_parallel == mesh.sequence_rank)
        blocks = QueryBlocks(own, end)
        positions = blocks.positions()
        rotations = model.positions.rotations(
            without_waiting(positions, model.device), range(start, end)
        )
        steps = RowSteps.of(len(positions), model.device)
        return cls(start, end, length, blocks, positions, rotations, steps)

    @property
    def hold_last(self) -> bool:
        """Whether the prompt's last row is among them."""
        return bool(len(self.positions)) and int(self.positions[-1]) == self.length - 1


@dataclass(frozen=True)
class ChunkQueries:
    """Queries of one layer.

    `rotated` are those of this rank's rows, each [n, heads, d]; `selecting` the chunk's last ones,
    not rotated, where a selector chooses what to attend to.
    """

    rotated: SegmentQueries
    selecting: Tensor | None


class ChunkAttention(Attention[ChunkQueries]):
    """Of this rank's rows of one chunk, over everything before them."""

    def __init__(
        self,
        parts: PrefillParts,
        rows: ChunkRows,
        table: BlockTable,
        hand_off: HandOff | None,
        stages: Stages,
    ) -> None:
        self._parts, self._model = parts, parts.model
        self._rows, self._table, self._hand_off, self._stages = rows, table, hand_off, stages
        self._stride = self._model.positions.stride
        self._scale = self._model.positions.softmax_scale(rows.length)
        first, last = rows.start // BLOCK_ROWS, pages_for(rows.end)
        self._pages = ChunkPages(
            parts.pool, self._model.mesh, table.pages[first:last].tolist(), first,
            rows.blocks.blocks, len(rows.positions),
        )  # fmt: skip
        self._selector = None
        sparsity = parts.sparsity
        if sparsity is not None and rows.length > sparsity.threshold:
            self._selector = ChunkSelector(
                self._model, sparsity, rows.positions.numpy(), rows.start, rows.end, self._scale,
                stages,
            )  # fmt: skip

    def write(self, layer: Layer, normed: Rows) -> ChunkQueries:
        """Write this rank's K and V."""
        rotated = self._rows.steps.map(lambda rows: self._project(layer, normed, rows))
        selecting = None
        if self._selector is not None:
            selecting = self._selector.last_queries(layer, normed)
        return ChunkQueries(SegmentQueries(*rotated), selecting)

    def write_keys_values(self, layer: Layer, normed: Rows) -> None:
        """As `write`, for a layer of which no one wants all queries; pages are complete then."""
        for rows in self._rows.steps.slices:
            with self._stages.time("linear"):
                k, v = layer.keys_values(normed[rows])
            self._write_pages(layer.number, rows, k, v, self._rows.rotations.rows(rows))
        self._complete_pages(layer.number)

    def attend(self, layer: Layer, queries: ChunkQueries) -> Tensor:
        """Exchange K and V with the other ranks, hand them off, and attend to all there are."""
        self._complete_pages(layer.number)
        pages = self._readable_pages(layer.number)
        if self._selector is None or queries.selecting is None:
            return self._attend_in_full(queries.rotated, self._rows.blocks, pages)
        selections = self._selector.choose(layer.number, queries.selecting, pages)
        sparse_blocks, full_blocks = self._split_blocks()
        border = sparse_blocks.num_rows
        attended = self._attend_sparsely(
            layer.number, queries.rotated, sparse_blocks, pages, selections
        )
        if not full_blocks.blocks:
            return attended
        rest = queries.rotated.rows(slice(border, None))
        full = self._attend_in_full(rest, full_blocks, pages)
        return torch.cat((attended[:border], full))

    def attend_last(self, layer: Layer, q: Tensor) -> Tensor:
        """Attention of the prompt's last row, the last of this rank's: q [1, heads, d]."""
        pages = self._readable_pages(layer.number)
        with self._stages.time("attention"):
            return dual_chunk.decode_attention(
                self._rows.rotations.rows(slice(-1, None)).rotate(q),
                pages.memory,
                pages.table.pages.tolist(),
                self._rows.length,
                self._stride,
                self._scale,
            )

    def _project(self, layer: Layer, normed: Rows, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Write K and V of some of this rank's rows; their queries under three rotations."""
        with self._stages.time("linear"):
            q, k, v = layer.project(normed[rows])
        rotations = self._rows.rotations.rows(rows)
        with self._stages.time("elementwise"):
            queries = rotations.rotate(q)
        self._write_pages(layer.number, rows, k, v, rotations)
        return queries.intra, queries.successive, queries.inter

    def _write_pages(
        self, number: int, rows: slice, k: Tensor, v: Tensor, rotations: Rotations
    ) -> None:
        with self._stages.time("page writes"):
            self._pages.write(number, rows, k, v, rotations.intra)

    def _complete_pages(self, number: int) -> None:
        """Gather this chunk's pages of one layer, and hand off those that fall to this rank."""
        if self._model.mesh.sequence_parallel > 1:
            with self._stages.time("communication"):
                self._pages.gather(number)
        if self._hand_off is not None and self._model.heads.owns_kv:
            with self._stages.time("hand-off"):
                own = self._pages.part(number)
                if own is not None:
                    first_page, pages = own
                    place = Place(number, first_page, self._model.heads.first_kv_head)
                    self._hand_off.push(place, pages)

    def _readable_pages(self, number: int) -> LayerPages:
        """One layer's pages up to the chunk's end, in a type that attention reads.

        Pages of 8 bits are widened, once for all blocks of rows, into memory that the next layer
        uses again.
        """
        pool, widened = self._parts.pool, self._parts.widened
        memory, scales = pool.memory[number], pool.layer_scales(number)
        if scales is None or widened is None:
            return LayerPages(memory, self._table, read_as=self._model.dtype)
        count = pages_for(self._rows.end)
        with self._stages.time("page writes"):
            table = self._table.on(memory.device)[:count]
            quantized.widen_pages(memory, scales, table, widened.memory[:count])
        return widened

    def _split_blocks(self) -> tuple[QueryBlocks, QueryBlocks]:
        """This rank's blocks that attend sparsely, and those that hold the prompt's end.

        A question mostly stands there, and its own rows are those that cannot do without full
        attention: see lab/pocket/EXPERIMENTS.md.
        """
        rows = self._rows
        first = (rows.length - _FULL_ROWS) // BLOCK_ROWS
        sparse_blocks = tuple(b for b in rows.blocks.blocks if b < first)
        full_blocks = rows.blocks.blocks[len(sparse_blocks) :]
        return QueryBlocks(sparse_blocks, rows.end), QueryBlocks(full_blocks, rows.end)

    def _attend_sparsely(
        self,
        number: int,
        queries: SegmentQueries,
        blocks: QueryBlocks,
        pages: LayerPages,
        selections: Selections,
    ) -> Tensor:
        """Attention of the rows of `blocks`, which come first; an observer sees that of all."""
        observer = self._parts.observer
        if observer is None:
            queries = queries.rows(slice(0, blocks.num_rows))
        else:
            blocks = self._rows.blocks
        with self._stages.time("attention"):
            attended, lse = sparse.attention(
                queries, blocks, pages, self._stride, self._scale, selections
            )
        if observer is not None:
            observer(
                SparseAttention(
                    number, queries, blocks, pages, self._stride, self._scale, lse, selections
                )
            )
        return attended

    def _attend_in_full(
        self, queries: SegmentQueries, blocks: QueryBlocks, pages: LayerPages
    ) -> Tensor:
        with self._stages.time("attention"):
            return dual_chunk.attention(queries, blocks, pages, self._stride, self._scale)[0]


@dataclass(frozen=True)
class LastRowAttention(Attention[Tensor]):
    """Of the prompt's last row alone, whose K and V, as all others, `chunk` has written."""

    chunk: ChunkAttention
    stages: Stages

    def write(self, layer: Layer, normed: Rows) -> Tensor:
        with self.stages.time("linear"):
            return layer.queries(normed)

    def attend(self, layer: Layer, queries: Tensor) -> Tensor:
        return self.chunk.attend_last(layer, queries)
