"""Prefill on one rank: a prompt, chunk by chunk, into KV pages and a first distribution.

Every rank of a mesh has a Prefiller, and every call is made on all of them in the same order.
The rows of a chunk are dealt to the sequence ranks in blocks of 128; each rank computes K and V of
its blocks, all ranks gather them, and so each rank's pages hold the whole prompt for its KV heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...kernels import dual_chunk, quantized, sparse
from ...kernels.dual_chunk import BLOCK_ROWS, QueryBlocks, SegmentQueries
from ...kernels.pages import BlockTable, LayerPages
from ...kernels.sparse import Selections
from ...kernels.transfer import without_waiting
from ..errors import CacheTooSmallError, ChunkOutOfMemoryError, InvalidRequestError
from ..kv.chunk_pages import ChunkPages
from ..kv.hand_off import HandOff, Place
from ..kv.pages import PAGE_TOKENS, PagePool, pages_for
from ..memory.out_of_memory import out_of_memory_raises
from ..messages import Tokens
from ..model.qwen2 import Qwen2
from ..stages import Stages
from .selection import ChunkSelector
from .sparsity import SparsityConfig

_CPU_ROWS = 16 * BLOCK_ROWS
_FULL_ROWS = 128
"""The last rows of a prompt attend to everything, under sparse attention too."""


@dataclass(frozen=True)
class ChunkResult:
    """What came out of one chunk.

    `logits` are those after the prompt's last token, float32 [vocab] on every rank, once the chunk
    reaches the prompt's end, else None.
    """

    logits: Tensor | None
    _stages: Stages

    @cached_property
    def stages(self) -> dict[str, float]:
        """Seconds by what they were spent on; on a GPU, returns when the chunk is computed.

        Keys: linear, attention, selection, elementwise, page writes, communication, hand-off. A
        chunk's time that is in none of them went to launches and the host.
        """
        return self._stages.seconds()


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


@dataclass
class _Admitted:
    """A prompt under way; `done` tokens lie in its pages."""

    prompt: Tokens
    pages: list[int]
    block_table: BlockTable
    done: int = 0


class Prefiller:
    """Computes prompts on one rank. Not thread-safe.

    Activations grow with the chunk, never with the prompt. An observer is shown sparse attention
    as it happens, for measurements.
    """

    def __init__(
        self,
        model: Qwen2,
        pool: PagePool,
        sparsity: SparsityConfig | None,
        observer: Observer | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._sparsity = sparsity
        self._observer = observer
        self._admitted: dict[str, _Admitted] = {}
        self._widened = _widened(pool, model.dtype) if pool.geometry.quantized else None

    def admit(
        self,
        request_id: str,
        prompt: Tokens,
        pages: Sequence[int] | None = None,
        done: int = 0,
    ) -> None:
        """Reserve pages for a prompt, or take those that a decoder on the same pool reserved.

        Args:
            pages: held by someone else for the whole prompt, who then finds K and V in them.
            done: tokens whose K and V lie in `pages` already, whole pages of them; the first chunk
                starts there.

        Raises:
            CacheTooSmallError: the prompt is larger than all pages together.
            OutOfPagesError: they are not free now; nothing was reserved.
            InvalidRequestError: no tokens, too few pages, no place to go on at, or a request of
                that name is admitted already.
        """
        if len(prompt) == 0:
            raise InvalidRequestError("a prompt needs at least one token")
        if done % PAGE_TOKENS or not 0 <= done < len(prompt):
            raise InvalidRequestError(
                f"prefill goes on at a multiple of {PAGE_TOKENS} within the prompt's {len(prompt)} "
                f"tokens, not at {done}"
            )
        if request_id in self._admitted:
            raise InvalidRequestError(f"request {request_id} is being prefilled already")
        needed = pages_for(len(prompt))
        if needed > self._pool.num_pages:
            total = self._pool.num_pages * PAGE_TOKENS
            raise CacheTooSmallError("prefill", len(prompt), total)
        if pages is None:
            held = self._pool.allocate(needed)
        elif len(pages) < needed:
            raise InvalidRequestError(f"the prompt needs {needed} pages, not {len(pages)}")
        else:
            held = list(pages[:needed])
            self._pool.share(held)
        self._admitted[request_id] = _Admitted(prompt, held, BlockTable.of(held), done)

    def release(self, request_id: str) -> None:
        """Give the pages of a request back, finished or not; unknown requests are no error."""
        admitted = self._admitted.pop(request_id, None)
        if admitted is not None:
            self._pool.release(admitted.pages)

    @torch.inference_mode()
    def run_chunk(
        self, request_id: str, start: int, end: int, sender: HandOff | None = None
    ) -> ChunkResult:
        """Compute prompt tokens [start, end); collective over the mesh.

        Args:
            start: where the request's last chunk ended.
            end: a multiple of 128, or the end of the prompt.
            sender: takes each layer's finished pages, this rank's share of them.

        Raises:
            InvalidRequestError: no such request, or not its next chunk.
            ChunkOutOfMemoryError: the device had too little. The request is as it was before, and
                its pages are held until it is released; other ranks may wait in a collective.
        """
        admitted = self._next_chunk_of(request_id, start, end)
        with out_of_memory_raises(ChunkOutOfMemoryError(start, end)):
            result = self._compute(admitted, start, end, sender)
        admitted.done = end
        return result

    def _compute(
        self, admitted: _Admitted, start: int, end: int, sender: HandOff | None
    ) -> ChunkResult:
        chunk = _Chunk(
            self._model, self._pool, self._sparsity, admitted, start, end, sender,
            self._observer, self._widened,
        )  # fmt: skip
        return ChunkResult(chunk.run(), chunk.stages)

    def _next_chunk_of(self, request_id: str, start: int, end: int) -> _Admitted:
        admitted = self._admitted.get(request_id)
        if admitted is None:
            raise InvalidRequestError(f"request {request_id} was not admitted, or was released")
        length = len(admitted.prompt)
        if start != admitted.done or not start < end <= length:
            raise InvalidRequestError(
                f"request {request_id}: chunk [{start}, {end}) does not follow on "
                f"{admitted.done} of {length} tokens"
            )
        if end % PAGE_TOKENS and end != length:
            raise InvalidRequestError(
                f"request {request_id}: a chunk must end at a multiple of {PAGE_TOKENS} or at "
                f"the prompt's end, not at {end}"
            )
        return admitted


class _Chunk:
    """One chunk of one prompt on this rank."""

    def __init__(
        self,
        model: Qwen2,
        pool: PagePool,
        sparsity: SparsityConfig | None,
        admitted: _Admitted,
        start: int,
        end: int,
        sender: HandOff | None,
        observer: Observer | None,
        widened: LayerPages | None,
    ) -> None:
        self._model, self._mesh, self._pool = model, model.mesh, pool
        self._widened = widened
        self._sender, self._observer = sender, observer
        self._end, self._length = end, len(admitted.prompt)
        self._table = admitted.block_table
        self._scale = model.positions.softmax_scale(self._length)
        self.stages = Stages.on(model.device)
        every = range(start // BLOCK_ROWS, pages_for(end))
        own = tuple(b for b in every if self._owner_of(b) == self._mesh.sequence_rank)
        self._blocks = QueryBlocks(own, end)
        positions = self._blocks.positions()
        self._tokens = without_waiting(
            torch.from_numpy(admitted.prompt[positions.numpy()]), model.device
        )
        self._rotations = model.positions.rotations(
            without_waiting(positions, model.device), range(start, end)
        )
        self._pages = ChunkPages(
            pool, self._mesh, admitted.pages[every.start : every.stop], every.start, own,
            len(positions),
        )  # fmt: skip
        self._steps = _steps(len(positions), model.device)
        self._selector = None
        if sparsity is not None and self._length > sparsity.threshold:
            self._selector = ChunkSelector(
                model, sparsity, positions.numpy(), start, end, self._scale, self.stages
            )

    def run(self) -> Tensor | None:
        """Logits [vocab] after the prompt's last token, None before its end."""
        with self.stages.time("linear"):
            residual = self._model.embed(self._tokens)
        with self.stages.time("elementwise"):
            normed = self._model.layers[0].input_norm(residual)
        hidden = [normed, residual]
        del normed, residual
        for number in range(len(self._model.layers) - 1):
            self._run_layer(number, hidden)
        return self._run_last_layer(*hidden)

    def _run_layer(self, number: int, hidden: list[Tensor]) -> None:
        """Put what comes out in place of what goes in: normed rows, and the residual stream.

        The list is emptied at once, so that nothing outlives its use.
        """
        residual = hidden.pop()
        queries, last = self._project(number, hidden.pop())
        self._share_pages(number)
        attended = self._attend(number, queries, last)
        del queries
        layer, next_norm = self._model.layers[number], self._model.norm_after(number)
        hidden += self._by_rows(
            lambda rows: layer.finish(attended[rows], residual[rows], next_norm, self.stages)
        )

    def _project(self, number: int, normed: Tensor) -> tuple[SegmentQueries, Tensor | None]:
        """Write this rank's K and V; its rotated queries, and the selector's last queries."""
        parts = self._by_rows(lambda rows: self._project_rows(number, normed, rows))
        last = None
        if self._selector is not None:
            last = self._selector.last_queries(self._model.layers[number], normed)
        return SegmentQueries(*parts), last

    def _project_rows(
        self, number: int, normed: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write K and V of some of this rank's rows; their queries under three rotations."""
        with self.stages.time("linear"):
            q, k, v = self._model.layers[number].project(normed[rows])
        rotations = self._rotations.rows(rows)
        with self.stages.time("elementwise"):
            queries = rotations.rotate(q)
        with self.stages.time("page writes"):
            self._pages.write(number, rows, k, v, rotations.intra)
        return queries.intra, queries.successive, queries.inter

    def _run_last_layer(self, normed: Tensor, residual: Tensor) -> Tensor | None:
        """Of the last layer only K and V are wanted, and the prompt's last row."""
        number = len(self._model.layers) - 1
        for rows in self._steps:
            with self.stages.time("linear"):
                k, v = self._model.layers[number].keys_values(normed[rows])
            with self.stages.time("page writes"):
                self._pages.write(number, rows, k, v, self._rotations.rows(rows).intra)
        self._share_pages(number)
        if self._end < self._length:
            return None
        logits = torch.zeros(self._model.config.vocab_size, device=self._model.device)
        if self._owner_of((self._length - 1) // BLOCK_ROWS) == self._mesh.sequence_rank:
            logits = self._last_logits(number, normed[-1:], residual[-1:])
        with self.stages.time("communication"):
            return self._mesh.sum_over_sequence_ranks(logits)

    def _last_logits(self, number: int, normed: Tensor, residual: Tensor) -> Tensor:
        """Logits [vocab] after the prompt's last token, whose hidden states are [1, hidden]."""
        model, layer = self._model, self._model.layers[number]
        pages = self._readable_pages(number)
        with self.stages.time("attention"):
            attended = dual_chunk.decode_attention(
                self._rotations.rows(slice(-1, None)).rotate(layer.queries(normed)),
                pages.memory,
                pages.table.pages.tolist(),
                self._length,
                model.positions.stride,
                self._scale,
            )
        normed, _ = layer.finish(attended, residual, model.norm_after(number), self.stages)
        with self.stages.time("linear"):
            return model.logits(normed)[0]

    def _by_rows(self, function: Callable[[slice], tuple[Tensor, ...]]) -> list[Tensor]:
        """Call a function on a few blocks of rows at a time, and join its results.

        What a whole chunk leaves in between outgrows a CPU's caches; a GPU wants all rows at once.
        """
        parts = [function(rows) for rows in self._steps]
        if len(parts) == 1:
            return list(parts[0])
        joined: dict[int, Tensor] = {}  # Results that are one tensor stay one.
        for results in zip(*parts, strict=True):
            if id(results[0]) not in joined:
                joined[id(results[0])] = torch.cat(results)
        return [joined[id(result)] for result in parts[0]]

    def _share_pages(self, number: int) -> None:
        """Make this chunk's pages of one layer whole, and hand this rank's share of them off."""
        if self._mesh.sequence_parallel > 1:
            with self.stages.time("communication"):
                self._pages.gather(number)
        if self._sender is not None and self._model.heads.owns_kv:
            with self.stages.time("hand-off"):
                share = self._pages.share(number)
                if share is not None:
                    first_page, pages = share
                    place = Place(number, first_page, self._model.heads.first_kv_head)
                    self._sender.push(place, pages)

    def _attend(self, number: int, queries: SegmentQueries, last: Tensor | None) -> Tensor:
        """Attention of this rank's rows, [n, heads, d]; `last` are the selector's last queries."""
        pages = self._readable_pages(number)
        if self._selector is None or last is None:
            return self._attend_in_full(queries, self._blocks, pages)
        selections = self._selector.choose(number, last, pages)
        sparse_blocks, full_blocks = self._split_blocks()
        border = sparse_blocks.num_rows
        if self._observer is None:
            attended, _ = self._attend_sparsely(
                queries.rows(slice(0, border)), sparse_blocks, pages, selections
            )
        else:
            attended, lse = self._attend_sparsely(queries, self._blocks, pages, selections)
            stride = self._model.positions.stride
            self._observer(
                SparseAttention(
                    number, queries, self._blocks, pages, stride, self._scale, lse, selections
                )
            )
        if not full_blocks.blocks:
            return attended
        full = self._attend_in_full(queries.rows(slice(border, None)), full_blocks, pages)
        return torch.cat((attended[:border], full))

    def _readable_pages(self, number: int) -> LayerPages:
        """One layer's pages up to the chunk's end, in a type that attention reads.

        Pages of 8 bits are widened, once for all blocks of rows, into memory that the next layer
        uses again.
        """
        memory, scales = self._pool.memory[number], self._pool.layer_scales(number)
        if scales is None or self._widened is None:
            return LayerPages(memory, self._table, read_as=self._model.dtype)
        count = pages_for(self._end)
        with self.stages.time("page writes"):
            table = self._table.on(memory.device)[:count]
            quantized.widen_pages(memory, scales, table, self._widened.memory[:count])
        return self._widened

    def _split_blocks(self) -> tuple[QueryBlocks, QueryBlocks]:
        """This rank's blocks that attend sparsely, and those that hold the prompt's end.

        A question mostly stands there, and its own rows are those that cannot do without full
        attention: see lab/pocket/EXPERIMENTS.md.
        """
        first = (self._length - _FULL_ROWS) // BLOCK_ROWS
        sparse_blocks = tuple(b for b in self._blocks.blocks if b < first)
        full_blocks = self._blocks.blocks[len(sparse_blocks) :]
        return QueryBlocks(sparse_blocks, self._end), QueryBlocks(full_blocks, self._end)

    def _attend_sparsely(
        self, queries: SegmentQueries, blocks: QueryBlocks, pages: LayerPages, chosen: Selections
    ) -> tuple[Tensor, Tensor]:
        stride = self._model.positions.stride
        with self.stages.time("attention"):
            return sparse.attention(queries, blocks, pages, stride, self._scale, chosen)

    def _attend_in_full(
        self, queries: SegmentQueries, blocks: QueryBlocks, pages: LayerPages
    ) -> Tensor:
        stride = self._model.positions.stride
        with self.stages.time("attention"):
            return dual_chunk.attention(queries, blocks, pages, stride, self._scale)[0]

    def _owner_of(self, block: int) -> int:
        """The sequence rank that holds a block's rows."""
        return block % self._mesh.sequence_parallel


def _widened(pool: PagePool, dtype: torch.dtype) -> LayerPages:
    """Room for one layer of all pages in a type that attention reads, in a sequence's order."""
    memory = torch.empty_like(pool.memory[0], dtype=dtype)
    return LayerPages(memory, BlockTable.of(range(pool.num_pages)))


def _steps(num_rows: int, device: torch.device) -> list[slice]:
    """Which rows are computed at once; at least one step, of no rows where there are none."""
    step = _CPU_ROWS if device.type == "cpu" else max(num_rows, 1)
    return [slice(row, min(row + step, num_rows)) for row in range(0, max(num_rows, 1), step)]
