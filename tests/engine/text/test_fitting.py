"""Sizes of a number of tokens, for any tokenizer."""

import random
from bisect import bisect_right
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.engine.errors import InvalidRequestError
from longreach.engine.text.fitting import fit


@given(tokens=st.integers(100, 10**6), per_unit=st.integers(1, 200), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_nothing_larger_would_have_fitted(tokens: int, per_unit: int, seed: int) -> None:
    """For any tokenizer in which larger texts have more tokens, however unevenly."""
    jitter = random.Random(seed).choices(range(per_unit + 1), k=50)

    def counted(size: int) -> int:
        return size * per_unit + jitter[size % 50] // 2

    found = fit(counted, tokens)
    assert found.tokens == counted(found.size) <= tokens < counted(found.size + 2)


@given(
    tokens=st.integers(20, 100_000),
    off=st.floats(0.5, 2),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_one_token_more_at_most_is_met_exactly_and_soon(tokens: int, off: float, seed: int) -> None:
    """Text as a tokenizer sees it: a character is a token or joins the one before it."""
    chance = random.Random(seed)
    ends = list(accumulate(chance.choices(range(1, 9), k=2 * tokens)))
    asked: list[int] = []

    def counted(size: int) -> int:
        asked.append(size)
        return 20 + bisect_right(ends, size)

    found = fit(counted, tokens, guess=round(off * 4.5 * tokens))
    assert found.tokens == tokens
    assert len(asked) <= 20


def test_what_cannot_be_small_enough_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="ask for 31"):
        fit(lambda size: 31 + size, 30)
