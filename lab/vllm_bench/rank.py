"""One rank of vLLM as a decode engine, in a process of its own: see `ranks`.

Every rank computes the long prompts itself, as a gang would, and keeps the pages of its own heads.
The leading one then starts vLLM, over the others where there are any, has all of them write these
pages into vLLM's blocks, and asks.
"""

import pickle
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...engine.decode.arriving import ArrivingPages
from ...engine.decode.contract import DecodeEngine
from ...engine.decode.follower import FollowerPages
from ...engine.decode.leader import Followers
from ...engine.decode.orders import Channel
from ...engine.decode.step import PromptLimits
from ...engine.errors import GenerationError, LostError
from ...engine.figures import Counter, Figures, Gauge, Histogram
from ...engine.kv.hand_off import Place
from ...engine.kv.pages import PageGeometry, Pages
from ...engine.local import LocalPrefill
from ...engine.messages import Delta, GenerationRequest, SamplingParameters, Tokens
from ...engine.model.config import ModelConfig
from ...engine.model.files import ModelFiles
from ...kernels.page_size import pages_for
from ...kernels.pages import BlockTable
from ...plugins.vllm_decode.follow import follow
from ...plugins.vllm_decode.start import start

_CHUNK_TOKENS = 8192
_MEETING_SECONDS = 120.0
_PROMPT_TOKENS_AT_ONCE = 256
_MOST_AT_ONCE = 8
"""Sequences in a step: some wait for a place when all are asked at once."""


@dataclass(frozen=True)
class Question:
    """A prompt with what is asked of it; prompts that are not `own` are handed over.

    `leaves_after` so many steps the client is gone, if it ever is.
    """

    name: str
    prompt: Tokens
    sampling: SamplingParameters
    own: bool
    leaves_after: int | None = None


@dataclass(frozen=True)
class RankCase:
    """What a decode worker of `ranks` ranks is asked: one round after the other.

    One that is `eager` compiles nothing and captures no graphs, and so starts sooner.
    """

    ranks: int
    dtype: torch.dtype
    on_gpu: bool
    rounds: tuple[tuple[Question, ...], ...]
    eager: bool = False

    @property
    def questions(self) -> list[Question]:
        """Of all rounds."""
        return [each for questions in self.rounds for each in questions]


Said = list[tuple[int, float]]
"""Tokens of a choice, with their log-probabilities."""


@dataclass
class RankRun:
    """What came of a case: by a question's name, what each of its choices said.

    `first` are the best log-probabilities after prompts that were handed over, by our own prefill,
    and `failed` what went wrong, by question too. `usage` is the share of pages in use after the
    rounds, which is to be none. `steps` are seconds of each step.
    """

    said: dict[str, list[Said]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    usage: float = 0.0
    preemptions: int = 0
    start_seconds: float = 0.0


def main() -> None:
    """The process of a rank, whose number and folder are its arguments.

    It reads `case.pkl` there, and rank 0 leaves `run.pkl`.
    """
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    case: RankCase = pickle.loads((folder / "case.pkl").read_bytes())
    torch.set_num_threads(1)
    if rank:
        with Listener(_address(folder, rank), "AF_UNIX", backlog=2) as listener:
            _follow(case, rank, listener)
        return
    (folder / "run.pkl").write_bytes(pickle.dumps(_lead(case, folder)))


def _follow(case: RankCase, rank: int, listener: Listener) -> None:
    """Carry orders out, and put own pages where the leader says; until it closes both ways."""
    prompts = _Computed(case, rank)
    orders, pages = listener.accept(), listener.accept()
    follower, arriving = follow(rank, orders)
    putting = threading.Thread(target=_put_as_told, args=(prompts, pages, arriving))
    putting.start()
    follower.follow(orders)
    putting.join()


def _put_as_told(prompts: "_Computed", channel: Channel, arriving: FollowerPages) -> None:
    """Until the leader closes the channel; where this fails, the leader finds it closed."""
    with closing(channel):
        while True:
            try:
                name, numbers = pickle.loads(channel.recv_bytes())
            except EOFError:
                return
            arriving.expect(name, BlockTable(numbers))
            prompts.put(name, arriving)
            channel.send_bytes(b"")


def _lead(case: RankCase, folder: Path) -> RankRun:
    prompts = _Computed(case, 0)
    ways = [_ways_to(folder, rank) for rank in range(1, case.ranks)]
    begun = time.perf_counter()
    followers = Followers([orders for orders, _ in ways]) if ways else None
    leader = _Leader(_start(case, followers), prompts, [pages for _, pages in ways])
    leader.run.start_seconds = time.perf_counter() - begun
    leader.run.first = prompts.first
    # As in a cluster: another thread steps than the one that has loaded.
    with ThreadPoolExecutor(1) as steps:
        for questions in case.rounds:
            steps.submit(leader.ask, questions).result()
    for channel in (each for way in ways for each in way):
        channel.close()
    return leader.run


def _start(case: RankCase, followers: Followers | None) -> DecodeEngine:
    files = ModelFiles.of("pocket")
    config = ModelConfig.from_folder(files.folder)
    heads = config.num_kv_heads // case.ranks
    geometry = PageGeometry(config.num_layers, heads, config.head_dim, case.dtype)
    pages = max(sum(map(_most_pages, questions)) for questions in case.rounds)
    longest = max((len(each.prompt) for each in case.questions if each.own), default=0)
    prompts, graphs = PromptLimits(longest, _PROMPT_TOKENS_AT_ONCE), case.on_gpu and not case.eager
    return start(
        files, geometry, pages, _MOST_AT_ONCE, prompts, _Unkept(), followers, on_gpu=graphs
    )


class _Leader:
    """Asks, and keeps what is said."""

    def __init__(
        self, engine: DecodeEngine, prompts: "_Computed", followers: Sequence[Channel]
    ) -> None:
        self._engine, self._prompts, self._followers = engine, prompts, followers
        self.run = RankRun()

    def ask(self, questions: Sequence[Question]) -> None:
        """All at once, until nothing is left to say."""
        for question in questions:
            self.run.said[question.name] = [[] for _ in range(question.sampling.choices)]
        handed = [each for each in questions if not each.own]
        for question in handed:
            self._engine.reserve(_request(question))
        self._step_until_idle()
        for question in handed:
            self._hand_over(question)
        for question in questions:
            self._begin(question)
        steps = 0
        while self._engine.has_work:
            for question in questions:
                if question.leaves_after == steps:
                    self._engine.cancel(question.name)
            self._step()
            steps += 1
        self.run.usage = max(self.run.usage, self._engine.usage)
        self.run.preemptions = self._engine.num_preemptions

    def _hand_over(self, question: Question) -> None:
        count = pages_for(len(question.prompt))
        numbers = self._engine.held(question.name, Place(0, 0, 0), count, 1).numbers
        for channel in self._followers:
            channel.send_bytes(pickle.dumps((question.name, numbers)))
        self._prompts.put(question.name, self._engine)
        for channel in self._followers:
            channel.recv_bytes()

    def _begin(self, question: Question) -> None:
        request = _request(question)
        constraint = self._engine.prepare(request)
        if question.own:
            self._engine.admit(request, constraint)
        else:
            self._engine.start(question.name, np.zeros(1, dtype=np.float32), constraint)

    def _step_until_idle(self) -> None:
        while self._engine.has_work:
            self._step()

    def _step(self) -> None:
        begun = time.perf_counter()
        for name, output in self._engine.step():
            if isinstance(output, Delta):
                said = self.run.said[name][output.choice]
                said += [(token.token_id, token.logprob) for token in output.tokens]
            elif isinstance(output, GenerationError):
                self.run.failed[name] = str(output)
        self.run.steps.append(time.perf_counter() - begun)


class _Computed:
    """The pages of prompts that are handed over, of this rank's heads and on the host.

    `first` are the best log-probabilities after each.
    """

    def __init__(self, case: RankCase, rank: int) -> None:
        handed = [each for each in case.questions if not each.own]
        self.first: dict[str, float] = {}
        self._pages: dict[str, list[Tensor]] = {}
        if not handed:
            return
        device = torch.device("cuda" if case.on_gpu else "cpu")
        most = max(len(each.prompt) for each in handed)
        prefill = LocalPrefill(ModelFiles.of("pocket").folder, most, case.dtype, device)
        heads = prefill.pool.geometry.num_kv_heads // case.ranks
        self._first_head = rank * heads
        for question in handed:
            self._compute(prefill, question, slice(self._first_head, self._first_head + heads))
        del prefill
        if case.on_gpu:
            torch.cuda.empty_cache()

    def _compute(self, prefill: LocalPrefill, question: Question, heads: slice) -> None:
        name, prompt, pool = question.name, question.prompt, prefill.pool
        held = pool.allocate(pages_for(len(prompt)))
        prefill.prefiller.admit(name, prompt, held)
        logits = None
        for begin in range(0, len(prompt), _CHUNK_TOKENS):
            end = min(begin + _CHUNK_TOKENS, len(prompt))
            logits = prefill.prefiller.run_chunk(name, begin, end).logits
        assert logits is not None
        self.first[name] = torch.log_softmax(logits.float(), 0).max().item()
        layers = range(pool.geometry.num_layers)
        self._pages[name] = [pool.layer(each).values[held, heads].cpu() for each in layers]
        prefill.prefiller.release(name)
        pool.release(held)

    def put(self, name: str, arriving: ArrivingPages) -> None:
        """Write a prompt's pages where they are expected, and return when they are there."""
        device = arriving.pool.device
        for layer, values in enumerate(self._pages[name]):
            place = Place(layer, 0, self._first_head)
            arriving.receive(name, place, Pages(values.to(device)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class _Unkept(Figures):
    """Figures that nobody asks for."""

    def add(self, metric: Counter, amount: float = 1, **labels: str) -> None:
        """Nothing."""

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        """Nothing."""

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        """Nothing."""


def _most_pages(question: Question) -> int:
    """If no choice found the prompt that another one has."""
    sampling = question.sampling
    return sampling.choices * pages_for(len(question.prompt) + sampling.max_tokens)


def _request(question: Question) -> GenerationRequest:
    return GenerationRequest(question.name, question.prompt, question.sampling, time.time())


def _address(folder: Path, rank: int) -> str:
    return str(folder / f"rank-{rank}")


def _ways_to(folder: Path, rank: int) -> tuple[Channel, Channel]:
    """For orders and for pages; a rank listens before it computes its prompts."""
    address = _address(folder, rank)
    for _ in _tries(_MEETING_SECONDS):
        if Path(address).exists():
            return Client(address, "AF_UNIX"), Client(address, "AF_UNIX")
    raise LostError(f"rank {rank} did not come")


def _tries(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.1)
