"""Sampling against definitions written down once more, in float64 and without shortcuts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.engine.decode.sampler import Logits, Sampler, best_token
from longreach.engine.messages import SamplingParameters, Tokens
from longreach.kernels.sampling.reference import draw_token

VOCAB = 50
NO_PROMPT: Tokens = np.empty(0, dtype=np.int32)


def make_sampler(
    seed: int = 0,
    choice: int = 0,
    prompt: Sequence[int] = (),
    ends: Sequence[int] = (),
    **sampling,
) -> Sampler:
    parameters = SamplingParameters(max_tokens=9, **sampling)
    return Sampler(parameters, seed, choice, np.asarray(prompt, dtype=np.int32), VOCAB, ends)


def make_logits(seed: int = 0, spread: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).normal(size=VOCAB) * spread).astype(np.float32)


def allowed(logits: Logits, temperature: float, top_k: int, top_p: float, min_p: float):
    """Probabilities by the definitions: top-k, then top-p of what is left, then min-p."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k or VOCAB]
    shares = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: int(np.searchsorted(shares, top_p)) + 1] if top_p < 1 else kept
    kept = kept[p[kept] >= min_p * p.max()]
    distribution = np.zeros(VOCAB)
    distribution[kept] = p[kept] / p[kept].sum()
    return distribution


def test_temperature_zero_takes_the_best_and_leaves_the_logits_alone() -> None:
    logits = make_logits()
    before = logits.copy()
    assert make_sampler(temperature=0).choose(logits).token_id == int(logits.argmax())
    make_sampler(temperature=0, logit_bias=((3, 50.0),), presence_penalty=1).choose(logits)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.6, 0, 0.8, 0.0), (1.4, 7, 1.0, 0.0), (1.0, 9, 0.7, 0.0),
     (1.0, 0, 1.0, 0.2), (0.9, 20, 0.95, 0.05)],
)  # fmt: skip
def test_frequencies_follow_the_definition(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = make_logits(spread=1.5)
    expected = allowed(logits, temperature, top_k, top_p, min_p)
    sampler = make_sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    draws = 4000
    counts = np.bincount([sampler.choose(logits).token_id for _ in range(draws)], minlength=VOCAB)
    assert not counts[expected == 0].any()
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) <= 5 * deviation + 1e-9).all()


@settings(max_examples=50)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(1e-4, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_only_allowed_tokens_are_ever_drawn(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = make_logits(seed)
    # A hair more than the definition allows, for sums that round differently.
    expected = allowed(logits, temperature, top_k, min(1.0, top_p + 1e-6), min_p * (1 - 1e-9))
    sampler = make_sampler(seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for _ in range(5):
        assert expected[sampler.choose(logits).token_id] > 0


def test_a_large_vocabulary_is_cut_where_a_small_one_is() -> None:
    """Top-p looks at the best few first; an even distribution needs them all."""
    logits = np.zeros(5000, dtype=np.float32)
    parameters = SamplingParameters(max_tokens=1, top_p=0.5)
    sampler = Sampler(parameters, 0, 0, NO_PROMPT, 5000)
    drawn = {sampler.choose(logits).token_id for _ in range(2000)}
    assert max(drawn) < 2501
    assert len(drawn) > 1200


def test_penalties_and_bias_by_their_definitions() -> None:
    logits = np.full(VOCAB, -5.0, dtype=np.float32)
    logits[[1, 2, 3]] = [4.0, 3.5, 3.0]
    sampler = make_sampler(temperature=0, frequency_penalty=0.3, presence_penalty=0.4)
    # 1: 4.0, then 3.3, 3.0, 2.7; 2: 3.5, then 2.8; 3: 3.0, then 2.3.
    chosen = [sampler.choose(logits).token_id for _ in range(6)]
    assert chosen[:3] == [1, 2, 1]
    assert make_sampler(temperature=0, logit_bias=((9, 10.0),)).choose(logits).token_id == 9
    seen = make_sampler(temperature=0, repetition_penalty=2.0, prompt=[1])
    assert seen.choose(logits).token_id == 2
    negative = np.full(VOCAB, -1.0, dtype=np.float32)
    negative[4] = -0.9
    assert make_sampler(temperature=0, repetition_penalty=2.0, prompt=[4]).choose(
        negative
    ).token_id != 4  # fmt: skip


def test_the_same_seed_draws_the_same_and_choices_differ() -> None:
    logits = make_logits(spread=0.5)

    def draw(seed: int, choice: int) -> list[int]:
        sampler = make_sampler(seed, choice)
        return [sampler.choose(logits).token_id for _ in range(20)]

    assert draw(5, 0) == draw(5, 0)
    assert draw(5, 0) != draw(5, 1)
    assert draw(5, 0) != draw(6, 0)
    assert draw(-1, 0) == draw(2**64 - 1, 0)


@pytest.mark.parametrize("sampling", [{}, {"top_k": 40}, {"top_p": 0.999999}], ids=str)
def test_a_draw_that_rounds_up_to_everything_takes_what_can_come(sampling: dict[str, Any]) -> None:
    """The last rows are no tokens: the sum ends before them, and so must the draw."""

    class Highest(np.random.Generator):
        def random(self, *given: Any, **named: Any) -> Any:
            return 1.0

    logits = make_logits()
    logits[30:] = -np.inf
    sampler = make_sampler(**sampling)
    sampler._generator = Highest(np.random.Philox(0))
    assert sampler.choose(logits).token_id < 30


def test_log_probabilities_are_the_models_own() -> None:
    logits = make_logits()
    sampler = make_sampler(temperature=0.2, top_k=1, logit_bias=((7, 99.0),), top_logprobs=3)
    chosen = sampler.choose(logits)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum())
    assert chosen.token_id == 7
    assert chosen.logprob == pytest.approx(expected[7], abs=1e-5)
    assert [top.token_id for top in chosen.top] == np.argsort(-wide)[:3].tolist()
    assert [top.logprob for top in chosen.top] == pytest.approx(sorted(expected)[:-4:-1], abs=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_logits_are_refused(value: float) -> None:
    logits = make_logits()
    logits[4] = value
    with pytest.raises(FloatingPointError):
        make_sampler().choose(logits)
    with pytest.raises(FloatingPointError):
        make_sampler().choose(np.full(VOCAB, -np.inf, dtype=np.float32))


def test_greedy_without_extras_takes_the_best_token_as_it_is_told() -> None:
    """Whoever computed the logits may find it: the lowest id among equals, as on the host."""
    logits = make_logits()
    logits[[31, 8, 40]] = logits.max() + 1
    sampler = make_sampler(temperature=0, top_p=0.5, top_logprobs=0)
    assert sampler.takes_best
    assert sampler.accept(best_token(logits)) == sampler.choose(logits)
    assert best_token(logits).token_id == 8
    logits[4] = np.nan
    with pytest.raises(FloatingPointError):
        sampler.accept(best_token(logits))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.1},
        {"top_logprobs": 1},
        {"logit_bias": ((3, 1.0),)},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_everything_else_needs_the_logits(sampling: dict[str, Any]) -> None:
    assert not make_sampler(**{"temperature": 0, **sampling}).takes_best


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_end_before_there_are_enough_tokens(temperature: float) -> None:
    logits = make_logits()
    logits[[7, 9]] = logits.max() + 50
    sampler = make_sampler(ends=(7, 9), min_tokens=2, temperature=temperature)
    assert not sampler.takes_best
    drawn = [sampler.choose(logits).token_id for _ in range(2)]
    assert not {7, 9} & set(drawn)
    assert sampler.takes_best == (temperature == 0)
    assert sampler.choose(logits).token_id in (7, 9)
    assert logits[7] == logits.max()


def test_tokens_that_are_repeated_count_as_well() -> None:
    logits = make_logits()
    logits[7] = logits.max() + 50
    sampler = make_sampler(ends=(7,), min_tokens=3, temperature=0)
    for token in (1, 2):
        sampler.repeat(token)
    assert sampler.choose(logits).token_id != 7
    assert sampler.choose(logits).token_id == 7


def test_without_ends_greedy_tokens_are_counted_as_they_are_told() -> None:
    sampler = make_sampler(min_tokens=5, temperature=0)
    assert sampler.takes_best


def test_top_p_of_nothing_leaves_the_best_token() -> None:
    logits = make_logits()
    drawn = {make_sampler(seed=seed, top_p=0.0).choose(logits).token_id for seed in range(20)}
    assert drawn == {int(logits.argmax())}


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.0, "presence_penalty": 0.5, "logit_bias": ((3, 2.0),)},
        {"temperature": 1.3, "top_k": 9, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_what_a_device_draws_is_what_would_have_been_chosen(sampling: dict[str, Any]) -> None:
    """Whoever has the logits draws by what the sampler says, and the sampler goes on alike."""
    mine, theirs = (make_sampler(7, prompt=[1, 2], **sampling) for _ in range(2))
    for seed in range(12):
        logits = make_logits(seed, spread=1.0)
        drawing = mine.drawing
        assert drawing is not None
        assert drawing == mine.drawing or drawing.draw == mine.drawing.draw  # pyright: ignore
        adjusted = logits.copy()
        if drawing.penalties is not None:
            drawing.penalties.apply(adjusted)
        token = draw_token(
            adjusted, drawing.draw, drawing.temperature, drawing.top_k, drawing.top_p,
            drawing.min_p,
        )  # fmt: skip
        chosen = theirs.choose(logits)
        assert token == chosen.token_id
        assert mine.accept(chosen) == chosen


def test_some_tokens_are_the_hosts_to_choose() -> None:
    assert make_sampler(top_logprobs=2).drawing is None
    parameters = SamplingParameters(max_tokens=9, min_tokens=1)
    sampler = Sampler(parameters, 0, 0, NO_PROMPT, VOCAB, ends=(4,))
    assert sampler.drawing is None
    sampler.choose(make_logits())
    assert sampler.drawing is not None
