"""Mixes of prompt lengths."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.loadtest.mixed.lengths import format_length, parse_length
from longreach.loadtest.mixed.mix import DEFAULT, Mix


@pytest.mark.parametrize(
    ("text", "tokens"), [("1000", 1_000), ("1K", 1_024), ("64k", 65_536), ("1M", 1 << 20)]
)
def test_lengths_are_read(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens


@given(st.integers(1, 1 << 30))
def test_lengths_are_written_as_they_are_read(tokens: int) -> None:
    assert parse_length(format_length(tokens)) == tokens


@pytest.mark.parametrize("text", ["", "K", "0", "-1", "1.5K", "1G", "many"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="length"):
        parse_length(text)


def test_the_default_is_seven_short_ones_of_ten_and_two_long_ones_of_a_hundred() -> None:
    mix = Mix.parse(DEFAULT)
    drawn = Counter(kind.name for kind, _ in mix.draw(100, seed=1))
    assert drawn == {"1K": 70, "8K": 20, "64K": 8, "512K-1M": 2}
    [long, longer] = sorted(tokens for kind, tokens in mix.draw(100, 1) if kind.name == "512K-1M")
    assert 1 << 19 <= long <= longer <= 1 << 20


def test_a_laptops_is_the_same_with_an_eighth_of_every_length() -> None:
    names = [each.name for each in Mix.parse(DEFAULT).scaled(1 / 8).classes]
    assert names == ["128", "1K", "8K", "64K-128K"]


WEIGHTS = st.lists(st.integers(1, 1_000), min_size=1, max_size=6)


def mix_of(weights: list[int]) -> Mix:
    return Mix.parse(",".join(f"{number + 1}K={each}" for number, each in enumerate(weights)))


@given(WEIGHTS, st.integers(0, 500))
def test_shares_are_exact_to_one_request(weights: list[int], requests: int) -> None:
    counts = mix_of(weights).counts(requests)
    assert sum(counts) == requests
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - requests * weight / sum(weights)) < 1


@given(WEIGHTS, st.integers(1, 200), st.integers(0, 1 << 40))
def test_what_is_drawn_has_these_shares_and_follows_from_the_seed(
    weights: list[int], requests: int, seed: int
) -> None:
    mix = mix_of(weights)
    drawn = mix.draw(requests, seed)
    counted = Counter(kind for kind, _ in drawn)
    assert [counted[each] for each in mix.classes] == mix.counts(requests)
    assert all(kind.lowest <= tokens <= kind.highest for kind, tokens in drawn)
    assert drawn == mix.draw(requests, seed)


def test_order_is_chance() -> None:
    mix = Mix.parse(DEFAULT)
    assert mix.draw(100, 1) != mix.draw(100, 2)
    assert [kind for kind, _ in mix.draw(100, 1)][:70] != [mix.classes[0]] * 70


def test_classes_are_shortest_first_and_cut_where_an_endpoint_ends() -> None:
    mix = Mix.parse("512K-1M=2,1K=70")
    assert [each.name for each in mix.classes] == ["1K", "512K-1M"]
    cut = mix.cut_at(1_000_000)
    assert (cut.classes[1].lowest, cut.classes[1].highest) == (1 << 19, 1_000_000)
    with pytest.raises(ValueError, match="--mix"):
        mix.cut_at((1 << 19) - 1)


@pytest.mark.parametrize(
    "text", ["", "1K", "1K=", "1K=0", "1K=-1", "1K=nan", "1K=inf", "2K-1K=1", "1K=1,1K=2", "x=1"]
)
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Mix.parse(text)
