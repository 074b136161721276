"""One step of decoding: a token more for every sequence of a batch, and pieces of prompts.

What goes in and comes out, whichever implementation runs; `make_step` says which.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...kernels.dual_chunk import SequenceRows
from ...kernels.page_size import PAGE_TOKENS
from ...kernels.pages import BlockTable
from ..messages import ChosenToken, Tokens
from .sampler import Drawing, Logits

Outcome = Logits | ChosenToken
"""Logits [vocab] after a row's token; or the token that was chosen, where the row said how."""


@dataclass(frozen=True, eq=False)
class StepRow:
    """What one sequence brings to a step.

    `token` is at position `length`: so many tokens have K and V in the pages of `table`, when the
    steps before have run. One that the step under way is to choose nobody knows on the host yet:
    `follows` is its place among that step's outcomes, and `token` means nothing. `takes_best`: the
    best token and its log-probability are wanted, and not the logits. Else `drawing` says how a
    device that can may choose the token itself.
    """

    token: int
    length: int
    table: BlockTable
    takes_best: bool
    drawing: Drawing | None = None
    follows: int | None = None

    @property
    def slot(self) -> int:
        """Where the token's K and V go: page * 128 + offset."""
        page, offset = divmod(self.length, PAGE_TOKENS)
        return int(self.table.pages[page]) * PAGE_TOKENS + offset


@dataclass(frozen=True, eq=False)
class PromptPiece:
    """Tokens [start, end) of a prompt, whose earlier ones have K and V in the pages of `table`.

    `start` is a multiple of 128, and `end` as well but at the prompt's end. `takes_best` as a
    row's, after the prompt's last token.
    """

    prompt: Tokens
    start: int
    end: int
    table: BlockTable
    takes_best: bool

    @property
    def drawing(self) -> None:
        """A first token is chosen on the host: every choice of a request draws its own."""
        return None

    @property
    def count(self) -> int:
        """Tokens in it."""
        return self.end - self.start

    @property
    def tokens(self) -> Tokens:
        """They themselves."""
        return self.prompt[self.start : self.end]

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Theirs in the prompt."""
        return np.arange(self.start, self.end)

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """Where their K and V go: page * 128 + offset."""
        pages, offsets = np.divmod(self.positions, PAGE_TOKENS)
        return self.table.pages[pages] * PAGE_TOKENS + offsets

    def rows(self, scale: float) -> SequenceRows:
        """As attention takes them, where `scale` multiplies the logits."""
        return SequenceRows(self.start, self.end, self.table, scale)

    @property
    def ends(self) -> bool:
        """Whether the prompt ends with it."""
        return self.end == len(self.prompt)


@dataclass(frozen=True)
class PromptLimits:
    """Which prompts a step computes: of up to `longest` tokens, `at_once` tokens in all.

    `at_once` is a multiple of 128; a step has no more than `pieces` pieces. `alone`: tokens of the
    only prompt in a step that nobody else waits for, if that is more than `at_once`.
    """

    longest: int
    at_once: int
    pieces: int = 16
    alone: int = 0

    @property
    def sizes_alone(self) -> list[int]:
        """What such a prompt is cut into: `at_once` doubled as often as `alone` allows, rising."""
        sizes = [self.at_once]
        while 0 < 2 * sizes[-1] <= self.alone:
            sizes.append(2 * sizes[-1])
        return sizes


NO_PROMPTS = PromptLimits(0, 0, 0)
"""Prompts are computed elsewhere."""


class StepUnderWay(ABC):
    """A step that is launched, and may not have run yet."""

    @abstractmethod
    def outcomes(self) -> list[Outcome]:
        """Wait for it, and say what may follow; once, and before the next but one is launched.

        Returns:
            for each row, and then for each piece that ends its prompt, its best token, the lowest
            id among equals, where it `takes_best`; the token that was drawn, where it has a
            `drawing` and the step draws; else its logits, float32 [vocab], which the next step may
            overwrite. With a token comes the model's own log-probability, which is not finite where
            the logits are not.
        """


@dataclass(frozen=True)
class HasRun(StepUnderWay):
    """A step that was waited for when it was launched."""

    came: list[Outcome]

    def outcomes(self) -> list[Outcome]:
        return self.came


class DecodeStep(ABC):
    """Runs a model over the newest tokens of a batch, and over pieces of prompts.

    The same object serves every step of one decoder, whatever sequences come and go.
    """

    runs_ahead: bool = False
    """Whether a step may be launched while the one before is under way, whose tokens it takes."""

    @abstractmethod
    def launch(self, rows: Sequence[StepRow], pieces: Sequence[PromptPiece] = ()) -> StepUnderWay:
        """Write K and V of every token to its page, and find out what may follow.

        A step that failed may be launched again: it writes the same to the same places. One step
        may be under way when another is launched, where it `runs_ahead`.

        Args:
            rows: up to `max_batch` of them; their tables have a page for the token. One `follows`
                an outcome that `takes_best`.
            pieces: of different prompts, within the step's `PromptLimits`. There is at least one
                row or piece.

        Raises:
            RuntimeError: the device's memory does not suffice for these rows, in any of the ways
                that `memory.out_of_memory` knows.
        """

    def run(self, rows: Sequence[StepRow], pieces: Sequence[PromptPiece] = ()) -> list[Outcome]:
        """Launch a step and wait for it."""
        return self.launch(rows, pieces).outcomes()
