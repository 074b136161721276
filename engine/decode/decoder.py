"""Decode: continuous batching over paged KV, from prompts to finished answers.

A request comes in one of two ways. Where its prompt is prefilled elsewhere, it reserves its pages
before, receives them page by page, and starts with the logits of its prompt's last token. A short
one is admitted, and its prompt is computed here, beside the steps of others. It then takes part in
every step until its last choice is finished, when its pages go back.

Where the device chooses every token of a batch by itself, the next step is launched before this one
is looked at, so that the device never waits for the host. What ended by then, and only its token
says so, is in that step as well: what comes out for it is dropped, and its pages are others' only
when that step has run.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from ...kernels.page_size import PAGE_TOKENS
from ...kernels.pages import BlockTable
from ..errors import (
    CacheTooSmallError,
    GenerationError,
    GrammarError,
    InvalidRequestError,
    OutOfMemoryError,
    OutOfPagesError,
    StartOutOfMemoryError,
    StepOutOfMemoryError,
    TransferError,
)
from ..kv.arrivals import Arrivals
from ..kv.pages import PagePool
from ..memory.out_of_memory import out_of_memory_raises
from ..messages import ChosenToken, GenerationRequest, Progress
from ..model.qwen2 import Qwen2
from .answer import Answer, ending_tokens
from .contract import DecodeEngine, Output
from .detokenizer import TokenBytes
from .grammar import Constraint, GrammarCompiler
from .make_step import make_step
from .prompts import Part, PromptQueue
from .put_off import PutOff
from .sampler import Logits, Sampler
from .sequences import Reservation, TokenSequence, pages_needed
from .step import NO_PROMPTS, DecodeStep, Outcome, PromptLimits, PromptPiece, StepUnderWay

_MASK_THREADS = 2


class Decoder(DecodeEngine):
    """Decides in one process what is decoded.

    `receive` may be called on any stream: the pages are nobody else's. `start` is called when what
    it launched has run.

    Args:
        model: whole on this process; or rank 0's of a mesh, with a pool and a step that have the
            other ranks do the same (`leader`).
        pool: of the model's geometry.
        token_bytes: of the model's tokenizer.
        max_batch: sequences in one step; more than that wait their turn.
        prompts: which are computed here.
        patience: how far shorter prompts may pass one that came before them; see `Turns`.
        step: of this model, this pool, `max_batch` and `prompts`; by default the one for the
            model's device.

    Raises:
        StepDoesNotFitError: the device's memory does not suffice for a step of `max_batch`.
    """

    def __init__(
        self,
        model: Qwen2,
        pool: PagePool,
        token_bytes: TokenBytes,
        max_batch: int,
        prompts: PromptLimits = NO_PROMPTS,
        patience: float = 2.0,
        step: DecodeStep | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._token_bytes = token_bytes
        self._max_batch = max_batch
        self._step = step or make_step(model, pool, max_batch, prompts)
        config = model.config
        self._grammars = GrammarCompiler(token_bytes, config.vocab_size, config.eos_token_ids)
        self._mask_threads = ThreadPoolExecutor(_MASK_THREADS, "mask")
        self._longest_prompt = prompts.longest
        self._prompts = PromptQueue(prompts, patience)
        self._taken = 0
        self._reservations: dict[str, Reservation] = {}
        self._running: list[TokenSequence] = []
        self._waiting: deque[TokenSequence] = deque()
        self._put_off: list[PutOff] = []  # the oldest first
        self._num_preemptions = 0
        self._under_way: _UnderWay | None = None

    @property
    def device(self) -> torch.device:
        return self._pool.memory.device

    @property
    def pool(self) -> PagePool:
        return self._pool

    @property
    def has_work(self) -> bool:
        some = self._running or self._waiting or self._prompts or self._under_way
        return bool(some or self._comes_back())

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(len(each.running) for each in self._put_off)

    @property
    def num_prompts(self) -> int:
        return len(self._prompts) + sum(each.done is not None for each in self._put_off)

    @property
    def num_preemptions(self) -> int:
        return self._num_preemptions

    @property
    def longest_prompt(self) -> int:
        return self._longest_prompt

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
        self._allocate(request, grows=False)

    @torch.inference_mode()
    def admit(self, request: GenerationRequest, constraint: Constraint | None = None) -> None:
        name, tokens = request.request_id, len(request.prompt)
        if not 0 < tokens <= self._longest_prompt:
            raise InvalidRequestError(
                f"request {name} has a prompt of {tokens} tokens, and those of 1 to "
                f"{self._longest_prompt} are computed here"
            )
        if request.sampling.prompt_logprobs is not None:
            raise InvalidRequestError(f"request {name} wants its prompt scored, which prefill does")
        reservation = self._allocate(request, grows=True)
        reservation.sequences = self._make_sequences(reservation, constraint)
        self._prompts.add(name, tokens, request.sampling.choices)

    def _allocate(self, request: GenerationRequest, grows: bool) -> Reservation:
        if request.request_id in self._reservations:
            raise InvalidRequestError(f"request {request.request_id} is being served already")
        self.check(request)
        if self._put_off:
            # Those that made room come back before anyone else comes.
            needed = pages_needed(request, grows) + sum(each.num_pages for each in self._put_off)
            raise OutOfPagesError(needed, self._pool.num_free, self._pool.num_pages)
        reservation = Reservation.allocate(self._pool, request, self._taken, grows)
        self._taken += 1
        self._reservations[request.request_id] = reservation
        return reservation

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

    def arrivals_of(self, request_id: str) -> Arrivals:
        return self._receiving(request_id).arrivals

    def table_of(self, request_id: str) -> BlockTable:
        return self._receiving(request_id).block_tables[0]

    def _receiving(self, request_id: str) -> Reservation:
        reservation = self._reservations.get(request_id)
        if reservation is None or reservation.started:
            raise TransferError(f"request {request_id} takes no pages; it was cancelled or has all")
        return reservation

    @torch.inference_mode()
    def start(
        self, request_id: str, logits: Logits, constraint: Constraint | None = None
    ) -> list[Output]:
        reservation = self._reservations.get(request_id)
        if reservation is None or reservation.started:
            raise InvalidRequestError(f"request {request_id} is not waiting to start")
        failed = self._part_choices(reservation)
        if failed:
            return failed
        reservation.sequences = self._make_sequences(reservation, constraint)
        self._join(reservation, logits)
        return self._fill_batch()

    @torch.inference_mode()
    def step(self) -> list[Output]:
        before = self._under_way
        outputs: list[Output] = []
        if before is not None and not self._runs_ahead():
            outputs += self._finish_step(before)
            before = None
        self._bring_back()
        outputs += self._fill_batch()
        self._give_pages()
        try:
            self._under_way = self._launch(before)
        except _StepFailedError as failure:
            self._under_way = None
            outputs += [] if before is None else self._finish_step(before)
            return [*outputs, self._give_up(failure.request_id, failure.error)]
        if before is not None:
            outputs += self._finish_step(before)
        elif self._under_way is not None and not self._step.runs_ahead:
            outputs += self._finish_step(self._under_way)
        return outputs

    def _runs_ahead(self) -> bool:
        """Whether the next step can be launched while one is under way."""
        lacking = sum(each.lacks_a_page for each in (*self._running, *self._waiting))
        return (
            # Whoever makes room, or comes back, has its pages copied as they are now.
            not self._put_off
            and lacking <= self._pool.num_free
            and all(each.runs_ahead for each in self._running if each.place is not None)
        )

    def _launch(self, before: "_UnderWay | None") -> "_UnderWay | None":
        """Launch the next step; None where nothing is to be computed.

        Args:
            before: the step that is under way.

        Raises:
            _StepFailedError: the device's memory does not suffice, and whom to give up for it.
        """
        batch = [sequence for sequence in self._running if not sequence.ends]
        joining = 0 if before is None else self._joining(before)
        taken = len(self._running) + joining
        parts = self._prompts.deal(self._max_batch - taken, empty=not batch and not joining)
        if not batch and not parts:
            return None
        pieces = [self._piece(part) for part in parts]
        for sequence in batch:
            if sequence.constraint is not None:
                # On this host, while the device computes the logits that it masks.
                sequence.constraint.compute_ahead(self._mask_threads)
        try:
            with out_of_memory_raises(StepOutOfMemoryError(len(batch) + len(pieces))):
                step = self._step.launch([sequence.row for sequence in batch], pieces)
        except OutOfMemoryError as error:
            # No sequence has grown: the next step writes the same K and V to the same places.
            last = parts[-1] if parts else batch[-1]
            raise _StepFailedError(last.request_id, error) from error
        for place, sequence in enumerate(batch):
            sequence.place = place
        return _UnderWay(step, batch, [(part, self._prompts.count(part)) for part in parts])

    def _joining(self, step: "_UnderWay") -> int:
        """Sequences that join the batch when a step under way has computed their prompts."""
        names = [part.request_id for part, is_last in step.parts if is_last]
        here = [self._reservations[name] for name in names if name in self._reservations]
        return sum(reservation.request.sampling.choices for reservation in here)

    def _finish_step(self, step: "_UnderWay") -> list[Output]:
        """Wait for a step, and take what came out of it; the next may be under way."""
        outcomes = step.step.outcomes()
        if self._under_way is step:
            self._under_way = None
        following = () if self._under_way is None else self._under_way.batch
        here, go_on = set(map(id, self._running)), set(map(id, following))
        outputs: list[Output] = []
        for sequence, outcome in zip(step.batch, outcomes[: len(step.batch)], strict=True):
            sequence.length += 1
            if id(sequence) not in go_on:
                sequence.place = None
            # Whoever has ended meanwhile is not in the batch any more.
            if id(sequence) in here and sequence.request_id in self._reservations:
                outputs.extend(self._sample(sequence, outcome))
        outputs += self._take_parts(step.parts, outcomes[len(step.batch) :])
        self._pool.release(step.left)
        return outputs

    def cancel(self, request_id: str) -> None:
        reservation = self._reservations.pop(request_id, None)
        if reservation is None:
            return
        is_here = self._remove(request_id)
        if is_here:
            self._let_go(reservation.held_pages)

    def _let_go(self, pages: list[int]) -> None:
        """Give pages back, when no step that may write them is under way."""
        if self._under_way is None:
            self._pool.release(pages)
        else:
            self._under_way.left += pages

    def _remove(self, request_id: str) -> bool:
        """Take a request out of whatever it is in; whether its pages are in the pool."""
        self._running = [s for s in self._running if s.request_id != request_id]
        self._waiting = deque(s for s in self._waiting if s.request_id != request_id)
        self._prompts.remove(request_id)
        away = [p for p in self._put_off if p.reservation.request.request_id == request_id]
        for each in away:
            self._put_off.remove(each)
            each.forget(self._pool)
        return not away

    def _piece(self, part: Part) -> PromptPiece:
        reservation = self._reservations[part.request_id]
        first = reservation.sequences[0]
        return PromptPiece(
            reservation.request.prompt, part.start, part.end, first.block_table, first.takes_best
        )  # fmt: skip

    def _take_parts(
        self, parts: "list[tuple[Part, bool]]", outcomes: list[Outcome]
    ) -> list[Output]:
        """Say which parts of prompts are computed, and let those go on that are whole.

        Args:
            parts: and whether each is its prompt's last, which has an outcome.
        """
        outputs: list[Output] = []
        after = iter(outcomes)
        for part, is_last in parts:
            outcome = next(after) if is_last else None
            name = part.request_id
            reservation = self._reservations.get(name)
            if reservation is None:
                continue  # cancelled meanwhile
            outputs.append((name, Progress(part.end, len(reservation.request.prompt))))
            if outcome is None:
                continue
            failed = self._part_choices(reservation)
            outputs += failed
            if not failed:
                self._join(reservation, outcome)
        return [*outputs, *self._fill_batch()]

    def _part_choices(self, reservation: Reservation) -> list[Output]:
        """Give each choice of a whole prompt a last page of its own; what ended it, if it did."""
        request = reservation.request
        try:
            with out_of_memory_raises(StartOutOfMemoryError(request.sampling.choices)):
                reservation.copy_last_prompt_page(self._pool)
        except OutOfMemoryError as error:
            return [self._give_up(request.request_id, error)]
        return []

    def _join(self, reservation: Reservation, outcome: Outcome) -> None:
        """Let the choices of a prompt that is whole wait for a place."""
        for sequence in reservation.sequences:
            sequence.first = outcome
        self._waiting.extend(reservation.sequences)

    def _fill_batch(self) -> list[Output]:
        """Let those who wait join while there is room, each with its first token.

        A first token is no promise of a place: who got one and then had to wait would seem to hang.
        """
        outputs: list[Output] = []
        while self._waiting and len(self._running) < self._max_batch:
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            outcome, sequence.first = sequence.first, None
            # Whoever was put off has its first token already.
            if outcome is not None:
                outputs.extend(self._sample(sequence, outcome))
        return outputs

    def _give_up(self, request_id: str, error: OutOfMemoryError) -> Output:
        """End a request for want of memory."""
        self.cancel(request_id)
        return request_id, error

    def _give_pages(self) -> None:
        """A page for whoever has none for its next token, the oldest first.

        Where there is none, the youngest of those that grow is put off, perhaps the same.
        """
        batch = [s for s in self._running if s.lacks_a_page and not s.ends]
        for sequence in sorted(batch, key=self._age):
            while sequence in self._running and sequence.lacks_a_page:
                try:
                    [page] = self._pool.allocate(1)
                except OutOfPagesError:
                    self._make_room()
                else:
                    sequence.grow(page)

    def _age(self, sequence: TokenSequence) -> int:
        return self._reservations[sequence.request_id].number

    def _growing(self) -> list[Reservation]:
        """Those that grow and are here, the youngest last."""
        away = {id(each.reservation) for each in self._put_off}
        return [each for each in self._reservations.values() if each.grows and id(each) not in away]

    def _make_room(self) -> None:
        """Put the youngest request off that may be."""
        reservation = max(self._growing(), key=lambda each: each.number)
        name = reservation.request.request_id
        done = self._prompts.done(name) if name in self._prompts else None
        mine = [s for s in (*self._running, *self._waiting) if s.request_id == name]
        self._remove(name)
        self._put_off.append(PutOff.take(self._pool, reservation, mine, done))
        self._put_off.sort(key=lambda each: each.reservation.number)
        self._num_preemptions += 1

    def _comes_back(self) -> bool:
        """Whether there is room for the oldest that was put off, and for all to grow a little.

        Without the latter it would make room again at the next border of a page.
        """
        if not self._put_off:
            return False
        oldest = self._put_off[0]
        most = pages_needed(oldest.reservation.request)
        own = min(oldest.num_pages + len(oldest.reservation.sequences), most)
        others = sum(len(each.sequences) for each in self._growing())
        return own + others <= self._pool.num_free

    def _bring_back(self) -> None:
        while self._comes_back():
            oldest = self._put_off.pop(0)
            oldest.come_back(self._pool)
            request = oldest.reservation.request
            if oldest.done is not None:
                choices = request.sampling.choices
                self._prompts.add(request.request_id, len(request.prompt), choices, oldest.done)
            self._waiting.extendleft(reversed(oldest.running))

    def _make_sequences(
        self, reservation: Reservation, constraint: Constraint | None
    ) -> list[TokenSequence]:
        request = reservation.request
        sampling = request.sampling.seeded()
        assert sampling.seed is not None
        replayed = request.replayed or ((),) * sampling.choices
        ends = ending_tokens(sampling, self._model.config.eos_token_ids)
        vocab_size = self._model.config.vocab_size
        return [
            TokenSequence(
                request.request_id,
                table,
                len(request.prompt),
                Sampler(sampling, sampling.seed, choice, request.prompt, vocab_size, ends),
                Answer(choice, sampling, ends, self._token_bytes, replayed[choice]),
                None if constraint is None else constraint.copy(),
            )
            for choice, table in enumerate(reservation.block_tables)
        ]

    def _sample(self, sequence: TokenSequence, outcome: Outcome) -> list[Output]:
        """Choose a sequence's next token; a sequence that ends with it gives its pages back."""
        constraint, answer = sequence.constraint, sequence.answer
        try:
            chosen = _choose(sequence, outcome)
        except FloatingPointError as error:
            self.cancel(sequence.request_id)
            return [(sequence.request_id, GenerationError(str(error)))]
        except GrammarError as error:
            self.cancel(sequence.request_id)
            return [(sequence.request_id, error)]
        sequence.next_token = chosen.token_id
        delta = answer.take(chosen, constraint is not None and constraint.is_complete)
        if delta is None:
            return []
        if delta.finish_reason is not None:
            self._finish(sequence)
        return [(sequence.request_id, delta)]

    def _finish(self, sequence: TokenSequence) -> None:
        reservation = self._reservations[sequence.request_id]
        reservation.sequences.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        self._let_go(sequence.block_table.pages.tolist())
        if not reservation.sequences:
            del self._reservations[sequence.request_id]


@dataclass(eq=False)
class _UnderWay:
    """A step that was launched and not looked at, whose outcomes are those of `batch` first.

    `parts` are of prompts, and whether each is its prompt's last. `left` are pages to give back
    when the step has run.
    """

    step: StepUnderWay
    batch: list[TokenSequence]
    parts: list[tuple[Part, bool]]
    left: list[int] = field(default_factory=list)


class _StepFailedError(Exception):
    """A step was not launched for want of memory; the request that makes room for the others."""

    def __init__(self, request_id: str, error: OutOfMemoryError) -> None:
        super().__init__(request_id)
        self.request_id, self.error = request_id, error


def _choose(sequence: TokenSequence, outcome: Outcome) -> ChosenToken:
    """A sequence's next token.

    Raises:
        FloatingPointError: its logits are not finite.
        GrammarError: a limit of its grammar is reached.
    """
    sampler, constraint, answer = sequence.sampler, sequence.constraint, sequence.answer
    if answer.is_replayed:
        chosen = sampler.repeat(answer.replayed[answer.num_tokens])
    elif isinstance(outcome, ChosenToken):
        chosen = sampler.accept(outcome)
    else:
        chosen = sampler.choose(outcome, None if constraint is None else constraint.allowed())
    if constraint is not None:
        constraint.take(chosen.token_id)
    return chosen
