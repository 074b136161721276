"""Which rows of a step belong to whom, on the host: decodes first, then pieces of prompts."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64] | npt.NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """Tokens [start, end) of one sequence, whose earlier ones lie in its pages.

    `first_row` is theirs in the step, `sequence` counts the step's sequences. `length` is what
    temperature goes by: that of the whole prompt, or, of tokens that were generated and are
    computed again, how many there are. `is_prompt`: whether they are part of the prompt.
    """

    sequence: int
    first_row: int
    start: int
    end: int
    length: int
    is_prompt: bool

    @property
    def rows(self) -> slice:
        """Where they are in the step."""
        return slice(self.first_row, self.first_row + self.end - self.start)


@dataclass(frozen=True)
class StepPlan:
    """The first `len(ends)` rows are one each of as many sequences; pieces follow.

    `ends` are tokens of those sequences, the row's own included, 0 for a row that is not used;
    `lengths` are what their temperatures go by.
    """

    ends: list[int]
    lengths: list[int]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, first_rows: Integers, ends: Integers, prompts: Integers) -> "StepPlan":
        """From what an engine says of a step's sequences.

        Args:
            first_rows: [sequences + 1], where the rows of each begin.
            ends: [sequences], tokens of each after the step.
            prompts: [sequences], of each the tokens of its prompt.
        """
        counts = np.diff(first_rows)
        others = np.flatnonzero(counts > 1)
        # Sequences without rows fill a step up to a graph's size, and come last.
        single = int(others[0]) if len(others) else len(counts)
        lengths = np.where(ends[:single] <= prompts[:single], prompts[:single], ends[:single])
        used = counts[:single] == 1
        pieces = (
            piece
            for number in range(single, len(counts))
            for piece in _pieces(
                number, int(first_rows[number]), int(counts[number]), int(ends[number]),
                int(prompts[number]),
            )
        )  # fmt: skip
        return cls(
            np.where(used, ends[:single], 0).tolist(),
            np.where(used, lengths, 1).tolist(),
            tuple(pieces),
        )

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.pieces[-1].rows.stop if self.pieces else len(self.ends)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, after the step."""
        return max([*self.ends, *(piece.end for piece in self.pieces)], default=0)


def _pieces(sequence: int, first_row: int, count: int, end: int, prompt: int) -> Iterator[Piece]:
    """A sequence's rows, cut where its prompt ends: only one that was preempted goes on there."""
    start = end - count
    border = min(max(prompt, start), end)
    if start < border:
        yield Piece(sequence, first_row, start, border, prompt, True)
    if border < end:
        yield Piece(sequence, first_row + border - start, border, end, end, False)
