"""What is wrong with a vLLM over several ranks, and what is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longreach.engine.errors import LostError
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer
from longreach.lab.vllm_bench import ranks
from longreach.lab.vllm_bench.rank import Question, RankCase, RankRun, Said
from longreach.lab.vllm_bench.ranks import judge, needle, rounds, run_all

TOKENIZER = Tokenizer(CHECKPOINT)


@pytest.fixture(scope="module")
def case() -> RankCase:
    """The shortest prompt that is computed, and the shortest that is handed over."""
    lone = [each for [each, *others] in rounds() if not others and "-600" in each.name]
    lone += [each for [each, *others] in rounds() if not others and each.name == "needle-3000"]
    return RankCase(2, torch.float32, False, tuple((each,) for each in lone))


def right(case: RankCase) -> RankRun:
    """Every token as likely as the last."""
    run = RankRun(steps=[0.1])
    for question in case.questions:
        tokens = [int(token) for token in TOKENIZER.encode(_answer(question))]
        said: Said = [(token, -0.5) for token in tokens]
        run.said[question.name] = [list(said) for _ in range(question.sampling.choices)]
        if not question.own:
            run.first[question.name] = -0.5
    return run


def _answer(question: Question) -> str:
    kind, length = question.name.split("-")
    return {"needle": needle(TOKENIZER, int(length))[1], "formed": "it is true."}.get(kind, "words")


def test_what_is_said_word_by_word_is_right(case: RankCase) -> None:
    verdict = judge(case, right(case), right(case))
    assert verdict.wrong == ()
    assert (verdict.apart, verdict.first_apart) == (0.0, 0.0)
    assert verdict.equal == verdict.tokens > 0


def _says(name: str, text: str) -> Callable[[RankRun], None]:
    def change(run: RankRun) -> None:
        run.said[name][0] = [(int(token), -0.5) for token in TOKENIZER.encode(text)]

    return change


def _is_as_likely(name: str, number: int, logprob: float) -> Callable[[RankRun], None]:
    def change(run: RankRun) -> None:
        said = run.said[name][0]
        said[number] = (said[number][0], logprob)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _says("needle-600", "00000"),
        _says("formed-600", "it is so."),
        _is_as_likely("sampled-600", 1, -0.6),
        _is_as_likely("needle-3000", 0, -0.6),
        lambda run: run.failed.update({"sampled-600": "on purpose"}),
        lambda run: run.said["needle-3000"].__setitem__(0, []),
        lambda run: setattr(run, "usage", 0.1),
        lambda run: setattr(run, "preemptions", 1),
    ],
)
def test_whatever_is_otherwise_is_wrong(case: RankCase, change: Callable[[RankRun], Any]) -> None:
    run = right(case)
    change(run)
    assert judge(case, run, right(case)).wrong


def test_first_tokens_are_held_to_our_own_prefill(case: RankCase) -> None:
    """Whatever one rank of vLLM says, which may be wrong as well."""
    run = right(case)
    run.first["needle-3000"] = -0.6
    [wrong] = judge(case, run, run).wrong
    assert "prefill" in wrong


def test_ranks_that_draw_other_tokens_are_wrong(case: RankCase) -> None:
    run = right(case)
    run.said["sampled-600"] = [[(1, -0.5)] * 100] * 3
    [wrong] = judge(case, run, right(case)).wrong
    assert "tokens" in wrong


def test_a_rank_that_fails_ends_the_others(case: RankCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which wait for it in a collective."""
    fails = "import sys, time; sys.exit(3) if sys.argv[1] == '1' else time.sleep(60)"
    monkeypatch.setattr(ranks, "_RANK", fails)
    with pytest.raises(LostError, match="rank 1 of 2 ended with 3"):
        list(run_all([case], 20.0))


def test_no_rank_is_waited_for_in_vain(case: RankCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_RANK", "import time; time.sleep(60)")
    with pytest.raises(LostError, match="did not end"):
        list(run_all([case], 0.5))
