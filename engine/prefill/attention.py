"""Attention of one prefill chunk: K and V into pages, pages to whoever waits for them, attention.

The rows of a chunk are dealt to the sequence ranks in blocks of 128; each rank computes K and V of
its blocks, all ranks gather them, and so each rank's pages hold the whole prompt for its KV heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import dual_chunk, quantized, sparse
from ...kernels.dual_chunk import BLOCK_ROWS, LastRow, QueryBlocks, SegmentQueries
from ...kernels.narrow import Rows
from ...kernels.page_size import pages_for
from ...kernels.pages import BlockTable, LayerPages
from ...kernels.sparse import Selections
from ..kv.chunk_pages import ChunkPages
from ..kv.hand_off import HandOff, Place
from ..kv.pages import PagePool
from ..model.layer import Attention, Layer
from ..model.qwen2 import Qwen2
from ..parallel.aside import Pending
from ..stages import Stages
from .chunk_rows import ChunkRows
from .full_rows import EverySequenceRank
from .shared_rows import SharedRows
from .sparse_chunk import SparseChunk, SparsePart
from .sparsity import SparsityConfig


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
Planted = Callable[[list[Selections]], list[Selections]]


@dataclass(frozen=True, eq=False)
class PrefillParts:
    """What all chunks of a prefiller have in common.

    `widened` is one layer of all pages in a type that attention reads, where pages are of 8 bits.
    `planted` selections, of each window of a chunk, take the place of a layer's own.
    """

    model: Qwen2
    pool: PagePool
    sparsity: SparsityConfig | None
    observer: Observer | None
    planted: Planted | None
    widened: LayerPages | None


@dataclass(frozen=True)
class ChunkQueries:
    """Queries of one layer.

    `rotated` are those of this rank's rows, each [n, heads, d]; `shared` those that all ranks need,
    not rotated, under sparse attention. `gathered`: when K and V of all ranks lie in the pages.
    """

    rotated: SegmentQueries
    shared: Pending[Tensor] | None
    gathered: Pending[Tensor] | None


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
        self._sparse = None
        sparsity = parts.sparsity
        if sparsity is not None and rows.length > sparsity.threshold:
            self._sparse = SparseChunk.of(self._model, sparsity, rows, self._scale, stages)

    def write(self, layer: Layer, normed: Rows) -> ChunkQueries:
        """Write this rank's K and V, and begin to exchange them beside the queries' products."""
        shared = None
        if self._sparse is not None:
            with self._stages.time("selection"):
                shared = self._sparse.shared.begin(layer, normed)
        steps = self._rows.steps
        if self._model.mesh.sequence_parallel == 1:
            rotated = steps.map(lambda rows: self._project(layer, normed, rows))
            return ChunkQueries(SegmentQueries(*rotated), shared, None)
        gathered = self._begin_pages(layer, normed)
        rotated = steps.map(lambda rows: self._project_queries(layer, normed, rows))
        return ChunkQueries(SegmentQueries(*rotated), shared, gathered)

    def write_keys_values(self, layer: Layer, normed: Rows) -> None:
        """As `write`, for a layer of which no one wants all queries; pages are complete then."""
        self._complete_pages(layer.number, self._begin_pages(layer, normed))

    def attend(self, layer: Layer, queries: ChunkQueries) -> Tensor:
        """Hand off what is exchanged, and attend to all there is."""
        self._complete_pages(layer.number, queries.gathered)
        pages = self._readable_pages(layer.number)
        if self._sparse is None or queries.shared is None:
            with self._stages.time("attention"):
                return dual_chunk.attention(
                    queries.rotated, self._rows.blocks, pages, self._stride, self._scale
                )[0]
        with self._stages.time("communication"):
            shared = queries.shared.wait()
        selections = self._sparse.choose(layer.number, shared, pages)
        if self._parts.planted is not None:
            selections = self._parts.planted(selections)
        attended = torch.empty_like(queries.rotated.intra, memory_format=torch.contiguous_format)
        for part, chosen in zip(self._sparse.parts, selections, strict=True):
            self._attend_sparsely(layer.number, queries.rotated, part, pages, chosen, attended)
        if self._sparse.last is not None:
            self._sparse.last.attend(shared, pages, attended)
        return attended

    def attend_last(self, layer: Layer, normed: Rows) -> Tensor:
        """Attention of the prompt's last row, [1, heads, d] on every rank; collective."""
        row = range(self._rows.length - 1, self._rows.length)
        held = self._rows.positions.numpy()
        with self._stages.time("linear"):
            queries = SharedRows(self._model, held, [row]).begin(layer, normed)
        attention = EverySequenceRank(
            self._model, row, LastRow(row.stop), self._scale, self._stages
        )
        with self._stages.time("communication"):
            shared = queries.wait()
        return attention.attend(shared, self._readable_pages(layer.number))

    def _project(self, layer: Layer, normed: Rows, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Write K and V of some of this rank's rows; their queries under three rotations."""
        with self._stages.time("linear"):
            q, k, v = layer.project(normed[rows])
        self._write_pages(layer.number, rows, k, v)
        return self._rotate(q, rows)

    def _project_queries(
        self, layer: Layer, normed: Rows, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        with self._stages.time("linear"):
            q = layer.queries(normed[rows])
        return self._rotate(q, rows)

    def _rotate(self, q: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        with self._stages.time("elementwise"):
            queries = self._rows.rotations.rows(rows).rotate(q)
        return queries.intra, queries.successive, queries.inter

    def _begin_pages(self, layer: Layer, normed: Rows) -> Pending[Tensor] | None:
        """Write K and V of this rank's rows, and begin to exchange them."""
        for rows in self._rows.steps.slices:
            with self._stages.time("linear"):
                k, v = layer.keys_values(normed[rows])
            self._write_pages(layer.number, rows, k, v)
        with self._stages.time("communication"):
            return self._pages.begin_gather(layer.number)

    def _write_pages(self, number: int, rows: slice, k: Tensor, v: Tensor) -> None:
        with self._stages.time("page writes"):
            self._pages.write(number, rows, k, v, self._rows.rotations.rows(rows).intra)

    def _complete_pages(self, number: int, gathered: Pending[Tensor] | None) -> None:
        """Wait for this chunk's pages of one layer, and hand off those that fall to this rank."""
        if gathered is not None:
            with self._stages.time("communication"):
                gathered.wait()
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

    def _attend_sparsely(
        self,
        number: int,
        queries: SegmentQueries,
        part: SparsePart,
        pages: LayerPages,
        selections: Selections,
        attended: Tensor,
    ) -> None:
        """Attention of a window's rows; an observer sees that of all, those in full included."""
        observer = self._parts.observer
        blocks, rows = (part.sparse, part.rows) if observer is None else (part.every, part.all_rows)
        own = queries.rows(rows)
        with self._stages.time("attention"):
            _, lse = sparse.attention(
                own, blocks, pages, self._stride, self._scale, selections, attended[rows]
            )
        if observer is not None:
            observer(
                SparseAttention(
                    number, own, blocks, pages, self._stride, self._scale, lse, selections
                )
            )


@dataclass(frozen=True)
class AttendedAlready(Attention[None]):
    """For a layer whose rows have attended: [n, heads, d]."""

    attended: Tensor

    def write(self, layer: Layer, normed: Rows) -> None:
        """K and V are written."""

    def attend(self, layer: Layer, queries: None) -> Tensor:
        return self.attended
