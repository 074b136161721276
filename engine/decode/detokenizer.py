"""Token ids to text, one token at a time, ending at stop strings.

Works on bytes: a byte-level BPE token is a run of bytes that need not end where a character
ends, so bytes go through an incremental UTF-8 decoder and a character appears with its last
byte. Each token costs time proportional to its own length, however long the text already is.
"""

import codecs
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, pre_tokenizers

from ..errors import CheckpointError, InvalidRequestError


class TokenBytes:
    """The bytes of every token of a byte-level BPE vocabulary; control tokens have none.

    Raises:
        CheckpointError: the tokenizer's decoder is not byte-level.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            kind = type(tokenizer.decoder).__name__
            raise CheckpointError(
                f"the tokenizer's decoder is {kind}; Longreach serves byte-level BPE (ByteLevel)"
            )
        self._encode = tokenizer.encode
        byte_of_letter = _byte_alphabet()
        self._bytes: dict[int, bytes] = {
            token_id: _bytes_of(token, byte_of_letter)
            for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()
        }
        self._control = {
            token_id: added.content.encode()
            for token_id, added in tokenizer.get_added_tokens_decoder().items()
            if added.special
        }
        self._bytes |= dict.fromkeys(self._control, b"")

    def __getitem__(self, token_id: int) -> bytes:
        """Bytes of one token; none for the unused ids that pad a model's vocabulary."""
        return self._bytes.get(token_id, b"")

    def spelled(self, token_id: int) -> bytes:
        """The same, but a control token has the bytes of its name, as `<|im_end|>`."""
        return self._control.get(token_id) or self[token_id]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, as the tokenizer makes them; it means no control token."""
        ids = self._encode(text, add_special_tokens=False).ids
        if all(self[token_id] for token_id in ids):
            return ids
        # Control tokens are recognized in text, and none is of one character.
        return [each for letter in text for each in self._encode(letter).ids]


class Detokenizer:
    """The text of one growing answer.

    Text is final once returned. Held back are the bytes of an incomplete character and
    whatever could turn out to be the beginning of a stop string; a stop string itself, and
    everything behind it, is never returned.

    Args:
        stop: the stop strings.
        min_tokens: of so many tokens, from the first on, the text is not looked at for them.
        shows_control: control tokens are part of the text, by their names.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        shows_control: bool = False,
    ) -> None:
        self._unlooked = min_tokens
        self._bytes_of = token_bytes.spelled if shows_control else token_bytes.__getitem__
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = _StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared; no more text will come."""
        return self._stop.found

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain now."""
        text = self._characters.decode(self._bytes_of(token_id))
        if self._unlooked > 0:
            self._unlooked -= 1
            return text
        return self._stop.push(text)

    def finish(self) -> str:
        """Return what is held back: no token will follow. Incomplete bytes become U+FFFD."""
        text = self._stop.push(self._characters.decode(b"", final=True))
        return text + self._stop.flush()


class _StopStrings:
    """Cuts a stream of text before the stop string that is first to be complete.

    Of several that are complete with the same character the longest counts. That makes the
    cut a function of the text alone, not of how tokens happened to split it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise InvalidRequestError("a stop string is empty; leave it out")
        self._matchers = [_StopString(pattern) for pattern in stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if self.found:
            return ""
        text = self._held + text
        for index in range(len(self._held), len(text)):
            complete = [m.length for m in self._matchers if m.advance(text[index])]
            if complete:
                self.found = True
                self._held = ""
                return text[: index + 1 - max(complete)]
        keep = max((matcher.matched for matcher in self._matchers), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class _StopString:
    """Knuth-Morris-Pratt: how much of one stop string the text seen so far ends with."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.length = len(pattern)
        self.matched = 0
        self._borders = _borders(pattern)

    def advance(self, character: str) -> bool:
        """Take one character; whether the stop string is complete with it."""
        while self.matched and self._pattern[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        self.matched += self._pattern[self.matched] == character
        return self.matched == self.length


def _borders(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper border."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        length += pattern[index] == pattern[length]
        borders[index] = length
    return borders


def _byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary, inverted.

    Printable bytes of Latin-1 stand for themselves; the others, in order, for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    if set(alphabet) != set(pre_tokenizers.ByteLevel.alphabet()):
        raise CheckpointError("the installed tokenizers package has another byte-level alphabet")
    return alphabet


def _bytes_of(token: str, byte_of_letter: dict[str, int]) -> bytes:
    """A token with a letter outside the alphabet is added text, spelled as it is."""
    try:
        return bytes(byte_of_letter[letter] for letter in token)
    except KeyError:
        return token.encode("utf-8")
