"""The decode step on GPUs: kernels over buffers whose addresses stay, replayed as CUDA graphs.

A step is some four hundred short launches, which a host cannot issue as fast as a GPU runs them.
So they are captured once for each of a few numbers of rows, and a step fills the inputs, replays
the smallest graph that holds it, and reads a token and a log-probability for each row. Pieces of
prompts go through the model in the same launches: what a batch reads of the weights, they need not
read again. Drawing tokens is a graph of its own behind it, replayed where a row wants that.

What a graph holds are addresses: of the weights, of the pool's memory, of the inputs, and of what
the launches leave between each other in the graphs' own memory. None of them changes while the
step lives, so nothing is ever captured again. That memory is shared by all graphs: some 32 MB for
the matrix products, the activations of the largest step, and for each graph its logits (at 152,064
tokens and 16 bits, 0.3 MB a row).

A step may be launched while the one before runs, so that the device does not stand still while the
host looks at what came out: tokens that the host does not know yet are taken where the step before
leaves them.

How many rows a matrix product has, and how attention is divided (`DecodePlan`), may change how
sums are rounded. So on GPUs, unlike on CPUs, two tokens that are all but equally good may
change places with what else is in the batch; the same batch always gives the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kernels import greedy
from ...kernels.dual_chunk.triton_decode import programs_per_kv_head
from ...kernels.narrow import rows_at
from ...kernels.pages import BlockTable
from ..errors import StepDoesNotFitError
from ..kv.pages import PagePool
from ..memory.out_of_memory import out_of_memory_raises
from ..messages import ChosenToken
from ..model.qwen2 import Qwen2
from .device_sampling import BatchDrawing, HeldAdjustments
from .graph_inputs import StepBatch, StepInputs, StepShape, host_memory
from .launches import Capture, Launch, StepResults
from .paged_attention import PagedAttention, StepRotations
from .step import (
    NO_PROMPTS,
    DecodeStep,
    Outcome,
    PromptLimits,
    PromptPiece,
    StepRow,
    StepUnderWay,
)
from .step_rows import step_rows


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
        return _Replay(graph, results, launch)

    return capture


@dataclass(frozen=True, eq=False)
class _Replay:
    """Launches that were captured, and what made them.

    A graph knows addresses and keeps nothing alive: whatever `launch` holds is read and written
    where it lay, for as long as the graph is replayed.
    """

    graph: torch.cuda.CUDAGraph
    results: StepResults
    launch: Launch

    def __call__(self) -> StepResults:
        self.graph.replay()
        return self.results


class HostResults:
    """Where the host gets a step's results: pinned memory, so that copies do not wait.

    Args:
        most: outcomes of a step.
        max_batch: rows of them that may be drawn.
    """

    def __init__(self, model: Qwen2, most: int, max_batch: int) -> None:
        device = model.device
        self.tokens = host_memory(device, most, dtype=torch.int32)
        self.logprobs = host_memory(device, most, dtype=torch.float32)
        self.logits = host_memory(device, most, model.config.vocab_size, dtype=model.dtype)
        self.drawn_tokens = host_memory(device, max_batch, dtype=torch.int32)
        self.drawn_logprobs = host_memory(device, max_batch, dtype=torch.float32)

    def bring(
        self, wanted: "Sequence[_Wanted]", results: StepResults, drawn: StepResults | None
    ) -> "_Launched":
        """Begin to bring what is wanted, rising, to the host.

        Nothing is allocated on the device: a step that failed here would leave its inputs under
        way, and the next would write over them. So logits become float32 on the host.
        """
        count = wanted[-1][0] + 1 if wanted else 0
        self.tokens[:count].copy_(results.tokens[:count], non_blocking=True)
        self.logprobs[:count].copy_(results.logprobs[:count], non_blocking=True)
        if drawn is not None:
            rows = len(drawn.tokens)
            self.drawn_tokens[:rows].copy_(drawn.tokens, non_blocking=True)
            self.drawn_logprobs[:rows].copy_(drawn.logprobs, non_blocking=True)
        for place, asked in wanted:
            if not asked.takes_best and asked.drawing is None:
                self.logits[place].copy_(results.logits[place], non_blocking=True)
        return _Launched(self, wanted, count, _after_what_is_launched(results.tokens.device))


class GraphStep(DecodeStep):
    """A model that is whole on its device, or one rank's of a mesh, through the kernels.

    Args:
        row_counts: rows that a step is filled up to, rising; the last is the largest batch.
        programs: of each KV head in attention.
        capture: `captured`, or `eager`.
        prompts: which prompts it computes.

    Raises:
        StepDoesNotFitError: the device's memory does not suffice for the largest step.
    """

    runs_ahead = True

    @torch.inference_mode()
    def __init__(
        self,
        model: Qwen2,
        pool: PagePool,
        row_counts: Sequence[int],
        programs: int,
        capture: Capture,
        prompts: PromptLimits = NO_PROMPTS,
    ) -> None:
        device, max_batch = model.device, row_counts[-1]
        self._device = device
        self._softmax_scale = model.positions.softmax_scale
        most = max_batch + prompts.pieces
        with out_of_memory_raises(StepDoesNotFitError(max_batch)):
            # A row of block tables is written only when another sequence takes it.
            self._tables = torch.zeros(max_batch, pool.num_pages, dtype=torch.int32, device=device)
            self._held: list[BlockTable | None] = [None] * max_batch
            # Two: one is read while the next step's results come into the other.
            self._results = [HostResults(model, most, max_batch) for _ in range(2)]
            newest = torch.zeros(most, dtype=torch.int64, device=device)
            held = HeldAdjustments(max_batch, model.config.vocab_size, device)
            self._batches: list[_Prepared] = []
            shapes = [
                StepShape(*rows, prompts, programs, model.positions.stride)
                for rows in step_rows(row_counts, prompts)
            ]
            # The largest first: what it leaves free, smaller ones use.
            for shape in sorted(shapes, key=lambda each: each.total, reverse=True):
                batch = StepBatch(shape, device)
                tables = self._tables[: shape.rows]
                launch = capture(_Launches(model, pool, tables, batch.inputs, shape, newest))
                drawing = None
                if shape.rows:
                    # No row is used yet: what comes out is at the addresses of all steps.
                    step = partial(_first_of, shape.rows, launch)
                    drawing = BatchDrawing(shape.rows, held, capture, step)
                self._batches.insert(0, _Prepared(batch, launch, drawing))

    @torch.inference_mode()
    def launch(self, rows: Sequence[StepRow], pieces: Sequence[PromptPiece] = ()) -> StepUnderWay:
        """As `DecodeStep.launch`."""
        asked = len(rows), sum(piece.count for piece in pieces)
        prepared = next(each for each in self._batches if each.batch.shape.holds(*asked))
        first_piece = prepared.batch.shape.rows
        self._hold_tables(rows)
        scale = self._softmax_scale
        prepared.batch.fill(
            rows, [scale(row.length + 1) for row in rows],
            pieces, [scale(len(piece.prompt)) for piece in pieces],
        )  # fmt: skip
        results, drawn = prepared.launch(), None
        drawings = [row.drawing for row in rows]
        if prepared.drawing is not None and any(drawings):
            drawn = prepared.drawing.run(_first(first_piece, results), drawings)
        wanted: list[_Wanted] = list(enumerate(rows))
        wanted += enumerate((piece for piece in pieces if piece.ends), first_piece)
        self._results.reverse()
        return self._results[0].bring(wanted, results, drawn)

    def _hold_tables(self, rows: Sequence[StepRow]) -> None:
        for index, row in enumerate(rows):
            if self._held[index] is not row.table:
                table = row.table.on(self._device)
                self._tables[index, : len(table)].copy_(table)
                self._held[index] = row.table


@dataclass(frozen=True, eq=False)
class _Launched(StepUnderWay):
    """A step whose results are on their way to the host: those of its first `count` rows."""

    results: HostResults
    wanted: "Sequence[_Wanted]"
    count: int
    is_there: torch.cuda.Event | None

    def outcomes(self) -> list[Outcome]:
        if self.is_there is not None:
            self.is_there.synchronize()
        results, count = self.results, self.count
        # As lists: taking numbers out of a tensor one by one takes longer than all the rest.
        best = results.tokens[:count].tolist(), results.logprobs[:count].tolist()
        drawn = results.drawn_tokens.tolist(), results.drawn_logprobs.tolist()
        return [self._outcome(place, asked, best, drawn) for place, asked in self.wanted]

    def _outcome(
        self, place: int, asked: StepRow | PromptPiece, best: "_Chosen", drawn: "_Chosen"
    ) -> Outcome:
        """Of one row or piece."""
        if asked.takes_best:
            return ChosenToken(best[0][place], best[1][place])
        if asked.drawing is not None:
            return ChosenToken(drawn[0][place], drawn[1][place])
        return self.results.logits[place].float().numpy()


def _after_what_is_launched(device: torch.device) -> torch.cuda.Event | None:
    """As a `Milestone`, but whoever waits does not sleep: a step's tokens are waited for."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


_Chosen = tuple[list[int], list[float]]
"""Tokens and their log-probabilities, by place."""

_Wanted = tuple[int, StepRow | PromptPiece]
"""A row of the results, and who wants it."""


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What steps of one shape go through; nothing is drawn where there are no sequences."""

    batch: StepBatch
    launch: Launch
    drawing: BatchDrawing | None


def _first_of(rows: int, launch: Launch) -> StepResults:
    return _first(rows, launch())


def _first(rows: int, results: StepResults) -> StepResults:
    """Views of the first rows: those of sequences."""
    return StepResults(results.logits[:rows], results.tokens[:rows], results.logprobs[:rows])


class _Launches:
    """Everything that a step of one shape launches; shapes and addresses never change."""

    def __init__(
        self,
        model: Qwen2,
        pool: PagePool,
        tables: Tensor,
        inputs: StepInputs,
        shape: StepShape,
        newest: Tensor,
    ) -> None:
        """
        Args:
            newest: int64 [outcomes of the largest step]: where every step leaves its best tokens,
                and the next finds them.
        """
        self._model = model.for_one_row() if shape.total == 1 else model
        self._pool, self._tables, self._inputs = pool, tables, inputs
        self._longest_prompt, self._newest = shape.limits.longest, newest

    def __call__(self) -> StepResults:
        model, inputs = self._model, self._inputs
        rotations = StepRotations.of(model.positions, inputs, self._longest_prompt)
        attention = PagedAttention(
            self._pool, self._tables, inputs, model.positions.stride, rotations
        )
        rows = len(inputs.follows)
        if rows:
            here, before = inputs.tokens[:rows], self._newest[inputs.follows.clamp(min=0)]
            here.copy_(torch.where(inputs.follows < 0, here, before))
        hidden = model.begin(inputs.tokens)
        for layer in model.layers:
            layer.forward(hidden, attention)
        normed = hidden[0] if inputs.prompts is None else rows_at(hidden[0], inputs.wanted)
        logits = model.logits(normed)
        results = StepResults(logits, *greedy.best_tokens(logits))
        self._newest[: len(results.tokens)].copy_(results.tokens)
        return results
