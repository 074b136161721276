"""Whether vLLM over several ranks, as the decode engine of a worker, says what one rank says.

One process for each rank, as in a cluster, and no Ray: on GPUs each sees its own, and they sum by
NCCL. The bundled model finds pass keys in prompts that vLLM computes and in prompts that are handed
over, answers in a form, samples several choices with a seed, and is left in mid-answer; one prompt
after the other, and all at once. Log-probabilities are held to one rank's, and those of first
tokens to our own prefill's. Tokens are sampled by each rank for itself: if two did not draw the
same, all that follows would be another model's.
"""

import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...engine.errors import ConfigurationError, LostError
from ...engine.messages import SamplingParameters, Tokens
from ...engine.model.pocket import CHECKPOINT
from ...engine.text.tokenizer import Tokenizer
from ..evaluation.tasks import NEEDLES
from .rank import Question, RankCase, RankRun, Said

OWN_LENGTHS = (600, 1500)
"""Prompts that vLLM computes; those that are longer than it may are handed over."""
HANDED_LENGTHS = (3000, 9000, 40_000)
_RANK = f"from {__package__}.rank import main; main()"
"""The program of one rank; it imports vLLM, which this process need not have."""
_SAMPLED_TOKENS = 24
_SEED = 5
_FORM = 'start: "it is " ("true" | "false") "."'
_FORMED = ("it is true.", "it is false.")
_FEWEST_EQUAL = 0.5
_MOST_APART = {torch.float32: 2e-3, torch.bfloat16: 0.5}
"""Log-probabilities of the same token; of tokens with next to none, bfloat16 tells few digits."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a run, if anything, and how near it came to the other.

    Of `tokens` tokens that were drawn, `equal` are the same up to the first that is not. `apart` is
    how far log-probabilities of those are from the other's, and `first_apart` how far those of
    first tokens are from our own prefill's.
    """

    wrong: tuple[str, ...]
    tokens: int
    equal: int
    apart: float
    first_apart: float


def compare(ranks: Sequence[int], seconds: float, eager: bool = False) -> bool:
    """Run each number of ranks, print what came of it, and say whether all is right.

    Args:
        seconds: that each may take.
        eager: without compiling and graphs, on GPUs.

    Raises:
        ConfigurationError: there are not as many GPUs.
        LostError: a rank failed, or did not end in `seconds`.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    cases = [RankCase(each, dtype, on_gpu, rounds(), eager) for each in ranks]
    alone: RankRun | None = None
    is_right = True
    for case, run in zip(cases, run_all(cases, seconds), strict=True):
        alone = alone or run
        verdict = judge(case, run, alone)
        print(_text(case, run, verdict), flush=True)
        is_right = is_right and not verdict.wrong
    print("RIGHT" if is_right else "WRONG", flush=True)
    return is_right


def rounds() -> tuple[tuple[Question, ...], ...]:
    """Each question alone, then all at once, of which two are left."""
    tokenizer = Tokenizer(CHECKPOINT)
    questions = list(_questions(tokenizer))
    leaving = [
        replace(_named(questions[0], "leaves-own"), leaves_after=2),
        replace(_named(questions[-1], "leaves-handed"), leaves_after=5),
    ]
    together = [_named(each, f"{each.name}-together") for each in questions]
    return (*((each,) for each in questions), (*together, *leaving))


def needle(tokenizer: Tokenizer, tokens: int) -> tuple[Tokens, str]:
    """A chat of so many tokens, and the pass key that it asks for."""

    def encode(content: str) -> Tokens:
        return tokenizer.encode_chat([{"role": "user", "content": content}])

    prompt = NEEDLES[0].prompt(tokens, _SEED, None, lambda content: len(encode(content)))
    return encode(prompt.content), prompt.expected[0]


def _questions(tokenizer: Tokenizer) -> Iterator[Question]:
    greedy = SamplingParameters(16, temperature=0.0, top_logprobs=0)
    sampled = SamplingParameters(
        _SAMPLED_TOKENS, temperature=1.0, seed=_SEED, choices=3, frequency_penalty=0.5,
        top_logprobs=0, ignore_eos=True,
    )  # fmt: skip
    formed = SamplingParameters(32, temperature=1.0, seed=_SEED, grammar=_FORM, top_logprobs=0)
    for tokens in (*OWN_LENGTHS, *HANDED_LENGTHS):
        own, prompt = tokens in OWN_LENGTHS, needle(tokenizer, tokens)[0]
        yield Question(f"needle-{tokens}", prompt, greedy, own)
        yield Question(f"sampled-{tokens}", prompt, sampled, own)
    for tokens in (OWN_LENGTHS[0], HANDED_LENGTHS[0]):
        own, prompt = tokens in OWN_LENGTHS, needle(tokenizer, tokens)[0]
        yield Question(f"formed-{tokens}", prompt, formed, own)


def _named(question: Question, name: str) -> Question:
    return replace(question, name=name)


def run_all(cases: Sequence[RankCase], seconds: float) -> Iterator[RankRun]:
    """Run cases, all at once where there are GPUs for that, else one after the other."""
    gpus = torch.cuda.device_count()
    most = max(case.ranks for case in cases)
    if cases[0].on_gpu and most > gpus:
        raise ConfigurationError(f"{most} ranks need as many GPUs, and there are {gpus}")
    if not cases[0].on_gpu or sum(case.ranks for case in cases) > gpus:
        for case in cases:
            with _Ranks(case, 0) as running:
                yield running.result(seconds)
        return
    with ExitStack() as stack:
        first, started = 0, []
        for case in cases:
            started.append(stack.enter_context(_Ranks(case, first)))
            first += case.ranks
        for running in started:
            yield running.result(seconds)


class _Ranks:
    """The processes of one case, from `with` on; none is left behind it.

    Args:
        first_gpu: of those that see one GPU each.
    """

    def __init__(self, case: RankCase, first_gpu: int) -> None:
        self._case, self._first_gpu = case, first_gpu
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "_Ranks":
        folder = Path(self._folder.name)
        (folder / "case.pkl").write_bytes(pickle.dumps(self._case))
        for rank in range(self._case.ranks):
            gpu = _visible(self._first_gpu + rank)
            sees = {"CUDA_VISIBLE_DEVICES": gpu} if self._case.on_gpu else {}
            command = [sys.executable, "-c", _RANK, str(rank), str(folder)]
            self._processes.append(subprocess.Popen(command, env={**os.environ, **sees}))
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def result(self, seconds: float) -> RankRun:
        """What rank 0 leaves, when all have ended.

        Raises:
            LostError: one failed, or they did not end in time.
        """
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in self._processes):
            if time.monotonic() > end:
                raise LostError(f"{self._case.ranks} ranks did not end in {seconds:g} s")
            self._check()
            time.sleep(0.2)
        self._check()
        return pickle.loads((Path(self._folder.name) / "run.pkl").read_bytes())

    def _check(self) -> None:
        for rank, process in enumerate(self._processes):
            if process.poll():
                raise LostError(f"rank {rank} of {self._case.ranks} ended with {process.poll()}")


def _visible(gpu: int) -> str:
    """What a process is told that is to see one GPU alone, of those that are seen here."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(gpu) if seen is None else seen.split(",")[gpu]


def judge(case: RankCase, run: RankRun, alone: RankRun) -> Verdict:
    """Hold a run to what is right, and to what one rank said."""
    tokenizer = Tokenizer(CHECKPOINT)
    wrong = [f"{name} failed: {error}" for name, error in run.failed.items()]
    tokens = equal = 0
    apart = [0.0]
    for question in case.questions:
        if question.leaves_after is not None:
            continue
        said, other = run.said[question.name], alone.said[question.name]
        text = tokenizer.decode([token for token, _ in said[0]])
        if not _is_right(question, text, tokenizer):
            wrong.append(f"{question.name} was answered with {text!r}")
        for own, theirs in zip(said, other, strict=True):
            same = _common(own, theirs)
            tokens, equal = tokens + len(own), equal + same
            apart += [abs(a[1] - b[1]) for a, b in zip(own[:same], theirs[:same], strict=True)]
    firsts = {name: run.said[name][0][:1] for name in run.first if name.startswith("needle")}
    first = [abs(run.first[name] - said[0][1]) for name, said in firsts.items() if said]
    most = _MOST_APART[case.dtype]
    if equal < _FEWEST_EQUAL * tokens:
        wrong.append(f"only {equal} of {tokens} tokens are those of one rank")
    if max(apart) > most:
        wrong.append(f"log-probabilities are {max(apart):.3g} from those of one rank")
    if max(first, default=0.0) > most:
        wrong.append("first tokens are not those of our own prefill")
    if run.usage or run.preemptions:
        wrong.append(f"{run.usage:.1%} of pages are left in use, {run.preemptions} preemptions")
    return Verdict(tuple(wrong), tokens, equal, max(apart), max(first, default=0.0))


def _is_right(question: Question, text: str, tokenizer: Tokenizer) -> bool:
    kind, length = question.name.split("-")[:2]
    if kind == "needle":
        return NEEDLES[0].score(text, (needle(tokenizer, int(length))[1],)) == 1
    return kind != "formed" or text in _FORMED


def _common(one: Said, other: Said) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = list(zip(one, other, strict=False))
    return next((n for n, (a, b) in enumerate(pairs) if a[0] != b[0]), len(pairs))


def _text(case: RankCase, run: RankRun, verdict: Verdict) -> str:
    lines = [
        f"{case.ranks} ranks: started in {run.start_seconds:.1f} s, {len(run.steps)} steps with a "
        f"median of {statistics.median(run.steps) * 1e3:.2f} ms; {verdict.equal} of "
        f"{verdict.tokens} tokens are those of the first, log-probabilities at most "
        f"{verdict.apart:.2g} apart, of first tokens {verdict.first_apart:.2g} from our prefill's"
    ]
    return "\n".join([*lines, *(f"  wrong: {each}" for each in verdict.wrong)])
