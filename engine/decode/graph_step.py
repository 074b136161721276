"""The decode step on GPUs: kernels over buffers whose addresses stay, replayed as CUDA graphs.

A step is some four hundred short launches, which a host cannot issue as fast as a GPU runs them.
So they are captured once for each of a few numbers of rows, and a step fills the inputs, replays
the smallest graph that holds it, and reads a token and a log-probability for each row.

What a graph holds are addresses: of the weights, of the pool's memory, of the inputs, and of what
the launches leave between each other in the graphs' own memory. None of them changes while the
step lives, so nothing is ever captured again. That memory is shared by all graphs: some 32 MB for
the matrix products, the activations of the largest step, and for each graph its logits (at 152,064
tokens and 16 bits, 0.3 MB a row).

How many rows a matrix product has, and how attention is divided (`DecodePlan`), may change how
sums are rounded. So on GPUs, unlike on CPUs, two tokens that are all but equally good may
change places with what else is in the batch; the same batch always gives the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import elementwise, greedy, quantized
from ...kernels.dual_chunk.decode_plan import DecodePlan
from ...kernels.dual_chunk.segments import SegmentQueries
from ...kernels.dual_chunk.triton_decode import decode_attention, programs_per_kv_head
from ...kernels.narrow import Rows
from ...kernels.page_size import pages_for
from ...kernels.pages import BlockTable
from ..errors import StepDoesNotFitError
from ..kv.pages import PagePool
from ..memory.out_of_memory import out_of_memory_raises
from ..messages import ChosenToken
from ..model.layer import Attention, Layer
from ..model.positions import Rotations
from ..model.qwen2 import Qwen2
from .step import DecodeStep, Outcome, StepRow


@dataclass(frozen=True)
class StepResults:
    """What the launches of a step leave on the device, at the same addresses every time."""

    logits: Tensor  # [rows, vocab], in the model's type
    tokens: Tensor  # int32 [rows]: the best of each row
    logprobs: Tensor  # float32 [rows]: theirs


Launch = Callable[[], StepResults]
Capture = Callable[[Launch], Launch]
"""From launches to something that does the same as one call of them."""


def row_counts(max_batch: int) -> list[int]:
    """Rows of the graphs: powers of two, and the largest batch."""
    powers = [2**power for power in range(max_batch.bit_length()) if 2**power < max_batch]
    return [*powers, max_batch]


def programs_for(model: Qwen2) -> int:
    """Programs of each KV head that fill the model's device."""
    return programs_per_kv_head(model.heads.num_kv_heads, model.device)


def eager(launch: Launch) -> Launch:
    """Launch anew every time."""
    return launch


def captured(device: torch.device) -> Capture:
    """Capture launches as CUDA graphs, which share their memory: run one at a time."""
    memory = torch.cuda.graph_pool_handle()
    # One for all graphs: for every stream, matrix products take memory of their own.
    stream = torch.cuda.Stream(device)

    def capture(launch: Launch) -> Launch:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Kernels are compiled and loaded, and libraries make up their minds, before capture.
            for _ in range(2):
                launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            results = launch()

        def replay() -> StepResults:
            graph.replay()
            return results

        return replay

    return capture


class GraphStep(DecodeStep):
    """A model that is whole on its device, through the kernels.

    Args:
        row_counts: rows that a step is filled up to, rising; the last is the largest batch.
        programs: of each KV head in attention.
        capture: `captured`, or `eager`.

    Raises:
        StepDoesNotFitError: the device's memory does not suffice for the largest step.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Qwen2,
        pool: PagePool,
        row_counts: Sequence[int],
        programs: int,
        capture: Capture,
    ) -> None:
        device, max_batch = model.device, row_counts[-1]
        self._device = device
        self._softmax_scale = model.positions.softmax_scale
        with out_of_memory_raises(StepDoesNotFitError(max_batch)):
            # A row of block tables is written only when another sequence takes it.
            self._tables = torch.zeros(max_batch, pool.num_pages, dtype=torch.int32, device=device)
            self._held: list[BlockTable | None] = [None] * max_batch
            self._tokens = _host_memory(device, max_batch, dtype=torch.int32)
            self._logprobs = _host_memory(device, max_batch, dtype=torch.float32)
            self._logits = _host_memory(
                device, max_batch, model.config.vocab_size, dtype=model.dtype
            )
            self._batches: list[tuple[_Batch, Launch]] = []
            # The largest first: what it leaves free, smaller ones use.
            for rows in reversed(row_counts):
                batch = _Batch(rows, programs, device)
                tables = self._tables[:rows]
                launch = capture(_Launches(model, pool, tables, batch.inputs))
                self._batches.insert(0, (batch, launch))

    @torch.inference_mode()
    def run(self, rows: Sequence[StepRow]) -> list[Outcome]:
        """As `DecodeStep.run`; logits stay what they are until the next step."""
        batch, launch = next(each for each in self._batches if each[0].rows >= len(rows))
        self._hold_tables(rows)
        batch.fill(rows, [self._softmax_scale(row.length + 1) for row in rows])
        return self._read(rows, launch())

    def _hold_tables(self, rows: Sequence[StepRow]) -> None:
        for index, row in enumerate(rows):
            if self._held[index] is not row.table:
                table = row.table.on(self._device)
                self._tables[index, : len(table)].copy_(table)
                self._held[index] = row.table

    def _read(self, rows: Sequence[StepRow], results: StepResults) -> list[Outcome]:
        """Bring what each row wants to the host; everything is waited for once.

        Nothing is allocated on the device: a step that failed here would leave its inputs under
        way, and the next would write over them. So logits become float32 on the host.
        """
        count = len(rows)
        self._tokens[:count].copy_(results.tokens[:count], non_blocking=True)
        self._logprobs[:count].copy_(results.logprobs[:count], non_blocking=True)
        for index, row in enumerate(rows):
            if not row.takes_best:
                self._logits[index].copy_(results.logits[index], non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        best = zip(self._tokens[:count].tolist(), self._logprobs[:count].tolist(), strict=True)
        return [
            ChosenToken(token, logprob) if row.takes_best else self._logits[index].float().numpy()
            for index, (row, (token, logprob)) in enumerate(zip(rows, best, strict=True))
        ]


@dataclass(frozen=True)
class _Inputs:
    """Views of one int32 tensor, so that one copy brings a whole step's inputs."""

    storage: Tensor
    tokens: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    slots: Tensor  # int64 [rows]: page * 128 + offset; -1 for a row that is not used
    scales: Tensor  # float32 [rows]
    plan: DecodePlan

    @classmethod
    def over(cls, storage: Tensor, rows: int, programs: int) -> "_Inputs":
        """In a tensor of `size`; no row is used."""
        *wide, scales, plan = storage.split(
            [2 * rows] * 3 + [rows, DecodePlan.size(rows, programs)]
        )
        tokens, positions, slots = (each.view(torch.int64) for each in wide)
        slots.fill_(-1)
        plan = DecodePlan.over(plan, rows, programs)
        return cls(storage, tokens, positions, slots, scales.view(torch.float32), plan)

    @staticmethod
    def size(rows: int, programs: int) -> int:
        """Numbers in the storage."""
        return 7 * rows + DecodePlan.size(rows, programs)


class _Batch:
    """The inputs of steps of up to `rows` rows, on the host and on the device."""

    def __init__(self, rows: int, programs: int, device: torch.device) -> None:
        self.rows = rows
        size = _Inputs.size(rows, programs)
        on_device = torch.zeros(size, dtype=torch.int32, device=device)
        self.inputs = _Inputs.over(on_device, rows, programs)
        self._host = _Inputs.over(_host_memory(device, size, dtype=torch.int32), rows, programs)
        self._planned: list[int] = []

    def fill(self, rows: Sequence[StepRow], scales: list[float]) -> None:
        """Put rows in their places; the device must have read what was there before."""
        host, count = self._host, len(rows)
        tokens, positions, slots = (
            each.numpy() for each in (host.tokens, host.positions, host.slots)
        )
        tokens[:count] = [row.token for row in rows]
        positions[:count] = [row.length for row in rows]
        slots[:count] = [row.slot for row in rows]
        slots[count:] = -1
        host.scales.numpy()[:count] = scales
        self._plan([row.length + 1 for row in rows])
        self.inputs.storage.copy_(host.storage, non_blocking=True)

    def _plan(self, lengths: list[int]) -> None:
        """Between page borders only lengths change, and planning takes longer than the rest."""
        pages = [pages_for(length) for length in lengths]
        if pages == self._planned:
            self._host.plan.lengths.numpy()[: len(lengths)] = lengths
        else:
            self._host.plan.refresh(lengths)
            self._planned = pages


class _Launches:
    """Everything that a step of so many rows launches; shapes and addresses never change."""

    def __init__(self, model: Qwen2, pool: PagePool, tables: Tensor, inputs: _Inputs) -> None:
        self._model = model.for_one_row() if len(tables) == 1 else model
        self._pool, self._tables, self._inputs = pool, tables, inputs

    def __call__(self) -> StepResults:
        model, inputs = self._model, self._inputs
        rotations = model.positions.rotations(inputs.positions)
        attention = _PagedAttention(
            self._pool, self._tables, inputs, model.positions.stride, rotations
        )
        hidden = model.begin(inputs.tokens)
        for layer in model.layers:
            layer.forward(hidden, attention)
        logits = model.logits(hidden[0])
        return StepResults(logits, *greedy.best_tokens(logits))


@dataclass(frozen=True, eq=False)
class _PagedAttention(Attention[SegmentQueries]):
    """Attention of all rows at once, through the kernels; zero for a row that is not used."""

    pool: PagePool
    tables: Tensor  # int32 [rows, pages]
    inputs: _Inputs
    stride: int | None
    rotations: Rotations

    def write(self, layer: Layer, normed: Rows) -> SegmentQueries:
        q, k, v = layer.project(normed)
        memory, scales = self._pages(layer)
        slots, rotation = self.inputs.slots, self.rotations.intra
        if scales is None:
            elementwise.write_pages(memory, slots, k, v, rotation)
        else:
            quantized.append_tokens(memory, scales, slots, k, v, rotation)
        return self.rotations.rotate(q)

    def attend(self, layer: Layer, queries: SegmentQueries) -> Tensor:
        memory, scales = self._pages(layer)
        attended, _ = decode_attention(
            queries,
            memory,
            self.tables,
            self.inputs.plan,
            self.stride,
            self.inputs.scales,
            page_scales=scales,
        )
        return attended

    def _pages(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        return self.pool.memory[layer.number], self.pool.layer_scales(layer.number)


def _host_memory(device: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the host; pinned for a GPU, so that copies do not wait."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
