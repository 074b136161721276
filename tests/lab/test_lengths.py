"""Lengths are read as they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.lab.lengths import format_length, parse_length


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1000000", 1_000_000), ("32K", 32_768), ("1M", 1_048_576), (" 8k ", 8_192), ("3m", 3 << 20)],
)
def test_lengths_are_those_of_powers_of_two(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "0", "0K", "-1K", "1.5M", "1G", "1KK", "1 K"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no number of tokens"):
        parse_length(text)


@given(st.integers(1, 1 << 40))
def test_what_is_written_is_read_again(tokens: int) -> None:
    assert parse_length(format_length(tokens).replace(",", "")) == tokens
