"""Which tokens a sequence may say next: those of an earlier attempt, then those of its grammar.

vLLM masks logits where it has structured outputs. Here a mask also has the tokens that a client got
before its decode worker died, one at a time: vLLM takes them again as it took them then, so that
penalties are counted and seeded draws are made as they were.
"""

from collections.abc import Sequence

import numpy as np

from ...engine.decode.grammar import Constraint, Mask
from ...engine.errors import GrammarError

_WORD_BITS = 32


class HeldTo:
    """The masks of one sequence, and where it is in them.

    A limit of a grammar that is reached ends no step: it is kept as `failure`, and nothing is
    masked from there on.

    Args:
        replayed: tokens that come first.
    """

    def __init__(self, replayed: Sequence[int]) -> None:
        self._replayed = replayed
        self._constraint: Constraint | None = None
        self._taken = 0
        self.failure: GrammarError | None = None

    def constrain(self, constraint: Constraint | None) -> None:
        """What the answer is held to beside: before the first token."""
        self._constraint = constraint

    @property
    def is_open(self) -> bool:
        """Whether every token may come next."""
        if self._taken < len(self._replayed):
            return False
        return self._constraint is None or self.failure is not None or self.is_whole

    @property
    def is_whole(self) -> bool:
        """Whether nothing can follow, by the grammar."""
        if self._constraint is None or self.failure is not None:
            return False
        return self._constraint.is_complete

    def fill(self, mask: Mask) -> None:
        """Set the bits of tokens that may come next, in words of 32."""
        if self._taken < len(self._replayed):
            word, bit = divmod(self._replayed[self._taken], _WORD_BITS)
            mask[:] = 0
            mask[word] = 1 << bit
            return
        if not self.is_open and self._constraint is not None:
            try:
                mask[:] = self._constraint.allowed()
                return
            except GrammarError as error:
                self.failure = error
        mask[:] = np.uint32(0xFFFFFFFF)

    def take(self, tokens: Sequence[int]) -> None:
        """These have been generated."""
        self._taken += len(tokens)
        if self._constraint is None or self.failure is not None:
            return
        try:
            for token in tokens:
                self._constraint.take(token)
        except GrammarError as error:
            self.failure = error
