"""Steps that are launched before the one before was looked at: the same text, nobody's pages."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.portable_step import PortableStep
from longreach.engine.decode.step import (
    DecodeStep,
    Outcome,
    PromptPiece,
    StepRow,
    StepUnderWay,
)
from longreach.engine.errors import StepOutOfMemoryError
from longreach.engine.kv.pages import PagePool
from longreach.engine.messages import ChosenToken, Delta, GenerationRequest
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.lab.pocket.tokenizer import build_tokenizer

from ..checkpoints import DUAL_CHUNK, make_checkpoint
from .test_decode import make_prompt, make_request
from .test_prompts import LIMITS, run, tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen2:
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("dual"), dual_chunk=DUAL_CHUNK)
    return Qwen2.load(folder, Mesh.single(), torch.float32, torch.device("cpu"))


class LateStep(DecodeStep):
    """A device that computes nothing before it is waited for, as late as one can be."""

    runs_ahead = True

    def __init__(self, portable: PortableStep) -> None:
        self.portable = portable
        self.launched = self.had_run = 0
        self.ahead = 0
        self.chosen: list[Outcome] = []
        self.fails: bool = False

    def launch(self, rows: Sequence[StepRow], pieces: Sequence[PromptPiece] = ()) -> StepUnderWay:
        if self.fails:
            self.fails = False
            raise torch.OutOfMemoryError("out of memory")
        under_way = self.launched - self.had_run
        assert under_way <= 1
        self.ahead += under_way
        self.launched += 1
        return _Late(self, list(rows), list(pieces), self.launched)

    def token_of(self, row: StepRow) -> StepRow:
        if row.follows is None:
            return row
        chosen = self.chosen[row.follows]
        assert isinstance(chosen, ChosenToken)
        return replace(row, token=chosen.token_id, follows=None)


class _Late(StepUnderWay):
    def __init__(
        self, step: LateStep, rows: list[StepRow], pieces: list[PromptPiece], number: int
    ) -> None:
        self.step, self.rows, self.pieces, self.number = step, rows, pieces, number

    def outcomes(self) -> list[Outcome]:
        self.step.had_run += 1
        assert self.number == self.step.had_run
        rows = [self.step.token_of(row) for row in self.rows]
        self.step.chosen = self.step.portable.run(rows, self.pieces)
        return self.step.chosen


def make_decoder(
    model: Qwen2, ahead: bool, pages: int = 200, max_batch: int = 4
) -> tuple[Decoder, LateStep]:
    pool = PagePool(model.page_geometry, pages, torch.device("cpu"))
    pool.memory.fill_(torch.nan)
    step = LateStep(PortableStep(model, pool, max_batch))
    step.runs_ahead = ahead  # pyright: ignore[reportAttributeAccessIssue]
    token_bytes = TokenBytes(build_tokenizer())
    return Decoder(model, pool, token_bytes, max_batch, LIMITS, step=step), step


def make_requests() -> list[GenerationRequest]:
    """Of all kinds; answers begin, end and grow over the borders of pages at different steps."""
    kinds: list[dict[str, Any]] = [
        {"max_tokens": 9},
        {"max_tokens": 1},
        {"max_tokens": 12, "choices": 2},
        {"max_tokens": 5, "temperature": 1.0, "seed": 3},
        {"max_tokens": 2},
        {"max_tokens": 7, "min_tokens": 3, "ignore_eos": False},
        {"max_tokens": 6, "presence_penalty": 1.0},
        {"max_tokens": 20},
    ]
    lengths = [1, 17, 120, 127, 128, 245, 300, 600]
    return [
        make_request(f"{length}", make_prompt(length, seed=length), **kind)
        for length, kind in zip(lengths, kinds, strict=True)
    ]


def said(decoder: Decoder, requests: Iterable[GenerationRequest]) -> dict[str, Any]:
    """What is said to requests of which one more comes with every second step."""
    requests, outputs = list(requests), []
    for request in requests:
        decoder.admit(request)
        outputs += decoder.step() + decoder.step()
    outputs += run(decoder)
    assert decoder.usage == 0
    return {each.request_id: tokens(outputs, each.request_id) for each in requests}


def test_the_text_is_what_it_is_where_every_step_is_waited_for(model: Qwen2) -> None:
    waiting, _ = make_decoder(model, ahead=False)
    ahead, step = make_decoder(model, ahead=True)
    assert said(ahead, make_requests()) == said(waiting, make_requests())
    assert step.launched == step.had_run
    assert step.ahead > 0


def test_greedy_steps_are_launched_before_the_last_one_is_looked_at(model: Qwen2) -> None:
    decoder, step = make_decoder(model, ahead=True)
    decoder.admit(make_request("a", make_prompt(30), max_tokens=10))
    assert decoder.step() == []  # the prompt
    outputs = decoder.step()
    assert (step.launched, step.had_run) == (1, 1)
    outputs += decoder.step()
    for number in range(2, 11):
        assert (step.launched, step.had_run) == (number, number - 1)
        outputs += decoder.step()
    assert (step.launched, step.had_run) == (10, 10)
    assert not decoder.has_work
    assert len(tokens(outputs, "a")[0]) == 10


def test_an_answer_that_ends_unforeseen_keeps_its_pages_until_its_last_step_has_run(
    model: Qwen2,
) -> None:
    prompt = make_prompt(128)
    alone, _ = make_decoder(model, ahead=False)
    alone.admit(make_request("a", prompt, max_tokens=40))
    answer = tokens(run(alone), "a")[0]
    last = max(answer.index(token) for token in answer)
    assert 1 <= last < 39
    decoder, step = make_decoder(model, ahead=True)
    decoder.admit(make_request("a", prompt, max_tokens=40, stop_token_ids=(answer[last],)))
    outputs: list[Any] = []
    while not any(isinstance(each, Delta) and each.finish_reason for _, each in outputs):
        outputs += decoder.step()
    assert not decoder.is_generating("a")
    assert step.launched == step.had_run + 1
    assert decoder.usage > 0
    assert decoder.has_work
    assert decoder.step() == []
    assert decoder.usage == 0
    assert tokens(outputs, "a")[0] == answer[: last + 1]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])
def test_cancelling_gives_pages_back_when_the_step_under_way_has_run(
    model: Qwen2, steps: int
) -> None:
    decoder, step = make_decoder(model, ahead=True)
    decoder.admit(make_request("a", make_prompt(600), choices=2, max_tokens=100))
    decoder.admit(make_request("b", make_prompt(17, seed=17), max_tokens=8))
    outputs: list[Any] = []
    for _ in range(steps):
        outputs += decoder.step()
    decoder.cancel("a")
    under_way = step.launched - step.had_run
    outputs += run(decoder)
    assert under_way == 1
    assert decoder.usage == 0
    alone, _ = make_decoder(model, ahead=False)
    alone.admit(make_request("b", make_prompt(17, seed=17), max_tokens=8))
    assert tokens(outputs, "b") == tokens(run(alone), "b")


def test_whoever_makes_room_has_its_pages_copied_when_nothing_is_under_way(model: Qwen2) -> None:
    requests = [
        make_request(f"{length}", make_prompt(length, seed=length), max_tokens=40)
        for length in (120, 250, 380)
    ]
    plenty, _ = make_decoder(model, ahead=False)
    decoder, step = make_decoder(model, ahead=True, pages=8)
    assert said(decoder, requests) == said(plenty, requests)
    assert decoder.num_preemptions > 0
    assert step.ahead > 0


def test_too_little_memory_for_a_step_ends_one_request_and_loses_no_token(model: Qwen2) -> None:
    decoder, step = make_decoder(model, ahead=True)
    decoder.admit(make_request("a", make_prompt(17, seed=17), max_tokens=8))
    outputs = [output for _ in range(3) for output in decoder.step()]
    decoder.admit(make_request("b", make_prompt(30), max_tokens=8))
    step.fails = True
    outputs += decoder.step()
    [(ended, error)] = [each for each in outputs if isinstance(each[1], StepOutOfMemoryError)]
    assert isinstance(error, StepOutOfMemoryError)
    assert (ended, error.sequences) == ("b", 2)
    outputs += run(decoder)
    alone, _ = make_decoder(model, ahead=False)
    alone.admit(make_request("a", make_prompt(17, seed=17), max_tokens=8))
    assert tokens(outputs, "a") == tokens(run(alone), "a")
    assert decoder.usage == 0


def test_one_choice_that_ends_unforeseen_leaves_the_other_alone(model: Qwen2) -> None:
    """Both go on from tokens of their own that the client has."""
    request = replace(
        make_request("a", make_prompt(77), max_tokens=12, choices=2),
        replayed=((36, 37), (54, 53)),
    )
    alone, _ = make_decoder(model, ahead=False)
    alone.admit(request)
    whole = tokens(run(alone), "a")
    early = next(
        (choice, at, token)
        for choice in whole
        for at, token in enumerate(whole[choice])
        if 2 <= at < len(whole[choice]) - 1
        and token not in (*whole[choice][:at], *whole[1 - choice])
    )
    choice, at, token = early
    sampling = replace(request.sampling, stop_token_ids=(token,))
    decoder, step = make_decoder(model, ahead=True)
    decoder.admit(replace(request, sampling=sampling))
    said_now = tokens(run(decoder), "a")
    assert said_now[choice] == whole[choice][: at + 1]
    assert said_now[1 - choice] == whole[1 - choice]
    assert step.ahead > 0
    assert decoder.usage == 0
