"""Decode: continuous batching over paged KV, from handed-off prompts to finished answers.

A request reserves its pages before its prompt is prefilled, receives them page by page, starts
with the logits of its prompt's last token, and then takes part in every step until its last
choice is finished, when its pages go back.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ...kernels.page_size import PAGE_TOKENS, pages_for
from ...kernels.pages import BlockTable
from ..errors import (
    CacheTooSmallError,
    GenerationError,
    GrammarError,
    InvalidRequestError,
    OutOfMemoryError,
    ReceiveOutOfMemoryError,
    RefusedPagesError,
    StartOutOfMemoryError,
    StepOutOfMemoryError,
    TransferError,
)
from ..kv.hand_off import Place
from ..kv.pages import PagePool, Pages
from ..memory.out_of_memory import out_of_memory_raises
from ..messages import ChosenToken, Delta, GenerationRequest, SamplingParameters
from ..model.qwen2 import Qwen2
from .contract import DecodeEngine, Output
from .detokenizer import Detokenizer, TokenBytes
from .grammar import Constraint, GrammarCompiler
from .make_step import make_step
from .sampler import Logits, Sampler
from .step import DecodeStep, Outcome, StepRow

_NO_LOGITS: Logits = np.empty(0, dtype=np.float32)
_MASK_THREADS = 2


@dataclass(eq=False)
class _Sequence:
    """One choice of a request. `length` tokens have K and V in pages; `next_token` has none yet.

    `prompt_logits` are kept until it has a place in the batch, and its first token with it.
    """

    request_id: str
    choice: int
    block_table: BlockTable
    length: int
    sampler: Sampler
    detokenizer: Detokenizer
    constraint: Constraint | None
    prompt_logits: Logits
    replayed: tuple[int, ...]
    next_token: int = -1
    num_generated: int = 0


@dataclass(eq=False)
class _Reservation:
    """The pages of one request: its sequences' block tables, shared ones counted in each."""

    request: GenerationRequest
    block_tables: list[BlockTable]
    sequences: list[_Sequence] = field(default_factory=list)

    @property
    def started(self) -> bool:
        """Whether its pages are those of its sequences: from the first on, until the last ends."""
        return bool(self.sequences)


class Decoder(DecodeEngine):
    """Decodes on one process.

    `receive` may be called on any stream: the pages are nobody else's. `start` is called when what
    it launched has run.

    Args:
        model: whole on this process.
        pool: of the model's geometry.
        token_bytes: of the model's tokenizer.
        max_batch: sequences in one step; more than that wait their turn.
        step: of this model, this pool and `max_batch`; by default the one for the model's device.

    Raises:
        StepDoesNotFitError: the device's memory does not suffice for a step of `max_batch`.
    """

    def __init__(
        self,
        model: Qwen2,
        pool: PagePool,
        token_bytes: TokenBytes,
        max_batch: int,
        step: DecodeStep | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._token_bytes = token_bytes
        self._max_batch = max_batch
        self._step = step or make_step(model, pool, max_batch)
        config = model.config
        self._grammars = GrammarCompiler(token_bytes, config.vocab_size, config.eos_token_ids)
        self._mask_threads = ThreadPoolExecutor(_MASK_THREADS, "mask")
        self._reservations: dict[str, _Reservation] = {}
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()

    @property
    def device(self) -> torch.device:
        return self._pool.memory.device

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_generating(self) -> int:
        return sum(reservation.started for reservation in list(self._reservations.values()))

    def is_generating(self, request_id: str) -> bool:
        return request_id in self._reservations

    @property
    def usage(self) -> float:
        return 1 - self._pool.num_free / self._pool.num_pages

    def check(self, request: GenerationRequest) -> None:
        needed = pages_needed(request)
        if needed > self._pool.num_pages:
            total = self._pool.num_pages * PAGE_TOKENS
            raise CacheTooSmallError("decode", needed * PAGE_TOKENS, total)

    def prepare(self, request: GenerationRequest) -> Constraint | None:
        grammar = request.sampling.grammar
        return None if grammar is None else self._grammars.compile(grammar)

    @torch.inference_mode()
    def reserve(self, request: GenerationRequest) -> None:
        if request.request_id in self._reservations:
            raise InvalidRequestError(f"request {request.request_id} is being served already")
        self.check(request)
        pages = self._pool.allocate(pages_needed(request))
        tables = _block_tables(request, pages)
        shared = len(request.prompt) // PAGE_TOKENS
        for table in tables[1:]:
            self._pool.share(table.pages[:shared].tolist())
        self._reservations[request.request_id] = _Reservation(request, tables)

    def block_table(self, request_id: str) -> list[int]:
        """The pages of a request's first choice, its prompt's first.

        A prefiller on the same pool writes them itself, and then nothing is handed over.

        Raises:
            InvalidRequestError: nothing is reserved under that name.
        """
        reservation = self._reservations.get(request_id)
        if reservation is None:
            raise InvalidRequestError(f"request {request_id} has no pages; reserve them first")
        return reservation.block_tables[0].pages.tolist()

    def receive(self, request_id: str, place: Place, pages: Pages) -> None:
        reservation = self._reservations.get(request_id)
        if reservation is None or reservation.started:
            raise TransferError(f"request {request_id} takes no pages; it was cancelled or has all")
        with out_of_memory_raises(ReceiveOutOfMemoryError(request_id)):
            table = reservation.block_tables[0].on(self._pool.memory.device)
            table = table[place.first_page : place.first_page + len(pages)]
            try:
                self._pool.put(place.layer, table.long(), place.first_kv_head, pages)
            except TransferError as error:
                raise RefusedPagesError(request_id, str(place), error) from error

    @torch.inference_mode()
    def start(
        self, request_id: str, logits: Logits, constraint: Constraint | None = None
    ) -> list[Output]:
        reservation = self._reservations.get(request_id)
        if reservation is None or reservation.started:
            raise InvalidRequestError(f"request {request_id} is not waiting to start")
        try:
            choices = reservation.request.sampling.choices
            with out_of_memory_raises(StartOutOfMemoryError(choices)):
                self._copy_last_prompt_page(reservation)
        except OutOfMemoryError as error:
            return [self._give_up(request_id, error)]
        reservation.sequences = self._make_sequences(reservation, logits, constraint)
        self._waiting.extend(reservation.sequences)
        return self._fill_batch()

    @torch.inference_mode()
    def step(self) -> list[Output]:
        outputs = self._fill_batch()
        if not self._running:
            return outputs
        batch = list(self._running)
        for sequence in batch:
            if sequence.constraint is not None:
                # On this host, while the device computes the logits that it masks.
                sequence.constraint.compute_ahead(self._mask_threads)
        try:
            with out_of_memory_raises(StepOutOfMemoryError(len(batch))):
                outcomes = self._step.run([_row_of(sequence) for sequence in batch])
        except OutOfMemoryError as error:
            # No sequence has grown: the next step writes the same K and V to the same places.
            return [*outputs, self._give_up(batch[-1].request_id, error)]
        for sequence, outcome in zip(batch, outcomes, strict=True):
            sequence.length += 1
            if sequence.request_id in self._reservations:
                outputs.extend(self._sample(sequence, outcome))
        return outputs

    def cancel(self, request_id: str) -> None:
        reservation = self._reservations.pop(request_id, None)
        if reservation is None:
            return
        self._running = [s for s in self._running if s.request_id != request_id]
        self._waiting = deque(s for s in self._waiting if s.request_id != request_id)
        held = [s.block_table for s in reservation.sequences]
        for table in held if reservation.started else reservation.block_tables:
            self._pool.release(table.pages.tolist())

    def _fill_batch(self) -> list[Output]:
        """Let those who wait join while there is room, each with its first token.

        A first token is no promise of a place: who got one and then had to wait would seem to hang.
        """
        outputs: list[Output] = []
        while self._waiting and len(self._running) < self._max_batch:
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            outputs.extend(self._sample(sequence, sequence.prompt_logits))
            sequence.prompt_logits = _NO_LOGITS
        return outputs

    def _give_up(self, request_id: str, error: OutOfMemoryError) -> Output:
        """End a request for want of memory."""
        self.cancel(request_id)
        return request_id, error

    def _copy_last_prompt_page(self, reservation: _Reservation) -> None:
        """A page that the prompt fills in part is written by every choice: each gets its own."""
        full, rest = divmod(len(reservation.request.prompt), PAGE_TOKENS)
        if rest:
            first, *others = reservation.block_tables
            for table in others:
                self._pool.copy_page(int(first.pages[full]), int(table.pages[full]))

    def _make_sequences(
        self, reservation: _Reservation, logits: Logits, constraint: Constraint | None
    ) -> list[_Sequence]:
        request = reservation.request
        sampling = request.sampling.seeded()
        assert sampling.seed is not None
        replayed = request.replayed or ((),) * sampling.choices
        ends = self._ends(sampling)
        vocab_size = self._model.config.vocab_size
        return [
            _Sequence(
                request.request_id,
                choice,
                table,
                len(request.prompt),
                Sampler(sampling, sampling.seed, choice, request.prompt, vocab_size, ends),
                Detokenizer(self._token_bytes, sampling.stop, sampling.min_tokens),
                None if constraint is None else constraint.copy(),
                logits,
                replayed[choice],
            )
            for choice, table in enumerate(reservation.block_tables)
        ]

    def _sample(self, sequence: _Sequence, outcome: Outcome) -> list[Output]:
        """Choose a sequence's next token; a sequence that ends with it gives its pages back."""
        is_replayed = sequence.num_generated < len(sequence.replayed)
        try:
            chosen = _choose(sequence, outcome, is_replayed)
        except FloatingPointError as error:
            self.cancel(sequence.request_id)
            return [(sequence.request_id, GenerationError(str(error)))]
        except GrammarError as error:
            self.cancel(sequence.request_id)
            return [(sequence.request_id, error)]
        delta = self._take(sequence, chosen)
        if delta.finish_reason is not None:
            self._finish(sequence)
        if is_replayed:
            return _only_the_end(sequence.request_id, delta)
        return [(sequence.request_id, delta)]

    def _take(self, sequence: _Sequence, chosen: ChosenToken) -> Delta:
        """Add a token to a sequence: what it says, and whether it is the last."""
        sampling = self._reservations[sequence.request_id].request.sampling
        sequence.next_token = chosen.token_id
        sequence.num_generated += 1
        constraint = sequence.constraint
        reason, text = None, ""
        if chosen.token_id in self._ends(sampling):
            reason = "stop"
        else:
            text = sequence.detokenizer.push(chosen.token_id)
            if sequence.detokenizer.stopped or (constraint is not None and constraint.is_complete):
                reason = "stop"
            elif sequence.num_generated == sampling.max_tokens:
                reason = "length"
        if reason is not None and not sequence.detokenizer.stopped:
            text += sequence.detokenizer.finish()
        return Delta(sequence.choice, text, (chosen,), reason)

    def _ends(self, sampling: SamplingParameters) -> tuple[int, ...]:
        """Tokens that end an answer."""
        # A grammar allows an end only where the answer is whole.
        ignores_end = sampling.ignore_eos and sampling.grammar is None
        ends = () if ignores_end else tuple(self._model.config.eos_token_ids)
        return (*ends, *sampling.stop_token_ids)

    def _finish(self, sequence: _Sequence) -> None:
        reservation = self._reservations[sequence.request_id]
        reservation.sequences.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        self._pool.release(sequence.block_table.pages.tolist())
        if not reservation.sequences:
            del self._reservations[sequence.request_id]


def _choose(sequence: _Sequence, outcome: Outcome, is_replayed: bool) -> ChosenToken:
    """A sequence's next token.

    Raises:
        FloatingPointError: its logits are not finite.
        GrammarError: a limit of its grammar is reached.
    """
    sampler, constraint = sequence.sampler, sequence.constraint
    if is_replayed:
        chosen = sampler.repeat(sequence.replayed[sequence.num_generated])
    elif isinstance(outcome, ChosenToken):
        chosen = sampler.accept(outcome)
    else:
        chosen = sampler.choose(outcome, None if constraint is None else constraint.allowed())
    if constraint is not None:
        constraint.take(chosen.token_id)
    return chosen


def _only_the_end(request_id: str, delta: Delta) -> list[Output]:
    """Of a token that the client has: nothing, or that the choice has ended with it."""
    if delta.finish_reason is None:
        return []
    return [(request_id, replace(delta, text="", tokens=()))]


def _row_of(sequence: _Sequence) -> StepRow:
    takes_best = sequence.sampler.takes_best and sequence.constraint is None
    return StepRow(sequence.next_token, sequence.length, sequence.block_table, takes_best)


def pages_needed(request: GenerationRequest) -> int:
    """Pages of the prompt, and of all that its choices may generate.

    Choices share the pages that the prompt fills; each has the rest to itself.
    """
    shared = len(request.prompt) // PAGE_TOKENS
    whole = pages_for(len(request.prompt) + request.sampling.max_tokens)
    return shared + request.sampling.choices * (whole - shared)


def _block_tables(request: GenerationRequest, pages: list[int]) -> list[BlockTable]:
    """A block table for each choice; all begin with the same pages."""
    shared = len(request.prompt) // PAGE_TOKENS
    choices = request.sampling.choices
    own = (len(pages) - shared) // choices
    return [
        BlockTable.of(pages[:shared] + pages[shared + choice * own : shared + (choice + 1) * own])
        for choice in range(choices)
    ]
