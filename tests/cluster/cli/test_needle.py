"""Documents of an exact number of tokens, whatever the tokenizer."""

import pytest

from longreach.cluster.cli.needle import hide_key
from longreach.engine.errors import InvalidRequestError
from longreach.engine.model.pocket.story import PASS_KEY_QUESTION


def count_bytes(messages: list[dict[str, str]]) -> int:
    return 20 + sum(len(message["content"].encode()) for message in messages)


def count_merged(messages: list[dict[str, str]]) -> int:
    """Like byte pairs: words are tokens, long ones two, and "the" is one with what follows."""
    words = " ".join(message["content"] for message in messages).replace("the ", "the").split()
    return 7 + sum(1 + (len(word) > 6) for word in words)


@pytest.mark.parametrize("count", [count_bytes, count_merged])
@pytest.mark.parametrize("tokens", [1000, 4097, 65536])
def test_the_prompt_has_exactly_the_tokens_asked_for(count, tokens: int) -> None:
    hidden = hide_key(tokens, count, seed=tokens)
    assert count(hidden.messages) == tokens
    [message] = hidden.messages
    assert message["content"].endswith(PASS_KEY_QUESTION)
    assert message["content"].count(f"pass key is {hidden.expected}") == 1


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_key_lies_where_it_was_put(depth: float) -> None:
    [message] = hide_key(20_000, count_bytes, seed=1, depth=depth).messages
    place = message["content"].index("The pass key is")
    assert place / 20_000 == pytest.approx(depth, abs=0.02)


def test_a_seed_makes_the_same_prompt_and_another_seed_another() -> None:
    one, same, other = (hide_key(3000, count_bytes, seed) for seed in (1, 1, 2))
    assert one == same
    assert one.expected != other.expected
    assert one.depth != other.depth


def test_too_few_tokens_are_refused_with_a_number_that_works() -> None:
    with pytest.raises(InvalidRequestError, match="ask for") as refusal:
        hide_key(30, count_bytes, seed=1)
    least = int(str(refusal.value).split()[-3])
    assert count_bytes(hide_key(least, count_bytes, seed=1).messages) == least
