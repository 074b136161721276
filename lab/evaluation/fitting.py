"""Prompts of the length that was asked for, whatever the tokenizer."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from ...engine.errors import InvalidRequestError
from .answerer import TokenCount

_FIRST_STEP = 64
_MOST_COUNTS = 40


class HasContent(Protocol):
    """Whatever has the text of a prompt."""

    @property
    def content(self) -> str:
        """What the user says."""
        ...


P = TypeVar("P", bound=HasContent)


def fit(build: Callable[[int], P], tokens: int, count: TokenCount, least: int = 0) -> P:
    """The largest prompt of at most `tokens` tokens that `build` makes.

    Args:
        build: makes a prompt of a size in units of its own; a larger one has no fewer tokens.
        count: of the tokens of a whole prompt.
        least: the smallest size that can be built.

    Raises:
        InvalidRequestError: the smallest prompt is too long already.
    """
    best = build(least)
    low, low_tokens = least, count(best.content)
    if low_tokens > tokens:
        raise InvalidRequestError(
            f"the shortest prompt of this task has {low_tokens} tokens, which is more than "
            f"{tokens}; ask for a greater length"
        )
    # A size of `low` fits and one of `high` does not; between them the next guess is on a line.
    high = None
    guess = least + _FIRST_STEP
    for _ in range(_MOST_COUNTS):
        if low_tokens == tokens or high == low + 1:
            break
        prompt = build(guess)
        counted = count(prompt.content)
        slope = max(counted - low_tokens, 1) / (guess - low)
        if counted <= tokens:
            best, low, low_tokens = prompt, guess, counted
        else:
            high = guess
        guess = low + max(1, int((tokens - low_tokens) / slope))
        if high is not None:
            guess = min(guess, high - 1)
    return best
