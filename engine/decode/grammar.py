"""Which tokens keep an answer within a grammar.

Grammars are texts in llguidance's dialect of Lark, which includes regular expressions and JSON
schemas. llguidance compiles them and walks them; it is loaded with the first one.

Its own limits bound the time of a step and the memory of a grammar, but not the time to compile
one, and a hostile grammar may end the process on which it is compiled. So whoever takes grammars
from strangers compiles each in a process that it can lose first: `cluster/rest/grammar_check.py`.
"""

import re
import threading
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import GrammarError
from .detokenizer import TokenBytes

if TYPE_CHECKING:
    import llguidance

Mask = npt.NDArray[np.uint32]
"""A bit for each token of a vocabulary, [ceil(vocab / 32)], the lowest bit of a word first."""

# Of the text that llguidance was given, which is not always what a client wrote.
_POSITION = re.compile(r"^(at )?\d+\(\d+\): ")
_NAMES = {"NoExtensionBias": "no text matches the grammar"}
_WORD_BITS = 32
# Of these a lexer has some hundreds in practice; each takes one or two kilobytes.
_MOST_LEXER_STATES = 50_000


def allowed_tokens(mask: Mask, vocab_size: int) -> npt.NDArray[np.bool_]:
    """A mask's bits, bool [vocab]."""
    bits = np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little")
    return bits.view(np.bool_)


class GrammarCompiler:
    """Compiles grammars over one vocabulary. Safe to use from many threads.

    Args:
        token_bytes: of the tokenizer.
        vocab_size: rows of the model's logits; those that are no tokens are never allowed.
        end_ids: tokens that may end an answer whose grammar is complete.
    """

    def __init__(self, token_bytes: TokenBytes, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._token_bytes, self._vocab_size, self._end_ids = token_bytes, vocab_size, end_ids
        self._making = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None

    def compile(self, grammar: str) -> "Constraint":
        """What an answer's first token may be, and so on. Takes milliseconds to seconds.

        Raises:
            GrammarError: the grammar is malformed, unsupported, or too large.
        """
        from llguidance import LLMatcher, LLParserLimits

        if not self._end_ids:
            raise GrammarError("the model has no token that ends an answer")
        limits = LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._for_matchers(), grammar, log_level=0, limits=limits)
        _raise_error_of(matcher)
        return Constraint(matcher, self._vocab_size)

    def _for_matchers(self) -> "llguidance.LLTokenizer":
        """The vocabulary as llguidance wants it; a second's work for one of 150,000 tokens."""
        from llguidance import LLTokenizer

        with self._making:
            if self._vocabulary is None:
                tokens = _Vocabulary(self._token_bytes, self._vocab_size, self._end_ids[0])
                # It takes whatever has these attributes, and says a class of its own.
                self._vocabulary = LLTokenizer(
                    tokens,  # pyright: ignore[reportArgumentType]
                    n_vocab=self._vocab_size,
                    eos_token=list(self._end_ids),
                )
            return self._vocabulary


class Constraint:
    """What one choice of an answer may say next. Used by one thread at a time."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._mask: Mask = np.zeros(-(-vocab_size // _WORD_BITS), dtype=np.uint32)
        self._is_known = False  # whether the mask is that of the next token
        self._ahead: Future[None] | None = None

    def copy(self) -> "Constraint":
        """The same state, to go on from by itself."""
        return Constraint(self._matcher.deep_copy(), self._vocab_size)

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole, and nothing can follow."""
        return self._matcher.is_stopped()

    def compute_ahead(self, executor: Executor) -> None:
        """Begin to compute `allowed` beside whatever else is done meanwhile."""
        if self._ahead is None and not self._is_known:
            self._ahead = executor.submit(self._compute)

    def allowed(self) -> Mask:
        """The tokens that may come next; valid until the next `take`.

        Raises:
            GrammarError: a limit is reached, or no token fits.
        """
        self._wait()
        if not self._is_known:
            self._compute()
        _raise_error_of(self._matcher)
        if not self._mask.any():
            raise GrammarError("no token of this model's vocabulary fits the grammar here")
        return self._mask

    def take(self, token_id: int) -> None:
        """An allowed token was chosen.

        Raises:
            GrammarError: a limit is reached.
        """
        self._wait()
        self._is_known = False
        self._matcher.consume_token(token_id)
        _raise_error_of(self._matcher)

    def _wait(self) -> None:
        """Return when nothing is being computed ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()

    def _compute(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._is_known = True


class _Vocabulary:
    """The attributes that llguidance reads of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, token_bytes: TokenBytes, vocab_size: int, end_id: int) -> None:
        self._token_bytes = token_bytes
        self.eos_token_id = end_id
        self.special_token_ids = [each for each in range(vocab_size) if not token_bytes[each]]
        # What has no bytes is named apart from all text.
        self.tokens = [
            token_bytes[each] or f"<|control_{each}|>".encode() for each in range(vocab_size)
        ]

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text: where a grammar forces it, the model's own are preferred."""
        return self._token_bytes.encode(text)


def _raise_error_of(matcher: "llguidance.LLMatcher") -> None:
    if matcher.is_error():
        raise GrammarError(_first_line(matcher.get_error()))


def _first_line(error: str) -> str:
    """llguidance goes on with an excerpt of the grammar."""
    line = error.strip().partition("\n")[0]
    return _NAMES.get(line) or _POSITION.sub("", line) or "the grammar cannot be compiled"
