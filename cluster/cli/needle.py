"""A document of an exact number of tokens with a pass key hidden in it, and a question for it."""

import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from ...engine.errors import InvalidRequestError
from ...engine.model.pocket import story
from ...engine.text.fitting import fit

Message = dict[str, str]
TokenCount = Callable[[list[Message]], int]
"""How many tokens the whole prompt made of these messages has, chat template included."""


@dataclass(frozen=True)
class HiddenKey:
    """A prompt of exactly `tokens` tokens; `depth` is where its key lies, 0 (start) to 1."""

    messages: list[Message]
    expected: str
    tokens: int
    depth: float


def hide_key(tokens: int, count: TokenCount, seed: int, depth: float | None = None) -> HiddenKey:
    """Make a prompt of exactly `tokens` tokens; the same seed makes the same one.

    Raises:
        InvalidRequestError: so few tokens cannot hold the key and the question, or no text of
            this number was found.
    """
    chance = random.Random(seed)
    depth = chance.random() if depth is None else depth
    key = str(chance.randint(10_000, 99_999))
    fact = story.PASS_KEY_FACT.format(value=key)
    least = count(_messages(fact))
    if tokens < least:
        raise InvalidRequestError(
            f"a prompt of {tokens} tokens cannot hold a key and a question; ask for {least} or more"
        )
    filler = _Filler(chance)
    sample = 4096
    tokens_per_character = max(count(_messages(fact + filler.text(sample))) - least, 1) / sample
    length = round((tokens - least) / tokens_per_character)
    position = filler.sentence_start(depth * length)

    def messages(length: int) -> list[Message]:
        text = filler.text(length)
        return _messages(text[:position] + fact + text[position:])

    # One character more makes at most one token more.
    fitted = fit(lambda length: count(messages(length)), tokens, guess=length)
    if fitted.tokens != tokens:
        raise InvalidRequestError(
            f"no text of exactly {tokens} tokens was found with this tokenizer; ask for another "
            "number"
        )
    return HiddenKey(messages(fitted.size), key, tokens, depth)


class _Filler:
    """The story's first characters, as many as are asked for."""

    def __init__(self, chance: random.Random) -> None:
        self._sentences = story.sentences(chance)
        self._text = ""
        self._starts: list[int] = []

    def text(self, length: int) -> str:
        """The first `length` characters."""
        if len(self._text) < length:
            self._grow(length)
        return self._text[:length]

    def sentence_start(self, position: float) -> int:
        """The start of the sentence that lies there."""
        self.text(int(position) + 1)
        return self._starts[bisect_right(self._starts, position) - 1]

    def _grow(self, length: int) -> None:
        sentences = []
        missing = length - len(self._text)
        while missing > 0:
            sentences.append(next(self._sentences))
            missing -= len(sentences[-1])
        lengths = [len(sentence) for sentence in sentences]
        self._starts.extend(accumulate(lengths[:-1], initial=len(self._text)))
        self._text += "".join(sentences)


def _messages(document: str) -> list[Message]:
    return [{"role": "user", "content": f"{document}\n{story.PASS_KEY_QUESTION}"}]
