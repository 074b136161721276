"""One step of decoding: a token more for every sequence of a batch.

What goes in and comes out, whichever implementation runs; `make_step` says which.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ...kernels.page_size import PAGE_TOKENS
from ...kernels.pages import BlockTable
from ..messages import ChosenToken
from .sampler import Drawing, Logits

Outcome = Logits | ChosenToken
"""Logits [vocab] after a row's token; or the token that was chosen, where the row said how."""


@dataclass(frozen=True, eq=False)
class StepRow:
    """What one sequence brings to a step.

    `token` is at position `length`: so many tokens have K and V in the pages of `table` already.
    `takes_best`: the best token and its log-probability are wanted, and not the logits. Else
    `drawing` says how a device that can may choose the token itself.
    """

    token: int
    length: int
    table: BlockTable
    takes_best: bool
    drawing: Drawing | None = None

    @property
    def slot(self) -> int:
        """Where the token's K and V go: page * 128 + offset."""
        page, offset = divmod(self.length, PAGE_TOKENS)
        return int(self.table.pages[page]) * PAGE_TOKENS + offset


class DecodeStep(ABC):
    """Runs a model over the newest tokens of a batch.

    The same object serves every step of one decoder, whatever sequences come and go.
    """

    @abstractmethod
    def run(self, rows: Sequence[StepRow]) -> list[Outcome]:
        """Write K and V of every row's token to its page, and say what may follow each.

        A step that failed may be run again: it writes the same to the same places.

        Args:
            rows: 1 to `max_batch` of them; their tables have a page for the token.

        Returns:
            for each row its best token, the lowest id among equals, where `takes_best`; the token
            that was drawn, where it has a `drawing` and the step draws; else its logits, float32
            [vocab], which the next step may overwrite. With a token comes the model's own
            log-probability, which is not finite where the logits are not.

        Raises:
            RuntimeError: the device's memory does not suffice for these rows, in any of the ways
                that `memory.out_of_memory` knows.
        """
