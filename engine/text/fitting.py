"""Text of a length that is asked for in tokens, whatever the tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InvalidRequestError

_FIRST_STEP = 64
_MOST_COUNTS = 40


@dataclass(frozen=True)
class Fitted:
    """A size, and the tokens that it has."""

    size: int
    tokens: int


def fit(
    count: Callable[[int], int], tokens: int, least: int = 0, guess: int | None = None
) -> Fitted:
    """A size of exactly `tokens` tokens, or of fewer where the next size has more.

    Where one size more is at most one token more, it has exactly `tokens` of them.

    Args:
        count: tokens of a size, which is in units of its own.
        least: the smallest size that there is.
        guess: where to look first, if that is known.

    Raises:
        InvalidRequestError: the smallest size has too many tokens already.
    """
    low, low_tokens = least, count(least)
    if low_tokens > tokens:
        raise InvalidRequestError(
            f"the shortest prompt of this kind has {low_tokens} tokens, which is more than "
            f"{tokens}; ask for {low_tokens} or more"
        )
    # A size of `low` fits and one of `high` does not; between them the next guess is on a line.
    high = None
    guess = least + _FIRST_STEP if guess is None else max(guess, least + 1)
    for _ in range(_MOST_COUNTS):
        if low_tokens == tokens or high == low + 1:
            break
        counted = count(guess)
        slope = max(counted - low_tokens, 1) / (guess - low)
        if counted <= tokens:
            low, low_tokens = guess, counted
        else:
            high = guess
        guess = low + max(1, int((tokens - low_tokens) / slope))
        if high is not None:
            guess = min(guess, high - 1)
    return Fitted(low, low_tokens)
