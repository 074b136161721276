"""Prefill on one rank: a prompt, chunk by chunk, into KV pages and a first distribution.

Every rank of a mesh has a Prefiller, and every call is made on all of them in the same order.
The rows of a chunk are dealt to the sequence ranks in blocks of 128; each rank computes K and V of
its blocks, all ranks gather them, and so each rank's pages hold the whole prompt for its KV heads.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import dual_chunk, quantized, sparse
from ..kernels.dual_chunk import BLOCK_ROWS, QueryBlocks, SegmentQueries
from ..kernels.pages import BlockTable, LayerPages, to_pages
from ..kernels.sparse import NOTHING, Selections
from .errors import InvalidRequestError
from .messages import Tokens
from .pages import PAGE_TOKENS, PagePool, pages_for
from .qwen2 import Layer, Qwen2
from .sparsity import SparsityConfig
from .transport import PageSender

_CPU_ROWS = 16 * BLOCK_ROWS
_FULL_ROWS = 128
"""The last rows of a prompt attend to everything, under sparse attention too."""


@dataclass(frozen=True)
class ChunkResult:
    """What came out of one chunk.

    `logits` are those after the prompt's last token, float32 [vocab] on every rank, once the chunk
    reaches the prompt's end, else None. `stages` are seconds by what they were spent on.
    """

    logits: Tensor | None
    stages: dict[str, float]


@dataclass(frozen=True)
class SparseAttention:
    """What sparse attention of one layer was asked in one chunk, and its log-sum-exp.

    `queries` are rotated, each [rows, heads, d]; `lse` is float32 [rows, heads]. Pages hold the
    layer's keys up to the chunk's end, as long as the observer that is given this runs.
    """

    layer: int
    queries: SegmentQueries
    blocks: QueryBlocks
    pages: LayerPages
    stride: int | None
    scale: float
    lse: Tensor


Observer = Callable[[SparseAttention], None]


@dataclass
class _Admitted:
    """A prompt under way; `done` tokens lie in its pages."""

    prompt: Tokens
    pages: list[int]
    done: int = 0


@dataclass
class _Stages:
    """Adds up seconds by stage."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


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
        # Attention reads pages of 8 bits widened, a layer at a time.
        self._scratch = (
            torch.empty_like(pool.memory[0], dtype=model.dtype) if pool.geometry.quantized else None
        )

    def admit(self, request_id: str, prompt: Tokens) -> None:
        """Reserve pages for a prompt.

        Raises:
            OutOfPagesError: they are not free now; nothing was reserved.
            InvalidRequestError: no tokens, or a request of that name is admitted already.
        """
        if len(prompt) == 0:
            raise InvalidRequestError("a prompt needs at least one token")
        if request_id in self._admitted:
            raise InvalidRequestError(f"request {request_id} is being prefilled already")
        self._admitted[request_id] = _Admitted(prompt, self._pool.allocate(pages_for(len(prompt))))

    def release(self, request_id: str) -> None:
        """Give the pages of a request back, finished or not; unknown requests are no error."""
        admitted = self._admitted.pop(request_id, None)
        if admitted is not None:
            self._pool.release(admitted.pages)

    @torch.inference_mode()
    def run_chunk(
        self, request_id: str, start: int, end: int, sender: PageSender | None = None
    ) -> ChunkResult:
        """Compute prompt tokens [start, end); collective over the mesh.

        Args:
            start: where the request's last chunk ended.
            end: a multiple of 128, or the end of the prompt.
            sender: takes each layer's finished pages, this rank's share of them.

        Raises:
            InvalidRequestError: no such request, or not its next chunk.
        """
        admitted = self._next_chunk_of(request_id, start, end)
        chunk = _Chunk(
            self._model, self._pool, self._sparsity, admitted, start, end, sender,
            self._observer, self._scratch,
        )  # fmt: skip
        logits = chunk.run()
        admitted.done = end
        return ChunkResult(logits, dict(chunk.stages.seconds))

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
        sender: PageSender | None,
        observer: Observer | None,
        scratch: Tensor | None,
    ) -> None:
        self._scratch = scratch
        self._model, self._mesh, self._pool = model, model.mesh, pool
        self._sender, self._observer = sender, observer
        self._start, self._end = start, end
        self._length = len(admitted.prompt)
        self._prompt = admitted.prompt
        self._table = admitted.pages
        self._block_table = BlockTable.of(admitted.pages)
        self._scale = model.positions.softmax_scale(self._length)
        use_sparse = sparsity is not None and self._length > sparsity.threshold
        self._sparsity = sparsity if use_sparse else None
        every = range(start // BLOCK_ROWS, pages_for(end))
        self._num_blocks = len(every)
        self._first_block = every.start
        own = [b for b in every if b % self._mesh.sequence_parallel == self._mesh.sequence_rank]
        self._blocks = QueryBlocks(tuple(own), end)
        self._positions = self._blocks.positions(model.device)
        self.stages = _Stages()

    def run(self) -> Tensor | None:
        with self.stages.time("linear"):
            tokens = torch.from_numpy(self._prompt[self._positions.cpu().numpy()])
            hidden = self._model.embed(tokens.to(self._model.device, torch.int64))
        for number, layer in enumerate(self._model.layers[:-1]):
            hidden = self._run_layer(number, layer, hidden)
        return self._run_last_layer(hidden)

    def _run_layer(self, number: int, layer: Layer, hidden: Tensor) -> Tensor:
        with self.stages.time("linear"):
            *pages, intra, successive, inter = self._map_rows(
                lambda hidden, positions: self._project(layer, hidden, positions), hidden
            )
        self._store(number, *pages)
        queries = SegmentQueries(intra, successive, inter)
        attended = self._attend(number, layer, hidden, queries)
        with self.stages.time("linear"):
            [hidden] = self._map_rows(
                lambda hidden, _, attended: (layer.finish(hidden, attended),), hidden, attended
            )
        return hidden

    def _project(self, layer: Layer, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """This rank's pages of whole blocks of rows, and their queries under three rotations."""
        q, k, v = layer.project(hidden)
        queries = self._model.positions.queries(q, positions)
        pages = self._to_pages(k, v, positions)
        return *pages, queries.intra, queries.successive, queries.inter

    def _to_pages(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Pages of whole blocks of rows, as the pool keeps them, and their scales if any."""
        rotation = self._model.positions.key_rotation(positions)
        if self._scratch is None:
            return (to_pages(rotation.apply(k), v),)
        rows, kv_heads, head_dim = k.shape
        shape = (pages_for(rows), kv_heads, 2, PAGE_TOKENS, head_dim)
        pages = torch.empty(shape, dtype=self._pool.memory.dtype, device=k.device)
        scales = torch.empty(shape[:3], device=k.device)
        order = torch.arange(len(pages), device=k.device)
        quantized.narrow_pages(pages, scales, order, k, v, rotation)
        return pages, scales

    def _run_last_layer(self, hidden: Tensor) -> Tensor | None:
        """Of the last layer only K and V are wanted, and the prompt's last row."""
        number = len(self._model.layers) - 1
        layer = self._model.layers[number]
        with self.stages.time("linear"):
            pages = self._map_rows(
                lambda hidden, positions: self._project_keys(layer, hidden, positions), hidden
            )
        self._store(number, *pages)
        if self._end < self._length:
            return None
        logits = torch.zeros(self._model.config.vocab_size, device=self._model.device)
        if self._owner_of(self._length - 1) == self._mesh.sequence_rank:
            logits = self._last_logits(number, layer, hidden[-1:])
        return self._mesh.sum_over_sequence_ranks(logits)

    def _project_keys(self, layer: Layer, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return self._to_pages(*layer.keys_values(layer.input_norm(hidden)), positions)

    def _map_rows(
        self, function: Callable[..., tuple[Tensor, ...]], hidden: Tensor, *more: Tensor
    ) -> list[Tensor]:
        """Call function(hidden, positions, *more) on a few blocks of rows at a time.

        What a whole chunk leaves in between outgrows a CPU's caches; a GPU wants all rows at once.
        """
        step = len(hidden) if hidden.is_cuda else _CPU_ROWS
        parts = [
            function(*(each[row : row + step] for each in (hidden, self._positions, *more)))
            for row in range(0, max(len(hidden), 1), max(step, 1))
        ]
        if len(parts) == 1:
            return list(parts[0])
        return [torch.cat(results) for results in zip(*parts, strict=True)]

    def _last_logits(self, number: int, layer: Layer, hidden: Tensor) -> Tensor:
        """Logits [vocab] after the prompt's last token, whose hidden state is [1, hidden]."""
        model = self._model
        with self.stages.time("attention"):
            q = layer.queries(layer.input_norm(hidden))
            attended = dual_chunk.decode_attention(
                model.positions.queries(q, self._positions[-1:]),
                self._pool.memory[number],
                self._table,
                self._length,
                model.positions.stride,
                self._scale,
                self._pool.layer_scales(number),
            )
        with self.stages.time("linear"):
            return model.logits(layer.finish(hidden, attended))[0]

    def _store(self, number: int, own: Tensor, own_scales: Tensor | None = None) -> None:
        """Put all ranks' pages of this chunk into the pool, and hand this rank's share off."""
        with self.stages.time("communication"):
            pages = self._gather_pages(own)
            scales = None if own_scales is None else self._gather_pages(own_scales)
            first, last = self._first_block, self._first_block + self._num_blocks
            target = self._block_table.on(pages.device)[first:last].long()
            self._pool.put(number, target, 0, pages, scales)
        if self._sender is not None and self._model.heads.owns_kv:
            with self.stages.time("hand-off"):
                self._hand_off(self._sender, number, pages, scales)

    def _gather_pages(self, own: Tensor) -> Tensor:
        """Every rank's pages of this chunk in their order, [blocks, kv_heads, 2, 128, d]."""
        ranks = self._mesh.sequence_parallel
        if ranks == 1:
            return own
        most = -(-self._num_blocks // ranks)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        # Bytes, where a page has 8 bits: collectives know no e4m3.
        bits = torch.uint8 if own.itemsize == 1 else own.dtype
        gathered = self._mesh.gather_over_sequence_ranks(padded.view(bits)).view(own.dtype)
        # The chunk's first block need not be rank 0's: begin with the rank whose it is.
        turned = gathered.roll(-(self._first_block % ranks), dims=0)
        return turned.transpose(0, 1).flatten(0, 1)[: self._num_blocks]

    def _hand_off(
        self, sender: PageSender, number: int, pages: Tensor, scales: Tensor | None
    ) -> None:
        """Push the contiguous part of the chunk's pages that falls to this rank."""
        ranks, rank = self._mesh.sequence_parallel, self._mesh.sequence_rank
        first = self._num_blocks * rank // ranks
        last = self._num_blocks * (rank + 1) // ranks
        if first < last:
            first_kv_head = self._model.heads.first_kv_head
            part = None if scales is None else scales[first:last]
            sender.push(number, self._first_block + first, first_kv_head, pages[first:last], part)

    def _attend(self, number: int, layer: Layer, hidden: Tensor, queries: SegmentQueries) -> Tensor:
        """Attention of this rank's rows, [n, heads, d]."""
        pages = self._read_pages(number)
        stride = self._model.positions.stride
        if self._sparsity is None:
            with self.stages.time("attention"):
                attended, _ = dual_chunk.attention(
                    queries, self._blocks, pages, stride, self._scale
                )
                return attended
        with self.stages.time("selection"):
            selections = self._select(number, layer, hidden, pages, self._sparsity)
        with self.stages.time("attention"):
            attended, lse = sparse.attention(
                queries, self._blocks, pages, stride, self._scale, selections
            )
        if self._observer is not None:
            self._observer(
                SparseAttention(number, queries, self._blocks, pages, stride, self._scale, lse)
            )
        with self.stages.time("attention"):
            self._attend_in_full(queries, pages, attended)
        return attended

    def _read_pages(self, number: int) -> LayerPages:
        """One layer's pages up to the chunk's end, in a type that attention reads."""
        memory, scales = self._pool.memory[number], self._pool.layer_scales(number)
        if scales is None or self._scratch is None:
            return LayerPages(memory, self._block_table)
        count = pages_for(self._end)
        with self.stages.time("page writes"):
            table = self._block_table.on(memory.device)[:count]
            quantized.widen_pages(memory, scales, table, self._scratch[:count])
        return LayerPages(self._scratch, BlockTable.of(range(count)))

    def _attend_in_full(self, queries: SegmentQueries, pages: LayerPages, attended: Tensor) -> None:
        """Put full attention in place of sparse for the blocks that hold the prompt's end.

        A question mostly stands there, and its own rows are those that cannot do without: see
        engine/pocket/EXPERIMENTS.md.
        """
        first = (self._length - _FULL_ROWS) // BLOCK_ROWS
        blocks = QueryBlocks(tuple(b for b in self._blocks.blocks if b >= first), self._end)
        if blocks.num_rows == 0:
            return
        rows = slice(len(attended) - blocks.num_rows, len(attended))
        attended[rows], _ = dual_chunk.attention(
            queries.rows(rows), blocks, pages, self._model.positions.stride, self._scale
        )

    def _select(
        self,
        number: int,
        layer: Layer,
        hidden: Tensor,
        pages: LayerPages,
        sparsity: SparsityConfig,
    ) -> Selections:
        """What each head attends to; heads are dealt to the sequence ranks, results shared."""
        share = self._model.heads
        rows = min(sparsity.last_queries, self._end - self._start)
        first_position = self._end - rows
        last = self._last_queries(layer, hidden, first_position)
        where = torch.arange(first_position, self._end, device=last.device)
        queries = self._model.positions.selection_queries(last, where)
        budgets = sparsity.heads(number, share.first_head, share.last_head)
        ranks, rank = self._mesh.sequence_parallel, self._mesh.sequence_rank
        own = slice(share.num_heads * rank // ranks, share.num_heads * (rank + 1) // ranks)
        chosen = None
        if own.start < own.stop:
            sums = sparse.sums(
                queries.heads(own), first_position, pages, own.start,
                self._model.positions.stride, self._scale, share.num_heads // share.num_kv_heads,
            )  # fmt: skip
            chosen = sparse.by_bands(sums, budgets[own])
        if ranks == 1:
            assert chosen is not None
            return chosen
        return self._exchange(chosen, own, sparse.widths_by_bands(budgets, self._end))

    def _exchange(
        self, chosen: Selections | None, own: slice, widths: tuple[int, int]
    ) -> Selections:
        """All heads' selections on every sequence rank, from each rank's heads `own`.

        Each rank fills in its heads and leaves the others 0, so a sum is an exchange.
        """
        heads, device = self._model.heads.num_heads, self._model.device
        shared = torch.zeros(heads, sum(widths), dtype=torch.int32, device=device)
        if chosen is not None:
            shared[own] = torch.cat(
                [
                    torch.nn.functional.pad(each, (0, width - each.shape[1]), value=NOTHING)
                    for each, width in zip((chosen.columns, chosen.distances), widths, strict=True)
                ],
                1,
            )
        columns, distances = self._mesh.sum_over_sequence_ranks(shared).split(widths, 1)
        return Selections(columns.contiguous(), distances.contiguous())

    def _last_queries(self, layer: Layer, hidden: Tensor, first_position: int) -> Tensor:
        """Queries of the chunk's rows from `first_position` on, [rows, heads, d] float32.

        They are projected once more here, by whichever ranks hold them: 64 rows cost nothing.
        """
        held = self._positions >= first_position
        q = layer.queries(layer.input_norm(hidden[held]))
        last = q.new_zeros(self._end - first_position, *q.shape[1:], dtype=torch.float32)
        last[self._positions[held] - first_position] = q.float()
        return self._mesh.sum_over_sequence_ranks(last)

    def _owner_of(self, position: int) -> int:
        """The sequence rank that holds this row."""
        return position // BLOCK_ROWS % self._mesh.sequence_parallel
