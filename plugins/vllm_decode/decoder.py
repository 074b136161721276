"""vLLM as a decode engine: requests in, deltas out.

A request's choices are sequences of vLLM's. The first one of a prompt that a gang computes is added
when its pages are reserved, and waits inside vLLM, with all blocks of the prompt, until they have
come; the others are added when it has its first token, and find its pages in vLLM's prefix cache.
What a token means to the client, its text and whether it is the last, is decided here, by the same
rules as in Longreach's own engine.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ...engine.decode.answer import Answer, ending_tokens
from ...engine.decode.contract import DecodeEngine, Output
from ...engine.decode.detokenizer import TokenBytes
from ...engine.decode.grammar import Constraint, GrammarCompiler
from ...engine.decode.sampler import Logits
from ...engine.errors import (
    CacheTooSmallError,
    GenerationError,
    InvalidRequestError,
    OutOfPagesError,
    TransferError,
)
from ...engine.kv.arrivals import Arrivals
from ...engine.kv.pages import PageMemory
from ...engine.messages import Delta, GenerationRequest, Progress
from ...engine.model.config import ModelConfig
from ...kernels.page_size import PAGE_TOKENS, pages_for
from ...kernels.pages import BlockTable
from .core import Core, Generated, NewSequence
from .held_to import HeldTo
from .room import Room

_PAGES_SECONDS = 30.0
"""vLLM may take for a request's pages, which it has. It takes one step, or a few."""
_SEEDS = 2**63

Table = npt.NDArray[np.int64]


@dataclass(eq=False)
class _Choice:
    """One choice of a request, and the sequence that it is. `is_in` from when it has a place."""

    name: str
    answer: Answer
    sequence: NewSequence
    is_in: bool = False
    has_token: bool = False

    @property
    def held_to(self) -> HeldTo | None:
        return self.sequence.held_to


@dataclass(eq=False)
class _Taken:
    """A request that is here, until its last choice has ended.

    `done` tokens of a prompt that vLLM computes are known to be computed; None: a gang does that,
    and its pages lie where `table` says. `choices` are those that have not ended, and `later` those
    that wait for the first one's token.
    """

    request: GenerationRequest
    room: Room
    choices: list[_Choice]
    done: int | None
    arrivals: Arrivals
    table: "Future[Table]" = field(default_factory=Future)
    started: bool = False
    later: list[_Choice] = field(default_factory=list)

    @property
    def every(self) -> list[_Choice]:
        """All that have not ended."""
        return [*self.choices, *self.later]


class VllmDecoder(DecodeEngine):
    """Decodes with vLLM.

    Args:
        core: vLLM, with the model and all pages.
        token_bytes: of the model's tokenizer.
        max_batch: sequences in one step; one less than vLLM may have, so that it always has a place
            for one that waits for its pages.
        longest_prompt: tokens of the longest prompt that vLLM computes itself; 0: none.
    """

    def __init__(
        self,
        core: Core,
        config: ModelConfig,
        token_bytes: TokenBytes,
        max_batch: int,
        longest_prompt: int,
    ) -> None:
        self._core, self._config, self._token_bytes = core, config, token_bytes
        self._max_batch, self._longest_prompt = max_batch, longest_prompt
        self._grammars = GrammarCompiler(token_bytes, config.vocab_size, config.eos_token_ids)
        self._taken: dict[str, _Taken] = {}
        self._choices: dict[str, tuple[_Taken, _Choice]] = {}
        self._waiting: deque[_Choice] = deque()
        self._running = 0

    @property
    def device(self) -> torch.device:
        return self._core.memory.device

    @property
    def pool(self) -> PageMemory:
        return self._core.memory

    @property
    def usage(self) -> float:
        return 1 - self._core.num_free / self._core.num_pages

    @property
    def has_work(self) -> bool:
        return bool(
            self._running
            or self._waiting
            or self._core.is_settling
            or any(_waits_for_pages(taken) for taken in self._taken.values())
        )

    @property
    def longest_prompt(self) -> int:
        return self._longest_prompt

    @property
    def num_prompts(self) -> int:
        return sum(
            taken.done is not None and taken.done < len(taken.request.prompt)
            for taken in list(self._taken.values())
        )

    @property
    def num_preemptions(self) -> int:
        return self._core.num_preemptions

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_generating(self) -> int:
        return sum(taken.started for taken in list(self._taken.values()))

    def is_generating(self, request_id: str) -> bool:
        return request_id in self._taken

    def check(self, request: GenerationRequest) -> None:
        self._check_room(Room.of(request).most(request.sampling.choices))

    def prepare(self, request: GenerationRequest) -> Constraint | None:
        grammar = request.sampling.grammar
        return None if grammar is None else self._grammars.compile(grammar)

    def reserve(self, request: GenerationRequest) -> None:
        taken = self._take(request, Room.of(request), is_handed_off=True)
        self._core.add(taken.choices[0].sequence)

    def admit(self, request: GenerationRequest, constraint: Constraint | None = None) -> None:
        name, tokens = request.request_id, len(request.prompt)
        if not 0 < tokens <= self._longest_prompt:
            raise InvalidRequestError(
                f"request {name} has a prompt of {tokens} tokens, and those of 1 to "
                f"{self._longest_prompt} are computed here"
            )
        if request.sampling.prompt_logprobs is not None:
            raise InvalidRequestError(f"request {name} wants its prompt scored, which prefill does")
        # A prompt is found in the prefix cache unless others needed the room.
        taken = self._take(request, Room.apart(request), is_handed_off=False)
        self._start(taken, constraint)

    def arrivals_of(self, request_id: str) -> Arrivals:
        return self._receiving(request_id).arrivals

    def table_of(self, request_id: str) -> BlockTable:
        """As the contract says; waits for vLLM, which gives pages with its next step."""
        try:
            return BlockTable(self._receiving(request_id).table.result(_PAGES_SECONDS))
        except CancelledError as error:
            raise TransferError(f"request {request_id} takes no pages; it was cancelled") from error
        except TimeoutError as error:
            raise TransferError(
                f"vLLM gave request {request_id} no pages in {_PAGES_SECONDS:g} s"
            ) from error

    def start(
        self, request_id: str, logits: Logits, constraint: Constraint | None = None
    ) -> list[Output]:
        """As the contract says; the logits are not used, because vLLM computes them again."""
        taken = self._taken.get(request_id)
        if taken is None or taken.started:
            raise InvalidRequestError(f"request {request_id} is not waiting to start")
        self._start(taken, constraint)
        return []

    def step(self) -> list[Output]:
        self._fill_batch()
        generated = self._core.step()
        self._learn_pages()
        outputs = self._progress()
        for each in generated:
            outputs += self._hear(each)
        return outputs

    def cancel(self, request_id: str) -> None:
        taken = self._taken.pop(request_id, None)
        if taken is None:
            return
        taken.table.cancel()
        every = taken.every
        self._waiting = deque(each for each in self._waiting if each not in every)
        self._running -= sum(each.is_in for each in every)
        self._core.abort([each.name for each in every])
        self._core.let_go(_first_name(request_id))
        for each in every:
            self._choices.pop(each.name, None)

    def _check_room(self, pages: int) -> None:
        if pages > self._core.num_pages:
            total = self._core.num_pages * PAGE_TOKENS
            raise CacheTooSmallError("decode", pages * PAGE_TOKENS, total)

    def _take(self, request: GenerationRequest, room: Room, is_handed_off: bool) -> _Taken:
        """Count a request in, if there is room for all that it may take."""
        name, most = request.request_id, room.most(request.sampling.choices)
        if name in self._taken:
            raise InvalidRequestError(f"request {name} is being served already")
        self._check_room(most)
        free = self._core.num_free - self._promised
        if most > free:
            raise OutOfPagesError(most, max(free, 0), self._core.num_pages)
        arrivals = Arrivals(self.pool.geometry, pages_for(len(request.prompt)))
        choices = self._make_choices(request, is_handed_off)
        done = None if is_handed_off else 0
        taken = _Taken(request, room, choices[:1], done, arrivals, later=choices[1:])
        self._taken[name] = taken
        for choice in choices:
            self._choices[choice.name] = taken, choice
        return taken

    @property
    def _promised(self) -> int:
        """Pages that those who are here may still take."""
        return sum(self._missing(taken) for taken in self._taken.values())

    def _missing(self, taken: _Taken) -> int:
        names = {each.name for each in taken.every}
        # What the first choice shares is there for the others, if it has ended itself as well.
        held = self._core.num_pages_of([*names | {_first_name(taken.request.request_id)}])
        return max(taken.room.most(len(names)) - held, 0)

    def _make_choices(self, request: GenerationRequest, is_handed_off: bool) -> list[_Choice]:
        sampling, name = request.sampling.seeded(), request.request_id
        assert sampling.seed is not None
        ends = ending_tokens(sampling, self._config.eos_token_ids)
        replayed = request.replayed or ((),) * sampling.choices
        choices: list[_Choice] = []
        for number in range(sampling.choices):
            masked = sampling.grammar is not None or replayed[number]
            sequence = NewSequence(
                f"{name}/{number}" if number else _first_name(name),
                request.prompt,
                sampling,
                (sampling.seed + number) % _SEEDS,
                ends,
                HeldTo(replayed[number]) if masked else None,
                # Pages that are written from elsewhere may be nobody else's.
                family=name if is_handed_off else None,
                handed_off=is_handed_off and number == 0,
                shared=is_handed_off and number == 0 and sampling.choices > 1,
            )
            answer = Answer(number, sampling, ends, self._token_bytes, replayed[number])
            choices.append(_Choice(sequence.name, answer, sequence))
        return choices

    def _start(self, taken: _Taken, constraint: Constraint | None) -> None:
        """The first choice waits for a place; its prompt is there, or is computed with it."""
        taken.started = True
        for each in taken.every:
            if each.held_to is not None and constraint is not None:
                each.held_to.constrain(constraint.copy())
        self._waiting.extend(taken.choices)

    def _fill_batch(self) -> None:
        while self._waiting and self._running < self._max_batch:
            choice = self._waiting.popleft()
            choice.is_in = True
            self._running += 1
            if choice.sequence.handed_off:
                self._core.begin(choice.name)
            else:
                self._core.add(choice.sequence)

    def _learn_pages(self) -> None:
        """Who waits for pages may have got them in this step."""
        for taken in self._taken.values():
            if _waits_for_pages(taken):
                pages = self._core.pages_of(taken.choices[0].name)
                if pages:
                    taken.table.set_result(np.array(pages, dtype=np.int64))

    def _progress(self) -> list[Output]:
        """How far vLLM has come with prompts that it computes; their end comes with a token."""
        outputs: list[Output] = []
        for name, taken in self._taken.items():
            total = len(taken.request.prompt)
            if taken.done is None or taken.done == total:
                continue
            done = min(self._core.num_computed(taken.choices[0].name), total)
            if taken.done < done < total:
                taken.done = done
                outputs.append((name, Progress(done, total)))
        return outputs

    def _hear(self, generated: Generated) -> list[Output]:
        """What came out of a sequence in a step."""
        if generated.name not in self._choices:
            return []
        taken, choice = self._choices[generated.name]
        name = taken.request.request_id
        if generated.failed is not None:
            return self._give_up(name, GenerationError(generated.failed))
        outputs = self._first_token(taken, choice) if generated.tokens else []
        held_to = choice.held_to
        if held_to is not None and held_to.failure is not None:
            return self._give_up(name, held_to.failure)
        deltas = list(_deltas(choice.answer, generated, held_to is not None and held_to.is_whole))
        has_ended = generated.ended or any(each.finish_reason for each in deltas)
        outputs += [(name, each) for each in deltas]
        if has_ended:
            self._end(taken, choice)
        return outputs

    def _first_token(self, taken: _Taken, choice: _Choice) -> list[Output]:
        """After a choice's first token its prompt is whole, and others find it."""
        if choice.has_token:
            return []
        choice.has_token = True
        if choice.answer.choice == 0:
            taken.choices += taken.later
            self._waiting.extend(taken.later)
            taken.later = []
            total = len(taken.request.prompt)
            if taken.done is not None:
                taken.done = total
                return [(taken.request.request_id, Progress(total, total))]
        elif all(each.has_token for each in taken.choices):
            self._core.let_go(_first_name(taken.request.request_id))
        return []

    def _end(self, taken: _Taken, choice: _Choice) -> None:
        taken.choices.remove(choice)
        del self._choices[choice.name]
        self._running -= 1
        # vLLM knows of ends by tokens and by length, and of no others.
        self._core.end(choice.name)
        if not taken.choices:
            name = taken.request.request_id
            self._core.let_go(_first_name(name))
            del self._taken[name]

    def _give_up(self, request_id: str, error: GenerationError) -> list[Output]:
        self.cancel(request_id)
        return [(request_id, error)]

    def _receiving(self, request_id: str) -> _Taken:
        taken = self._taken.get(request_id)
        if taken is None or taken.started:
            raise TransferError(f"request {request_id} takes no pages; it was cancelled or has all")
        return taken


def _first_name(request_id: str) -> str:
    return f"{request_id}/0"


def _waits_for_pages(taken: _Taken) -> bool:
    return taken.done is None and not taken.table.done()


def _deltas(answer: Answer, generated: Generated, is_whole: bool) -> Sequence[Delta]:
    """What a client is told of a sequence's tokens, up to the last one that counts."""
    deltas: list[Delta] = []
    for number, token in enumerate(generated.tokens, 1):
        is_last = number == len(generated.tokens)
        delta = answer.take(token, is_whole and is_last)
        if delta is not None:
            deltas.append(delta)
            if delta.finish_reason is not None:
                return deltas
    if generated.ended:
        # By a length that vLLM has of its own.
        deltas.append(answer.cut_off())
    return deltas
