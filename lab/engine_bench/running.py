"""One prompt through prefill and decode on one card, and batches through decode alone.

Prefill and decode share one pool: the decoder reserves a prompt's pages, the prefiller writes them,
and nothing is copied or held twice.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch

from ...engine.decode.decoder import Decoder
from ...engine.errors import GenerationError, OutOfMemoryError
from ...engine.memory.out_of_memory import out_of_memory_raises
from ...engine.messages import GenerationRequest, SamplingParameters, Tokens
from ...engine.prefill.chunk import ChunkResult
from ...engine.prefill.prefiller import Prefiller
from ...engine.prefill.warm_up import warm_up_prefill
from .density import Density
from .remedies import FEWER_SEQUENCES, FEWER_TOKENS
from .subject import Subject, synchronize
from .work import Work

Run = TypeVar("Run")
Chosen = Literal["greedy", "sampled", "held"]
"""How tokens are: greedy, with temperature 0.7 and top-p 0.8, or the latter held to a grammar."""

# Longer than any answer is measured, so that none ends.
_HELD_TO = (
    'start: "[" object ("," object){5000} "]"\n'
    'object: %json {"type": "object", "properties": {"name": {"type": "string"}, '
    '"size": {"type": "integer"}}, "required": ["name", "size"], "additionalProperties": false}'
)
_SHORT_SECONDS, _REPEATS = 3.0, 3
"""A prompt that takes less is run so many times."""
_SETTLING_STEPS = 4
"""The first steps of a batch may compile or capture what later ones only replay."""


@dataclass(frozen=True)
class PromptRun:
    """Seconds and bytes of one prompt; memory is None where the device does not count it.

    `first_token` are the seconds until the first token was sampled, `prefill` those until its
    logits were there. `steps` are the seconds of each decode step.
    """

    tokens: int
    sparse: bool
    prefill: float
    first_token: float
    stages: dict[str, float]
    density: float
    steps: list[float]
    peak_bytes: int | None
    activation_bytes: int | None

    @property
    def gaps(self) -> float:
        """Seconds of prefill in no stage: launch gaps and the host's work."""
        return self.prefill - sum(self.stages.values())


@dataclass(frozen=True)
class BatchRun:
    """Seconds of each decode step of sequences that began with these lengths."""

    lengths: list[int]
    steps: list[float]
    chosen: Chosen = "greedy"


def run_prompt(subject: Subject, tokens: int, sparse: bool, new_tokens: int) -> PromptRun:
    """Prefill a prompt, and decode `new_tokens` more after the first.

    A prompt that takes less than three seconds is run three times, and the median counts.

    Raises:
        OutOfMemoryError: at this length; pages are free again.
    """
    runs = repeated(lambda: _run_once(subject, tokens, sparse, new_tokens), lambda run: run.prefill)
    return sorted(runs, key=lambda run: run.first_token)[len(runs) // 2]


def repeated(run: Callable[[], Run], seconds: Callable[[Run], float]) -> list[Run]:
    """Run a prompt once, or three times where the first takes less than three seconds.

    Args:
        seconds: what the first run took; asked once.
    """
    first = run()
    more = _REPEATS - 1 if seconds(first) < _SHORT_SECONDS else 0
    return [first, *(run() for _ in range(more))]


def warm_up(subject: Subject, longest: int, sparse: bool, new_tokens: int) -> None:
    """Compile what prompts need, and let libraries make up their minds."""
    warm_up_prefill(
        # Not kept: each prefiller has memory of its own where pages are of 8 bits.
        Prefiller(subject.model, subject.pool, subject.sparsity if sparse else None),
        longest, subject.chunk_tokens, subject.model.positions.stride,
    )  # fmt: skip
    _run_once(subject, min(subject.chunk_tokens, longest), sparse, new_tokens)


def _run_once(subject: Subject, tokens: int, sparse: bool, new_tokens: int) -> PromptRun:
    density = Density(subject.device)
    prompt = subject.prompt(tokens)
    ran_out = OutOfMemoryError(f"the device ran out of memory at a prompt of {tokens:,} tokens")
    with out_of_memory_raises(ran_out.with_remedy(FEWER_TOKENS)):
        sparsity = subject.sparsity if sparse else None
        prefiller = Prefiller(subject.model, subject.pool, sparsity, density)
        decoder = Decoder(subject.model, subject.pool, subject.token_bytes, 1)
        before = _start_counting_memory(subject.device)
        try:
            decoder.reserve(make_request("a", prompt, new_tokens + 1))
            synchronize(subject.device)
            started = time.perf_counter()
            results = prefill(prefiller, prompt, subject.chunk_tokens, decoder.block_table("a"))
            synchronize(subject.device)
            prefilled = time.perf_counter()
            logits = results[-1].logits
            assert logits is not None
            _check(decoder.start("a", logits.cpu().numpy()))
            first_token = time.perf_counter()
            stages = add_up(results)
            prefiller.release("a")
            steps = _steps(decoder)
        finally:
            prefiller.release("a")
            decoder.cancel("a")
    peak = torch.cuda.max_memory_allocated(subject.device) if before is not None else None
    config = subject.model.config
    pairs = Work(config).attention_flops(tokens) / 4 / config.head_dim
    used = sparse and subject.is_sparse(tokens)
    return PromptRun(
        tokens, used, prefilled - started, first_token - started, stages,
        density.of(pairs) if used else 1.0, steps, peak,
        None if peak is None or before is None else peak - before,
    )  # fmt: skip


def prefill(
    prefiller: Prefiller, prompt: Tokens, chunk_tokens: int, pages: Sequence[int] | None = None
) -> list[ChunkResult]:
    """Launch all chunks of a prompt, admitted as "a"; a GPU computes them later.

    Args:
        pages: as `Prefiller.admit` takes them.
    """
    prefiller.admit("a", prompt, pages)
    return [
        prefiller.run_chunk("a", start, min(start + chunk_tokens, len(prompt)))
        for start in range(0, len(prompt), chunk_tokens)
    ]


def run_batch(
    subject: Subject, lengths: Sequence[int], new_tokens: int, chosen: Chosen = "greedy"
) -> BatchRun:
    """Decode only, after prompts of these lengths whose pages hold whatever they hold.

    Raises:
        OutOfMemoryError: with this batch; pages are free again.
    """
    generator = np.random.default_rng(subject.seed)
    names = [str(number) for number in range(len(lengths))]
    ran_out = OutOfMemoryError(f"the device ran out of memory at a batch of {len(lengths)}")
    with out_of_memory_raises(ran_out.with_remedy(FEWER_SEQUENCES)):
        decoder = Decoder(subject.model, subject.pool, subject.token_bytes, len(lengths))
        try:
            requests = [
                make_request(name, np.zeros(length, dtype=np.int32), new_tokens + 1, chosen)
                for name, length in zip(names, lengths, strict=True)
            ]
            for request in requests:
                decoder.reserve(request)
            vocab = subject.model.config.vocab_size
            for request in requests:
                logits = generator.standard_normal(vocab, dtype=np.float32)
                constraint = decoder.prepare(request)
                _check(decoder.start(request.request_id, logits, constraint))
            return BatchRun(list(lengths), _steps(decoder), chosen)
        finally:
            for name in names:
                decoder.cancel(name)
            while decoder.has_work:  # a step under way holds pages
                decoder.step()


def settled(steps: list[float]) -> list[float]:
    """The steps that count: without the first, where there are enough others."""
    return steps[_SETTLING_STEPS:] if len(steps) >= 2 * _SETTLING_STEPS else steps


def _steps(decoder: Decoder) -> list[float]:
    """Seconds of every step until nothing is left to generate: from one's tokens to the next's.

    The first call says nothing where the next step is launched before this one is looked at.
    """
    seconds, started = [], time.perf_counter()
    while decoder.has_work:
        outputs = decoder.step()
        if outputs:
            _check(outputs)
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    return seconds


def _check(outputs: Sequence[tuple[str, object]]) -> None:
    for _, output in outputs:
        if isinstance(output, GenerationError):
            raise output


def make_request(
    name: str, prompt: Tokens, max_tokens: int, chosen: Chosen = "greedy"
) -> GenerationRequest:
    """For so many tokens, whatever ends an answer."""
    temperature, top_p = (0.0, 1.0) if chosen == "greedy" else (0.7, 0.8)
    sampling = SamplingParameters(
        max_tokens, temperature, top_p, seed=0, ignore_eos=True,
        grammar=_HELD_TO if chosen == "held" else None,
    )  # fmt: skip
    return GenerationRequest(name, prompt, sampling, time.time())


def add_up(results: Sequence[ChunkResult]) -> dict[str, float]:
    """Seconds by stage, of all chunks."""
    stages: defaultdict[str, float] = defaultdict(float)
    for result in results:
        for stage, seconds in result.stages.items():
            stages[stage] += seconds
    return dict(stages)


def _start_counting_memory(device: torch.device) -> int | None:
    """Bytes that are allocated now: weights and pages."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
